"""What is retained for backward: the budget, and results that checkpointed layers are asked for again."""

from __future__ import annotations

import functools
import gc
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kt_sft
from kt_sft import experts
from kt_sft.engine import retention
from kt_sft.engine.operands import Dropout
from kt_sft.engine.retention import CallKey, CheckpointedPiece, Retention, in_pieces

E, H, I, T, K = 4, 16, 128, 1024, 2  # T·K rows of 2I BF16 values: 1 MiB
MIB = 1 << 20


ROUTING = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)


def memory() -> Tensor:
    return torch.zeros(1)


class TestRetention:
    def test_the_oldest_are_given_up_for_new_ones(self) -> None:
        kept = Retention()
        first, second, third = (kept.take(4, 10, memory, *ROUTING) for _ in range(3))
        assert first is not None
        assert first.pre_SI is None
        assert second is not None
        assert third is not None
        assert second.pre_SI is not None
        assert third.pre_SI is not None
        assert kept.nbytes == 8
        large = kept.take(10, 10, memory, *ROUTING)
        assert second.pre_SI is third.pre_SI is None
        assert kept.nbytes == 10
        del large
        assert kept.nbytes == 0

    def test_what_does_not_fit_alone_takes_no_room(self) -> None:
        kept = Retention()
        small = kept.take(4, 10, memory, *ROUTING)
        assert kept.take(11, 10, lambda: pytest.fail("no memory may be taken"), *ROUTING) is None
        assert small is not None
        assert small.pre_SI is not None
        assert kept.nbytes == 4

    def test_room_is_made_before_memory_is_taken(self) -> None:
        kept = Retention()
        first = kept.take(6, 10, memory, *ROUTING)
        assert first is not None

        def allocate() -> Tensor:
            assert first.pre_SI is None
            assert kept.nbytes == 0
            return memory()

        assert kept.take(6, 10, allocate, *ROUTING) is not None

    def test_what_is_freed_makes_room(self) -> None:
        kept = Retention()
        first, second = kept.take(4, 10, memory, *ROUTING), kept.take(4, 10, memory, *ROUTING)
        del first
        third = kept.take(6, 10, memory, *ROUTING)
        assert second is not None
        assert third is not None
        assert second.pre_SI is not None
        assert kept.nbytes == 10

    def test_a_collection_meanwhile_forgets_others(self) -> None:
        """Pre-activations in cycles, freed wherever the collector happens to run."""
        kept, before = Retention(), gc.get_threshold()
        gc.set_threshold(5)
        try:
            for _ in range(3000):
                cycle: list[object] = [kept.take(10, 50, memory, *ROUTING)]
                cycle.append(cycle)
        finally:
            gc.set_threshold(*before)
        del cycle
        gc.collect()
        assert kept.nbytes == 0

    def test_what_cannot_be_given_up_leaves_less_room(self) -> None:
        kept = Retention()
        first, second = (kept.take(4, 10, memory, *ROUTING) for _ in range(2))
        assert first is not None
        assert second is not None
        owner = memory()
        kept.count(5, 10, owner)
        assert (first.pre_SI, kept.nbytes) == (None, 9)
        assert kept.take(6, 10, lambda: pytest.fail("no memory may be taken"), *ROUTING) is None
        assert second.pre_SI is not None
        del owner
        assert kept.nbytes == 4
        assert kept.take(6, 10, memory, *ROUTING) is not None


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Retention:
    fresh = Retention()
    monkeypatch.setattr(experts, "retention", lambda: fresh)
    return fresh


def make_layers(count: int = 1, **settings: Any) -> list[kt_sft.CpuExperts]:
    torch.manual_seed(0)
    config = kt_sft.KTConfig(**settings)
    weights = [(torch.randn(E, 2 * I, H) / 4, torch.randn(E, H, I) / 11) for _ in range(count)]
    return [kt_sft.CpuExperts.from_weights(*both, config) for both in weights]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(T, H, requires_grad=True), torch.randint(0, E, (T, K)), torch.rand(T, K, requires_grad=True)


def gradients(function: Callable[..., Tensor], times: int = 1) -> list[Tensor]:
    x, idx, w = inputs()
    y = function(x, idx, w)
    for left in reversed(range(times)):
        y.square().sum().backward(retain_graph=left > 0)
    assert x.grad is not None
    assert w.grad is not None
    return [y.detach(), x.grad, w.grad]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def in_a_row(layers: list[kt_sft.CpuExperts]) -> Callable[..., Tensor]:
    return lambda x, idx, w: functools.reduce(lambda y, layer: layer(y, idx, w), layers, x)


class TestBudget:
    @pytest.mark.parametrize(("retained_mb", "recomputed"), [(3, 0), (2, 1), (1, 2), (0, 3)])
    def test_the_first_layers_are_computed_again(self, kept: Retention, retained_mb: int, recomputed: int) -> None:
        layers = make_layers(3, retained_mb=retained_mb)
        expected = gradients(in_a_row(make_layers(3, activation_policy="recompute")))
        for layer in layers:
            layer.meter = layer.new_meter()
        assert same(gradients(in_a_row(layers)), expected)
        flops = []
        for layer in layers:
            assert layer.meter is not None
            forward, backward = layer.meter.take()[0]
            flops.append(backward.flops / forward.flops)
        # Gate and up once more: 5 products instead of 3.
        assert flops == pytest.approx([5 / 3] * recomputed + [1] * (3 - recomputed))
        assert kept.nbytes == 0

    def test_a_full_budget_is_said_once(self, kept: Retention, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "kt_sft"):
            for _ in range(2):
                gradients(in_a_row(make_layers(3, retained_mb=1)))
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
            "the memory for retained activations is full"
        ]

    def test_graphs_that_nobody_walks_are_freed(self, kept: Retention) -> None:
        (layer,) = make_layers(retained_mb=4)
        outputs = [layer(*inputs()) for _ in range(3)]
        assert kept.nbytes == 3 * MIB
        del outputs
        gc.collect()
        assert kept.nbytes == 0

    def test_copies_of_hidden_states_count(self, kept: Retention) -> None:
        """As of those that come from an accelerator."""
        (layer,) = make_layers(retained_mb=4)
        x, idx, w = inputs()
        y = layer(x.T.contiguous().T, idx, w)
        assert kept.nbytes == MIB + x.nbytes
        del y
        assert kept.nbytes == 0
        y = layer(x, idx, w)  # the model's own tensor
        assert y.requires_grad
        assert kept.nbytes == MIB

    @pytest.mark.parametrize(("processes", "limit"), [(None, 500), (2, 250)])
    def test_without_a_setting_it_is_half_of_what_is_free(
        self, processes: int | None, limit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name, value in {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": processes}.items():
            monkeypatch.setenv(name, str(value)) if processes else monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(retention, "available_bytes", lambda: 1000 * MIB)
        fresh = functools.cache(retention._free_share.__wrapped__)
        monkeypatch.setattr(retention, "_free_share", fresh)
        with caplog.at_level(logging.INFO, "kt_sft"):
            assert retention.limit_of(None) == retention.limit_of(None) == limit * MIB
        (record,) = caplog.records
        assert f"retained in up to {limit / 1024:.1f} GiB of host memory, half of what is free" in record.getMessage()
        assert retention.limit_of(7) == 7 * MIB

    def test_there_is_no_limit_where_the_system_does_not_say_what_is_free(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retention, "available_bytes", lambda: None)
        assert retention._free_share.__wrapped__() == sys.maxsize


def forwards(layer: kt_sft.CpuExperts) -> int:
    return layer.engine.stats()["forward_calls"]


def changing(layer: kt_sft.CpuExperts, what: str) -> Callable[..., Tensor]:
    """A function that gives the layer something else at each call, or changes its output."""
    calls = []

    def function(x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        calls.append(1)
        if what == "tokens":
            x = x * len(calls)
        elif what == "weights":
            w = w * len(calls)
        elif what == "experts":
            idx = (idx + len(calls)) % E
        y = layer(x, idx, w)
        return y.mul_(2) if what == "output in place" else y

    return function


@pytest.mark.parametrize("use_reentrant", [True, False])
class TestCheckpointing:
    @pytest.mark.parametrize("retained_mb", [8, 1, 0])
    def test_forward_runs_once_and_gives_the_same_bits(
        self, use_reentrant: bool, retained_mb: int, kept: Retention
    ) -> None:
        layers = make_layers(3, retained_mb=retained_mb)
        plain = gradients(in_a_row(layers))
        before = forwards(layers[0])
        pieces = [functools.partial(in_pieces(checkpoint), layer, use_reentrant=use_reentrant) for layer in layers]
        assert same(gradients(in_a_row(pieces)), plain)
        assert forwards(layers[0]) - before == 3
        gc.collect()
        assert kept.nbytes == 0

    def test_with_recompute_it_runs_again(self, use_reentrant: bool, kept: Retention) -> None:
        (layer,) = make_layers(activation_policy="recompute")
        before = forwards(layer)
        gradients(functools.partial(in_pieces(checkpoint), layer, use_reentrant=use_reentrant))
        assert forwards(layer) - before == 2
        assert kept.nbytes == 0

    def test_a_layer_that_is_called_twice_in_a_piece(self, use_reentrant: bool, kept: Retention) -> None:
        (layer,) = make_layers()
        function = in_a_row([layer, layer])
        plain, before = gradients(function), forwards(layer)
        assert same(gradients(functools.partial(in_pieces(checkpoint), function, use_reentrant=use_reentrant)), plain)
        assert forwards(layer) - before == 2

    def test_torchs_own_checkpointing_is_right_too(self, use_reentrant: bool, kept: Retention) -> None:
        (reference,), (layer,) = make_layers(activation_policy="recompute"), make_layers()
        for what in ("nothing", "weights", "experts"):
            expected, found = (
                gradients(functools.partial(checkpoint, changing(each, what), use_reentrant=use_reentrant))
                for each in (reference, layer)
            )
            assert same(found, expected)
        gc.collect()
        assert kept.nbytes == 0

    @pytest.mark.parametrize("what", ["tokens", "weights", "experts", "output in place"])
    def test_what_is_not_the_same_call_is_computed(self, what: str, use_reentrant: bool, kept: Retention) -> None:
        """As a model that computes something else the second time, by whatever chance, would have it."""
        (reference,), (layer,) = make_layers(activation_policy="recompute"), make_layers()
        function = functools.partial(checkpoint, changing(reference, what), use_reentrant=use_reentrant)
        expected = gradients(function)
        before = forwards(layer)
        function = functools.partial(in_pieces(checkpoint), changing(layer, what), use_reentrant=use_reentrant)
        assert same(gradients(function), expected)
        assert forwards(layer) - before == 2
        gc.collect()
        assert kept.nbytes == 0

    def test_without_a_graph_nothing_is_kept(
        self, use_reentrant: bool, kept: Retention, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor is anything given up for it."""
        (layer,) = make_layers()
        monkeypatch.setattr(kept, "take", lambda *_: pytest.fail("no memory may be taken"))
        for without_graph in (torch.no_grad, torch.inference_mode):
            with without_graph():
                in_pieces(checkpoint)(layer, *inputs(), use_reentrant=use_reentrant)
        gc.collect()
        assert kept.nbytes == 0

    def test_a_graph_that_nobody_walks_keeps_nothing_when_it_is_gone(
        self, use_reentrant: bool, kept: Retention
    ) -> None:
        (layer,) = make_layers()
        y = in_pieces(checkpoint)(layer, *inputs(), use_reentrant=use_reentrant)
        assert kept.nbytes == MIB + y.nbytes
        del y
        gc.collect()
        assert kept.nbytes == 0


def test_a_graph_can_be_walked_twice(kept: Retention) -> None:
    (layer,) = make_layers()
    expected = gradients(layer, times=2)
    assert same(gradients(functools.partial(in_pieces(checkpoint), layer, use_reentrant=False), times=2), expected)


class TestCallKey:
    x, idx, w = torch.randn(3, 5), torch.tensor([[0], [1], [0]]), torch.rand(3, 1)

    def key(self, *settings: Any, **changed: Tensor) -> CallKey:
        tensors = {"x": self.x, "idx": self.idx, "w": self.w} | changed
        return CallKey.of(*tensors.values(), *settings)

    def test_what_is_known_before_tokens_are_there_is_compared(self) -> None:
        same = self.key(None, Dropout())
        assert same.facts == self.key(None, Dropout(), x=self.x + 1).facts  # which the engine tells
        for other in (
            self.key(None, Dropout(seed=1, below=1)),
            self.key(object(), Dropout()),
            self.key(None, Dropout(), x=self.x.to(torch.bfloat16)),
            self.key(None, Dropout(), x=self.x[:2], idx=self.idx[:2], w=self.w[:2]),
            self.key(None, Dropout(), idx=self.idx.expand(3, 2), w=self.w.expand(3, 2)),
        ):
            assert same.facts != other.facts

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("columns", [3, 64])
    def test_a_single_bit_is_told(self, dtype: torch.dtype, columns: int, kept: Retention) -> None:
        weights = torch.randn(E, 2 * I, columns) / 4, torch.randn(E, columns, I) / 11
        layer = kt_sft.CpuExperts.from_weights(*weights)
        x = torch.randn(4, columns).to(dtype)[1:]  # at any address
        bit = x.clone()
        bit[1, 2] = torch.nextafter(bit[1, 2], torch.tensor(9.0, dtype=dtype))
        for second, forwards_in_all in ((x.clone(), 1), (bit, 2), (x[[1, 0, 2]], 2), (x.flip(1), 2)):
            values, before = iter((x, second)), forwards(layer)
            leaf = torch.zeros((), requires_grad=True)

            def function(leaf: Tensor, values: Any = values) -> Tensor:
                return layer(next(values) + leaf.to(dtype), self.idx, self.w)

            in_pieces(checkpoint)(function, leaf, use_reentrant=False).sum().backward()
            assert forwards(layer) - before == forwards_in_all


def test_a_piece_looks_like_the_partial_it_was_made_of() -> None:
    layer = torch.nn.Linear(2, 2)
    bound = CheckpointedPiece.of(functools.partial(layer.__call__, 1, keyword=2))
    assert isinstance(bound, functools.partial)
    assert (bound.func.__self__, bound.args, bound.keywords) == (layer, (1,), {"keyword": 2})  # type: ignore[attr-defined]
    plain = CheckpointedPiece.of(layer.__call__)
    assert plain.func.__self__ is layer  # type: ignore[attr-defined]

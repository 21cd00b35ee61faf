"""Transfers between an accelerator and the engine, on a simulated device: whatever it does late, results are right.

Each test of an ordering fails where the wait that makes it is taken out.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kt_sft
from kt_sft import experts
from kt_sft.engine.operands import Factors, Term
from kt_sft.engine.retention import in_pieces
from kt_sft.engine.watchdog import EngineError
from kt_sft.offload import transfers
from kt_sft.offload.transfers import Submitter, Transfers
from tests.simulated_device import SimulatedDevice
from tests.simulated_experts import WAYS, E, H, I, K, T, make_layers, on_device

CPU = torch.device("cpu")


R = 2
Arguments = tuple[Tensor, Tensor, Tensor]


def inputs(seed: int = 1) -> Arguments:
    random = torch.Generator().manual_seed(seed)
    x, w = torch.randn(T, H, generator=random), torch.rand(T, K, generator=random)
    return x.requires_grad_(), torch.randint(E + 1, (T, K), generator=random), w.requires_grad_()


def adapters() -> list[Tensor]:
    random = torch.Generator().manual_seed(2)
    shapes = [(E, R, H), (E, 2 * I, R), (E, R, I), (E, H, R)]
    return [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]


def in_a_row(layers: list[kt_sft.CpuExperts], terms: list[Term]) -> Callable[..., Tensor]:
    """A model of nothing but layers of experts, whose routing differs from layer to layer."""

    def model(x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        for number, layer in enumerate(layers):
            x = x + layer(x, idx.roll(number, 0), w, terms)
        return x

    return model


def walk(layers: list[kt_sft.CpuExperts], run: Callable[..., Tensor] = lambda f, *args: f(*args)) -> list[Tensor]:
    """Output and all gradients of two micro-batches, the second one begun before the first one's backward."""
    a, b, c, d = values = adapters()
    model = in_a_row(layers, [Term(Factors(a, b, 0.5), Factors(c, d, 0.25))])
    batches = [inputs(seed) for seed in (1, 2)]
    outputs = [run(model, *batch) for batch in batches]
    for output in outputs:
        output.square().sum().backward()
    leaves = [leaf for x, _, w in batches for leaf in (x, w)]
    return [output.detach().clone() for output in outputs] + [leaf.grad for leaf in (*leaves, *values)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


class TestExperts:
    """Through CpuExperts, the bits are those of tensors on the CPU."""

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("policy", ["retain", "recompute"])
    def test_forward_and_backward(self, monkeypatch: pytest.MonkeyPatch, policy: str, way: str) -> None:
        layers = make_layers(3, activation_policy=policy)
        expected = walk(layers)
        for seed in range(8):
            with on_device(monkeypatch, seed, way) as transfers:
                assert same(walk(layers), expected)
                assert len(transfers.outstanding) == 0
                assert transfers.accelerator.lost == 0  # type: ignore[attr-defined]

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpointed_piece_remembers_its_results(
        self, monkeypatch: pytest.MonkeyPatch, use_reentrant: bool, way: str
    ) -> None:
        layers = make_layers(2)
        run = functools.partial(in_pieces(checkpoint), use_reentrant=use_reentrant)
        expected = walk(layers, run)
        for seed in range(4):
            before = layers[0].engine.stats()["forward_calls"]
            with on_device(monkeypatch, seed, way):
                assert same(walk(layers, run), expected)
            assert layers[0].engine.stats()["forward_calls"] - before == 4  # once a layer and micro-batch

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_buffers_serve_training_after_inference(self, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
        (layer,) = make_layers(1)
        plain = [layer(*inputs()).detach(), *walk([layer])]
        with on_device(monkeypatch, 0):
            with mode():
                output = layer(*inputs())
            assert same([output, *walk([layer])], plain)

    def test_forward_does_not_wait_for_the_tokens_before_its_result_is_needed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (layer,) = make_layers(1)
        with on_device(monkeypatch, 0) as transfers:
            waiting: list[int] = []
            monkeypatch.setattr(layer, "beside", lambda _: waiting.append(len(transfers.to_host.operations)))
            layer(*inputs())
        assert waiting[0] > 0  # the copies that it had put there

    def test_adapters_in_host_memory_keep_their_gradients_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layers = make_layers(2)
        expected = walk(layers)
        with on_device(monkeypatch, 0) as transfers:
            monkeypatch.setattr(transfers.accelerator, "is_host", lambda device: True)
            assert same(walk(layers)[-4:], expected[-4:])


class FailingEngine:
    """An engine that fails in what `fails` names: when a pass is prepared, or in the pass itself."""

    def __init__(self, engine: Any, fails: str, when: str) -> None:
        self._engine, self._fails, self._when = engine, fails, when

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._engine, name)
        if name != f"prepare_{self._fails}":
            return real
        return self._fail if self._when == "prepared" else lambda **call: real(**call | {"compute": "int8"})

    def _fail(self, **call: Any) -> Any:
        raise RuntimeError("the engine is gone")


SAID = {"prepared": "the engine is gone", "computed": "no integer products with bf16"}


@pytest.mark.parametrize("when", SAID)
@pytest.mark.parametrize("fails", ["forward", "backward"])
class TestAnEngineThatFails:
    def fail(self, layer: kt_sft.CpuExperts, monkeypatch: pytest.MonkeyPatch, fails: str, when: str) -> None:
        engine = FailingEngine(layer.engine, fails, when)
        with monkeypatch.context() as patch:
            patch.setattr(experts, "get_engine", lambda threads: engine)
            with pytest.raises(RuntimeError, match=SAID[when]) as raised:
                walk([layer])
        assert isinstance(raised.value, EngineError)
        assert f"the expert engine failed in the {fails} of {T} tokens" in str(raised.value)

    @pytest.mark.parametrize("way", WAYS)
    def test_is_an_error_and_leaves_no_buffer_behind(
        self, monkeypatch: pytest.MonkeyPatch, fails: str, when: str, way: str
    ) -> None:
        (layer,) = make_layers(1)
        expected = walk([layer])
        with on_device(monkeypatch, 0, way) as transfers:
            self.fail(layer, monkeypatch, fails, when)
            with contextlib.suppress(EngineError):  # of the other micro-batch
                transfers.outstanding.settle()
            gc.collect()
            assert transfers.ring.lent == 0
            assert same(walk([layer]), expected)

    def test_is_an_error_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch, fails: str, when: str) -> None:
        (layer,) = make_layers(1)
        expected = walk([layer])
        self.fail(layer, monkeypatch, fails, when)
        assert same(walk([layer]), expected)


@pytest.mark.parametrize("way", WAYS)
def test_an_index_out_of_range_is_an_error_of_the_call(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    (layer,) = make_layers(1)
    x, idx, w = inputs()
    wrong = idx.clone()
    wrong[3, 1] = E + 4
    with on_device(monkeypatch, 0, way):
        with pytest.raises(IndexError, match=f"top_k_index holds {E + 4}; valid are 0 to {E - 1}"), torch.no_grad():
            layer(x, wrong, w)
        assert layer(x, idx, w).isfinite().all()


def test_hidden_states_that_are_changed_while_the_engine_reads_them_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (layer,) = make_layers(1)
    x, idx, w = inputs()
    monkeypatch.setattr(layer, "beside", lambda hidden: hidden.mul_(0))
    with on_device(monkeypatch, 0), torch.no_grad(), pytest.raises(RuntimeError, match="changed in place"):
        layer(x, idx, w)


def test_the_pair_is_made_on_the_cpu_whatever_the_default_device() -> None:
    (layer,) = make_layers(1)
    x, idx, w = inputs()
    with torch.device("meta"):
        layer(x, idx, w).backward(torch.ones(T, H, device="cpu"))
    assert x.grad is not None
    assert x.grad.device == CPU


def test_a_forked_child_frees_no_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what the ring keeps nor what a pass has, though nobody refers to either there."""
    ours = Transfers(SimulatedDevice(0, eager=True))
    idle, lent = ours.ring.take(100), [ours.ring.take(100)]
    ours.ring.give_back(idle, ours.accelerator.record(ours.to_host))
    freed: list[int] = []
    for memory in (idle.memory, lent[0].memory):
        weakref.finalize(memory, freed.append, 1).atexit = False
    del memory, idle
    monkeypatch.setattr(transfers, "_transfers", {CPU: ours})
    del ours
    child = os.fork()
    if not child:
        lent.clear()
        gc.collect()
        os._exit(len(freed))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not freed


def test_the_submitter_makes_its_device_the_current_one() -> None:
    device = SimulatedDevice(0)
    submitter = Submitter(device)
    submitter.stop()
    assert device.users == ["kt_sft-submit"]


def test_a_submitter_that_ended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,) = make_layers(1)
    with on_device(monkeypatch, 0, "by a thread") as transfers:
        transfers.submitter.stop()
        with pytest.raises(EngineError, match="the thread that hands tokens to the expert engine is not there"):
            layer(*inputs())


@pytest.mark.parametrize("way", WAYS)
def test_a_device_that_has_failed_is_an_error(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Its driver calls nothing any more, and says so where an event is looked at."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device has failed")

    (layer,) = make_layers(1)
    with on_device(monkeypatch, 0, way) as transfers, monkeypatch.context() as patch:
        device = transfers.accelerator
        transfers.outstanding.look()
        patch.setattr(device, "synchronize", fail)
        patch.setattr(device, "is_complete", fail)
        if way != "by a thread":
            patch.setattr(device, "call", lambda *_: True)
        with pytest.raises(EngineError, match="the device has failed"), torch.no_grad():
            layer(*inputs())

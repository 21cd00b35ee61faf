"""Transfers between an accelerator and the engine, on a simulated device: whatever it does late, results are right.

Each test of an ordering fails where the wait that makes it is taken out.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kt_sft
from kt_sft import autograd, experts
from kt_sft.engine.crossing import Place, Submission
from kt_sft.engine.operands import Factors, Term
from kt_sft.engine.retention import in_pieces
from kt_sft.engine.watchdog import EngineError
from kt_sft.offload import transfers
from kt_sft.offload.transfers import DeviceCrossing, Submitter, Transfers
from tests.simulated_device import LateSubmitter, SimulatedDevice, poison

CPU = torch.device("cpu")


@dataclasses.dataclass
class Pass:
    """A pass in flight: what it must give, and what it gave."""

    crossing: DeviceCrossing
    submission: Submission
    expected: list[Tensor]
    got: list[Tensor] = dataclasses.field(default_factory=list)


class Schedule:
    """Passes over made-up numbers, begun, computed and delivered in an order that a seed decides."""

    def __init__(self, seed: int) -> None:
        self.device = SimulatedDevice(seed)
        self.streams = [self.device.model_stream, self.device.new_stream()]  # as those of two parts of a model
        self.submitter = LateSubmitter(self.device)
        self.transfers = Transfers(self.device, self.submitter)  # type: ignore[arg-type]
        self.random = self.device.random
        self.numbers = torch.Generator().manual_seed(seed)
        self.in_flight: list[Pass] = []
        self.delivered: list[Pass] = []

    def begin(self) -> None:
        """Tokens that the device has yet to compute are sent, by one of two streams."""
        with self.device.on(self.random.choice(self.streams)):
            self._begin()

    def _begin(self) -> None:
        tokens = self.random.choice([0, 1, 3, 70, 1500])
        x, idx = torch.randn(tokens, 8, generator=self.numbers), torch.randint(9, (tokens, 2), generator=self.numbers)
        x_there, idx_there = torch.empty_like(x), torch.empty_like(idx)
        for there, value in ((x_there, x), (idx_there, idx)):
            poison(there)
            self.device.compute(lambda there=there, value=value: there.copy_(value))
        places = [Place((tokens, 8), torch.float32, CPU), Place((tokens, 2), torch.float32, CPU)]
        crossing = self.transfers.cross([(x_there, x.dtype), (idx_there, idx.dtype)], places)
        submission = crossing.submit(lambda: (crossing.sources[0] * 2, crossing.sources[1] + 0.5))
        self.in_flight.append(Pass(crossing, submission, [x * 2, idx + 0.5]))
        # The model's next operations may write where the tokens are: not before they are on the host.
        self.device.run_some()

    def end(self) -> None:
        """The engine has computed one pass; its results are sent, and a stream goes on with them."""
        with self.device.on(self.random.choice(self.streams)):
            self._end()

    def _end(self) -> None:
        this = self.in_flight.pop(self.random.randrange(len(self.in_flight)))
        for result, value in zip(this.crossing.results, this.submission.ticket(), strict=True):
            result.copy_(value)
        self.device.run_some()
        results = this.crossing.deliver(this.crossing.results)
        for result in results:
            self.device.compute(lambda result=result: this.got.append(result.clone()))
        self.delivered.append(this)
        this.crossing = None  # type: ignore[assignment]

    def run(self, steps: int, most: int) -> None:
        for _ in range(steps):
            choices = [self.submitter.run_next, self.device.run_some]
            choices += [self.begin] if len(self.in_flight) < most else []
            choices += [self.end] if self.in_flight else []
            self.random.choice(choices)()
        while self.in_flight:
            self.end()
        self.device.run_all()

    def check(self) -> None:
        assert self.delivered
        for this in self.delivered:
            for got, expected in zip(this.got, this.expected, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("seed", range(40))
def test_every_pass_gets_its_own_results(seed: int) -> None:
    schedule = Schedule(seed)
    schedule.run(steps=120, most=4)
    schedule.check()


E, H, I, T, K, R = 5, 24, 16, 30, 2, 2
Arguments = tuple[Tensor, Tensor, Tensor]


@contextmanager
def on_device(monkeypatch: pytest.MonkeyPatch, seed: int, threaded: bool = False) -> Iterator[Transfers]:
    """Experts take the tensors they are given for those of a simulated device, whose own work seems to run at once."""
    device = SimulatedDevice(seed, eager=True)
    submitter: Any = Submitter(device) if threaded else LateSubmitter(device)
    transfers = Transfers(device, submitter)
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "cross", lambda device, sources, places: transfers.cross(sources, places))
        yield transfers
    if threaded:
        submitter.stop()


def make_layers(count: int, **settings: Any) -> list[kt_sft.CpuExperts]:
    torch.manual_seed(0)
    weights = [(torch.randn(E, 2 * I, H) / 5, torch.randn(E, H, I) / 4) for _ in range(count)]
    return [kt_sft.CpuExperts.from_weights(*both, kt_sft.KTConfig(**settings)) for both in weights]


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

    @pytest.mark.parametrize("threaded", [False, True], ids=["late", "threaded"])
    @pytest.mark.parametrize("policy", ["retain", "recompute"])
    def test_forward_and_backward(self, monkeypatch: pytest.MonkeyPatch, policy: str, threaded: bool) -> None:
        layers = make_layers(3, activation_policy=policy)
        expected = walk(layers)
        for seed in range(8):
            with on_device(monkeypatch, seed, threaded):
                assert same(walk(layers), expected)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpointed_piece_remembers_its_results(
        self, monkeypatch: pytest.MonkeyPatch, use_reentrant: bool
    ) -> None:
        layers = make_layers(2)
        run = functools.partial(in_pieces(checkpoint), use_reentrant=use_reentrant)
        expected = walk(layers, run)
        for seed in range(4):
            before = layers[0].engine.stats()["forward_calls"]
            with on_device(monkeypatch, seed):
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
    """An engine that fails, or is not there any more, when asked for what `fails` names."""

    def __init__(self, engine: Any, fails: str, when: str) -> None:
        self._engine, self._fails, self._when = engine, fails, when

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._engine, name)
        if name != f"submit_{self._fails}":
            return real
        return self._submit_and_fail if self._when == "submit" else lambda **call: FailingTicket(real(**call))

    def _submit_and_fail(self, **call: Any) -> Any:
        raise RuntimeError("the engine is gone")


class FailingTicket:
    def __init__(self, ticket: Any) -> None:
        self._ticket = ticket

    def wait(self) -> None:
        raise RuntimeError("the engine is gone")


@pytest.mark.parametrize("when", ["submit", "wait"])
@pytest.mark.parametrize("fails", ["forward", "backward"])
class TestAnEngineThatFails:
    def fail(self, layer: kt_sft.CpuExperts, monkeypatch: pytest.MonkeyPatch, fails: str, when: str) -> None:
        engine = FailingEngine(layer.engine, fails, when)
        with monkeypatch.context() as patch:
            patch.setattr(experts, "get_engine", lambda threads: engine)
            with pytest.raises(RuntimeError, match="the engine is gone") as raised:
                walk([layer])
        assert isinstance(raised.value, EngineError)
        assert f"the expert engine failed in the {fails} of {T} tokens" in str(raised.value)

    @pytest.mark.parametrize("threaded", [False, True], ids=["late", "threaded"])
    def test_is_an_error_and_leaves_no_buffer_behind(
        self, monkeypatch: pytest.MonkeyPatch, fails: str, when: str, threaded: bool
    ) -> None:
        (layer,) = make_layers(1)
        expected = walk([layer])
        with on_device(monkeypatch, 0, threaded) as transfers:
            self.fail(layer, monkeypatch, fails, when)
            gc.collect()
            assert transfers.ring.lent == 0
            assert same(walk([layer]), expected)

    def test_is_an_error_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch, fails: str, when: str) -> None:
        (layer,) = make_layers(1)
        expected = walk([layer])
        self.fail(layer, monkeypatch, fails, when)
        assert same(walk([layer]), expected)


def test_an_index_out_of_range_is_an_error_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,) = make_layers(1)
    x, idx, w = inputs()
    wrong = idx.clone()
    wrong[3, 1] = E + 4
    with on_device(monkeypatch, 0, threaded=True):
        with pytest.raises(IndexError, match=f"top_k_index holds {E + 4}; valid are 0 to {E - 1}"):
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
    ours = Transfers(SimulatedDevice(0, eager=True), LateSubmitter(SimulatedDevice(0)))  # type: ignore[arg-type]
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


def test_the_submitter_takes_no_cpus_from_the_engine() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    device = SimulatedDevice(0)
    submitter = Submitter(device)
    try:
        assert submitter.post(device.record(device.model_stream), torch.get_num_threads).ticket() == 1
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        submitter.stop()
        torch.set_num_threads(before)


def test_a_submitter_that_ended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,) = make_layers(1)
    monkeypatch.setattr("kt_sft.engine.crossing._LOOK", 0.01)
    with on_device(monkeypatch, 0, threaded=True) as transfers:
        transfers.submitter.stop()
        with pytest.raises(EngineError, match="the thread that hands tokens to the expert engine is not there"):
            layer(*inputs())

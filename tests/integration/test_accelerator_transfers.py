"""Transfers on a real accelerator; skipped where there is none. What they must keep in order is tested without one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kt_sft
from kt_sft.engine.operands import Factors, Term
from kt_sft.engine.retention import in_pieces
from kt_sft.offload.accelerator import TorchAccelerator
from kt_sft.offload.outstanding import _MOST, Flags, waits_for_values
from kt_sft.offload.transfers import transfers_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]

E, H, I, T, K, R = 8, 256, 128, 700, 2, 4


def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, torch.accelerator.current_device_index())


@contextmanager
def without_synchronisation() -> Iterator[None]:
    """Within, an operation of torch that makes the host wait for the device is an error."""
    if device().type != "cuda":
        pytest.skip("only torch.cuda can tell")
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Model:
    """Layers of experts in a row, with an adapter and something to compute between them.

    Args:
        place: Where its tensors are.
        dtype: Of hidden states.
    """

    def __init__(self, place: torch.device, dtype: torch.dtype, **settings: Any) -> None:
        random = torch.Generator().manual_seed(0)
        normal = functools.partial(torch.randn, generator=random)
        config = kt_sft.KTConfig(**settings)
        self.layers = [
            kt_sft.CpuExperts.from_weights(normal(E, 2 * I, H) / 16, normal(E, H, I) / 11, config) for _ in range(3)
        ]
        shapes = [(E, R, H), (E, 2 * I, R), (E, R, I), (E, H, R)]
        self.adapter = [(normal(shape) / 8).to(place).requires_grad_() for shape in shapes]
        self.x = normal(T, H).to(place, dtype).requires_grad_()
        self.w = torch.rand(T, K, generator=random).to(place).requires_grad_()
        self.idx = torch.randint(E + 1, (T, K), generator=random).to(place)

    def forward(self, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        a, b, c, d = self.adapter
        for layer in self.layers:
            x = x + layer(x, idx, w, [Term(Factors(a, b, 0.5), Factors(c, d, 0.5))])
            idx = idx.roll(1, 0)
        return x

    def step(self, run: Callable[..., Tensor] = lambda f, *args: f(*args)) -> list[Tensor]:
        """Output and gradients. The output's gradient is the same on every device."""
        for leaf in (self.x, self.w, *self.adapter):
            leaf.grad = None
        output = run(self.forward, self.x, self.idx, self.w)
        output.backward(torch.ones_like(output))
        return [output.detach(), *(leaf.grad for leaf in (self.x, self.w, *self.adapter))]


def on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.cpu() for tensor in tensors]


def assert_same(there: list[Tensor], here: list[Tensor]) -> None:
    """Sums of two tensors are rounded alike everywhere, and all else is the engine's: the same bits."""
    for mine, theirs in zip(on_cpu(there), here, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_steps_in_a_row_give_the_bits_of_the_cpu(dtype: torch.dtype, policy: str) -> None:
    expected = Model(torch.device("cpu"), dtype, activation_policy=policy).step()
    model = Model(device(), dtype, activation_policy=policy)
    for _ in range(20):
        assert_same(model.step(), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_pieces_give_the_bits_of_the_cpu(use_reentrant: bool) -> None:
    run = functools.partial(in_pieces(checkpoint), use_reentrant=use_reentrant)
    expected = Model(torch.device("cpu"), torch.bfloat16).step()
    model = Model(device(), torch.bfloat16)
    for _ in range(5):
        assert_same(model.step(run), expected)


def test_a_step_on_a_stream_of_its_own() -> None:
    expected = Model(torch.device("cpu"), torch.bfloat16).step()
    model = Model(device(), torch.bfloat16)
    torch.accelerator.synchronize()
    stream = torch.Stream(device())
    for _ in range(5):
        with stream:
            results = model.step()
        torch.accelerator.synchronize()  # wherever autograd has put gradients together
        assert_same(results, expected)


def test_no_step_synchronises_the_device() -> None:
    model = Model(device(), torch.bfloat16)
    expected = on_cpu(model.step())  # copies the adapter to the engine, once
    with without_synchronisation():
        results = [model.step() for _ in range(3)]
    for each in results:
        assert_same(each, expected)


def test_inference_does_not_synchronise_the_device() -> None:
    model = Model(device(), torch.bfloat16)
    with torch.inference_mode():
        expected = model.forward(model.x, model.idx, model.w).cpu()
        with without_synchronisation():
            output = model.forward(model.x, model.idx, model.w)
    assert torch.equal(output.cpu(), expected)


def test_pinned_memory_is_what_passes_in_flight_need() -> None:
    model = Model(device(), torch.bfloat16)
    ring = transfers_of(device()).ring
    for _ in range(30):
        model.step()
    # The largest pass is a backward: two tensors of tokens, and FP32 gradients of all four of the adapter's matrices.
    largest = 2 * 2 * T * H + 4 * sum(leaf.numel() for leaf in model.adapter) + 16 * T * K
    assert ring.lent == 0
    # Those that the device awaits and two more in flight, as much again, rounded up to a power of two.
    assert ring.nbytes <= (_MOST + 2) * 2 * 2 * largest


def test_device_memory_does_not_grow() -> None:
    model = Model(device(), torch.bfloat16)
    model.step()
    before = torch.accelerator.memory_allocated()
    for _ in range(20):
        model.step()
    assert torch.accelerator.memory_allocated() <= before


def test_the_driver_calls_functions_and_waits_for_memory() -> None:
    if device().type != "cuda":
        pytest.skip("only the drivers of CUDA and ROCm call functions")
    accelerator = TorchAccelerator(device())
    flags = Flags(accelerator)
    called = ctypes.c_uint32(0)
    note = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: setattr(called, "value", 1))
    address = ctypes.cast(note, ctypes.c_void_p).value
    assert address is not None
    stream = accelerator.new_stream()
    with accelerator.on(stream):
        torch.cuda._sleep(50_000_000)  # cycles
        assert accelerator.call(stream, address, 0)
        assert called.value == 0
    accelerator.synchronize(accelerator.record(stream))
    assert called.value == 1
    if torch.version.hip is None:
        assert waits_for_values(accelerator, flags)


@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_awaiting_in_the_stream_changes_no_bit(policy: str) -> None:
    """Nor is it taken for granted: where the driver can, it is done."""
    steps = [
        on_cpu(Model(device(), torch.bfloat16, activation_policy=policy, await_in_stream=there).step())
        for there in (True, False)
    ]
    for mine, theirs in zip(*steps, strict=True):
        assert torch.equal(mine, theirs)
    if device().type == "cuda" and torch.version.hip is None:
        assert transfers_of(device()).flags is not None


def test_python_runs_ahead_of_the_device() -> None:
    model = Model(device(), torch.bfloat16)
    expected = on_cpu(model.step())
    if transfers_of(device()).flags is None:
        pytest.skip("this device's driver does not wait for memory")
    before = model.layers[0].engine.stats()["forward_calls"]
    torch.cuda._sleep(2_000_000_000)  # about a second
    output = model.forward(model.x, model.idx, model.w)
    assert model.layers[0].engine.stats()["forward_calls"] == before
    assert torch.equal(output.detach().cpu(), expected[0])


def test_a_pass_that_fails_is_an_error_and_no_hang() -> None:
    model = Model(device(), torch.bfloat16)
    wrong = torch.full_like(model.idx, E + 5)
    for _ in range(3):
        with pytest.raises(IndexError, match=f"top_k_index holds {E + 5}"):
            model.forward(model.x, wrong, model.w).sum().backward()
        torch.accelerator.synchronize()
        with contextlib.suppress(IndexError):  # of the passes after the first
            transfers_of(device()).outstanding.settle()
    assert all(value.isfinite().all() for value in model.step())

"""Passes that a device awaits by itself: Python runs ahead, and learns of failures in time. The device is simulated.

Nothing but experts is computed here, so that the model's stream may run as late as the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kt_sft.engine.retention import in_pieces
from kt_sft.offload import outstanding
from kt_sft.offload import transfers as transfers_module
from kt_sft.offload.interleave import Interleaver
from kt_sft.offload.outstanding import _MOST, Flags, Outstanding, waits_for_values
from tests.simulated_device import SimulatedDevice
from tests.simulated_experts import (
    E,
    H,
    T,
    forwards,
    gradient,
    hidden,
    in_a_row,
    make_layers,
    on_device,
    out_of_range,
    routings,
)


def test_python_runs_ahead_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, routed = make_layers(_MOST), routings(_MOST)
    x = hidden()
    expected = in_a_row(layers, routed, x)
    expected_grad = gradient(expected, x)
    with on_device(monkeypatch, eager=False) as transfers:
        x, before = hidden(), forwards()
        y = in_a_row(layers, routed, x)
        assert forwards() == before  # the device has not even computed the first layer's tokens
        assert len(transfers.outstanding) == _MOST
        grad = gradient(y, x)
        assert len(transfers.outstanding) == 0
        transfers.accelerator.run_all()  # type: ignore[attr-defined]
        assert torch.equal(y, expected)
        assert torch.equal(grad, expected_grad)
        assert transfers.ring.lent == 0


def test_it_is_not_too_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    count = _MOST + 3
    layers, routed = make_layers(count), routings(count)
    expected = in_a_row(layers, routed, hidden())
    with on_device(monkeypatch, eager=False) as transfers:
        before = forwards()
        y = in_a_row(layers, routed, hidden())
        assert forwards() - before >= 3
        assert len(transfers.outstanding) == _MOST
        transfers.outstanding.settle()
        transfers.accelerator.run_all()  # type: ignore[attr-defined]
        assert torch.equal(y, expected)


def test_what_is_read_on_the_host_next_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    expected = layer(hidden(), idx, w)
    with on_device(monkeypatch, eager=False) as transfers:
        monkeypatch.setattr(transfers.accelerator, "is_host", lambda device: True)
        assert torch.equal(layer(hidden(), idx, w), expected)


def test_without_a_graph_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, routed = make_layers(2), routings(2)
    with on_device(monkeypatch, eager=False) as transfers, torch.no_grad():
        before = forwards()
        in_a_row(layers, routed, hidden())
        assert forwards() - before == 2
        assert len(transfers.outstanding) == 0


def test_a_setting_lets_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), ((idx, w),) = make_layers(1, await_in_stream=False), routings(1)
    with on_device(monkeypatch, eager=False) as transfers:
        with pytest.raises(IndexError, match=f"top_k_index holds {E + 4}"):
            layer(hidden(), out_of_range(idx), w)
        layer(hidden(), idx, w)
        assert len(transfers.outstanding) == 0


@pytest.mark.parametrize("how", ["launched", "spawned"])
def test_with_several_processes_the_host_waits(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Or gradients of a pass that failed would be among those that all of them add up."""
    layers, routed = make_layers(1) + make_layers(1, await_in_stream=True), routings(2)
    if how == "launched":
        monkeypatch.setenv("WORLD_SIZE", "2")
    else:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with on_device(monkeypatch, eager=False) as transfers:
        for layer, (idx, w), awaited in zip(layers, routed, (0, 1), strict=True):
            layer(hidden(), idx, w)
            assert len(transfers.outstanding) == awaited


def test_what_reads_saved_tensors_at_once_gets_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, routed = make_layers(2), routings(2)

    def run() -> tuple[Tensor, Tensor]:
        x = hidden()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
            y = in_a_row(layers, routed, x)
        return y, gradient(y, x)

    expected = run()
    with on_device(monkeypatch, eager=False) as transfers:
        y, grad = run()
        transfers.accelerator.run_all()  # type: ignore[attr-defined]
        assert torch.equal(y, expected[0])
        assert torch.equal(grad, expected[1])


def test_autograd_does_not_write_where_tokens_are_copied_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that goes two ways is summed up in place where nobody else has it."""
    (layer,), ((idx, w),) = make_layers(1), routings(1)

    def run() -> Tensor:
        x = hidden()
        hidden_states = x * 1.0
        beside: list[Tensor] = []
        layer.beside = lambda h: beside.append(h * 3.0)
        y = hidden_states + (layer(hidden_states, idx, w) + beside[0])
        layer.beside = None
        y.backward(torch.ones(T, H))
        assert x.grad is not None
        return x.grad

    expected = run()
    for _ in range(5):
        with on_device(monkeypatch) as transfers:
            assert torch.equal(run(), expected)
            assert transfers.accelerator.lost == 0  # type: ignore[attr-defined]


def test_what_a_pass_held_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when Python looks for cycles: a device's memory is what there is least of."""
    layers, routed = make_layers(3), routings(3)
    crossings: list[weakref.ref[Any]] = []
    with on_device(monkeypatch) as transfers:
        cross = transfers.cross
        monkeypatch.setattr(
            transfers, "cross", lambda *a, **k: (made := cross(*a, **k), crossings.append(weakref.ref(made)))[0]
        )
        gc.collect()
        gc.disable()
        try:
            for mode in (contextlib.nullcontext, torch.no_grad):
                with mode():
                    x = hidden()
                    y = in_a_row(layers, routed, x)
                if y.requires_grad:
                    y.backward(torch.ones(T, H))
            output = weakref.ref(y)
            del y
            assert crossings
            assert [each() for each in crossings] == [None] * len(crossings)
            assert output() is None
        finally:
            gc.enable()


def counted_ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    ends: list[int] = []
    end = Outstanding._end_backward

    def counted(self: Outstanding, walk: int) -> None:
        ends.append(walk)
        end(self, walk)

    monkeypatch.setattr(Outstanding, "_end_backward", counted)
    return ends


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_a_backward_that_runs_within_another_does_not_settle(
    monkeypatch: pytest.MonkeyPatch, use_reentrant: bool, policy: str
) -> None:
    """Reentrant checkpointing has a backward for each piece, and the host would wait in each."""
    layers, routed = make_layers(3, activation_policy=policy), routings(3)

    def run() -> tuple[Tensor, Tensor]:
        x = y = hidden()
        for layer, (idx, w) in zip(layers, routed, strict=True):
            y = in_pieces(checkpoint)(layer, y, idx, w, use_reentrant=use_reentrant)
        y.backward(torch.ones(T, H))
        assert x.grad is not None
        return y.detach(), x.grad

    expected = run()
    with on_device(monkeypatch) as transfers:
        ends = counted_ends(monkeypatch)
        for _ in range(2):
            y, grad = run()
            assert torch.equal(y, expected[0])
            assert torch.equal(grad, expected[1])
        assert len(ends) == len(set(ends)) == 2
        assert len(transfers.outstanding) == 0


def test_passes_are_noted_when_the_device_has_gone_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be long after the engine was done: it has other things to do."""
    layers, routed = make_layers(3), routings(3)
    for layer in layers:
        layer.meter = layer.new_meter()
    with on_device(monkeypatch, eager=False) as transfers:
        device: Any = transfers.accelerator
        x = y = hidden()
        for layer, (idx, w) in zip(layers, routed, strict=True):
            layer.beside = lambda _: device.compute(lambda: time.sleep(2e-3))
            y = layer(y, idx, w)
        gradient(y, x)
    for layer in layers:
        assert layer.meter is not None
        passes, _ = layer.meter.take()
        assert [each.is_backward for each in passes] == [False, True]
        for each in passes:
            assert each.submitted <= each.awaited <= each.returned


def test_passes_are_noted_by_the_devices_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    layer.meter = layer.new_meter()
    with on_device(monkeypatch):
        x = hidden()
        y = layer(x, idx, w)
        y.backward(torch.ones(T, H))
        passes, load_E = layer.meter.take()
    assert [each.is_backward for each in passes] == [False, True]
    assert int(load_E.sum()) == int((idx < E).sum())
    for each in passes:
        assert each.submitted <= each.awaited <= each.returned
        assert each.submitted <= each.started <= each.finished
        assert each.awaited <= each.finished  # the device of this test waits at once
        assert each.returned >= each.started  # tokens are kept after the device has gone on
        assert 0 <= each.hidden <= each.seconds


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_micro_batches_interleave_as_ever(monkeypatch: pytest.MonkeyPatch, policy: str, checkpointed: bool) -> None:
    """Gradients of two micro-batches, to the bit."""
    layers, routed = make_layers(3, activation_policy=policy), routings(3)
    torch.manual_seed(5)
    dense = torch.nn.ModuleList(torch.nn.Linear(H, H) for _ in layers)
    interleaver = Interleaver(torch.device("cpu"))

    def piece(number: int, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        return x + layers[number](torch.tanh(dense[number](x)), idx, w)

    def loss(factor: float) -> Tensor:
        x = hidden().detach() * factor
        for number, (idx, w) in enumerate(routed):
            if checkpointed:
                x = in_pieces(checkpoint)(piece, number, x, idx, w, use_reentrant=False)
            else:
                x = piece(number, x, idx, w)
        return x.sum()

    def gradients(interleaved: bool) -> list[Tensor | None]:
        dense.zero_grad()
        functions = [functools.partial(loss, factor) for factor in (1.0, 0.5)]
        losses = interleaver.run(functions) if interleaved else [function() for function in functions]
        torch.add(*losses).backward()
        return [parameter.grad for parameter in dense.parameters()]

    expected = [gradient.clone() for gradient in gradients(interleaved=False) if gradient is not None]
    for seed in range(3):
        with on_device(monkeypatch, seed) as transfers:
            found = gradients(interleaved=True)
            assert len(found) == len(expected)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
            assert len(transfers.outstanding) == transfers.ring.lent == 0
            assert transfers.accelerator.lost == 0  # type: ignore[attr-defined]


class TestFlags:
    def test_words_lie_apart_and_values_count_up(self) -> None:
        flags = Flags(SimulatedDevice(0))
        taken = [flags.take() for _ in range(2 * outstanding._FLAGS)]
        assert [value for _, value in taken] == list(range(1, 2 * outstanding._FLAGS + 1))
        words = {address for address, _ in taken}
        assert len(words) == outstanding._FLAGS
        assert min(words) == flags.memory.data_ptr()
        assert max(words) + outstanding._FLAG_BYTES == flags.memory.data_ptr() + flags.memory.nbytes
        assert all(ctypes.c_uint32.from_address(address).value == 0 for address in words)

    def test_values_go_round(self) -> None:
        flags = Flags(SimulatedDevice(0))
        flags._taken = (1 << 32) - 2
        assert [flags.take()[1] for _ in range(3)] == [(1 << 32) - 1, 0, 1]


class TestWhetherADeviceWaits:
    def try_out(self, device: SimulatedDevice) -> bool:
        return waits_for_values(device, Flags(device))

    @pytest.mark.parametrize("seed", range(10))
    def test_one_that_does(self, seed: int) -> None:
        assert self.try_out(SimulatedDevice(seed))

    @pytest.mark.parametrize("seed", range(10))
    def test_one_that_says_so_and_does_not(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        device = SimulatedDevice(seed)
        monkeypatch.setattr(device, "wait_for_value", lambda *_: True)
        assert not self.try_out(device)

    @pytest.mark.parametrize("lacks", ["calls", "waits"])
    def test_one_whose_driver_refuses(self, lacks: str) -> None:
        assert not self.try_out(SimulatedDevice(0, **{lacks: False}))

    def test_one_whose_driver_calls_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outstanding, "_PATIENCE", 0.1)
        device = SimulatedDevice(0)
        monkeypatch.setattr(device, "call", lambda *_: True)
        assert not self.try_out(device)

    def test_one_that_does_not_wake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outstanding, "_PATIENCE", 0.1)
        device = SimulatedDevice(0)
        wait: Callable[..., bool] = device.wait_for_value
        monkeypatch.setattr(device, "wait_for_value", lambda stream, at, value: wait(stream, at, value + 1))
        with pytest.raises(RuntimeError, match="set await_in_stream: false"):
            self.try_out(device)

    def test_it_is_not_tried_where_the_host_is_to_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (layer,), ((idx, w),) = make_layers(1, await_in_stream=False), routings(1)
        with on_device(monkeypatch, eager=False) as transfers:
            monkeypatch.setattr(transfers_module, "waits_for_values", lambda *_: pytest.fail("it was tried"))
            layer(hidden(), idx, w)
        with pytest.raises(pytest.fail.Exception, match="it was tried"):
            transfers.flags  # noqa: B018

    def test_one_that_stops_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layers, routed = make_layers(2), routings(2)
        x = hidden()
        expected = in_a_row(layers, routed, x)
        with on_device(monkeypatch, eager=False) as transfers:
            assert transfers.flags is not None
            transfers.accelerator.waits = False  # type: ignore[attr-defined]
            y = in_a_row(layers, routed, hidden())
            assert len(transfers.outstanding) == 0
            transfers.accelerator.run_all()  # type: ignore[attr-defined]
        assert torch.equal(y, expected)

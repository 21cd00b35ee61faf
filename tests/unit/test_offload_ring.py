"""The ring of pinned buffers: how much it keeps, and when it lends a buffer again."""

from __future__ import annotations

import gc

import pytest
from torch import Tensor

from kt_sft.offload import ring as module
from kt_sft.offload.ring import Buffer, PinnedRing
from tests.simulated_device import Event, SimulatedDevice

KIB = 1 << 10
LEAST = 64 * KIB


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    """One on which nothing runs unless it is waited for."""
    device = SimulatedDevice(0)
    monkeypatch.setattr(device, "is_complete", lambda event: event.is_complete)
    return device


def done() -> Event:
    event = Event()
    event.complete()
    return event


def pending(device: SimulatedDevice) -> Event:
    """An event that completes when it is waited for, or when all that the device has to do is done."""
    return device.record(device.new_stream())


def take_and_give(ring: PinnedRing, nbytes: int, event: Event | None = None) -> Buffer:
    buffer = ring.take(nbytes)
    ring.give_back(buffer, event or done())
    return buffer


def test_sizes_are_powers_of_two(device: SimulatedDevice) -> None:
    ring = PinnedRing(device)
    sizes = [ring.take(nbytes).memory.nbytes for nbytes in (0, 1, LEAST, LEAST + 1, 3 * LEAST)]
    assert sizes == [LEAST, LEAST, LEAST, 2 * LEAST, 4 * LEAST]


def test_a_buffer_is_lent_again_once_its_copy_is_done(device: SimulatedDevice) -> None:
    ring = PinnedRing(device)
    for _ in range(100):
        take_and_give(ring, 2 * LEAST)
    assert device.pinned_bytes == [2 * LEAST]


def test_a_buffer_that_is_still_copied_from_is_not_lent(device: SimulatedDevice) -> None:
    ring = PinnedRing(device)
    first = take_and_give(ring, LEAST, pending(device))
    second = ring.take(LEAST)
    assert second.memory is not first.memory
    device.run_all()
    assert ring.take(LEAST).memory is first.memory


def test_at_its_bound_the_ring_waits_for_the_oldest_copy(device: SimulatedDevice) -> None:
    """Results of many passes on their way at once must not take ever more memory."""
    ring = PinnedRing(device)
    events: list[tuple[Event, Tensor]] = []
    for _ in range(50):
        event = pending(device)
        memory = take_and_give(ring, LEAST, event).memory
        assert all(before.is_complete for before, used in events if used is memory)
        events.append((event, memory))
    assert ring.nbytes == sum(device.pinned_bytes) == 2 * LEAST


def test_the_smallest_that_fits_is_lent(device: SimulatedDevice) -> None:
    ring = PinnedRing(device)
    buffers = [ring.take(factor * LEAST) for factor in (4, 1, 2)]
    for buffer in buffers:
        ring.give_back(buffer, done())
    assert ring.take(LEAST + 1).memory is buffers[2].memory


def test_what_long_batches_needed_is_given_back(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW", 10)
    ring = PinnedRing(device)
    large = [ring.take(64 * LEAST) for _ in range(3)]
    for buffer in large:
        ring.give_back(buffer, done())
    del large, buffer
    assert ring.nbytes == 3 * 64 * LEAST
    for _ in range(40):
        take_and_give(ring, LEAST)
    assert ring.nbytes <= 2 * LEAST
    assert device.released > 0


def test_growing_batches_leave_no_small_buffers_behind(device: SimulatedDevice) -> None:
    ring = PinnedRing(device)
    for factor in (1, 2, 4, 8, 16, 32):
        take_and_give(ring, factor * LEAST)
        assert ring.nbytes <= 2 * factor * LEAST


def test_a_buffer_that_is_never_given_back_is_never_lent_again(device: SimulatedDevice) -> None:
    ring = PinnedRing(device)
    buffer = ring.take(LEAST)
    memory = buffer.memory
    assert ring.lent == 1
    del buffer
    gc.collect()
    assert ring.lent == 0
    assert ring.nbytes == 0
    assert ring.take(LEAST).memory is not memory

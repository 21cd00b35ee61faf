"""What transfers need of an accelerator, through torch's device-neutral interface: streams, events, pinned memory.

It has not run on a device yet. The tests that need one are in tests/integration/test_accelerator_transfers.py; all
others use a simulated device with the same interface.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from kt_sft.offload.driver import driver_of, handle_of

#: Seconds between two looks at an event. torch's own wait spins, and would take a CPU from the engine; a layer takes
#: some milliseconds.
_LOOK = 1e-4


class Accelerator(Protocol):
    """A device whose streams run beside the host. Streams and events are whatever it makes of them."""

    def use(self) -> None:
        """Makes it this thread's current device: a look at an event would otherwise open another one."""

    def is_host(self, device: torch.device) -> bool:
        """Whether tensors of `device` are the host's."""

    def current_stream(self) -> Any:
        """The stream to which this thread's work on the device goes."""

    def streams_of_results(self) -> Sequence[Any]:
        """The streams on which whoever gets a result may go on: the current one, and any that autograd assumes."""

    def new_stream(self) -> Any:
        """A stream of its own."""

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Within, this thread's work on the device goes to `stream`."""

    def record(self, stream: Any, *, timed: bool = False) -> Any:
        """An event that completes when all that is in `stream` now is done; `timed` where `seconds` needs it."""

    def seconds(self, first: Any, second: Any) -> float:
        """From one timed event to another; both have completed."""

    def call(self, stream: Any, function: int, argument: int) -> bool:
        """Has a C function called, by any thread, when all that is in `stream` now is done.

        Returns:
            False where the device's driver calls none.
        """

    def wait_for_value(self, stream: Any, address: int, value: int) -> bool:
        """What is put into `stream` from now on runs after a word of pinned memory is `value`, or ahead of it.

        Returns:
            False where the device's driver does not wait for memory.
        """

    def wait(self, stream: Any, event: Any) -> None:
        """What is put into `stream` from now on runs after `event`."""

    def is_complete(self, event: Any) -> bool:
        """Whether an event has completed."""

    def synchronize(self, event: Any) -> None:
        """Blocks this thread, without the GIL, until an event has completed."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Puts a copy between the device and pinned memory into the current stream."""

    def used_on(self, tensor: Tensor, stream: Any) -> None:
        """Says that memory of the device is going to be used on another stream than the one it was taken on."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the device, in the current stream's order."""

    def pinned(self, nbytes: int) -> Tensor:
        """Host memory that the device can read and write by itself, [nbytes] uint8."""

    def release_pinned(self) -> None:
        """Gives pinned memory that nobody uses back to the system."""


class TorchAccelerator:
    """A device that torch knows: CUDA, ROCm, XPU, NPU.

    Everything goes through what torch offers for all of them, but for two things of its driver (driver.py).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.driver = driver_of(device)

    def use(self) -> None:
        """As in `Accelerator`."""
        if self.device.index is not None:
            torch.accelerator.set_device_index(self.device.index)

    def is_host(self, device: torch.device) -> bool:
        """As in `Accelerator`."""
        return device.type == "cpu"

    def current_stream(self) -> torch.Stream:
        """As in `Accelerator`."""
        return torch.accelerator.current_stream(self.device)

    def streams_of_results(self) -> list[torch.Stream]:
        """The current stream, and the default one: autograd continues from there after nodes without a device."""
        current = self.current_stream()
        default_stream = getattr(torch.get_device_module(self.device), "default_stream", None)
        if default_stream is None:
            return [current]
        default = default_stream(self.device)
        return [current] if default.stream_id == current.stream_id else [current, default]

    def new_stream(self) -> torch.Stream:
        """As in `Accelerator`."""
        return torch.Stream(self.device)

    @contextmanager
    def on(self, stream: torch.Stream) -> Iterator[None]:
        """As in `Accelerator`."""
        index, previous = torch.accelerator.current_device_index(), self.current_stream()
        torch.accelerator.set_stream(stream)  # sets the current device, too
        try:
            yield
        finally:
            torch.accelerator.set_stream(previous)
            torch.accelerator.set_device_index(index)

    def record(self, stream: torch.Stream, *, timed: bool = False) -> torch.Event:
        """As in `Accelerator`."""
        if not timed:
            return stream.record_event()
        event = torch.Event(self.device, enable_timing=True)
        event.record(stream)
        return event

    def seconds(self, first: torch.Event, second: torch.Event) -> float:
        """As in `Accelerator`."""
        return first.elapsed_time(second) / 1e3

    def call(self, stream: torch.Stream, function: int, argument: int) -> bool:
        """As in `Accelerator`."""
        if self.driver is None:
            return False
        with self.on(stream):  # the driver works for the current device
            return self.driver.call(handle_of(stream), function, argument)

    def wait_for_value(self, stream: torch.Stream, address: int, value: int) -> bool:
        """As in `Accelerator`."""
        if self.driver is None or not self.driver.waits:
            return False
        with self.on(stream):
            return self.driver.wait_for_value(handle_of(stream), address, value)

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """As in `Accelerator`."""
        stream.wait_event(event)

    def is_complete(self, event: torch.Event) -> bool:
        """As in `Accelerator`."""
        return event.query()

    def synchronize(self, event: torch.Event) -> None:
        """As in `Accelerator`."""
        while not event.query():
            time.sleep(_LOOK)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """As in `Accelerator`."""
        target.copy_(source, non_blocking=True)

    def used_on(self, tensor: Tensor, stream: torch.Stream) -> None:
        """As in `Accelerator`."""
        tensor.record_stream(stream)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As in `Accelerator`."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def pinned(self, nbytes: int) -> Tensor:
        """As in `Accelerator`."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def release_pinned(self) -> None:
        """As in `Accelerator`: torch keeps what was freed in a cache of its own, in some versions for ever."""
        release = getattr(torch._C, "_host_emptyCache", None)
        if release is not None:
            release()

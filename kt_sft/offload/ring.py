"""Pinned host memory that passes take turns with: as much of it as they need at the same time, and no more."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from kt_sft.offload.accelerator import Accelerator

#: Of the smallest buffer; larger ones are powers of two, as which torch takes pinned memory anyway.
_LEAST_BYTES = 1 << 16
#: Passes after which the ring looks whether it has kept too much. Some steps of a large model: pinning and unpinning
#: memory makes the device wait.
_WINDOW = 1024
#: The ring keeps this many times what passes in flight take: while one pass's results are on their way to the device,
#: another one's tokens come from it.
_ROOM = 2


class Buffer:
    """Pinned memory lent to one pass.

    Where it is not given back, as by a pass that failed, it is freed with its last owner and never lent again.
    """

    def __init__(self, memory: Tensor, number: int) -> None:
        self.memory = memory  # [bytes] uint8
        self.number = number


class PinnedRing:
    """Lends pinned buffers, each to one pass at a time. Thread-safe.

    A buffer that comes back may still be read by a copy: it is lent again only when that copy's event has completed.

    Args:
        accelerator: Which pins the memory.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._lock = threading.RLock()  # a buffer may be freed, by its last owner, while this thread is in here
        self._idle: list[tuple[Tensor, Any]] = []  # (memory, event of the last copy from it), oldest first
        self._lent: dict[int, tuple[int, int]] = {}  # by number: bytes of the buffer, and those that were asked for
        self._buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
        self._taken = 0
        self._most = self._most_before = 0  # bytes asked for at the same time, in this window and in the one before

    @property
    def nbytes(self) -> int:
        """Of all buffers, those lent and those kept."""
        with self._lock:
            return sum(has for has, _ in list(self._lent.values())) + sum(memory.nbytes for memory, _ in self._idle)

    @property
    def lent(self) -> int:
        """How many buffers passes have."""
        with self._lock:
            return len(self._lent)

    def lent_buffers(self) -> list[Buffer]:
        """Those that passes have; for a forked child, so without the lock, which nobody may be there to release."""
        return list(self._buffers.values())

    def take(self, nbytes: int) -> Buffer:
        """A buffer of at least that size.

        Waits only where the ring is full of buffers that are still being copied from.
        """
        size = max(_LEAST_BYTES, 1 << (nbytes - 1).bit_length() if nbytes else 0)
        with self._lock:
            self._taken += 1
            if self._taken % _WINDOW == 0:
                self._end_window()
            memory = self._idle_buffer(size)
            if memory is None:
                memory = self._make_room(size)
            if memory is None:
                with torch.inference_mode(False):  # it outlives the mode that it may be taken in
                    memory = self._accelerator.pinned(size)
            buffer = Buffer(memory, self._taken)
            self._lent[buffer.number] = memory.nbytes, size
            self._buffers[buffer.number] = buffer
            weakref.finalize(buffer, self._forget, buffer.number).atexit = False
            self._most = max(self._most, self._in_flight())
        return buffer

    def give_back(self, buffer: Buffer, event: Any) -> None:
        """Takes a buffer back.

        Args:
            buffer: That nobody is going to use any more, once `event` has completed.
            event: After the last copy that reads or writes it.
        """
        with self._lock:
            self._forget(buffer.number)
            self._buffers.pop(buffer.number, None)
            self._idle.append((buffer.memory, event))

    def _in_flight(self) -> int:
        return sum(wanted for _, wanted in list(self._lent.values()))

    def _forget(self, number: int) -> None:
        with self._lock:
            self._lent.pop(number, None)

    def _idle_buffer(self, size: int) -> Tensor | None:
        """The smallest one that is large enough and that no copy reads any more."""
        fitting = [
            (memory.nbytes, place)
            for place, (memory, event) in enumerate(self._idle)
            if memory.nbytes >= size and self._accelerator.is_complete(event)
        ]
        return self._idle.pop(min(fitting)[1])[0] if fitting else None

    def _make_room(self, size: int) -> Tensor | None:
        """Gives buffers up, oldest first, until another one of `size` bytes is within the bound.

        Returns:
            One of them, where it is large enough.
        """
        bound = _ROOM * max(self._in_flight() + size, self._most, self._most_before)
        found = None
        given_up = False
        while self._idle and found is None and self.nbytes + size > bound:
            memory, event = self._idle.pop(0)
            self._accelerator.synchronize(event)
            if memory.nbytes >= size:
                found = memory
            else:
                given_up = True
        if given_up:
            del memory
            self._accelerator.release_pinned()
        return found

    def _end_window(self) -> None:
        """Gives up what the passes of two windows have not needed at the same time."""
        bound = _ROOM * max(self._most, self._most_before)
        self._most_before, self._most = self._most, self._in_flight()
        before = len(self._idle)
        for entry in sorted(self._idle, key=lambda entry: -entry[0].nbytes):
            if self.nbytes <= bound:
                break
            if self._accelerator.is_complete(entry[1]):
                self._idle = [other for other in self._idle if other is not entry]
        if len(self._idle) < before:
            self._accelerator.release_pinned()

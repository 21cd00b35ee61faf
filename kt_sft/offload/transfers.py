"""A pass's tensors on their way from an accelerator to the engine and back, beside everything else that both do.

Tokens go into pinned memory on a stream of their own, behind the work that computes them, and behind them a call of the
function that starts the pass: the thread that runs the model goes on at once, and no Python is needed for the engine to
begin. Results go back on another stream, which waits until they are there, and whoever uses them on the device waits
for that stream there, not on the host. One stream for each direction: what comes from the device waits for what
computes it, and would hold up results that are ready.

    model's stream   ... router ─┬─ shared experts, another micro-batch, ... ─────────┬─ goes on
    to the host                  └─ tokens ─┐                                         │
    engine                                  └─ forward or backward ─┐                 │
    to the device                                                   └─ results ───────┘

Where the driver cannot let a stream wait for memory, or an error must show at once, the host waits for the results
before it sends them. Where it cannot call a function, a thread waits for the tokens and starts the pass.

A buffer of the ring holds all tensors of one pass; see ring.py for when it is used again.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kt_sft.engine.crossing import Place
from kt_sft.engine.ticket import Ticket
from kt_sft.engine.watchdog import EngineError
from kt_sft.offload.accelerator import Accelerator, TorchAccelerator
from kt_sft.offload.outstanding import Awaited, Flags, Outstanding, waits_for_values
from kt_sft.offload.ring import Buffer, PinnedRing

_logger = logging.getLogger("kt_sft")

_UNTRIED = object()
#: Of a tensor in a buffer: a cache line, so that the engine's threads and the device share none.
_ALIGNMENT = 64


#: Seconds that the end of the process waits for tokens on their way: a device that hangs must not keep it.
_PATIENCE = 10.0


class Submitter:
    """A thread that waits for tokens to arrive and starts their passes, in the order in which they were sent.

    Args:
        accelerator: Where they come from.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._posted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="kt_sft-submit", daemon=True)
        self._thread.start()

    def post(self, arrived: Any, ticket: Ticket, start: Callable[[], None]) -> None:
        """Calls `start`, which starts `ticket`, when the event `arrived` has completed."""

        def run() -> None:
            try:
                self._accelerator.synchronize(arrived)
            except Exception as error:
                ticket.cancel(str(error))
            else:
                start()

        self._posted.put(run)

    def stop(self) -> None:
        """Ends the thread when it has done what was posted."""
        self._posted.put(None)
        self._thread.join(_PATIENCE)

    def check(self) -> None:
        """Raises where it does nothing any more.

        Raises:
            EngineError: The thread is not there.
        """
        if not self._thread.is_alive():
            raise EngineError(
                "kt_sft: the thread that hands tokens to the expert engine is not there any more, as in a process that "
                "is ending or was forked; end it and start again"
            )

    def _loop(self) -> None:
        self._accelerator.use()
        while (run := self._posted.get()) is not None:
            run()
            del run  # what it refers to must not live until the next one comes


class Transfers:
    """What crosses between one device and the engine.

    Args:
        accelerator: The device.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.ring = PinnedRing(accelerator)
        self.to_host = accelerator.new_stream()
        self.to_device = accelerator.new_stream()
        self.outstanding = Outstanding(accelerator)
        self._flags: Flags | object | None = _UNTRIED
        self._submitter: Submitter | None = None
        self._lock = threading.Lock()

    @property
    def flags(self) -> Flags | None:
        """What passes set when they are over; None where the device cannot wait for that. Tried on first use."""
        with self._lock:
            if self._flags is _UNTRIED:
                flags = Flags(self.accelerator)
                self._flags = flags if waits_for_values(self.accelerator, flags) else None
                _logger.info(
                    "the host waits for the expert engine: the accelerator does not wait for memory"
                    if self._flags is None
                    else "the accelerator waits for the expert engine by itself"
                )
            return self._flags  # type: ignore[return-value]

    @property
    def submitter(self) -> Submitter:
        """Waits for what has been sent to the host, where the driver calls no functions; begins on first use."""
        with self._lock:
            if self._submitter is None:
                self._submitter = Submitter(self.accelerator)
            return self._submitter

    def cross(
        self, sources: Sequence[tuple[Tensor, torch.dtype]], places: Sequence[Place], *, in_stream: bool
    ) -> DeviceCrossing:
        """As `kt_sft.engine.crossing.cross`, for what this thread computes on the device; returns at once.

        Raises:
            EngineError: A pass that the device awaited has failed.
            IndexError: Likewise.
        """
        self.outstanding.look()
        return DeviceCrossing(self, sources, places, in_stream=in_stream)

    def stop(self) -> None:
        """Ends what is not over; logs what failed."""
        self.outstanding.stop(_PATIENCE)
        with self._lock:
            if self._submitter is not None:
                self._submitter.stop()


class DeviceCrossing:
    """One pass's tensors; a `Crossing`.

    Args:
        transfers: Of the device.
        sources: What the pass reads, on the device or the CPU, and the dtypes that the engine takes.
        places: Of its results; those on the CPU are written there by the engine itself.
        in_stream: Whether the device may wait for them by itself.
    """

    is_copied = True

    def __init__(
        self,
        transfers: Transfers,
        sources: Sequence[tuple[Tensor, torch.dtype]],
        places: Sequence[Place],
        *,
        in_stream: bool,
    ) -> None:
        self._transfers, self._places = transfers, places
        accelerator = transfers.accelerator
        converted = [source.detach().to(dtype).contiguous() for source, dtype in sources]
        staged = [None if accelerator.is_host(place.device) else place for place in places]
        with torch.inference_mode(False):
            self._buffer, (self.sources, in_buffer) = self._lay_out(converted, staged)
            self.results: Sequence[Tensor] = [
                torch.empty(place.shape, dtype=place.dtype, device="cpu") if mine is None else mine
                for mine, place in zip(in_buffer, places, strict=True)
            ]
        # Taken now: what used this memory before is done when the sources have arrived. Taken later, results would have
        # to wait for what the present stream is given meanwhile.
        self._targets = [None if place is None else accelerator.empty(place.shape, place.dtype) for place in staged]
        self._stream = accelerator.current_stream()
        accelerator.wait(transfers.to_host, accelerator.record(self._stream))
        with accelerator.on(transfers.to_host):
            for target, source in zip(self.sources, converted, strict=True):
                accelerator.copy(target, source)
        # Nobody may write to their memory before they have arrived, and autograd does where nobody else has it.
        self._sent: Sequence[Tensor] = converted
        self.kept: list[tuple[int, int, int]] = []
        # Results that stay on the CPU are read there next.
        all_cross = all(target is not None for target in self._targets)
        flags = transfers.flags if in_stream and all_cross else None
        self._flag = None if flags is None else flags.take()
        self._look: Callable[[], object] = lambda: None
        self._begins: Any = None  # a timed event just before the pass is started, where it is metered
        self._begun: Any = None  # an event after that

    def _lay_out(
        self, sources: Sequence[Tensor], places: Sequence[Place | None]
    ) -> tuple[Buffer, tuple[list[Tensor], list[Tensor | None]]]:
        """A buffer, and the places in it of the sources and of the results that go to the device."""
        shapes = [(tuple(source.shape), source.dtype) for source in sources]
        shapes += [(tuple(place.shape), place.dtype) for place in places if place is not None]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
        starts = list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
        buffer = self._transfers.ring.take(starts[-1])
        views = [
            buffer.memory[start : start + size].view(dtype).view(shape)
            for start, size, (shape, dtype) in zip(starts, sizes, shapes, strict=False)
        ]
        results = iter(views[len(sources) :])
        return buffer, (views[: len(sources)], [None if place is None else next(results) for place in places])

    @property
    def held(self) -> object:
        """The buffer, and results outside it."""
        return self._buffer, self.results

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy outside of the ring's memory, which the engine makes when results are there."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        self.kept.append((copy.data_ptr(), tensor.data_ptr(), copy.nbytes))
        return copy

    def start(self, ticket: Ticket) -> None:
        """Has it started when the sources have arrived; returns at once."""
        accelerator, to_host = self._transfers.accelerator, self._transfers.to_host
        if self._flag is not None:
            ticket.signal(*self._flag)
            if ticket.is_metered:
                self._begins = accelerator.record(to_host, timed=True)
        function, argument = ticket.starter()
        if not accelerator.call(to_host, function, argument):
            submitter = self._transfers.submitter
            start = functools.partial(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function), argument)
            submitter.post(accelerator.record(to_host), ticket, start)
            self._look = submitter.check
            return
        self._begun = accelerator.record(to_host)
        self._look = functools.partial(accelerator.is_complete, self._begun)  # raises where the device has failed

    def finish(self, ticket: Ticket, around: int) -> list[Tensor]:
        """As in `Crossing`; the stream that is current now, and the one that was at first, wait for the results."""
        if self._flag is not None and self._begun is not None:
            # The driver does not know what a word of memory waits for, and must not put it before that.
            self._transfers.accelerator.wait(self._transfers.to_device, self._begun)
            if self._finish_in_stream(ticket, self._flag, around):
                return self._delivered()
        ticket.wait(self._look)
        self._transfers.outstanding.settle()  # what was submitted before it is over, too
        self._transfers.ring.give_back(self._buffer, self._send())
        return self._delivered()

    def _finish_in_stream(self, ticket: Ticket, flag: tuple[int, int], around: int) -> bool:
        """False where the device does not wait, all at once."""
        accelerator, transfers = self._transfers.accelerator, self._transfers
        stream = accelerator.current_stream()
        reached = accelerator.record(stream, timed=True) if ticket.is_metered else None
        if not accelerator.wait_for_value(transfers.to_device, *flag):
            return False
        sent = self._send()
        released = accelerator.record(stream, timed=True) if ticket.is_metered else None
        ring, buffer, seconds_from = transfers.ring, self._buffer, functools.partial(accelerator.seconds, self._begins)

        def end() -> None:
            if released is not None:  # before the routing's memory goes
                ticket.note(ticket.submitted + seconds_from(reached), ticket.submitted + seconds_from(released))
            ring.give_back(buffer, sent)

        transfers.outstanding.add(Awaited(ticket, self._look, end, released), around)
        return True

    def _send(self) -> Any:
        """Puts the results' copies into their stream, and lets the present one wait for them; gives an event."""
        accelerator, transfers = self._transfers.accelerator, self._transfers
        with accelerator.on(transfers.to_device):
            for mine, target in zip(self.results, self._targets, strict=True):
                if target is not None:
                    accelerator.copy(target, mine)
        sent = accelerator.record(transfers.to_device)
        streams = accelerator.streams_of_results()
        for stream in (*streams, self._stream):
            accelerator.wait(stream, sent)
        if streams[0] != self._stream:
            for target in self._targets:
                if target is not None:
                    accelerator.used_on(target, streams[0])
        return sent

    def _delivered(self) -> list[Tensor]:
        delivered = [
            result if target is None else target.to(place.device)
            for result, target, place in zip(self.results, self._targets, self._places, strict=True)
        ]
        self._sent, self._targets = (), []  # the streams are in order from here on
        return delivered


_transfers: dict[torch.device, Transfers] = {}
_lock = threading.Lock()


def transfers_of(device: torch.device) -> Transfers:
    """Those of a device, made on first use."""
    with _lock:
        found = _transfers.get(device)
        if found is None:
            found = _transfers[device] = Transfers(TorchAccelerator(device))
        return found


@atexit.register
def _stop() -> None:
    # Before the engines go: this was registered after theirs.
    with _lock:
        for each in _transfers.values():
            each.stop()
        _transfers.clear()


_parked: list[object] = []


def _forget() -> None:
    # A forked child has none of the threads. It must not free pinned memory either, or destroy events: a device does
    # not work in it, and an error there ends the process. So it keeps them, as does the interpreter's end.
    global _lock
    _lock = threading.Lock()
    if _transfers:
        _parked.append([(each, each.ring.lent_buffers()) for each in _transfers.values()])
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_parked[-1]))
    _transfers.clear()


os.register_at_fork(after_in_child=_forget)

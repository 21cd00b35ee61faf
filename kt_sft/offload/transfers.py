"""A pass's tensors on their way from an accelerator to the engine and back, beside everything else that both do.

Tokens go into pinned memory on a stream of their own, behind the work that computes them. A thread waits for them
there and hands them to the engine, so that the thread that runs the model goes on at once. Results go back on another
stream, and whoever uses them on the device waits for that stream there, not on the host. One stream for each direction:
what comes from the device waits for what computes it, and would hold up results that are ready.

    model's stream   ... router ─┬─ shared experts, another micro-batch, ... ─────────┬─ goes on
    to the host                  └─ tokens ─┐                                         │
    engine                                  └─ forward or backward ─┐                 │
    to the device                                                   └─ results ───────┘

A buffer of the ring holds all tensors of one pass; see ring.py for when it is used again.
"""

from __future__ import annotations

import atexit
import contextvars
import ctypes
import itertools
import math
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kt_sft.engine.crossing import Place, Submission
from kt_sft.engine.watchdog import EngineError
from kt_sft.offload.accelerator import Accelerator, TorchAccelerator
from kt_sft.offload.ring import Buffer, PinnedRing

#: Of a tensor in a buffer: a cache line, so that the engine's threads and the device share none.
_ALIGNMENT = 64


#: Seconds that the end of the process waits for tokens on their way: a device that hangs must not keep it.
_PATIENCE = 10.0


class Submitter:
    """A thread that waits for tokens to arrive and hands them to the engine, in the order in which they were sent.

    Args:
        accelerator: Where they come from.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._posted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="kt_sft-submit", daemon=True)
        # What it copies, it copies alone: an OpenMP pool of its own would take CPUs from the engine. torch notes the
        # number for threads to come, too, so it is put back.
        threads, self._is_alone = torch.get_num_threads(), threading.Event()
        self._thread.start()
        self._is_alone.wait()
        torch.set_num_threads(threads)

    def post(self, arrived: Any, job: Callable[[], Any]) -> Submission:
        """Calls `job` when the event `arrived` has completed, in this thread's context."""
        submission = Submission(self._check)
        context = contextvars.copy_context()

        def run() -> None:
            try:
                self._accelerator.synchronize(arrived)
            except Exception as error:
                submission.fail(error)
                return
            with torch.no_grad():
                submission.run(lambda: context.run(job))

        self._posted.put(run)
        return submission

    def stop(self) -> None:
        """Ends the thread when it has done what was posted."""
        self._posted.put(None)
        self._thread.join(_PATIENCE)

    def _loop(self) -> None:
        torch.get_num_threads()  # a thread takes over the common number when it first needs one
        torch.set_num_threads(1)
        self._is_alone.set()
        self._accelerator.use()
        while (run := self._posted.get()) is not None:
            run()
            del run  # what it refers to must not live until the next one comes

    def _check(self) -> None:
        if not self._thread.is_alive():
            raise EngineError(
                "kt_sft: the thread that hands tokens to the expert engine is not there any more, as in a process that "
                "is ending or was forked; end it and start again"
            )


class Transfers:
    """What crosses between one device and the engine.

    Args:
        accelerator: The device.
        submitter: Waits for what has been sent to the host.
    """

    def __init__(self, accelerator: Accelerator, submitter: Submitter | None = None) -> None:
        self.accelerator = accelerator
        self.ring = PinnedRing(accelerator)
        self.to_host = accelerator.new_stream()
        self.to_device = accelerator.new_stream()
        self.submitter = submitter or Submitter(accelerator)

    def cross(self, sources: Sequence[tuple[Tensor, torch.dtype]], places: Sequence[Place]) -> DeviceCrossing:
        """As `kt_sft.engine.crossing.cross`, for what this thread computes on the device; returns at once."""
        return DeviceCrossing(self, sources, places)


class DeviceCrossing:
    """One pass's tensors; a `Crossing`.

    Args:
        transfers: Of the device.
        sources: What the pass reads, on the device or the CPU, and the dtypes that the engine takes.
        places: Of its results; those on the CPU are written there by the engine itself.
    """

    is_copied = True

    def __init__(
        self, transfers: Transfers, sources: Sequence[tuple[Tensor, torch.dtype]], places: Sequence[Place]
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
        self._arrived = accelerator.record_for_host(transfers.to_host)
        self._sent: Sequence[Tensor] = converted  # nobody may write to their memory before they have arrived

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

    def submit(self, job: Callable[[], Any]) -> Submission:
        """Calls `job` on the submitting thread when the sources have arrived; returns at once."""

        def arrived() -> Any:
            self._sent = ()
            return job()

        return self._transfers.submitter.post(self._arrived, arrived)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy outside the ring's memory."""
        return tensor.clone()

    def deliver(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Puts the results' copies into their stream, lets the present one wait for them, and gives the buffer back."""
        accelerator, transfers = self._transfers.accelerator, self._transfers
        for given, mine, target in zip(results, self.results, self._targets, strict=True):
            if target is not None and given is not mine:
                mine.copy_(given)
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
        transfers.ring.give_back(self._buffer, sent)
        return [
            given if target is None else target.to(place.device)
            for given, target, place in zip(results, self._targets, self._places, strict=True)
        ]


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
            each.submitter.stop()
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

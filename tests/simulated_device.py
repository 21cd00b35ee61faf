"""An accelerator that is simulated: what is put into its streams runs late, in an order that a seed decides.

Its tensors are on the CPU. A stream runs its operations one after the other, but which stream runs next is drawn, and
copies run in two halves, so that whoever reads too early, or writes too early, finds wrong values.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kt_sft.engine.crossing import Submission

#: What memory holds that nothing has been written to.
POISON = 0xC5


class Event:
    """Completes when a stream comes to it."""

    def __init__(self) -> None:
        self.is_complete = False

    def complete(self) -> None:
        self.is_complete = True


class Stream:
    """Operations in their order; those that wait for an event hold up the ones after them.

    Args:
        eager: Runs what it is given at once, as a stream seems to where torch computes on the CPU; waiting for an event
            then lets the other streams run until it completes.
        speed: Relative to the others'.
    """

    def __init__(self, eager: bool = False, speed: float = 1.0) -> None:
        self.eager = eager
        self.speed = speed
        self.operations: deque[tuple[Event | None, Callable[[], None]]] = deque()

    @property
    def is_ready(self) -> bool:
        if not self.operations:
            return False
        event, _ = self.operations[0]
        return event is None or event.is_complete


class SimulatedDevice:
    """An `Accelerator`.

    Args:
        seed: Decides the order.
        eager: Whether the model's own stream is eager; otherwise put its operations there by `compute`.
    """

    def __init__(self, seed: int, eager: bool = False) -> None:
        self.random = random.Random(seed)
        self.model_stream = Stream(eager)
        self.streams = [self.model_stream]
        self.pinned_bytes: list[int] = []
        self.released = 0
        self.users: list[str] = []
        self._lock = threading.RLock()
        self._current = threading.local()

    def use(self) -> None:
        self.users.append(threading.current_thread().name)

    def is_host(self, device: torch.device) -> bool:
        return False

    def current_stream(self) -> Stream:
        return getattr(self._current, "stream", self.model_stream)

    def streams_of_results(self) -> Sequence[Stream]:
        return [self.current_stream()]

    def new_stream(self) -> Stream:
        self.streams.append(Stream(speed=self.random.choice([0.01, 0.1, 1.0])))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        previous, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = previous

    def record(self, stream: Stream) -> Event:
        event = Event()
        self._put(stream, event.complete)
        return event

    def record_for_host(self, stream: Stream) -> Event:
        return self.record(stream)

    def wait(self, stream: Stream, event: Event) -> None:
        if stream.eager:
            self.synchronize(event)
        else:
            self._put(stream, lambda: None, event)

    def is_complete(self, event: Event) -> bool:
        with self._lock:
            for _ in range(self.random.randrange(3)):
                self._step()
            return event.is_complete

    def synchronize(self, event: Event) -> None:
        with self._lock:
            while not event.is_complete:
                assert self._step(), "an event is waited for that no stream will ever come to"

    def copy(self, target: Tensor, source: Tensor) -> None:
        half = target.numel() // 2
        to, come_from = target.view(-1), source.reshape(-1)
        self.compute(lambda: to[:half].copy_(come_from[:half]))
        self.compute(lambda: to[half:].copy_(come_from[half:]))

    def used_on(self, tensor: Tensor, stream: Stream) -> None:
        pass

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that work of the current stream, not done yet, had for something else."""
        tensor = torch.empty(shape, dtype=dtype)
        self.compute(lambda: poison(tensor))
        return tensor

    def pinned(self, nbytes: int) -> Tensor:
        self.pinned_bytes.append(nbytes)
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def release_pinned(self) -> None:
        self.released += 1

    def compute(self, function: Callable[[], Any]) -> None:
        """Puts an operation into the current stream."""
        self._put(self.current_stream(), function)

    def run_some(self) -> None:
        """Lets a few operations run."""
        with self._lock:
            for _ in range(self.random.randrange(4)):
                self._step()

    def run_all(self) -> None:
        """Lets the streams run until they are empty."""
        with self._lock:
            while self._step():
                pass
            assert not any(stream.operations for stream in self.streams)

    def _put(self, stream: Stream, function: Callable[[], Any], after: Event | None = None) -> None:
        if stream.eager:
            function()
            return
        with self._lock:
            stream.operations.append((after, function))

    def _step(self) -> bool:
        ready = [stream for stream in self.streams if stream.is_ready]
        if ready:
            (stream,) = self.random.choices(ready, [stream.speed for stream in ready])
            _, function = stream.operations.popleft()
            function()
        return bool(ready)


def poison(tensor: Tensor) -> None:
    tensor.view(-1).view(torch.uint8).fill_(POISON)


class LateSubmitter:
    """A `Submitter` without a thread: jobs run when a seed says so, at the latest when their ticket is asked for."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._posted: deque[Callable[[], None]] = deque()

    def post(self, arrived: Event, job: Callable[[], Any]) -> Submission:
        submission = _LateSubmission(self.run_next)

        def run() -> None:
            self._device.synchronize(arrived)
            submission.run(job)

        self._posted.append(run)
        return submission

    def run_next(self) -> bool:
        """Runs the oldest job; False if there is none."""
        if self._posted:
            self._posted.popleft()()
            return True
        return False


class _LateSubmission(Submission):
    def __init__(self, run_next: Callable[[], bool]) -> None:
        super().__init__()
        self._run_next = run_next

    def ticket(self) -> Any:
        while not self._is_over.is_set():
            assert self._run_next(), "nobody is going to submit this"
        return super().ticket()

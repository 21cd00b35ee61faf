"""An accelerator that is simulated: what is put into its streams runs late, in an order that a seed decides.

Its tensors are on the CPU. A stream runs its operations one after the other, but which stream runs next is drawn, and
copies run in two halves, so that whoever reads too early, or writes too early, finds wrong values.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: What memory holds that nothing has been written to.
POISON = 0xC5


#: Seconds in which the engine, which works in real time, sets a word that a stream waits for.
_PATIENCE = 20.0


class Event:
    """Completes when a stream comes to it."""

    def __init__(self) -> None:
        self.is_complete = False
        self.time = 0.0

    def complete(self) -> None:
        self.is_complete = True
        self.time = time.monotonic()


class Word:
    """Of memory, that a stream waits for."""

    def __init__(self, address: int, value: int) -> None:
        self._word, self._value = ctypes.c_uint32.from_address(address), value

    @property
    def is_complete(self) -> bool:
        return (self._word.value - self._value) % (1 << 32) < 1 << 31


class Call:
    """Of a C function, by a thread of the driver."""

    def __init__(self, function: int, argument: int) -> None:
        self._thread = threading.Thread(target=ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function), args=(argument,))

    def start(self) -> None:
        self._thread.start()

    @property
    def is_complete(self) -> bool:
        return not self._thread.is_alive()


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
        self.operations: deque[tuple[Event | Word | Call | None, Callable[[], None]]] = deque()

    @property
    def is_ready(self) -> bool:
        if not self.operations:
            return False
        event, _ = self.operations[0]
        return event is None or event.is_complete

    @property
    def waits_for_the_host(self) -> bool:
        return bool(self.operations) and isinstance(self.operations[0][0], Word | Call)


class SimulatedDevice:
    """An `Accelerator`.

    Args:
        seed: Decides the order.
        eager: Whether the model's own stream is eager; otherwise put its operations there by `compute`.
        calls: Whether its driver calls functions.
        waits: Whether it waits for memory.
    """

    def __init__(self, seed: int, eager: bool = False, *, calls: bool = True, waits: bool = True) -> None:
        self.calls, self.waits = calls, waits
        self.random = random.Random(seed)
        self.model_stream = Stream(eager)
        self.streams = [self.model_stream]
        self.pinned_bytes: list[int] = []
        self._pinned: list[range] = []
        self.lost = 0  # copies to the host whose source was given up before
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

    def record(self, stream: Stream, *, timed: bool = False) -> Event:
        event = Event()
        self._put(stream, event.complete)
        return event

    def seconds(self, first: Event, second: Event) -> float:
        assert first.is_complete
        assert second.is_complete
        return second.time - first.time

    def call(self, stream: Stream, function: int, argument: int) -> bool:
        if self.calls:
            call = Call(function, argument)
            self._put(stream, call.start)
            self._put(stream, lambda: None, call)
        return self.calls

    def wait_for_value(self, stream: Stream, address: int, value: int) -> bool:
        if self.waits:
            assert not stream.eager
            self._put(stream, lambda: None, Word(address, value))
        return self.waits

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
            deadline = time.monotonic() + _PATIENCE
            while not event.is_complete:
                if not self._step():
                    assert any(stream.waits_for_the_host for stream in self.streams), "no stream will ever come there"
                    assert time.monotonic() < deadline, "nobody sets the word that a stream waits for"
                    time.sleep(1e-5)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.is_contiguous()
        source = source.contiguous()
        half, size = target.nbytes // 2, target.nbytes
        is_to_host = any(target.data_ptr() in memory for memory in self._pinned)
        # Where the model's stream is eager nothing here keeps a source alive: autograd writes to what nobody else has.
        # Otherwise it must, as memory is given up in the order of streams, which this is not.
        held = weakref.ref(source) if is_to_host and self.model_stream.eager else source

        def copy(begin: int, end: int) -> None:  # as a device does: autograd does not see it
            come_from = held() if isinstance(held, weakref.ref) else held
            if come_from is None:
                self.lost += 1
                return
            ctypes.memmove(target.data_ptr() + begin, come_from.data_ptr() + begin, end - begin)

        self.compute(lambda: copy(0, half))
        self.compute(lambda: copy(half, size))

    def used_on(self, tensor: Tensor, stream: Stream) -> None:
        pass

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that work of the current stream, not done yet, had for something else."""
        tensor = torch.empty(shape, dtype=dtype)
        self.compute(lambda: poison(tensor))
        return tensor

    def pinned(self, nbytes: int) -> Tensor:
        self.pinned_bytes.append(nbytes)
        memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self._pinned.append(range(memory.data_ptr(), memory.data_ptr() + nbytes))
        return memory

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

    def run_one(self) -> bool:
        """Lets one operation run, or waits a little for the host; False if nothing is going to happen."""
        with self._lock:
            if self._step():
                return True
            time.sleep(1e-5)
            return any(stream.waits_for_the_host for stream in self.streams)

    def run_on(self) -> None:
        """Lets operations run as long as any can, but no longer than some time."""
        deadline = time.monotonic() + 1.0
        while self.run_one() and time.monotonic() < deadline:
            pass

    def run_all(self) -> None:
        """Lets the streams run until they are empty."""
        with self._lock:
            deadline = time.monotonic() + _PATIENCE
            while self._step() or any(stream.waits_for_the_host for stream in self.streams):
                assert time.monotonic() < deadline, "nobody sets the word that a stream waits for"
            assert not any(stream.operations for stream in self.streams)

    def _put(self, stream: Stream, function: Callable[[], Any], after: Event | Word | Call | None = None) -> None:
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
            with torch.no_grad():  # the device's own work, whoever looks
                function()
        return bool(ready)


def poison(tensor: Tensor) -> None:
    ctypes.memset(tensor.data_ptr(), POISON, tensor.nbytes)

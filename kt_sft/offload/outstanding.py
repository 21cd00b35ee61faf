"""Passes that a device awaits by itself: it goes on with their results, and the host learns later how they ended.

The engine sets a word of pinned memory when a pass is over, and the stream that takes results to the device waits for
that word (kt_sft/offload/driver.py). So Python may be some layers ahead of the device, which finds its next work ready
when results arrive. A pass that failed has left NaN, and its error is raised here: where the next pass begins or ends,
at the latest at the end of backward.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from kt_sft.engine import _native  # type: ignore[attr-defined]
from kt_sft.engine.ticket import Ticket
from kt_sft.offload.accelerator import Accelerator

#: The most at a time. Enough for two micro-batches to be two layers ahead, few enough that tensors on their way take
#: little memory and that a stream's queue, of about a thousand operations, does not fill up.
_MOST = 4
#: Words of flags: what waits for one must have gone on before it is used again, many passes later.
_FLAGS = 1024
_FLAG_BYTES = 64  # a cache line, so that the device looks at none that the engine writes for another pass
#: Seconds after which a device that has come to a word is taken to wait for it, and those to see it change in.
_LOOK, _PATIENCE = 5e-3, 5.0
_PAUSE = 5e-4

_logger = logging.getLogger("kt_sft")


class Flags:
    """Words of pinned memory that passes set when they are over, each to a value that counts up.

    Args:
        accelerator: Which pins the memory.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        with torch.inference_mode(False):
            self.memory = accelerator.pinned(_FLAGS * _FLAG_BYTES)
        self.memory.zero_()
        self._taken = 0
        self._lock = threading.Lock()

    def take(self) -> tuple[int, int]:
        """The address of a word, and the value that it is going to have."""
        with self._lock:
            self._taken += 1
            address = self.memory.data_ptr() + self._taken % _FLAGS * _FLAG_BYTES
            return address, self._taken % (1 << 32)


def waits_for_values(accelerator: Accelerator, flags: Flags) -> bool:
    """Tries whether a device waits for a word of memory, and goes on when it changes.

    On streams of its own, and without Python's part from the moment when a stream waits: another thread may hold up
    this one until the device has gone on.

    Args:
        accelerator: The device.
        flags: Of which no word was taken: the value is 1.

    Raises:
        RuntimeError: It waits and does not go on, so that its stream is lost.
    """
    waiting, calling, (address, value) = accelerator.new_stream(), accelerator.new_stream(), flags.take()
    word = ctypes.c_uint32.from_address(address)
    before = accelerator.record(waiting)
    accelerator.wait(calling, before)
    if not accelerator.call(calling, _native.word_raiser(), address):
        return False
    is_refused = not accelerator.wait_for_value(waiting, address, value)
    after = accelerator.record(waiting)
    waits, since, raised = False, 0.0, 0.0  # came there, and saw the word change, in seconds of time.monotonic()
    while word.value != value or not accelerator.is_complete(after):
        has_come, is_over = accelerator.is_complete(before), accelerator.is_complete(after)
        is_raised, now = word.value == value, time.monotonic()
        since = since or (now if has_come else 0.0)
        raised = raised or (now if is_raised else 0.0)
        waits |= has_come and not is_over and not is_raised and now - since > _LOOK
        if raised and now - raised > _PATIENCE:
            raise RuntimeError(
                "kt_sft: the accelerator does not see that a word of host memory has changed, and would wait for "
                "experts for ever; set await_in_stream: false and start again"
            )
        if has_come and not is_raised and now - since > _PATIENCE:  # the function was not called
            is_refused, word.value = True, value
        time.sleep(_PAUSE)
    return waits and not is_refused


@dataclasses.dataclass(frozen=True)
class Awaited:
    """A pass that a device awaits.

    Args:
        ticket: Of the pass.
        look: Raises where it will never be started.
        end: Called once it is over, and `released` complete: gives its buffer back, and notes it.
        released: The event after which the device has gone on; None where nobody wants to know when that was.
    """

    ticket: Ticket
    look: Callable[[], object]
    end: Callable[[], None]
    released: Any


class Outstanding:
    """Passes that a device awaits, oldest first. Thread-safe.

    Args:
        accelerator: The device.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._awaited: deque[Awaited] = deque()
        self._ending = threading.RLock()  # one thread ends passes: who finds none there must know that they are over
        self._lock = threading.RLock()  # a backward may be given up, by its last owner, while this thread is in here
        self._walks: set[int] = set()  # backwards at whose ends all is settled
        # By the backward to raise them in, as another thread may have ended the pass.
        self._failures: dict[int, Exception] = {}

    def __len__(self) -> int:
        return len(self._awaited)

    def add(self, awaited: Awaited, around: int) -> None:
        """Adds one; waits for the oldest where there are too many.

        Args:
            awaited: The pass.
            around: As in `Crossing.finish`.

        Raises:
            EngineError: An older one failed.
            IndexError: Likewise.
        """
        self._settle_after_backward(around)  # before anybody can end it
        self._awaited.append(awaited)
        self._end_while(lambda: len(self._awaited) > _MOST)

    def look(self) -> None:
        """Ends those that are over, without waiting.

        Raises:
            EngineError: One of them failed.
            IndexError: Likewise.
        """
        if self._oldest_is_over():
            self._end_while(self._oldest_is_over)

    def settle(self) -> None:
        """Waits for all of them.

        Raises:
            EngineError: One of them failed.
            IndexError: Likewise.
        """
        self._end_while(lambda: len(self._awaited) > 0)

    def stop(self, seconds: float) -> None:
        """At the end of the process: logs what failed and was not raised, if that shows within `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            while self._awaited and time.monotonic() < deadline:
                self.look()
                time.sleep(_PAUSE)
        except Exception as error:
            _logger.error("at the end of the process: %s", error)
        self._awaited.clear()

    def _oldest_is_over(self) -> bool:
        try:
            oldest = self._awaited[0]
        except IndexError:
            return False
        if not oldest.ticket.done:
            return False
        return oldest.released is None or self._accelerator.is_complete(oldest.released)

    def _end_while(self, there_is_one: Callable[[], bool]) -> None:
        with self._ending:
            try:
                while there_is_one():
                    self._end_oldest()
            except Exception as error:
                self._note(error)
                while self._awaited:  # of what had NaN to work on, maybe
                    try:
                        self._end_oldest()
                    except Exception as another:
                        self._note(another)
                raise

    def _note(self, error: Exception) -> None:
        """Lets backwards that go on fail, too: the pass may have been one of theirs."""
        bare = copy.copy(error)  # without the frames that it has come through, and all that they hold
        with self._lock:
            self._failures = dict.fromkeys(self._walks, bare) | self._failures

    def _end_oldest(self) -> None:
        oldest = self._awaited[0]
        try:
            oldest.ticket.settle(oldest.look)
            if oldest.released is not None:
                self._accelerator.synchronize(oldest.released)
        except Exception:  # but not Ctrl-C
            self._awaited.popleft()
            raise
        self._awaited.popleft()
        oldest.end()

    def _settle_after_backward(self, around: int) -> None:
        walk = torch._C._current_graph_task_id()
        with self._lock:
            is_within = around != walk and around in self._walks
            if walk == -1 or walk in self._walks or is_within:
                return
            self._walks.add(walk)
        end = functools.partial(self._end_backward, walk)
        # Autograd lets go of it with the backward; where that fails, without calling it.
        weakref.finalize(end, self._forget, walk).atexit = False
        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _end_backward(self, walk: int) -> None:
        self.settle()
        with self._lock:
            failure = self._failures.get(walk)
        if failure is not None:
            raise failure

    def _forget(self, walk: int) -> None:
        with self._lock:
            self._walks.discard(walk)
            self._failures.pop(walk, None)

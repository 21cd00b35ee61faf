"""Two micro-batches at a time: attention of one runs while the CPU computes the experts of the other.

Forward. Each micro-batch has a thread, and one of them runs at a time: the other goes on where the first has submitted
its experts and would wait for them. So Python, the accelerator's stream and random numbers see one fixed order:

    A: attention 1, submit 1 | await 1, attention 2, submit 2 | ...
    B:                       | attention 1, submit 1          | await 1, attention 2, submit 2 | ...

Backward is one call of autograd over both graphs. Of the nodes that are ready autograd runs the one with the highest
sequence number, which each thread counts for itself as it makes nodes. Here a thread that gets its turn first brings
its counter up to that of the thread before it, so that all nodes are numbered in the order in which they were made. As
a node is made after those whose results it takes, the highest number that is left is always ready, and backward is
forward in reverse: submit B, submit A, await B, attention of B, submit B of the layer before, await A, ... An await is
reached only when both micro-batches have been submitted, which means that nothing else could run. Within one
micro-batch the order is what it would be alone, and so are the bits of what is summed up; only a parameter's gradient
has terms of both, and where it has one of each, a + b is b + a.

What that needs: checkpointing must not be reentrant (its backward is one call for each layer), and casts of parameters
that autocast keeps must not be shared, or the two gradients would be added up in its dtype.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from kt_sft.engine.turns import taking_turns

Result = TypeVar("Result")


class _StoppedError(BaseException):
    """The other thread has failed. No `Exception`, so that no model's code takes it for one of its own."""


class _Turns:
    """Whose turn it is."""

    def __init__(self, threads: int) -> None:
        self._condition = threading.Condition()
        self._present = list(range(threads))
        self._turn = 0
        self._next_node = 0
        self._stopped = False

    def await_turn(self, thread: int) -> None:
        """Returns when it is the turn of `thread`.

        Raises:
            _StoppedError: There is nothing to go on for.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._turn == thread)
        if self._stopped:
            raise _StoppedError
        _number_nodes_from(self._next_node)

    def hand_over(self, thread: int) -> None:
        """Gives the turn to the next thread; returns when it is the turn of `thread` again.

        Raises:
            _StoppedError: There is nothing to go on for.
        """
        if len(self._present) > 1:
            self._give_turn(self._after(thread))
        self.await_turn(thread)

    def leave(self, thread: int, failed: bool) -> None:
        """`thread` is done; the others go on, or stop if it has failed."""
        self._stopped |= failed
        following = self._after(thread)
        self._present.remove(thread)
        self._give_turn(following)

    def stop(self) -> None:
        """Every thread stops where it gets its next turn."""
        self._stopped = True

    def _after(self, thread: int) -> int:
        return self._present[(self._present.index(thread) + 1) % len(self._present)]

    def _give_turn(self, thread: int) -> None:
        torch.clear_autocast_cache()
        self._next_node = _next_node()
        with self._condition:
            self._turn = thread
            self._condition.notify_all()


def _next_node() -> int:
    """The sequence number of the next node that this thread makes for autograd."""
    return _new_nodes(1) + 1


def _number_nodes_from(number: int) -> None:
    """Makes this thread's next nodes have at least that sequence number."""
    behind = number - _next_node()
    if behind > 0:
        _new_nodes(behind)


def _new_nodes(count: int) -> int:
    """Makes nodes for autograd that nobody needs; gives the last one's sequence number."""
    with torch.enable_grad():
        leaf = torch.zeros((), requires_grad=True, device="cpu")
        # One node for each: the cheapest way there is, and torch has none to set its counter.
        made = torch.atleast_1d(*[leaf] * count)
    last = made[-1] if count > 1 else made
    return last.grad_fn._sequence_nr()


class Interleaver:
    """Runs functions interleaved, in threads of its own, which it keeps: torch's CPU threads belong to those.

    Args:
        device: Of the model.
        threads: The most functions at a time.
    """

    def __init__(self, device: torch.device, threads: int = 2) -> None:
        self._device = device
        self._threads = [ThreadPoolExecutor(1, f"kt_sft-micro-batch-{number}") for number in range(threads)]

    def run(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Calls functions, switching from one to the next where it waits for routed experts; gives their results.

        They see the caller's context variables and, on an accelerator, its device and stream. The first begins, and
        each begins when those before it have submitted their first experts.

        Raises:
            BaseException: What a function raised; the others have been stopped, and nothing more is submitted for them.
        """
        turns = _Turns(len(functions))
        stream = None if self._device.type == "cpu" else torch.accelerator.current_stream()
        calls = [
            thread.submit(contextvars.copy_context().run, _take_part, turns, number, function, stream)
            for number, (thread, function) in enumerate(zip(self._threads, functions, strict=False))
        ]
        try:
            wait(calls)
        except BaseException:  # as by Ctrl-C
            turns.stop()
            wait(calls)
            raise
        errors = (call.exception() for call in calls)
        error = next((error for error in errors if error is not None and not isinstance(error, _StoppedError)), None)
        if error is not None:
            try:
                raise error
            finally:  # what has stopped, with all its tensors, must not live as long as this frame's traceback
                del calls, errors, error
        return [call.result() for call in calls]


def _take_part(turns: _Turns, number: int, function: Callable[[], Result], stream: Any) -> Result:
    failed = True
    try:
        turns.await_turn(number)
        if stream is not None:
            torch.accelerator.set_stream(stream)
        with taking_turns(lambda: turns.hand_over(number)):
            result = function()
        failed = False
        return result
    finally:
        turns.leave(number, failed)

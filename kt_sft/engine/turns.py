"""Threads that take turns: where one has submitted work to the engine, another goes on before it waits.

Who takes turns with whom is decided above (kt_sft/offload/interleave.py); here is only the place where it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_HAND_OVER: ContextVar[Callable[[], None] | None] = ContextVar("kt_sft_hand_over", default=None)


def takes_turns() -> bool:
    """Whether this thread takes turns with another."""
    return _HAND_OVER.get() is not None


def hand_over() -> None:
    """Lets the other thread go on, and returns when it is this one's turn again; at once where there is no other."""
    function = _HAND_OVER.get()
    if function is not None:
        function()


@contextmanager
def taking_turns(function: Callable[[], None]) -> Iterator[None]:
    """While it lasts, `hand_over` calls `function` in this thread."""
    token = _HAND_OVER.set(function)
    try:
        yield
    finally:
        _HAND_OVER.reset(token)

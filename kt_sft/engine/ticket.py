"""A pass of the engine: prepared, started, awaited; and what is noted of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from kt_sft.engine.meter import Meter
from kt_sft.engine.watchdog import explained


class Ticket:
    """One pass of a layer. It is started once, by `start` or by whoever calls what `starter` gives.

    Args:
        native: From the native engine.
        idx_TK: The routing, [T, K]; its values are those of the pass once that is done.
        is_backward: The direction.
        meter: Where the pass is noted.
    """

    def __init__(self, native: Any, idx_TK: Tensor, *, is_backward: bool, meter: Meter | None) -> None:
        self._native, self._idx_TK = native, idx_TK
        self.is_backward, self._meter = is_backward, meter

    @property
    def is_metered(self) -> bool:
        """Whether somebody wants to know when it was awaited."""
        return self._meter is not None

    @property
    def done(self) -> bool:
        """Whether the engine is done with it, and with all memory that it was given."""
        return self._native.done

    @property
    def submitted(self) -> float:
        """When it was started, in seconds of `time.monotonic()`; once it is done."""
        return self._native.submitted

    @property
    def completion(self) -> Any:
        """For later calls that may be the same: it tells that this one is done, and keeps nothing alive."""
        return self._native.completion

    def explained(self) -> AbstractContextManager[None]:
        """Around what may fail because the pass did: an EngineError that names it."""
        return explained("backward" if self.is_backward else "forward", self._idx_TK.shape[0])

    def start(self) -> None:
        """Hands it to the engine.

        Raises:
            EngineError: The engine has stopped.
        """
        with self.explained():
            self._native.start()

    def starter(self) -> tuple[int, int]:
        """Addresses of a C function and of its argument, to be called once, by any thread, without Python."""
        return self._native.starter()

    def signal(self, address: int, value: int) -> None:
        """Before it is started: a word of 32 bits that becomes `value` when results are there, or there will be none.

        Words count up, as modulo 2^32: one that is ahead of `value` already stays as it is.
        """
        self._native.signal(address, value)

    def cancel(self, reason: str) -> None:
        """It will not be started: whoever awaits it gets an error with that text. Nothing, where it was started."""
        self._native.cancel(reason)

    def wait(self, look: Callable[[], object] | None = None) -> None:
        """Returns when its results are there, and notes it.

        Args:
            look: Called now and then meanwhile, to raise where there will be none.

        Raises:
            EngineError: The pass failed, or the engine has stopped.
            IndexError: An index is out of range.
        """
        asked = time.monotonic()
        self.settle(look)
        self.note(asked, time.monotonic())

    def settle(self, look: Callable[[], object] | None = None) -> None:
        """As `wait`, but notes nothing: something else than this thread has waited for the results."""
        with self.explained():
            self._native.wait(look)

    def note(self, awaited: float, returned: float) -> None:
        """Notes a pass that is done.

        Args:
            awaited: When its results were asked for, maybe before it was started; in seconds of `time.monotonic()`.
            returned: When they were had.
        """
        if self._meter is not None and not self._native.remembered:
            self._meter.note(self._native, self._idx_TK, awaited, returned, is_backward=self.is_backward)

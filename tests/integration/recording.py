"""Records when work is handed to the engine and waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kt_sft.experts


class _RecordedTicket:
    def __init__(self, ticket: Any, record: Callable[[str], None]) -> None:
        self._ticket, self._record = ticket, record

    def wait(self) -> None:
        self._ticket.wait()
        self._record("A")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ticket, name)


class _RecordedEngine:
    def __init__(self, engine: Any, record: Callable[[str], None]) -> None:
        self._engine, self._record = engine, record

    def submit_forward(self, **call: Any) -> _RecordedTicket:
        self._record("S")
        return _RecordedTicket(self._engine.submit_forward(**call), self._record)

    def submit_backward(self, **call: Any) -> _RecordedTicket:
        self._record("S")
        return _RecordedTicket(self._engine.submit_backward(**call), self._record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def record_engine(monkeypatch: pytest.MonkeyPatch, record: Callable[[str], None]) -> None:
    """Calls `record` with "S" when a pass is submitted to the engine, and with "A" when somebody has awaited one."""
    start = kt_sft.experts.get_engine
    monkeypatch.setattr(kt_sft.experts, "get_engine", lambda threads: _RecordedEngine(start(threads), record))

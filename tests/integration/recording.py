"""Records when work is handed to the engine and waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kt_sft.experts


class _RecordedTicket:
    def __init__(self, ticket: Any, record: Callable[[str], None]) -> None:
        self._ticket, self._record = ticket, record

    def start(self) -> None:
        self._record("S")
        self._ticket.start()

    def starter(self) -> Any:
        self._record("S")
        return self._ticket.starter()

    def wait(self, look: Any = None) -> None:
        self._ticket.wait(look)
        self._record("A")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ticket, name)


class _RecordedEngine:
    def __init__(self, engine: Any, record: Callable[[str], None]) -> None:
        self._engine, self._record = engine, record

    def prepare_forward(self, **call: Any) -> Any:
        ticket = self._engine.prepare_forward(**call)
        return ticket if call["remembered"] else _RecordedTicket(ticket, self._record)

    def prepare_backward(self, **call: Any) -> _RecordedTicket:
        return _RecordedTicket(self._engine.prepare_backward(**call), self._record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def record_engine(monkeypatch: pytest.MonkeyPatch, record: Callable[[str], None]) -> None:
    """Calls `record` with "S" when a pass is submitted to the engine, and with "A" when the host has awaited one.

    Calls whose result is remembered are none of them.
    """
    start = kt_sft.experts.get_engine
    monkeypatch.setattr(kt_sft.experts, "get_engine", lambda threads: _RecordedEngine(start(threads), record))

"""The tier that a test runs on: each that this machine has."""

from __future__ import annotations

import pytest

from kt_sft.engine.engine import available_tiers


@pytest.fixture(params=available_tiers())
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tier's name, while it is the highest one allowed."""
    monkeypatch.setenv("KT_SFT_ISA", request.param)
    return request.param

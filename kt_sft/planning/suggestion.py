"""One setting to change, or to keep, with the reason."""

from __future__ import annotations

from typing import Any

from kt_sft.planning.model import ModelFacts
from kt_sft.planning.plan import Plan


def suggest(plan: Plan, facts: ModelFacts) -> dict[str, Any]:
    """Settings of a recipe that would be better, and `reason`."""
    return {"reason": "keep the recipe as it is"}

"""What kt_sft adds to transformers' Trainer."""

from __future__ import annotations

from types import ModuleType

from kt_sft.integrations import checkpoints, interleaving, monitoring, value_heads


def extend_trainer(module: ModuleType) -> None:
    """Attaches to checkpoints, logs and steps.

    Args:
        module: `transformers.trainer`.
    """
    checkpoints.extend_trainer(module)
    value_heads.extend_trainer(module)
    monitoring.extend_callbacks(module)
    interleaving.extend_trainer(module)

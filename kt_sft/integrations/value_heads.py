"""Where kt_sft attaches to transformers' Trainer for reward models, so that it can resume from their checkpoints.

LLaMA-Factory turns each into an adapter and, beside it, a value head. The Trainer, whose model wraps both, looks for a
whole model there and stops. (LLaMA-Factory refuses to reload the best one at the end of a run.)
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from torch import nn

from kt_sft.loading.errors import CheckpointError

#: The value head in a checkpoint, written last.
VALUE_HEAD = "value_head.safetensors"


def extend_trainer(module: ModuleType) -> None:
    """Wraps the method of `Trainer` that loads a checkpoint into its model.

    Args:
        module: `transformers.trainer`.
    """
    trainer_class: Any = module.Trainer
    resume = trainer_class._load_from_checkpoint

    @functools.wraps(resume)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        into = self.model if model is None else model
        if _is_ours(into):
            _load(into, Path(resume_from_checkpoint))
        else:
            resume(self, resume_from_checkpoint, model)

    trainer_class._load_from_checkpoint = _load_from_checkpoint


def _is_ours(model: Any) -> bool:
    """Whether it is a value head on an adapter on a model with experts in the engine."""
    from peft import PeftModel

    from kt_sft.experts import CpuExperts

    if not isinstance(getattr(model, "v_head", None), nn.Module):
        return False
    inner = getattr(model, "pretrained_model", None)
    return isinstance(inner, PeftModel) and any(isinstance(module, CpuExperts) for module in inner.modules())


def _load(model: Any, folder: Path) -> None:
    """Loads adapter and value head.

    Raises:
        CheckpointError: The value head is missing or damaged, or is none of this model.
        ValueError: As of `PeftModel.load_adapter`.
    """
    from safetensors.torch import load_file

    file = folder / VALUE_HEAD
    try:
        values = load_file(file)
        model.v_head.load_state_dict({key.removeprefix("v_head."): value for key, value in values.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{file}: the reward model's value head cannot be loaded ({error})") from error
    model.pretrained_model.load_adapter(folder, model.pretrained_model.active_adapters[0], is_trainable=True)

"""The tiny model with adapters on its experts, in the engine or as plain PEFT has it, and how far they may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rounding_noise import bounds_of_rounding
from torch import nn
from transformers import AutoModelForCausalLM

import kt_sft

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def load(folder: Path, engine: bool = True, **settings: Any) -> nn.Module:
    """The tiny model; every token goes to all its experts, so that no rounding can send it elsewhere."""
    config = {"quantization_config": kt_sft.KTConfig(**settings)} if engine else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_experts_per_tok=8, **config)


def adapted(model: nn.Module, seed: int = 0, name: str = "default", filled: bool = True, **settings: Any) -> PeftModel:
    """The model with an adapter on attention and experts, whose B is no longer zero if `filled`."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": EXPERTS} | settings)
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    if filled:
        with torch.no_grad():
            for key, value in model.named_parameters():
                if f"lora_B.{name}" in key:
                    value.normal_(std=0.1)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(48).reshape(2, 24)).logits


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.named_parameters() if "lora_" in key}


def assert_close(model: nn.Module, reference: torch.Tensor, engines: int = 1) -> None:
    """Logits of a model with experts in the engine are a reference's, within what the engine's roundings can do.

    Args:
        model: With adapters, merged ones too.
        reference: Of plain PEFT, or (`engines` 2) of another model in the engine, with roundings of its own.
        engines: How many of the two there are.
    """
    (bound,) = bounds_of_rounding(lambda: [logits(model)], lambda difference: difference.abs().max())
    assert (logits(model) - reference).abs().max() <= engines * bound

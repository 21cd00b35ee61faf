"""Loads checkpoints with their experts in the engine, and damages them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import kt_sft
from kt_sft.config import KTConfig

EXPERT = "model.layers.1.mlp.experts.3.{}_proj.weight"

Change = Callable[[dict[str, torch.Tensor]], None]


def load(folder: Path, **settings: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=KTConfig(), **settings)


def stores(model: nn.Module) -> list[Any]:
    return [module.store for module in model.modules() if isinstance(module, kt_sft.CpuExperts)]


def same_experts(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(stores(one), stores(other), strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x.dequantized(), y.dequantized(), strict=True))


def rewrite(checkpoint: Path, change: Change) -> None:
    """Changes the tensors of a checkpoint of one file."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, checkpoint / "model.safetensors", {"format": "pt"})


def set_matrix(matrix: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({EXPERT.format(matrix): value})


def set_value(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT.format("gate")][5, 7] = value

    return change

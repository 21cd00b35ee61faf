"""Loads checkpoints with their experts in the engine, and damages them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
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


def cached(folder: Path, cache: Path, name: str, without: Sequence[str] = ()) -> Path:
    """Puts a model into a hub's cache, as huggingface_hub does, but for the files `without`; returns its snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs, refs = repository / "snapshots" / ("0" * 40), repository / "blobs", repository / "refs"
    for one in (snapshot, blobs, refs):
        one.mkdir(parents=True)
    (refs / "main").write_text(snapshot.name)
    for number, file in enumerate(sorted(file for file in folder.iterdir() if file.name not in without)):
        shutil.copy(file, blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    return snapshot


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


def write_large(folder: Path, *, intermediate: int) -> None:
    """Writes a Qwen3-MoE checkpoint of 8 layers of 16 experts in shards of one layer, as large models come."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    layers, experts, hidden = 8, 16, 1024

    config = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=64,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=2,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Qwen3MoeForCausalLM(config).state_dict().items()}
    dense = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items() if ".experts." not in key}
    up = torch.rand(intermediate, hidden).bfloat16()
    down = torch.rand(hidden, intermediate).bfloat16()
    weight_map = dict.fromkeys(dense, "model-dense.safetensors")
    save_file(dense, folder / "model-dense.safetensors", metadata={"format": "pt"})
    for layer in range(layers):
        tensors = {}
        for expert in range(experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors |= {f"{prefix}.{name}_proj.weight": up.clone() for name in ("gate", "up")}
            tensors[f"{prefix}.down_proj.weight"] = down.clone()
        name = f"model-{layer}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

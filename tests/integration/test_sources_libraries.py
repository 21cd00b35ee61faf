"""Checkpoints written by compressed-tensors itself, against its own dequantised weights.

The library has no packer for GPTQ and AWQ that runs without their kernels: `quantised.write_gptq` and `write_awq` say
whose conventions they mirror.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
from agreement import deviations
from checkpoints import stores
from families import text
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kt_sft.config import KTConfig

pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")

from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

#: Name -> the library's format, and what it is told of the weights.
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4, groups": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4, groups with zero points": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False},
    ),
    "int4, rows": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "fp8, rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8, blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    ),
    "fp8, one scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
}


def _extremes(weight: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The least and the largest value of what shares a scale."""
    columns = weight.shape[1]
    if arguments["strategy"] == "block":
        parts = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        return parts.amin(dim=(1, 3)), parts.amax(dim=(1, 3))
    if arguments["strategy"] == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    parts = weight.unflatten(1, (-1, arguments.get("group_size") or columns))
    return parts.amin(dim=2), parts.amax(dim=2)


def write(name: str, folder: Path) -> nn.Module:
    """Compresses a tiny model's linear layers with the library; returns the FP32 model that it decompresses to."""
    form, arguments = SCHEMES[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments, dynamic=False))
    compressor = BaseCompressor.get_value_from_registry(form)
    torch.manual_seed(0)
    model = text("Qwen3MoeForCausalLM", num_experts=8, hidden_size=256, moe_intermediate_size=128)().bfloat16()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0.02, 0.2)
    model.save_pretrained(folder)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for key in [key for key, value in tensors.items() if quantised.is_expert(key, value)]:
        scales, zeros = calculate_qparams(*_extremes(tensors[key], arguments), scheme.weights)
        state = {"weight": tensors.pop(key), "weight_scale": scales, "weight_zero_point": zeros}
        compressed = compressor.compress(state, scheme)
        tensors |= {f"{key.removesuffix('weight')}{part}": value for part, value in compressed.items()}
        exact = {part: value.float() if part == "weight_scale" else value for part, value in compressed.items()}
        values[key] = compressor.decompress(exact, scheme)["weight"]
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = config.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(settings))
    plain = folder / "plain"
    model.float().save_pretrained(plain)
    reference = load_file(plain / "model.safetensors") | {key: value.float() for key, value in values.items()}
    save_file(
        {key: value.contiguous() for key, value in reference.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return type(model).from_pretrained(plain, dtype=torch.float32, experts_implementation="eager").eval()


@pytest.mark.parametrize("name", SCHEMES)
def test_what_compressed_tensors_writes(name: str, tmp_path: Path) -> None:
    """Weights to the bit, logits and gradients within the engine's roundings."""
    reference = write(name, tmp_path)

    ours = type(reference).from_pretrained(tmp_path, dtype=torch.float32, quantization_config=KTConfig()).eval()

    assert {store.expert_format for store in stores(ours)} == {name[:4].rstrip(",")}
    plain = [module for module in reference.modules() if hasattr(module, "is_transposed")]
    for store, theirs in zip(stores(ours), plain, strict=True):
        for stored, expected in zip(store.dequantized(), (theirs.gate_up_proj, theirs.down_proj), strict=True):
            assert torch.equal(stored, expected)
    for deviation, bound, size in deviations(reference, ours):
        assert deviation <= bound
        assert bound <= 0.25 * size

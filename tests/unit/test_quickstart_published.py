"""The walk-through's checkpoints: in the published layouts, and as near to their weights as the formats allow."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kt_sft

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from quickstart_steps import base_model, published
from quickstart_steps.tokenizer import train_tokenizer

TINY = base_model.BaseModelSettings(
    hidden_size=64, expert_size=160, num_layers=1, num_heads=2, num_experts=4, experts_per_token=2, steps=1
)
#: Relative to the weight, and to the largest weight that shares its scale. E4M3 has three bits of mantissa, and the
#: largest code is 448 (below 2^-6 codes are 2^-9 apart); E2M1 has one, and its scale lets 6 be as little as 4 of it:
#: from 6 on to 8 codes are clamped, by at most a quarter of the largest.
ALLOWED = {"fp8": (2**-4 + 2**-8, 2**-10 / 448), "mxfp4": (2**-2, 2**-2)}


def source(kind: str, folder: Path) -> torch.nn.Module:
    """Writes the plain model; returns it."""
    build = base_model.build_model if kind == "fp8" else published.build_gpt_oss
    model = build(TINY, train_tokenizer(TINY.seed)).bfloat16()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", published.KINDS)
def test_the_engine_takes_it_as_it_is(kind: str, tmp_path: Path) -> None:
    plain = source(kind, tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "quantised")

    published.publish(kind, tmp_path / "quantised")

    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == kind
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", quantization_config=kt_sft.KTConfig())
    experts = next(module for module in loaded.modules() if isinstance(module, kt_sft.CpuExperts))
    assert experts.store.expert_format == kind
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=kt_sft.KTConfig())
    reference = next(module for module in exact.modules() if isinstance(module, kt_sft.CpuExperts))
    of_weight, of_largest = ALLOWED[kind]
    for stored, weight in zip(experts.dequantized(), reference.dequantized(), strict=True):
        error, size = (stored - weight).abs(), weight.abs()
        assert bool((error <= of_weight * size + of_largest * size.max()).all())
        assert error.square().sum() <= 0.03 * weight.square().sum()
    assert plain.config.model_type == loaded.config.model_type


def test_names_and_shapes_are_the_published_ones(tmp_path: Path) -> None:
    for kind in published.KINDS:
        source(kind, tmp_path / kind)
        published.publish(kind, tmp_path / kind)
    fp8, mxfp4 = (load_file(tmp_path / kind / "model.safetensors") for kind in ("fp8", "mxfp4"))
    key = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert (fp8[key].dtype, tuple(fp8[key].shape)) == (torch.float8_e4m3fn, (64, 160))
    assert tuple(fp8[f"{key}_scale_inv"].shape) == (1, 2)
    assert fp8["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    blocks, scales = (mxfp4[f"model.layers.0.mlp.experts.gate_up_proj_{part}"] for part in ("blocks", "scales"))
    assert (tuple(blocks.shape), tuple(scales.shape)) == ((4, 320, 2, 16), (4, 320, 2))
    assert blocks.dtype == scales.dtype == torch.uint8

"""Models from quantised checkpoints, saved again: as they were, and with adapters merged into them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
import yaml
from checkpoints import same_experts
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_export_merged import merge
from test_sources_fp8 import PUBLISHED, load, publish
from torch import Tensor
from transformers import AutoModelForCausalLM

from kt_sft.config import KTConfig
from kt_sft.loading.errors import CheckpointError


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The keys under which both have the same bytes."""
    return [key for key in one if one[key].dtype == other[key].dtype and torch.equal(bits(one[key]), bits(other[key]))]


def quantization(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_change_every_tensor_keeps_its_bytes(name: str, tmp_path: Path) -> None:
    reference, _ = publish(name, tmp_path / "source")
    ours = load(reference, tmp_path / "source", dtype=torch.bfloat16)

    ours.save_pretrained(tmp_path / "target", max_shard_size="200KB")

    before = load_file(tmp_path / "source" / "model.safetensors")
    after = {k: v for file in (tmp_path / "target").glob("*.safetensors") for k, v in load_file(file).items()}
    assert before.keys() == after.keys()
    # Routers keep FP32 biases; the tiny source has them in BF16.
    assert all("e_score_correction_bias" in key for key in {*before} - {*same_bytes(before, after)})
    assert quantization(tmp_path / "target") == quantization(tmp_path / "source")
    assert same_experts(load(reference, tmp_path / "target", dtype=torch.bfloat16), ours)


def check_fp8(stored: Tensor, exact: Tensor, scale: Tensor) -> None:
    """E4M3 has 3 bits of mantissa: half a step is 2^-4 of the value, and 2^-10 scales where the code is denormal.

    The scale is at most 2^-8 (or, for powers of two, twice) above the largest magnitude / 448, so no code is clamped by
    more than its own rounding. Both sides of the comparison are FP32: 2^-20 of the value holds their roundings.
    """
    allowed = (2.0**-4 + 2.0**-20) * exact.abs() + 2.0**-10 * scale
    assert bool(((stored - exact).abs() <= allowed).all())


@pytest.mark.parametrize("name", ["DeepSeek-V3.1", "Qwen3-FP8", "MiniMax-M2", "GLM-4.5-FP8", "one scale"])
def test_merged_weights_are_quantised_as_the_source_is(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference, values = publish(name, tmp_path / "source")
    ours = load(reference, tmp_path / "source")
    changes = merge(ours, size=0.05)
    key = next(key for key in values if "o_proj" in key)
    with torch.no_grad():
        ours.get_parameter(key).add_(0.05)
    caplog.set_level(logging.INFO, "kt_sft")

    ours.save_pretrained(tmp_path / "target")

    assert "1 weights of the dense part changed and are quantised again: relative error" in caplog.text
    assert "42 matrices of experts changed" in caplog.text or "21 matrices of experts changed" in caplog.text
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "target"))
    assert before.keys() == after.keys()
    before = {k: v for k, v in before.items() if k in values or "_scale" in k}  # what is FP32 here is saved so
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (after[k].dtype, after[k].shape) for k in before}
    changed = {*before} - {*same_bytes(before, after)}
    assert {k for k in changed if ".experts." not in k} <= {key, f"{key}_scale_inv", f"{key}_scale"}
    assert not any(".experts.7." in k for k in changed)  # the last expert's change is zero

    again = load(reference, tmp_path / "target")
    scales = {k.removesuffix("_scale_inv").removesuffix("_scale"): v for k, v in after.items() if "_scale" in k}
    check_fp8(again.get_parameter(key), values[key].float() + 0.05, scales[key].float().max())
    for path, change in changes.items():
        mine, theirs = again.get_submodule(path), reference.get_submodule(path)
        largest = torch.stack([scale.float().max() for scale in scales.values()]).max()
        for stored, source, part in zip(
            mine.dequantized(), (theirs.gate_up_proj, theirs.down_proj), (0, 1), strict=True
        ):
            delta = torch.stack([change.delta(expert)[part] for expert in range(change.num_experts)])
            check_fp8(stored, source.detach() + delta, largest)


def test_a_llamafactory_export(tiny_moe: Path, tmp_path: Path) -> None:
    """Attention and experts, through the command's own function; the result loads in kt_sft again."""
    from llamafactory.train.tuner import export_model

    model = Path(shutil.copytree(tiny_moe, tmp_path / "model"))
    values = quantised.write_fp8(model, scales=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    torch.manual_seed(3)
    get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    recipe = {
        "model_name_or_path": str(model),
        "adapter_name_or_path": str(tmp_path / "adapter"),
        "template": "qwen",
        "infer_dtype": "bfloat16",
        "export_dir": str(tmp_path / "out"),
        "export_device": "cpu",
        "kt_sft": {},
    }

    export_model(yaml.safe_load(yaml.safe_dump(recipe)))

    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    same = same_bytes(before, after)
    assert [k for k in before if "q_proj.weight" in k and k in same] == []
    assert all(k in same for k in before if "k_proj" in k or "norm" in k or "embed" in k)
    assert quantization(tmp_path / "out") == quantization(model)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=KTConfig())
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    delta = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"] * (8 / 2)
    key = "model.layers.1.self_attn.q_proj.weight"
    exact = values[key].float() + delta
    # LLaMA-Factory merges in BF16: the weight, the change and their sum are rounded, each by 2^-9 of the larger.
    rounding = 3 * 2.0**-9 * (values[key].float().abs() + delta.abs())
    allowed = (
        (2.0**-4 + 2.0**-8) * (exact.abs() + rounding) + rounding + 2.0**-10 * after[f"{key}_scale_inv"].float().max()
    )
    assert bool(((ours.get_parameter(key) - exact).abs() <= allowed).all())


def test_values_that_cannot_be_saved(tmp_path: Path) -> None:
    reference, values = publish("Qwen3-FP8", tmp_path / "source")
    ours = load(reference, tmp_path / "source")
    key = next(key for key in values if "o_proj" in key)
    with torch.no_grad():
        ours.get_parameter(key)[3, 4] = float("inf")
    with pytest.raises(CheckpointError, match=f"{key} holds NaN or Inf values, which cannot be saved as FP8"):
        ours.save_pretrained(tmp_path / "target")
    assert not (tmp_path / "target" / "config.json").exists()
    with pytest.raises(ValueError, match="save the model first, then call push_to_hub"):
        ours.save_pretrained(tmp_path / "target", push_to_hub=True)

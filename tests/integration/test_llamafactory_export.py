"""`llamafactory-cli export` of an adapter on attention and on routed experts, made by PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from commands import run_command
from peft import LoraConfig, PeftModel, get_peft_model
from rounding import UNIT_ROUNDOFF, bound_of_rounding
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kt_sft.loading.layout import find_experts

RANK = 3


@pytest.fixture(scope="module")
def adapter(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random LoRA everywhere, but none on the last expert."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], target_parameters=experts, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".experts." in name and "lora_A" in name:
            parameter.data[-RANK:] = 0  # A is expert-major
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tiny_moe: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported with experts that run in four bits: merged into are the checkpoint's own weights all the same."""
    folder = tmp_path_factory.mktemp("exported")
    recipe = {
        "model_name_or_path": str(tiny_moe),
        "adapter_name_or_path": str(adapter),
        "template": "qwen",
        "infer_dtype": "bfloat16",
        "export_dir": str(folder / "model"),
        "export_device": "cpu",
        "export_size": 1,
        "kt_sft": {"expert_format": "int4"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run_command(["llamafactory-cli", "export", str(folder / "recipe.yaml")])
    assert result.returncode == 0, result.stdout
    return folder / "model"


def test_weights_are_those_of_base_and_adapter(exported: Path, adapter: Path, tiny_moe: Path, tmp_path: Path) -> None:
    """Against PEFT's own merge in FP32.

    The bound. Each exported expert weight is the FP32 sum of weight and change, rounded once to BF16: off by 2^-8 of
    itself. Two FP32 sums of the weight and R products differ by at most 2 (R + 2) 2^-24 of the sum of their sizes. That
    sum is at most R + 1 times the largest of them, each a weight or a product of two factors.
    """
    base = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(tmp_path)
    expected, actual = load_file(tmp_path / "model.safetensors"), load_file(exported / "model.safetensors")
    source = load_file(tiny_moe / "model.safetensors")
    factors = [value.abs().max() for key, value in load_file(adapter / "adapter_model.safetensors").items()]
    scale = 8 / RANK  # LoraConfig's alpha
    largest = max(scale * max(factors) ** 2, *(value.abs().max() for value in source.values()))
    slack = 2 * (RANK + 2) * 2.0**-24 * (RANK + 1) * largest

    assert actual.keys() == expected.keys() == source.keys()
    for key, weight in actual.items():
        assert weight.dtype == torch.bfloat16
        if ".experts." not in key:
            continue
        unchanged = ".experts.7." in key
        assert torch.equal(weight, source[key]) == unchanged
        assert bool(((weight.float() - expected[key]).abs() <= UNIT_ROUNDOFF * expected[key].abs() + slack).all())
    assert not list(exported.glob("incomplete*"))


def test_plain_transformers_answers_as_base_and_adapter(exported: Path, adapter: Path, tiny_moe: Path) -> None:
    """Up to the rounding of experts' merged weights; all else is what LLaMA-Factory merged and wrote.

    All experts are chosen for every token, so that no rounding sends one elsewhere.
    """
    tokens = torch.arange(48).reshape(2, 24)
    settings = {"dtype": torch.float32, "num_experts_per_tok": 8}
    base, merged, reference = (
        AutoModelForCausalLM.from_pretrained(f, **settings) for f in (tiny_moe, exported, exported)
    )
    with torch.no_grad():
        before, actual = base(tokens).logits, merged(tokens).logits
    exact = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    names = [*find_experts(exact)]
    for name in names:
        reference.get_submodule(name).load_state_dict(exact.get_submodule(name).state_dict())
    with torch.no_grad():
        expected = reference(tokens).logits

    bound = bound_of_rounding(reference, names, lambda: reference(tokens).logits)
    assert (actual - expected).abs().max() <= bound
    assert bound < 0.1 * (before - expected).abs().max(), "the bound would not notice a missing adapter"

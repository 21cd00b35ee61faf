"""Quantised experts from a checkpoint: the same bytes as `from_weights` makes, within memory, and through a recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import stores
from commands import run_command, train_losses
from families import FAMILIES, make
from torch import nn
from transformers import AutoModelForCausalLM

import kt_sft
from kt_sft.config import AVAILABLE_FORMATS, KTConfig
from kt_sft.loading.errors import NotEnoughMemoryError

QUANTISED: list[dict[str, Any]] = [
    *({"expert_format": name} for name in AVAILABLE_FORMATS if name != "bf16"),
    {"expert_format": "int8", "group_size": 64},
    {"expert_format": "int4", "zero_point": True},
]


def settings_name(settings: dict[str, Any]) -> str:
    return "-".join(str(value) for value in settings.values())


def from_weights(experts: nn.Module, config: KTConfig, activation: str = "silu", **kwargs: Any) -> kt_sft.CpuExperts:
    return kt_sft.CpuExperts.from_weights(
        experts.gate_up_proj.detach(), experts.down_proj.detach(), config=config, activation=activation, **kwargs
    )


@pytest.mark.parametrize("settings", QUANTISED, ids=settings_name)
def test_loading_quantises_as_from_weights_does(settings: dict[str, Any], tiny_moe: Path) -> None:
    config = KTConfig(**settings)
    stock = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.bfloat16)

    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.bfloat16, quantization_config=config)

    for layer, store in enumerate(stores(model)):
        experts = from_weights(stock.model.layers[layer].mlp.experts, config)
        for loaded, direct in zip(store.dequantized(), experts.dequantized(), strict=True):
            assert torch.equal(loaded, direct)
        assert store.nbytes == experts.store.nbytes
        assert 0 < store.relative_error == pytest.approx(experts.store.relative_error, rel=1e-9)


@pytest.mark.parametrize("expert_format", ["int8", "fp8", "mxfp4"])
def test_experts_that_lie_transposed_are_turned_before_they_are_quantised(expert_format: str, tmp_path: Path) -> None:
    # gpt-oss: [E, H, 2I], gate and up interleaved.
    stock = make(FAMILIES["gpt_oss"][0])
    stock.save_pretrained(tmp_path)
    config = KTConfig(expert_format=expert_format)

    model = type(stock).from_pretrained(tmp_path, quantization_config=config)

    experts = stock.model.layers[0].mlp.experts
    rows = copy.deepcopy(experts).float()
    gate_up = rows.gate_up_proj.detach().transpose(1, 2)
    gate_up = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], dim=1)
    direct = kt_sft.CpuExperts.from_weights(
        gate_up, rows.down_proj.detach().transpose(1, 2), config=config, activation="swiglu_oai"
    )
    for loaded, expected in zip(stores(model)[0].dequantized(), direct.dequantized(), strict=True):
        assert torch.equal(loaded, expected)


def test_the_memory_asked_for_is_that_of_the_format(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(expert_format: str) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            tiny_moe, quantization_config=KTConfig(expert_format=expert_format, store="resident")
        )

    held = {name: sum(store.nbytes for store in stores(load(name))) for name in ("bf16", "int4")}
    dense = sum(parameter.nbytes for parameter in load("int4").parameters())
    monkeypatch.setattr("kt_sft.loading.memory.available_bytes", lambda: dense + (held["bf16"] + held["int4"]) // 2)

    load("int4")
    with pytest.raises(NotEnoughMemoryError):
        load("bf16")


def test_a_recipe_trains_with_quantised_experts(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(kt_sft={"expert_format": "int4", "zero_point": True})

    result = run_command(["llamafactory-cli", "train", str(recipe)])

    assert result.returncode == 0, result.stdout
    assert "routed experts on the CPU: 16 experts in 2 layers, int4" in result.stdout
    assert "relative error of the stored weights" in result.stdout
    losses = train_losses(tmp_path / "out")
    assert losses[-1] < losses[0]

"""MXFP4 checkpoints of gpt-oss, against transformers' own dequantisation of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
import yaml
from agreement import deviations
from checkpoints import same_experts, stores
from commands import train_losses
from families import YARN, text
from safetensors.torch import load_file, save_file
from test_export_merged import merge
from test_sources_export import quantization, same_bytes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

import kt_sft
from kt_sft.config import KTConfig
from kt_sft.loading.errors import CheckpointError

EXPERTS = "model.layers.1.mlp.experts"


def gate_first(rows: Tensor) -> Tensor:
    """[E, 2I, ...] with gate and up alternating, as the engine gives it."""
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)


def write(folder: Path, **sizes: Any) -> quantised.Values:
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_local_experts": 8} | sizes
    torch.manual_seed(0)
    model = text("GptOssForCausalLM", **sizes, rope_parameters=YARN)().bfloat16()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.2)
    model.save_pretrained(folder)
    return quantised.write_mxfp4(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, quantised.Values]:
    folder = tmp_path_factory.mktemp("gpt_oss")
    return folder, write(folder)


def load(folder: Path, **settings: Any) -> nn.Module:
    config = KTConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


def test_codes_and_scales_reach_the_engine_as_they_are(
    published: tuple[Path, quantised.Values], caplog: pytest.LogCaptureFixture
) -> None:
    folder, values = published

    ours = load(folder)

    assert {store.expert_format for store in stores(ours)} == {"mxfp4"}
    assert all(store.relative_error == 0 for store in stores(ours))
    for layer, store in enumerate(stores(ours)):
        gate_up, down = store.dequantized()
        experts = f"model.layers.{layer}.mlp.experts"
        assert torch.equal(gate_up, gate_first(values[f"{experts}.gate_up_proj"].transpose(1, 2)).float())
        assert torch.equal(down, values[f"{experts}.down_proj"].transpose(1, 2).float())
        assert store.gate_up_bias is not None
    assert "UNEXPECTED" not in caplog.text


def test_the_model_computes_what_transformers_does(published: tuple[Path, quantised.Values]) -> None:
    """Logits and gradients against transformers' dequantised model; every weight is a BF16 value."""
    folder, values = published
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), experts_implementation="eager"
    ).float()
    assert torch.equal(plain.get_submodule(EXPERTS).down_proj, values[f"{EXPERTS}.down_proj"].float())
    for deviation, bound, size in deviations(plain.eval(), load(folder)):
        assert deviation <= bound
        assert bound <= 0.25 * size


@pytest.mark.parametrize("expert_format", ["bf16", "int8"])
def test_another_format_is_quantised_from_the_values(
    expert_format: str, published: tuple[Path, quantised.Values]
) -> None:
    folder, values = published
    gate_up, down = (values[f"{EXPERTS}.{name}"].transpose(1, 2).float() for name in ("gate_up_proj", "down_proj"))

    store = stores(load(folder, expert_format=expert_format))[1]

    config = KTConfig(expert_format=expert_format)
    direct = kt_sft.CpuExperts.from_weights(gate_first(gate_up), down, config=config, activation="swiglu_oai")
    for loaded, expected in zip(store.dequantized(), direct.dequantized(), strict=True):
        assert torch.equal(loaded, expected)
    assert store.relative_error == pytest.approx(direct.store.relative_error, rel=1e-9)


def _plain_too(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERTS}.down_proj"] = torch.zeros(8, 64, 96)


def _no_number(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERTS}.gate_up_proj_scales"][3, 5, 1] = 255  # row 2 of up


def _shape(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{EXPERTS}.{name}": torch.zeros(shape, dtype=torch.uint8)})


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{EXPERTS}.down_proj_scales"), "down_proj_blocks has no scales"),
    "no blocks": (lambda t: t.pop(f"{EXPERTS}.down_proj_blocks"), "down_proj_scales has no .*down_proj_blocks beside"),
    "blocks of another size": (_shape("down_proj_blocks", 8, 96, 4, 8), r"\[8, 96, 4, 8\], but blocks of MXFP4 codes"),
    "blocks flat": (_shape("down_proj_blocks", 8, 96, 32), r"are \[experts, rows, columns / 32, 16\]"),
    "scales of another size": (_shape("down_proj_scales", 8, 96, 3), r"\[8, 96, 3\], but scales of .* \[8, 96, 2\]"),
    "another matrix": (
        lambda t: [_shape("down_proj_blocks", 8, 64, 2, 16)(t), _shape("down_proj_scales", 8, 64, 2)(t)],
        r"a matrix of shape \[64, 64\], the model expects \[64, 96\]",
    ),
    "other codes": (
        lambda t: t.update({f"{EXPERTS}.down_proj_blocks": t[f"{EXPERTS}.down_proj_blocks"].view(torch.int8)}),
        "holds I8 values, but blocks of MXFP4 codes are U8",
    ),
    "twice": (_plain_too, "is there twice"),
    "no number": (_no_number, "up of expert 3 of .*the scale at row 2, column 1 is no number"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage(
    damage: Callable[..., Any], message: str, published: tuple[Path, quantised.Values], tmp_path: Path
) -> None:
    shutil.copy(published[0] / "config.json", tmp_path)
    tensors = load_file(published[0] / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_saving_keeps_experts_and_takes_what_changed_beside_them(
    published: tuple[Path, quantised.Values], tmp_path: Path
) -> None:
    folder, _ = published
    ours = load(folder)
    with torch.no_grad():
        ours.get_parameter("model.layers.0.self_attn.q_proj.weight").add_(1)

    ours.save_pretrained(tmp_path / "target")

    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "target"))
    assert before.keys() == after.keys()
    experts = [key for key in before if ".experts." in key]
    assert {*experts} <= {*same_bytes(before, after)}
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(after[q_proj], before[q_proj].float() + 1)
    assert quantization(tmp_path / "target") == quantization(folder)
    assert same_experts(load(tmp_path / "target"), ours)


def test_merged_experts_are_refused_before_anything_is_written(
    published: tuple[Path, quantised.Values], tmp_path: Path
) -> None:
    ours = load(published[0])
    merge(ours)
    with pytest.raises(CheckpointError, match=r"is MXFP4, in which a merged adapter would be rounded away; keep"):
        ours.save_pretrained(tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_recipe_trains(tiny_moe: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Attention and experts, through LLaMA-Factory's own function."""
    from llamafactory.train.tuner import run_exp

    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    write(folder, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32)
    tokenizer.save_pretrained(folder)
    recipe = write_recipe(
        model_name_or_path=str(folder), kt_sft={"lora_experts": True}, flash_attn="disabled", save_steps=None
    )

    run_exp(yaml.safe_load(recipe.read_text()))

    losses = train_losses(tmp_path / "out")
    assert losses[-1] < losses[0]

"""FP8 checkpoints: experts that reach the engine as they are, and a dense part dequantised by definition."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
import yaml
from agreement import deviations
from checkpoints import stores
from commands import train_losses
from families import LATENT, ROUTED, text
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import kt_sft
from kt_sft.config import ConfigError, KTConfig
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.sources import fp8

#: More than one block of 128, and a short one at the end.
_SIZES = {"hidden_size": 160, "intermediate_size": 136, "moe_intermediate_size": 144}

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "deepseek_v3": text("DeepseekV3ForCausalLM", **LATENT, **ROUTED | {"first_k_dense_replace": 1}, **_SIZES),
    "qwen3_moe": text("Qwen3MoeForCausalLM", num_experts=8, **_SIZES),
    "minimax_m2": text("MiniMaxM2ForCausalLM", num_local_experts=8, **_SIZES | {"intermediate_size": 144}),
    "glm4_moe": text("Glm4MoeForCausalLM", **ROUTED, **_SIZES),
}

#: Model -> how it is published.
PUBLISHED: dict[str, tuple[str, Callable[..., quantised.Values], dict[str, Any]]] = {
    "DeepSeek-V3": ("deepseek_v3", quantised.write_fp8, {}),
    "DeepSeek-V3.1": ("deepseek_v3", quantised.write_fp8, {"powers": True}),
    "Qwen3-FP8": ("qwen3_moe", quantised.write_fp8, {"scales": torch.bfloat16, "modules_to_not_convert": ["lm_head"]}),
    "MiniMax-M2": ("minimax_m2", quantised.write_fp8, {"fmt": "float8_e4m3fn"}),
    "scales E8M0": ("qwen3_moe", quantised.write_fp8, {"scales": torch.float8_e8m0fnu, "powers": True}),
    "GLM-4.5-FP8": ("glm4_moe", quantised.write_compressed_fp8, {}),
    "FP8_BLOCK": ("qwen3_moe", quantised.write_compressed_fp8, {"strategy": "block"}),
    "one scale": ("qwen3_moe", quantised.write_compressed_fp8, {"strategy": "tensor", "scales": torch.float32}),
}


def publish(name: str, folder: Path) -> tuple[nn.Module, quantised.Values]:
    """Writes the tiny checkpoint; returns the FP32 model of its dequantised weights, and the quantised ones' values."""
    family, write, settings = PUBLISHED[name]
    torch.manual_seed(0)
    model = MAKERS[family]().bfloat16()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.2)  # some classes leave experts uninitialised
    model.save_pretrained(folder)
    values = write(folder, **settings)
    plain = folder / "plain"
    model.save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    tensors = {key: values.get(key, tensor).float() for key, tensor in tensors.items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    reference = type(model).from_pretrained(plain, dtype=torch.float32, experts_implementation="eager")
    return reference.eval(), values


def load(reference: nn.Module, folder: Path, dtype: Any = torch.float32, **settings: Any) -> nn.Module:
    model = type(reference).from_pretrained(folder, dtype=dtype, quantization_config=KTConfig(**settings))
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "_VALUES_AT_ONCE", 2048)  # several pieces of a dense matrix
    reference, values = publish(name, tmp_path)

    ours = load(reference, tmp_path)

    assert {store.expert_format for store in stores(ours)} == {"fp8"}
    assert all(store.relative_error == 0 for store in stores(ours))
    layers = [module for module in ours.modules() if isinstance(module, kt_sft.CpuExperts)]
    plain = [module for module in reference.modules() if hasattr(module, "is_transposed")]
    for mine, theirs in zip(layers, plain, strict=True):
        gate_up, down = mine.dequantized()
        assert torch.equal(gate_up, theirs.gate_up_proj)
        assert torch.equal(down, theirs.down_proj)
    dense = dict(ours.named_parameters())
    quantised_dense = 0
    for key, parameter in reference.named_parameters():
        if ".experts." in key:
            continue
        assert torch.equal(dense[key], parameter), key
        quantised_dense += key in values
    assert quantised_dense >= 8  # attention of two layers, at least
    assert "newly initialized" not in caplog.text
    assert "UNEXPECTED" not in caplog.text


def test_the_model_computes_what_its_dequantised_weights_say(tmp_path: Path) -> None:
    """Logits, and gradients through the experts. Scales that are powers of two make every weight a BF16 value, as the
    bound presumes."""
    reference, _ = publish("DeepSeek-V3.1", tmp_path)
    for deviation, bound, size in deviations(reference, load(reference, tmp_path)):
        assert deviation <= bound
        assert bound <= 0.25 * size


@pytest.mark.parametrize("expert_format", ["bf16", "int8", "int4"])
def test_another_format_is_quantised_from_the_values(expert_format: str, tmp_path: Path) -> None:
    reference, _ = publish("Qwen3-FP8", tmp_path)

    (store, *_) = stores(load(reference, tmp_path, expert_format=expert_format))

    experts = next(module for module in reference.modules() if hasattr(module, "is_transposed"))
    direct = kt_sft.CpuExperts.from_weights(
        experts.gate_up_proj, experts.down_proj, config=KTConfig(expert_format=expert_format)
    )
    for loaded, expected in zip(store.dequantized(), direct.dequantized(), strict=True):
        assert torch.equal(loaded, expected)
    assert 0 < store.relative_error == pytest.approx(direct.store.relative_error, rel=1e-9)


def test_the_dtype_of_codes_is_not_taken_for_the_models(tmp_path: Path) -> None:
    """With `dtype: auto` and none in config.json, transformers looks at the first tensor."""
    reference, values = publish("Qwen3-FP8", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config if "dtype" not in key}))
    tensors = load_file(tmp_path / "model.safetensors")
    lead = {key: tensors.pop(key) for key in [next(key for key in tensors if key in values)]}
    save_file(lead | tensors, tmp_path / "model.safetensors", {"format": "pt"})

    ours = load(reference, tmp_path, dtype="auto")

    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}


def test_blocks_of_another_size_run_in_another_format_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MAKERS["qwen3_moe"]().bfloat16()
    model.save_pretrained(tmp_path)
    values = quantised.write_fp8(tmp_path, block=(64, 32))
    with pytest.raises(CheckpointError, match=r"FP8 in blocks of 64 x 32, .* set expert_format"):
        load(model, tmp_path)

    ours = load(model, tmp_path, expert_format="bf16")

    stored = stores(ours)[0].dequantized()[1][0]
    assert torch.equal(stored, values["model.layers.0.mlp.experts.0.down_proj.weight"].float().bfloat16().float())


@pytest.mark.parametrize("intermediate", [128, 144])
def test_fused_experts(intermediate: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = _SIZES | {"moe_intermediate_size": intermediate}
    model = text("Qwen3MoeForCausalLM", num_experts=8, **sizes)().bfloat16()
    model.save_pretrained(tmp_path)
    values = quantised.write_fp8(tmp_path)
    if intermediate == 144:  # fused blocks that hold rows of gate and of up
        quantised.fuse(tmp_path, values)
        tensors = load_file(tmp_path / "model.safetensors")
        for key in [key for key in tensors if key.endswith("gate_up_proj_scale_inv")]:
            tensors[key] = tensors[key][:, :3].contiguous()
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"hold FP8 in blocks of 128 x 128, which the engine cannot take as"):
            load(model, tmp_path)
        assert stores(load(model, tmp_path, expert_format="bf16"))
        return
    quantised.fuse(tmp_path, values)

    ours = load(model, tmp_path)

    for layer, store in enumerate(stores(ours)):
        assert store.expert_format == "fp8"
        gate_up, down = store.dequantized()
        assert torch.equal(gate_up, values[f"model.layers.{layer}.mlp.experts.gate_up_proj"].float())
        assert torch.equal(down, values[f"model.layers.{layer}.mlp.experts.down_proj"].float())


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
DENSE = "model.layers.1.self_attn.q_proj.weight"


def _codes_of_another_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].view(torch.int8)


def _set(key: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key][place] = value

    return change


def _shape(key: str, shape: tuple[int, ...]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{EXPERT}_scale_inv"), f"tensor {EXPERT} has no scales"),
    "no scales, dense": (lambda t: t.pop(f"{DENSE}_scale_inv"), f"tensor {DENSE} has no scales"),
    "no codes": (lambda t: t.pop(EXPERT), f"{EXPERT}_scale_inv holds scales, but"),
    "plain weight beside scales": (lambda t: t.update({EXPERT: t[EXPERT].bfloat16()}), "is no FP8 weight beside it"),
    "scales of another matrix": (_shape(f"{EXPERT}_scale_inv", (2, 3)), r"has shape \[2, 3\], which are no scales of"),
    "scales of a dense matrix": (_shape(f"{DENSE}_scale_inv", (3, 2)), r"blocks of 128 x 128 have \[1, 2\]"),
    "integers": (_codes_of_another_dtype, "is no FP8 weight beside it"),
    "integer scales": (
        lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(2, 2, dtype=torch.int32)}),
        "holds I32 values, but scales of FP8 weights are BF16",
    ),
    "no number": (_set(EXPERT, (5, 7), float("nan")), "up of expert 3 of .*row 5, column 7 is no number"),
    "no number, dense": (_set(DENSE, (5, 7), float("nan")), f"{DENSE} holds NaN"),
    "infinite scale": (_set(f"{EXPERT}_scale_inv", (1, 0), float("inf")), "the scale at row 1, column 0 is inf"),
    "negative scale": (_set(f"{EXPERT}_scale_inv", (0, 1), -0.5), "the scale at row 0, column 1 is -0.5"),
    "minus zero": (_set(f"{EXPERT}_scale_inv", (0, 1), -0.0), "the scale at row 0, column 1 is -0.0"),
    "negative scale, dense": (_set(f"{DENSE}_scale_inv", (0, 0), -0.5), f"{DENSE}_scale_inv holds scales that are neg"),
    "scale too large": (_set(f"{EXPERT}_scale_inv", (0, 0), 1e37), "the scale at row 0, column 0 is"),
    "another shape": (
        lambda t: t.update({EXPERT: t[EXPERT][:128], f"{EXPERT}_scale_inv": t[f"{EXPERT}_scale_inv"][:1]}),
        "the model expects",
    ),
    "another shape, dense": (
        lambda t: t.update({DENSE: t[DENSE][:, :128], f"{DENSE}_scale_inv": torch.ones(1, 1)}),
        f"{DENSE} has shape .* the model expects",
    ),
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    publish("Qwen3-FP8", folder)
    return folder


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage(damage: Callable[..., Any], message: str, qwen: Path, tmp_path: Path) -> None:
    shutil.copy(qwen / "config.json", tmp_path)
    tensors = {key: value.clone() for key, value in load_file(qwen / "model.safetensors").items()}
    for key in [key for key in tensors if key.endswith("scale_inv")]:
        tensors[key] = tensors[key].float()
    damage(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KTConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "bitnet"}, r"quantised \(bitnet\), which kt_sft does not read; it reads fp8, "),
        ({"fmt": "e5m2"}, "with fmt 'e5m2'"),
        ({"weight_block_size": [128]}, r"with blocks of \[128\]"),
        ({"quant_method": "compressed-tensors"}, "with 0 kinds of weights"),
    ],
)
def test_variants_that_are_not_read(changes: dict[str, Any], message: str, qwen: Path, tmp_path: Path) -> None:
    config = json.loads((qwen / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(qwen / "model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KTConfig())


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    model = text("Qwen3ForCausalLM")().bfloat16()
    model.save_pretrained(tmp_path)
    quantised.write_fp8(tmp_path)
    with pytest.raises(ConfigError, match="has no routed experts"):
        load(model, tmp_path)


def test_a_recipe_trains(
    write_recipe: Callable[..., Path], tiny_moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Through LLaMA-Factory's own function; that its command reaches it is test_llamafactory_recipe's."""
    from llamafactory.train.tuner import run_exp

    model = Path(shutil.copytree(tiny_moe, tmp_path / "model"))
    quantised.write_fp8(model, scales=torch.bfloat16)
    caplog.set_level(logging.INFO, "kt_sft")

    run_exp(yaml.safe_load(write_recipe(model_name_or_path=str(model), kt_sft={}, save_steps=None).read_text()))

    assert "routed experts on the CPU: 16 experts in 2 layers, fp8" in caplog.text
    losses = train_losses(tmp_path / "out")
    assert losses[-1] < losses[0]

"""Four-bit integer checkpoints: compressed-tensors, GPTQ and AWQ, against their definitions in float64."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
from checkpoints import same_experts, stores
from families import LATENT, ROUTED, text
from ready import make_store
from safetensors.torch import load_file, save_file
from test_export_merged import merge
from test_sources_export import quantization, same_bytes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import kt_sft
from kt_sft.config import ConfigError, KTConfig
from kt_sft.loading.errors import CheckpointError

_SIZES = {"hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "deepseek_v3": text("DeepseekV3ForCausalLM", **LATENT, **ROUTED | {"first_k_dense_replace": 1}, **_SIZES),
    "qwen3_moe": text("Qwen3MoeForCausalLM", num_experts=8, **_SIZES),
}

#: Name -> model, writer, its arguments, and the group and dtype of the scales that the engine must have taken.
PUBLISHED: dict[str, tuple[str, Callable[..., quantised.Values], dict[str, Any], torch.dtype | None]] = {
    "Kimi-K2-Thinking": ("deepseek_v3", quantised.write_compressed_int4, {}, None),
    "llm-compressor, asymmetric": (
        "qwen3_moe",
        quantised.write_compressed_int4,
        {"symmetric": False, "scales": torch.float16, "sizes": torch.int64, "select": quantised.is_dense_linear},
        torch.float16,
    ),
    "llm-compressor, FP32 scales": (
        "qwen3_moe",
        quantised.write_compressed_int4,
        {"group": 64, "scales": torch.float32},
        torch.float32,
    ),
    "llm-compressor, whole rows": (
        "qwen3_moe",
        quantised.write_compressed_int4,
        {"group": None, "symmetric": False},
        None,
    ),
    "Qwen3-GPTQ": ("qwen3_moe", quantised.write_gptq, {}, torch.float16),
    "GPTQ with zero points": ("qwen3_moe", quantised.write_gptq, {"symmetric": False}, torch.float16),
    "GPTQ of the second form, whole rows": (
        "qwen3_moe",
        quantised.write_gptq,
        {"symmetric": False, "form": "gptq_v2", "group": None},
        torch.float16,
    ),
    "GPTQ with biases of zeros": ("qwen3_moe", quantised.write_gptq, {"biases": torch.float16}, torch.float16),
    "Qwen3-AWQ": ("qwen3_moe", quantised.write_awq, {}, torch.float16),
}


def publish(name: str, folder: Path) -> tuple[nn.Module, quantised.Values]:
    family, write, settings, _ = PUBLISHED[name]
    torch.manual_seed(0)
    model = MAKERS[family]().bfloat16()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0.05, 0.2)
        for key, value in model.named_parameters():
            if "_proj" in key:
                value[..., ::5, :32].abs_()  # groups whose zero is 0
    model.save_pretrained(folder)
    return model.float(), write(folder, **settings)


def load(folder: Path, **settings: Any) -> nn.Module:
    config = KTConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


def experts_of(values: quantised.Values, layer: str) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2I, H] and down [E, H, I] by definition, FP32."""

    def stack(name: str) -> Tensor:
        return torch.stack([values[f"{layer}.{expert}.{name}_proj.weight"] for expert in range(8)]).float()

    return torch.cat([stack("gate"), stack("up")], dim=1), stack("down")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, zeros and scales are FP32 values with at most 24 bits to their product: equal to the bit.

    Four bits times the 8 or 11 bits of BF16 and FP16 are exact; times FP32 both sides round once.
    """
    plain, values = publish(name, tmp_path)
    asked: list[int] = []
    monkeypatch.setattr("kt_sft.loading.quantizer.require_bytes", lambda need, *_: asked.append(need))

    ours = load(tmp_path)

    names = [name for name, module in ours.named_modules() if isinstance(module, kt_sft.CpuExperts)]
    for layer, store in zip(names, stores(ours), strict=True):
        assert (store.expert_format, store.relative_error, store.scale_dtype) == ("int4", 0, PUBLISHED[name][3])
        for stored, expected in zip(store.dequantized(), experts_of(values, layer), strict=True):
            assert torch.equal(stored, expected)
    taken = sum(tensor.nbytes for tensor in (*ours.parameters(), *stores(ours)))
    pages = mmap.PAGESIZE * len(stores(ours))
    assert taken - pages < asked[0] <= taken  # a store takes whole pages
    for key, parameter in ours.named_parameters():
        expected = values[key].float() if key in values else plain.get_parameter(key)
        assert torch.equal(parameter, expected), key
    assert "newly initialized" not in caplog.text
    assert "UNEXPECTED" not in caplog.text or name == "GPTQ with biases of zeros"  # attention's, which is transformers'


@pytest.mark.parametrize("name", ["Kimi-K2-Thinking", "Qwen3-AWQ"])
def test_another_format_is_quantised_from_the_values(name: str, tmp_path: Path) -> None:
    _, values = publish(name, tmp_path)
    config = KTConfig(expert_format="int8")

    ours = load(tmp_path, expert_format="int8")

    layer = next(name for name, module in ours.named_modules() if isinstance(module, kt_sft.CpuExperts))
    direct = kt_sft.CpuExperts.from_weights(*experts_of(values, layer), config=config)
    for loaded, expected in zip(stores(ours)[0].dequantized(), direct.dequantized(), strict=True):
        assert torch.equal(loaded, expected)


@pytest.mark.parametrize("name", ["Kimi-K2-Thinking", "Qwen3-AWQ"])
def test_products_of_integers_need_no_format_said(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path)
    ids = torch.arange(96).reshape(1, -1)

    results = [load(tmp_path, compute="int8", **settings)(ids).logits for settings in ({}, {"expert_format": "int4"})]

    assert torch.equal(*results)
    assert not torch.equal(results[0], load(tmp_path)(ids).logits)


def test_products_of_integers_of_other_checkpoints_are_refused(tiny_moe: Path) -> None:
    with pytest.raises(ConfigError, match=r"compute 'int8' needs experts in int8 or int4, .* bf16 for bf16 experts"):
        load(tiny_moe, compute="int8")
    with pytest.raises(ConfigError, match="compute 'int8' needs experts in int8 or int4"):
        kt_sft.CpuExperts.from_weights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4), config=KTConfig(compute="int8"))


@pytest.mark.parametrize("name", ["Kimi-K2-Thinking", "Qwen3-GPTQ", "Qwen3-AWQ"])
def test_saving_keeps_every_tensor(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path / "source")
    ours = load(tmp_path / "source")

    ours.save_pretrained(tmp_path / "target")

    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "target"))
    assert before.keys() == after.keys()
    integers = {key for key, value in before.items() if value.dtype == torch.int32}
    assert integers
    assert integers <= {*same_bytes(before, after)}
    assert quantization(tmp_path / "target") == quantization(tmp_path / "source")
    assert same_experts(load(tmp_path / "target"), ours)

    merge(ours)
    with pytest.raises(CheckpointError, match=r"is INT4 in groups of 32, in which a merged adapter would be rounded"):
        ours.save_pretrained(tmp_path / "again")


def test_biases_of_zeros_are_saved_and_not_needed_in_a_ready_store(tmp_path: Path) -> None:
    publish("GPTQ with biases of zeros", tmp_path / "source")
    ours = load(tmp_path / "source")

    ours.save_pretrained(tmp_path / "target")
    make_store(tmp_path / "source", tmp_path / "store", expert_format="auto")

    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "target"))
    assert {key for key in before if ".experts." in key} <= after.keys()
    assert same_experts(load(tmp_path / "target"), ours)
    assert same_experts(load(tmp_path / "store"), ours)


def test_changed_attention_of_gptq_is_refused(tmp_path: Path) -> None:
    _, values = publish("Qwen3-GPTQ", tmp_path / "source")
    ours = load(tmp_path / "source")
    key = next(key for key in values if "q_proj" in key)
    with torch.no_grad():
        ours.get_parameter(key).add_(1)
    with pytest.raises(CheckpointError, match=f"tensor {key} is INT4 .* keep the adapter beside the model"):
        ours.save_pretrained(tmp_path / "target")


EXPERT = "model.layers.1.mlp.experts.3.up_proj"


def _activation_order(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}.g_idx"] = tensors[f"{EXPERT}.g_idx"].flip(0)


def _set(key: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key][place] = value

    return change


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "packed, no scales": ("Kimi-K2-Thinking", lambda t: t.pop(f"{EXPERT}.weight_scale"), "weight_packed has no scales"),
    "packed, no codes": ("Kimi-K2-Thinking", lambda t: t.pop(f"{EXPERT}.weight_packed"), "has no codes beside it"),
    "packed, no shape": ("Kimi-K2-Thinking", lambda t: t.pop(f"{EXPERT}.weight_shape"), "has no shape"),
    "packed, another shape": (
        "Kimi-K2-Thinking",
        _set(f"{EXPERT}.weight_shape", (1,), 256),
        r"\[64, 16\], but packed codes of a matrix of 64 x 256 have \[64, 32\]",
    ),
    "packed, infinite scale": (
        "Kimi-K2-Thinking",
        _set(f"{EXPERT}.weight_scale", (5, 1), float("inf")),
        "up of expert 3 of .*the scale at row 5, column 1 is inf",
    ),
    "packed, activation order": (
        "Kimi-K2-Thinking",
        lambda t: t.update({f"{EXPERT}.weight_g_idx": torch.zeros(128, dtype=torch.int32)}),
        r"in the order of activations \(actorder\)",
    ),
    "packed, no zero points": (
        "llm-compressor, asymmetric",
        lambda t: t.pop(f"{EXPERT}.weight_zero_point"),
        "has no zero points",
    ),
    "gptq, activation order": ("Qwen3-GPTQ", _activation_order, r"in the order of activations \(desc_act\)"),
    "gptq, zero points": ("Qwen3-GPTQ", _set(f"{EXPERT}.qzeros", (0, 0), 0), "a checkpoint with sym: true has not"),
    "gptq, a bias": (
        "GPTQ with biases of zeros",
        _set(f"{EXPERT}.bias", (5,), 0.5),
        rf"tensor {EXPERT}.bias belongs to the routed experts but is no weight that Qwen3MoeExperts has",
    ),
    "gptq, no zeros": ("Qwen3-GPTQ", lambda t: t.pop(f"{EXPERT}.qzeros"), "qweight has no zero points"),
    "gptq, no codes": ("Qwen3-GPTQ", lambda t: t.pop(f"{EXPERT}.qweight"), "has no codes beside it"),
    "gptq, twice": (
        "Qwen3-GPTQ",
        lambda t: t.update({f"{EXPERT}.weight": torch.zeros(64, 128)}),
        "is there twice, plain and quantised",
    ),
    "gptq, scales of another group": (
        "Qwen3-GPTQ",
        lambda t: t.update({f"{EXPERT}.scales": t[f"{EXPERT}.scales"][:2]}),
        r"\[2, 64\], but scales of .*qweight have \[4, 64\]",
    ),
    "gptq, another shape": (
        "Qwen3-GPTQ",
        lambda t: [t.update({f"{EXPERT}.{k}": t[f"{EXPERT}.{k}"][:, :n]}) for k, n in _HALF.items()],
        r"a matrix of shape \[32, 128\], the model expects \[64, 128\]",
    ),
    "awq, floats": (
        "Qwen3-AWQ",
        lambda t: t.update({f"{EXPERT}.qweight": t[f"{EXPERT}.qweight"].float()}),
        "holds F32 values, but packed codes of AWQ are I32",
    ),
}
_HALF = {"qweight": 32, "scales": 32, "qzeros": 4}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("published")
            publish(name, folders[name])
        return folders[name]

    return get


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage(
    name: str, damage: Callable[..., Any], message: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copy(published(name) / "config.json", tmp_path)
    tensors = load_file(published(name) / "model.safetensors")
    damage(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Qwen3-GPTQ", {"bits": 8}, "with bits: 8"),
        ("Qwen3-GPTQ", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("Qwen3-GPTQ", {"group_size": "32"}, "group_size of '32'"),
        ("Qwen3-AWQ", {"version": "gemv"}, "version: 'gemv'"),
        ("Kimi-K2-Thinking", {"format": "marlin-24"}, "of the format 'marlin-24'"),
    ],
)
def test_variants_that_are_not_read(
    name: str, changes: dict[str, Any], message: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((published(name) / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(published(name) / "model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_groups_that_the_engine_has_not_run_in_another_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MAKERS["qwen3_moe"]().bfloat16().save_pretrained(tmp_path)
    values = quantised.write_gptq(tmp_path, group=16)
    with pytest.raises(CheckpointError, match=r"hold INT4 in groups of 16, .* set expert_format"):
        load(tmp_path)

    store = stores(load(tmp_path, expert_format="bf16"))[0]

    expected = experts_of(values, "model.layers.0.mlp.experts")[1].bfloat16().float()
    assert torch.equal(store.dequantized()[1], expected)

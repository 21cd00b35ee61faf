"""Files of adapters on routed experts: exchanged with plain PEFT, and refused where they do not fit."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import EXPERTS, adapted, assert_close, load, logits, tensors
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from kt_sft.integrations.peft import target_parameters
from kt_sft.loading.errors import CheckpointError
from kt_sft.lora import peft_turns_parameters


def test_files_are_exchanged_with_plain_peft_both_ways(tiny_moe: Path, tmp_path: Path) -> None:
    ours, plain = adapted(load(tiny_moe)), adapted(load(tiny_moe, False), seed=1)
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")

    there = PeftModel.from_pretrained(load(tiny_moe, False), tmp_path / "ours")
    here = PeftModel.from_pretrained(load(tiny_moe), tmp_path / "plain")

    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain")]
    assert {key: value.shape for key, value in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    assert all(torch.equal(a, b) for a, b in zip(tensors(there).values(), tensors(ours).values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(here).values(), tensors(plain).values(), strict=True))
    assert_close(ours, logits(there))
    assert_close(here, logits(plain))


@pytest.mark.parametrize("name", ["a", "fault"])
def test_a_name_may_be_part_of_other_names(tiny_moe: Path, tmp_path: Path, name: str) -> None:
    """PEFT takes tensors of "default" for missing ones of an adapter "fault"."""
    adapted(load(tiny_moe)).save_pretrained(tmp_path / "first")
    second = adapted(load(tiny_moe), seed=5)
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(load(tiny_moe), tmp_path / "first")
    model.load_adapter(tmp_path / "second", name)
    model.set_adapter(name)
    assert torch.equal(logits(model), logits(second))


@pytest.mark.parametrize(
    "settings", [{"r": 1}, {"r": 256}, {"r": 4, "rank_pattern": {"experts.down_proj": 6}}], ids=str
)
def test_ranks(tiny_moe: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    ours = adapted(load(tiny_moe), lora_alpha=1, **settings)
    ours.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(tiny_moe, False), tmp_path)
    assert_close(ours, logits(plain))
    again = PeftModel.from_pretrained(load(tiny_moe), tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert_close(again.merge_and_unload(), logits(plain))


def test_an_adapter_with_a_on_the_other_side_loads(tiny_moe: Path, tmp_path: Path) -> None:
    """As the version of PEFT that is not installed keeps it: sizes tell which it is."""
    ours = adapted(load(tiny_moe))
    ours.save_pretrained(tmp_path)
    turn_sides(tmp_path, experts=8)
    again = PeftModel.from_pretrained(load(tiny_moe), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tensors(again).values(), tensors(ours).values(), strict=True))


def test_targets_may_be_written_in_other_ways(tiny_moe: Path, tmp_path: Path) -> None:
    """PEFT writes out what a config asks for; a config by hand may say it shorter."""
    ours = adapted(load(tiny_moe), target_modules="all-linear")
    ours.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    shorter = {"target_modules": "all-linear", "target_parameters": ["gate_up_proj", "down_proj"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | shorter))
    again = PeftModel.from_pretrained(load(tiny_moe), tmp_path)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize(
    ("version", "turned"), [("0.18.1", False), (None, False), ("0.19.0.dev0@1234", True), ("0.19.1", True)]
)
def test_where_sizes_do_not_tell_the_version_does(tmp_path: Path, version: str | None, turned: bool) -> None:
    """With H = 2I gate_up is square for either side."""
    if peft_turns_parameters():
        pytest.skip("the installed PEFT is of the other kind: which files are turned is the other way round")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_experts": 8, "head_dim": 8}
    config = Qwen3MoeConfig(vocab_size=100, intermediate_size=8, num_attention_heads=4, **sizes)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    ours = adapted(load(tmp_path / "model"), target_parameters=EXPERTS[:1])
    ours.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": version}))
    if turned:
        turn_sides(tmp_path / "adapter", experts=8)

    again = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter")

    assert all(torch.equal(a, b) for a, b in zip(tensors(again).values(), tensors(ours).values(), strict=True))


def turn_sides(folder: Path, experts: int) -> None:
    path = folder / "adapter_model.safetensors"
    changed = load_file(path)
    for key in [key for key in changed if "experts" in key and "lora_A" in key]:
        a, b = changed[key], changed[key.replace("lora_A", "lora_B")]
        changed[key] = b.unflatten(1, (-1, experts)).permute(2, 1, 0).flatten(0, 1).contiguous()
        changed[key.replace("lora_A", "lora_B")] = (
            a.unflatten(0, (experts, -1)).permute(2, 1, 0).flatten(1, 2).contiguous()
        )
    save_file(changed, path, {"format": "pt"})


@pytest.mark.parametrize("limit", [0, 8000], ids=["nothing fits", "no weights fit"])
def test_a_full_disk_leaves_the_adapter_that_was_there(tiny_moe: Path, tmp_path: Path, limit: int) -> None:
    model = adapted(load(tiny_moe), lora_dropout=0.1)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for value in tensors(model).values():
        value.data.zero_()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises((CheckpointError, OSError)) as error:
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if limit:
        path = tmp_path / "adapter_model.safetensors"
        assert str(error.value).startswith(f"{path} cannot be written (")
        assert str(error.value).endswith("what was there before is as it was")
    model_card = "README.md"  # PEFT writes it first, in place
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != model_card} == {
        name: data for name, data in before.items() if name != model_card
    }


def test_a_config_that_cannot_be_written_leaves_the_one_that_was_there(tiny_moe: Path, tmp_path: Path) -> None:
    config = adapted(load(tiny_moe), lora_dropout=0.1).peft_config["default"]
    config.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {*before} == {"adapter_config.json", "kt_sft_adapter.json"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be written"):
            config.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class TestWhatDoesNotFit:
    """Nothing is dropped or taken for something else without a word."""

    @pytest.fixture
    def saved(self, tiny_moe: Path, tmp_path: Path) -> Path:
        adapted(load(tiny_moe)).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"r": 4}, "an adapter of rank 4 .* another rank, or was made for another model"),
            ({"target_parameters": EXPERTS[:1]}, "an adapter of rank 3 on gate_up_proj of 8 experts has"),
            ({"target_parameters": None}, "is a weight of routed experts"),
            ({"target_parameters": [*EXPERTS, "experts.gate_up_proj_bias"]}, "names experts.gate_up_proj_bias"),
            ({"target_modules": []}, r"has tensors that this model has no place for: .*q_proj"),
            ({"target_modules": ["q_proj", "v_proj"]}, r"lacks tensors that its config asks for: .*v_proj"),
            ({"use_dora": True}, "cannot have use_dora"),
            ({"peft_version": "new"}, "peft_version 'new' is no version"),
            ({"r": 257}, "ranks from 1 to 256, got 257"),
            ({"r": "3"}, "the config of adapter 'default' has no usable rank and alpha: r is '3'"),
            ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
            ({"alpha_pattern": {"experts.down_proj": "4"}}, "alpha_pattern gives experts.down_proj '4'"),
        ],
    )
    def test_a_config(self, saved: Path, tiny_moe: Path, change: dict[str, Any], message: str) -> None:
        path = saved / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    def test_experts_of_another_number(self, saved: Path, tiny_moe: Path) -> None:
        def change(values: dict[str, torch.Tensor]) -> None:
            for key in [key for key in values if "experts" in key]:
                values[key] = (values[key][:9] if "lora_A" in key else values[key][:, :9]).contiguous()

        self._rewrite(saved, change)
        with pytest.raises(ValueError, match=r"of 8 experts has .* made for another model"):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    def test_values_that_are_not_finite(self, saved: Path, tiny_moe: Path) -> None:
        def change(values: dict[str, torch.Tensor]) -> None:
            next(value for key, value in values.items() if "experts.lora_B" in key)[2, 3] = float("nan")

        self._rewrite(saved, change)
        with pytest.raises(
            ValueError, match=r"experts\.lora_A\.default\.weight or its B has values that are not finite"
        ):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn], ids=str)
    def test_values_of_another_kind(self, saved: Path, tiny_moe: Path, dtype: torch.dtype) -> None:
        def change(values: dict[str, torch.Tensor]) -> None:
            values.update({key: value.to(dtype) for key, value in values.items() if "experts" in key})

        self._rewrite(saved, change)
        with pytest.raises(ValueError, match=r"its B torch.*; adapters are kept in FP32, FP16 or BF16"):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    @pytest.mark.parametrize("length", [0, 4, 3000, -1], ids=["empty", "of a few bytes", "cut off", "longer"])
    def test_a_damaged_file_is_named(self, saved: Path, tiny_moe: Path, length: int) -> None:
        path = saved / "adapter_model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole + b"more" if length < 0 else whole[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    @pytest.mark.parametrize("damaged", [b'{"r": ', b"\xff{}"])
    def test_so_is_a_damaged_config(self, saved: Path, tiny_moe: Path, damaged: bytes) -> None:
        (saved / "adapter_config.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"the adapter's config {saved}/adapter_config.json is no JSON"):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    def test_what_is_no_adapter_is_said_so(self, saved: Path, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe))
        with pytest.raises(ValueError, match=r"nowhere has no adapter_config\.json: it is neither an adapter's folder"):
            model.load_adapter(saved / "nowhere", "other")
        (saved / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors, no adapter's weights"):
            model.load_adapter(saved, "other")

    def test_a_tensor_that_is_missing(self, saved: Path, tiny_moe: Path) -> None:
        self._rewrite(saved, lambda values: values.pop(next(key for key in values if "experts" in key)))
        with pytest.raises(ValueError, match=r"lacks tensors that its config asks for: .*experts"):
            PeftModel.from_pretrained(load(tiny_moe), saved)

    def test_another_adapter_than_the_one_that_is_trained(self, saved: Path, tiny_moe: Path) -> None:
        model = adapted(load(tiny_moe), lora_alpha=6)
        with pytest.raises(ValueError, match=r"is not the one that this run trains \(lora_alpha 5 there, 6 here"):
            model.load_adapter(saved, "default", is_trainable=True)

    def test_integer_products(self, tiny_moe: Path) -> None:
        model = load(tiny_moe, expert_format="int8", compute="int8")
        with pytest.raises(ValueError, match="compute 'int8' multiplies rounded tokens"):
            adapted(model)

    def test_a_model_without_experts(self) -> None:
        with pytest.raises(ValueError, match="lora_experts is set, but Linear has no routed experts"):
            target_parameters(nn.Linear(2, 2))

    def _rewrite(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        values = load_file(folder / "adapter_model.safetensors")
        change(values)
        save_file(values, folder / "adapter_model.safetensors", {"format": "pt"})

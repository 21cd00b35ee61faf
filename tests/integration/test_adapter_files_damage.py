"""Adapters with LoRA on routed experts that are damaged or cannot be converted, and the command that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from kt_sft.cli.app import app
from kt_sft.integrations.adapter_files import AdapterFileError, convert

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = "base_model.model.model.layers.1.mlp.experts"


def _edit(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def _set(**changes: Any) -> Callable[[Path], None]:
    def set_config(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))

    return set_config


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def _tamper(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data.replace(b"data_offsets", b"data_offsetz", 1))


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


FUSED_DAMAGE = {
    "no folder": (lambda folder: (folder / CONFIG).unlink(), "is no adapter directory: it has no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "is no adapter directory: it has no adapter_model"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read as JSON"),
    "another method": (_set(peft_type="IA3"), "describes no LoRA adapter"),
    "DoRA": (_set(use_dora=True), "DoRA on routed experts"),
    "no rank": (_set(r=None), "has no usable rank"),
    "a pattern's rank of zero": (_set(rank_pattern={"experts.down_proj": 0}), "rank_pattern gives experts.down_proj 0"),
    "patterns that are none": (_set(rank_pattern=0), "rank_pattern is 0, not an object of names and numbers"),
    "a pattern's rank in words": (_set(rank_pattern={"down_proj": "8"}), "rank_pattern gives down_proj '8'"),
    "a pattern's alpha in words": (_set(alpha_pattern={"down_proj": "8"}), "alpha_pattern gives down_proj '8'"),
    "a pattern that is none": (_set(rank_pattern={"(": 3}), r"rank_pattern names '\(', no regular expression"),
    "patterns in a list": (_set(alpha_pattern=[3]), r"alpha_pattern is \[3\], not an object"),
    "targets that are no list": (_set(target_parameters=7), "target_parameters is 7, not a list"),
    "a pickle": (_pickle, r"adapter_model\.bin is a pickle"),
    "cut off": (_truncate, r"tensor .* reaches to byte"),
    "tampered": (_tamper, "has an incomplete header entry"),
    "attention alone": (
        _edit(lambda t: [t.pop(key) for key in list(t) if ".experts." in key]),
        "has no weights for routed experts",
    ),
    "half a pair": (_edit(lambda t: t.pop(f"{EXPERTS}.lora_B.weight")), "has no counterpart lora_B"),
    "a parameter": (
        _edit(lambda t: [t.pop(f"{EXPERTS}.lora_{side}.weight") for side in "AB"]),
        r"has LoRA on 1 parameters, and target_parameters of adapter_config\.json names 2",
    ),
    "another rank": (_set(r=5), r"has rank 3, adapter_config\.json says 5"),
    "another rank of experts": (_set(rank_pattern={"experts.down_proj": 5}), "should be a multiple of the rank 5"),
    "rank of a multiple": (_set(rank_pattern={"experts.down_proj": 6}), "different counts of experts"),
    "sizes": (
        _edit(lambda t: t.update({f"{EXPERTS}.lora_B.weight": torch.zeros(25, 24)})),
        "is not that of a gate_up_proj and a down_proj",
    ),
    "unknown key": (_edit(lambda t: t.update({f"{EXPERTS}.0.lora_C.weight": torch.zeros(2)})), "to no layout of LoRA"),
    "two layouts": (
        _edit(lambda t: t.update({f"{EXPERTS}.0.up_proj.lora_A.weight": torch.zeros(3, 32)})),
        "are of two different layouts",
    ),
    "two scales": (_set(alpha_pattern={"experts.down_proj": 9}), "knows one scale"),
}

LISTED_DAMAGE = {
    "an expert": (
        _edit(lambda t: [t.pop(f"{EXPERTS}.3.up_proj.lora_{side}.weight") for side in "AB"]),
        r"lora_A and lora_B of up of expert 3 \(of 8\) is missing",
    ),
    "half a pair": (_edit(lambda t: t.pop(f"{EXPERTS}.3.up_proj.lora_B.weight")), "lora_B of up of expert 3"),
    "up": (_edit(lambda t: [t.pop(key) for key in list(t) if ".up_proj." in key]), "gate has LoRA and up has none"),
    "a rank": (_edit(lambda t: t.update({f"{EXPERTS}.3.up_proj.lora_A.weight": torch.zeros(4, 32)})), "do not fit"),
    "the config's rank": (_set(r=6, rank_pattern={"q_proj": 3, "o_proj": 3}), "equal to the rank 6"),
    "another size": (
        _edit(lambda t: t.update({f"{EXPERTS}.3.up_proj.lora_A.weight": torch.zeros(3, 31)})),
        "has another shape",
    ),
    "a name": (
        _edit(lambda t: t.update({f"{EXPERTS}.3.w9.lora_A.weight": torch.zeros(3, 31)})),
        "w9 is none of gate_proj",
    ),
}


class TestErrors:
    @pytest.mark.parametrize("damage", FUSED_DAMAGE)
    def test_in_the_layout_of_peft(self, damage: str, adapt: Any, tmp_path: Path) -> None:
        _, source = adapt()
        change, message = FUSED_DAMAGE[damage]
        change(source)
        with pytest.raises(AdapterFileError, match=message):
            convert(source, tmp_path / "target", "per-expert")
        assert {path.name for path in tmp_path.iterdir()} == {"base", "source"}

    @pytest.mark.parametrize("damage", LISTED_DAMAGE)
    def test_in_the_layout_per_expert(self, damage: str, adapt: Any, tmp_path: Path) -> None:
        convert(adapt()[1], tmp_path / "listed", "per-expert")
        change, message = LISTED_DAMAGE[damage]
        change(tmp_path / "listed")
        with pytest.raises(AdapterFileError, match=message):
            convert(tmp_path / "listed", tmp_path / "target", "peft")
        assert {path.name for path in tmp_path.iterdir()} == {"base", "source", "listed"}

    def test_an_adapter_of_another_base_model(self, adapt: Any, tmp_path: Path) -> None:
        _, source = adapt()
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"num_experts": 16}))
        with pytest.raises(AdapterFileError, match=r"has LoRA for 8 experts, .* has 16"):
            convert(source, tmp_path / "target", "per-expert", base=tmp_path / "base")
        _set(base_model_name_or_path=str(tmp_path / "base"))(source)
        with pytest.raises(AdapterFileError, match=r"has LoRA for 8 experts, .* has 16"):
            convert(source, tmp_path / "target", "per-expert")

    def test_targets_and_layouts(self, adapt: Any, tmp_path: Path) -> None:
        _, source = adapt()
        with pytest.raises(AdapterFileError, match="is there already; name a new folder"):
            convert(source, tmp_path / "base", "per-expert")
        with pytest.raises(AdapterFileError, match=r"is in the layout of PEFT .* already"):
            convert(source, tmp_path / "target", "peft")
        with pytest.raises(AdapterFileError, match="is no folder with the base model's config"):
            convert(source, tmp_path / "target", "per-expert", base=source)
        with pytest.raises(AdapterFileError, match="is not one as"):
            convert(source, tmp_path / "target", "peft", peft_version="new")
        (tmp_path / "file").write_text("")
        with pytest.raises(AdapterFileError, match="cannot be written"):
            convert(source, tmp_path / "file" / "target", "per-expert")
        convert(source, tmp_path / "target", "per-expert")
        with pytest.raises(AdapterFileError, match="is in the layout per-expert already"):
            convert(tmp_path / "target", tmp_path / "again", "per-expert")


class TestCommand:
    def test_converts(self, adapt: Any, tmp_path: Path) -> None:
        _, source = adapt()
        result = CliRunner().invoke(app, ["convert-adapter", str(source), str(tmp_path / "out"), "--to", "per-expert"])
        assert result.exit_code == 0, result.output
        assert "LoRA on 2 layers of 8 experts in layout per-expert" in result.stdout.replace("\n", " ")
        assert (tmp_path / "out" / WEIGHTS).is_file()

    def test_says_what_is_wrong(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["convert-adapter", str(tmp_path), str(tmp_path / "out"), "--to", "peft"])
        assert result.exit_code == 2
        assert "is no adapter directory" in result.stderr

"""What a plan reads: recipes, with LLaMA-Factory's own defaults, and the files of other machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llamafactory.hparams import get_train_args

from kt_sft.config import ConfigError
from kt_sft.planning.machine import Machine, read_machine, resident_bytes, this_machine
from kt_sft.planning.setup import DEFAULTS, RecipeError, read_recipe, setup_of
from tests.recipes import RECIPES

LEAST: dict[str, Any] = {"model_name_or_path": "a/model", "kt_sft": {}}

DOCTOR: dict[str, Any] = {
    "engine": {"error": None, "tier": "avx512", "limit": None, "threads": 8},
    "tiers": [
        {"name": "avx2", "chosen": False, "peak_gflops": 100.0},
        {"name": "avx512", "chosen": True, "peak_gflops": 300.0},
    ],
    "cpu": {"model": "a CPU"},
    "memory": {"total_bytes": 64 << 30, "available_bytes": 60 << 30, "read_gbs": 40.0},
    "accelerators": [{"kind": "cuda", "name": "a GPU", "memory_bytes": 24 << 30, "free_bytes": 23 << 30}],
}


def test_what_a_recipe_leaves_out_is_what_llamafactory_takes(tmp_path: Path) -> None:
    least = {"do_train": True, "dataset": "d", "template": "qwen", "output_dir": str(tmp_path), "use_cpu": True}
    parsed = get_train_args(LEAST | least)
    found = {key: value for arguments in parsed for key, value in vars(arguments).items()}
    known = {key: getattr(found[key], "value", found[key]) for key in DEFAULTS if key != "use_cpu"}
    known["lora_target"] = ",".join(found["lora_target"])
    assert known == {key: value for key, value in DEFAULTS.items() if key != "use_cpu"}


def test_parsed_arguments_and_the_file_give_the_same_setup(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES / "quickstart.yaml", {"output_dir": str(tmp_path)})
    parsed = get_train_args(recipe)
    found = {key: value for arguments in parsed for key, value in vars(arguments).items()}
    assert setup_of(found) == setup_of(recipe)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*_sft.yaml")), ids=lambda path: path.stem)
def test_every_training_recipe_is_understood(path: Path) -> None:
    setup = setup_of(read_recipe(path))
    assert setup.unmodelled == ()
    assert setup.tokens == 2048
    assert setup.autocast == "bfloat16"


def test_settings_on_the_command_line_win(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(LEAST | {"cutoff_len": 64}))
    setup = setup_of(read_recipe(file, {"cutoff_len": 128, "kt_sft.expert_format": "int4"}))
    assert (setup.cutoff, setup.settings.expert_format) == (128, "int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutoff_len": "long"}, "cutoff_len must be a whole number of at least 1, got 'long'"),
        ({"finetuning_type": "full"}, "finetuning_type full cannot be planned"),
    ],
)
def test_impossible_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        setup_of(LEAST | changes)


def test_a_bad_block_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'format'"):
        setup_of(LEAST | {"kt_sft": {"format": "int4"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- a\n", "holds no keys"),
        ("model_name_or_path: x\n", "has no kt_sft block"),
        ("kt_sft: {}\n", "names no model_name_or_path"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(file)


def test_what_is_not_modelled_is_named() -> None:
    setup = setup_of(LEAST | {"stage": "dpo", "use_galore": True, "ref_model": "another"})
    assert setup.batch == 16
    assert [what.partition(" ")[0] for what in setup.unmodelled] == ["a", "GaLore's", "the"]


class TestMachines:
    def test_a_doctors_file(self, tmp_path: Path) -> None:
        file = tmp_path / "machine.json"
        file.write_text(json.dumps(DOCTOR))
        assert read_machine(file) == Machine(
            name="a CPU",
            host_bytes=60 << 30,
            device="a GPU",
            device_bytes=23 << 30,
            threads=8,
            tier="avx512",
            peak_flops=3e11,
            read_bytes=4e10,
        )

    @pytest.mark.parametrize(
        "change",
        [lambda facts: facts.pop("memory"), lambda facts: facts.update(tiers=5), lambda facts: facts["cpu"].clear()],
    )
    def test_another_file(self, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        facts = json.loads(json.dumps(DOCTOR))
        change(facts)
        file = tmp_path / "machine.json"
        file.write_text(json.dumps(facts))
        with pytest.raises(RecipeError, match="is not what `kt-sft doctor --json` prints"):
            read_machine(file)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="cannot be read: No such file"):
            read_machine(tmp_path / "machine.json")

    def test_this_one(self) -> None:
        machine = this_machine(1)
        assert machine.is_here
        assert machine.threads == 1
        assert machine.peak_flops is not None
        assert machine.peak_flops > 0
        assert machine.element_bytes == (2 if machine.tier in ("avx512_bf16", "amx") else 4)
        resident = resident_bytes()
        assert resident is not None
        assert resident > 1 << 20

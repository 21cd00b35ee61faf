"""LLaMA-Factory's stages with interleaved micro-batches: the losses and adapters of those one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import LORA_EXPERTS, run_command, train_losses
from safetensors.torch import load_file

#: The first step is watched, the second interleaved. Gradient checkpointing is on, and reentrant, as LLaMA-Factory has
#: it by default.
BASE = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no"}
STAGES: dict[str, dict[str, Any]] = {
    "experts": LORA_EXPERTS | {"lora_dropout": 0.0},
    "routers' loss": {"moe_aux_loss_coef": 0.1, "use_reentrant_gc": False},
    "noise": {"neftune_noise_alpha": 5},  # sft; drawn in the order of the batches: before the first layer
    "pt": {"stage": "pt", "dataset": "pt"},
    "dpo": {"stage": "dpo", "dataset": "pair", "pref_beta": 0.1},
    "kto": {"stage": "kto", "dataset": "kto", "pref_beta": 0.1},
    "rm": {"stage": "rm", "dataset": "pair"},  # its value head has dropout: after the last layer
}
#: Where they are not interleaved.
OFF: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"lora_dropout": 0.1}, "draws dropout masks"),
    "routers' loss, reentrant": ({"moe_aux_loss_coef": 0.1}, "set use_reentrant_gc: false"),
}
SCRIPT = """
import json, sys
from llamafactory.train.tuner import run_exp
for recipe in json.loads(sys.argv[1]):
    print("RUN", recipe["output_dir"], file=sys.stderr, flush=True)
    run_exp(recipe)
"""


@pytest.fixture(scope="module")
def runs(base_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folders of all runs, and what each said; one process for all, to save its start."""
    folder, recipes = tmp_path_factory.mktemp("stages"), []
    for name, changes in (STAGES | {name: changes for name, (changes, _) in OFF.items()}).items():
        for way in (False, True):
            recipe = base_recipe | BASE | changes | {"output_dir": str(folder / f"{name}, {way}")}
            recipes.append(recipe | {"kt_sft": recipe.get("kt_sft", {}) | {"interleave_micro_batches": way}})
    result = run_command(["python", "-c", SCRIPT, json.dumps(recipes)])
    assert result.returncode == 0, result.stdout
    parts = result.stdout.split("RUN ")[1:]
    return folder, {Path(part.splitlines()[0]).name: part for part in parts}


@pytest.mark.parametrize("name", [*STAGES, *OFF])
def test_losses_and_adapters_are_the_same(name: str, runs: tuple[Path, dict[str, str]]) -> None:
    folder, said = runs
    one, other = (folder / f"{name}, {way}" for way in (False, True))
    assert train_losses(one) == train_losses(other)
    assert len(train_losses(one)) == 2
    expected, found = (load_file(out / "adapter_model.safetensors") for out in (one, other))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert "micro-batches" not in said[one.name]
    if name in OFF:
        assert said[other.name].count("micro-batches run one after the other: ") == 1
        assert OFF[name][1] in said[other.name]
    else:
        assert said[other.name].count("two micro-batches at a time: ") == 1
        assert "one after the other" not in said[other.name]

"""Training runs of the quickstart's recipe, with the `kt_sft` key (the engine) and without it (stock LLaMA-Factory)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from kt_sft.cli.training_runs import WITHOUT_PLUGIN, TrainingRun, train
from quickstart_steps.processes import REPOSITORY, StepError

__all__ = ["WITHOUT_PLUGIN", "TrainingRun", "load_recipe", "train_stock", "train_with_engine"]

RECIPE = REPOSITORY / "recipes" / "quickstart.yaml"
PLUGIN_KEY = "kt_sft"


def load_recipe(path: Path = RECIPE) -> dict[str, Any]:
    """The recipe as a mapping; StepError when it has no `kt_sft` block."""
    recipe = yaml.safe_load(path.read_text())
    if PLUGIN_KEY not in recipe:
        raise StepError(f"{path} has no `{PLUGIN_KEY}:` block")
    return recipe


def without_plugin(recipe: dict[str, Any]) -> dict[str, Any]:
    """The same recipe for stock LLaMA-Factory."""
    stock = copy.deepcopy(recipe)
    del stock[PLUGIN_KEY]
    return stock


def changed_settings(recipe: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The settings that differ from the recipe's, as `key=value` arguments of llamafactory-cli."""
    changed = {key: value for key, value in settings.items() if recipe.get(key) != value}
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in changed.items()]


def train_with_engine(settings: dict[str, Any], log: Path, environment: dict[str, str] | None = None) -> TrainingRun:
    """Trains with the recipe as it is shipped, but for `settings`, which must hold `output_dir`."""
    return _train(f"training with kt_sft ({log.name})", RECIPE, load_recipe(), settings, log, environment or {})


def train_stock(settings: dict[str, Any], log: Path, environment: dict[str, str] | None = None) -> TrainingRun:
    """Trains with the recipe less its kt_sft key, kt_sft itself not loaded."""
    recipe = without_plugin(load_recipe())
    path = log.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return _train(
        f"training with stock LLaMA-Factory ({log.name})",
        path,
        recipe,
        settings,
        log,
        {**(environment or {}), **WITHOUT_PLUGIN},
    )


def _train(
    name: str,
    path: Path,
    recipe: dict[str, Any],
    settings: dict[str, Any],
    log: Path,
    environment: dict[str, str],
) -> TrainingRun:
    return train(
        name,
        path,
        changed_settings(recipe, settings),
        REPOSITORY / settings["output_dir"],
        log,
        environment=environment,
        folder=REPOSITORY,
    )

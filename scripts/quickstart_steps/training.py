"""Training runs of the quickstart's recipe, with the `kt_sft` key (the engine) and without it (stock LLaMA-Factory)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from quickstart_steps.processes import REPOSITORY, StepError, llamafactory_cli, run

RECIPE = REPOSITORY / "recipes" / "quickstart.yaml"
PLUGIN_KEY = "kt_sft"
#: Keeps torch from loading plugins, ours among them: what stock runs is what it would run without kt_sft installed.
WITHOUT_PLUGIN = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """The outcome of one `llamafactory-cli train`."""

    output_dir: Path
    losses: list[float]  # one a step
    tokens_per_second: float  # without padding
    step_seconds: float  # the median step
    peak_rss_mb: float
    seconds: float  # the whole process


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
    output_dir = REPOSITORY / settings["output_dir"]
    # What an earlier run left must not be taken for this one's.
    state_file = output_dir / "trainer_state.json"
    state_file.unlink(missing_ok=True)
    command = [llamafactory_cli(), "train", str(path), *changed_settings(recipe, settings)]
    usage = run(name, command, log, environment)
    if not state_file.is_file():
        raise StepError(f"{name} wrote no {state_file}; its output: {log}")
    steps = [entry for entry in json.loads(state_file.read_text())["log_history"] if "loss" in entry]
    if len(steps) < 2:
        raise StepError(f"{name} logged fewer than two steps in {state_file}")
    return TrainingRun(
        output_dir=output_dir,
        losses=[entry["loss"] for entry in steps],
        tokens_per_second=steps[-1]["num_input_tokens_seen"] / steps[-1]["train_runtime"],
        step_seconds=statistics.median(
            later["train_runtime"] - earlier["train_runtime"] for earlier, later in itertools.pairwise(steps)
        ),
        peak_rss_mb=usage.peak_rss_mb,
        seconds=usage.seconds,
    )

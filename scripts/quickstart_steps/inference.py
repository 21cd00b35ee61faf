"""What chat, api and export get of a training recipe, and `llamafactory-cli export`. Free of torch (processes.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from quickstart_steps.processes import llamafactory_cli, run
from quickstart_steps.training import PLUGIN_KEY


def inference_arguments(recipe: dict[str, Any], model: Path, adapter: Path | None = None) -> dict[str, Any]:
    """A recipe for chat, api and export: the model, an adapter, and the training's template and kt_sft block."""
    arguments = {
        "model_name_or_path": str(model),
        "template": recipe["template"],
        "flash_attn": recipe["flash_attn"],
        PLUGIN_KEY: recipe[PLUGIN_KEY],
    }
    return arguments if adapter is None else arguments | {"adapter_name_or_path": str(adapter)}


def export_merged(arguments: dict[str, Any], target: Path, logs: Path) -> None:
    """Merges the adapter of `arguments` into its model with `llamafactory-cli export`."""
    path = logs / "export.yaml"
    path.write_text(yaml.safe_dump(arguments | {"export_dir": str(target), "export_device": "cpu"}, sort_keys=False))
    run("export", [llamafactory_cli(), "export", str(path)], logs / "export.log")

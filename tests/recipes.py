"""The recipes that come with kt_sft, as tests read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

RECIPES = Path(__file__).parents[1] / "recipes"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class by which LLaMA-Factory loads a model of this kind."""
    image_text = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if image_text else AutoModelForCausalLM

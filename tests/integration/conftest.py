"""Recipes for runs of LLaMA-Factory on the tiny model, and copies of the model to damage."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import Change, rewrite
from commands import LORA_EXPERTS, run_command


@pytest.fixture(scope="session")
def base_recipe(tiny_moe: Path, tiny_data: Path) -> dict[str, Any]:
    """An ordinary SFT recipe on the tiny model, without kt_sft."""
    return {
        "model_name_or_path": str(tiny_moe),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "q_proj,v_proj",
        "lora_rank": 4,
        "dataset": "sft",
        "dataset_dir": str(tiny_data),
        "template": "qwen",
        "cutoff_len": 48,
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 1.0e-2,
        "lr_scheduler_type": "constant",
        "dataloader_num_workers": 0,
        "preprocessing_num_workers": 1,
        "report_to": "none",
        "bf16": True,
        "use_cpu": True,
        "seed": 7,
    }


@pytest.fixture(scope="session")
def lora_experts_run(base_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of four steps with adapters on attention and experts.

    It has checkpoints after the second and the fourth; to be read only.
    """
    folder = tmp_path_factory.mktemp("lora_experts")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(base_recipe | LORA_EXPERTS | {"output_dir": str(folder / "out")}))
    result = run_command(["llamafactory-cli", "train", str(recipe)])
    assert result.returncode == 0, result.stdout
    return folder / "out"


@pytest.fixture
def write_recipe(base_recipe: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe: the base one with changes; None removes a key. The run's folder is `tmp_path / "out"`."""

    def write(**changes: Any) -> Path:
        recipe = base_recipe | {"output_dir": str(tmp_path / "out")} | changes
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
        return path

    return write


@pytest.fixture
def parse(base_recipe: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """LLaMA-Factory's own parsing of the base recipe with changes."""
    from llamafactory.hparams import get_train_args

    return lambda **changes: get_train_args(base_recipe | {"output_dir": str(tmp_path / "out")} | changes)


@pytest.fixture
def checkpoint(tiny_moe: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to change."""
    return Path(shutil.copytree(tiny_moe, tmp_path / "checkpoint"))


@pytest.fixture
def edit(checkpoint: Path) -> Callable[[Change], None]:
    """Rewrites the tensors of `checkpoint`."""
    return functools.partial(rewrite, checkpoint)


@pytest.fixture
def adapt(tmp_path: Path) -> Callable[..., Any]:
    """Makes a random adapter with LoRA on attention and on routed experts of a tiny plain model.

    `adapt(family, parameters, **LoraConfig's)` returns the PEFT model and the folder it was saved to; the base model's
    config.json lies in `tmp_path / "base"`.
    """
    import peft
    import torch
    from families import FAMILIES, make

    def adapt(family: str = "qwen3_moe", parameters: tuple[str, ...] = (), **settings: Any) -> Any:
        model = make(FAMILIES[family][0])
        model.config.save_pretrained(tmp_path / "base")
        first = "up_proj" if family == "nemotron_h" else "gate_up_proj"
        arguments = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False}
        arguments["target_parameters"] = list(parameters) or [f"experts.{first}", "experts.down_proj"]
        torch.manual_seed(5)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**arguments | settings))
        adapted.save_pretrained(tmp_path / "source")
        return adapted, tmp_path / "source"

    return adapt

"""What of a recipe is read elsewhere: adapters that are trained on, and the hub's cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainers import train_model

from kt_sft.config import ConfigError
from kt_sft.integrations.memory_check import setup_with_adapter
from kt_sft.planning.memory import lora_parameters
from kt_sft.planning.model import read_model
from kt_sft.planning.setup import RecipeError, TrainingSetup, setup_of

MADE: dict[str, Any] = {
    "kt_sft": {"lora_experts": True},
    "lora_rank": 6,
    "lora_target": "k_proj,o_proj",
    "lora_dropout": 0.1,
}


def test_an_adapter_that_is_trained_on_counts_as_it_is(
    base_recipe: dict[str, Any], parse: Callable[..., Any], tmp_path: Path
) -> None:
    """And not with the recipe's rank and targets, which are for new ones."""
    train_model(parse, **MADE).save_pretrained(tmp_path / "adapter")
    given = {"adapter_name_or_path": str(tmp_path / "adapter"), "kt_sft": {}}

    def counted(**changes: Any) -> tuple[TrainingSetup, int]:
        setup = setup_with_adapter(base_recipe | given | changes)
        return setup, sum(lora_parameters(read_model(setup), setup))

    def trained(**changes: Any) -> int:
        model = train_model(parse, **(given | changes))
        return sum(value.numel() for value in model.parameters() if value.requires_grad)

    setup, count = counted()
    assert (setup.rank, {*setup.targets}, setup.dropout) == (6, {"k_proj", "o_proj"}, 0.1)
    assert setup.settings.lora_experts
    assert setup.unmodelled == ()
    assert parse(**given)[0]._kt_sft_setup == setup
    assert count == trained()

    new = {"create_new_adapter": True}
    setup, count = counted(**new)
    assert (setup.rank, setup.settings.lora_experts) == (4, False)
    assert setup.unmodelled == ("merging of adapters before training",)
    assert count == trained(**new)


def test_llamafactory_has_arguments_of_these_names(parse: Callable[..., Any]) -> None:
    """Those that a recipe leaves out, and so would be missed nowhere."""
    model_args, _, _, finetuning_args, _ = parse()
    names = {"adapter_name_or_path", "adapter_folder", "model_revision", "cache_dir", "hf_hub_token"}
    assert names <= vars(model_args).keys()
    assert "create_new_adapter" in vars(finetuning_args)


class TestAdapterConfigs:
    """Of adapters that PEFT or other tools have written."""

    def setup_of(self, base_recipe: dict[str, Any], folder: Path, **config: Any) -> TrainingSetup:
        folder.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 16, "target_modules": ["q_proj"]} | config
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return setup_with_adapter(base_recipe | {"kt_sft": {}, "adapter_name_or_path": f"first,{folder}"})

    def test_the_last_one_is_trained_on(self, base_recipe: dict[str, Any], tmp_path: Path) -> None:
        setup = self.setup_of(base_recipe, tmp_path / "last")
        assert (setup.rank, setup.targets, setup.dropout, setup.settings.lora_experts) == (16, ("q_proj",), 0, False)
        assert setup.unmodelled == ("merging of adapters before training",)

    def test_whole_names_are_targets(self, base_recipe: dict[str, Any], tmp_path: Path) -> None:
        name = "model.layers.1.self_attn.q_proj"
        setup = self.setup_of(base_recipe, tmp_path, target_modules=[name])
        assert lora_parameters(read_model(setup), setup) == (16 * (32 + 32), 0)

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"target_modules": ".*proj"}, "the pattern by which the trained adapter names its modules"),
            ({"rank_pattern": {"q_proj": 2}}, "ranks of single modules of the trained adapter (all have rank 16 here)"),
            ({"modules_to_save": ["lm_head"]}, "modules that the adapter trains whole"),
        ],
    )
    def test_what_is_not_worked_out_is_said(
        self, base_recipe: dict[str, Any], tmp_path: Path, config: dict[str, Any], said: str
    ) -> None:
        assert said in self.setup_of(base_recipe, tmp_path, **config).unmodelled[-1]

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"peft_type": "OFT"},
                "the adapter that training goes on with is of the kind OFT: kt_sft trains LoRA only",
            ),
            ({"r": "many"}, "r in the config of the adapter that training goes on with must be a whole number"),
        ],
    )
    def test_impossible_ones(
        self, base_recipe: dict[str, Any], tmp_path: Path, config: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RecipeError, match=message):
            self.setup_of(base_recipe, tmp_path, **config)

    def test_one_that_is_not_there(self, base_recipe: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"adapter_name_or_path: .* has no adapter_config\.json.*download it"):
            setup_with_adapter(base_recipe | {"kt_sft": {}, "adapter_name_or_path": str(tmp_path / "no/adapter")})


class TestHub:
    """A repository in a cache of the recipe's own, whose branch `wide` has another model than `main`."""

    @pytest.fixture
    def cached(self, tiny_moe: Path, tmp_path: Path) -> dict[str, Any]:
        repository = tmp_path / "cache" / "models--an-owner--a-model"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "wide").write_text("a" * 40)
        shutil.copytree(tiny_moe, repository / "snapshots" / ("a" * 40))
        return {
            "model_name_or_path": "an-owner/a-model",
            "model_revision": "wide",
            "cache_dir": str(tmp_path / "cache"),
            "kt_sft": {},
        }

    def test_revision_and_cache_are_the_recipes(
        self, base_recipe: dict[str, Any], cached: dict[str, Any], parse: Callable[..., Any]
    ) -> None:
        setup = setup_of(base_recipe | cached)
        assert parse(**cached)[0]._kt_sft_setup == setup
        assert read_model(setup).experts_bytes == 2 * 8 * 3 * 32 * 24 * 2

    @pytest.mark.parametrize("key", ["model_revision", "cache_dir"])
    def test_elsewhere_there_is_nothing(self, base_recipe: dict[str, Any], cached: dict[str, Any], key: str) -> None:
        left = {"model_revision": f"--cache-dir {cached['cache_dir']}", "cache_dir": "--revision wide"}[key]
        with pytest.raises(ConfigError, match=rf"an-owner/a-model is neither a folder nor in .*{left}`"):
            read_model(setup_of(base_recipe | cached | {key: None}))

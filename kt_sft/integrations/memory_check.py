"""How the check of memory learns what a recipe of LLaMA-Factory's is going to train.

Where a model is loaded, LLaMA-Factory has only its `ModelArguments` at hand; the rest of a recipe is known before,
where it is parsed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kt_sft.config import KTConfig
from kt_sft.integrations.adapters import continued_adapter, loading_settings
from kt_sft.integrations.peft_configs import stored_config, trained_dropout

if TYPE_CHECKING:
    from kt_sft.planning.setup import TrainingSetup

logger = logging.getLogger("kt_sft")

_SETUP = "_kt_sft_setup"


def remember_setup(settings: KTConfig, model_args: Any, *others: Any) -> None:
    """Notes on the arguments of a model how it will be trained.

    Args:
        settings: Of the recipe's block.
        model_args: Of the model.
        others: What LLaMA-Factory has parsed besides.
    """
    from kt_sft.planning.setup import RecipeError

    if not settings.check_memory or not any(getattr(arguments, "do_train", False) for arguments in others):
        return
    recipe = {key: value for arguments in (*others, model_args) for key, value in vars(arguments).items()}
    try:
        setattr(model_args, _SETUP, setup_with_adapter(recipe))
    except RecipeError as error:  # which LLaMA-Factory takes all the same
        logger.warning("memory is not checked before loading: %s", error)


def setup_with_adapter(recipe: Mapping[str, Any]) -> TrainingSetup:
    """The setup that a recipe, or the parsed arguments as one mapping, describes.

    Where training goes on with an adapter, that has its rank and targets: its config is read, from its folder or the
    hub's cache.

    Raises:
        RecipeError: As `setup_of`; or there is no such adapter.
        ConfigError: As `setup_of`.
    """
    from kt_sft.planning.setup import RecipeError, setup_of

    name = continued_adapter(recipe)
    if name is None:
        return setup_of(recipe)
    settings = loading_settings(recipe) | {"local_files_only": True}
    try:
        stored = stored_config(name, settings)
        dropout = stored.get("lora_dropout") or trained_dropout(name, settings)
    except (ValueError, OSError) as error:
        raise RecipeError(
            f"adapter_name_or_path: {str(error).removeprefix('kt_sft: ')}. The run goes on with {name}, so its config "
            "must be in a folder or in the hub's cache; download it, or set create_new_adapter: true"
        ) from error
    return setup_of(recipe, stored | {"lora_dropout": dropout})


def check_before_loading(model_args: Any, settings: KTConfig) -> None:
    """Lets the quantizer check, once it knows the model and before it loads anything, whether training has room."""
    setup = getattr(model_args, _SETUP, None)
    if setup is None:
        return
    from kt_sft.planning.check import TrainingCheck

    settings.training_check = TrainingCheck(setup)  # type: ignore[attr-defined]

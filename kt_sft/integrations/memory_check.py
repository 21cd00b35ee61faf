"""How the check of memory learns what a recipe of LLaMA-Factory's is going to train.

Where a model is loaded, LLaMA-Factory has only its `ModelArguments` at hand; the rest of a recipe is known before,
where it is parsed.
"""

from __future__ import annotations

import logging
from typing import Any

from kt_sft.config import KTConfig

logger = logging.getLogger("kt_sft")

_SETUP = "_kt_sft_setup"


def remember_setup(settings: KTConfig, model_args: Any, *others: Any) -> None:
    """Notes on the arguments of a model how it will be trained.

    Args:
        settings: Of the recipe's block.
        model_args: Of the model.
        others: What LLaMA-Factory has parsed besides.
    """
    from kt_sft.planning.setup import RecipeError, setup_of

    if not settings.check_memory or not any(getattr(arguments, "do_train", False) for arguments in others):
        return
    recipe = {key: value for arguments in (*others, model_args) for key, value in vars(arguments).items()}
    try:
        setattr(model_args, _SETUP, setup_of(recipe))
    except RecipeError as error:  # which LLaMA-Factory takes all the same
        logger.warning("memory is not checked before loading: %s", error)


def check_before_loading(model_args: Any, settings: KTConfig) -> None:
    """Lets the quantizer check, once it knows the model and before it loads anything, whether training has room."""
    setup = getattr(model_args, _SETUP, None)
    if setup is None:
        return
    from kt_sft.planning.check import TrainingCheck

    settings.training_check = TrainingCheck(setup)  # type: ignore[attr-defined]

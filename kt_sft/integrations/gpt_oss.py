"""gpt-oss under LLaMA-Factory: attention that any device computes.

For gpt-oss LLaMA-Factory 0.9.5 ignores `flash_attn` and always asks for a FlashAttention-3 kernel from the hub, through
a function that transformers 5 renamed, so no gpt-oss model loads at all. In recipes with a `kt_sft:` block this seam
honours `flash_attn: disabled`, and takes the same way where `auto` cannot be had.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from kt_sft.integrations.llamafactory import config_of

logger = logging.getLogger("kt_sft")


def extend_attention(module: ModuleType) -> None:
    """Wraps `configure_attn_implementation`, which settles a model's kind of attention before it is built.

    Args:
        module: `llamafactory.model.model_utils.attention`.
    """
    configure: Callable[..., None] = module.configure_attn_implementation

    @functools.wraps(configure)
    def configure_attn_implementation(config: Any, model_args: Any) -> None:
        if getattr(config, "model_type", None) != "gpt_oss" or config_of(model_args) is None:
            configure(config, model_args)
            return
        if model_args.flash_attn == "disabled":
            config._attn_implementation = "eager"
            return
        try:
            configure(config, model_args)
        except ImportError as error:
            if model_args.flash_attn != "auto":
                raise
            logger.warning("gpt-oss: eager attention, as LLaMA-Factory's FlashAttention-3 kernel is missing: %s", error)
            config._attn_implementation = "eager"

    module.configure_attn_implementation = configure_attn_implementation  # type: ignore[attr-defined]

"""In a recipe with a `kt_sft:` block gpt-oss gets attention that any device computes; nothing else is changed.

tests/integration/test_recipes_train.py trains such a model.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from llamafactory.model import patcher
from llamafactory.model.model_utils import attention
from transformers import GptOssConfig, Qwen3MoeConfig

from kt_sft.integrations.llamafactory import ABSENT


def arguments(flash_attn: str, block: Any) -> SimpleNamespace:
    return SimpleNamespace(flash_attn=flash_attn, kt_sft=block)


def test_the_loader_uses_the_seam() -> None:
    assert patcher.configure_attn_implementation is attention.configure_attn_implementation
    assert attention.configure_attn_implementation.__wrapped__.__module__ == "llamafactory.model.model_utils.attention"


@pytest.mark.parametrize("flash_attn", ["disabled", "auto"])
def test_gpt_oss_with_the_block_gets_eager_attention(flash_attn: str) -> None:
    config = GptOssConfig()
    attention.configure_attn_implementation(config, arguments(flash_attn, {}))
    assert config._attn_implementation == "eager"


def test_what_was_asked_for_explicitly_is_not_replaced() -> None:
    with pytest.raises(ImportError):
        attention.configure_attn_implementation(GptOssConfig(), arguments("fa3", {}))


def test_without_the_block_nothing_changes() -> None:
    # Fails once LLaMA-Factory and transformers agree again: then this seam can go.
    with pytest.raises(ImportError, match="load_and_register_kernel"):
        attention.configure_attn_implementation(GptOssConfig(), arguments("disabled", ABSENT))


def test_other_models_are_left_to_llamafactory() -> None:
    config = Qwen3MoeConfig()
    attention.configure_attn_implementation(config, arguments("sdpa", {}))
    assert config._attn_implementation == "sdpa"

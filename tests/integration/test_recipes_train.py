"""Every training recipe works as it stands, but for its model: a tiny random one of the same architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llamafactory.train.tuner import run_exp
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessor,
    Qwen3_5MoeConfig,
    Qwen3MoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.recipes import RECIPES, auto_class, read

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that the adapters have something to change
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
GROUPED_ATTENTION = {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}


def deepseek_v2(vocab_size: int) -> PreTrainedConfig:
    return DeepseekV2Config(vocab_size=vocab_size, q_lora_rank=None, **COMMON, **LATENT_ATTENTION)


def deepseek_v3(vocab_size: int) -> PreTrainedConfig:
    groups = {"n_group": 2, "topk_group": 1}
    return DeepseekV3Config(vocab_size=vocab_size, q_lora_rank=16, **groups, **COMMON, **LATENT_ATTENTION)


def qwen3(vocab_size: int) -> PreTrainedConfig:
    sizes = {"num_experts": 8, "intermediate_size": 48, "moe_intermediate_size": 24}
    return Qwen3MoeConfig(vocab_size=vocab_size, **sizes, **COMMON, **GROUPED_ATTENTION)


def qwen3_5(vocab_size: int) -> PreTrainedConfig:
    text = {
        "vocab_size": vocab_size,
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.5,
        },
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return Qwen3_5MoeConfig(text_config={**text, **COMMON, **GROUPED_ATTENTION}, vision_config=vision)


def glm4(vocab_size: int) -> PreTrainedConfig:
    sizes = {"n_routed_experts": 8, "intermediate_size": 48, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    return Glm4MoeConfig(vocab_size=vocab_size, attention_bias=True, **sizes, **COMMON, **GROUPED_ATTENTION)


def mixtral(vocab_size: int) -> PreTrainedConfig:
    sizes = {"num_local_experts": 4, "intermediate_size": 48}
    return MixtralConfig(vocab_size=vocab_size, **sizes, **COMMON, **GROUPED_ATTENTION)


def gpt_oss(vocab_size: int) -> PreTrainedConfig:
    sizes = {"num_local_experts": 4, "intermediate_size": 24, "sliding_window": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return GptOssConfig(vocab_size=vocab_size, rope_parameters=rope, **sizes, **COMMON, **GROUPED_ATTENTION)


CASES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "deepseek_v2_lite_lora_sft": deepseek_v2,
    "deepseek_r1_lora_sft": deepseek_v3,
    "qwen3_30b_a3b_lora_sft": qwen3,
    "qwen3_30b_a3b_lora_dpo": qwen3,
    "qwen3_5_35b_a3b_lora_sft": qwen3_5,
    "glm4_5_air_lora_sft": glm4,
    "mixtral_8x7b_lora_sft": mixtral,
    "gpt_oss_20b_lora_sft": gpt_oss,
}
#: The same architecture and settings as another case, with another size.
SAME_AS_ANOTHER = {"qwen3_235b_a22b_lora_sft", "glm4_6_lora_sft", "quickstart"}


def make_processor(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Gives the tokenizer the image tokens and the folder a processor, both of which LLaMA-Factory asks for."""
    names = ["vision_start", "vision_end", "image", "video"]
    tokens = [f"<|{name}{'_pad' if name in ('image', 'video') else ''}|>" for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    for name, token in zip(names, tokens, strict=True):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    patch_size = config.vision_config.patch_size
    image, video = Qwen2VLImageProcessor(patch_size=patch_size), Qwen3VLVideoProcessor(patch_size=patch_size)
    Qwen3VLProcessor(image, tokenizer, video).save_pretrained(folder)


def make_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, make_config: Callable[[int], PreTrainedConfig]
) -> None:
    # Room for the stop words that LLaMA-Factory's templates add to a tokenizer that lacks them.
    config = make_config(len(tokenizer) + 16)
    tokenizer.save_pretrained(folder)
    if auto_class(config) is AutoModelForImageTextToText:
        make_processor(folder, tokenizer, config)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def test_every_training_recipe_is_covered() -> None:
    training = {path.stem for path in RECIPES.glob("*.yaml") if "stage" in read(path)}
    assert training == set(CASES) | SAME_AS_ANOTHER


@pytest.mark.parametrize("name", CASES)
def test_recipe_trains(name: str, tmp_path: Path, tiny_moe: Path, tiny_data: Path) -> None:
    make_model(tmp_path / "model", AutoTokenizer.from_pretrained(tiny_moe), CASES[name])
    recipe = read(RECIPES / f"{name}.yaml")
    recipe |= {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": {"sft": "sft", "dpo": "pair"}[recipe["stage"]],
        "dataset_dir": str(tiny_data),
        "output_dir": str(tmp_path / "out"),
        "cutoff_len": 64,
        "preprocessing_num_workers": None,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "plot_loss": False,
        "use_cpu": True,
    }

    run_exp(recipe)

    log = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0], losses
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {target.rpartition(".")[2] for target in adapter["target_modules"]} == set(recipe["lora_target"].split(","))

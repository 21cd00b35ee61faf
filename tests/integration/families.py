"""Tiny random models of every family of transformers whose experts follow the standard interface."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 96

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # so that experts matter to the logits
}
_EXPERTS = {"num_experts": 8}
ROUTED = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "n_shared_experts": 1}
LATENT = {  # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_SHARED = {"shared_expert_intermediate_size": 16}
_LINEAR = {  # gated delta net
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
}


def text(class_name: str, **settings: Any) -> Callable[[], nn.Module]:
    """A text model: `settings` beside the shared sizes."""

    def make() -> nn.Module:
        model_class = getattr(transformers, class_name)
        # transformers writes into the dicts it is given.
        return model_class(model_class.config_class(**copy.deepcopy(_SIZES | settings)))

    return make


def _wrapped(
    class_name: str, text_settings: dict[str, Any], vision: dict[str, Any], **settings: Any
) -> Callable[[], nn.Module]:
    """A model that wraps a text model of experts and a vision tower."""

    def make() -> nn.Module:
        model_class = getattr(transformers, class_name)
        parts = copy.deepcopy({"text_config": _SIZES | text_settings, "vision_config": vision})
        return model_class(model_class.config_class(**parts, **settings))

    return make


def _omni_thinker() -> nn.Module:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 32}
    audio |= {"downsample_hidden_size": 8, "num_mel_bins": 16}
    config = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.config_class(
        text_config=_SIZES | _EXPERTS, vision_config=vision, audio_config=audio, initializer_range=0.2
    )
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)


def _omni_talker() -> nn.Module:
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni

    config = omni.Qwen3OmniMoeTalkerModel.config_class(**(_SIZES | _EXPERTS | _SHARED))
    return omni.Qwen3OmniMoeTalkerModel(config)


_MAMBA = {
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

#: Folder of the family in transformers.models -> makers of its models.
FAMILIES: dict[str, list[Callable[[], nn.Module]]] = {
    "afmoe": [text("AfmoeForCausalLM", **_EXPERTS, num_dense_layers=0)],
    "deepseek_v2": [text("DeepseekV2ForCausalLM", **LATENT, **ROUTED, topk_method="greedy")],
    "deepseek_v3": [text("DeepseekV3ForCausalLM", **LATENT, **ROUTED)],
    "dots1": [text("Dots1ForCausalLM", **ROUTED)],
    "ernie4_5_moe": [text("Ernie4_5_MoeForCausalLM", moe_num_experts=8, moe_k=2, moe_layer_start_index=0)],
    "ernie4_5_vl_moe": [
        _wrapped(
            "Ernie4_5_VLMoeForConditionalGeneration",
            {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": [24, 16]}
            | {"mlp_layer_types": ["sparse", "sparse"], "rope_parameters": _SECTIONS},
            {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
        )
    ],
    "exaone_moe": [text("ExaoneMoeForCausalLM", **_EXPERTS)],
    "flex_olmo": [text("FlexOlmoForCausalLM", **_EXPERTS)],
    "gemma4": [
        text(
            "Gemma4ForCausalLM",
            **_EXPERTS,
            enable_moe_block=True,
            top_k_experts=2,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=0,
            global_head_dim=8,
            num_global_key_value_heads=2,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
        )
    ],
    "glm4_moe": [text("Glm4MoeForCausalLM", **ROUTED)],
    "glm4_moe_lite": [text("Glm4MoeLiteForCausalLM", **LATENT, **ROUTED)],
    "glm4v_moe": [
        _wrapped(
            "Glm4vMoeForConditionalGeneration",
            ROUTED | {"rope_parameters": _SECTIONS | {"partial_rotary_factor": 1.0}},
            _VISION | {"image_size": 28, "patch_size": 14},
        )
    ],
    "glm_moe_dsa": [
        text(
            "GlmMoeDsaForCausalLM",
            **LATENT,
            **ROUTED,
            mlp_layer_types=["sparse", "sparse"],
            index_n_heads=2,
            index_head_dim=16,
            index_topk=8,
        )
    ],
    "gpt_oss": [text("GptOssForCausalLM", num_local_experts=8, rope_parameters=YARN)],
    "hunyuan_v1_moe": [text("HunYuanMoEV1ForCausalLM", **_EXPERTS, moe_topk=2)],
    "hy_v3": [text("HYV3ForCausalLM", **_EXPERTS)],
    "jamba": [text("JambaForCausalLM", **_EXPERTS, **_MAMBA)],
    "lfm2_moe": [text("Lfm2MoeForCausalLM", **_EXPERTS, num_dense_layers=0, layer_types=["conv", "full_attention"])],
    "minimax": [text("MiniMaxForCausalLM", num_local_experts=8, block_size=8)],
    "minimax_m2": [text("MiniMaxM2ForCausalLM", num_local_experts=8)],
    "mistral4": [
        text(
            "Mistral4ForCausalLM",
            **(LATENT | ROUTED | {"head_dim": 16}),
            rope_parameters=YARN | {"llama_4_scaling_beta": 0.1},
        )
    ],
    "mixtral": [text("MixtralForCausalLM", num_local_experts=8)],
    "nemotron_h": [
        text(
            "NemotronHForCausalLM",
            n_routed_experts=8,
            layers_block_type=["mamba", "moe", "attention", "moe"],
            moe_latent_size=16,
            moe_shared_expert_intermediate_size=16,
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            n_group=1,
            topk_group=1,
        )
    ],
    "olmoe": [text("OlmoeForCausalLM", **_EXPERTS)],
    "openai_privacy_filter": [
        text("OpenAIPrivacyFilterForTokenClassification", num_local_experts=8, rope_parameters=YARN)
    ],
    "phimoe": [text("PhimoeForCausalLM", num_local_experts=8)],
    "qwen2_moe": [text("Qwen2MoeForCausalLM", **_EXPERTS, **_SHARED)],
    "qwen3_5_moe": [text("Qwen3_5MoeForCausalLM", **_EXPERTS, **_SHARED, **_LINEAR)],
    "qwen3_moe": [text("Qwen3MoeForCausalLM", **_EXPERTS)],
    "qwen3_next": [text("Qwen3NextForCausalLM", **_EXPERTS, **_SHARED, **_LINEAR)],
    "qwen3_omni_moe": [_omni_thinker, _omni_talker],
    "qwen3_vl_moe": [
        _wrapped(
            "Qwen3VLMoeForConditionalGeneration",
            _EXPERTS | {"rope_parameters": _SECTIONS},
            _VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        )
    ],
    "solar_open": [text("SolarOpenForCausalLM", **ROUTED)],
}


def families_of_transformers() -> set[str]:
    """The folders of transformers.models that hold a class under the experts decorator."""
    models = Path(transformers.__file__).parent / "models"
    decorated = re.compile(r"^@use_experts_implementation", re.MULTILINE)
    return {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if decorated.search(file.read_text(encoding="utf-8"))
    }


def make(maker: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A random FP32 model in evaluation mode whose experts hold BF16 values, as the engine stores them."""
    torch.manual_seed(seed)
    model = maker().float().eval()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "is_transposed"):
                for name, parameter in module.named_parameters():
                    # Some classes leave experts uninitialised or zero: give every value, biases too, something to do.
                    parameter.normal_(0, 0.2)
                    if not name.endswith("bias"):
                        parameter.copy_(parameter.bfloat16())
    return model

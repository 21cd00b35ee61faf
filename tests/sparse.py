"""Checkpoints of published models at their full size, without their weights: config.json, and shards that are headers.

What follows a header is a hole in the file (but for the shapes that INT4 checkpoints hold as values), so that a model
of a terabyte takes some megabytes of the disk.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

Tensors = dict[str, tuple[str, tuple[int, ...]]]

_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4}

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_INT4_GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4_GROUP}},
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "first_k_dense_replace": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 163840,
}
GPT_OSS_120B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4"},
}
QWEN3_235B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_sparse(folder: Path, config: dict[str, Any], quantised: str = "") -> Path:
    """Writes a model's folder.

    Args:
        folder: Where.
        config: Of the model, as published.
        quantised: "fp8" (all matrices but routers, embeddings and output), "int4" (experts, compressed-tensors),
            "mxfp4" (gpt-oss), or "" for BF16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = _dense(config)
    if quantised == "fp8":
        tensors = {k: v for key, value in tensors.items() for k, v in _fp8(key, value).items()}
    _write(folder / "model-dense.safetensors", tensors)
    weight_map = dict.fromkeys(tensors, "model-dense.safetensors")
    for layer in range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"]):
        tensors = _experts(config, layer, quantised)
        name = f"model-{layer:05d}.safetensors"
        _write(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _dense(config: dict[str, Any]) -> Tensors:
    """Everything but the routed experts, as transformers' own class has it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
    keys = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "quantization_config")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys), dtype=torch.bfloat16)
    return {key: ("BF16", tuple(v.shape)) for key, v in model.state_dict().items() if ".mlp.experts." not in key}


def _experts(config: dict[str, Any], layer: int, quantised: str) -> Tensors:
    stem, hidden = f"model.layers.{layer}.mlp.experts", config["hidden_size"]
    if quantised == "mxfp4":
        count, inner = config["num_local_experts"], config["intermediate_size"]
        return {
            f"{stem}.gate_up_proj_blocks": ("U8", (count, 2 * inner, hidden // 32, 16)),
            f"{stem}.gate_up_proj_scales": ("U8", (count, 2 * inner, hidden // 32)),
            f"{stem}.gate_up_proj_bias": ("BF16", (count, 2 * inner)),
            f"{stem}.down_proj_blocks": ("U8", (count, hidden, inner // 32, 16)),
            f"{stem}.down_proj_scales": ("U8", (count, hidden, inner // 32)),
            f"{stem}.down_proj_bias": ("BF16", (count, hidden)),
        }
    inner = config["moe_intermediate_size"]
    found: Tensors = {}
    for expert in range(config.get("n_routed_experts") or config["num_experts"]):
        for name, (rows, columns) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            key = f"{stem}.{expert}.{name}_proj.weight"
            if quantised == "int4":
                found[f"{key}_packed"] = ("I32", (rows, columns // 8))
                found[f"{key}_scale"] = ("BF16", (rows, columns // 32))
                found[f"{key}_shape"] = ("I32", (2,))
            else:
                weight = ("BF16", (rows, columns))
                found |= _fp8(key, weight) if quantised == "fp8" else {key: weight}
    return found


def _fp8(key: str, value: tuple[str, tuple[int, ...]]) -> Tensors:
    shape = value[1]
    if len(shape) != 2 or any(part in key for part in ("embed_tokens", "lm_head", "mlp.gate.")):
        return {key: value}
    blocks = tuple(-(-size // 128) for size in shape)
    return {key: ("F8_E4M3", shape), f"{key}_scale_inv": ("F32", blocks)}


def _write(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the library pads, so that tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        for key in tensors:
            if key.endswith("_shape"):
                rows, columns = tensors[f"{key.removesuffix('_shape')}_packed"][1]
                file.seek(start + header[key]["data_offsets"][0])
                file.write(struct.pack("<ii", rows, 8 * columns))

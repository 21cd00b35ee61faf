"""Tiny checkpoints in the conventions of published quantised ones, and what their weights are by definition.

Every writer takes a folder with a checkpoint of `save_pretrained` and writes the quantised one over it: keys, dtypes,
shapes and the `quantization_config` are those of the model named beside it. It returns the values, code x scale in
float64, of each quantised weight by its key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Values = dict[str, Tensor]

#: What stays as it is: embeddings, routers, norms, biases.
_PLAIN = re.compile(r"(embed_tokens|lm_head|norm|\.gate|e_score_correction_bias|router|sinks)\.?(weight|bias)?$|bias$")


def is_dense_linear(key: str, value: Tensor) -> bool:
    return value.dim() == 2 and _PLAIN.search(key) is None


def is_expert(key: str, value: Tensor) -> bool:
    return is_dense_linear(key, value) and ".experts." in key


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """A scale for each weight."""
    rows = scales.repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def to_fp8(weight: Tensor, block: tuple[int, int], dtype: torch.dtype, powers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and values of a matrix whose blocks' largest magnitudes go to the largest code."""
    rows, columns = weight.shape
    largest = torch.stack(
        [
            torch.stack([part.abs().amax() for part in band.split(block[1], dim=1)])
            for band in weight.double().split(block[0], dim=0)
        ]
    )
    scales = largest / 448
    if powers:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    scales = scales.to(dtype)
    exact = spread(scales.double(), block, (rows, columns))
    codes = (weight.double() / exact).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales, codes.double() * exact


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], files: int = 1) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def write_fp8(
    folder: Path,
    *,
    block: tuple[int, int] = (128, 128),
    scales: torch.dtype = torch.float32,
    powers: bool = False,
    select: Callable[[str, Tensor], bool] = is_dense_linear,
    **config: Any,
) -> Values:
    """DeepSeek-V3 (scales in FP32), DeepSeek-V3.1 (`powers`), Qwen3-FP8 (scales in BF16), MiniMax-M2."""
    tensors, values = load_file(folder / "model.safetensors"), {}
    for key in [key for key, value in tensors.items() if select(key, value)]:
        tensors[key], tensors[f"{key}_scale_inv"], values[key] = to_fp8(tensors[key], block, scales, powers)
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    quantization |= {"weight_block_size": list(block)} | ({"scale_fmt": "ue8m0"} if powers else {}) | config
    _write(folder, tensors, quantization)
    return values


def fuse(folder: Path, values: Values) -> None:
    """Writes FP8 experts the way that transformers saves them: one tensor of all, gate rows first."""
    tensors = load_file(folder / "model.safetensors")
    for layer in sorted({key.partition(".experts.")[0] for key in tensors if ".experts." in key}):
        count = len(
            [key for key in tensors if key.startswith(f"{layer}.experts.") and key.endswith("down_proj.weight")]
        )
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            for suffix, source in (("", tensors), ("_scale_inv", tensors), ("", values)):
                keys = [[f"{layer}.experts.{e}.{part}_proj.weight{suffix}" for part in parts] for e in range(count)]
                stacked = torch.stack([torch.cat([source.pop(key) for key in row]) for row in keys])
                source[f"{layer}.experts.{name}{suffix}"] = stacked
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_compressed_fp8(folder: Path, *, strategy: str = "channel", scales: torch.dtype = torch.bfloat16) -> Values:
    """GLM-4.5-FP8, and others of llm-compressor: a scale for each row ("channel") or block, or one for all."""
    tensors, values = load_file(folder / "model.safetensors"), {}
    for key in [key for key, value in tensors.items() if is_dense_linear(key, value)]:
        rows, columns = tensors[key].shape
        block = {"channel": (1, columns), "block": (128, 128), "tensor": (rows, columns)}[strategy]
        tensors[key], scale, values[key] = to_fp8(tensors[key], block, scales, powers=False)
        tensors[f"{key}_scale"] = scale.reshape(1) if strategy == "tensor" else scale
        if strategy == "tensor":
            tensors[key.replace(".weight", ".input_scale")] = torch.ones(1, dtype=scales)
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    weights |= {"group_size": None, "block_structure": [128, 128] if strategy == "block" else None}
    group = {"targets": ["Linear"], "weights": weights, "output_activations": None, "input_activations": None}
    _write(
        folder,
        tensors,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
        },
    )
    return values


#: E2M1: OCP Microscaling Formats 1.0, section 5.3.3.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def write_mxfp4(folder: Path) -> Values:
    """gpt-oss: fused experts, [E, H, 2I] and [E, I, H] in transformers, whose rows are stored in blocks of 32."""
    tensors, values = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if re.search(r"experts\.(gate_up|down)_proj$", key)]:
        weight = tensors.pop(key).double().transpose(1, 2)
        groups = weight.unflatten(2, (-1, 32))
        exponents = torch.floor(torch.log2(groups.abs().amax(dim=3, keepdim=True))) - 2
        codes = (groups / torch.exp2(exponents)).unsqueeze(-1).sub(_E2M1).abs().argmin(dim=-1)
        values[key] = (_E2M1[codes] * torch.exp2(exponents)).flatten(2).transpose(1, 2)
        tensors[f"{key}_blocks"] = (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
        tensors[f"{key}_scales"] = (exponents.squeeze(3) + 127).to(torch.uint8)
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": plain})
    return values


def _to_int4(
    weight: Tensor, group: int | None, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes 0 to 15 [R, C], scales and zeros [R, G], and the values (code - zero) x scale."""
    groups = weight.double().unflatten(1, (-1, group or weight.shape[1]))
    if symmetric:
        scales = (groups.abs().amax(dim=2) / 7).to(dtype)
        zeros = torch.full_like(scales, 8, dtype=torch.long)
    else:
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        scales = ((high - low) / 15).to(dtype)
        zeros = (-low / scales.double()).round().clamp(0, 15).long()
    codes = (groups / scales.double().unsqueeze(2)).round().long() + zeros.unsqueeze(2)
    codes = codes.clamp(0, 15)
    values = (codes - zeros.unsqueeze(2)) * scales.double().unsqueeze(2)
    return codes.flatten(1), scales, zeros, values.flatten(1)


def pack_columns(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight neighbouring columns to an int32; from the lowest bits on columns order[0], order[1], ... of them."""
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    words = sum(padded[:, :, column] << (4 * place) for place, column in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def write_compressed_int4(
    folder: Path,
    *,
    group: int | None = 32,
    symmetric: bool = True,
    scales: torch.dtype = torch.bfloat16,
    sizes: torch.dtype = torch.int32,
    select: Callable[[str, Tensor], bool] = is_expert,
) -> Values:
    """Kimi-K2-Thinking: `pack-quantized`, of the experts only."""
    tensors, values = load_file(folder / "model.safetensors"), {}
    for key in [key for key, value in tensors.items() if select(key, value)]:
        weight = tensors.pop(key)
        codes, scale, zeros, values[key] = _to_int4(weight, group, symmetric, scales)
        tensors[f"{key}_packed"], tensors[f"{key}_scale"] = pack_columns(codes), scale
        tensors[f"{key}_shape"] = torch.tensor(weight.shape, dtype=sizes)
        if not symmetric:
            tensors[f"{key}_zero_point"] = pack_columns(zeros.T).T
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group" if group else "channel",
        "group_size": group,
        "symmetric": symmetric,
    }
    weights |= {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    config["ignore"] = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"]
    _write(folder, tensors, config)
    return values


def write_gptq(
    folder: Path,
    *,
    group: int | None = 32,
    symmetric: bool = True,
    form: str | None = None,
    biases: torch.dtype | None = None,
) -> Values:
    """Qwen3-30B-A3B-GPTQ-Int4: attention and experts; with `symmetric`, stored zeros are 7 (of gptq_v2, 8).

    AutoGPTQ and GPTQModel may write a bias of zeros for every layer, also for those without one: `biases`.

    As GPTQModel packs them (pack_original of nn_modules/qlinear, and convert_gptq_v2_to_v1_format_module, which takes
    the one off whole words).
    """
    tensors, values = load_file(folder / "model.safetensors"), {}
    for key in [key for key, value in tensors.items() if is_dense_linear(key, value)]:
        weight, stem = tensors.pop(key), key.removesuffix(".weight")
        codes, scales, zeros, values[key] = _to_int4(weight, group, symmetric, torch.float16)
        tensors[f"{stem}.qweight"] = pack_columns(codes).T
        tensors[f"{stem}.qzeros"] = pack_columns(zeros.T) - (0 if form == "gptq_v2" else 0x11111111)
        tensors[f"{stem}.scales"] = scales.T
        tensors[f"{stem}.g_idx"] = (torch.arange(weight.shape[1]) // (group or weight.shape[1])).to(torch.int32)
        if biases is not None:
            tensors[f"{stem}.bias"] = torch.zeros(len(weight), dtype=biases)
    config = {"quant_method": "gptq", "bits": 4, "group_size": group or -1, "sym": symmetric, "desc_act": False}
    config |= {"lm_head": False, "damp_percent": 0.01} | ({"checkpoint_format": form} if form else {})
    _write(folder, tensors, config)
    return values


def write_awq(folder: Path, *, group: int = 32) -> Values:
    """Qwen3-30B-A3B-AWQ: attention and experts, as AutoAWQ packs them (WQLinear_GEMM.from_linear)."""
    tensors, values = load_file(folder / "model.safetensors"), {}
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for key in [key for key, value in tensors.items() if is_dense_linear(key, value)]:
        weight, stem = tensors.pop(key), key.removesuffix(".weight")
        codes, scales, zeros, values[key] = _to_int4(weight, group, False, torch.float16)
        tensors[f"{stem}.qweight"] = pack_columns(codes.T, order)
        tensors[f"{stem}.qzeros"], tensors[f"{stem}.scales"] = pack_columns(zeros.T, order), scales.T
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    _write(folder, tensors, config | {"modules_to_not_convert": ["gate"]})
    return values

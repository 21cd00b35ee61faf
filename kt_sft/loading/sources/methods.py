"""What a checkpoint's `quantization_config` says of its tensors.

A method here is told by the config alone and checked against the tensors: what they are decides, and a config that says
otherwise is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kt_sft.config import ConfigError
from kt_sft.loading.checkpoint import TensorEntry
from kt_sft.loading.sources import fp8, gptq, int4, mxfp4

_WAY_OUT = "take or make a BF16 copy of the model"


def check_config(config: Any) -> None:
    """Refuses a checkpoint that MLX has quantised, whose config names no method that one could look for.

    It says `bits` and `group_size` under `quantization`, in later versions also under `quantization_config`:
    https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/utils.py.

    Args:
        config: Of the model.

    Raises:
        ConfigError: It is one.
    """
    for key in ("quantization", "quantization_config"):
        found = getattr(config, key, None)
        if isinstance(found, Mapping) and {"bits", "group_size"} <= found.keys() and "quant_method" not in found:
            raise _refuse("MLX", f"{key}: bits {found['bits']!r}, group_size {found['group_size']!r}")


def check_method(quantization: Mapping[str, Any]) -> None:
    """Refuses what cannot be read, before any file is.

    Raises:
        ConfigError: Names the method, or the variant of it, and the way out.
    """
    _method(quantization)


def fold_tensors(tensors: dict[str, TensorEntry], quantization: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Puts the stored tensors of each quantised weight together to one entry under the weight's own key.

    Args:
        tensors: Of the whole checkpoint, by key.
        quantization: Its `quantization_config`.

    Raises:
        ConfigError: The method, or the variant of it, cannot be read.
        CheckpointError: Tensors do not fit each other or the config.
    """
    return _method(quantization)(tensors)


def _method(quantization: Mapping[str, Any]) -> Any:
    name = str(getattr(quantization.get("quant_method"), "value", quantization.get("quant_method")))
    if name not in _METHODS:
        raise ConfigError(
            f"kt_sft: the checkpoint is quantised ({name}), which kt_sft does not read; it reads {', '.join(_METHODS)} "
            f"and unquantised ones, so {_WAY_OUT}"
        )
    return _METHODS[name](quantization)


def _refuse(method: str, what: str) -> ConfigError:
    return ConfigError(
        f"kt_sft: the checkpoint is quantised ({method}) with {what}, which kt_sft does not read; {_WAY_OUT}"
    )


def _fp8(quantization: Mapping[str, Any]) -> Any:
    fmt = str(quantization.get("fmt") or "e4m3")
    if fmt not in ("e4m3", "float8_e4m3fn"):
        raise _refuse("fp8", f"fmt {fmt!r}")
    block = _block(quantization.get("weight_block_size"), "fp8")
    powers = quantization.get("scale_fmt") == "ue8m0"
    return lambda tensors: fp8.fold(tensors, block, powers)


def _block(value: Any, method: str) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = list(value) if isinstance(value, list | tuple) else []
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise _refuse(method, f"blocks of {value!r}")
    return (sizes[0], sizes[1])


def _compressed_tensors(quantization: Mapping[str, Any]) -> Any:
    """Groups of layers, each with what its weights are: https://github.com/vllm-project/compressed-tensors."""
    groups = _block_of_settings(quantization, "config_groups")
    kinds = [_block_of_settings(_block_of_settings(groups, name), "weights") for name in groups]
    found = {repr(weights): weights for weights in kinds if weights}
    if len(found) != 1:
        raise _refuse("compressed-tensors", f"{len(found)} kinds of weights")
    (weights,) = found.values()
    sparse = _block_of_settings(quantization, "sparsity_config").get("format", "dense")
    if sparse != "dense":
        raise _refuse("compressed-tensors", f"the sparse format {sparse!r}")
    kind = (weights.get("type", "int"), weights.get("num_bits"))
    if kind == ("float", 8):
        block = _block(weights.get("block_structure"), "compressed-tensors")
        return lambda tensors: fp8.fold(tensors, block)
    if kind == ("int", 4):
        form = str(quantization.get("format"))
        if form != "pack-quantized" or weights.get("strategy") not in ("group", "channel"):
            raise _refuse("compressed-tensors", f"INT4 weights of the format {form!r}, {weights.get('strategy')!r}")
        group = _group(weights.get("group_size"), "compressed-tensors")
        return lambda tensors: int4.fold(tensors, group, bool(weights.get("symmetric", True)))
    raise _refuse("compressed-tensors", f"weights of {kind[1]} bits of the type {kind[0]!r}")


def _mxfp4(quantization: Mapping[str, Any]) -> Any:
    return mxfp4.fold


def _block_of_settings(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name) or {}
    if not isinstance(found, Mapping):
        raise _refuse("compressed-tensors", f"{name}: {found!r}")
    return found


def _group(value: Any, method: str) -> int | None:
    """Columns that share a scale; None: whole rows."""
    if value in (None, -1):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refuse(method, f"a group_size of {value!r}")
    return value


def _gptq(quantization: Mapping[str, Any]) -> Any:
    if quantization.get("bits") != 4:
        raise _refuse("gptq", f"bits: {quantization.get('bits')!r}")
    form = str(quantization.get("checkpoint_format") or "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise _refuse("gptq", f"checkpoint_format {form!r}")
    group = _group(quantization.get("group_size"), "gptq")
    symmetric = bool(quantization.get("sym", True))
    return lambda tensors: gptq.fold_gptq(tensors, group, symmetric, one_less=form == "gptq")


def _awq(quantization: Mapping[str, Any]) -> Any:
    bits = quantization.get("bits", quantization.get("w_bit"))
    version = str(quantization.get("version") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise _refuse("awq", f"bits: {bits!r} and version: {version!r}")
    group = _group(quantization.get("group_size", quantization.get("q_group_size")), "awq")
    return lambda tensors: gptq.fold_awq(tensors, group)


_METHODS = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "mxfp4": _mxfp4, "gptq": _gptq, "awq": _awq}

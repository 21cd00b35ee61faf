"""Headers and quantization configs of any content: read, or refused with an error that is ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from kt_sft.config import ConfigError, KTConfig
from kt_sft.loading.checkpoint import Checkpoint, TensorEntry
from kt_sft.loading.errors import CheckpointError, UnsupportedModelError
from kt_sft.loading.layout import find_experts
from kt_sft.loading.mapping import plan_experts
from kt_sft.loading.sources.dense import plan_dense
from kt_sft.loading.sources.entries import QuantisedEntry, resolve_storage
from kt_sft.loading.sources.methods import check_method, fold_tensors

OURS = (CheckpointError, UnsupportedModelError, ConfigError)
H, I, E = 128, 64, 2

Header = dict[str, tuple[str, tuple[int, ...]]]


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=H,
        moe_intermediate_size=I,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=E,
    )
    with torch.device("meta"):
        return Qwen3MoeForCausalLM(config)


def _fp8(key: str, shape: tuple[int, int]) -> Header:
    return {key: ("F8_E4M3", shape), f"{key}_scale_inv": ("F32", (-(-shape[0] // 128), -(-shape[1] // 128)))}


def _gptq(key: str, shape: tuple[int, int]) -> Header:
    stem, (rows, columns) = key.removesuffix(".weight"), shape
    scales = {f"{stem}.qzeros": ("I32", (columns // 32, rows // 8)), f"{stem}.scales": ("F16", (columns // 32, rows))}
    return {f"{stem}.qweight": ("I32", (columns // 8, rows))} | scales


def _awq(key: str, shape: tuple[int, int]) -> Header:
    stem, (rows, columns) = key.removesuffix(".weight"), shape
    return _gptq(key, shape) | {f"{stem}.qweight": ("I32", (columns, rows // 8))}


SOURCES: dict[str, tuple[dict[str, Any], Callable[[str, tuple[int, int]], Header]]] = {
    "fp8": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, _fp8),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, _gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, _awq),
}


def header_of(model: Qwen3MoeForCausalLM, write: Callable[[str, tuple[int, int]], Header]) -> Header:
    header: Header = {}
    for key, value in model.state_dict().items():
        if ".experts." in key:
            continue
        linear = "_proj" in key
        header |= write(key, tuple(value.shape)) if linear else {key: ("BF16", tuple(value.shape))}
    for expert in range(E):
        for name, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I))):
            header |= write(f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight", shape)
    return header


def plan(model: Qwen3MoeForCausalLM, header: Header, quantization: dict[str, Any]) -> list[QuantisedEntry]:
    """All that is done before anything is read; the dense weights that it finds."""
    checkpoint = Checkpoint([])
    tensors = {
        key: TensorEntry(key, "/nowhere.safetensors", dtype, shape, 0, math.prod(shape))
        for key, (dtype, shape) in header.items()
    }
    checkpoint.tensors = fold_tensors(tensors, quantization)
    conversions = get_model_conversion_mapping(model)
    plans = plan_experts(model, find_experts(model), checkpoint, conversions)
    for module in plans:
        resolve_storage(module, KTConfig())
        for read in module.reads:
            if isinstance(read.view.entry, QuantisedEntry):
                rows = read.view.entry.rows_of(read.view)
                assert 0 <= rows.start + (rows.count - 1) * rows.step < read.view.entry.shape[-2]
    return [weight.entry for weight in plan_dense(model, checkpoint.tensors, plans, conversions)]


@pytest.mark.parametrize("name", SOURCES)
def test_the_undamaged_header_is_read(name: str, model: Qwen3MoeForCausalLM) -> None:
    quantization, write = SOURCES[name]
    assert len(plan(model, header_of(model, write), quantization)) == 4  # q, k, v, o


SIZES = st.sampled_from([0, 1, 2, 4, 8, 16, 63, 64, 128, 129, 2**40])
SHAPES = st.lists(SIZES, max_size=4).map(tuple)
DTYPES = st.sampled_from(
    ["F8_E4M3", "F8_E5M2", "F8_E8M0", "BF16", "F16", "F32", "F64", "I8", "U8", "I32", "I64", "BOOL"]
)


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_damaged_headers(name: str, model: Qwen3MoeForCausalLM, data: st.DataObject) -> None:
    quantization, write = SOURCES[name]
    header = header_of(model, write)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(header)))
        dtype, shape = header.pop(key)
        action = data.draw(st.sampled_from(["drop", "dtype", "shape", "turn", "key"]))
        if action == "dtype":
            header[key] = data.draw(DTYPES), shape
        elif action == "shape":
            header[key] = dtype, data.draw(SHAPES)
        elif action == "turn":
            header[key] = dtype, shape[::-1]
        elif action == "key":
            header[data.draw(st.sampled_from([f"{key}_scale", f"x.{key}", key.rpartition(".")[0]]))] = dtype, shape
    try:
        plan(model, header, quantization)
    except OURS as error:
        assert str(error)  # noqa: PT017  # any other error fails


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 256) | st.sampled_from(["", "int", "float", "group", "gemm", "e4m3"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["weights", "num_bits", "type"]), inner)
    ),
    max_leaves=6,
)
KEYS = (
    "fmt",
    "weight_block_size",
    "bits",
    "group_size",
    "sym",
    "version",
    "config_groups",
    "format",
    "sparsity_config",
)


@settings(max_examples=200, deadline=None)
@given(
    method=st.sampled_from(["fp8", "mxfp4", "gptq", "awq", "compressed-tensors", "other"]),
    values=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
)
def test_configs_of_any_content(method: str, values: dict[str, Any]) -> None:
    try:
        check_method({"quant_method": method} | values)
    except ConfigError as error:
        assert "kt_sft does not read" in str(error)  # noqa: PT017

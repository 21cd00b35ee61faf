"""A matrix as it is stored: the tensors that it comes to in a file, and copies of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kt_sft.engine.geometry import OWN_SCALES, row_bytes, scales_shape
from kt_sft.engine.store import LayerStore

#: Names of dtypes in safetensors headers. Two codes of four bits are a byte.
_CODES = {"bf16": "BF16", "int8": "I8", "fp8": "F8_E4M3"}
_SCALES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1}

#: What a matrix may consist of, in this order.
PARTS = ("codes", "scales", "zeros")


def stored_parts(rows: int, columns: int, storage: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, int]]]:
    """The tensors that a matrix [rows, columns] is stored as: (safetensors dtype, shape) by the name of the part.

    Args:
        rows: Its rows.
        columns: Its columns.
        storage: Its format, as LayerStore's arguments.
    """
    name = storage["expert_format"]
    code_columns = columns if name in _CODES else row_bytes(name, columns)
    parts = {"codes": (_CODES.get(name, "U8"), (rows, code_columns))}
    if name not in OWN_SCALES:
        return parts
    shape = scales_shape(name, storage["group_size"], (rows, columns))
    parts["scales"] = (_SCALES[storage.get("scale_dtype") or OWN_SCALES[name][0]], shape)
    if storage["zero_point"]:
        parts["zeros"] = ("U8", shape)
    return parts


def part_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a part."""
    size = _ITEM_BYTES[dtype]
    for count in shape:
        size *= count
    return size


def copy_stored(store: LayerStore, matrix: str, expert: int) -> dict[str, Tensor]:
    """The parts of one matrix of a store as bytes, without gaps; without the GIL.

    Raises:
        RuntimeError: Nothing was stored there.
    """
    storage = {
        "expert_format": store.expert_format,
        "group_size": store.group_size,
        "zero_point": store.zero_point,
        "scale_dtype": store.scale_dtype,
    }
    parts = {
        name: torch.empty(part_bytes(dtype, shape), dtype=torch.uint8, device="cpu")
        for name, (dtype, shape) in stored_parts(*store.shape(matrix), storage).items()
    }
    addresses = {name: parts[name].data_ptr() if name in parts else 0 for name in PARTS}
    store.native.copy_stored(matrix, expert, **addresses)
    return parts


def map_stored(store: LayerStore, matrix: str, expert: int, file: Any, places: Mapping[str, int]) -> None:
    """Takes one matrix of a `mapped` store for what lies in a file as `copy_stored` gave it; nothing is read.

    Args:
        store: The store.
        matrix: "gate", "up" or "down".
        expert: Its number.
        file: A `MappedFile`.
        places: The first byte of each part.

    Raises:
        ValueError: A part does not lie in the file.
    """
    offsets = {name: places.get(name, 0) for name in PARTS}
    store.native.map_stored(matrix, expert, file, **offsets)

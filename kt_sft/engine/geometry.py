"""What a stored matrix is made of: bytes of its rows, and the shape and dtype of its scales."""

from __future__ import annotations

import torch

#: Of formats with scales: their dtype, where a checkpoint's own are not kept, the default group of columns, and the
#: rows of a group that is no whole row.
OWN_SCALES = {
    "int8": (torch.float32, 0, 1),
    "int4": (torch.bfloat16, 32, 1),
    "nf4": (torch.bfloat16, 64, 1),
    "fp8": (torch.float32, 128, 128),
    "mxfp4": (torch.uint8, 32, 1),
}

_BITS = {"bf16": 16, "int8": 8, "fp8": 8, "int4": 4, "nf4": 4, "mxfp4": 4}


def row_bytes(expert_format: str, columns: int) -> int:
    """Bytes that one row's codes (of bf16: values) take."""
    return (columns * _BITS[expert_format] + 7) // 8


def default_group(expert_format: str) -> int | None:
    """Columns that share a scale where nothing else is said; None for a format without scales."""
    return OWN_SCALES[expert_format][1] if expert_format in OWN_SCALES else None


def scales_shape(expert_format: str, group_size: int | None, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows of scales, groups) of a matrix.

    Args:
        expert_format: One with scales.
        group_size: Columns that share a scale; None: the format's own default, 0: whole rows.
        shape: (rows, columns) of the matrix.
    """
    _, default, group_rows = OWN_SCALES[expert_format]
    group = default if group_size is None else group_size
    rows, columns = shape
    return (rows, 1) if group == 0 else (-(-rows // group_rows), -(-columns // group))

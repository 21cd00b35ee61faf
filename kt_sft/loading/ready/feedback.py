"""GPTQ's error feedback: codes of four bits, each chosen knowing what the ones before it got wrong.

For a matrix W and the second moments M of its inputs x, tr((W - Q) M (W - Q)^T) is what quantising to Q does to W x.
Column by column a weight goes to the nearest code, and its error, divided by the right entry of the Cholesky factor of
M's inverse, is taken off the columns that follow: Frantar et al. 2022, "GPTQ", https://arxiv.org/abs/2210.17323,
section 3. The scale of a group of columns is the engine's own for what the columns are when it is their turn. The
result is plain codes and scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kt_sft.engine.geometry import default_group
from kt_sft.engine.store import LayerStore
from kt_sft.engine.stored import copy_stored, stored_parts

#: Formats of four bits; eight leave hardly an error to feed back.
FEEDBACK_FORMATS = ("int4", "nf4", "mxfp4")
#: Columns whose errors reach the columns after them together.
_BLOCK = 128
#: Of the mean of M's diagonal, added to it: GPTQ's own value.
_DAMPING = 0.01

_SCALES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


@dataclass(frozen=True)
class Codes:
    """A quantised matrix, as `LayerStore.write_codes` takes it."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    values: Tensor  # FP32: code x scale


def inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of damped second moments [n, n], FP32.

    A column that no input ever had keeps its own code and gives nothing to others.
    """
    damped = moments.double()
    mean = damped.diagonal().mean().clamp(min=1e-30)
    damped = damped + torch.eye(len(damped), dtype=damped.dtype, device="cpu") * (_DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def quantise(weights: Tensor, factor: Tensor, storage: dict[str, Any]) -> Codes:
    """Codes and scales of a matrix, with error feedback.

    Args:
        weights: FP32 [rows, columns].
        factor: Of the inputs' moments, from `inverse_factor`.
        storage: A format of FEEDBACK_FORMATS, as LayerStore's arguments.
    """
    rows, columns = weights.shape
    expert_format, group = storage["expert_format"], storage["group_size"]
    group = (default_group(expert_format) if group is None else group) or columns
    table = _table(expert_format)
    order = torch.argsort(table)
    middles = (table[order][1:] + table[order][:-1]) / 2
    left = weights.clone()
    chosen = torch.empty(rows, columns, dtype=torch.uint8, device="cpu")
    values = torch.empty_like(left)
    scales, zeros = [], []
    step = max(_BLOCK, group) if group < columns else _BLOCK
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = torch.empty(rows, end - start, device="cpu")
        for column in range(start, end):
            if column % group == 0:
                scale, zero = _scales(left[:, column : column + group], storage)
                scales.append(scale)
                zeros.append(zero)
                spread = _as_float(scale, expert_format)
                offset = 0 if zero is None else 8 - zero.float()
            wanted = left[:, column]
            places = torch.bucketize(wanted / spread - offset, middles)
            code = order[places]
            chosen[:, column] = code
            values[:, column] = (table[code] + offset) * spread
            error = (wanted - values[:, column]) / factor[column, column]
            left[:, column:end] -= torch.outer(error, factor[column, column:end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    packed = torch.nn.functional.pad(chosen, (0, columns % 2))
    zero_points = None if zeros[0] is None else torch.stack([zero for zero in zeros if zero is not None], dim=1)
    return Codes(packed[:, 0::2] | (packed[:, 1::2] << 4), torch.stack(scales, dim=1), zero_points, values)


def lost(weights: Tensor, values: Tensor, moments: Tensor) -> float:
    """tr((W - Q) M (W - Q)^T)."""
    off = weights - values
    return float(((off @ moments) * off).sum(dtype=torch.float64))


def _table(expert_format: str) -> Tensor:
    """The values of the 16 codes, by the engine's own decoder."""
    store = LayerStore(
        num_experts=1, hidden_size=16, intermediate_size=1, activation="silu", gated=False, expert_format=expert_format
    )
    codes = torch.arange(16, dtype=torch.uint8, device="cpu")
    dtype, shape = stored_parts(1, 16, {"expert_format": expert_format, "group_size": None, "zero_point": False})[
        "scales"
    ]
    one = torch.full(shape, 127 if dtype == "U8" else 1, dtype=_SCALES[dtype], device="cpu")  # E8M0: 2^0
    store.write_codes("up", 0, (codes[0::2] | (codes[1::2] << 4))[None], one)
    values = torch.empty(1, 16, device="cpu")
    store.native.dequantize("up", 0, values.data_ptr())
    return values[0]


def _scales(columns: Tensor, storage: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The engine's own scale for each row of a group of columns, and its zero points [rows]."""
    rows, count = columns.shape
    store = LayerStore(
        num_experts=1, hidden_size=count, intermediate_size=rows, activation="silu", gated=False, **storage
    )
    store.write("up", 0, columns)
    parts, wanted = copy_stored(store, "up", 0), stored_parts(rows, count, storage)
    scale = parts["scales"].view(_SCALES[wanted["scales"][0]]).reshape(rows)
    return scale, parts["zeros"].reshape(rows) if "zeros" in parts else None


def _as_float(scale: Tensor, expert_format: str) -> Tensor:
    return (
        torch.ldexp(torch.ones(len(scale), device="cpu"), scale.int() - 127)
        if expert_format == "mxfp4"
        else scale.float()
    )

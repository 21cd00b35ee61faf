"""Four-bit integers: what all their layouts share, and that of compressed-tensors.

A value is (code - zero) x scale, with a scale for each group of columns of a row; symmetric ones have 8 for their zero.

compressed-tensors' `pack-quantized` (Kimi-K2-Thinking, models of llm-compressor): `weight_packed` [rows, columns / 8]
int32 holds eight codes each, the first column in the lowest bits, which in bytes is the engine's own order;
`weight_scale` [rows, groups]; `weight_zero_point` [rows / 8, groups] int32, packed along rows; `weight_shape`, the
matrix's size.
https://github.com/vllm-project/compressed-tensors, compressors/quantized_compressors/pack_quantized.py
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kt_sft.loading.checkpoint import TensorEntry
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.sources.entries import (
    STORED_DTYPES,
    CodesInFile,
    QuantisedEntry,
    Rows,
    companion,
    read_matrix,
    require,
    unpacked,
)

SCALES = ("BF16", "F16", "F32")
_GROUPS = tuple(32 << shift for shift in range(12))


@dataclass(frozen=True)
class Int4Entry(QuantisedEntry):
    """One matrix [rows, columns]; `group` columns share a scale, None: whole rows."""

    group: int | None
    zero_point: bool

    @property
    def columns_alike(self) -> int:
        """How many columns share a scale."""
        return self.shape[1] if self.group is None else self.group

    @property
    def storage(self) -> dict[str, Any] | None:
        """The engine's int4, with the checkpoint's own scales."""
        if self.group is not None and self.group not in _GROUPS:
            return None
        scales = STORED_DTYPES[self.parts["scales"].dtype_name]
        return {
            "expert_format": "int4",
            "group_size": self.group or 0,
            "zero_point": self.zero_point,
            "scale_dtype": None if scales is torch.bfloat16 else scales,
        }

    @property
    def description(self) -> str:
        """Its format in words."""
        return "INT4 with a scale for whole rows" if self.group is None else f"INT4 in groups of {self.group}"

    @abc.abstractmethod
    def codes(self) -> Tensor:
        """Of all rows, in the engine's order: [rows, columns / 2] uint8."""

    @abc.abstractmethod
    def scales(self) -> Tensor:
        """[rows, groups]."""

    @abc.abstractmethod
    def zeros(self) -> Tensor | None:
        """[rows, groups] uint8; None where all of them are 8."""

    def dequantised(self, rows: Rows) -> Tensor:
        """(code - zero) x scale of some rows."""
        part, zeros, columns = rows.slice(), self.zeros(), self.shape[1]
        codes = unpacked(self.codes()[part])[:, :columns].float()
        spread = self.scales()[part].float().repeat_interleave(self.columns_alike, dim=1)[:, :columns]
        offsets = 8 if zeros is None else zeros[part].float().repeat_interleave(self.columns_alike, dim=1)[:, :columns]
        return codes.sub_(offsets).mul_(spread)


class CompressedInt4(Int4Entry):
    """compressed-tensors' `pack-quantized`."""

    def codes(self) -> Tensor:
        """As they lie on disk."""
        return read_matrix(self.parts["codes"]).view(torch.uint8)[:, : (self.shape[1] + 1) // 2]

    def scales(self) -> Tensor:
        """As they lie on disk."""
        return read_matrix(self.parts["scales"])

    def zeros(self) -> Tensor | None:
        """Turned, for they are packed along rows."""
        if not self.zero_point:
            return None
        packed_zeros = read_matrix(self.parts["zeros"]).T.contiguous().view(torch.uint8)
        return unpacked(packed_zeros)[:, : self.shape[0]].T.contiguous()

    def in_file(self, rows: Rows) -> CodesInFile:
        """Rows as they lie, eight columns to a word."""
        part, zeros, codes = rows.slice(), self.zeros(), self.parts["codes"]
        row_bytes = codes.shape[1] * 4
        offset = codes.offset + rows.start * row_bytes
        zero_points = None if zeros is None else zeros[part]
        return CodesInFile(codes.path, offset, rows.step * row_bytes, self.scales()[part], zero_points)


def fold(tensors: dict[str, TensorEntry], group: int | None, symmetric: bool) -> dict[str, TensorEntry]:
    """Puts the tensors of `pack-quantized` weights together; what is not quantised stays as it is.

    Args:
        tensors: By key.
        group: Columns that share a scale; None: whole rows.
        symmetric: Whether there are no zero points.

    Raises:
        CheckpointError: A tensor of a weight is missing, or of the wrong dtype or shape; columns are grouped by the
            order of activations.
    """

    def entry(stem: str, codes: TensorEntry) -> CompressedInt4:
        key = f"{stem}.weight"
        if f"{key}_g_idx" in tensors:
            raise CheckpointError(
                f"{codes.path}: tensor {key}_g_idx groups columns in the order of activations (actorder), which kt_sft "
                "does not read; take or make a BF16 copy of the model, or one quantised without it"
            )
        parts = {"codes": codes, "scales": companion(tensors, key, (f"{key}_scale",), "scales", codes)}
        parts["shape"] = companion(tensors, key, (f"{key}_shape",), "shape", codes)
        require(parts["shape"], (2,), ("I64", "I32"), "shapes of packed weights")
        rows, columns = (int(size) for size in read_matrix(parts["shape"]))
        require(codes, (rows, -(-columns // 8)), ("I32",), f"packed codes of a matrix of {rows} x {columns}")
        groups = 1 if group is None else -(-columns // group)
        require(parts["scales"], (rows, groups), SCALES, f"scales of {codes.key}")
        if not symmetric:
            parts["zeros"] = companion(tensors, key, (f"{key}_zero_point",), "zero points", codes)
            require(parts["zeros"], (-(-rows // 8), groups), ("I32",), f"zero points of {codes.key}")
        return CompressedInt4(key, codes.path, "INT4", (rows, columns), 0, codes.nbytes, parts, group, not symmetric)

    return fold_each(tensors, "weight_packed", entry, ("weight_scale", "weight_shape", "weight_zero_point"))


def fold_each(
    tensors: dict[str, TensorEntry],
    codes: str,
    entry: Callable[[str, TensorEntry], Int4Entry],
    others: tuple[str, ...],
) -> dict[str, TensorEntry]:
    """Puts an entry in the place of each weight's stored tensors; what is not quantised stays as it is.

    Args:
        tensors: By key.
        codes: The last part of the keys of codes.
        entry: Makes one of what stands before that, and the codes.
        others: The last parts of the keys of what belongs to codes.

    Raises:
        CheckpointError: A weight is there plain as well, or a part of one is without its codes; and as `entry`.
    """
    found: dict[str, TensorEntry] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last == codes:
            folded = entry(stem, tensor)
            found[folded.key] = folded
            used |= {part.key for part in folded.parts.values()}
    rest = {key: tensor for key, tensor in tensors.items() if key not in used}
    for key, tensor in rest.items():
        if key in found:
            raise CheckpointError(f"{tensor.path}: tensor {key} is there twice, plain and quantised")
        if key.rpartition(".")[2] in others:
            raise CheckpointError(f"{tensor.path}: tensor {key} has no codes beside it")
    return found | rest

"""FP8 checkpoints: E4M3 codes, and a scale for each block, each row or the whole of a matrix.

- `fp8` (DeepSeek-V3, Qwen3-FP8, MiniMax-M2): beside `weight` stands `weight_scale_inv`, one value per block of
  `weight_block_size`, which, in spite of its name, the code is multiplied by
  (https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md).
- `compressed-tensors` of the format `float-quantized`: `weight_scale` per row, per block or one for all.
Scales for activations are only carried along: products here are computed with unrounded activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kt_sft.loading.checkpoint import TensorEntry
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.sources.entries import (
    CodesInFile,
    PartRows,
    QuantisedEntry,
    Rows,
    companion,
    read_matrix,
    read_span,
)

_LARGEST = 448.0
#: Weights that are dequantised at a time, where not all of a matrix must be.
_VALUES_AT_ONCE = 1 << 22
_SCALES = ("BF16", "F16", "F32", "F8_E8M0")
#: The block that the engine's fp8 has.
_ENGINE_BLOCK = (128, 128)


@dataclass(frozen=True)
class Fp8Entry(QuantisedEntry):
    """E4M3 codes [rows, columns] or [experts, rows, columns]; parts "codes", "scales", and what belongs to activations.

    `block` is (rows, columns) of a block; whole rows are (1, columns), whole matrices (rows, columns).
    `powers` says that scales are powers of two.
    """

    block: tuple[int, int]
    powers: bool

    @property
    def per_row(self) -> bool:
        """Whether a scale is for whole rows: for one of them or for all."""
        return self.block[1] == self.shape[-1] and self.block[0] in (1, self.shape[-2])

    @property
    def storage(self) -> dict[str, Any] | None:
        """Blocks of 128 x 128, or whole rows."""
        if self.block != _ENGINE_BLOCK and not self.per_row:
            return None
        group = 128 if self.block == _ENGINE_BLOCK else 0
        return {"expert_format": "fp8", "group_size": group, "zero_point": False, "scale_dtype": None}

    @property
    def description(self) -> str:
        """Its format in words."""
        kind = "with a scale for whole rows" if self.per_row else f"in blocks of {self.block[0]} x {self.block[1]}"
        return f"FP8 {kind}"

    def cuts(self, rows: Rows) -> bool:
        """Blocks of a fused tensor may hold rows of gate and of up."""
        return not self.per_row and (rows.step != 1 or rows.start % self.block[0] != 0)

    def bands(self) -> Iterator[Rows]:
        """Whole blocks, about `_VALUES_AT_ONCE` weights at a time."""
        height, width = self.shape[-2:]
        step = max(1, _VALUES_AT_ONCE // (self.block[0] * width)) * self.block[0]
        return (Rows(0, start, 1, min(step, height - start)) for start in range(0, height, step))

    def in_file(self, rows: Rows) -> CodesInFile:
        """Rows as they lie, with FP32 scales."""
        codes, columns = self.parts["codes"], self.shape[-1]
        scales = self._scales(rows)
        if self.per_row:
            scales = scales[self._bands(rows)]
        offset = codes.offset + (rows.matrix * self.shape[-2] + rows.start) * columns
        return CodesInFile(codes.path, offset, rows.step * columns, scales)

    def dequantised(self, rows: Rows) -> Tensor:
        """Code x scale of some rows."""
        columns = self.shape[-1]
        start = (rows.matrix * self.shape[-2] + rows.start) * columns
        span = read_span(self.parts["codes"], start, ((rows.count - 1) * rows.step + 1) * columns)
        codes = span.reshape(-1, columns)[:: rows.step].float()
        scales = self._scales(rows)
        if not bool((scales.isfinite() & ~scales.signbit()).all()):
            stored = self.parts["scales"]
            raise CheckpointError(f"{stored.path}: tensor {stored.key} holds scales that are negative or not finite")
        return codes.mul_(self._spread(scales, rows, columns))

    @property
    def rewritable(self) -> bool:
        """Eight bits keep a change."""
        return True

    def rewritten(self, rows: Rows, values: Tensor) -> tuple[dict[str, PartRows], Tensor]:
        """The largest magnitude of each block onto the largest code, the scale rounded up to its dtype."""
        height, width = values.shape
        band, group = self.block
        cut = rows.start % band or ((rows.start + height) % band and rows.start + height != self.shape[-2])
        if cut or (rows.step != 1 and band != 1):
            raise CheckpointError(f"{self.path}: tensor {self.key} ({self.description}) is cut within a block")
        padded = functional.pad(values.abs(), (0, -width % group, 0, -height % band))
        largest = padded.reshape(-(-height // band), band, -(-width // group), group).amax(dim=(1, 3))
        scales = _rounded_up(largest / _LARGEST, self.parts["scales"].dtype_name, self.powers)
        spread = scales.float().repeat_interleave(band, dim=0)[:height].repeat_interleave(group, dim=1)[:, :width]
        codes = (values / spread).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        bands = -(-self.shape[-2] // band)
        parts = {
            "codes": PartRows(rows.matrix * self.shape[-2] + rows.start, rows.step, codes),
            "scales": PartRows(rows.matrix * bands + rows.start // band, rows.step, scales),
        }
        return parts, codes.float() * spread

    def _spread(self, scales: Tensor, rows: Rows, columns: int) -> Tensor:
        """A scale for every weight of some rows, from those of their bands."""
        return scales[self._bands(rows)].repeat_interleave(self.block[1], dim=1)[:, :columns]

    def _bands(self, rows: Rows) -> Tensor:
        """The band of each row, counted from that of the first."""
        places = torch.arange(rows.start, rows.start + (rows.count - 1) * rows.step + 1, rows.step, device="cpu")
        return places // self.block[0] - rows.start // self.block[0]

    def _scales(self, rows: Rows) -> Tensor:
        """FP32 [bands, groups] of the bands from the first row's to the last one's."""
        band, group = self.block
        groups, bands = -(-self.shape[-1] // group), -(-self.shape[-2] // band)
        scales = read_matrix(self.parts["scales"], rows.matrix).reshape(bands, groups).float()
        last = rows.start + (rows.count - 1) * rows.step
        return scales[rows.start // band : last // band + 1]


def _rounded_up(scales: Tensor, dtype_name: str, powers: bool) -> Tensor:
    """In a dtype, never below: so that the largest magnitude stays within the largest code."""
    scales = torch.where(scales > 0, scales.clamp(min=2.0**-120), 1.0)
    if powers or dtype_name == "F8_E8M0":
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F8_E8M0": torch.float8_e8m0fnu}.get(dtype_name)
    if dtype is None:
        return scales
    rounded = scales.to(dtype)
    if dtype is torch.float8_e8m0fnu:
        return rounded
    above = (rounded.view(torch.int16) + 1).view(dtype)  # the next larger positive number
    return torch.where(rounded.float() < scales, above, rounded)


def fold(
    tensors: dict[str, TensorEntry], block: tuple[int, int] | None, powers: bool = False
) -> dict[str, TensorEntry]:
    """Puts FP8 weights and their scales together; what is not FP8 stays as it is.

    Args:
        tensors: By key.
        block: Of the config, for scales that are neither of whole rows nor of the whole matrix.
        powers: Whether scales are powers of two.

    Raises:
        CheckpointError: A weight has no scales or some of the wrong shape, or scales have no weight.
    """
    found: dict[str, TensorEntry] = {}
    used: set[str] = set()
    for key, entry in tensors.items():
        if entry.dtype_name != "F8_E4M3":
            continue
        scales = companion(tensors, key, (f"{key}_scale_inv", f"{key}_scale"), "scales", entry)
        if len(entry.shape) not in (2, 3) or 0 in entry.shape:
            raise CheckpointError(f"{entry.path}: tensor {key} holds FP8 codes in the shape {list(entry.shape)}")
        shape = _block(entry, scales, block)
        powers_here = powers or scales.dtype_name == "F8_E8M0"
        activations = [f"{key.rpartition('.')[0]}.{name}" for name in ("input_scale", "activation_scale")]
        parts = {"codes": entry, "scales": scales} | {k: tensors[k] for k in activations if k in tensors}
        found[key] = Fp8Entry(key, entry.path, "FP8", entry.shape, 0, entry.nbytes, parts, shape, powers_here)
        used.update(part.key for part in parts.values())
    for key, entry in tensors.items():
        if key in found or key in used:
            continue
        stem = key.removesuffix("_scale_inv").removesuffix("_scale")
        if key.endswith(("_scale_inv", ".weight_scale")) and f"{stem}.weight" not in found:
            raise CheckpointError(f"{entry.path}: tensor {key} holds scales, but {stem} is no FP8 weight beside it")
        found[key] = entry
    return found


def _block(entry: TensorEntry, scales: TensorEntry, block: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) that share a scale, by the scales' shape."""
    rows, columns = entry.shape[-2:]
    lead = entry.shape[:-2]
    if scales.dtype_name not in _SCALES:
        raise CheckpointError(
            f"{scales.path}: tensor {scales.key} holds {scales.dtype_name} values, but scales of FP8 weights are "
            f"{', '.join(_SCALES)}"
        )
    shapes = {(*lead, rows, 1): (1, columns), (*lead, 1, 1): (rows, columns)}
    if not lead:
        shapes |= {(): (rows, columns), (1,): (rows, columns), (rows,): (1, columns)}
    if block is not None:
        shapes[(*lead, -(-rows // block[0]), -(-columns // block[1]))] = block
    if scales.shape not in shapes:
        expected = (
            ""
            if block is None
            else f"; blocks of {block[0]} x {block[1]} have {[*lead, -(-rows // block[0]), -(-columns // block[1])]}"
        )
        raise CheckpointError(
            f"{scales.path}: tensor {scales.key} has shape {list(scales.shape)}, which are no scales of {entry.key} "
            f"{list(entry.shape)}{expected}"
        )
    return shapes[scales.shape]

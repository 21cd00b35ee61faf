"""MXFP4 checkpoints (gpt-oss): E2M1 codes and a power of two for each 32 columns, in fused tensors of all experts.

`gate_up_proj_blocks` [E, 2I, H / 32, 16] holds two codes to a byte, the even column in the low half; beside it stands
`gate_up_proj_scales` [E, 2I, H / 32], E8M0. Gate and up rows alternate. The same for `down_proj`: [E, H, I / 32, 16].
Formats: OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1; names: https://huggingface.co/openai/gpt-oss-20b.
Rows are those that the engine reads; transformers keeps such parameters transposed, [E, H, 2I].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kt_sft.loading.checkpoint import TensorEntry
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.sources.entries import CodesInFile, QuantisedEntry, Rows, companion, read_span, require, unpacked

GROUP = 32
_BLOCKS, _SCALES = "_blocks", "_scales"
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Mxfp4Entry(QuantisedEntry):
    """[experts, rows, columns]; parts "codes" and "scales"."""

    @property
    def turned(self) -> bool:
        """transformers' parameter is [experts, columns, rows]."""
        return True

    @property
    def storage(self) -> dict[str, Any]:
        """The engine's mxfp4."""
        return {"expert_format": "mxfp4", "group_size": 32, "zero_point": False, "scale_dtype": None}

    @property
    def description(self) -> str:
        """Its format in words."""
        return "MXFP4"

    def in_file(self, rows: Rows) -> CodesInFile:
        """Rows as they lie: gate's and up's are two apart."""
        codes, row_bytes = self.parts["codes"], self.shape[-1] // 2
        offset = codes.offset + (rows.matrix * self.shape[-2] + rows.start) * row_bytes
        scales = self._rows("scales", rows, self.shape[-1] // GROUP)
        return CodesInFile(codes.path, offset, rows.step * row_bytes, scales)

    def dequantised(self, rows: Rows) -> Tensor:
        """Code x scale of some rows."""
        columns = self.shape[-1]
        values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device="cpu")
        codes = values[unpacked(self._rows("codes", rows, columns // 2)).int()]
        scales = self._rows("scales", rows, columns // GROUP)
        if bool((scales == 255).any()):
            raise CheckpointError(f"{self.path}: the scales of tensor {self.key} hold a code that is no number")
        exponents = (scales.int() - 127).repeat_interleave(GROUP, dim=1)
        return torch.ldexp(codes, exponents)

    def _rows(self, part: str, rows: Rows, width: int) -> Tensor:
        start = (rows.matrix * self.shape[-2] + rows.start) * width
        span = read_span(self.parts[part], start, ((rows.count - 1) * rows.step + 1) * width)
        return span.view(torch.uint8).reshape(-1, width)[:: rows.step]


def fold(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Puts blocks and scales together; what is not MXFP4 stays as it is.

    Raises:
        CheckpointError: One is without the other, or of the wrong dtype or shape.
    """
    found: dict[str, TensorEntry] = {}
    used: set[str] = set()
    for name, blocks in tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        key = name.removesuffix(_BLOCKS)
        scales = companion(tensors, key, (key + _SCALES,), "scales", blocks)
        if len(blocks.shape) != 4 or 0 in blocks.shape:
            raise CheckpointError(
                f"{blocks.path}: tensor {name} has shape {list(blocks.shape)}, but blocks of MXFP4 codes are "
                "[experts, rows, columns / 32, 16]"
            )
        require(blocks, (*blocks.shape[:3], GROUP // 2), ("U8",), "blocks of MXFP4 codes")
        require(scales, blocks.shape[:3], ("U8", "F8_E8M0"), f"scales of {name}")
        shape = (*blocks.shape[:2], blocks.shape[2] * GROUP)
        parts = {"codes": blocks, "scales": scales}
        found[key] = Mxfp4Entry(key, blocks.path, "MXFP4", shape, 0, blocks.nbytes, parts)
        used |= {name, scales.key}
    for key, entry in tensors.items():
        if key in used:
            continue
        if key in found:
            raise CheckpointError(f"{entry.path}: tensor {key} is there twice, plain and as {key}{_BLOCKS}")
        if key.endswith(_SCALES):
            raise CheckpointError(f"{entry.path}: tensor {key} has no {key.removesuffix(_SCALES)}{_BLOCKS} beside it")
        found[key] = entry
    return found

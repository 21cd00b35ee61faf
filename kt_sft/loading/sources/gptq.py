"""Checkpoints of GPTQ and AWQ: four-bit integers packed along the other axis, turned once, on load, without loss.

GPTQ (AutoGPTQ, GPTQModel), for a matrix of [rows, columns]: `qweight` [columns / 8, rows] int32 holds eight
neighbouring columns each, the first in the lowest bits; `scales` [groups, rows]; `qzeros` [groups, rows / 8], packed
likewise along rows, each one less than the zero (`checkpoint_format: gptq_v2`: the zero itself); `g_idx` [columns], the
group of each column. The one is taken off, and has to be added, in the packed words: where a zero is 0, it is borrowed
from the row beside it. https://github.com/ModelCloud/GPTQModel, utils/model.py, convert_gptq_v1_to_v2_format_module

AWQ (AutoAWQ, `version: gemm`): `qweight` [columns, rows / 8] int32 holds eight neighbouring rows each, from the lowest
bits on rows 0, 2, 4, 6, 1, 3, 5, 7 of them; `qzeros` [groups, rows / 8] in the same order; `scales` [groups, rows].
https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.engine.store import LayerStore
from kt_sft.loading.checkpoint import TensorEntry
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.mapping import MatrixRead
from kt_sft.loading.sources.entries import Rows, companion, packed, read_matrix, require, unpacked
from kt_sft.loading.sources.int4 import SCALES, Int4Entry, fold_each

#: Where AWQ puts rows 0 to 7 of eight, counted in codes from the lowest bits.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
#: A one in each of eight codes.
_ONES = 0x11111111
_CODES, _PARTS = "qweight", ("scales", "qzeros", "g_idx")


class TurnedInt4(Int4Entry):
    """Packed along the other axis."""

    @property
    def turns(self) -> bool:
        """Its codes are turned to become rows."""
        return True

    def put(self, store: LayerStore, read: MatrixRead, rows: Rows) -> None:
        """Hands over codes that were turned into rows."""
        part, zeros = rows.slice(), self.zeros()
        store.write_codes(
            read.matrix,
            read.expert,
            self.codes()[part].contiguous(),
            self.scales()[part],
            None if zeros is None else zeros[part],
        )


@dataclass(frozen=True)
class GptqInt4(TurnedInt4):
    """GPTQ's; `one_less` says that stored zeros are."""

    one_less: bool

    def codes(self) -> Tensor:
        """Eight columns at a time, turned."""
        return read_matrix(self.parts["codes"]).T.contiguous().view(torch.uint8)

    def scales(self) -> Tensor:
        """Turned."""
        return read_matrix(self.parts["scales"]).T.contiguous()

    def zeros(self) -> Tensor | None:
        """Turned.

        Raises:
            CheckpointError: The config says that there are none, and one is not 8.
        """
        words = read_matrix(self.parts["zeros"])
        if self.one_less:
            words = words + _ONES  # modulo 2^32, as it was taken off
        stored = unpacked(words.view(torch.uint8)).T.contiguous()
        if self.zero_point:
            return stored
        if bool((stored != 8).any()):
            zeros = self.parts["zeros"]
            raise CheckpointError(
                f"{zeros.path}: tensor {zeros.key} holds zero points, which a checkpoint with sym: true has not; is "
                "its checkpoint_format right?"
            )
        return None


class AwqInt4(TurnedInt4):
    """AWQ's."""

    def codes(self) -> Tensor:
        """Turned code by code."""
        return packed(_awq_rows(read_matrix(self.parts["codes"])))

    def scales(self) -> Tensor:
        """Turned."""
        return read_matrix(self.parts["scales"]).T.contiguous()

    def zeros(self) -> Tensor | None:
        """Turned code by code."""
        return _awq_rows(read_matrix(self.parts["zeros"]))


def _awq_rows(stored: Tensor) -> Tensor:
    """[n, rows / 8] int32 as [rows, n] uint8, one code each."""
    eights = unpacked(stored.view(torch.uint8)).unflatten(1, (-1, 8))
    return eights[:, :, list(_AWQ_PLACES)].flatten(1).T.contiguous()


def fold_gptq(
    tensors: dict[str, TensorEntry], group: int | None, symmetric: bool, one_less: bool
) -> dict[str, TensorEntry]:
    """Puts the tensors of GPTQ weights together; what is not quantised stays as it is.

    Args:
        tensors: By key.
        group: Columns that share a scale; None: whole rows.
        symmetric: Whether every zero is 8.
        one_less: Whether stored zeros are one less than the zeros.

    Raises:
        CheckpointError: A tensor of a weight is missing, or of the wrong dtype or shape; columns are grouped by the
            order of activations.
    """

    def entry(stem: str, codes: TensorEntry) -> GptqInt4:
        _require_matrix(codes)
        rows, columns = codes.shape[1], codes.shape[0] * 8
        parts = _parts(tensors, stem, codes, (rows, columns), group)
        require(codes, (columns // 8, rows), ("I32",), "packed codes of GPTQ")
        if f"{stem}.g_idx" in tensors:
            parts["g_idx"] = tensors[f"{stem}.g_idx"]
            _check_order(parts["g_idx"], columns, group or columns)
        facts = (f"{stem}.weight", codes.path, "INT4", (rows, columns), 0, codes.nbytes)
        return GptqInt4(*facts, parts, group, not symmetric, one_less)

    return fold_each(tensors, _CODES, entry, _PARTS)


def fold_awq(tensors: dict[str, TensorEntry], group: int | None) -> dict[str, TensorEntry]:
    """Puts the tensors of AWQ weights together; what is not quantised stays as it is.

    Args:
        tensors: By key.
        group: Columns that share a scale; None: whole rows.

    Raises:
        CheckpointError: A tensor of a weight is missing, or of the wrong dtype or shape.
    """

    def entry(stem: str, codes: TensorEntry) -> AwqInt4:
        _require_matrix(codes)
        columns, rows = codes.shape[0], codes.shape[1] * 8
        parts = _parts(tensors, stem, codes, (rows, columns), group)
        require(codes, (columns, rows // 8), ("I32",), "packed codes of AWQ")
        return AwqInt4(f"{stem}.weight", codes.path, "INT4", (rows, columns), 0, codes.nbytes, parts, group, True)

    return fold_each(tensors, _CODES, entry, _PARTS)


def _require_matrix(codes: TensorEntry) -> None:
    if len(codes.shape) != 2:
        raise CheckpointError(f"{codes.path}: tensor {codes.key} has shape {list(codes.shape)}, expected a matrix")


def _parts(
    tensors: dict[str, TensorEntry], stem: str, codes: TensorEntry, shape: tuple[int, int], group: int | None
) -> dict[str, TensorEntry]:
    """A weight's tensors, checked."""
    rows, columns = shape
    groups = 1 if group is None else -(-columns // group)
    scales = companion(tensors, stem, (f"{stem}.scales",), "scales", codes)
    zeros = companion(tensors, stem, (f"{stem}.qzeros",), "zero points", codes)
    require(scales, (groups, rows), SCALES, f"scales of {codes.key}")
    require(zeros, (groups, -(-rows // 8)), ("I32",), f"zero points of {codes.key}")
    if rows % 8:
        raise CheckpointError(f"{codes.path}: tensor {codes.key} has {rows} rows, which are not packed by eight")
    return {"codes": codes, "scales": scales, "zeros": zeros}


def _check_order(g_idx: TensorEntry, columns: int, group: int) -> None:
    require(g_idx, (columns,), ("I32", "I64"), "groups of columns")
    if not torch.equal(read_matrix(g_idx).long(), torch.arange(columns, device="cpu") // group):
        raise CheckpointError(
            f"{g_idx.path}: tensor {g_idx.key} groups columns in the order of activations (desc_act), which kt_sft "
            "does not read; take or make a BF16 copy of the model, or one quantised with desc_act: false"
        )

"""A quantised weight of a checkpoint: several tensors on disk that are one matrix of values.

Everything that finds out which tensor feeds which parameter sees one entry under the weight's own key and shape. Places
in it are counted in weights, from 0, where a plain tensor's are bytes of its file.
"""

from __future__ import annotations

import abc
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kt_sft.config import KTConfig
from kt_sft.engine.store import LayerStore
from kt_sft.loading.checkpoint import TensorEntry
from kt_sft.loading.errors import CheckpointError, UnsupportedModelError
from kt_sft.loading.mapping import MatrixRead, MatrixView, ModulePlan

#: The dtypes of codes and scales, beside those of weights.
STORED_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class Rows:
    """`count` rows of one matrix of an entry, `step` apart; an entry of one matrix has number 0 only."""

    matrix: int
    start: int
    step: int
    count: int

    def slice(self) -> slice:
        """Of a tensor's rows."""
        return slice(self.start, self.start + (self.count - 1) * self.step + 1, self.step)


@dataclass(frozen=True)
class CodesInFile:
    """Codes (or BF16 values) that lie on disk as the engine reads them, row by row, and what belongs to them.

    `offset` is the first code's byte, `row_stride` the bytes from row to row; scales and zero points are those that
    `LayerStore.write_codes` takes.
    """

    path: str
    offset: int
    row_stride: int
    scales: Tensor | None
    zero_points: Tensor | None = None


@dataclass(frozen=True)
class PartRows:
    """New rows of a stored tensor, which is taken as [rows, ...]: `values` from row `first` on, `step` apart."""

    first: int
    step: int
    values: Tensor


@dataclass
class RequantisationError:
    """What quantising changed weights again did to them: sums over all of them."""

    count: int = 0
    squared_error: float = 0.0
    squared_values: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, exact: Tensor, stored: Tensor) -> None:
        """One matrix, as it should be and as it is stored; from any thread."""
        squared_error = (exact - stored).square_().sum(dtype=torch.float64).item()
        squared_values = exact.square().sum(dtype=torch.float64).item()
        with self.lock:
            self.count += 1
            self.squared_error += squared_error
            self.squared_values += squared_values

    @property
    def relative(self) -> float:
        """Root of sum (exact - stored)^2 / sum exact^2."""
        return math.sqrt(self.squared_error / self.squared_values) if self.squared_values else 0.0


@dataclass(frozen=True)
class QuantisedEntry(TensorEntry, abc.ABC):
    """A weight of [rows, columns] or [experts, rows, columns], and the tensors that it is stored in.

    `path` is that of its codes. `parts` says what each stored tensor is.
    """

    parts: Mapping[str, TensorEntry]

    @property
    def itemsize(self) -> int:
        """Places are counted in weights."""
        return 1

    @property
    def dtype(self) -> torch.dtype:
        """What its values are computed in."""
        return torch.float32

    def stored(self) -> tuple[TensorEntry, ...]:
        """The tensors on disk."""
        return tuple(self.parts.values())

    @property
    @abc.abstractmethod
    def storage(self) -> dict[str, Any] | None:
        """The store that takes its codes and scales as they are, as LayerStore's arguments; None if there is none."""

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """Its format in words."""

    def cuts(self, rows: Rows) -> bool:
        """Whether a store of `storage` cannot take some rows alone, because they share scales with others."""
        return False

    def bands(self) -> Iterator[Rows]:
        """All rows of an entry that is one matrix, some at a time where that costs nothing."""
        yield Rows(0, 0, 1, self.shape[-2])

    @property
    def turns(self) -> bool:
        """Whether its codes must be turned to become the engine's rows, so that these lie in no file."""
        return False

    def in_file(self, rows: Rows) -> CodesInFile:
        """Where the codes of some rows lie, for an entry that need not turn them; reads their scales.

        Raises:
            CheckpointError: They cannot be read.
        """
        raise NotImplementedError

    def put(self, store: LayerStore, read: MatrixRead, rows: Rows) -> None:
        """Hands codes and scales to a store of `storage` as they are."""
        found = self.in_file(rows)
        assert found.scales is not None
        store.read_codes(
            read.matrix,
            read.expert,
            path=found.path,
            offset=found.offset,
            row_stride=found.row_stride,
            scales=found.scales,
            zero_points=found.zero_points,
        )

    @abc.abstractmethod
    def dequantised(self, rows: Rows) -> Tensor:
        """Code x scale of some rows, FP32 [rows, columns]."""

    @property
    def rewritable(self) -> bool:
        """Whether changed values can be quantised again the same way, and not lose the change in it."""
        return False

    def rewritten(self, rows: Rows, values: Tensor) -> tuple[dict[str, PartRows], Tensor]:
        """Quantises values again, the way the entry is: what each stored tensor then holds, and what that says.

        Args:
            rows: Where they go.
            values: FP32 [rows, columns].

        Returns:
            By the name in `parts` what changes there, and code x scale of it, FP32.

        Raises:
            CheckpointError: There is no way back into this format.
        """
        raise self.unwritable()

    def unwritable(self) -> CheckpointError:
        """The error that says so."""
        return CheckpointError(
            f"{self.path}: tensor {self.key} is {self.description}, in which a merged adapter would be rounded away; "
            "keep the adapter beside the model (chat and api take both), or merge it into a BF16 or FP8 copy of it"
        )

    def rows_of(self, view: MatrixView) -> Rows:
        """Which rows a view of this entry takes.

        Raises:
            UnsupportedModelError: It does not take whole rows, one matrix's alone.
        """
        height, width = self.shape[-2:]
        matrix, place = divmod(view.offset, height * width)
        start, column = divmod(place, width)
        step, over = divmod(view.row_stride, width)
        if view.cols != width or view.col_stride != 1 or column or over or start + (view.rows - 1) * step >= height:
            raise UnsupportedModelError(
                f"{self.path}: tensor {self.key} ({self.description}) would have to be cut across its scales"
            )
        return Rows(matrix, start, step, view.rows)


def whole(entry: QuantisedEntry) -> Rows:
    """All rows of an entry that is one matrix."""
    return Rows(0, 0, 1, entry.shape[-2])


def resolve_storage(plan: ModulePlan, config: KTConfig) -> dict[str, Any]:
    """How one module's experts are stored, as LayerStore's arguments.

    `expert_format: auto`, or the very format of the checkpoint, keeps its codes and scales; any other quantises again.

    Raises:
        CheckpointError: The module's matrices are in several formats, or in one that no store has.
    """
    entries = {entry.key: entry for read in plan.reads if isinstance(entry := read.view.entry, QuantisedEntry)}
    if not entries:
        return config.storage
    first = next(iter(entries.values()))
    storage, alike = first.storage, all(entry.storage == first.storage for entry in entries.values())
    alike = alike and len(entries) == len({read.view.entry.key for read in plan.reads})
    if storage is not None and alike and not _cut(plan) and _asks_for(config, storage):
        return storage
    if config.expert_format == "auto":
        what = f"hold {first.description}" if alike else "differ in their format"
        raise CheckpointError(
            f"{first.path}: the experts of {plan.name} {what}, which the engine cannot take as they are; set "
            "expert_format (int8, for one), and they are quantised again"
        )
    return config.storage


def _cut(plan: ModulePlan) -> bool:
    found = ((read.view.entry, read.view) for read in plan.reads)
    return any(entry.cuts(entry.rows_of(view)) for entry, view in found if isinstance(entry, QuantisedEntry))


def _asks_for(config: KTConfig, storage: Mapping[str, Any]) -> bool:
    if config.expert_format == "auto":
        return True
    if config.expert_format != storage["expert_format"] or (config.zero_point and not storage["zero_point"]):
        return False
    return config.group_size in (None, storage["group_size"])


def load_matrix(read: MatrixRead, store: LayerStore, entry: QuantisedEntry) -> None:
    """Fills one matrix of a store: with the codes as they are where the store takes them, else quantised again."""
    rows = entry.rows_of(read.view)
    if keeps(entry, storage_of(store)):
        entry.put(store, read, rows)
    else:
        values = entry.dequantised(rows)
        store.write(read.matrix, read.expert, values)


def keeps(entry: QuantisedEntry, storage: Mapping[str, Any]) -> bool:
    """Whether a store takes an entry's codes and scales as they are."""
    return entry.storage == {"scale_dtype": None, **storage}


def storage_of(store: LayerStore) -> dict[str, Any]:
    """A store's format, as LayerStore's arguments."""
    return {
        "expert_format": store.expert_format,
        "group_size": store.group_size,
        "zero_point": store.zero_point,
        "scale_dtype": store.scale_dtype,
    }


def read_span(entry: TensorEntry, start: int, count: int) -> Tensor:
    """`count` values of a stored tensor from value `start` on, on the CPU.

    Raises:
        CheckpointError: The file cannot be read or ends early.
    """
    dtype = STORED_DTYPES[entry.dtype_name]
    data = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="cpu")
    place, filled = entry.offset + start * dtype.itemsize, data.numpy().data
    try:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while filled:
                got = os.preadv(descriptor, [filled], place)
                if got == 0:
                    raise CheckpointError(f"{entry.path}: tensor {entry.key} is cut off")
                place, filled = place + got, filled[got:]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{entry.path}: tensor {entry.key} cannot be read ({error.strerror})") from error
    return data.view(dtype)


def read_matrix(entry: TensorEntry, matrix: int = 0) -> Tensor:
    """A stored tensor of [rows, columns], or the matrix with that number of one of [matrices, rows, ...]."""
    shape = entry.shape if len(entry.shape) <= 2 else entry.shape[1:]
    count = math.prod(shape)
    return read_span(entry, matrix * count, count).reshape(shape)


def write_rows(entry: TensorEntry, part: PartRows) -> None:
    """Puts rows into a stored tensor, in its file.

    Raises:
        CheckpointError: The file cannot be read or written.
    """
    width = part.values[0].numel()
    count = (len(part.values) - 1) * part.step + 1
    span = read_span(entry, part.first * width, count * width)
    span.reshape(count, width)[:: part.step] = part.values.reshape(-1, width)
    data = span.view(torch.uint8).numpy().tobytes()
    try:
        with open(entry.path, "r+b", buffering=0) as file:
            written = os.pwrite(file.fileno(), data, entry.offset + part.first * width * span.itemsize)
    except OSError as error:
        raise CheckpointError(f"{entry.path}: tensor {entry.key} cannot be written ({error})") from error
    if written != len(data):
        raise CheckpointError(f"{entry.path}: only {written} of {len(data)} bytes of tensor {entry.key} were written")


def unpacked(codes: Tensor) -> Tensor:
    """Four-bit codes [rows, bytes], the even column in the low half, as [rows, 2 bytes] uint8."""
    return torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)


def packed(codes: Tensor) -> Tensor:
    """The way back: [rows, columns] uint8 below 16 to [rows, columns / 2 rounded up]."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def require(entry: TensorEntry, shape: tuple[int, ...], dtypes: tuple[str, ...], what: str) -> None:
    """Checks what a stored tensor is.

    Raises:
        CheckpointError: Another shape or dtype; names file and tensor.
    """
    if entry.dtype_name not in dtypes:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.key} holds {entry.dtype_name} values, but {what} are {' or '.join(dtypes)}"
        )
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.key} has shape {list(entry.shape)}, but {what} have {list(shape)}"
        )


def companion(
    tensors: Mapping[str, TensorEntry], key: str, names: tuple[str, ...], what: str, of: TensorEntry
) -> TensorEntry:
    """The tensor that belongs to another one, under one of `names`.

    Raises:
        CheckpointError: It is not there.
    """
    for name in names:
        if name in tensors:
            return tensors[name]
    raise CheckpointError(
        f"{of.path}: tensor {of.key} has no {what}: the checkpoint lacks {names[0]}, so {key} is lost"
    )

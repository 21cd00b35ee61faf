"""Safetensors headers, read and checked by ourselves.

The rows of the experts are read with pread from where the header says they lie, so a header that lies would silently
train on other bytes: every entry is checked against the file before anything is read.
Format: https://huggingface.co/docs/safetensors/index#format (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kt_sft.loading.errors import CheckpointError

#: The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

#: The dtypes in which routed experts can be read.
READABLE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: where it lies and what it is."""

    key: str
    path: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the start of the file
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of experts' weights.

        Raises:
            CheckpointError: Experts in this dtype cannot be read.
        """
        if self.dtype_name not in READABLE_DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {self.key} holds {self.dtype_name} values; routed experts are read from "
                f"{', '.join(READABLE_DTYPES)} checkpoints in this version"
            )
        return READABLE_DTYPES[self.dtype_name]

    @property
    def itemsize(self) -> int:
        """Bytes from one value to the next."""
        return self.dtype.itemsize

    @property
    def turned(self) -> bool:
        """Whether its matrices lie transposed beside what transformers says of its key."""
        return False

    def stored(self) -> tuple[TensorEntry, ...]:
        """The tensors on disk that it is made of."""
        return (self,)

    def read(self) -> torch.Tensor:
        """The whole tensor on the CPU, for the small ones (biases).

        Raises:
            CheckpointError: Unreadable dtype, or the file ends early.
        """
        dtype = self.dtype
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = bytearray(file.read(self.nbytes))
        if len(data) != self.nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {self.key} is cut off, the file is shorter than its header says"
            )
        if not data:
            return torch.empty(self.shape, dtype=dtype, device="cpu")
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape)


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Reads and checks the header of one safetensors file.

    Returns:
        The file's tensors by key.

    Raises:
        CheckpointError: No safetensors file, truncated, or entries that contradict each other or the file.
    """
    path = os.fspath(path)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{path}: truncated or no safetensors file ({size} bytes, the header would take {length})"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    entries = _parse(path, raw, data_start=8 + length, data_size=size - 8 - length)
    _check_overlaps(path, entries)
    return {entry.key: entry for entry in entries}


def _parse(path: str, raw: bytes, *, data_start: int, data_size: int) -> list[TensorEntry]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{path}: the header names {key} twice")
            found[key] = value
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object")
    return [
        _entry(path, key, value, data_start=data_start, data_size=data_size)
        for key, value in header.items()
        if key != "__metadata__"
    ]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: str, key: str, value: Any, *, data_start: int, data_size: int) -> TensorEntry:
    where = f"{path}: tensor {key}"
    if not isinstance(value, Mapping) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where} has an incomplete header entry")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"{where} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"{where} has the impossible offsets {offsets!r}")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where} ends ({end}) before it begins ({begin})")
    if end > data_size:
        raise CheckpointError(
            f"{where} reaches to byte {end} of the data, the file holds {data_size}: truncated or damaged"
        )
    if dtype not in _BITS:
        raise CheckpointError(f"{where} has the unknown dtype {dtype!r}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        raise CheckpointError(f"{where} of dtype {dtype} and shape {shape} cannot take {end - begin} bytes")
    return TensorEntry(key, path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_overlaps(path: str, entries: list[TensorEntry]) -> None:
    filled = sorted((entry for entry in entries if entry.nbytes), key=lambda entry: entry.offset)
    for first, second in itertools.pairwise(filled):
        if first.offset + first.nbytes > second.offset:
            raise CheckpointError(f"{path}: tensors {first.key} and {second.key} overlap")


class Checkpoint:
    """All tensors of a checkpoint, from one safetensors file or the shards of an index."""

    def __init__(self, files: Iterable[str | os.PathLike[str]]):
        """Reads the headers of `files` and checks them against the index beside them, if there is one.

        Raises:
            CheckpointError: A file is missing, damaged, or no safetensors; a tensor appears twice; the index and the
                files disagree.
        """
        self.files = tuple(os.fspath(file) for file in files)
        self.tensors: dict[str, TensorEntry] = {}
        for file in self.files:
            self._add(file)
        for index in self._indexes():
            self._check_index(index)

    def identity(self) -> tuple[tuple[str, int, int], ...]:
        """What tells this checkpoint's content from another's: (file, bytes, modification time) of each file."""
        stats = [(os.path.realpath(file), os.stat(file)) for file in self.files]
        return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in sorted(stats, key=lambda pair: pair[0]))

    def _add(self, file: str) -> None:
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file}: only safetensors checkpoints can be read; convert it with save_pretrained")
        if not os.path.exists(file):
            raise CheckpointError(f"{file}: the checkpoint names this file, but it does not exist")
        for key, entry in read_header(file).items():
            if key in self.tensors:
                raise CheckpointError(f"tensor {key} appears twice, in {self.tensors[key].path} and in {file}")
            self.tensors[key] = entry

    def _indexes(self) -> list[Path]:
        if not self.files:
            return []
        return sorted(Path(self.files[0]).parent.glob("*.safetensors.index.json"))

    def _check_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            named = set(weight_map.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: no readable index of tensors ({error!r})") from error
        if named.isdisjoint(os.path.basename(file) for file in self.files):
            return  # the index of another checkpoint in the same folder
        for key, name in weight_map.items():
            entry = self.tensors.get(key)
            if entry is None or os.path.basename(entry.path) != name:
                raise CheckpointError(f"{index}: says that {name} holds tensor {key}, which it does not")

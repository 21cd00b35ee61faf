"""Safetensors headers, read and checked by ourselves.

The rows of the experts are read with pread from where the header says they lie, so a header that lies would silently
train on other bytes: every entry is checked against the file before anything is read.
Format: https://huggingface.co/docs/safetensors/index#format (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import logging
import math
import os
import reprlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kt_sft.config import local_rank_and_size
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.hashing import hash_span
from kt_sft.loading.hub import snapshot_of

logger = logging.getLogger("kt_sft")

#: The limit of the safetensors library itself; that of an index, too.
MAX_HEADER_BYTES = 100_000_000
#: Of a tensor and of its sizes: more than any has, and few enough that their product is no work.
_MOST_DIMENSIONS, _MOST = 64, 1 << 62
_LONGEST_NAME = 4096

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
        size = _size(path)
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
    _check_cover(path, entries, 8 + length, size)
    return {entry.key: entry for entry in entries}


def _size(path: str) -> int:
    """Of a file: one that is none, like a pipe, might never end."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise CheckpointError(f"{path}: is no file")
    return facts.st_size


def _json_object(path: str, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object with keys that are text, none of them twice.

    Raises:
        CheckpointError: It is none; `what` says what it should be.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if len(key) > _LONGEST_NAME:
                raise CheckpointError(f"{path}: the {what} has a name of {len(key)} characters")
            if key in found:
                raise CheckpointError(f"{path}: the {what} names {key} twice")
            for text in (key, value):
                # Half a surrogate pair is a character of JSON, but none of any text that could be shown.
                _ = isinstance(text, str) and text.encode()
            found[key] = value
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # also of text, and of numbers too long to be read
        raise CheckpointError(f"{path}: the {what} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: the {what} is no JSON object")
    return value


def _parse(path: str, raw: bytes, *, data_start: int, data_size: int) -> list[TensorEntry]:
    header = _json_object(path, raw, "header")
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ is not made of texts")
    return [
        _entry(path, key, value, data_start=data_start, data_size=data_size)
        for key, value in header.items()
        if key != "__metadata__"
    ]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME


def _entry(path: str, key: str, value: Any, *, data_start: int, data_size: int) -> TensorEntry:
    where = f"{path}: tensor {key}"
    if not isinstance(value, Mapping) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where} has an incomplete header entry")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"{where} has the impossible shape {_shortened(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"{where} has the impossible offsets {_shortened(offsets)}")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where} ends ({end}) before it begins ({begin})")
    if end > data_size:
        raise CheckpointError(
            f"{where} reaches to byte {end} of the data, the file holds {data_size}: truncated or damaged"
        )
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has the unknown dtype {_shortened(dtype)}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        raise CheckpointError(f"{where} of dtype {dtype} and shape {shape} cannot take {end - begin} bytes")
    return TensorEntry(key, path, dtype, tuple(shape), data_start + begin, end - begin)


def _shortened(value: Any) -> str:
    return reprlib.repr(value)


def _check_cover(path: str, entries: list[TensorEntry], start: int, end: int) -> None:
    """Every byte of the data belongs to one tensor, as the format has it: what is left over was meant for something."""
    before: TensorEntry | None = None
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if before is not None and entry.offset < start:
            raise CheckpointError(f"{path}: tensors {before.key} and {entry.key} overlap")
        if entry.offset > start:
            raise CheckpointError(f"{path}: {entry.offset - start} bytes before tensor {entry.key} belong to no tensor")
        before, start = entry, entry.offset + entry.nbytes
    if start != end:
        raise CheckpointError(f"{path}: the last {end - start} bytes belong to no tensor: damaged, or another header's")


def identity_of(files: Iterable[str]) -> tuple[tuple[str, int, int], ...]:
    """What `Checkpoint.identity` says of these files, which are not read."""
    stats = [(os.path.realpath(file), os.stat(file)) for file in files]
    return tuple((file, facts.st_size, facts.st_mtime_ns) for file, facts in sorted(stats, key=lambda pair: pair[0]))


def checkpoint_files(folder: Path) -> list[str]:
    """The safetensors files that transformers reads of a folder: the only one, or else those of the index.

    Raises:
        CheckpointError: There are none, or no readable index of them.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [os.fspath(single)]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [os.fspath(folder / name) for name in names]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: has neither {single.name} nor {index.name}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: no readable index of tensors ({error!r})") from error


def _check_place(file: str, folder: str) -> None:
    """Refuses a file that is not in `folder`, or is a link that leads out of it: another model's, or anything.

    The hub's cache is the exception: `snapshots/<revision>` holds links to `blobs` of the same repository.
    """
    real, home = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return
    snapshot = snapshot_of(home)
    if snapshot is not None and real.is_relative_to(os.path.realpath(snapshot.repository / "blobs")):
        return
    raise CheckpointError(
        f"{file}: is at {real}, outside the model's folder {home}; put the file itself there, or load the model from "
        "the folder that the files are in"
    )


class Checkpoint:
    """All tensors of a checkpoint, from one safetensors file or the shards of an index."""

    def __init__(self, files: Iterable[str | os.PathLike[str]], folder: str | os.PathLike[str] | None = None):
        """Reads the headers of `files` and checks them against the index beside them, if there is one.

        Args:
            files: The checkpoint's.
            folder: Where all of them must be; None: where each says that it is.

        Raises:
            CheckpointError: A file is missing, damaged, no safetensors or, by its name or as a symbolic link, in
                another place; a tensor is there twice with different values; the index names a tensor or a file that is
                not there. In which of the files a tensor is, the files say, as for transformers; where the index says
                another one, that is logged.
        """
        self.files = tuple(os.fspath(file) for file in files)
        self.tensors: dict[str, TensorEntry] = {}
        for file in self.files:
            _check_place(file, os.path.dirname(file) if folder is None else os.fspath(folder))
        for file in self.files:
            self._add(file)
        for index in self._indexes():
            self._check_index(index)

    def identity(self) -> tuple[tuple[str, int, int], ...]:
        """What tells this checkpoint's content from another's: (file, bytes, modification time) of each file."""
        return identity_of(self.files)

    def _add(self, file: str) -> None:
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file}: only safetensors checkpoints can be read; convert it with save_pretrained")
        if not os.path.exists(file):
            raise CheckpointError(f"{file}: the checkpoint names this file, but it does not exist")
        for key, entry in read_header(file).items():
            before = self.tensors.get(key)
            if before is not None and not _same_values(before, entry):
                raise CheckpointError(
                    f"tensor {key} appears twice with different values, in {before.path} and in {file}, and nothing "
                    "says which are right; copy or download the checkpoint again, without files of another one"
                )
            self.tensors[key] = entry

    def _indexes(self) -> list[Path]:
        if not self.files:
            return []
        return sorted(Path(self.files[0]).parent.glob("*.safetensors.index.json"))

    def _check_index(self, index: Path) -> None:
        try:
            if _size(os.fspath(index)) > MAX_HEADER_BYTES:
                raise CheckpointError(f"{index}: is too large for an index of tensors")
            raw = index.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{index}: no readable index of tensors ({error.strerror})") from error
        weight_map = _json_object(os.fspath(index), raw, "index of tensors").get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_name(name) for name in weight_map.values()):
            raise CheckpointError(f"{index}: no readable index of tensors (weight_map does not name files)")
        if {*weight_map.values()}.isdisjoint(os.path.basename(file) for file in self.files):
            return  # the index of another checkpoint in the same folder
        self._check_map(index, weight_map)

    def _check_map(self, index: Path, weight_map: Mapping[str, str]) -> None:
        names, elsewhere = {os.path.basename(file) for file in self.files}, []
        for key, name in weight_map.items():
            entry = self.tensors.get(key)
            if entry is None or name not in names:
                what = "no file of the checkpoint holds it" if entry is None else "there is no such file"
                raise CheckpointError(
                    f"{index}: says that {name} holds tensor {key}, but {what}; copy or download the checkpoint again"
                )
            if os.path.basename(entry.path) != name:
                elsewhere.append((entry, name))
        if elsewhere and local_rank_and_size()[0] == 0:
            entry, name = elsewhere[0]
            found, more = os.path.basename(entry.path), f", and {len(elsewhere) - 1} more" if elsewhere[1:] else ""
            logger.warning(
                "%s: says that %s holds tensor %s, which is read from %s%s", index, name, entry.key, found, more
            )


def _same_values(one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype_name, one.shape) != (other.dtype_name, other.shape):
        return False
    return hash_span(one.path, one.offset, one.nbytes) == hash_span(other.path, other.offset, other.nbytes)

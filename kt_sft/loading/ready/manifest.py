"""The manifest of a ready store: what lies in which file, with hashes, and where it came from.

It is JSON, and ends with the hash of everything else in it: whatever was changed in it is noticed before anything is
loaded. What it says is checked against the files' own headers, and those against the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kt_sft.config import AVAILABLE_FORMATS, STORE_METHOD
from kt_sft.loading.errors import CheckpointError

MANIFEST = "kt_sft_store.json"
#: What a store's config.json has for a `quant_method`: a name that nobody else knows.
METHOD = STORE_METHOD
VERSION = 1
#: Why no model is saved from a store, and the way out.
NOT_SAVED = (
    "the experts come from a ready store, which `kt-sft quantize` alone makes, so no model is saved from it; merge and "
    "export from the checkpoint that the store was made from (an adapter trained on one fits the other), or keep the "
    "adapter beside the store: chat and api take both"
)

_SCALE_DTYPES = {None: None, "F32": torch.float32, "F16": torch.float16}
_MOST_BYTES = 1 << 28
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Names of files, also in a folder; nothing hidden, and nothing that could lead out of the store.
_FILE_NAME = re.compile(r"(?!\.)[^/\x00-\x1f]+(/(?!\.)[^/\x00-\x1f]+)?")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, as its header says, and the hash of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file."""

    bytes: int
    header_sha256: str
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class OtherFile:
    """A file without weights: configs, tokenizer, templates."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredExperts:
    """One module of routed experts and how its weights are stored."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    biased: bool
    expert_format: str
    group_size: int | None
    zero_point: bool
    scale_dtype: str | None
    relative_error: float

    @property
    def storage(self) -> dict[str, Any]:
        """As LayerStore's arguments."""
        return {
            "expert_format": self.expert_format,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "scale_dtype": _SCALE_DTYPES[self.scale_dtype],
        }

    def shape(self, matrix: str) -> tuple[int, int]:
        """(rows, columns) of one expert's matrix."""
        size = (self.intermediate_size, self.hidden_size)
        return size[::-1] if matrix == "down" else size

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices an expert has."""
        return ("gate", "up", "down") if self.gated else ("up", "down")


def scale_dtype_name(dtype: torch.dtype | None) -> str | None:
    """The manifest's name of scales that are not a format's own."""
    return next(name for name, found in _SCALE_DTYPES.items() if found is dtype)


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    `source` has the `name` of the checkpoint's folder, the `sha256` of its index (or of the header of its one file),
    and its `quantization_config`, in which the dense part still is. `settings` are those of `kt-sft quantize`, and
    what came of calibration.
    """

    made_by: str
    source: dict[str, Any]
    settings: dict[str, Any]
    experts: dict[str, StoredExperts]
    files: dict[str, StoredFile]
    others: dict[str, OtherFile] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest's text: the same for the same content."""
        body = {"format": METHOD, "version": VERSION} | dataclasses.asdict(self)
        return json.dumps(body | {"sha256": _hash_of(body)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a store's manifest.

    Raises:
        CheckpointError: It is missing, damaged, of another version, or says what cannot be.
    """
    file = folder / MANIFEST
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes are no manifest of a kt_sft store")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: missing, so the store cannot be read; copy the whole folder, or make it again with "
            "`kt-sft quantize`"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: the manifest cannot be read ({error})") from error
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: the manifest is damaged: no JSON ({error})") from error
    try:
        return _parse(found)
    except _DefectError as error:
        raise CheckpointError(f"{file}: the manifest is damaged: {error}") from error


def _hash_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _DefectError(ValueError):
    pass


def _parse(found: Any) -> Manifest:
    body = dict(_mapping(found, "it"))
    if body.get("format") != METHOD:
        raise _DefectError(f"it says format {body.get('format')!r}, not {METHOD!r}")
    if body.get("version") != VERSION:
        raise _DefectError(
            f"it has version {body.get('version')!r}, this kt_sft reads {VERSION}; make the store again, or take the "
            "kt_sft that made it"
        )
    said = body.pop("sha256", None)
    try:
        true = _hash_of(body)
    except (ValueError, RecursionError) as error:  # a lone surrogate
        raise _DefectError(str(error)) from error
    if said != true:
        raise _DefectError("its content does not have the hash that it names")
    names = {one.name for one in dataclasses.fields(Manifest)}
    if body.keys() != names | {"format", "version"}:
        raise _DefectError(f"it has {sorted(body)}")
    source, settings = _mapping(body["source"], "source"), _mapping(body["settings"], "settings")
    quantization = source.get("quantization")
    if quantization is not None:
        _mapping(quantization, "source.quantization")
    return Manifest(
        made_by=_text(body["made_by"], "made_by"),
        source=dict(source),
        settings=dict(settings),
        experts={key: _experts(key, value) for key, value in _mapping(body["experts"], "experts").items()},
        files={_name(key): _file(key, value) for key, value in _mapping(body["files"], "files").items()},
        others={_name(key): _other(key, value) for key, value in _mapping(body["others"], "others").items()},
    )


def _experts(key: str, value: Any) -> StoredExperts:
    fields = _exactly(value, StoredExperts, f"experts.{key}")
    for name in ("num_experts", "hidden_size", "intermediate_size"):
        _count(fields[name], f"{key}.{name}", least=1)
    for name in ("gated", "biased", "zero_point"):
        if not isinstance(fields[name], bool):
            raise _DefectError(f"{key}.{name} is {fields[name]!r}")
    if fields["group_size"] is not None:
        _count(fields["group_size"], f"{key}.group_size")
    if fields["expert_format"] not in AVAILABLE_FORMATS:
        raise _DefectError(f"{key}.expert_format is {fields['expert_format']!r}")
    if not isinstance(fields["scale_dtype"], str | None) or fields["scale_dtype"] not in _SCALE_DTYPES:
        raise _DefectError(f"{key}.scale_dtype is {fields['scale_dtype']!r}")
    error = fields["relative_error"]
    if isinstance(error, bool) or not isinstance(error, int | float) or not math.isfinite(error) or error < 0:
        raise _DefectError(f"{key}.relative_error is {error!r}")
    return StoredExperts(**fields)


def _file(key: str, value: Any) -> StoredFile:
    fields = _exactly(value, StoredFile, f"files.{key}")
    tensors = {name: _tensor(name, tensor) for name, tensor in _mapping(fields["tensors"], f"{key}.tensors").items()}
    return StoredFile(_count(fields["bytes"], f"{key}.bytes"), _hash(fields["header_sha256"], key), tensors)


def _tensor(key: str, value: Any) -> StoredTensor:
    fields = _exactly(value, StoredTensor, f"tensor {key}")
    shape = fields["shape"]
    if not isinstance(shape, list):
        raise _DefectError(f"tensor {key} has the shape {shape!r}")
    counts = tuple(_count(size, f"tensor {key}.shape") for size in shape)
    return StoredTensor(_text(fields["dtype"], f"tensor {key}.dtype"), counts, _hash(fields["sha256"], key))


def _other(key: str, value: Any) -> OtherFile:
    fields = _exactly(value, OtherFile, f"others.{key}")
    return OtherFile(_count(fields["bytes"], f"{key}.bytes"), _hash(fields["sha256"], key))


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _DefectError(f"{what} is no JSON object")
    return value


def _exactly(value: Any, kind: type, what: str) -> dict[str, Any]:
    fields = dict(_mapping(value, what))
    names = {one.name for one in dataclasses.fields(kind)}
    if fields.keys() != names:
        raise _DefectError(f"{what} has {sorted(fields)}, expected {sorted(names)}")
    return fields


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _DefectError(f"{what} is {value!r}")
    return value


def _count(value: Any, what: str, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _DefectError(f"{what} is {value!r}")
    return value


def _hash(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _DefectError(f"{what} has no SHA-256")
    return value


def _name(value: str) -> str:
    if not _FILE_NAME.fullmatch(value):
        raise _DefectError(f"{value!r} is no name of a file of the store")
    return value

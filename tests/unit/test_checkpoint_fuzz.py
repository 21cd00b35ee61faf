"""Damaged headers and indexes: each is refused with an error of ours, or read just as the safetensors library does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from kt_sft.loading.checkpoint import Checkpoint, read_header
from kt_sft.loading.errors import CheckpointError

Header = dict[str, Any]
Change = Callable[[random.Random, Header], None]

_NUMBERS = (-1, 0, 1, 2, 3, 8, 24, 2**31, 2**62, 2**63, 2**64, 10**300, 0.5, 1e400, True, None, "4", [], {})
_NAMES = ("", "x", "__metadata__", "\ud800", "a.b\0", "é", "x" * 5000)
_DTYPES = ("BF16", "F16", "F32", "F64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "bf16", "", None, 7, ["BF16"], {})


def _tensors(random_: random.Random) -> dict[str, torch.Tensor]:
    dtypes = (torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn)
    return {
        f"layers.{number}.weight": torch.arange(rows * 4).reshape(rows, 4).to(random_.choice(dtypes))
        for number, rows in enumerate(random_.choices((0, 1, 2, 6), k=4))
    }


def _entry(random_: random.Random, header: Header) -> Header:
    entry = header[random_.choice([key for key in header if key != "__metadata__"])]
    return entry if isinstance(entry, dict) else {}


def _set_offset(random_: random.Random, header: Header) -> None:
    offsets = _entry(random_, header).get("data_offsets")
    if isinstance(offsets, list) and offsets:
        offsets[random_.randrange(len(offsets))] = random_.choice(_NUMBERS)


def _move(random_: random.Random, header: Header) -> None:
    entry, step = _entry(random_, header), random_.choice((-8, -1, 1, 4))
    if "data_offsets" in entry:
        entry["data_offsets"] = [place + step if isinstance(place, int) else place for place in entry["data_offsets"]]


def _swap(random_: random.Random, header: Header) -> None:
    part = random_.choice(("data_offsets", "shape", "dtype"))
    one, other = _entry(random_, header), _entry(random_, header)
    one[part], other[part] = other.get(part), one.get(part)


def _set_size(random_: random.Random, header: Header) -> None:
    shape = _entry(random_, header).get("shape")
    if isinstance(shape, list) and shape:
        shape[random_.randrange(len(shape))] = random_.choice(_NUMBERS)


def _more_dimensions(random_: random.Random, header: Header) -> None:
    _entry(random_, header)["shape"] = [random_.choice((1, 2**40))] * random_.choice((3, 70, 3000))


def _set_dtype(random_: random.Random, header: Header) -> None:
    _entry(random_, header)["dtype"] = random_.choice(_DTYPES)


def _drop_part(random_: random.Random, header: Header) -> None:
    entry = _entry(random_, header)
    if entry:
        del entry[random_.choice(sorted(entry))]


def _drop(random_: random.Random, header: Header) -> None:
    del header[random_.choice(sorted(header))]


def _rename(random_: random.Random, header: Header) -> None:
    header[random_.choice(_NAMES)] = header.pop(random_.choice(sorted(header)))


def _replace(random_: random.Random, header: Header) -> None:
    header[random_.choice(sorted(header))] = random_.choice(_NUMBERS)


CHANGES: tuple[Change, ...] = (
    _set_offset,
    _move,
    _swap,
    _set_size,
    _more_dimensions,
    _set_dtype,
    _drop_part,
    _drop,
    _rename,
    _replace,
)


def _damaged(random_: random.Random, content: bytes) -> bytes:
    """A file with another header, another length of it, other bytes in it, or a part of itself."""
    length = int.from_bytes(content[:8], "little")
    raw, data = content[8 : 8 + length], content[8 + length :]
    kind = random_.choice(("entries", "entries", "entries", "text", "bytes", "length", "cut"))
    if kind == "entries":
        header = json.loads(raw)
        for _ in range(random_.randint(1, 2)):
            if len(header) > 1:
                random_.choice(CHANGES)(random_, header)
        raw = json.dumps(header).encode()
    elif kind == "text":
        place = random_.randrange(len(raw))
        added = random_.choice((b"9" * 5000, b"[" * 100_000, b'"x":3,', b"NaN", b"\xff", raw[1:-1] + b","))
        raw = raw[:place] + added + raw[place:]
    elif kind == "bytes":
        changed = bytearray(raw)
        for _ in range(random_.randint(1, 3)):
            changed[random_.randrange(len(changed))] = random_.choice(b'0123456789"{}[],: \0\xff')
        raw = bytes(changed)
    said = len(raw)
    if kind == "length":
        said = random_.choice((0, 1, said - 1, said + 1, said + len(data), 2**31, 2**63, 2**64 - 1))
    whole = said.to_bytes(8, "little") + raw + data
    return whole[: random_.randrange(len(whole))] if kind == "cut" else whole


def _as_the_library_reads(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        found = safetensors.deserialize(content)
    except (safetensors.SafetensorError, MemoryError, OverflowError):
        return None
    return {key: (facts["dtype"], facts["shape"], bytes(facts["data"])) for key, facts in found}


def _check_message(error: CheckpointError, file: Path) -> None:
    message = str(error).encode()  # it can be shown
    assert str(file).encode() in message
    assert len(message) < 10_000  # also where it shows a long name


@pytest.mark.parametrize("seed", range(8))
def test_damaged_files(seed: int, tmp_path: Path) -> None:
    random_, path = random.Random(seed), tmp_path / "x.safetensors"
    save_file(_tensors(random_), path, {"format": "pt"})
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        content = _damaged(random_, whole)
        path.write_bytes(content)
        try:
            entries = read_header(path)
        except CheckpointError as error:
            _check_message(error, path)
            refused += 1
            continue
        expected = _as_the_library_reads(content)
        assert expected is not None, content
        assert {key: (entry.dtype_name, list(entry.shape)) for key, entry in entries.items()} == {
            key: (dtype, shape) for key, (dtype, shape, _) in expected.items()
        }
        for key, entry in entries.items():
            assert content[entry.offset : entry.offset + entry.nbytes] == expected[key][2]
    assert 50 < refused < 150


@pytest.mark.parametrize("seed", range(8))
def test_damaged_indexes(seed: int, tmp_path: Path) -> None:
    random_ = random.Random(seed)
    tensors = {f"layers.{number}.weight": torch.full((2, 2), float(number)) for number in range(6)}
    files = [tmp_path / f"model-{shard}.safetensors" for shard in range(3)]
    where = {key: files[number // 2].name for number, key in enumerate(tensors)}
    for file in files:
        save_file({key: value for key, value in tensors.items() if where[key] == file.name}, file)
    index = tmp_path / "model.safetensors.index.json"
    odd = (*_NAMES, *_NUMBERS, "../model-0.safetensors", "model-1.safetensors", "/dev/zero")
    for _ in range(60):
        weight_map: dict[Any, Any] = dict(where)
        for _ in range(random_.randint(1, 2)):
            key = random_.choice(sorted(weight_map))
            change = random_.choice(("drop", "name", "key"))
            if change == "drop":
                del weight_map[key]
            elif change == "name":
                weight_map[key] = random_.choice(odd)
            else:
                weight_map[random_.choice(_NAMES)] = weight_map.pop(key)
        text = json.dumps(random_.choice(({"weight_map": weight_map}, {"weight_map": weight_map}, weight_map)))
        if random_.random() < 0.3:
            place = random_.randrange(len(text))
            text = text[:place] + random_.choice(("", "[" * 100_000, "9" * 5000, '"x":')) + text[place + 1 :]
        index.write_text(text)
        try:
            checkpoint = Checkpoint(files, tmp_path)
        except CheckpointError as error:
            _check_message(error, index)
            continue
        # transformers opens the files that the index names, and takes every tensor of them.
        named = json.loads(text)["weight_map"]
        assert named.keys() <= tensors.keys()
        assert {*named.values()} <= {file.name for file in files}
        assert {key: Path(entry.path).name for key, entry in checkpoint.tensors.items()} == where

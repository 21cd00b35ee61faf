"""The safetensors header reader: what it gives, and every way a header or a file can lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kt_sft.loading.checkpoint import MAX_HEADER_BYTES, Checkpoint, read_header
from kt_sft.loading.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """Writes a safetensors file with any header, also an impossible one."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: list[Any], offsets: list[Any], dtype: str = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_entries_are_where_safetensors_put_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(7),
        "c": torch.randn(2, 2, 2).half(),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})

    entries = read_header(tmp_path / "x.safetensors")

    assert set(entries) == set(tensors)
    for key in ("a", "b", "c", "empty"):
        assert entries[key].shape == tuple(tensors[key].shape)
        assert torch.equal(entries[key].read(), tensors[key])
    with pytest.raises(CheckpointError, match="tensor ids holds I64 values"):
        entries["ids"].read()


HEADERS = {
    "beyond the file": ({"x": entry([4], [0, 8])}, "x reaches to byte 8 of the data, the file holds 6"),
    "shape against bytes": ({"x": entry([4], [0, 6])}, "BF16 and shape [4] cannot take 6 bytes"),
    "dtype against bytes": ({"x": entry([3], [0, 6], "F32")}, "F32 and shape [3] cannot take 6 bytes"),
    "backwards": ({"x": entry([0], [6, 0])}, "x ends (0) before it begins (6)"),
    "overlap": ({"x": entry([2], [0, 4]), "y": entry([2], [2, 6])}, "tensors x and y overlap"),
    "negative shape": ({"x": entry([-3], [0, 6])}, "impossible shape [-3]"),
    "fractional shape": ({"x": entry([1.5], [0, 3])}, "impossible shape [1.5]"),
    "negative offset": ({"x": entry([3], [-6, 0])}, "impossible offsets [-6, 0]"),
    "one offset": ({"x": entry([3], [0])}, "impossible offsets [0]"),
    "unknown dtype": ({"x": entry([3], [0, 6], "Q7")}, "unknown dtype 'Q7'"),
    "no shape": ({"x": {"dtype": "BF16", "data_offsets": [0, 6]}}, "incomplete header entry"),
    "no entry": ({"x": 3}, "incomplete header entry"),
    "no object": ([1, 2], "no JSON object"),
    "no JSON": (b"{'x'", "no JSON"),
    "no text": (b"\xff\xfe", "no JSON"),
    "a key twice": (b'{"x": {"dtype":"BF16","shape":[3],"data_offsets":[0,6]}, "x": {}}', "names x twice"),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_bad_headers(header: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.safetensors", header, b"\0" * 6)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\1\0\0", (50).to_bytes(8, "little") + b"{}"])
def test_truncated_headers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        read_header(tmp_path / "cut.safetensors")


def test_absurd_header_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", length=MAX_HEADER_BYTES + 1)
    with path.open("ab") as file:
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse: the length alone would fit
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        read_header(path)


@given(cut=st.integers(min_value=0, max_value=1000), flip=st.integers(min_value=0, max_value=400))
def test_any_cut_or_flipped_bit_is_an_error_or_harmless(
    cut: int, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7)}, folder / "x.safetensors")
    content = bytearray((folder / "x.safetensors").read_bytes())
    content[(flip // 8) % len(content)] ^= 1 << (flip % 8)
    content = content[: len(content) - cut]
    (folder / "x.safetensors").write_bytes(content)
    try:
        entries = read_header(folder / "x.safetensors")
    except CheckpointError:
        return
    for found in entries.values():
        assert found.offset + found.nbytes <= len(content)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def both(folder: Path) -> Checkpoint:
    return Checkpoint([folder / "model-1.safetensors", folder / "model-2.safetensors"])


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    assert set(both(sharded).tensors) == {"a", "b"}


def _remove_shard(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()


def _other_values(folder: Path) -> None:
    save_file({"a": torch.tensor([1.0, 2.0]), "b": torch.ones(2)}, folder / "model-2.safetensors")


def _other_shape(folder: Path) -> None:
    save_file({"a": torch.ones(2, 1), "b": torch.ones(2)}, folder / "model-2.safetensors")


def _unknown_file(folder: Path) -> None:
    write_index(folder, {"a": "model-1.safetensors", "b": "model-3.safetensors"})


def _absent_tensor(folder: Path) -> None:
    write_index(folder, {"a": "model-1.safetensors", "c": "model-2.safetensors"})


def _no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def _no_map(folder: Path) -> None:
    write_index(folder, ["a"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_shard, "model-2.safetensors: the checkpoint names this file, but it does not exist"),
        (_other_values, "tensor a appears twice with different values"),
        (_other_shape, "tensor a appears twice with different values"),
        (_unknown_file, "says that model-3.safetensors holds tensor b, but there is no such file"),
        (_absent_tensor, "says that model-2.safetensors holds tensor c, but no file of the checkpoint holds it"),
        (_no_index, "the index of tensors is no JSON"),
        (_no_map, "no readable index of tensors"),
    ],
)
def test_damaged_shards(damage: Callable[[Path], None], message: str, sharded: Path) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError) as error:
        both(sharded)
    assert message in str(error.value)


@pytest.mark.parametrize("where", [("model-2", "model-1"), ("model-2", "model-2")])
def test_tensors_are_where_the_files_have_them(
    where: tuple[str, str], sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_index(sharded, {key: f"{name}.safetensors" for key, name in zip("ab", where, strict=True)})
    found = both(sharded).tensors
    assert {key: Path(entry.path).name for key, entry in found.items()} == {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
    }
    assert "says that model-2.safetensors holds tensor a, which is read from model-1.safetensors" in caplog.text


def test_the_same_tensor_twice_is_one(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, sharded / "model-2.safetensors")
    write_index(sharded, dict.fromkeys("ab", "model-2.safetensors"))
    assert torch.equal(both(sharded).tensors["a"].read(), torch.ones(2))
    assert not caplog.records


def test_the_index_of_another_checkpoint_is_left_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "other-1.safetensors"})
    assert set(Checkpoint([tmp_path / "model.safetensors"]).tensors) == {"a"}


def test_only_safetensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors checkpoints"):
        Checkpoint([tmp_path / "pytorch_model.bin"])


def test_identity_tells_changed_files(sharded: Path) -> None:
    before = both(sharded).identity()
    assert both(sharded).identity() == before
    save_file({"b": torch.zeros(2), "c": torch.ones(1)}, sharded / "model-2.safetensors")
    assert both(sharded).identity() != before

"""What is wrong with a ready store is said, with file and tensor: on load what costs nothing, the rest by `verify`."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ready import make_store
from test_ready_stores import load
from typer.testing import CliRunner

from kt_sft.cli.app import app
from kt_sft.config import ConfigError, KTConfig
from kt_sft.loading.checkpoint import read_header
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.ready.manifest import MANIFEST
from kt_sft.loading.ready.planning import plan_store
from kt_sft.loading.ready.writing import StoreWriter

FIRST, SECOND = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"
CODES = "model.layers.0.mlp.experts.down.kt_sft_int4_codes"


@pytest.fixture
def store(tiny_moe: Path, tmp_path: Path) -> Path:
    make_store(tiny_moe, tmp_path / "store", expert_format="int4")
    return tmp_path / "store"


def verify(folder: Path) -> Any:
    return CliRunner().invoke(app, ["verify", str(folder)])


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def truncate(store: Path) -> None:
    with (store / FIRST).open("r+b") as file:
        file.truncate(4000)


def swap(store: Path) -> None:
    (store / FIRST).rename(store / "other")
    (store / SECOND).rename(store / FIRST)
    (store / "other").rename(store / SECOND)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, rf"{FIRST}: .*(truncated|reaches to byte)"),
    "missing": (lambda store: (store / SECOND).unlink(), rf"{SECOND}.*(does not exist|missing)"),
    "swapped": (swap, rf"says that {FIRST} holds tensor|{FIRST}: tensor .* is it a file of another store"),
    "no manifest": (lambda store: (store / MANIFEST).unlink(), rf"{MANIFEST}: missing.*copy the whole folder"),
    "manifest": (lambda store: flip(store / MANIFEST, 500), rf"{MANIFEST}: the manifest is damaged"),
    "header": (lambda store: flip(store / FIRST, 60), rf"{FIRST}: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_loading_refuses(name: str, store: Path) -> None:
    damage, message = DAMAGES[name]
    damage(store)
    with pytest.raises(CheckpointError, match=message):
        load(store)
    result = verify(store)
    assert result.exit_code == 1
    assert FIRST in result.output or SECOND in result.output or MANIFEST in result.output


def test_a_file_of_another_store_of_the_same_shapes(store: Path, tiny_moe: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_moe, tmp_path / "finetuned"))
    make_store(source, tmp_path / "other", expert_format="int4")
    shutil.copy(tmp_path / "other" / FIRST, store / FIRST)
    with pytest.raises(CheckpointError, match=rf"{FIRST}: its header is not the one of this store"):
        load(store)


def test_a_flipped_bit_is_found_by_verify(store: Path) -> None:
    assert verify(store).exit_code == 0
    entry = read_header(store / FIRST)[CODES]
    flip(store / FIRST, entry.offset + entry.nbytes // 2)
    result = verify(store)
    assert result.exit_code == 1
    assert f"{FIRST}: tensor {CODES} does not have the content that was written" in result.output
    assert result.output.count("kt-sft verify:") == 1


def test_a_changed_tokenizer_is_found_by_verify(store: Path) -> None:
    flip(store / "tokenizer.json", 100)
    load(store)
    result = verify(store)
    assert result.exit_code == 1
    assert "tokenizer.json: is not what was written" in result.output


def test_a_surplus_file_is_found_by_verify(store: Path) -> None:
    shutil.copy(store / FIRST, store / "model-00004-of-00003.safetensors")
    assert "model-00004-of-00003.safetensors: is no file of this store" in verify(store).output


def test_a_dense_part_of_another_kind(store: Path) -> None:
    config = json.loads((store / "config.json").read_text())
    config["quantization_config"]["source_quantization"] = {"quant_method": "fp8"}
    (store / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: says another quantization_config of the source"):
        load(store)


class TestCommand:
    def run(self, *arguments: object) -> Any:
        return CliRunner().invoke(app, ["quantize", *map(str, arguments)])

    def test_it_says_what_it_did_and_does_it_once(self, tiny_moe: Path, tmp_path: Path) -> None:
        target = tmp_path / "store"
        first = self.run(tiny_moe, target, "--format", "nf4", "--group-size", 32, "--threads", 1)
        assert first.exit_code == 0, first.output
        assert "experts of 2 layers as nf4, relative error" in first.output
        again = self.run(tiny_moe, target, "--format", "nf4", "--group-size", 32)
        assert (again.exit_code, again.output.strip()) == (0, f"{target} is complete already")
        other = self.run(tiny_moe, target, "--format", "int8")
        assert other.exit_code == 2
        assert "is a ready store of another source, of other settings" in other.output

    def test_a_source_that_changed_afterwards(self, checkpoint: Path, tmp_path: Path) -> None:
        assert self.run(checkpoint, tmp_path / "store").exit_code == 0
        (checkpoint / "model.safetensors").touch()
        assert "has changed since the store" in self.run(checkpoint, tmp_path / "store").output

    def test_targets_that_are_something_else(self, tiny_moe: Path, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        (tmp_path / "empty").mkdir()
        assert "exists and is not empty; give a new folder" in self.run(tiny_moe, tmp_path / "full").output
        assert "exists and is no folder" in self.run(tiny_moe, tmp_path / "file").output
        assert "exists and is not empty" in self.run(tiny_moe, tiny_moe).output
        assert "does not exist" in self.run(tiny_moe, tmp_path / "no" / "such").output
        assert self.run(tiny_moe, tmp_path / "empty").exit_code == 0
        assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--format", "int5"], "expert_format must be one of"),
            (["--group-size", "48"], "group_size must be 0"),
            (["--format", "nf4", "--zero-point"], "zero_point applies to expert_format int4 only"),
        ],
    )
    def test_impossible_settings(self, arguments: list[str], message: str, tiny_moe: Path, tmp_path: Path) -> None:
        result = self.run(tiny_moe, tmp_path / "store", *arguments)
        assert result.exit_code == 2
        assert message in result.output
        assert not list(tmp_path.glob("store*"))

    def test_sources_that_are_none(self, store: Path, tmp_path: Path) -> None:
        assert "is a ready store already" in self.run(store, tmp_path / "new").output
        assert "it has no config.json" in self.run(tmp_path, tmp_path / "new").output
        assert f"{MANIFEST}: missing" in verify(tmp_path).output

    def test_a_disk_that_is_too_small(self, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1 << 20))
        writer = StoreWriter(plan_store(tiny_moe, KTConfig(expert_format="int4")), tmp_path / "store", threads=1)
        with pytest.raises(ConfigError, match=r"too small for the store: 64\.1 MiB needed, 1\.0 MiB free"):
            writer.prepare()

    def test_a_value_that_is_not_finite(self, edit: Callable[..., None], checkpoint: Path, tmp_path: Path) -> None:
        key = "model.layers.1.mlp.experts.3.gate_proj.weight"
        edit(lambda tensors: tensors[key].__setitem__((5, 7), float("nan")))
        result = self.run(checkpoint, tmp_path / "store")
        assert result.exit_code == 2
        assert f"tensor {key} (gate of expert 3 of model.layers.1.mlp.experts)" in result.output
        assert not (tmp_path / "store").exists()

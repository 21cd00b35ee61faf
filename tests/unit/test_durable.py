"""What is on the disk when a file gets its final name."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from kt_sft.integrations.adapter_saving import whole_file
from kt_sft.integrations.checkpoints import _written_last
from kt_sft.loading.durable import publish, write_out
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.staging import staged


class Disk:
    """What has been written out: a file's name is worth nothing after a power loss where its contents are not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: set[int] = set()
        self.named: list[str] = []
        fsync, replace = os.fsync, os.replace

        def record(descriptor: int) -> None:
            fsync(descriptor)
            self.written.add(os.fstat(descriptor).st_ino)

        def rename(source: Any, target: Any) -> None:
            assert self.holds(Path(source))
            replace(source, target)
            self.named.append(Path(target).name)
            self.written.discard(os.stat(os.path.dirname(target)).st_ino)  # its entries have changed

        monkeypatch.setattr(os, "fsync", record)
        monkeypatch.setattr(os, "replace", rename)

    def holds(self, path: Path) -> bool:
        """Whether a file is there, or a folder with all of its files."""
        return all(each.stat().st_ino in self.written for each in (path, *path.glob("*")))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_file(disk: Disk, tmp_path: Path) -> None:
    with whole_file(tmp_path / "adapter_model.safetensors") as partial:
        partial.write_text("whole")
    assert disk.named == ["adapter_model.safetensors"]
    assert disk.holds(tmp_path)


def test_a_folder(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    for name in ("one", "other"):
        (tmp_path / "partial" / name).write_text(name)
    publish(tmp_path / "partial", tmp_path / "adapter")
    assert disk.named == ["adapter"]
    assert disk.holds(tmp_path / "adapter")
    assert disk.holds(tmp_path)


def test_a_model(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config.json must not come to the disk before the names of its weights."""
    rename = os.replace

    def see(source: Any, target: Any) -> None:
        if Path(target).name == "config.json":
            assert tmp_path.stat().st_ino in disk.written
        rename(source, target)

    monkeypatch.setattr(os, "replace", see)
    with staged(tmp_path) as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(name)
    assert disk.named == ["model.safetensors", "config.json"]
    assert disk.holds(tmp_path)


def test_a_checkpoints_state_comes_after_the_rest_of_it(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, state = TrainerState.save_to_json, TrainerState(global_step=3)
    fields = dataclasses.asdict(state)

    def see(self: TrainerState, json_path: str) -> None:
        assert disk.holds(tmp_path)
        save(self, json_path)

    monkeypatch.setattr(TrainerState, "save_to_json", see)
    with _written_last(state, tmp_path):
        (tmp_path / "optimizer.pt").write_text("state")
        state.save_to_json(str(tmp_path / "trainer_state.json"))
        assert disk.holds(tmp_path)
    assert TrainerState.load_from_json(str(tmp_path / "trainer_state.json")).global_step == 3
    assert dataclasses.asdict(state) == fields
    assert "save_to_json" not in vars(state)


def failing(number: int, where: Callable[[int], bool]) -> Callable[[int], None]:
    def fsync(descriptor: int) -> None:
        if where(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    return fsync


def test_a_disk_that_turns_out_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that gives out its last blocks when contents are written to the disk."""
    (tmp_path / "config.json").write_text("earlier")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, stat.S_ISREG))
    with pytest.raises(CheckpointError, match="cannot be written"), whole_file(tmp_path / "config.json") as partial:
        partial.write_text("new")
    with pytest.raises(CheckpointError, match="cannot be written there"), staged(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "config.json").read_text() == "earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_file_system_without_it_is_no_error_for_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, lambda _: True))
    write_out(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        write_out(tmp_path / "file")

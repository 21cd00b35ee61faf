"""kill -9 while a store is written: what is complete is kept, and the end is the same as without it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ready import contents, make_store

from kt_sft.config import ConfigError, KTConfig
from kt_sft.loading.ready import writing
from kt_sft.loading.ready.planning import plan_store
from kt_sft.loading.ready.writing import StoreWriter


class Deaths:
    """Kills its process at a certain system call that changes a file; counts them until then."""

    def __init__(self, at: int | None) -> None:
        self.calls = 0
        self._at = at

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("pwrite", "replace", "posix_fallocate", "fsync"):
            monkeypatch.setattr(writing.os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return counted


def killed(source: Path, target: Path, at: int) -> None:
    """Writes in a process that dies at its `at`-th call."""

    def body() -> None:
        torch.set_num_threads(1)
        Deaths(at).watch(pytest.MonkeyPatch())
        make_store(source, target, threads=2, expert_format="int4")

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of a store whose making was not interrupted, and how many calls that took."""
    folder, deaths = tmp_path_factory.mktemp("whole") / "store", Deaths(None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        deaths.watch(monkeypatch)
        make_store(tiny_moe, folder, expert_format="int4")
    return contents(folder), deaths.calls


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0])
def test_the_end_is_the_same(share: float, whole: tuple[dict[str, bytes], int], tiny_moe: Path, tmp_path: Path) -> None:
    expected, calls = whole
    target = tmp_path / "store"

    killed(tiny_moe, target, max(1, round(share * calls)))
    assert not (target / "config.json").exists() or share == 1.0
    make_store_again(tiny_moe, target)

    assert contents(target) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def make_store_again(source: Path, target: Path) -> None:
    writer = StoreWriter(plan_store(source, KTConfig(expert_format="int4")), target, threads=1)
    if writer.prepare():
        writer.write()


def test_killed_again_and_again(whole: tuple[dict[str, bytes], int], tiny_moe: Path, tmp_path: Path) -> None:
    expected, calls = whole
    target = tmp_path / "store"
    for share in (0.35, 0.3, 0.25):
        killed(tiny_moe, target, round(share * calls))
    make_store_again(tiny_moe, target)
    assert contents(target) == expected


@pytest.fixture
def half(whole: tuple[dict[str, bytes], int], tiny_moe: Path, tmp_path: Path) -> Path:
    """The target of a run that was killed while it wrote the second layer."""
    target = tmp_path / "store"
    killed(tiny_moe, target, round(0.6 * whole[1]))
    assert (tmp_path / "store.incomplete" / "store" / "model-00002-of-00003.safetensors").exists()
    return target


def test_what_is_complete_is_kept(half: Path, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = StoreWriter._write_file

    def write_file(self: StoreWriter, file: Any, path: Path) -> float:
        written.append(file.name)
        return write(self, file, path)

    monkeypatch.setattr(StoreWriter, "_write_file", write_file)
    make_store_again(tiny_moe, half)
    assert written == ["model-00003-of-00003.safetensors"]


def test_what_is_damaged_meanwhile_is_written_again(
    half: Path, whole: tuple[dict[str, bytes], int], tiny_moe: Path
) -> None:
    complete = half.with_name("store.incomplete") / "store" / "model-00002-of-00003.safetensors"
    data = bytearray(complete.read_bytes())
    data[-5] ^= 1
    complete.write_bytes(data)
    make_store_again(tiny_moe, half)
    assert contents(half) == whole[0]


def test_another_run_is_refused(half: Path, tiny_moe: Path) -> None:
    other = StoreWriter(plan_store(tiny_moe, KTConfig(expert_format="int8")), half, threads=1)
    with pytest.raises(ConfigError, match=r"store\.incomplete is of another run.*delete it to start anew"):
        other.prepare()


def test_a_source_that_has_changed_is_refused(half: Path, checkpoint: Path, tiny_moe: Path) -> None:
    renamed = checkpoint.rename(checkpoint.with_name(tiny_moe.name))
    with pytest.raises(ConfigError, match="is of another run: the source"):
        StoreWriter(plan_store(renamed, KTConfig(expert_format="int4")), half, threads=1).prepare()


def test_only_one_process_writes(half: Path, tiny_moe: Path) -> None:
    first = StoreWriter(plan_store(tiny_moe, KTConfig(expert_format="int4")), half, threads=1)
    second = StoreWriter(plan_store(tiny_moe, KTConfig(expert_format="int4")), half, threads=1)
    with first.locked(), pytest.raises(ConfigError, match="another process is writing"):
        second.write()


def test_a_run_that_came_to_nothing_is_in_nobodys_way(tiny_moe: Path, tmp_path: Path) -> None:
    target = tmp_path / "store"
    killed(tiny_moe, target, 1)
    other = StoreWriter(plan_store(tiny_moe, KTConfig(expert_format="nf4")), target, threads=1)
    assert other.prepare()
    assert {experts.expert_format for experts in other.write().experts.values()} == {"nf4"}

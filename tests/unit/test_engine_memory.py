"""How much memory may still be taken: host, and control groups of both versions, all the way up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kt_sft.engine import memory
from kt_sft.loading import memory as loading_memory
from kt_sft.loading.errors import NotEnoughMemoryError

GIB = 1 << 30


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_host(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4096 kB\nMemFree: 1 kB\nMemAvailable:    2048 kB\n")
    assert memory._host(tmp_path / "meminfo") == 2048 * 1024
    assert memory._host(tmp_path / "absent") is None


def test_version_2_takes_the_tightest_group_and_counts_cached_files_as_free(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/outer/inner\n")
    group(tmp_path / "outer", memory__max=8 * GIB, memory__current=7 * GIB, memory__stat=f"inactive_file {2 * GIB}")
    group(tmp_path / "outer/inner", memory__max="max", memory__current=GIB, memory__stat="inactive_file 0")
    assert memory._cgroup(tmp_path / "own", tmp_path) == 3 * GIB


def test_version_1(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:cpu,cpuacct:/a\n4:memory:/a\n")
    root = tmp_path / "memory"
    group(root, memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=9 * GIB)
    group(
        root / "a", memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=3 * GIB, memory__stat="total_inactive_file 5"
    )
    assert memory._cgroup(tmp_path / "own", tmp_path) == GIB + 5


@pytest.mark.parametrize(("version", "prefix"), [(1, "total_"), (2, "")])
def test_files_that_were_read_more_than_once_can_be_dropped_as_well(tmp_path: Path, version: int, prefix: str) -> None:
    """A checkpoint of an earlier run, read twice, fills the group's limit: all of it is there for the next one."""
    fields = {"cache": 7 * GIB, "inactive_file": GIB, "active_file": 5 * GIB, "inactive_anon": GIB, "active_anon": 5}
    stat = "\n".join(f"{prefix}{name} {size}" for name, size in fields.items())
    own, folder = ("0::/a\n", tmp_path / "a") if version == 2 else ("4:memory:/a\n", tmp_path / "memory" / "a")
    (tmp_path / "own").write_text(own)
    if version == 2:
        group(folder, memory__max=8 * GIB, memory__current=8 * GIB, memory__stat=stat)
    else:
        group(folder, memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=8 * GIB, memory__stat=stat)
    assert memory._cgroup(tmp_path / "own", tmp_path) == 6 * GIB


def test_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    # The path in /proc/self/cgroup may be the host's, while the container's group is mounted as the root.
    (tmp_path / "own").write_text("0::/host/side/path\n")
    group(tmp_path, memory__max=2 * GIB, memory__current=GIB, memory__stat="inactive_file 0")
    assert memory._cgroup(tmp_path / "own", tmp_path) == GIB


def test_no_limits(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    assert memory._cgroup(tmp_path / "own", tmp_path) is None


def test_need_and_have_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_memory, "available_bytes", lambda: 2 * GIB)
    loading_memory.require_bytes(2 * GIB, "the experts")
    with pytest.raises(NotEnoughMemoryError, match=r"for the experts: 2\.5 GiB needed, 2\.0 GiB available;"):
        loading_memory.require_bytes(5 * GIB // 2, "the experts")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (160 << 20, "160.0 MiB"), (5 * GIB // 2, "2.5 GiB")],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert loading_memory.readable(size) == text


class TestProcesses:
    """Three processes of one machine load 4 GiB each, in any order."""

    need, base = 4 * GIB, GIB

    @pytest.fixture(autouse=True)
    def machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine whose launcher, process 1, runs this process and others."""
        monkeypatch.setattr(loading_memory, "_PROC", tmp_path)
        self.proc, self.monkeypatch = tmp_path, monkeypatch
        self.runs(os.getpid(), loaded=0)

    def runs(self, process: int, *, loaded: int, parent: int = 1) -> None:
        size = (self.base + loaded) // 1024
        group(self.proc / str(process), status=f"Name:\tpython\nPPid:\t{parent}\nRssAnon:\t{size:>8} kB\n")

    def require(self, available: int) -> None:
        self.monkeypatch.setattr(loading_memory, "available_bytes", lambda: available)
        loading_memory.require_bytes(self.need, "the experts", processes=3)

    @pytest.mark.parametrize("loaded", [(0, 0), (2 * GIB, 0), (4 * GIB, 3 * GIB), (4 * GIB, 4 * GIB)])
    def test_what_others_have_filled_is_not_asked_for_again(self, loaded: tuple[int, int]) -> None:
        for process, size in enumerate(loaded, start=10_000_000):
            self.runs(process, loaded=size)
        self.require(12 * GIB - sum(loaded))
        with pytest.raises(NotEnoughMemoryError, match=r"4\.0 GiB needed in each of 3 processes \(12\.0 GiB in all\)"):
            self.require(12 * GIB - sum(loaded) - 1)

    def test_what_they_hold_together_counts_once(self) -> None:
        self.runs(10_000_000, loaded=GIB)
        self.runs(10_000_001, loaded=0)
        self.monkeypatch.setattr(loading_memory, "available_bytes", lambda: 8 * GIB)
        loading_memory.require_bytes(GIB, "the experts", processes=3, together=6 * GIB)
        said = r"1\.0 GiB needed in each of 3 processes and 7\.0 GiB for all of them \(10\.0 GiB in all\), 8\.0 GiB"
        with pytest.raises(NotEnoughMemoryError, match=said):
            loading_memory.require_bytes(GIB, "the experts", processes=3, together=7 * GIB)

    def test_no_more_than_a_share_counts_as_loaded(self) -> None:
        self.runs(10_000_000, loaded=50 * GIB)
        self.runs(10_000_001, loaded=0)
        with pytest.raises(NotEnoughMemoryError, match=r"4\.0 GiB already loaded"):
            self.require(8 * GIB - 1)

    def test_where_the_others_are_not_seen_only_the_own_share_is_checked(self) -> None:
        self.runs(10_000_000, loaded=0, parent=7)
        self.runs(10_000_001, loaded=0, parent=8)
        self.require(4 * GIB)
        with pytest.raises(NotEnoughMemoryError, match=r"4\.0 GiB needed, 4\.0 GiB available;"):
            self.require(4 * GIB - 1)

"""How much memory may still be taken: host, and control groups of both versions, all the way up."""

from __future__ import annotations

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
    with pytest.raises(NotEnoughMemoryError, match=r"for the experts: 2\.5 GiB needed, 2\.0 GiB available"):
        loading_memory.require_bytes(5 * GIB // 2, "the experts")

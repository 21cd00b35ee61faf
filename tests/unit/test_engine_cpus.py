"""Which CPUs the engine takes: on made-up machines, in containers, and beside other processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kt_sft
from kt_sft.engine import cpus, engine

MakeMachine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeMachine:
    """Makes this process see a made-up machine; returns its /sys."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def put(path: str, text: str) -> None:
        file = tmp_path / "devices/system" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def make(
        nodes: int = 1, cores: int = 8, threads_per_core: int = 1, usable: list[int] | None = None, limit=None
    ) -> Path:
        """CPU c is hardware thread c // cores of core c % cores; nodes hold consecutive cores."""
        for node in range(nodes):
            members = [c for c in range(cores * threads_per_core) if c % cores * nodes // cores == node]
            put(f"node/node{node}/cpulist", ",".join(map(str, members)))
            put(f"node/node{node}/meminfo", f"Node {node} MemTotal: 1000 kB")
            put(f"node/node{node}/distance", " ".join("10" if n == node else "21" for n in range(nodes)))
        put("node/online", f"0-{nodes - 1}")
        put("cpu/online", f"0-{cores * threads_per_core - 1}")
        for cpu in range(cores * threads_per_core):
            siblings = ",".join(str(cpu % cores + cores * thread) for thread in range(threads_per_core))
            put(f"cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
            put(f"cpu/cpu{cpu}/topology/physical_package_id", str(cpu % cores * nodes // cores))
        everything = list(range(cores * threads_per_core))
        native = cpus._native.topology
        monkeypatch.setattr(cpus, "usable_cpus", lambda: everything if usable is None else usable)
        monkeypatch.setattr(cpus, "cgroup_cpu_limit", lambda: limit)
        monkeypatch.setattr(cpus._native, "topology", lambda system, usable: native(str(tmp_path), usable))
        return tmp_path

    return make


class TestOneProcess:
    def test_where_all_memory_is_equally_near_threads_run_anywhere(self, machine: MakeMachine) -> None:
        machine()
        assert cpus.engine_cpus(None) == (8, [])
        assert cpus.engine_nodes() == []

    def test_there_is_a_thread_for_each_core_and_not_for_each_cpu(self, machine: MakeMachine) -> None:
        machine(cores=8, threads_per_core=2)
        assert len(cpus.usable_cores()) == 8
        assert cpus.engine_cpus(None) == (8, [])

    def test_threads_are_kept_near_their_memory(self, machine: MakeMachine) -> None:
        machine(nodes=2, cores=4, threads_per_core=2)
        assert cpus.engine_cpus(None) == (4, [[0, 4, 1, 5], [2, 6, 3, 7]])
        assert cpus.engine_nodes() == [0, 1]

    def test_as_many_threads_as_asked_for(self, machine: MakeMachine) -> None:
        machine(nodes=2, cores=4)
        assert cpus.engine_cpus(3) == (3, [[0, 1], [2, 3]])
        assert cpus.engine_cpus(20)[0] == 20


class TestContainers:
    def test_two_of_64_cores_by_cpuset(self, machine: MakeMachine) -> None:
        machine(nodes=2, cores=64, threads_per_core=2, usable=[40, 41, 104, 105])
        assert cpus.engine_cpus(None) == (2, [[40, 104, 41, 105]])
        assert cpus.engine_nodes() == [1]
        assert not cpus.oversubscribed(2)

    def test_two_of_64_cores_by_quota(self, machine: MakeMachine) -> None:
        machine(cores=64, limit=2.0)
        assert cpus.engine_cpus(None) == (2, [])
        assert not cpus.oversubscribed(2)
        assert cpus.oversubscribed(3)

    def test_a_part_of_a_cpu_is_worth_a_thread_that_does_not_spin(self, machine: MakeMachine) -> None:
        machine(limit=2.5)
        assert cpus.engine_cpus(None) == (3, [])
        assert cpus.oversubscribed(3)

    def test_torch_takes_no_more_threads_than_the_container_grants(
        self, machine: MakeMachine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine(cores=64, limit=1.5)
        set_to: list[int] = []
        monkeypatch.setattr(engine, "cgroup_cpu_limit", lambda: 1.5)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        monkeypatch.setattr(torch, "set_num_threads", set_to.append)
        monkeypatch.setenv("OMP_NUM_THREADS", "64")
        engine._fit_torch_to_container()
        assert set_to == []
        monkeypatch.delenv("OMP_NUM_THREADS")
        engine._fit_torch_to_container()
        assert set_to == [2]
        assert "torch now uses 2 threads instead of 64" in caplog.text

    def test_torch_is_left_alone_without_a_quota(self, machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
        machine(cores=2)
        monkeypatch.setattr(engine, "cgroup_cpu_limit", lambda: None)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("changed"))
        engine._fit_torch_to_container()


class TestProcessesOfALauncher:
    @pytest.mark.parametrize(("rank", "node_cpus"), [(0, [[0, 1]]), (1, [[2], [3, 4]]), (2, [[5, 6, 7]])])
    def test_divide_the_cores(
        self, machine: MakeMachine, monkeypatch: pytest.MonkeyPatch, rank: int, node_cpus: list[list[int]]
    ) -> None:
        # Eight cores on nodes of three and five.
        machine(nodes=2)
        monkeypatch.setattr(
            cpus, "usable_cores", lambda: [cpus.Core(0 if cpu < 3 else 1, 0, (cpu,)) for cpu in range(8)]
        )
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        assert cpus.engine_cpus(None) == (sum(map(len, node_cpus)), node_cpus)

    def test_never_share_a_core_while_there_are_enough(
        self, machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # CPUs 0-3 are the first hardware threads of all cores: halves of the CPUs would be the same cores twice.
        machine(nodes=2, cores=4, threads_per_core=2)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert cpus.engine_cpus(None) == (2, [[0, 4, 1, 5]])
        assert cpus.engine_nodes() == [0]
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert cpus.engine_cpus(None) == (2, [[2, 6, 3, 7]])
        assert cpus.engine_nodes() == [1]
        assert not cpus.oversubscribed(2)

    def test_more_processes_than_cores_get_one_each_and_know_it(
        self, machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine(nodes=2)
        monkeypatch.setenv("LOCAL_RANK", "9")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "12")
        threads, node_cpus = cpus.engine_cpus(None)
        assert threads == 1
        assert node_cpus == [[1]]
        assert cpus.oversubscribed(threads)

    def test_share_a_containers_time(self, machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
        machine(cores=64, limit=6.0)
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert cpus.engine_cpus(None) == (3, [])


class TestQuota:
    @pytest.mark.parametrize(
        ("own", "files", "limit"),
        [
            ("0::/", {"cpu.max": "max 100000"}, None),
            ("0::/", {"cpu.max": "250000 100000"}, 2.5),
            # A container that sees its own group as the root, under the host's name.
            ("0::/system.slice/docker-1.scope", {"cpu.max": "200000 100000"}, 2.0),
            # The tightest level counts, wherever it is.
            ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
            ("0::/a/b", {"a/cpu.max": "800000 100000", "a/b/cpu.max": "300000 100000"}, 3.0),
            ("0::/a/b", {"a/cpu.max": "400000 100000", "a/c/cpu.max": "100000 100000"}, 4.0),
            ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5),
            ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
            ("3:cpuset:/a\n2:cpu:/b", {"cpu/b/cpu.cfs_quota_us": "50000", "cpu/b/cpu.cfs_period_us": "50000"}, 1.0),
            ("0::/", {}, None),
        ],
    )
    def test_is_found_at_any_level(self, tmp_path: Path, own: str, files: dict[str, str], limit: float | None) -> None:
        (tmp_path / "own").write_text(own + "\n")
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
        assert cpus.cgroup_cpu_limit(tmp_path / "own", tmp_path) == limit

    def test_without_control_groups_there_is_none(self, tmp_path: Path) -> None:
        assert cpus.cgroup_cpu_limit(tmp_path / "absent", tmp_path) is None


def test_this_machines_facts_agree() -> None:
    info = kt_sft.system_info()
    assert 1 <= info["cores"] <= info["cpus"]
    assert info["smt"] == (info["cores"] < info["cpus"])
    assert info["oversubscribed"] is False
    assert info["numa_nodes"] > 1 or info["engine_nodes"] == []
    assert info["huge_page_bytes"] is None or info["huge_page_bytes"] % (2 << 20) == 0

"""Which CPUs this process may use, how many of them the engine takes, and which memory lies near them."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from kt_sft.config import local_rank_and_size
from kt_sft.engine import _native  # type: ignore[attr-defined]
from kt_sft.engine.cgroups import OWN, ROOT, group_folders

_SYSTEM = Path("/sys")

#: How long an idle engine thread looks for work before it sleeps, in microseconds, where its CPU is its own.
SPIN_MICROSECONDS = 60


@dataclasses.dataclass(frozen=True)
class Core:
    """A physical core.

    Attributes:
        node: Number of the nearest NUMA node that has memory.
        package: Number of its socket.
        cpus: Numbers of the CPUs (hardware threads) that this process may use of it.
    """

    node: int
    package: int
    cpus: tuple[int, ...]


def usable_cpus() -> list[int]:
    """The CPUs this process may run on, by number."""
    return sorted(os.sched_getaffinity(0))


def usable_cores(system: Path = _SYSTEM) -> list[Core]:
    """The cores those CPUs belong to, node by node."""
    cores, _ = _native.topology(str(system), usable_cpus())
    return [Core(node, package, tuple(cpus)) for node, package, cpus in cores]


def numa_nodes(system: Path = _SYSTEM) -> int:
    """How many NUMA nodes of this machine have memory."""
    return len(_native.topology(str(system), [])[1])


def cgroup_cpu_limit(own: Path = OWN, root: Path = ROOT) -> float | None:
    """CPUs' worth of time that this process's control groups grant, the tightest of all levels; None without a limit.

    Args:
        own: /proc/self/cgroup, or a made-up file.
        root: Where control groups are mounted.
    """
    limits = [_quota_v1(folder) if v1 else _quota_v2(folder) for folder, v1 in group_folders("cpu", own, root)]
    return min((limit for limit in limits if limit is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # absent, or "max"
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError):
        return None


def granted_cpus() -> float:
    """CPUs' worth of time that this process and those of its launcher may use together."""
    limit = cgroup_cpu_limit()
    return len(usable_cpus()) if limit is None else min(len(usable_cpus()), limit)


def engine_cpus(num_threads: int | None) -> tuple[int, list[list[int]]]:
    """How many threads the engine runs, and where.

    The usable cores are divided among the processes that a launcher started on this machine, neighbours together. By
    default there is a thread for each core, not for each CPU: the hardware threads of a core share the units that
    multiply, and its caches.

    Where it matters which CPU is near which memory, a thread is kept on a node, but may use all of this process's CPUs
    there: pinned to one it would wait behind somebody else's work while others idle.

    Args:
        num_threads: As asked for; None takes the whole share.

    Returns:
        The number of threads, and the CPUs of each node they run on (empty: anywhere).
    """
    share = _own_cores()
    _, processes = local_rank_and_size()
    limit = cgroup_cpu_limit()
    granted = len(share) if limit is None else max(1, min(len(share), math.ceil(limit / processes)))
    cpus = {node: [cpu for core in share if core.node == node for cpu in core.cpus] for node in engine_nodes()}
    return granted if num_threads is None else num_threads, list(cpus.values())


def engine_nodes() -> list[int]:
    """The NUMA nodes that this process's engine works on, in order; empty where all memory is equally near.

    Weights go to these nodes in equal parts, so that threads find the experts that are theirs in near memory.
    """
    return [] if numa_nodes() == 1 else sorted({core.node for core in _own_cores()})


def job_nodes() -> list[int]:
    """The NUMA nodes that the engines of all processes of this machine's launcher work on, as `engine_nodes`."""
    return [] if numa_nodes() == 1 else sorted({core.node for core in usable_cores()})


def oversubscribed(threads: int) -> bool:
    """Whether the processes of this machine's launcher run more engine threads than they are granted CPUs.

    Args:
        threads: Of this process's engine.
    """
    _, processes = local_rank_and_size()
    return threads * processes > granted_cpus()


def _own_cores() -> list[Core]:
    cores = usable_cores()
    rank, processes = local_rank_and_size()
    return cores[rank * len(cores) // processes : (rank + 1) * len(cores) // processes] or [cores[rank % len(cores)]]

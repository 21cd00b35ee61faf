"""Which CPUs this process may use, and how many of them the engine takes."""

from __future__ import annotations

import math
import os
from pathlib import Path

from kt_sft.config import local_rank_and_size

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_NODES = Path("/sys/devices/system/node")


def usable_cpus() -> list[int]:
    """The CPUs this process may run on, by number."""
    return sorted(os.sched_getaffinity(0))


def cgroup_cpu_limit(root: Path = _CGROUP_ROOT) -> float | None:
    """CPUs' worth of time that the container grants, or None without a limit (cgroup v2, then v1)."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        microseconds = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_microseconds = int((root / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return microseconds / period_microseconds if microseconds > 0 else None


def numa_nodes(root: Path = _NODES) -> int:
    """How many NUMA nodes this machine shows."""
    return max(1, sum(1 for node in root.glob("node[0-9]*")))


def engine_cpus(num_threads: int | None) -> tuple[int, list[int]]:
    """How many threads the engine runs and the CPUs they are pinned to.

    The usable CPUs are divided among the processes that a launcher started on this machine. Threads are pinned only
    where
    it matters which CPU is near which memory, and only when there is one for each CPU of this process's share: a pinned
    thread waits behind somebody else's work on its CPU while other CPUs may idle.

    Args:
        num_threads: As asked for; None takes the whole share.

    Returns:
        The number of threads, and their CPUs (empty: not pinned).
    """
    cpus = usable_cpus()
    rank, processes = local_rank_and_size()
    share = cpus[rank * len(cpus) // processes : (rank + 1) * len(cpus) // processes] or [cpus[rank % len(cpus)]]
    limit = cgroup_cpu_limit()
    granted = len(share) if limit is None else max(1, min(len(share), math.ceil(limit / processes)))
    threads = granted if num_threads is None else num_threads
    return threads, share if numa_nodes() > 1 and threads == len(share) else []

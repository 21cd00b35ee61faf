"""Facts about this machine as the engine sees it."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from kt_sft.engine import _native  # type: ignore[attr-defined]
from kt_sft.engine.cpus import cgroup_cpu_limit, numa_nodes, usable_cpus
from kt_sft.engine.engine import available_tiers, get_engine

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def system_info(num_threads: int | None = None) -> dict[str, Any]:
    """What the engine runs on and how fast that is, measured on first use (some tens of milliseconds).

    Args:
        num_threads: As in KTConfig.

    Returns:
        A plain dict: `tier` (in use), `tiers` (available, lowest first), `threads`, `cpu`, `cpus` (usable), `cpu_limit`
        (the container's, in CPUs, or None),
        `numa_nodes`, `formats`, `peak_gflops` (of the tier's products, all threads), `peak_gflops_per_thread`,
        `read_bandwidth_gbs` (from memory, all threads, 1e9 bytes per second),
        `memory_total_bytes`, `memory_available_bytes` (the container's limit counted).

    Raises:
        ConfigError: `KT_SFT_ISA` names no tier.
    """
    engine = get_engine(num_threads)
    flops, bandwidth = _measured(engine)
    return {
        "tier": engine.tier,
        "tiers": available_tiers(),
        "threads": engine.threads,
        "cpu": _native.cpu_model().strip(),
        "cpus": len(usable_cpus()),
        "cpu_limit": cgroup_cpu_limit(),
        "numa_nodes": numa_nodes(),
        "formats": list(_native.formats()),
        "peak_gflops": flops * engine.threads / 1e9,
        "peak_gflops_per_thread": flops / 1e9,
        "read_bandwidth_gbs": bandwidth / 1e9,
        "memory_total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_available_bytes": available_memory(),
    }


@functools.cache
def _measured(engine: Any) -> tuple[float, float]:
    return engine.measure_peak()


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP_ROOT) -> int:
    """Bytes of memory that can be had without swapping: what the kernel has available, or what the container has left
    of its limit if that is less.
    """
    available = 0
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        # Pages of files count as used but are given up when memory is needed.
        for line in (cgroup / "memory.stat").read_text().splitlines():
            key, value = line.split()
            if key == "inactive_file":
                used -= int(value)
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - used))

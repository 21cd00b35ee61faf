"""Facts about this machine as the engine sees it."""

from __future__ import annotations

import os
from typing import Any

from kt_sft.engine import _native  # type: ignore[attr-defined]
from kt_sft.engine.cpus import cgroup_cpu_limit, numa_nodes, usable_cpus
from kt_sft.engine.engine import available_tiers, get_engine
from kt_sft.engine.memory import available_bytes


def system_info(num_threads: int | None = None) -> dict[str, Any]:
    """What the engine runs on and how fast that is, measured on first use (some tens of milliseconds).

    Args:
        num_threads: As in KTConfig.

    Returns:
        A plain dict: `tier` (in use), `tiers` (available, lowest first), `threads`, `cpu`, `cpus` (usable), `cpu_limit`
        (the container's, in CPUs, or None), `numa_nodes`, `formats`, `peak_gflops` (of the tier's products, all
        threads), `peak_gflops_per_thread`, `read_bandwidth_gbs` (from memory, all threads, 1e9 bytes per second),
        `memory_total_bytes`, `memory_available_bytes` (the container's limit counted; None where the system does not
        say).

    Raises:
        ConfigError: `KT_SFT_ISA` names no tier.
    """
    engine = get_engine(num_threads)
    flops, bandwidth = engine.peak()
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
        "memory_available_bytes": available_bytes(),
    }

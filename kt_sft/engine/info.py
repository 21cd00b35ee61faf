"""Facts about this machine as the engine sees it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from kt_sft.engine import _native  # type: ignore[attr-defined]
from kt_sft.engine.cpus import cgroup_cpu_limit, engine_nodes, numa_nodes, oversubscribed, usable_cores, usable_cpus
from kt_sft.engine.engine import available_tiers, get_engine
from kt_sft.engine.memory import available_bytes


def system_info(num_threads: int | None = None) -> dict[str, Any]:
    """What the engine runs on and how fast that is, measured on first use (some tens of milliseconds).

    Args:
        num_threads: As in KTConfig.

    Returns:
        A plain dict: `tier` (in use), `tiers` (available, lowest first), `threads`, `cpu`, `cpus` (usable), `cores`
        (the physical ones they belong to), `smt` (whether several CPUs share a core), `cpu_limit` (the container's, in
        CPUs, the tightest of all its control groups, or None), `oversubscribed` (whether the engines of all processes
        run more threads than they are granted CPUs: then idle threads sleep at once), `torch_threads`, `numa_nodes`
        (with memory), `engine_nodes` (the numbers of those that threads and weights are kept on; empty where all
        memory is equally near), `formats`, `peak_gflops` (of the tier's products, all threads at once),
        `peak_gflops_per_thread`, `read_bandwidth_gbs` (from memory, all threads, 1e9 bytes per second),
        `memory_total_bytes`, `memory_available_bytes` (the container's limit counted), `huge_page_bytes` (of this
        process's memory, what the system really backs with huge pages). None stands for what the system does not say.

    Raises:
        ConfigError: `KT_SFT_ISA` names no tier.
    """
    engine = get_engine(num_threads)
    flops, _, bandwidth = engine.peak()
    cpus, cores = usable_cpus(), usable_cores()
    return {
        "tier": engine.tier,
        "tiers": available_tiers(),
        "threads": engine.threads,
        "cpu": _native.cpu_model().strip(),
        "cpus": len(cpus),
        "cores": len(cores),
        "smt": len(cores) < len(cpus),
        "cpu_limit": cgroup_cpu_limit(),
        "oversubscribed": oversubscribed(engine.threads),
        "torch_threads": torch.get_num_threads(),
        "numa_nodes": numa_nodes(),
        "engine_nodes": engine_nodes(),
        "formats": list(_native.formats()),
        "peak_gflops": flops * engine.threads / 1e9,
        "peak_gflops_per_thread": flops / 1e9,
        "read_bandwidth_gbs": bandwidth / 1e9,
        "memory_total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_available_bytes": available_bytes(),
        "huge_page_bytes": _huge_page_bytes(),
    }


def _huge_page_bytes(rollup: Path = Path("/proc/self/smaps_rollup")) -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in rollup.read_text().splitlines()[1:])
        return sum(int(fields[name].split()[0]) * 1024 for name in ("AnonHugePages", "ShmemPmdMapped"))
    except (OSError, KeyError, ValueError, IndexError):
        return None

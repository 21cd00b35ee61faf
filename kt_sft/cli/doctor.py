"""`kt-sft doctor`: what the engine runs on, how fast that is, whether the hosts fit."""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Any

from rich.console import Console
from rich.table import Table

import kt_sft
from kt_sft.cli import hosts, machine, seams
from kt_sft.cli.advice import advise
from kt_sft.config import openmp_wait_policy, requested_tier


def examine() -> dict[str, Any]:
    """Looks at everything; takes some seconds, most of them to import the hosts.

    Returns:
        Plain facts, ready for JSON: `kt_sft` (version), `engine` (`error`, `tier`, `limit`, `threads`), `tiers` (one
        dict each), `cpu`, `memory`, `numa`, `huge_pages`, `accelerators`, `hosts`, `seams` and `advice` (sentences).
        Bytes and 1e9 bytes or operations per second; None where the system does not say.
    """
    engine, tiers, read_gbs = _engine()
    facts: dict[str, Any] = {
        "kt_sft": kt_sft.__version__,
        "engine": engine,
        "tiers": tiers,
        "cpu": _cpu(),
        "memory": _memory() | {"read_gbs": read_gbs},
        "numa": machine.numa_nodes(),
        "huge_pages": machine.huge_pages() | {"granted": machine.huge_pages_granted()},
        "accelerators": machine.accelerators(),
        "hosts": hosts.versions(),
        "seams": seams.check_all(),
    }
    return facts | {"advice": advise(facts)}


def _engine() -> tuple[dict[str, Any], list[dict[str, Any]], float | None]:
    """The engine, its tiers, and the read bandwidth of the tier in use."""
    engine: dict[str, Any] = {"error": None, "tier": None, "limit": None, "threads": None}
    available: list[str] = []
    peaks: dict[str, Any] = {}
    try:
        engine["limit"] = requested_tier()
        from kt_sft.engine.engine import available_tiers, get_engine
        from kt_sft.engine.peaks import measure_peak

        available = available_tiers()
        running = get_engine()
        engine |= {"tier": running.tier, "threads": running.threads}
        peaks = {tier: measure_peak(tier) for tier in available}
    except Exception as error:  # whatever keeps the engine from running is what the user came to see
        engine["error"] = f"{type(error).__name__}: {error}"
    reasons = machine.tier_reasons(available, engine["tier"], engine["limit"], machine.cpu_flags())
    tiers = [
        {
            "name": name,
            "available": name in available,
            "chosen": name == engine["tier"],
            "reason": reason,
            "peak_gflops": peaks[name].gflops if name in peaks else None,
            "peak_gflops_per_thread": peaks[name].gflops / peaks[name].threads if name in peaks else None,
            "int8_peak_gflops": peaks[name].int8_gflops if name in peaks else None,
        }
        for name, reason in reasons.items()
    ]
    chosen = peaks.get(engine["tier"])
    return engine, tiers, None if chosen is None else chosen.read_gbs


def _cpu() -> dict[str, Any]:
    flags, usable = machine.cpu_flags() or set(), sorted(os.sched_getaffinity(0))
    cores, limit = None, None
    with contextlib.suppress(ImportError):  # no native module: the engine's error says so
        from kt_sft.engine.cpus import cgroup_cpu_limit, usable_cores

        cores, limit = len(usable_cores()), cgroup_cpu_limit()
    return {
        "model": machine.cpu_model(),
        "architecture": platform.machine(),
        "online": machine.online_cpus(),
        "usable": len(usable),
        "usable_cores": cores,
        "container_limit": limit,
        "last_level_cache_bytes": machine.last_level_cache_bytes(usable),
        "matrix_flags": sorted(flag for flag in flags if flag.startswith("amx")),
        "openmp_wait_policy": openmp_wait_policy(),
    }


def _memory() -> dict[str, Any]:
    from kt_sft.engine.memory import available_bytes, limit_bytes

    return {
        "total_bytes": machine.memory_bytes(),
        "available_bytes": available_bytes(),
        "container_limit_bytes": limit_bytes(),
    }


def show(facts: dict[str, Any], console: Console) -> None:
    """Prints the facts as tables, and the advice."""
    console.print(_machine_table(facts))
    console.print(_tier_table(facts["tiers"]))
    console.print(_host_table(facts))
    if not facts["advice"]:
        console.print("Nothing to do: this machine is ready.", style="green")
    for sentence in facts["advice"]:
        console.print(f"- {sentence}", highlight=False, markup=False)


def _machine_table(facts: dict[str, Any]) -> Table:
    cpu, memory, pages, engine = facts["cpu"], facts["memory"], facts["huge_pages"], facts["engine"]
    table = Table(title=f"kt_sft {facts['kt_sft']} on this machine", title_justify="left", show_header=False)
    state = f"{engine['tier']}, {engine['threads']} threads" if engine["error"] is None else engine["error"]
    table.add_row("engine", state)
    table.add_row("CPU", f"{cpu['model'] or 'unknown'} ({cpu['architecture']})")
    limit = "" if cpu["container_limit"] is None else f", container grants {cpu['container_limit']:g}"
    cores = "" if cpu["usable_cores"] is None else f" on {cpu['usable_cores']} cores"
    table.add_row("CPUs", f"{cpu['usable']} of {cpu['online']} usable{cores}{limit}")
    table.add_row("last-level cache", _bytes(cpu["last_level_cache_bytes"]))
    limit = "" if memory["container_limit_bytes"] is None else f", container {_bytes(memory['container_limit_bytes'])}"
    table.add_row("memory", f"{_bytes(memory['available_bytes'])} free of {_bytes(memory['total_bytes'])}{limit}")
    table.add_row("read bandwidth", "-" if memory["read_gbs"] is None else f"{memory['read_gbs']:.1f} GB/s")
    for node in facts["numa"]:
        table.add_row(f"NUMA node {node['node']}", f"CPUs {node['cpus'] or 'none'}, {_bytes(node['memory_bytes'])}")
    granted = {True: "granted", False: "not granted", None: "cannot be told"}[pages["granted"]]
    reserved = f"{pages['reserved_free']} of {pages['reserved']} reserved ones free"
    table.add_row("huge pages", f"transparent: {pages['transparent'] or 'unknown'}, {granted}; {reserved}")
    for found in facts["accelerators"]:
        table.add_row("accelerator", f"{found['name']} ({found['kind']}), {_bytes(found['memory_bytes'])}")
    if not facts["accelerators"]:
        table.add_row("accelerator", "none")
    return table


def _tier_table(tiers: list[dict[str, Any]]) -> Table:
    table = Table("tier", title="Instruction tiers", title_justify="left")
    table.add_column("peak, GFLOP/s", justify="right")
    table.add_column("per thread", justify="right")
    table.add_column("INT8", justify="right")
    table.add_column("state")
    for tier in tiers:
        measured = tier["peak_gflops"] is not None
        table.add_row(
            tier["name"],
            f"{tier['peak_gflops']:.0f}" if measured else "-",
            f"{tier['peak_gflops_per_thread']:.0f}" if measured else "-",
            f"{tier['int8_peak_gflops']:.0f}" if measured else "-",
            tier["reason"],
            style="bold" if tier["chosen"] else None,
        )
    return table


def _host_table(facts: dict[str, Any]) -> Table:
    table = Table("host or seam", "version", "wanted", "fits", title="Hosts and seams", title_justify="left")
    for host in facts["hosts"]:
        table.add_row(host["name"], host["version"] or "-", host["wanted"], "yes" if host["fits"] else "no")
    table.add_section()
    for seam in facts["seams"]:
        table.add_row(seam["name"], "", "", "yes" if seam["problem"] is None else f"no: {seam['problem']}")
    return table


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

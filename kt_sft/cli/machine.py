"""Facts about this machine, as files of /sys and /proc and torch give them; measured speeds are in engine.peaks.

Every reader takes the folder it reads from, so that tests can make machines up, and says None where the system says
nothing.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from kt_sft.config import TIERS

_SYS = Path("/sys")
_PROC = Path("/proc")

#: The words of /proc/cpuinfo that a tier needs. The kernel leaves a word out if it does not save those registers.
TIER_FLAGS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl"),
    "avx512_bf16": ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni"),
    "amx": ("avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
}


def cpu_flags(proc: Path = _PROC) -> set[str] | None:
    """The CPU's features that the kernel lets programs use."""
    for line in _text(proc / "cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return None


def cpu_model(proc: Path = _PROC) -> str | None:
    """The CPU's own name."""
    for line in _text(proc / "cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return None


def memory_bytes() -> int:
    """Memory of this machine, whatever a container grants of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tier_reasons(available: list[str], chosen: str | None, limit: str | None, flags: set[str] | None) -> dict[str, str]:
    """Why each tier is used or not, one phrase each.

    Args:
        available: Tiers that this build and this CPU have.
        chosen: The one in use; None where the engine does not run.
        limit: What KT_SFT_ISA asks for, or None.
        flags: From `cpu_flags`.
    """
    return {tier: _tier_reason(tier, available, chosen, limit, flags) for tier in TIERS}


def _tier_reason(tier: str, available: list[str], chosen: str | None, limit: str | None, flags: set[str] | None) -> str:
    if tier == chosen:
        if limit == tier:
            return f"in use: KT_SFT_ISA={limit}"
        return "in use: " + ("the best this machine has" if tier == available[-1] else "the fastest on this machine")
    if tier in available:
        if limit is None and chosen is not None and TIERS.index(tier) > TIERS.index(chosen):
            return f"available; its products are slower here than {chosen}'s (KT_SFT_ISA={tier} would use it)"
        if limit is not None and TIERS.index(tier) > TIERS.index(limit):
            return f"available; KT_SFT_ISA={limit} keeps it from being used"
        return "available"
    missing = [flag for flag in TIER_FLAGS[tier] if flags is not None and flag not in flags]
    if missing:
        return f"the CPU lacks {', '.join(missing)}, or the system does not grant it"
    return "this build lacks it, or the system does not grant its registers"


def last_level_cache_bytes(cpus: list[int], sys: Path = _SYS) -> int | None:
    """Bytes of the last-level caches that these CPUs reach, shared ones counted once."""
    sizes: dict[tuple[int, str], int] = {}
    for cpu in cpus:
        for index in sorted((sys / f"devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")):
            level, kind = _text(index / "level").strip(), _text(index / "type").strip()
            size, shared = _text(index / "size").strip(), _text(index / "shared_cpu_list").strip()
            if level.isdecimal() and kind != "Instruction" and size.endswith("K") and size[:-1].isdecimal():
                sizes[int(level), shared] = int(size[:-1]) * 1024
    last = max((level for level, _ in sizes), default=None)
    return None if last is None else sum(size for (level, _), size in sizes.items() if level == last)


def numa_nodes(sys: Path = _SYS) -> list[dict[str, Any]]:
    """Each NUMA node's `node` number, `cpus` (a list such as "0-31,64-95") and `memory_bytes`."""
    nodes = []
    for folder in (sys / "devices/system/node").glob("node[0-9]*"):
        memory = None
        for line in _text(folder / "meminfo").splitlines():
            words = line.split()  # Node 0 MemTotal: 24684084 kB
            if len(words) >= 4 and words[2] == "MemTotal:":
                memory = int(words[3]) * 1024
        nodes.append({"node": int(folder.name[4:]), "cpus": _text(folder / "cpulist").strip(), "memory_bytes": memory})
    return sorted(nodes, key=lambda node: node["node"])


def huge_pages(sys: Path = _SYS, proc: Path = _PROC) -> dict[str, Any]:
    """The settings of transparent huge pages, and the reserved ones.

    Returns:
        `transparent` and `defrag` (the chosen word, or None), `reserved`, `reserved_free` (pages) and `page_bytes`.
    """
    memory = {}
    for line in _text(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        memory[name] = value.split()
    folder = sys / "kernel/mm/transparent_hugepage"
    return {
        "transparent": _chosen(_text(folder / "enabled")),
        "defrag": _chosen(_text(folder / "defrag")),
        "reserved": int(memory.get("HugePages_Total", ["0"])[0]),
        "reserved_free": int(memory.get("HugePages_Free", ["0"])[0]),
        "page_bytes": int(memory.get("Hugepagesize", ["0"])[0]) * 1024,
    }


def huge_pages_granted(megabytes: int = 32) -> bool | None:
    """Whether memory that asks for huge pages, as the engine's does, gets them: tried with a fresh block."""
    before = _own_huge_bytes()
    if before is None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    with mmap.mmap(-1, megabytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without them
            return False
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        after = _own_huge_bytes() or 0
    return after - before >= (megabytes << 20) // 2


def _own_huge_bytes() -> int | None:
    for line in _text(_PROC / "self/smaps_rollup").splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return None


def accelerators() -> list[dict[str, Any]]:
    """Each accelerator's `kind`, `name`, `memory_bytes` and `free_bytes`, as torch sees them; usually one, or none."""
    import torch

    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    module = torch.get_device_module(kind)
    found = []
    for number in range(torch.accelerator.device_count()):
        name = module.get_device_name(number) if hasattr(module, "get_device_name") else kind
        free, total = module.mem_get_info(number) if hasattr(module, "mem_get_info") else (None, None)
        found.append({"kind": kind, "name": name, "memory_bytes": total, "free_bytes": free})
    return found


def online_cpus() -> int:
    """CPUs of this machine, whether or not this process may use them."""
    return os.cpu_count() or 1


def _chosen(setting: str) -> str | None:
    """The word in brackets: "always [madvise] never" means madvise."""
    _, bracket, rest = setting.partition("[")
    return rest.partition("]")[0] if bracket else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

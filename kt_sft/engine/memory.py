"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

from kt_sft.engine.cgroups import OWN, ROOT, group_folders

#: Version 1 of control groups writes "no limit" as a number above this.
_NO_LIMIT = 1 << 60
#: Of memory.stat: cached file pages, which the kernel drops before it refuses memory, whether read once or more often.
#: (MemAvailable counts both as well.) Files in tmpfs are none of them. Version 1 prefixes sums over a hierarchy.
_CACHED = ("inactive_file", "active_file")


def available_bytes() -> int | None:
    """Bytes this process may still take: free and reclaimable host memory, within every control group above it.

    None where the system does not say.
    """
    limits = [limit for limit in (_host(Path("/proc/meminfo")), _cgroup()) if limit is not None]
    return min(limits, default=None)


def limit_bytes(own: Path = OWN, root: Path = ROOT) -> int | None:
    """Bytes that the tightest control group above this process allows in all, or None without a limit."""
    files = [
        folder / ("memory.limit_in_bytes" if v1 else "memory.max") for folder, v1 in group_folders("memory", own, root)
    ]
    limits = [_number(file) for file in files]
    return min((limit for limit in limits if limit is not None and limit < _NO_LIMIT), default=None)


def _host(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _cgroup(own: Path = OWN, root: Path = ROOT) -> int | None:
    """The tightest remaining allowance of this process's control group and those above it (v1 and v2)."""
    allowances = [_v1(folder) if v1 else _v2(folder) for folder, v1 in group_folders("memory", own, root)]
    return min((allowance for allowance in allowances if allowance is not None), default=None)


def _v2(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None or used is None:
        return None
    return max(0, limit - used + _cached(folder, ""))


def _v1(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _NO_LIMIT:
        return None
    return max(0, limit - used + _cached(folder, "total_"))


def _cached(folder: Path, prefix: str) -> int:
    """Bytes of cached file pages of a group and those below it; 0 where the kernel does not say."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(fields.get(prefix + name, 0)) for name in _CACHED)
    except (OSError, ValueError):
        return 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None

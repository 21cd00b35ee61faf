"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int | None:
    """Bytes this process may still take: free and reclaimable host memory, within every control group above it.

    None where the system does not say.
    """
    limits = [
        limit for limit in (_host(Path("/proc/meminfo")), _cgroup(Path("/proc/self/cgroup"))) if limit is not None
    ]
    return min(limits, default=None)


def _host(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _cgroup(own: Path, root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The tightest remaining allowance of this process's control group and those above it (v1 and v2)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    allowances = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        for folder in _upwards(base, path):
            allowance = _v1(folder) if controllers else _v2(folder)
            if allowance is not None:
                allowances.append(allowance)
    return min(allowances, default=None)


def _upwards(base: Path, path: str) -> list[Path]:
    relative = Path(path.lstrip("/"))
    return [base, *(base / part for part in [relative, *relative.parents] if part != Path("."))]


def _v2(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None or used is None:
        return None
    return max(0, limit - used + _reclaimable(folder, "inactive_file"))


def _v1(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= 1 << 60:  # v1 writes "no limit" as a huge number
        return None
    return max(0, limit - used + _reclaimable(folder, "total_inactive_file"))


def _reclaimable(folder: Path, field: str) -> int:
    """Cached file pages, which the kernel drops before it refuses memory."""
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == field:
                return int(value)
    except (OSError, ValueError):
        return 0
    return 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None

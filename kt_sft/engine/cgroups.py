"""The control groups (containers, batch systems) that this process lives in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OWN = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def group_folders(controller: str, own: Path = OWN, root: Path = ROOT) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control group and of those above it, for one controller.

    A container often sees its own group mounted as the root while `own` names the host's path, so the root always
    counts and folders that do not exist are harmless to readers.

    Args:
        controller: "cpu" or "memory".
        own: /proc/self/cgroup, or a made-up file.
        root: Where control groups are mounted.

    Yields:
        Each folder, and whether it is of version 1.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        relative = Path(path.lstrip("/"))
        base = root / controller if controllers else root
        parts = [part for part in (relative, *relative.parents) if part != Path(".")]
        yield from ((folder, bool(controllers)) for folder in (base, *(base / part for part in parts)))

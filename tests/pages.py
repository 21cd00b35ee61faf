"""The pages of memory that a process shares with others, from /proc/self/smaps."""

from __future__ import annotations

from pathlib import Path


def shared_experts() -> dict[str, dict[str, int]]:
    """`mappings` of experts' shared memory."""
    return mappings("kt_sft experts")


def mappings(name: str) -> dict[str, dict[str, int]]:
    """Sizes in KiB (Rss, Pss, Private_Dirty, ...) of what is mapped of files with `name` in their path, by inode."""
    found: dict[str, dict[str, int]] = {}
    fields: dict[str, int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # a mapping: addresses, permissions, offset, device, inode, name
            fields = found.setdefault(words[4], {}) if name in line else {}
        elif words[-1] == "kB":
            fields[words[0].rstrip(":")] = fields.get(words[0].rstrip(":"), 0) + int(words[1])
    return found

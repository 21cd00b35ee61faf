"""Whether the experts that are about to be loaded fit the memory that is left."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kt_sft.engine.geometry import row_bytes
from kt_sft.engine.memory import available_bytes
from kt_sft.engine.store import matrix_bytes
from kt_sft.loading.errors import NotEnoughMemoryError
from kt_sft.loading.layout import ExpertLayout

_PROC = Path("/proc")


def experts_bytes(layout: ExpertLayout, storage: Mapping[str, Any]) -> int:
    """What the engine will take for one module of experts: their [I, H] and [H, I] matrices, as they are stored.

    Args:
        layout: Theirs.
        storage: Their format, as LayerStore's arguments.
    """
    hidden, intermediate = layout.hidden_size, layout.intermediate_size
    first = matrix_bytes(intermediate, hidden, **storage)
    down = matrix_bytes(hidden, intermediate, **storage)
    return layout.num_experts * ((2 if layout.gated else 1) * first + down)


def scales_bytes(layout: ExpertLayout, storage: Mapping[str, Any]) -> int:
    """The part of `experts_bytes` that is scales and zero points: what experts take whose rows stay in files."""
    hidden, intermediate, name = layout.hidden_size, layout.intermediate_size, storage["expert_format"]
    first, down = intermediate * row_bytes(name, hidden), hidden * row_bytes(name, intermediate)
    return experts_bytes(layout, storage) - layout.num_experts * ((2 if layout.gated else 1) * first + down)


def require_bytes(each: int, what: str, processes: int = 1, together: int = 0) -> None:
    """Checks that `processes` processes of this machine, this one too, can take `each` bytes, and `together` once.

    The processes load at the same time, but none waits for another: when this one looks, some may have filled a part
    of their share already. That part is no longer available, and no longer needed either. Where the others cannot be
    seen, only the share of this process is checked, so a run that fits is never refused.

    Raises:
        NotEnoughMemoryError: They cannot; names need and have.
    """
    have = available_bytes()
    if have is None:
        return
    taken = _taken_by_others(each, processes - 1)
    if taken is None:
        processes, taken = 1, 0
    if each * processes + together - taken > have:
        raise not_enough(each, have, what, processes, taken, together)


def not_enough(
    each: int, have: int | None, what: str, processes: int = 1, taken: int = 0, together: int = 0
) -> NotEnoughMemoryError:
    """The error that says so."""
    need = readable(each if processes > 1 else each + together)
    copies = ""
    if processes > 1:
        once = f" and {readable(together)} for all of them" if together else ""
        copies = f" in each of {processes} processes{once} ({readable(each * processes + together)} in all)"
    loaded = f" and {readable(taken)} already loaded" if taken else ""
    there = "an unknown amount" if have is None else readable(have)
    return NotEnoughMemoryError(
        f"not enough memory for {what}: {need} needed{copies}, {there} available{loaded}; "
        "free some, raise the memory limit of the container, start fewer processes or take a smaller model"
    )


def readable(size: int) -> str:
    """`size` bytes in the largest unit of which there is at least one."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def _taken_by_others(need: int, others: int) -> int | None:
    """Bytes of their shares of `need` that the other processes of this run have filled; None if they cannot be seen.

    They are the processes with this one's parent, the launcher. All of them came the same way up to here, so what one
    has beyond this one is its part of what is being loaded.
    """
    own = _parent_and_private(_PROC / str(os.getpid()))
    if own is None:
        return None if others else 0
    parent, private = own
    found = [_parent_and_private(folder) for folder in _other_processes()]
    siblings = [size for entry in found if entry is not None for other, size in [entry] if other == parent]
    if len(siblings) < others:
        return None
    return sum(min(need, max(0, size - private)) for size in sorted(siblings)[len(siblings) - others :])


def _other_processes() -> Iterable[Path]:
    return (folder for folder in _PROC.iterdir() if folder.name.isdigit() and int(folder.name) != os.getpid())


def _parent_and_private(folder: Path) -> tuple[int, int] | None:
    """A process's parent and the bytes of anonymous memory it occupies; None if it is gone or has none."""
    try:
        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
        return int(fields["PPid"]), int(fields["RssAnon"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None

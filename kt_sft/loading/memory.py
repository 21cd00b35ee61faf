"""Whether what is about to be loaded fits the memory that is left."""

from __future__ import annotations

from kt_sft.engine.memory import available_bytes
from kt_sft.loading.errors import NotEnoughMemoryError

_GIB = 1 << 30


def require_bytes(need: int, what: str) -> None:
    """Checks that `need` bytes can still be taken.

    Raises:
        NotEnoughMemoryError: They cannot; names need and have.
    """
    have = available_bytes()
    if have is not None and need > have:
        raise NotEnoughMemoryError(
            f"not enough memory for {what}: {need / _GIB:.1f} GiB needed, {have / _GIB:.1f} GiB available; "
            "free some, raise the memory limit of the container, start fewer processes or take a smaller model"
        )

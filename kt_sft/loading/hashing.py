"""SHA-256 of parts of files, with bounded memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.threads import run_all

_CHUNK = 4 << 20

#: Called with numbers of bytes as they are done.
Advance = Callable[[int], None]


def nothing(_: int) -> None:
    """For those who do not ask how far it is."""


def hash_span(path: str | os.PathLike[str], offset: int, nbytes: int, advance: Advance = nothing) -> str:
    """Of `nbytes` bytes of a file from `offset` on.

    Raises:
        CheckpointError: The file cannot be read, or ends before.
    """
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, max(nbytes, 1))))
    try:
        with open(path, "rb", buffering=0) as file:
            while nbytes:
                got = os.preadv(file.fileno(), [buffer[: min(nbytes, _CHUNK)]], offset)
                if got == 0:
                    raise CheckpointError(f"{path}: truncated, it ends before byte {offset + nbytes}")
                found.update(buffer[:got])
                offset, nbytes = offset + got, nbytes - got
                advance(got)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    return found.hexdigest()


def hash_file(path: Path, advance: Advance = nothing) -> str:
    """Of a whole file.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    return hash_span(path, 0, size, advance)


def hash_tensors(
    path: Path, places: Mapping[str, tuple[int, int]], threads: int, advance: Advance = nothing
) -> dict[str, str]:
    """Of every tensor of a file, by key.

    Args:
        path: The file.
        places: (first byte, bytes) of each tensor.
        threads: At most so many read at a time.
        advance: Hears of bytes done.

    Raises:
        CheckpointError: The file cannot be read, or ends before.
    """
    found: dict[str, str] = {}

    def work(key: str) -> None:
        found[key] = hash_span(path, *places[key], advance)

    run_all(work, places, threads)
    return {key: found[key] for key in places}

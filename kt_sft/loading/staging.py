"""A model appears in its folder when it is complete: it is saved beside, and moved there file by file at the end.

The host writes config.json first and then the weights, in place. A full disk, or a kill between two shards, would leave
a folder that looks like a model. Here config.json, without which nothing takes a folder for a model, comes last.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from kt_sft.config import local_rank_and_size
from kt_sft.loading.durable import write_out, write_out_folder
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.merged_record import RECORD

_LAST = "config.json"


@contextlib.contextmanager
def staged(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder inside `target` to save a model to; its files are moved to `target` if nothing fails.

    The folder's name is the same every time, so what a killed process left there goes with the next save.

    Raises:
        CheckpointError: Weights could not be written, or not be moved; of other errors the host's own comes through.
    """
    folder = Path(target)
    partial = folder / f"incomplete-save-{local_rank_and_size()[0]}"
    existed = folder.is_dir()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with contextlib.ExitStack() as unfinished:
        unfinished.callback(_remove, partial, folder, existed)
        try:
            yield partial
        except SafetensorError as error:  # which names no file
            raise _unwritten(folder, error) from error
        names = _names_to_move(partial, folder)
        try:
            write_out_folder(partial)
        except OSError as error:
            raise _unwritten(folder, error) from error
        unfinished.pop_all()  # from here on there may be no other model than the one in `partial`
    try:
        _publish(names, partial, folder)
        partial.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the model is complete, but cannot be moved there from {partial.name} ({error}); move its files"
        ) from error


def _unwritten(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder}: the model cannot be written there ({error}); nothing of it was left behind")


def _remove(partial: Path, folder: Path, existed: bool) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    if not existed:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing else is there


def _names_to_move(partial: Path, folder: Path) -> list[str]:
    names = sorted((entry.name for entry in partial.iterdir()), key=lambda name: (name == _LAST, name))
    for name in names:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise CheckpointError(f"{folder / name} is a folder where the model has a file; move it away")
    return names


def _publish(names: list[str], partial: Path, folder: Path) -> None:
    if _LAST in names:
        (folder / _LAST).unlink(missing_ok=True)
        if RECORD not in names:
            (folder / RECORD).unlink(missing_ok=True)
    for stale in _stale_weights(folder, {*names}):
        stale.unlink()
    for name in names:
        if name == _LAST:
            write_out(folder)  # or the others' names might come to the disk after it
        os.replace(partial / name, folder / name)
    write_out(folder)


def _stale_weights(folder: Path, names: set[str]) -> list[Path]:
    """Weights of an earlier save under the same base name: whole, in shards, and their index."""
    stems = {match[1] for name in names if (match := re.fullmatch(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors", name))}
    pattern = "|".join(re.escape(stem) for stem in stems)
    weights = re.compile(rf"({pattern})((-\d{{5}}-of-\d{{5}})?\.safetensors|\.safetensors\.index\.json)")
    return [file for file in folder.iterdir() if weights.fullmatch(file.name) and file.name not in names]

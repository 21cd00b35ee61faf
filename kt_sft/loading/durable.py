"""Files that are whole after a power loss: on the disk before they get the name by which they are found.

A file system writes names and contents when it likes. One that is renamed right after it was written may be found
empty under its new name, with what was there before gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

#: What file systems say that cannot write a folder's entries out on request, as some of networks.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)


def write_out(path: Path) -> None:
    """Waits until a file's contents, or a folder's own entries, are on the disk.

    Raises:
        OSError: They cannot be written; this may be the first to hear of a full disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def write_out_folder(folder: Path) -> None:
    """Likewise of all files in a folder, not of those in folders of it, and of its entries.

    Raises:
        OSError: As of `write_out`.
    """
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may write there
            if entry.is_file(follow_symlinks=False):
                write_out(Path(entry.path))
    write_out(folder)


def publish(partial: Path, target: Path) -> None:
    """Gives a complete file, or a folder of complete files, its final name, in place of the file that had it.

    Raises:
        OSError: It cannot be written or renamed; what was at `target` is as it was.
    """
    write_out_folder(partial) if partial.is_dir() else write_out(partial)
    os.replace(partial, target)
    write_out(target.parent)

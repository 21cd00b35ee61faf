"""An adapter that is saved over an earlier one takes its place when it has been written, or not at all.

PEFT writes in place: a full disk, or a power loss, would leave neither the new adapter nor the one that was there.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kt_sft.loading.durable import publish
from kt_sft.loading.errors import CheckpointError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write to that becomes `path` if nothing fails.

    Raises:
        CheckpointError: It cannot be written; what was at `path` is as it was.
    """
    # A name of its own: several processes may save to one path. Where that is a link, the link is replaced, and what it
    # points to stays: a cache's or a store's file, which other folders share, and which must keep its contents.
    partial = path.with_name(f"{path.name}.incomplete-{secrets.token_hex(8)}")
    try:
        yield partial
        publish(partial, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written ({error}); what was there before is as it was") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def saving_whole(save_file: Callable[..., None]) -> Callable[..., None]:
    """Wraps the `save_file` of safetensors as PEFT calls it: weights with some of routed experts are written whole."""

    @functools.wraps(save_file)
    def save(tensors: Mapping[str, Any], filename: Any, *args: Any, **kwargs: Any) -> None:
        if not any("experts" in key.split(".") for key in tensors):
            save_file(tensors, filename, *args, **kwargs)
            return
        with whole_file(Path(filename)) as partial:
            save_file(tensors, partial, *args, **kwargs)

    return save

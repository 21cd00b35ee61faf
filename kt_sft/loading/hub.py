"""Models that are named by a repository's id on the hub: their folder in its cache, and what it lacks of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_sft.config import ConfigError

logger = logging.getLogger("kt_sft")

_PREFIX = "models--"


@dataclass(frozen=True)
class Snapshot:
    """`<cache>/models--org--name/snapshots/<revision>`, whose files are links to `<cache>/models--org--name/blobs`."""

    folder: Path

    @property
    def repository(self) -> Path:
        """The folder of all its revisions."""
        return self.folder.parents[1]

    @property
    def name(self) -> str | None:
        """The repository's id; None for one that is none of a model."""
        found = self.repository.name
        return found.removeprefix(_PREFIX).replace("--", "/") if found.startswith(_PREFIX) else None


def snapshot_of(folder: Path) -> Snapshot | None:
    """The snapshot that a folder is, or lies in."""
    return next((Snapshot(one) for one in (folder, *folder.parents) if one.parent.name == "snapshots"), None)


def model_folder(name: str, *, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The folder of a model: `name` itself or, where it is a repository's id, its snapshot in the hub's cache.

    Args:
        name: A path or an id.
        revision: Of the repository; its main one if None.
        cache_dir: The hub's cache; the usual one if None.

    Raises:
        ConfigError: It is neither.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except HFValidationError as error:
        raise ConfigError(f"kt_sft: {name} is neither a folder nor a repository's id; correct the path") from error
    except OSError as error:  # also what it raises for a repository that the cache has not
        options = "".join(
            f" --{option} {value}"
            for option, value in (("revision", revision), ("cache-dir", cache_dir))
            if value is not None
        )
        raise ConfigError(
            f"kt_sft: {name} is neither a folder nor in the hub's cache; download it (`hf download {name}{options}`), "
            "or give a folder"
        ) from error


def model_name(folder: Path) -> str:
    """What a model is called: the id of its repository or, elsewhere, its folder's name."""
    snapshot = snapshot_of(folder)
    return (snapshot.name if snapshot is not None else None) or folder.resolve().name


def complete_snapshot(folder: Path, names: Sequence[str], hub: Mapping[str, Any]) -> None:
    """Downloads files that belong to a model into its snapshot, where this is one and they are not there yet.

    transformers downloads only files that it knows. What the hub has not, or cannot give now, stays away.

    Args:
        folder: Of the model's weights.
        names: Of the files.
        hub: Keyword arguments of `from_pretrained` that say how to reach the hub.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    snapshot = snapshot_of(folder)
    if snapshot is None or snapshot.name is None:
        return
    revision, cache = snapshot.folder.name, snapshot.repository.parent
    for path in (folder / name for name in names):
        file = path.relative_to(snapshot.folder).as_posix()
        if try_to_load_from_cache(snapshot.name, file, cache_dir=cache, revision=revision) is not None:
            continue  # it is there, or the cache knows that the hub has none
        try:
            hf_hub_download(snapshot.name, file, cache_dir=cache, revision=revision, **hub)
        except LocalEntryNotFoundError:
            logger.info("the hub is out of reach, and its cache does not say whether %s has %s", snapshot.name, file)
        except OSError as error:  # there is none, or no access
            logger.debug("%s has no %s: %s", snapshot.name, file, error)

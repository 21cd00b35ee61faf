"""Compares every byte of a ready store with the hashes of its manifest."""

from __future__ import annotations

from pathlib import Path

from kt_sft.loading.checkpoint import read_header
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.hashing import Advance, hash_file, hash_tensors, nothing
from kt_sft.loading.ready.manifest import Manifest
from kt_sft.loading.ready.reading import check_headers


def total_bytes(manifest: Manifest) -> int:
    """What there is to be read."""
    files, others = manifest.files.values(), manifest.others.values()
    return sum(file.bytes for file in files) + sum(file.bytes for file in others)


def verify_store(folder: Path, manifest: Manifest, threads: int, advance: Advance = nothing) -> list[str]:
    """What is not as the manifest says, one sentence each, with file and tensor; empty for a store that is whole.

    Args:
        folder: Of the store.
        manifest: Its manifest.
        threads: At most so many read at a time.
        advance: Hears of bytes done.
    """
    defects: list[str] = []
    present = [name for name in manifest.files if (folder / name).is_file()]
    strange = sorted({file.name for file in folder.glob("*.safetensors")} - manifest.files.keys())
    defects += [f"{folder / name}: missing" for name in manifest.files if name not in present]
    defects += [f"{folder / name}: is no file of this store" for name in strange]
    for name in present:
        path, file = folder / name, manifest.files[name]
        try:
            check_headers(folder, _only(manifest, name), [name])
            places = {key: (entry.offset, entry.nbytes) for key, entry in read_header(path).items()}
            hashes = hash_tensors(path, places, threads, advance)
        except CheckpointError as error:
            defects.append(str(error))
            continue
        defects += [
            f"{path}: tensor {key} does not have the content that was written: damaged or replaced"
            for key, tensor in file.tensors.items()
            if hashes[key] != tensor.sha256
        ]
    for name, other in manifest.others.items():
        try:
            if hash_file(folder / name, advance) != other.sha256:
                defects.append(f"{folder / name}: is not what was written: changed or damaged")
        except CheckpointError as error:
            defects.append(str(error))
    return defects


def _only(manifest: Manifest, name: str) -> Manifest:
    return Manifest(manifest.made_by, manifest.source, manifest.settings, {}, {name: manifest.files[name]})

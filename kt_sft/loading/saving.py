"""Puts the experts back when a model is saved, so that an export is an ordinary checkpoint.

The frozen experts did not change, so their tensors are the source checkpoint's own, byte for byte, mapped from its
files and written shard by shard. They keep its dtype, too: cast to the dtype of the model, they would have to be in
memory all at once, and the readers of a checkpoint cast anyway. What merged adapters changed is added afterwards, in
the files (kt_sft.loading.merging).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from kt_sft.config import local_rank_and_size
from kt_sft.loading.checkpoint import TensorEntry, identity_of
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.mapping import ModulePlan
from kt_sft.loading.sources.dense import DenseWeight
from kt_sft.loading.sources.entries import RequantisationError

logger = logging.getLogger("kt_sft")


def state_with_experts(
    model: nn.Module,
    plans: Sequence[ModulePlan],
    dense: Sequence[DenseWeight],
    source: tuple[tuple[str, int, int], ...],
) -> dict[str, torch.Tensor]:
    """`model.state_dict()` with the experts' tensors, under keys that saving turns back into the source's own.

    Of a quantised source, weights of the dense part are given as it has them, too: its own bytes where they did not
    change, and quantised again where they did.

    Args:
        model: The model that `plans` were made for; its `_weight_conversions` no longer make experts.
        plans: From loading.
        dense: From loading: what was dequantised.
        source: `Checkpoint.identity()` at loading time.

    Raises:
        CheckpointError: The source checkpoint has changed or gone since it was loaded, or a weight that changed cannot
            be quantised again as it was.
    """
    _check_unchanged(source)
    state = dict(model.state_dict())
    plain = [entry for plan in plans for entry in plan.entries().values() if entry.stored() == (entry,)]
    _announce_dtypes(plain, getattr(model, "dtype", None))
    entries = {key: entry for plan in plans for key, entry in plan.stored().items()}
    entries |= {part.key: part for weight in dense for part in weight.entry.stored()}
    names = keys_for_saving(entries, getattr(model, "_weight_conversions", None) or [])
    error = RequantisationError()
    for weight in dense:
        changed = weight.written(state.pop(weight.name), error) or {}
        state |= {names[key]: value for key, value in changed.items()}
        for key in changed:
            del entries[key]
    announce_requantised(error, "weights of the dense part")
    for path, keys in _by_file(entries.values()).items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for key in keys:
                    state[names[key]] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read to copy the experts from it ({error})") from error
    return state


def announce_requantised(error: RequantisationError, what: str) -> None:
    """Logs how far weights that changed are from what they should be."""
    if error.count and local_rank_and_size()[0] == 0:
        logger.info(
            "%d %s changed and are quantised again: relative error of what is written %.2e",
            error.count,
            what,
            error.relative,
        )


def keep_quantization(folder: Path, quantization: Mapping[str, Any]) -> None:
    """Writes the source's `quantization_config` into the config.json in `folder`, whose tensors are as it says."""
    file = folder / "config.json"
    if file.exists():
        settings = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": dict(quantization)}
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _announce_dtypes(entries: Iterable[TensorEntry], dtype: torch.dtype | None) -> None:
    kept = sorted({entry.dtype_name for entry in entries if entry.dtype != dtype})
    if kept and local_rank_and_size()[0] == 0:
        logger.warning(
            "the experts are saved as %s, copied from the checkpoint they came from; the rest of the model is %s",
            " and ".join(kept),
            dtype,
        )


def check_target(save_directory: str | os.PathLike[str], source: tuple[tuple[str, int, int], ...]) -> None:
    """Refuses to save into the folder that the experts are copied from: writing would truncate the very files.

    Raises:
        CheckpointError: `save_directory` holds a file of `source`.
    """
    files = {file for file, _, _ in source}
    here: Iterable[os.DirEntry[str]] = os.scandir(save_directory) if os.path.isdir(save_directory) else []
    if any(os.path.realpath(entry.path) in files for entry in here):  # also through the links of the hub's cache
        raise CheckpointError(
            f"{os.fspath(save_directory)}: the experts are copied from this checkpoint; save into another folder"
        )


def keys_for_saving(keys: Iterable[str], conversions: Sequence[Any]) -> dict[str, str]:
    """For each checkpoint key a name that transformers' reversed conversions turn into that key.

    Raises:
        CheckpointError: There is none.
    """
    reverse = [conversion.reverse_transform() for conversion in conversions[::-1]]
    back = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    back_converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    forward = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    names = {}
    for key in keys:
        for candidate in (key, rename_source_key(key, forward, [])[0]):
            if rename_source_key(candidate, back, back_converters) == (key, None):
                names[key] = candidate
                break
        else:
            raise CheckpointError(f"tensor {key} cannot be saved under its own name: transformers would rename it")
    return names


def _by_file(entries: Iterable[TensorEntry]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for entry in entries:
        files.setdefault(entry.path, []).append(entry.key)
    return files


def _check_unchanged(source: tuple[tuple[str, int, int], ...]) -> None:
    files = [file for file, _, _ in source]
    try:
        unchanged = identity_of(files) == source
    except OSError as error:
        raise CheckpointError(
            f"the experts are saved from the checkpoint they came from, which is gone: {error}"
        ) from error
    if not unchanged:
        raise CheckpointError(f"the experts are saved from the checkpoint they came from, which has changed: {files}")

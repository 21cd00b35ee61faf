"""Experts that stay where they are: the engine reads the rows of the checkpoint's own files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kt_sft.config import ConfigError, KTConfig
from kt_sft.engine.readahead import Neighbours, Reader
from kt_sft.engine.store import LayerStore, MappedFile
from kt_sft.loading.errors import CheckpointError, NotEnoughMemoryError
from kt_sft.loading.mapping import MatrixRead, ModulePlan

logger = logging.getLogger("kt_sft")

#: The format of rows on disk, by the dtype's name in a safetensors header.
_FORMATS = {"BF16": "bf16"}


def decide_mapped(
    plans: Sequence[ModulePlan], config: KTConfig, resident: Callable[[], None], mapped: Callable[[], None]
) -> bool:
    """Whether the experts of `plans` stay in the checkpoint's files.

    Args:
        plans: What is to be loaded.
        config: Settings.
        resident: Raises NotEnoughMemoryError if there is not enough memory for everything.
        mapped: The same for what is not mapped.

    Raises:
        ConfigError: They should, but the files do not hold what the engine reads.
        NotEnoughMemoryError: There is not enough memory, or not without mapping, which is impossible.
    """
    if config.store == "mapped":
        found = obstacle(plans, config)
        if found is not None:
            raise ConfigError(f"kt_sft: store 'mapped' is not possible: {found}; set store: auto or resident")
        mapped()
        return True
    try:
        resident()
    except NotEnoughMemoryError as error:
        if config.store == "resident":
            raise
        found = obstacle(plans, config)
        if found is not None:
            raise NotEnoughMemoryError(f"{error}. They cannot stay in the checkpoint's files either: {found}") from None
        try:
            mapped()
        except NotEnoughMemoryError:
            raise error from None
        logger.warning("the experts stay in the checkpoint's files, from which the system reads them again: %s", error)
        return True
    return False


def obstacle(plans: Sequence[ModulePlan], config: KTConfig) -> str | None:
    """Why the experts of `plans` cannot be mapped as `config` wants them stored; None if they can."""
    for plan in plans:
        for read in plan.reads:
            found = _obstacle(read, config.stored_format)
            if found is not None:
                return f"{read.view.entry.path}: tensor {read.view.entry.key} {found}"
    return None


def _obstacle(read: MatrixRead, stored_format: str) -> str | None:
    view, dtype = read.view, read.view.entry.dtype_name
    if _FORMATS.get(dtype) != stored_format:
        return f"holds {dtype} values, not rows of {stored_format}"
    if view.col_stride != 1:
        return f"holds the {read.matrix} matrix transposed"
    if view.offset % 2:
        return "begins at an odd byte of the file"
    return None


def map_files(work: Sequence[tuple[ModulePlan, LayerStore]]) -> None:
    """Maps each store's matrices, which have no obstacle, from the files of its plan.

    Raises:
        CheckpointError: A file cannot be mapped, or is shorter than its header says.
    """
    files: dict[str, MappedFile] = {}
    for plan, store in work:
        for read in plan.reads:
            view = read.view
            try:
                if view.entry.path not in files:
                    files[view.entry.path] = MappedFile(view.entry.path)
                store.map_file(
                    read.matrix,
                    read.expert,
                    file=files[view.entry.path],
                    offset=view.offset,
                    row_stride=view.row_stride * view.entry.dtype.itemsize,
                )
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(f"{view.entry.path}: tensor {view.entry.key}: {error}") from error
    all(file.renew_pages() for file in files.values())  # up to the first for which there are no huge pages
    layers, reader = [store.native for _, store in work], Reader()
    for place, (_, store) in enumerate(work):
        store.neighbours = Neighbours(layers, place, reader)

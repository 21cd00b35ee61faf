"""Experts that stay where they are: the engine reads the rows of the checkpoint's own files.

BF16 values need nothing else. Of quantised weights the codes stay in the files, and their scales are held in memory,
but for those of ready stores, which are as the engine reads them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kt_sft.config import ConfigError
from kt_sft.engine.readahead import Neighbours, Reader
from kt_sft.engine.store import LayerStore, MappedFile
from kt_sft.loading.errors import CheckpointError, NotEnoughMemoryError
from kt_sft.loading.mapping import MatrixRead, ModulePlan
from kt_sft.loading.memory import scales_bytes
from kt_sft.loading.ready.names import MARK
from kt_sft.loading.ready.reading import StoredEntry
from kt_sft.loading.sources.entries import CodesInFile, QuantisedEntry, keeps
from kt_sft.loading.threads import run_all

logger = logging.getLogger("kt_sft")

#: The format of plain rows on disk, by the dtype's name in a safetensors header.
_FORMATS = {"BF16": "bf16"}

#: Layers that are mapped at the same time.
_MOST_THREADS = 16

#: How the experts of each module are stored, by its name, as LayerStore's arguments.
Storages = Mapping[str, Mapping[str, Any]]


def choose_mapped(wanted: str, obstacle: str | None, *, fits: bool) -> bool:
    """Whether experts stay in the checkpoint's files: what loading does, and what a plan says of it.

    Args:
        wanted: The setting `store`.
        obstacle: Why they cannot; None if they can.
        fits: Whether memory has room for them beside everything else that the run takes, what is predicted of it
            included: a training that ran out of it later would be worse than one that reads its experts from files.

    Raises:
        ConfigError: They should, but cannot.
    """
    if wanted == "mapped" and obstacle is not None:
        raise ConfigError(f"kt_sft: store 'mapped' is not possible: {obstacle}, or set store: auto or resident")
    return wanted == "mapped" or (wanted == "auto" and obstacle is None and not fits)


def decide_mapped(
    plans: Sequence[ModulePlan],
    storages: Storages,
    wanted: str,
    *,
    resident: Callable[[], None],
    predicted: Callable[[], None],
    mapped: Callable[[], None],
) -> bool:
    """Whether the experts of `plans` stay in the checkpoint's files.

    Args:
        plans: What is to be loaded.
        storages: How.
        wanted: The setting `store`.
        resident: Raises NotEnoughMemoryError if there is not enough memory for everything that is certainly needed.
        predicted: The same for that and what is only predicted, for want of which nothing is refused.
        mapped: The same for what is certainly needed and not mapped.

    Raises:
        ConfigError: They should, but the files do not hold what the engine reads.
        NotEnoughMemoryError: There is not enough memory, or not without mapping, which is impossible.
    """
    found = obstacle(plans, storages)
    certain = None if wanted == "mapped" else _shortage(resident)
    short = _shortage(predicted) if wanted == "auto" and found is None and certain is None else certain
    if choose_mapped(wanted, found, fits=short is None):
        shortage = _shortage(mapped)
        if shortage is not None:
            raise certain or shortage
        if short is not None:
            logger.warning(
                "the experts stay in the checkpoint's files, from which the system reads them again: %s", short
            )
        return True
    if certain is None:
        return False
    if wanted == "auto":
        raise NotEnoughMemoryError(f"{certain}. They cannot stay in the checkpoint's files either: {found}")
    raise certain


def _shortage(check: Callable[[], None]) -> NotEnoughMemoryError | None:
    try:
        check()
    except NotEnoughMemoryError as error:
        return error
    return None


def bytes_beside_files(plans: Sequence[ModulePlan], storages: Storages) -> int:
    """Of host memory, what the experts of `plans` take of each process where they stay in the checkpoint's files.

    These are scales and zero points, but for those of ready stores, which are mapped like their codes.
    """
    return sum(
        scales_bytes(plan.layout, storages[plan.name])
        for plan in plans
        if not all(isinstance(read.view.entry, StoredEntry) for read in plan.reads)
    )


def obstacle(plans: Sequence[ModulePlan], storages: Storages) -> str | None:
    """Why the experts of `plans` cannot be mapped as they are to be stored, and what to do; None if they can."""
    for plan in plans:
        for read in plan.reads:
            entry, storage = read.view.entry, storages[plan.name]
            found = _obstacle(read, storage)
            if found is not None:
                return f"{entry.path}: tensor {entry.key} holds {found}; {_way_out(read, storage)}"
    return None


def _obstacle(read: MatrixRead, storage: Mapping[str, Any]) -> str | None:
    view, entry, wanted = read.view, read.view.entry, storage["expert_format"]
    if isinstance(entry, QuantisedEntry):
        if not keeps(entry, storage):
            return f"{entry.description}, which is to be quantised again to {wanted}"
        return f"{entry.description}, packed along the other axis than the engine reads" if entry.turns else None
    if _FORMATS.get(entry.dtype_name) != wanted:
        return f"{entry.dtype_name} values, which are to be stored as {wanted}"
    if view.col_stride != 1:
        return f"{entry.dtype_name} values, the {read.matrix} matrix transposed"
    if view.offset % 2:
        return f"{entry.dtype_name} values that begin at an odd byte of the file"
    return None


def _way_out(read: MatrixRead, storage: Mapping[str, Any]) -> str:
    """What makes experts with an obstacle ones that can be mapped."""
    entry = read.view.entry
    own = entry.storage if isinstance(entry, QuantisedEntry) else {"expert_format": "bf16"}
    as_it_is = own is not None and _obstacle(read, own) is None
    ways = ["leave out expert_format, group_size and zero_point, so that it is taken as it is"] if as_it_is else []
    if not isinstance(entry, StoredEntry) and MARK not in entry.key:  # no store is made of a store
        options = "auto" if isinstance(entry, QuantisedEntry) and keeps(entry, storage) else storage["expert_format"]
        ways.append(f"make a ready store of it, which can be mapped (kt-sft quantize --format {options})")
    return ", or ".join(ways)


def map_files(work: Sequence[tuple[ModulePlan, LayerStore]]) -> None:
    """Maps each store's matrices, which have no obstacle, from the files of its plan.

    Raises:
        CheckpointError: A file cannot be mapped, or is shorter than its header says; or scales cannot be read, or are
            none.
    """
    files: dict[str, MappedFile] = {}
    lock = threading.Lock()

    def mapping(path: str) -> MappedFile:
        with lock:
            if path not in files:
                files[path] = MappedFile(path)
            return files[path]

    def map_layer(job: tuple[ModulePlan, LayerStore]) -> None:
        plan, store = job
        for read in plan.reads:
            entry = read.view.entry
            try:
                if isinstance(entry, StoredEntry):
                    entry.map(store, read, mapping(entry.path))
                    continue
                rows = _rows_in_file(read)
                store.map_file(
                    read.matrix,
                    read.expert,
                    file=mapping(rows.path),
                    offset=rows.offset,
                    row_stride=rows.row_stride,
                    scales=rows.scales,
                    zero_points=rows.zero_points,
                )
            except (ValueError, RuntimeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                what = f"{read.matrix} of expert {read.expert} of {plan.name}"
                raise CheckpointError(f"{entry.path}: tensor {entry.key} ({what}): {error}") from error

    run_all(map_layer, work, _MOST_THREADS)  # a layer each: scales are copied
    all(file.renew_pages() for file in files.values())  # up to the first for which there are no huge pages
    layers, reader = [store.native for _, store in work], Reader()
    for place, (_, store) in enumerate(work):
        store.neighbours = Neighbours(layers, place, reader)


def _rows_in_file(read: MatrixRead) -> CodesInFile:
    view = read.view
    if isinstance(view.entry, QuantisedEntry):
        return view.entry.in_file(view.entry.rows_of(view))
    return CodesInFile(view.entry.path, view.offset, view.row_stride * view.entry.itemsize, None)

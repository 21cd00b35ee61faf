"""Reads the planned matrices into the stores, in parallel and with a progress bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from transformers.utils import logging

from kt_sft.engine.cpus import usable_cpus
from kt_sft.engine.store import LayerStore
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.mapping import MatrixRead, ModulePlan
from kt_sft.loading.sources.entries import QuantisedEntry, load_matrix
from kt_sft.loading.threads import one_torch_thread_each

#: Reads in flight. Beyond about this many, disks and page cache serve no faster; each holds one bounded buffer.
_MAX_READERS = 16
#: Bytes that one thread reads in a row. Threads that fill matrices side by side touch the same huge page first, and the
#: system clears one for each of them.
_STRETCH = 32 << 20

_Job = tuple[MatrixRead, LayerStore, ModulePlan]


def stream(work: Sequence[tuple[ModulePlan, LayerStore]], *, shown: bool = True) -> None:
    """Fills each store from its plan.

    Args:
        work: The plans and their stores.
        shown: Whether there is a progress bar.

    Raises:
        CheckpointError: A value is NaN or Inf, or a file ends early.
    """
    jobs = [(read, store, plan) for plan, store in work for read in plan.reads]
    if not jobs:
        return
    jobs.sort(key=lambda job: (job[0].view.entry.path, job[0].view.offset))  # disks like to be read in order
    total = sum(_nbytes(read) for read, _, _ in jobs)
    readers = max(1, min(_MAX_READERS, 2 * len(usable_cpus()), len(jobs)))
    with (
        one_torch_thread_each(),
        logging.tqdm(total=total, unit="B", unit_scale=True, desc="Loading experts", disable=not shown) as progress,
        ThreadPoolExecutor(max_workers=readers, thread_name_prefix="kt_sft-reader") as pool,
    ):
        try:
            futures = [pool.submit(_read, stretch, progress) for stretch in _stretches(jobs, total // (8 * readers))]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:  # also Ctrl-C: without this the pool would first read all that is queued
            pool.shutdown(cancel_futures=True)
            raise


def _nbytes(read: MatrixRead) -> int:
    return read.view.rows * read.view.cols * read.view.entry.itemsize


def _stretches(jobs: Sequence[_Job], most: int) -> Iterator[list[_Job]]:
    """Jobs in a row, about `_STRETCH` or `most` bytes of them at a time."""
    stretch: list[_Job] = []
    size = 0
    for job in jobs:
        stretch.append(job)
        size += _nbytes(job[0])
        if size >= min(_STRETCH, most):
            yield stretch
            stretch, size = [], 0
    if stretch:
        yield stretch


def _read(jobs: Sequence[_Job], progress: Any) -> None:
    for read, store, plan in jobs:
        fill_matrix(read, store, plan)
        progress.update(_nbytes(read))


def fill_matrix(read: MatrixRead, store: LayerStore, plan: ModulePlan, place: int | None = None) -> None:
    """Reads one matrix into its place in a store, or into that of the expert `place` of another store.

    Raises:
        CheckpointError: A value is NaN or Inf, or the file ends early.
    """
    view, there = read.view, read if place is None else dataclasses.replace(read, expert=place)
    try:
        if isinstance(view.entry, QuantisedEntry):
            load_matrix(there, store, view.entry)
        else:
            _read_plain(there, store)
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = f"{read.matrix} of expert {read.expert} of {plan.name}"
        raise CheckpointError(f"{view.entry.path}: tensor {view.entry.key} ({what}): {error}") from error


def _read_plain(read: MatrixRead, store: LayerStore) -> None:
    view = read.view
    store.read_file(
        read.matrix,
        read.expert,
        path=view.entry.path,
        offset=view.offset,
        dtype=view.entry.dtype,
        row_stride=view.row_stride,
        col_stride=view.col_stride,
    )

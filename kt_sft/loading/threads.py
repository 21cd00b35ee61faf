"""Pools whose threads compute with torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from kt_sft.engine.cpus import usable_cpus

T = TypeVar("T")


@contextlib.contextmanager
def one_torch_thread_each() -> Iterator[None]:
    """In it torch works on one thread in this thread and in those that are started.

    Otherwise each thread of a pool gets an OpenMP pool of its own, as many as there are CPUs, and they fight.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_all(function: Callable[[T], object], items: Iterable[T], most_threads: int) -> None:
    """Calls `function` with every item, in no more than `most_threads` threads; the first error ends it."""
    threads = max(1, min(most_threads, len(usable_cpus())))
    with one_torch_thread_each(), ThreadPoolExecutor(max_workers=threads) as pool:
        try:
            for future in wait([pool.submit(function, item) for item in items], return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:  # also Ctrl-C: without this the pool would first do all that is queued
            pool.shutdown(cancel_futures=True)
            raise

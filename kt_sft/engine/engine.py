"""The process-wide engine: threads and kernels that compute what layers submit."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
from typing import Any

import torch

from kt_sft.config import MOST_THREADS, TIERS, ConfigError, openmp_threads, requested_tier
from kt_sft.engine import _native  # type: ignore[attr-defined]
from kt_sft.engine.cpus import SPIN_MICROSECONDS, cgroup_cpu_limit, engine_cpus, granted_cpus, oversubscribed
from kt_sft.engine.job import agree

logger = logging.getLogger(__name__)

# This process's engines, by what was asked for and by what that came to: different requests may share one.
_requests: dict[tuple[int | None, str | None], Any] = {}
_engines: dict[tuple[int, str | None], Any] = {}
_lock = threading.Lock()


def get_engine(num_threads: int | None = None) -> Any:
    """The running engine for that many threads, started on first use.

    There is one for each number of threads and tier asked for, usually one in all. A forked child, which has none of
    its parent's threads, starts its own.

    Args:
        num_threads: None for this process's share of the machine's CPUs, as it is on first use.

    Raises:
        ConfigError: `KT_SFT_ISA` names no tier, or the system does not grant that many threads.
    """
    limit = requested_tier()
    with _lock:
        engine = _requests.get((num_threads, limit))
        if engine is None:
            engine = _requests[num_threads, limit] = _start(num_threads, limit)
        return engine


def _start(num_threads: int | None, limit: str | None) -> Any:
    threads, node_cpus = engine_cpus(num_threads)
    if threads > MOST_THREADS:
        raise ConfigError(f"kt_sft: num_threads is {threads}; at most {MOST_THREADS} are possible")
    if (threads, limit) not in _engines:
        _warn_if_lowered(limit)
        _fit_torch_to_container()
        spin = 0 if oversubscribed(threads) else SPIN_MICROSECONDS
        try:
            _engines[threads, limit] = _native.Engine(threads, node_cpus, kernel_tiers(limit), spin)
        except RuntimeError as error:
            raise ConfigError(
                f"kt_sft: cannot start {threads} engine threads ({error}); set num_threads lower"
            ) from error
    return _engines[threads, limit]


def kernel_tiers(limit: str | None) -> tuple[str, str]:
    """The tiers of products and of integer products: up to `limit`, or the fastest.

    The latter is one choice for all processes of this job on this machine: it is measured, and two processes that
    disturb each other could come to different results, and with them to other roundings.
    """
    if limit is not None:
        return _native.tiers_up_to(limit)
    products, integers = agree("instruction tiers", _native.fastest_tiers)
    return products, integers


def available_tiers() -> list[str]:
    """Names of the instruction tiers that this CPU and this build have, lowest first."""
    return list(_native.available_tiers())


def _warn_if_lowered(limit: str | None) -> None:
    available = available_tiers()
    if limit is not None and TIERS.index(limit) > TIERS.index(available[-1]):
        logger.warning("KT_SFT_ISA=%s is above what this machine offers; using %s", limit, available[-1])


def _fit_torch_to_container() -> None:
    # torch counts the CPUs it sees. Where a container grants less time than that, its threads use it up waiting for
    # each other, and the engine's wait with them.
    granted = max(1, math.ceil(granted_cpus()))
    if cgroup_cpu_limit() is None or openmp_threads() is not None or torch.get_num_threads() <= granted:
        return
    logger.warning(
        "kt_sft: the container grants %d CPUs' worth of time, so torch now uses %d threads instead of %d; "
        "set OMP_NUM_THREADS to choose otherwise",
        granted,
        granted,
        torch.get_num_threads(),
    )
    torch.set_num_threads(granted)


@atexit.register
def _stop() -> None:
    # Joins the threads before the interpreter is torn down.
    with _lock:
        _requests.clear()
        _engines.clear()


def _forget() -> None:
    # In a forked child: the parent's threads are not here, and the lock may have been held by one of them. The native
    # side never destroys an engine in a process that did not start it.
    global _lock
    _lock = threading.Lock()
    _requests.clear()
    _engines.clear()


os.register_at_fork(after_in_child=_forget)

"""The process-wide engine: threads and kernels that compute what layers submit."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from typing import Any

from kt_sft.config import TIERS, ConfigError, requested_tier
from kt_sft.engine import _native  # type: ignore[attr-defined]
from kt_sft.engine.cpus import engine_cpus

logger = logging.getLogger(__name__)

_engines: dict[tuple[Any, ...], Any] = {}
_lock = threading.Lock()


def get_engine(num_threads: int | None = None) -> Any:
    """The running engine for that many threads, started on first use.

    There is one for each number of threads and tier asked for, usually one in all. A forked child, which has none of
    its parent's threads, starts its own.

    Args:
        num_threads: None for this process's share of the machine's CPUs.

    Raises:
        ConfigError: `KT_SFT_ISA` names no tier, or more threads were asked for than make sense.
    """
    limit = requested_tier()
    threads, cpus = engine_cpus(num_threads)
    if threads > 1024:
        raise ConfigError(f"kt_sft: num_threads is {threads}; at most 1024 are possible")
    key = (os.getpid(), threads, limit)
    with _lock:
        if key not in _engines:
            _warn_if_lowered(limit)
            _engines[key] = _native.Engine(threads, cpus, limit)
        return _engines[key]


def available_tiers() -> list[str]:
    """Names of the instruction tiers that this CPU and this build have, lowest first."""
    return list(_native.available_tiers())


def _warn_if_lowered(limit: str | None) -> None:
    available = available_tiers()
    if limit is not None and TIERS.index(limit) > TIERS.index(available[-1]):
        logger.warning("KT_SFT_ISA=%s is above what this machine offers; using %s", limit, available[-1])


@atexit.register
def _stop() -> None:
    # Joined before the interpreter is torn down; an inherited engine of a parent process has no threads to join and
    # is left alone.
    with _lock:
        for key in [key for key in _engines if key[0] == os.getpid()]:
            del _engines[key]

"""The speed limits of this machine, measured: of each tier's products and of reading memory."""

from __future__ import annotations

import dataclasses

from kt_sft.engine import _native  # type: ignore[attr-defined]
from kt_sft.engine.cpus import SPIN_MICROSECONDS, engine_cpus
from kt_sft.engine.engine import kernel_tiers


@dataclasses.dataclass(frozen=True)
class Peak:
    """One measurement, the median of a few short trials.

    Attributes:
        threads: How many threads it holds for.
        gflops: Products of the tier, all threads, 1e9 floating-point operations per second.
        int8_gflops: The same of its products of 8-bit integers (`compute: int8`).
        read_gbs: Reading from memory, all threads, 1e9 bytes per second.
    """

    threads: int
    gflops: float
    int8_gflops: float
    read_gbs: float


def measure_peak(tier: str | None, num_threads: int | None = None) -> Peak:
    """Measures afresh, with threads of its own (a running engine measures only once); some tenths of a second.

    Args:
        tier: An available tier's name; None for what an engine uses where `KT_SFT_ISA` asks for none.
        num_threads: As in KTConfig.

    Raises:
        ValueError: The tier is not available here, or no tier's name.
        RuntimeError: The threads cannot be started.
    """
    if tier is not None and tier not in _native.available_tiers():
        raise ValueError(f"kt_sft: tier {tier!r} is not available here; {', '.join(_native.available_tiers())} are")
    threads, node_cpus = engine_cpus(num_threads)
    flops, int8, bandwidth = _native.Engine(threads, node_cpus, kernel_tiers(tier), SPIN_MICROSECONDS).peak()
    return Peak(threads, flops * threads / 1e9, int8 * threads / 1e9, bandwidth / 1e9)

"""`kt-sft bench`: the engine's forward and backward on this machine, beside other implementations of the same layer.

All contenders run in turn within each round, so a disturbance of a shared machine meets all of them, and each runs
while the others are idle, with the same number of threads. Every expert gets the same number of rows, all experts are
touched in each run, and the weights are larger than the caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

import kt_sft
from kt_sft.cli import hosts, machine
from kt_sft.cli.bench_plan import FormatChoice, Plan
from kt_sft.cli.contenders import (
    Contender,
    LayerContender,
    TorchLinears,
    balanced_batch,
    onednn_packs,
    random_weights,
    stock_experts,
)
from kt_sft.cli.kt_kernel_client import KtKernel, methods
from kt_sft.config import requested_tier
from kt_sft.engine.engine import get_engine
from kt_sft.engine.peaks import Peak, measure_peak
from kt_sft.experts import CpuExperts

#: What the report calls the engine.
OURS = "kt_sft"

_CLOCKS = {"elapsed": time.perf_counter, "cpu": time.process_time}

#: Threads of OpenMP, and of our own pool, spin for some milliseconds after their work; they must sleep before the next
#: contender is measured.
_SETTLE_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one variant and number of rows took.

    Attributes:
        seconds: contender -> pass -> one value a round.
        peaks: One a round.
    """

    choice: FormatChoice
    compute: str
    rows: int
    stored_bytes: int
    seconds: dict[str, dict[str, list[float]]]
    peaks: list[Peak]


Note = Callable[[str], None]


def measure(plan: Plan, note: Note = lambda _: None) -> dict[str, Any]:
    """Runs the bench.

    Args:
        plan: What to measure.
        note: Called with a line when something takes a while.

    Returns:
        The report, ready for JSON: `machine`, `layer`, `settings`, `baselines` (name to descriptions), `peaks` (the
        tier's, measured throughout) and `results`, one dict for each variant, pass and number of rows (see `_result`).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        return _measure(plan, note)
    finally:
        torch.set_num_threads(before)


def _measure(plan: Plan, note: Note) -> dict[str, Any]:
    tier = get_engine(plan.threads).tier
    note(f"{plan.shape.experts} experts of H {plan.shape.hidden}, I {plan.shape.intermediate}; tier {tier}")
    load = os.getloadavg()[0]
    if load > plan.threads / 4:
        note(f"the machine is busy (load {load:.1f}): figures will be low and uneven, torch's more than others")
    weights = random_weights(plan.shape)
    common: list[Contender] = _of_torch(plan, weights) if plan.with_torch else []
    baselines = {contender.name: [contender.description] for contender in common}
    timings: list[Timing] = []
    for choice, computes in _by_format(plan):
        note(f"storing {choice.text}")
        store = CpuExperts.from_weights(*weights, config=choice.config(computes[0], plan.threads)).store
        with contextlib.ExitStack() as closing:
            others = common + _of_kt_kernel(plan, choice, closing)
            for other in others:
                texts = baselines.setdefault(other.name, [])
                texts += [] if other.description in texts else [other.description]
            for compute, rows in itertools.product(computes, plan.rows):
                note(f"{choice.text}, {compute} products, {rows} rows per expert")
                layer = CpuExperts(store, choice.config(compute, plan.threads))
                contenders = [LayerContender(OURS, "this engine", layer, _CLOCKS[plan.clock]), *others]
                seconds, peaks = _alternate(contenders, plan, compute, rows)
                timings.append(Timing(choice, compute, rows, store.nbytes, seconds, peaks))
    return _report(plan, tier, load, baselines, timings)


def _report(
    plan: Plan,
    tier: str,
    load: float,
    baselines: dict[str, list[str]],
    timings: list[Timing],
) -> dict[str, Any]:
    peaks = [peak for timing in timings for peak in timing.peaks]
    peak = _median_peak(peaks)
    return {
        "kind": "kt-sft bench",
        "kt_sft": kt_sft.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": machine.cpu_model(),
            "tier": tier,
            "load_average": load,
            "cache_bytes": plan.cache_bytes,
            "versions": {host["name"]: host["version"] for host in hosts.versions() if host["version"] is not None},
        },
        "layer": {
            "name": plan.shape.name,
            "hidden": plan.shape.hidden,
            "intermediate": plan.shape.intermediate,
            "experts": plan.shape.experts,
            "top_k": plan.shape.top_k,
        },
        "settings": {"threads": plan.threads, "repeats": plan.repeats, "clock": plan.clock},
        "baselines": baselines,
        "peaks": {
            "gflops": peak.gflops,
            "int8_gflops": peak.int8_gflops,
            "read_gbs": peak.read_gbs,
            "gflops_range": [min(p.gflops for p in peaks), max(p.gflops for p in peaks)],
            "read_gbs_range": [min(p.read_gbs for p in peaks), max(p.read_gbs for p in peaks)],
        },
        "results": [_result(plan, timing, which) for timing in timings for which in timing.seconds[OURS]],
    }


def _of_torch(plan: Plan, weights: tuple[Tensor, Tensor]) -> list[Contender]:
    stock, clock = stock_experts(plan.shape, *weights), _CLOCKS[plan.clock]
    return [
        *([TorchLinears(*weights, clock)] if "forward" in plan.passes and onednn_packs() else []),
        LayerContender("transformers", "transformers' Qwen3MoeExperts with grouped_mm, BF16", stock, clock),
    ]


def _of_kt_kernel(plan: Plan, choice: FormatChoice, closing: contextlib.ExitStack) -> list[Contender]:
    """kt-kernel's processes for a format, which end with `closing`."""
    if plan.kt_kernel is None:
        return []
    found: list[Contender] = []
    for method in methods(choice.expert_format, plan.kt_kernel_lora):
        peer = KtKernel(
            plan.kt_kernel,
            method,
            plan.shape,
            threads=plan.threads,
            numa_nodes=min(max(1, len(machine.numa_nodes())), plan.threads),
            lora_rank=plan.kt_kernel_lora,
            most_rows=max(plan.rows),
            clock=plan.clock,
        )
        closing.callback(peer.close)
        found.append(peer)
    return found


def _by_format(plan: Plan) -> list[tuple[FormatChoice, list[str]]]:
    grouped: dict[FormatChoice, list[str]] = {}
    for choice, compute in plan.variants:
        grouped.setdefault(choice, []).append(compute)
    return list(grouped.items())


def _alternate(
    contenders: list[Contender], plan: Plan, compute: str, rows: int
) -> tuple[dict[str, dict[str, list[float]]], list[Peak]]:
    """Seconds of every round: contender -> pass -> list; and the peak of every round.

    That is measured right after our run, at the clock that such work leaves the CPU with: after a rest CPUs clock
    higher than they can keep up.
    """
    batch = balanced_batch(plan.shape, rows)
    for contender in contenders:
        contender.prepare(batch)
    # Backward multiplies BF16 whatever forward does, so it is measured with BF16 products only.
    passes = [which for which in plan.passes if which == "forward" or compute == "bf16"]
    seconds: dict[str, dict[str, list[float]]] = {contender.name: {} for contender in contenders}
    peaks: list[Peak] = []
    for round_ in range(plan.repeats + 1):
        for contender in contenders:
            time.sleep(_SETTLE_SECONDS)
            taken = contender.run("backward" in passes and contender.trains)
            if contender.name == OURS:
                peaks.append(measure_peak(requested_tier(), plan.threads))
            if round_ == 0:  # warms up: buffers grow, threads start
                continue
            for which, value in taken.items():
                if which in passes:
                    seconds[contender.name].setdefault(which, []).append(value)
    return seconds, peaks


def _median_peak(peaks: list[Peak]) -> Peak:
    return Peak(
        peaks[0].threads,
        statistics.median(peak.gflops for peak in peaks),
        statistics.median(peak.int8_gflops for peak in peaks),
        statistics.median(peak.read_gbs for peak in peaks),
    )


def _result(plan: Plan, timing: Timing, which: str) -> dict[str, Any]:
    """One line of the report.

    `seconds` is the median, `spread` half the distance between the quartiles over it. `peak_share` is of the tier's
    peak of the products that `compute` names, measured in the same rounds. At one row per expert `read_gbs` counts the
    stored bytes of all experts, scales included, and `read_share` is of the measured bandwidth; that is by elapsed
    time, so None where CPU time is counted. `others` holds each baseline that has this pass; `ratio` is how many
    times faster ours is, the median of the rounds' ratios.
    """
    ours, rows, peak = timing.seconds[OURS][which], timing.rows, _median_peak(timing.peaks)
    median = statistics.median(ours)
    gflops = plan.shape.flops(rows) / median / 1e9
    gbs = timing.stored_bytes / median / 1e9
    return {
        "format": timing.choice.text,
        "compute": timing.compute,
        "pass": which,
        "rows_per_expert": rows,
        "stored_bytes": timing.stored_bytes,
        "seconds": median,
        "spread": spread(ours),
        "gflops": gflops,
        "peak_share": gflops / (peak.gflops if timing.compute == "bf16" else peak.int8_gflops),
        "read_gbs": gbs if rows == 1 else None,
        "read_share": gbs / peak.read_gbs if rows == 1 and plan.clock == "elapsed" else None,
        "others": {
            name: {
                "seconds": statistics.median(theirs[which]),
                "spread": spread(theirs[which]),
                "gflops": plan.shape.flops(rows) / statistics.median(theirs[which]) / 1e9,
                "ratio": statistics.median(b / a for a, b in zip(ours, theirs[which], strict=True)),
            }
            for name, theirs in timing.seconds.items()
            if name != OURS and which in theirs
        },
    }


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle

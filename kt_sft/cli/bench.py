"""`kt-sft bench`: the engine's forward and backward on this machine, beside other implementations of the same layer.

All contenders run in turn within each round, so a disturbance of a shared machine meets all of them, and each runs
while the others are idle, with the same number of threads. Every expert gets the same number of rows, all experts are
touched in each run, and the weights are larger than the caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

import kt_sft
from kt_sft.cli import hosts, machine
from kt_sft.cli.bench_plan import FormatChoice, Plan
from kt_sft.cli.contenders import (
    Contender,
    LayerContender,
    TorchLinears,
    balanced_batch,
    random_weights,
    stock_experts,
)
from kt_sft.cli.shapes import LayerShape
from kt_sft.engine.engine import get_engine
from kt_sft.engine.peaks import Peak, measure_peak
from kt_sft.experts import CpuExperts

#: What the report calls the engine.
OURS = "kt_sft"

#: Threads of OpenMP, and of our own pool, spin for some milliseconds after their work; they must sleep before the next
#: contender is measured.
_SETTLE_SECONDS = 0.02

BASELINES = {
    "torch_linears": "loop of BF16 linear layers with weights packed by oneDNN, forward only",
    "transformers": "transformers' Qwen3MoeExperts with grouped_mm, BF16",
}

Note = Callable[[str], None]


def measure(plan: Plan, note: Note = lambda _: None) -> dict[str, Any]:
    """Runs the bench.

    Args:
        plan: What to measure.
        note: Called with a line when something takes a while.

    Returns:
        The report, ready for JSON: `machine`, `layer`, `settings`, `baselines` (name to description), `peaks` (the
        tier's, measured throughout) and `results`, one dict for each variant, pass and number of rows (see `_result`).
    """
    torch.set_num_threads(plan.threads)
    tier = get_engine(plan.threads).tier
    note(f"{plan.shape.experts} experts of H {plan.shape.hidden}, I {plan.shape.intermediate}; tier {tier}")
    weights = random_weights(plan.shape)
    others: list[Contender] = []
    if plan.with_torch:
        others = [TorchLinears(*weights), LayerContender("transformers", stock_experts(plan.shape, *weights))]
    peaks: list[Peak] = []
    timings = []
    for choice, computes in _by_format(plan):
        note(f"storing {choice.text}")
        ours = CpuExperts.from_weights(*weights, config=choice.config(computes[0], plan.threads))
        for compute in computes:
            layer = CpuExperts(ours.store, choice.config(compute, plan.threads))
            contenders = [LayerContender(OURS, layer), *others]
            for rows in plan.rows:
                note(f"{choice.text}, {compute} products, {rows} rows per expert")
                peaks.append(measure_peak(tier, plan.threads))
                seconds = _alternate(contenders, plan, rows)
                timings.append((choice, compute, rows, ours.store.nbytes, seconds))
    for other in others:
        other.close()
    peak = _median_peak(peaks)
    return {
        "kind": "kt-sft bench",
        "kt_sft": kt_sft.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": machine.cpu_model(),
            "tier": tier,
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
        "settings": {"threads": plan.threads, "repeats": plan.repeats},
        "baselines": {other.name: BASELINES[other.name] for other in others},
        "peaks": {
            "gflops": peak.gflops,
            "read_gbs": peak.read_gbs,
            "gflops_range": [min(p.gflops for p in peaks), max(p.gflops for p in peaks)],
            "read_gbs_range": [min(p.read_gbs for p in peaks), max(p.read_gbs for p in peaks)],
        },
        "results": [
            _result(plan.shape, peak, *timing, which) for timing in timings for which in _passes(plan, timing[1])
        ],
    }


def _by_format(plan: Plan) -> list[tuple[FormatChoice, list[str]]]:
    grouped: dict[FormatChoice, list[str]] = {}
    for choice, compute in plan.variants:
        grouped.setdefault(choice, []).append(compute)
    return list(grouped.items())


def _passes(plan: Plan, compute: str) -> list[str]:
    """What is measured of a variant: backward multiplies BF16 whatever forward does, so once is enough."""
    return [which for which in plan.passes if which == "forward" or compute == "bf16"]


def _alternate(contenders: list[Contender], plan: Plan, rows: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round: contender -> pass -> list."""
    batch = balanced_batch(plan.shape, rows)
    for contender in contenders:
        contender.prepare(batch)
    backward = "backward" in plan.passes
    seconds: dict[str, dict[str, list[float]]] = {contender.name: {} for contender in contenders}
    for round_ in range(plan.repeats + 1):
        for contender in contenders:
            time.sleep(_SETTLE_SECONDS)
            taken = contender.run(backward and contender.trains)
            if round_ > 0:  # the first one warms up: buffers grow, threads start
                for which, value in taken.items():
                    seconds[contender.name].setdefault(which, []).append(value)
    return seconds


def _median_peak(peaks: list[Peak]) -> Peak:
    return Peak(
        peaks[0].threads,
        statistics.median(peak.gflops for peak in peaks),
        statistics.median(peak.read_gbs for peak in peaks),
    )


def _result(
    shape: LayerShape,
    peak: Peak,
    choice: FormatChoice,
    compute: str,
    rows: int,
    stored_bytes: int,
    seconds: dict[str, dict[str, list[float]]],
    which: str,
) -> dict[str, Any]:
    """One line of the report.

    `seconds` is the median, `spread` half the distance between the quartiles over it. `peak_share` is of the tier's
    measured peak and None for INT8 products, which have another. At one row per expert `read_gbs` counts the stored
    bytes of all experts, scales included, and `read_share` is of the measured bandwidth. `others` holds each baseline
    that has this pass; `ratio` is how many times faster ours is, the median of the rounds' ratios.
    """
    ours = seconds[OURS][which]
    median = statistics.median(ours)
    gflops = shape.flops(rows) / median / 1e9
    streams = rows == 1
    gbs = stored_bytes / median / 1e9
    return {
        "format": choice.text,
        "compute": compute if which == "forward" else "bf16",
        "pass": which,
        "rows_per_expert": rows,
        "stored_bytes": stored_bytes,
        "seconds": median,
        "spread": spread(ours),
        "gflops": gflops,
        "peak_share": gflops / peak.gflops if compute == "bf16" else None,
        "read_gbs": gbs if streams else None,
        "read_share": gbs / peak.read_gbs if streams else None,
        "others": {
            name: {
                "seconds": statistics.median(theirs[which]),
                "spread": spread(theirs[which]),
                "gflops": shape.flops(rows) / statistics.median(theirs[which]) / 1e9,
                "ratio": statistics.median(b / a for a, b in zip(ours, theirs[which], strict=True)),
            }
            for name, theirs in seconds.items()
            if name != OURS and which in theirs
        },
    }


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle

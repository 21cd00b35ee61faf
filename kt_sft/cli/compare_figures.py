"""From runs to figures: speed, memory, ratios, and whether the losses agree.

A machine that others use too gives figures that only hold together: ratios are taken within a round, in which every
contender ran once, and their median and range over the rounds is what the report shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from kt_sft.cli.training_runs import TrainingRun

#: What is the reference of the losses, the first that ran.
REFERENCES = ("llamafactory", "zero3", "zero3_tuned")
#: Results of a layer that BF16 rounds, one after another: norms, projections, attention, residuals, experts.
ROUNDINGS_PER_LAYER = 12
#: Root mean square of BF16's relative rounding error: 2^-7 / sqrt(12) at a binade's start, half of that at its end.
BF16_ERROR = 0.0016
#: Standard deviation of a token's logits that the bound reckons with.
LOGIT_SPREAD = 2.0
#: So many standard deviations are allowed: four for chance, and half as many again for tokens that rounding sends to
#: another expert, which the derivation leaves out.
DEVIATIONS = 6.0
#: Share of the loss's own fall that losses may differ by in the mean: training amplifies whatever it is given.
SHARE_OF_FALL = 0.05


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run, after its first steps."""

    round: int
    tokens_per_second: float
    step_seconds: float
    peak_host_bytes: float
    peak_device_bytes: int | None
    losses: list[float]
    gradient_norms: list[float]
    #: Means of what kt_sft logged beside the loss, by its name.
    logged: dict[str, float]


def measured(number: int, run: TrainingRun, warmup: int, device_bytes: int | None) -> Measured:
    """A run without its first `warmup` steps, which load, build and allocate.

    Raises:
        ValueError: It has fewer than one step after them.
    """
    if not 1 <= warmup < len(run.steps):
        raise ValueError(f"{len(run.steps)} steps leave none to measure after {warmup}")
    start, kept = run.steps[warmup - 1], run.steps[warmup:]
    seconds = kept[-1]["train_runtime"] - start["train_runtime"]
    tokens = kept[-1]["num_input_tokens_seen"] - start["num_input_tokens_seen"]
    times = [entry["train_runtime"] for entry in (start, *kept)]
    names = {name for entry in kept for name, value in entry.items() if name.startswith("kt_sft") and _number(value)}
    return Measured(
        round=number,
        tokens_per_second=tokens / seconds,
        step_seconds=statistics.median(later - earlier for earlier, later in itertools.pairwise(times)),
        peak_host_bytes=run.peak_rss_mb * 1e6,
        peak_device_bytes=device_bytes,
        losses=run.losses,
        gradient_norms=[entry["grad_norm"] for entry in run.steps],
        logged={name: statistics.fmean(entry[name] for entry in kept if name in entry) for name in sorted(names)},
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def summary(runs: Sequence[Measured]) -> dict[str, Any]:
    """One contender's figures over its rounds; spreads are (greatest - least) / median."""
    speeds = [run.tokens_per_second for run in runs]
    devices = [run.peak_device_bytes for run in runs if run.peak_device_bytes is not None]
    return {
        "tokens_per_second": statistics.median(speeds),
        "spread": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "step_seconds": statistics.median(run.step_seconds for run in runs),
        "peak_host_bytes": max(run.peak_host_bytes for run in runs),
        "peak_device_bytes": max(devices) if devices else None,
        "losses": runs[0].losses,
        "logged": runs[-1].logged,
        "runs": [dataclasses.asdict(run) for run in runs],
    }


def ratio(runs: Sequence[Measured], others: Sequence[Measured]) -> dict[str, float] | None:
    """How many times faster, round by round: `median`, `least` and `greatest`; None without a common round."""
    speeds = {run.round: run.tokens_per_second for run in others}
    ratios = [run.tokens_per_second / speeds[run.round] for run in runs if run.round in speeds]
    if not ratios:
        return None
    return {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How far two programs may be apart at the first step, before any update, if both compute the same in BF16."""

    #: Of the loss, absolute.
    loss: float
    #: Of the gradient's norm, relative.
    gradient: float


def rounding_bounds(layers: int, tokens: int) -> Bounds:
    """What rounding to BF16 explains.

    Each of about `ROUNDINGS_PER_LAYER` results of a layer is rounded, independently: what comes out is off by
    e = BF16_ERROR * sqrt(12 L) of its size, and so are gradients. A token's logits are then off by e * LOGIT_SPREAD,
    and so is its loss. The loss of a step is the mean over its tokens, whose errors are independent, too, and both
    programs have one: sqrt(2) e LOGIT_SPREAD / sqrt(T), of which `DEVIATIONS` times is allowed. A norm does not average
    its errors out: sqrt(2) e, as often.

    Args:
        layers: L.
        tokens: T, of one step.
    """
    error = DEVIATIONS * math.sqrt(2.0 * ROUNDINGS_PER_LAYER * layers) * BF16_ERROR
    return Bounds(loss=error * LOGIT_SPREAD / math.sqrt(tokens), gradient=error)


def agreement(own: Measured, reference: Measured, bounds: Bounds | None) -> dict[str, Any]:
    """Whether a run computes what the reference does.

    Three things must hold: loss and gradient's norm of the first step are within the bounds of rounding, and losses
    differ in the mean by no more than that or 5 % of how far the reference's fell.

    Args:
        own: A run.
        reference: One with as many steps.
        bounds: From `rounding_bounds`; None: the differences are told and not judged.

    Returns:
        `loss_first`, `gradient_first` (relative) and `loss_mean`, the differences; `allowed`, the same keys; and
        `agrees` (None: not judged).
    """
    pairs = list(zip(own.losses, reference.losses, strict=True))
    found = {
        "loss_first": abs(own.losses[0] - reference.losses[0]),
        "gradient_first": abs(own.gradient_norms[0] - reference.gradient_norms[0]) / reference.gradient_norms[0],
        "loss_mean": statistics.fmean(abs(one - other) for one, other in pairs),
    }
    if bounds is None:
        return {**found, "allowed": None, "agrees": None}
    fall = max(reference.losses) - min(reference.losses)
    allowed = {
        "loss_first": bounds.loss,
        "gradient_first": bounds.gradient,
        "loss_mean": max(bounds.loss, SHARE_OF_FALL * fall),
    }
    # Written so that what is not a number does not agree.
    return {**found, "allowed": allowed, "agrees": all(found[name] <= allowed[name] for name in found)}


def compared(runs: dict[str, list[Measured]], layers: int | None, tokens: int, same_weights: bool) -> dict[str, Any]:
    """The figures of one workload.

    Args:
        runs: By contender; one that did not run is absent.
        layers: Of the model; None: not known, and losses are shown but not judged.
        tokens: Of one optimizer step.
        same_weights: Whether kt_sft's experts hold the checkpoint's own values.

    Returns:
        `contenders`: name -> `summary`, with `ratios` to each other contender and `agreement` (None for the reference);
        `reference`: whose losses the others are held to, or None.
    """
    reference = next((name for name in REFERENCES if name in runs), None)
    contenders = {}
    for name, own in runs.items():
        figures = summary(own)
        figures["ratios"] = {other: ratio(own, theirs) for other, theirs in runs.items() if other != name}
        figures["agreement"] = None
        if reference is not None and name != reference:
            judged = layers is not None and (same_weights or not name.startswith("kt_sft"))
            bounds = rounding_bounds(layers, tokens) if judged and layers is not None else None
            figures["agreement"] = agreement(own[0], runs[reference][0], bounds)
        contenders[name] = figures
    return {"tokens": tokens, "reference": reference, "contenders": contenders}

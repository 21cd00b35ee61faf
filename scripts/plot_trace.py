#!/usr/bin/env python
"""A picture and the figures of a profile that `kt_sft: {profile: trace.json}` wrote: who worked when, who waited.

    scripts/plot_trace.py trace.json trace.png [--milliseconds 40]

Lanes: the expert engine on the CPU, the accelerator's kernels and its copies where there is one, the host's operations,
and the time in which a thread was blocked until the engine was done.

Prints, as JSON, for the time from the first to the last piece of work: `seconds`; `engine` and `accelerator`, the share
in which each was at work; `both`, in which they were at work side by side; and `idle_beyond_forced`. With c and g
seconds of work, t seconds leave engine and accelerator idle for 2t - c - g in all. |c - g| of that is forced even where
the shorter one hides whole; what is left, 2 (t - max(c, g)), is given as a share of t. Without an accelerator the
host's own operations, without waiting, take its place: they share the CPU with the engine, so nothing is side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Span = tuple[float, float]

#: Categories of torch's profiler for what an accelerator does.
_KERNELS, _COPIES = ("kernel",), ("gpu_memcpy", "gpu_memset")
_COLORS = {
    "CPU engine": "tab:blue",
    "waiting for the engine": "tab:red",
    "kernels": "tab:green",
    "copies": "tab:olive",
    "host": "tab:gray",
}


class TraceError(ValueError):
    """A file is no trace of kt_sft; the message says why."""


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time as disjoint spans in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def overlap(one: list[Span], other: list[Span]) -> list[Span]:
    """The time in both of two lists of disjoint spans in order."""
    both: list[Span] = []
    i = j = 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            both.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return both


def without(spans: list[Span], taken: list[Span]) -> list[Span]:
    """The time of disjoint spans that is in none of others; both in order."""
    if not spans:
        return []
    edges = [spans[0][0], *(edge for span in taken for edge in span), spans[-1][1]]
    gaps = [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]
    return overlap(spans, gaps)


def length(spans: list[Span]) -> float:
    """The time of disjoint spans."""
    return sum(end - begin for begin, end in spans)


def read_lanes(path: Path) -> dict[str, list[Span]]:
    """Seconds since the first piece of work, of each lane that has some.

    Raises:
        TraceError: It cannot be read, or holds no work of the engine.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path} cannot be read as a Chrome trace: {error}") from error
    names = {event["tid"]: event["args"]["name"] for event in events if _names_our_lane(event)}
    found: dict[str, list[Span]] = {lane: [] for lane in _COLORS}
    for event in events:
        lane = _lane(event, names)
        if lane is not None:
            found[lane].append((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    lanes = {lane: union(spans) for lane, spans in found.items() if spans}
    if "CPU engine" not in lanes:
        raise TraceError(
            f"{path} holds no work of the expert engine: is it from a run with `kt_sft: {{profile: ...}}`?"
        )
    if "host" in lanes:
        lanes["host"] = without(lanes["host"], lanes.get("waiting for the engine", []))
    start = min(spans[0][0] for spans in lanes.values() if spans)
    return {lane: [(begin - start, end - start) for begin, end in spans] for lane, spans in lanes.items()}


def _names_our_lane(event: dict[str, Any]) -> bool:
    return event.get("name") == "thread_name" and event["args"]["name"] in ("CPU engine", "waiting for the engine")


def _lane(event: dict[str, Any], ours: dict[Any, str]) -> str | None:
    category = event.get("cat")
    if event.get("ph") != "X" or "dur" not in event:
        return None
    if category == "kt_sft":
        return ours.get(event["tid"])
    if category in _KERNELS:
        return "kernels"
    if category in _COPIES:
        return "copies"
    return "host" if category == "cpu_op" else None


def figures(lanes: dict[str, list[Span]]) -> dict[str, float | str]:
    """What the module's docstring says, of lanes as `read_lanes` gives them."""
    engine = lanes["CPU engine"]
    on_accelerator = union([*lanes.get("kernels", []), *lanes.get("copies", [])])
    other = on_accelerator or lanes.get("host", [])
    begin = min(spans[0][0] for spans in (engine, other) if spans)
    end = max(spans[-1][1] for spans in (engine, other) if spans)
    seconds, c, g = end - begin, length(engine), length(other)
    return {
        "seconds": seconds,
        "engine": c / seconds,
        "accelerator" if on_accelerator else "host": g / seconds,
        "both": length(overlap(engine, other)) / seconds,
        "idle_beyond_forced": 2 * (seconds - max(c, g)) / seconds,
    }


def draw(lanes: dict[str, list[Span]], path: Path, seconds: float | None) -> None:
    """Draws the lanes, all of their time or `seconds` from its middle, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    end = max(spans[-1][1] for spans in lanes.values() if spans)
    left = 0.0 if seconds is None else max(0.0, (end - seconds) / 2)
    right = end if seconds is None else min(end, left + seconds)
    figure, axes = plt.subplots(figsize=(12, 0.6 * len(lanes) + 1), layout="constrained")
    for row, (lane, spans) in enumerate(lanes.items()):
        bars = [(1e3 * (a - left), 1e3 * (b - a)) for a, b in overlap(spans, [(left, right)])]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=_COLORS[lane], linewidth=0)
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.invert_yaxis()
    axes.set(xlabel="ms", xlim=(0, 1e3 * (right - left)))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--milliseconds", type=float, help="so much from the middle; default: everything")
    options = parser.parse_args(arguments)
    if options.milliseconds is not None and options.milliseconds <= 0:
        parser.error("--milliseconds must be positive")
    try:
        lanes = read_lanes(options.trace)
    except TraceError as error:
        print(f"plot_trace: {error}", file=sys.stderr)
        return 1
    draw(lanes, options.picture, None if options.milliseconds is None else options.milliseconds / 1e3)
    print(json.dumps(figures(lanes), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

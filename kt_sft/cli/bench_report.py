"""How a report of `kt-sft bench` is shown: a table, and a plot."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

#: Column headings of the baselines, short enough for 80 columns.
_HEADINGS = {
    "torch_linears": "x torch\nlinears",
    "transformers": "x trans-\nformers",
    "kt_kernel": "x kt-\nkernel",
    "kt_kernel_rawint4": "x kt-k.\nrawint4",
}


#: Lines of the baselines in the plot.
_STYLES = (":", "--", "-.", (0, (1, 4)))


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the report."""
    layer, peaks = report["layer"], report["peaks"]
    console.print(
        f"{report['machine']['cpu'] or 'unknown CPU'}, tier {report['machine']['tier']}, "
        f"{report['settings']['threads']} threads; peak {peaks['gflops']:.0f} GFLOP/s, INT8 "
        f"{peaks['int8_gflops']:.0f}, reads {peaks['read_gbs']:.1f} GB/s\n"
        f"{layer['name']}: H {layer['hidden']}, I {layer['intermediate']}, {layer['experts']} experts held, "
        f"{layer['top_k']} per token; medians of {report['settings']['repeats']} alternating rounds"
        f"{', CPU time' if report['settings']['clock'] == 'cpu' else ''}",
        highlight=False,
    )
    for which in dict.fromkeys(result["pass"] for result in report["results"]):
        console.print(_table(report, which))
    if report["baselines"]:
        console.print("x: how many times faster than")
    for name, descriptions in report["baselines"].items():
        for description in descriptions:
            console.print(f"- {name}: {description}", style="dim", highlight=False)


def _table(report: dict[str, Any], which: str) -> Table:
    """One pass: ours, and how many times faster it is than each baseline that has this pass."""
    results = [result for result in report["results"] if result["pass"] == which]
    names = [name for name in report["baselines"] if any(name in result["others"] for result in results)]
    streams = any(result["read_gbs"] is not None for result in results)
    table = Table(title=which, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("format", no_wrap=True)
    headings = ["rows", "GFLOP/s", "±", "of\npeak", *(["GB/s", "of\nread"] if streams else [])]
    for heading in [*headings, *(_HEADINGS[name] for name in names)]:
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for result in results:
        label = _label(result)
        if previous not in (None, label):
            table.add_section()
        previous = label
        gbs, others = result["read_gbs"], result["others"]
        table.add_row(
            label,
            str(result["rows_per_expert"]),
            f"{result['gflops']:.0f}",
            f"{result['spread']:.0%}",
            _share(result["peak_share"]),
            *(["" if gbs is None else f"{gbs:.1f}", _share(result["read_share"])] if streams else []),
            *(f"{others[name]['ratio']:.2f}" if name in others else "" for name in names),
        )
    return table


def _label(result: dict[str, Any]) -> str:
    name, compute = result["format"], result["compute"]
    return name if compute == "bf16" else f"{name} x {compute}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws speed over rows per expert, one panel a pass, under the measured peak.

    Args:
        report: From `bench.measure`.
        path: A PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    passes = list(dict.fromkeys(result["pass"] for result in report["results"]))
    figure = Figure(figsize=(6.5 * len(passes), 5.0), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axis, which in zip(axes, passes, strict=True):
        results = [result for result in report["results"] if result["pass"] == which]
        for label, line in _lines(results).items():
            axis.plot(*zip(*line, strict=True), marker="o", label=label)
        for name, style in zip(report["baselines"], itertools.cycle(_STYLES), strict=False):
            if points := _baseline(results, name):
                axis.plot(*zip(*points, strict=True), marker=".", linestyle=style, color="gray", label=name)
        axis.axhline(report["peaks"]["gflops"], color="black", linewidth=0.8, label="measured peak")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xticks(sorted({result["rows_per_expert"] for result in results}))
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_locator(NullLocator())
        axis.set_title(which)
        axis.set_xlabel("rows per expert")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GFLOP/s")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.suptitle(
        f"{report['layer']['name']} on {report['machine']['cpu'] or 'unknown CPU'}, tier {report['machine']['tier']}, "
        f"{report['settings']['threads']} threads",
        fontsize=10,
    )
    figure.savefig(path, format="png", dpi=140)


def _lines(results: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        lines.setdefault(_label(result), []).append((result["rows_per_expert"], result["gflops"]))
    return lines


def _baseline(results: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """A baseline is measured again beside each format; the fastest of these is shown."""
    points: dict[int, float] = {}
    for result in results:
        if name in result["others"]:
            rows = result["rows_per_expert"]
            points[rows] = max(points.get(rows, 0.0), result["others"][name]["gflops"])
    return sorted(points.items())

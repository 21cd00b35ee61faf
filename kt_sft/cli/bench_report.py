"""How a report of `kt-sft bench` is shown: a table, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the report."""
    layer, peaks = report["layer"], report["peaks"]
    console.print(
        f"{report['machine']['cpu'] or 'unknown CPU'}, tier {report['machine']['tier']}, "
        f"{report['settings']['threads']} threads; peak {peaks['gflops']:.0f} GFLOP/s, reads {peaks['read_gbs']:.1f} "
        f"GB/s\n{layer['name']}: H {layer['hidden']}, I {layer['intermediate']}, {layer['experts']} experts held, "
        f"{layer['top_k']} per token; medians of {report['settings']['repeats']} alternating rounds",
        highlight=False,
    )
    for which in dict.fromkeys(result["pass"] for result in report["results"]):
        console.print(_table(report, which))
    for name, description in report["baselines"].items():
        console.print(f"{name}: {description}", style="dim", highlight=False)


def _table(report: dict[str, Any], which: str) -> Table:
    """One pass: ours, and how many times faster it is than each baseline that has this pass."""
    results = [result for result in report["results"] if result["pass"] == which]
    names = [name for name in report["baselines"] if any(name in result["others"] for result in results)]
    table = Table(title=which, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("format", no_wrap=True)
    for heading in ("rows", "GFLOP/s", "±", "of peak", "GB/s", "of read", *(f"x {name}" for name in names)):
        table.add_column(heading, justify="right")
    previous = None
    for result in results:
        label = _label(result)
        if previous not in (None, label):
            table.add_section()
        previous = label
        others = result["others"]
        table.add_row(
            label,
            str(result["rows_per_expert"]),
            f"{result['gflops']:.0f}",
            f"{result['spread']:.0%}",
            _share(result["peak_share"]),
            "" if result["read_gbs"] is None else f"{result['read_gbs']:.1f}",
            _share(result["read_share"]),
            *(f"{others[name]['ratio']:.2f}" if name in others else "" for name in names),
        )
    return table


def _label(result: dict[str, Any]) -> str:
    name, compute = result["format"], result["compute"]
    return name if compute == "bf16" else f"{name}, {compute} products"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws speed over rows per expert, one panel a pass, the measured peak on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    passes = list(dict.fromkeys(result["pass"] for result in report["results"]))
    figure, axes = plt.subplots(1, len(passes), figsize=(6.5 * len(passes), 4.8), sharey=True, squeeze=False)
    for axis, which in zip(axes[0], passes, strict=True):
        results = [result for result in report["results"] if result["pass"] == which]
        for label, line in _lines(results).items():
            axis.plot(*zip(*line, strict=True), marker="o", label=label)
        for name in report["baselines"]:
            points = _baseline(results, name)
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", linestyle=":", color="gray", alpha=0.8)
                axis.annotate(name, points[-1], fontsize=7, color="gray", ha="right", va="bottom")
        axis.axhline(report["peaks"]["gflops"], color="black", linewidth=0.8)
        axis.annotate(
            "measured peak", (0.01, report["peaks"]["gflops"]), xycoords=("axes fraction", "data"), fontsize=8
        )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_title(which)
        axis.set_xlabel("rows per expert")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("GFLOP/s")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(
        f"{report['layer']['name']} on {report['machine']['cpu']}, tier {report['machine']['tier']}, "
        f"{report['settings']['threads']} threads",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


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

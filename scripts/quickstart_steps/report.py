"""The quickstart's report: figures, targets, a table and the loss curves."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quickstart_steps.training import TrainingRun

#: How far the tuned model may be from the one stock LLaMA-Factory tunes, in exact match.
MOST_DIFFERENCE_TO_STOCK = 0.05


@dataclasses.dataclass(frozen=True)
class Target:
    """Something the quickstart must reach."""

    statement: str
    value: float
    reached: bool


def median_tokens_per_second(runs: list[TrainingRun]) -> float:
    """The median run's tokens per second."""
    return statistics.median(run.tokens_per_second for run in runs)


def build_figures(
    evaluation: dict[str, dict[str, float]], engine_runs: list[TrainingRun], stock_runs: list[TrainingRun]
) -> dict[str, Any]:
    """The report's figures. The first run of each list is the full one; all of them count for the speed."""
    engine, stock = engine_runs[0], stock_runs[0]
    engine_speed, stock_speed = median_tokens_per_second(engine_runs), median_tokens_per_second(stock_runs)
    return {
        "exact_match_base": evaluation["base"]["new_skill"],
        "exact_match_tuned": evaluation["tuned"]["new_skill"],
        "exact_match_stock": evaluation["stock"]["new_skill"],
        "exact_match_merged": evaluation["merged"]["new_skill"],
        "base_skills": {name: scores["base_skills"] for name, scores in evaluation.items()},
        "loss_first": engine.losses[0],
        "loss_last": engine.losses[-1],
        "loss_last_stock": stock.losses[-1],
        "tokens_per_second_kt_sft": engine_speed,
        "tokens_per_second_stock": stock_speed,
        "speed_ratio": engine_speed / stock_speed,
        "speed_runs": {
            "tokens_per_second_kt_sft": [run.tokens_per_second for run in engine_runs],
            "tokens_per_second_stock": [run.tokens_per_second for run in stock_runs],
            "median_step_seconds_kt_sft": [run.step_seconds for run in engine_runs],
            "median_step_seconds_stock": [run.step_seconds for run in stock_runs],
        },
        "peak_rss_mb_kt_sft": engine.peak_rss_mb,
        "peak_rss_mb_stock": stock.peak_rss_mb,
    }


def check_targets(figures: dict[str, Any], required_gain: float) -> list[Target]:
    """What must hold for the quickstart to succeed."""
    gain = figures["exact_match_tuned"] - figures["exact_match_base"]
    difference = abs(figures["exact_match_tuned"] - figures["exact_match_stock"])
    return [
        Target(f"exact match, tuned - base >= {required_gain}", gain, gain >= required_gain),
        Target(
            f"exact match, |tuned - stock| <= {MOST_DIFFERENCE_TO_STOCK}",
            difference,
            difference <= MOST_DIFFERENCE_TO_STOCK,
        ),
    ]


def new_table(title: str, *headings: str) -> Table:
    """A table that compares what the columns are about; rows begin with what they compare."""
    table = Table(title=title)
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def print_targets(console: Console, targets: list[Target]) -> None:
    """Prints what was to be reached, with the value that it came to."""
    for target in targets:
        mark = "[green]reached[/]" if target.reached else "[red]MISSED[/]"
        console.print(f"{mark}  {target.statement}: {target.value:.3g}", highlight=False)


def print_report(console: Console, figures: dict[str, Any], answer: dict[str, str], targets: list[Target]) -> None:
    """Prints the table that a user came for."""
    table = new_table(
        "the base model learns to reverse words; experts on kt_sft, and on stock LLaMA-Factory",
        "base",
        "kt_sft",
        "stock",
    )
    old = figures["base_skills"]
    table.add_row(
        "exact match on held-out words, reverse",
        f"{figures['exact_match_base']:.3f}",
        f"{figures['exact_match_tuned']:.3f}",
        f"{figures['exact_match_stock']:.3f}",
    )
    table.add_row(
        "exact match on them, base skills", f"{old['base']:.3f}", f"{old['tuned']:.3f}", f"{old['stock']:.3f}"
    )
    table.add_row("  reverse, exported merged model", "", f"{figures['exact_match_merged']:.3f}", "")
    table.add_row("loss, first step", "", f"{figures['loss_first']:.3f}", "")
    table.add_row("loss, last step", "", f"{figures['loss_last']:.4f}", f"{figures['loss_last_stock']:.4f}")
    table.add_row(
        "training, median tokens/s",
        "",
        f"{figures['tokens_per_second_kt_sft']:.0f} ({figures['speed_ratio']:.2f} x)",
        f"{figures['tokens_per_second_stock']:.0f}",
    )
    table.add_row(
        "training, peak memory, MB",
        "",
        f"{figures['peak_rss_mb_kt_sft']:.0f}",
        f"{figures['peak_rss_mb_stock']:.0f}",
    )
    console.print(table)
    console.print(f"asked {answer['question']!r}, the tuned model answers {answer['answer']!r}", highlight=False)
    print_targets(console, targets)


def draw_losses(engine: TrainingRun, stock: TrainingRun, path: Path) -> None:
    """Draws the loss curves of both runs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run, label, style in ((engine, "kt_sft", "-"), (stock, "stock LLaMA-Factory", "--")):
        axes.plot(range(1, len(run.losses) + 1), run.losses, style, label=label)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="quickstart: LoRA on attention, frozen experts")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)

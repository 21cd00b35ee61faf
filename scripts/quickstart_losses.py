#!/usr/bin/env python
"""How closely the engine's training losses follow stock LLaMA-Factory's, on the quickstart's recipe.

Runs the recipe three ways, with the same seed and the same order of data: kt_sft with BF16 experts, stock in BF16 and
stock in FP32 (the same weights, written as an FP32 checkpoint). The measure of a deviation is the mean over all steps
of the absolute difference in loss; that of kt_sft to stock BF16 must not exceed that of stock BF16 to stock FP32, the
difference that the choice of BF16 makes anyway. Two BF16 runs each round in their own way, and training amplifies what
it is given, so several seeds tell more than one.

Writes loss_agreement.json and loss_agreement.png in saves/quickstart. Exit status: 0, or 1 when the deviation is larger
or a run fails. Needs the base model: `scripts/quickstart.py --prepare-only` makes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from quickstart_steps.processes import IDLE_THREADS_SLEEP, REPOSITORY, StepError, run_step
from quickstart_steps.training import TrainingRun, train_stock, train_with_engine
from rich.console import Console
from rich.table import Table


def mean_difference(losses: list[float], reference: list[float]) -> float:
    """The mean over the steps of the absolute difference in loss."""
    return statistics.fmean(abs(one - other) for one, other in zip(losses, reference, strict=True))


def run_seed(out: Path, seed: int, max_steps: int | None, use_cpu: bool) -> dict[str, TrainingRun]:
    """The three runs of one seed, by name."""
    common: dict[str, Any] = {"dataset_dir": str(out / "data"), "seed": seed, "use_cpu": use_cpu}
    if max_steps is not None:
        common["max_steps"] = max_steps
    bf16 = common | {"model_name_or_path": str(out / "base")}
    fp32 = common | {"model_name_or_path": str(out / "base_fp32"), "bf16": False}
    runs = {}
    for name, train, settings in (
        ("kt_sft", train_with_engine, bf16),
        ("stock_bf16", train_stock, bf16),
        ("stock_fp32", train_stock, fp32),
    ):
        label = f"agreement_{name}_{seed}"
        log = REPOSITORY / out / "logs" / f"{label}.log"
        # Not timed, so the runs may be kind to what else the machine does.
        runs[name] = train(settings | {"output_dir": str(out / label)}, log, IDLE_THREADS_SLEEP)
    return runs


def compare(runs: dict[str, TrainingRun]) -> dict[str, Any]:
    """Deviations and losses of one seed's runs."""
    losses = {name: run.losses for name, run in runs.items()}
    return {
        "kt_sft_to_stock_bf16": mean_difference(losses["kt_sft"], losses["stock_bf16"]),
        "stock_bf16_to_stock_fp32": mean_difference(losses["stock_bf16"], losses["stock_fp32"]),
        "kt_sft_to_stock_fp32": mean_difference(losses["kt_sft"], losses["stock_fp32"]),
        "losses": losses,
    }


def draw(comparison: dict[str, Any], path: Path) -> None:
    """Draws both deviations of one seed, step by step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = comparison["losses"]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for one, other in (("kt_sft", "stock_bf16"), ("stock_bf16", "stock_fp32")):
        differences = [abs(a - b) for a, b in zip(losses[one], losses[other], strict=True)]
        axes.plot(range(1, len(differences) + 1), differences, label=f"|{one} - {other}|")
    axes.set(xlabel="step", ylabel="difference in loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saves/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--max-steps", type=int, help="default: the recipe's")
    options = parser.parse_args(arguments)
    console = Console()
    out = REPOSITORY / options.out
    if not (out / "machine.json").is_file():
        print(f"{out} holds no prepared quickstart: run scripts/quickstart.py --prepare-only first", file=sys.stderr)
        return 1
    use_cpu = json.loads((out / "machine.json").read_text())["accelerator"] is None
    try:
        convert = ["--source", str(out / "base"), "--out", str(out / "base_fp32")]
        run_step("convert_fp32", convert, out / "logs" / "convert_fp32.log")
        seeds = {}
        for seed in options.seeds:
            console.print(f"seed {seed}: three runs ...")
            seeds[seed] = compare(run_seed(options.out, seed, options.max_steps, use_cpu))
    except StepError as error:
        print(f"quickstart_losses: {error}", file=sys.stderr)
        return 1

    names = ("kt_sft_to_stock_bf16", "stock_bf16_to_stock_fp32", "kt_sft_to_stock_fp32")
    means = {name: statistics.fmean(comparison[name] for comparison in seeds.values()) for name in names}
    agrees = means["kt_sft_to_stock_bf16"] <= means["stock_bf16_to_stock_fp32"]
    record = {"agrees": agrees, "mean_absolute_difference": means, "seeds": seeds}
    (out / "loss_agreement.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(seeds[options.seeds[0]], out / "loss_agreement.png")

    table = Table(title="mean absolute difference in training loss")
    for heading in ("seed", *names):
        table.add_column(heading, justify="right")
    for seed, comparison in seeds.items():
        table.add_row(str(seed), *(f"{comparison[name]:.5f}" for name in names))
    table.add_row("mean", *(f"{means[name]:.5f}" for name in names))
    console.print(table)
    console.print("[green]agrees[/]" if agrees else "[red]kt_sft deviates more than BF16 itself does[/]")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())

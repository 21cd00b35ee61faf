#!/usr/bin/env python
"""From nothing to a fine-tuned Mixture-of-Experts model, offline, in a few minutes on two CPU cores.

1. Makes a small Qwen3-MoE base model (16 experts, 4 a token) from scratch: a tokenizer, six text skills, a few minutes.
2. `llamafactory-cli train recipes/quickstart.yaml` teaches it a seventh, reversing words, by LoRA on attention with
   the experts frozen on kt_sft's CPU engine; then the same recipe less its `kt_sft:` key runs on stock LLaMA-Factory.
3. Exports the merged model, evaluates base, tuned, stock-tuned and merged model on words none of them has seen, and
   asks the tuned model one question through the engine behind `llamafactory-cli chat`.
4. Repeats short runs of both, alternating, for the speed.

Everything lands in saves/quickstart: the models, report.json, losses.png and every program's log. A base model made by
an earlier run with the same settings is used again. Exit status: 0, or 1 when a step fails or a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from quickstart_steps.corpus import NEW_SKILL, skill_examples
from quickstart_steps.inference import export_merged, inference_arguments
from quickstart_steps.processes import REPOSITORY, exit_status, run_step
from quickstart_steps.report import build_figures, check_targets, draw_losses, print_report
from quickstart_steps.training import TrainingRun, load_recipe, train_stock, train_with_engine
from rich.console import Console

#: A seed of its own: the question is a held-out word that the evaluation need not hold.
QUESTION_SEED = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path  # relative to the repository
    base_steps: int | None
    max_steps: int | None
    timing_runs: int
    timing_steps: int
    required_gain: float
    prepare_only: bool

    @property
    def logs(self) -> Path:
        """Where every program's output goes."""
        return REPOSITORY / self.out / "logs"


def parse_options(arguments: list[str] | None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saves/quickstart"), help="where everything lands")
    parser.add_argument("--base-steps", type=int, help="training steps of the base model")
    parser.add_argument("--max-steps", type=int, help="fine-tuning steps (default: the recipe's)")
    parser.add_argument("--timing-runs", type=int, default=2, help="additional short runs of each kind, for the speed")
    parser.add_argument("--timing-steps", type=int, default=50, help="steps of a short run")
    parser.add_argument("--required-gain", type=float, default=0.5, help="least gain in exact match that is a success")
    parser.add_argument("--prepare-only", action="store_true", help="make the base model and the data, then stop")
    return Options(**vars(parser.parse_args(arguments)))


def prepare(options: Options) -> dict[str, Any]:
    """Makes the base model and the data where they are missing; returns what machine.json says."""
    out = REPOSITORY / options.out
    out.mkdir(parents=True, exist_ok=True)
    steps = [] if options.base_steps is None else ["--steps", str(options.base_steps)]
    run_step("base_model", ["--out", str(out / "base"), *steps], options.logs / "base_model.log")
    run_step("dataset", ["--out", str(out / "data")], options.logs / "dataset.log")
    run_step("machine", ["--out", str(out / "machine.json")], options.logs / "machine.log")
    return json.loads((out / "machine.json").read_text())


def training_settings(options: Options, machine: dict[str, Any], name: str) -> dict[str, Any]:
    """Where this run's settings may differ from the recipe's: only the paths, the length and the accelerator."""
    settings = {
        "model_name_or_path": str(options.out / "base"),
        "dataset_dir": str(options.out / "data"),
        "output_dir": str(options.out / name),
        # `use_cpu: true` would keep an accelerator idle.
        "use_cpu": machine["accelerator"] is None,
    }
    if options.max_steps is not None:
        settings["max_steps"] = options.max_steps
    return settings


def alternate_timing_runs(options: Options, machine: dict[str, Any]) -> tuple[list[TrainingRun], list[TrainingRun]]:
    """Short runs of both kinds, taking turns, so that what else the machine does falls on both alike."""
    engine_runs, stock_runs = [], []
    for index in range(options.timing_runs):
        length = {"max_steps": options.timing_steps}
        for runs, train, name in (
            (engine_runs, train_with_engine, "timing_kt_sft"),
            (stock_runs, train_stock, "timing_stock"),
        ):
            settings = training_settings(options, machine, name) | length
            runs.append(train(settings, options.logs / f"{name}_{index}.log"))
    return engine_runs, stock_runs


def arguments_of_tuned(options: Options, recipe: dict[str, Any]) -> dict[str, Any]:
    """What chat and export are told."""
    return inference_arguments(recipe, options.out / "base", options.out / "kt_sft")


def ask_tuned(options: Options, recipe: dict[str, Any]) -> dict[str, str]:
    """One question to the tuned model, and its answer."""
    (example,) = skill_examples(NEW_SKILL, 1, QUESTION_SEED, held_out=True)
    arguments, answer = options.logs / "chat.json", REPOSITORY / options.out / "answer.json"
    arguments.write_text(json.dumps(arguments_of_tuned(options, recipe), indent=2) + "\n")
    run_step(
        "ask",
        ["--arguments", str(arguments), "--question", example.prompt, "--out", str(answer)],
        options.logs / "chat.log",
    )
    return json.loads(answer.read_text())[0]


def evaluate_models(options: Options) -> dict[str, dict[str, float]]:
    """Exact match of every model, by its name."""
    out = REPOSITORY / options.out
    results = out / "evaluation.json"
    run_step(
        "evaluate",
        [
            *("--base", str(out / "base"), "--out", str(results)),
            *("--engine-adapter", f"tuned={out / 'kt_sft'}"),
            *("--adapter", f"stock={out / 'stock'}"),
            *("--merged", f"merged={out / 'merged'}"),
        ],
        options.logs / "evaluate.log",
    )
    return json.loads(results.read_text())


def quickstart(options: Options, console: Console) -> bool:
    """Runs every step; True when all targets are reached.

    Raises:
        StepError: A step failed.
    """
    start = time.monotonic()
    seconds: dict[str, float] = {}

    def announce(step: str) -> None:
        seconds[step] = time.monotonic() - start
        console.print(f"[dim]{seconds[step]:4.0f} s[/]  {step} ...", highlight=False)

    console.print(f"every program's output: {options.out / 'logs'}", highlight=False)
    announce("base model and data")
    machine = prepare(options)
    if options.prepare_only:
        return True
    recipe = load_recipe()
    announce("llamafactory-cli train, experts on kt_sft")
    engine_run = train_with_engine(training_settings(options, machine, "kt_sft"), options.logs / "kt_sft.log")
    announce("llamafactory-cli train, stock")
    stock_run = train_stock(training_settings(options, machine, "stock"), options.logs / "stock.log")
    announce("llamafactory-cli export")
    export_merged(arguments_of_tuned(options, recipe), options.out / "merged", options.logs)
    announce("evaluation on held-out words")
    evaluation = evaluate_models(options)
    announce("one question through llamafactory's chat")
    answer = ask_tuned(options, recipe)
    announce("timing runs, alternating")
    engine_runs, stock_runs = alternate_timing_runs(options, machine)
    seconds["end"] = time.monotonic() - start

    figures = build_figures(evaluation, [engine_run, *engine_runs], [stock_run, *stock_runs])
    targets = check_targets(figures, options.required_gain)
    out = REPOSITORY / options.out
    report = {
        **figures,
        "chat": answer,
        "targets": [dataclasses.asdict(target) for target in targets],
        "step_starts_seconds": seconds,
        "recipe": recipe,
        "settings": training_settings(options, machine, "kt_sft"),
        "base_model": json.loads((out / "base" / "quickstart.json").read_text()),
        "machine": machine,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_losses(engine_run, stock_run, out / "losses.png")
    print_report(console, figures, answer, targets)
    console.print(f"report: {options.out / 'report.json'}, loss curves: {options.out / 'losses.png'}", highlight=False)
    return all(target.reached for target in targets)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status("quickstart", lambda: quickstart(parse_options(arguments), Console()))


if __name__ == "__main__":
    sys.exit(main())

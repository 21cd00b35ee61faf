#!/usr/bin/env python
"""LoRA on attention and on the routed experts, from training to answers over HTTP, on the quickstart's base model.

1. Makes the quickstart's base model and data, where they are missing.
2. `llamafactory-cli train recipes/quickstart.yaml kt_sft.lora_experts=true` trains LoRA on attention and experts; then
   the recipe as it is, with the same number of steps, trains LoRA on attention alone.
3. Loads the saved adapter with plain PEFT in a process without kt_sft, and compares its logits with the engine's.
4. `llamafactory-cli export` merges the adapter into an ordinary checkpoint.
5. Evaluates the base model, both adapters (the one on experts in plain PEFT, too) and the merged model on words that
   none of them has seen.
6. `llamafactory-cli api` serves the merged model, its experts in the engine, and the openai client asks it.

Everything lands in saves/expert_lora: the adapters, the merged model, report.json and every program's log. Exit status:
0, or 1 when a step fails or a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import quickstart
import yaml
from quickstart_steps.corpus import NEW_SKILL, skill_examples
from quickstart_steps.dataset import HELD_OUT_EXAMPLES
from quickstart_steps.inference import export_merged, inference_arguments
from quickstart_steps.processes import REPOSITORY, exit_status, run_step
from quickstart_steps.report import MOST_DIFFERENCE_TO_STOCK, Target, new_table, print_targets
from quickstart_steps.training import WITHOUT_PLUGIN, TrainingRun, load_recipe, train_with_engine
from rich.console import Console

QUESTIONS = 8
#: Early enough that LoRA on attention alone has not learnt all of the skill, or there would be nothing to compare.
STEPS = 120


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path  # relative to the repository, as the next
    quickstart: Path
    base_steps: int | None
    max_steps: int
    examples: int
    required_gain: float

    @property
    def logs(self) -> Path:
        """Where every program's output goes."""
        return REPOSITORY / self.out / "logs"

    @property
    def of_quickstart(self) -> quickstart.Options:
        """The quickstart's options, for what is shared with it."""
        steps = [] if self.base_steps is None else ["--base-steps", str(self.base_steps)]
        return quickstart.parse_options(["--out", str(self.quickstart), "--max-steps", str(self.max_steps), *steps])


def parse_options(arguments: list[str] | None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saves/expert_lora"), help="where everything lands")
    parser.add_argument(
        "--quickstart", type=Path, default=Path("saves/quickstart"), help="where base model and data are, or are made"
    )
    parser.add_argument("--base-steps", type=int, help="training steps of the base model")
    parser.add_argument("--max-steps", type=int, default=STEPS, help="fine-tuning steps of either run")
    parser.add_argument("--examples", type=int, default=HELD_OUT_EXAMPLES, help="held-out words to evaluate on")
    parser.add_argument("--required-gain", type=float, default=0.5, help="least gain in exact match that is a success")
    return Options(**vars(parser.parse_args(arguments)))


def train(options: Options, machine: dict[str, Any]) -> dict[str, TrainingRun]:
    """Both trainings, by the name of the folder that they leave in `options.out`."""
    runs = {}
    for name, changes in (("experts", {"kt_sft.lora_experts": True}), ("attention", {})):
        settings = quickstart.training_settings(options.of_quickstart, machine, name)
        settings |= {"output_dir": str(options.out / name)} | changes
        runs[name] = train_with_engine(settings, options.logs / f"{name}.log")
    return runs


def compare_logits(options: Options) -> dict[str, float]:
    """How far the adapter on experts in plain PEFT, without kt_sft, is from the engine."""
    out = REPOSITORY / options.out
    models = ["--base", str(REPOSITORY / options.quickstart / "base"), "--adapter", str(out / "experts")]
    saved, figures = out / "logits.pt", out / "logits.json"
    run_step("logits", [*models, "--save", str(saved)], options.logs / "logits_plain.log", WITHOUT_PLUGIN)
    run_step("logits", [*models, "--compare", str(saved), "--out", str(figures)], options.logs / "logits_engine.log")
    return json.loads(figures.read_text())


def evaluate(options: Options) -> dict[str, dict[str, float]]:
    """Exact match of every model, by its name."""
    out = REPOSITORY / options.out
    run_step(
        "evaluate",
        [
            *("--base", str(REPOSITORY / options.quickstart / "base"), "--out", str(out / "evaluation.json")),
            *("--examples", str(options.examples)),
            *("--engine-adapter", f"attention={out / 'attention'}"),
            *("--engine-adapter", f"experts={out / 'experts'}"),
            *("--adapter", f"plain_peft={out / 'experts'}"),
            *("--merged", f"merged={out / 'merged'}"),
        ],
        options.logs / "evaluate.log",
    )
    return json.loads((out / "evaluation.json").read_text())


def ask_over_http(options: Options, recipe: dict[str, Any]) -> list[dict[str, str]]:
    """Questions to the merged model, served by `llamafactory-cli api`: question, answer and expected answer."""
    examples = skill_examples(NEW_SKILL, QUESTIONS, quickstart.QUESTION_SEED, held_out=True)
    arguments, questions = options.logs / "api.yaml", options.logs / "questions.json"
    arguments.write_text(yaml.safe_dump(inference_arguments(recipe, options.out / "merged"), sort_keys=False))
    questions.write_text(json.dumps([example.prompt for example in examples]) + "\n")
    answers = REPOSITORY / options.out / "answers.json"
    run_step(
        "api",
        ["--arguments", str(arguments), "--questions", str(questions), "--out", str(answers)],
        options.logs / "api.log",
    )
    given = json.loads(answers.read_text())
    return [answer | {"expected": example.answer} for answer, example in zip(given, examples, strict=True)]


def check_targets(exact_match: dict[str, float], logits: dict[str, float], required_gain: float) -> list[Target]:
    """What must hold for the example to succeed."""
    gain = exact_match["experts"] - exact_match["base"]
    more = exact_match["experts"] - exact_match["attention"]
    difference, allowed = logits["largest_difference"], logits["allowed_difference"]
    targets = [
        Target(f"logits in plain PEFT, largest difference <= {allowed:.3g}", difference, difference <= allowed),
        Target(f"exact match, experts - base >= {required_gain}", gain, gain >= required_gain),
        Target("exact match, experts - attention >= 0", more, more >= 0),
    ]
    for name in ("plain_peft", "merged"):
        apart = abs(exact_match[name] - exact_match["experts"])
        statement = f"exact match, |{name} - experts| <= {MOST_DIFFERENCE_TO_STOCK}"
        targets.append(Target(statement, apart, apart <= MOST_DIFFERENCE_TO_STOCK))
    return targets


def build_report(
    runs: dict[str, TrainingRun],
    evaluation: dict[str, dict[str, float]],
    logits: dict[str, float],
    answers: list[dict[str, str]],
) -> dict[str, Any]:
    """The report's figures."""
    return {
        "steps": {name: len(run.losses) for name, run in runs.items()},
        "exact_match": {name: scores["new_skill"] for name, scores in evaluation.items()},
        "base_skills": {name: scores["base_skills"] for name, scores in evaluation.items()},
        "loss_first": {name: run.losses[0] for name, run in runs.items()},
        "loss_last": {name: run.losses[-1] for name, run in runs.items()},
        "tokens_per_second": {name: run.tokens_per_second for name, run in runs.items()},
        "peak_rss_mb": {name: run.peak_rss_mb for name, run in runs.items()},
        "logits": logits,
        "answers": answers,
        "right_answers": sum(answer["answer"] == answer["expected"] for answer in answers),
    }


def print_report(console: Console, report: dict[str, Any], targets: list[Target]) -> None:
    """Prints the table that a user came for."""
    title = "the base model learns to reverse words; LoRA on attention, and on attention and experts"
    table = new_table(title, "base", "attention", "attention + experts")
    scores, old = report["exact_match"], report["base_skills"]
    names = ("base", "attention", "experts")
    table.add_row("training steps", "", *(str(report["steps"][name]) for name in names[1:]))
    table.add_row("exact match on held-out words, reverse", *(f"{scores[name]:.3f}" for name in names))
    table.add_row("  the adapter in plain PEFT", "", "", f"{scores['plain_peft']:.3f}")
    table.add_row("  exported merged model", "", "", f"{scores['merged']:.3f}")
    table.add_row("exact match on them, base skills", *(f"{old[name]:.3f}" for name in names))
    table.add_row("loss, last step", "", *(f"{report['loss_last'][name]:.4f}" for name in names[1:]))
    table.add_row("training, tokens/s", "", *(f"{report['tokens_per_second'][name]:.0f}" for name in names[1:]))
    table.add_row("training, peak memory, MB", "", *(f"{report['peak_rss_mb'][name]:.0f}" for name in names[1:]))
    console.print(table)
    asked = report["answers"]
    console.print(f"over HTTP, {report['right_answers']} of {len(asked)} answers are right:", highlight=False)
    for answer in asked:
        console.print(f"  {answer['question']!r} -> {answer['answer']!r}", highlight=False)
    print_targets(console, targets)


def example(options: Options, console: Console) -> bool:
    """Runs every step; True when all targets are reached.

    Raises:
        StepError: A step failed.
    """

    def announce(step: str) -> None:
        console.print(f"[dim]{step} ...[/]", highlight=False)

    recipe = load_recipe()
    console.print(f"every program's output: {options.out / 'logs'}", highlight=False)
    options.logs.mkdir(parents=True, exist_ok=True)
    announce("base model and data")
    machine = quickstart.prepare(options.of_quickstart)
    announce("llamafactory-cli train, LoRA on attention and experts, then on attention")
    runs = train(options, machine)
    announce("the adapter in plain PEFT, without kt_sft")
    logits = compare_logits(options)
    announce("llamafactory-cli export")
    arguments = inference_arguments(recipe, options.quickstart / "base", options.out / "experts")
    export_merged(arguments, options.out / "merged", options.logs)
    announce("evaluation on held-out words")
    evaluation = evaluate(options)
    announce("llamafactory-cli api, asked over HTTP")
    answers = ask_over_http(options, recipe)

    report = build_report(runs, evaluation, logits, answers)
    targets = check_targets(report["exact_match"], logits, options.required_gain)
    report |= {"targets": [dataclasses.asdict(target) for target in targets], "recipe": recipe, "machine": machine}
    (REPOSITORY / options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_report(console, report, targets)
    console.print(f"report: {options.out / 'report.json'}", highlight=False)
    return all(target.reached for target in targets)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status("expert_lora_example", lambda: example(parse_options(arguments), Console()))


if __name__ == "__main__":
    sys.exit(main())

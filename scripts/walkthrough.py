#!/usr/bin/env python
"""Plan, quantize, train, export and chat, starting from quantised checkpoints, on models of the quickstart's size.

For a Qwen3-MoE published in FP8 (blocks of 128 x 128, as Qwen3-FP8 and DeepSeek-V3) and a gpt-oss in MXFP4:

1. Writes the checkpoint in the layout of the published ones (FP8 of the quickstart's base model; MXFP4 of a model of
   gpt-oss' family, trained from scratch in a few minutes).
2. `kt-sft plan` says what a run needs and whether it fits.
3. `kt-sft quantize` makes a store of INT4 experts of it.
4. `llamafactory-cli train` teaches the model to reverse words, by LoRA on attention, on that store.
5. `llamafactory-cli export` merges the adapter into the checkpoint, in the checkpoint's own format.
6. The exported model answers questions through the engine behind `llamafactory-cli chat`.

Everything lands in saves/walkthrough, with report.json and every program's log. Exit status: 0, or 1 when a step fails
or a target is missed.
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
from quickstart_steps.inference import export_merged, inference_arguments
from quickstart_steps.processes import REPOSITORY, exit_status, llamafactory_cli, run, run_step
from quickstart_steps.report import Target, new_table, print_targets
from quickstart_steps.training import load_recipe
from rich.console import Console

KINDS = ("fp8", "mxfp4")
QUESTIONS = 4
#: The loss at the end of training, beside that at its beginning.
MOST_LOSS_LEFT = 0.5


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path  # relative to the repository, as the next
    quickstart: Path
    kinds: tuple[str, ...]
    base_steps: int | None
    max_steps: int | None
    most_loss_left: float

    @property
    def of_quickstart(self) -> quickstart.Options:
        """The quickstart's options, for what is shared with it."""
        steps = [] if self.base_steps is None else ["--base-steps", str(self.base_steps)]
        steps += [] if self.max_steps is None else ["--max-steps", str(self.max_steps)]
        return quickstart.parse_options(["--out", str(self.quickstart), *steps])


def parse_options(arguments: list[str] | None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saves/walkthrough"), help="where everything lands")
    parser.add_argument(
        "--quickstart", type=Path, default=Path("saves/quickstart"), help="where base model and data are, or are made"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="the checkpoints to go through")
    parser.add_argument("--base-steps", type=int, help="training steps of models made from scratch")
    parser.add_argument("--max-steps", type=int, help="fine-tuning steps (default: the recipe's)")
    parser.add_argument(
        "--most-loss-left", type=float, default=MOST_LOSS_LEFT, help="largest share of the first loss at the end"
    )
    found = vars(parser.parse_args(arguments))
    return Options(**found | {"kinds": tuple(found["kinds"])})


def kt_sft_command(name: str) -> list[str]:
    """The command line of `kt-sft NAME`."""
    return [str(Path(sys.executable).with_name("kt-sft")), name]


@dataclasses.dataclass(frozen=True)
class Walk:
    """The way of one checkpoint."""

    options: Options
    kind: str
    machine: dict[str, Any]
    console: Console

    @property
    def folder(self) -> Path:
        """Where everything of it lands, relative to the repository."""
        return self.options.out / self.kind

    @property
    def logs(self) -> Path:
        """Where its programs' output goes."""
        return REPOSITORY / self.folder / "logs"

    @property
    def checkpoint(self) -> Path:
        """As it is published."""
        return self.folder / "published"

    def announce(self, step: str) -> None:
        """Says what comes next."""
        self.console.print(f"[dim]{self.kind}: {step} ...[/]", highlight=False)

    def recipe(self, model: Path) -> dict[str, Any]:
        """The quickstart's recipe on another model, its experts as they are there."""
        changes = {"output_dir": str(self.folder / "adapter"), "model_name_or_path": str(model), "kt_sft": {}}
        shared = quickstart.training_settings(self.options.of_quickstart, self.machine, "unused")
        return load_recipe() | {key: shared[key] for key in shared if key not in changes} | changes

    def write_recipe(self, model: Path, name: str) -> Path:
        """Of `recipe`, as a file."""
        path = self.logs / name
        path.write_text(yaml.safe_dump(self.recipe(model), sort_keys=False))
        return path

    def publish(self) -> None:
        """Makes the checkpoint."""
        base = REPOSITORY / self.options.quickstart / "base"
        steps = [] if self.options.base_steps is None else ["--steps", str(self.options.base_steps)]
        arguments = ["--kind", self.kind, "--base", str(base), "--out", str(REPOSITORY / self.checkpoint), *steps]
        run_step("published", arguments, self.logs / "published.log")

    def plan(self) -> dict[str, Any]:
        """What `kt-sft plan --json` says of a run on the checkpoint."""
        self.announce("kt-sft plan")
        recipe, log = self.write_recipe(self.checkpoint, "plan.yaml"), self.logs / "plan.log"
        run("kt-sft plan", [*kt_sft_command("plan"), str(recipe), "--json"], log)
        text = log.read_text()
        return json.loads(text[text.index("{") : text.rindex("}") + 1])

    def quantize(self) -> Path:
        """A store of INT4 experts, made by `kt-sft quantize`."""
        self.announce("kt-sft quantize")
        store, log = self.folder / "int4", self.logs / "quantize.log"
        run("kt-sft quantize", [*kt_sft_command("quantize"), str(self.checkpoint), str(store), "--format", "int4"], log)
        return store

    def train(self, model: Path) -> list[float]:
        """The loss of every step."""
        self.announce(f"llamafactory-cli train, on {model}")
        recipe = self.write_recipe(model, "train.yaml")
        run("training", [llamafactory_cli(), "train", str(recipe)], self.logs / "train.log")
        lines = (REPOSITORY / self.folder / "adapter" / "trainer_log.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    def export(self) -> Path:
        """The checkpoint with the adapter merged into it."""
        self.announce("llamafactory-cli export")
        merged = self.folder / "merged"
        arguments = inference_arguments(self.recipe(self.checkpoint), self.checkpoint, self.folder / "adapter")
        export_merged(arguments, merged, self.logs)
        return merged

    def ask(self, model: Path) -> list[dict[str, str]]:
        """Questions to a model: question, answer and expected answer."""
        self.announce("chat with the exported model")
        arguments = self.logs / "chat.json"
        arguments.write_text(json.dumps(inference_arguments(self.recipe(model), model), indent=2) + "\n")
        examples = skill_examples(NEW_SKILL, QUESTIONS, quickstart.QUESTION_SEED, held_out=True)
        out, questions = REPOSITORY / self.folder / "answers.json", [example.prompt for example in examples]
        asked = ["--arguments", str(arguments), "--out", str(out), "--question", *questions]
        run_step("ask", asked, self.logs / "chat.log")
        given = json.loads(out.read_text())
        return [answer | {"expected": example.answer} for answer, example in zip(given, examples, strict=True)]

    def go(self) -> dict[str, Any]:
        """All of it; what there is to report.

        Raises:
            StepError: A step failed.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self.announce("a checkpoint as it is published")
        self.publish()
        plan, store = self.plan(), self.quantize()
        losses = self.train(store)
        merged = self.export()
        kept = json.loads((REPOSITORY / merged / "config.json").read_text()).get("quantization_config", {})
        return {
            "plan": plan,
            "trained_on": str(store),
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "exported_as": kept.get("quant_method"),
            "answers": self.ask(merged),
        }


def check_targets(kind: str, report: dict[str, Any], most_loss_left: float) -> list[Target]:
    """What must hold for the walk to have arrived."""
    left = report["loss_last"] / report["loss_first"]
    return [
        Target(f"{kind}: last loss / first loss <= {most_loss_left}", left, left <= most_loss_left),
        Target(
            f"{kind}: exported in its own format", float(report["exported_as"] == kind), report["exported_as"] == kind
        ),
        Target(f"{kind}: the plan fits", float(report["plan"]["fits"]), bool(report["plan"]["fits"])),
    ]


def print_report(console: Console, reports: dict[str, dict[str, Any]]) -> None:
    """Prints the table that a user came for."""
    table = new_table("from a published checkpoint to an answer", *reports)
    table.add_row("trained on", *(report["trained_on"] for report in reports.values()))
    table.add_row("loss, first step", *(f"{report['loss_first']:.4f}" for report in reports.values()))
    table.add_row("loss, last step", *(f"{report['loss_last']:.4f}" for report in reports.values()))
    table.add_row("exported as", *(str(report["exported_as"]) for report in reports.values()))
    right = [sum(a["answer"] == a["expected"] for a in report["answers"]) for report in reports.values()]
    table.add_row("right answers of the exported model", *(f"{count} of {QUESTIONS}" for count in right))
    console.print(table)
    for kind, report in reports.items():
        for answer in report["answers"]:
            console.print(f"  {kind}: {answer['question']!r} -> {answer['answer']!r}", highlight=False)


def walkthrough(options: Options, console: Console) -> bool:
    """Runs every step; True when all targets are reached.

    Raises:
        StepError: A step failed.
    """
    console.print(f"every program's output: {options.out}/*/logs", highlight=False)
    console.print("[dim]base model and data ...[/]", highlight=False)
    machine = quickstart.prepare(options.of_quickstart)
    reports = {kind: Walk(options, kind, machine, console).go() for kind in options.kinds}
    targets = [
        target for kind, report in reports.items() for target in check_targets(kind, report, options.most_loss_left)
    ]
    whole = reports | {"targets": [dataclasses.asdict(target) for target in targets], "machine": machine}
    (REPOSITORY / options.out / "report.json").write_text(json.dumps(whole, indent=2) + "\n")
    print_report(console, reports)
    print_targets(console, targets)
    console.print(f"report: {options.out / 'report.json'}", highlight=False)
    return all(target.reached for target in targets)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status("walkthrough", lambda: walkthrough(parse_options(arguments), Console()))


if __name__ == "__main__":
    sys.exit(main())

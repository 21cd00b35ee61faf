#!/usr/bin/env python3
"""Holds `kt-sft plan` to what training takes: peak memory and time of a step, predicted and measured.

Random models of a few layers are trained for some steps with plain LLaMA-Factory, each in a process of its own; the
plan is made before, from the same recipe. Memory is the process's largest resident set, pages of mapped files counted
(so the prediction counts mapped experts, too). Time is that of the median step; on a machine with other work to do it
says nothing.

  scripts/check_plan.py                       # all cases
  scripts/check_plan.py qwen3_int4 --steps 8  # some

Prints a table, writes report.json, and exits with 1 where memory is off by more than 10 % (or time by 25 %, with
--judge-time).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from kt_sft.cli.compare_model import write_text
from kt_sft.cli.compare_plan import RECIPES
from kt_sft.cli.training_runs import run_process, train

MEMORY_BOUND, TIME_BOUND = 0.10, 0.25
QWEN3 = {"name": "qwen3-30b-a3b", "layers": 4, "hidden": 1024, "intermediate": 512, "experts": 32, "top_k": 4}
DEEPSEEK = {"name": "deepseek-v2-lite", "layers": 3, "hidden": 768, "intermediate": 384, "experts": 64, "top_k": 6}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what its recipe has that others have not."""

    model: dict[str, Any]
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    block: dict[str, Any] = dataclasses.field(default_factory=dict)


NO_CHECKPOINTS = {"disable_gradient_checkpointing": True}
CASES = {
    "qwen3": Case(QWEN3),
    "qwen3_recompute": Case(QWEN3, block={"activation_policy": "recompute"}),
    "qwen3_no_checkpoints": Case(QWEN3, NO_CHECKPOINTS),
    "qwen3_no_checkpoints_recompute": Case(QWEN3, NO_CHECKPOINTS, {"activation_policy": "recompute"}),
    "qwen3_lora_experts": Case(QWEN3, block={"lora_experts": True}),
    "qwen3_lora_experts_no_checkpoints": Case(QWEN3, NO_CHECKPOINTS, {"lora_experts": True}),
    "qwen3_int4": Case(QWEN3, block={"expert_format": "int4"}),
    "qwen3_mapped": Case(QWEN3, block={"store": "mapped"}),
    "qwen3_eager": Case(QWEN3, {"flash_attn": "disabled", "per_device_train_batch_size": 2, **NO_CHECKPOINTS}),
    "deepseek": Case(DEEPSEEK),
    "deepseek_no_checkpoints": Case(DEEPSEEK, NO_CHECKPOINTS),
    "deepseek_lora_experts_int8": Case(DEEPSEEK, NO_CHECKPOINTS, {"lora_experts": True, "expert_format": "int8"}),
}


def recipe_of(case: Case, folder: Path, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The comparison's common recipe, on a machine without accelerator, with a case's own settings."""
    common = yaml.safe_load((RECIPES / "lora.yaml").read_text())
    return (
        common
        | {
            "model_name_or_path": str(model),
            "dataset_dir": str(folder / "data"),
            "output_dir": str(folder / "runs" / "out"),
            "cutoff_len": arguments.tokens,
            "max_steps": arguments.steps,
            "use_cpu": True,
        }
        | case.recipe
        | {"kt_sft": common["kt_sft"] | case.block}
    )


def make_model(request: dict[str, Any], vocabulary: int, folder: Path) -> Path:
    """A random checkpoint; one that is there already is taken again."""
    model = folder / f"{request['name']}_{vocabulary}"
    if not (model / "model.safetensors.index.json").is_file():
        asked = request | {"vocabulary": vocabulary, "folder": str(model)}
        run_process(
            "model", [sys.executable, "-m", "kt_sft.cli.compare_model", json.dumps(asked)], folder / "model.log"
        )
    return model


def check(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plans and trains one case."""
    case = CASES[name]
    recipe = folder / f"{name}.yaml"
    settings = recipe_of(case, folder, make_model(case.model, arguments.vocabulary, folder), arguments)
    recipe.write_text(json.dumps(settings, indent=2))  # JSON is YAML
    planned = folder / f"{name}.json"
    command = ["import sys; from kt_sft.cli.app import app; app(sys.argv[1:])", "plan", str(recipe), "--json"]
    command += [] if arguments.time else ["--no-measure"]
    run_process(f"{name}, plan", [sys.executable, "-c", *command], planned)
    text = planned.read_text()
    plan = json.loads(text[text.index("\n{\n") if not text.startswith("{") else 0 :])
    run = train(name, recipe, [], Path(settings["output_dir"]), folder / f"{name}.log")
    predicted = plan["host_need_bytes"] + (plan["experts_bytes"] if plan["experts_mapped"] else 0)
    measured = run.peak_rss_mb * 1e6
    return {
        "name": name,
        "memory": {"predicted": predicted, "measured": measured, "error": predicted / measured - 1},
        "time": {
            "predicted": plan["step_seconds"],
            "measured": run.step_seconds,
            "error": plan["step_seconds"] / run.step_seconds - 1,
        },
        "plan": plan,
    }


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if none is given")
    parser.add_argument("--out", type=Path, default=Path("saves/check_plan"), help="where models, logs, the report go")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--vocabulary", type=int, default=16384, help="of the models")
    parser.add_argument("--no-time", dest="time", action="store_false", help="do not measure speeds for the plan")
    parser.add_argument("--judge-time", action="store_true", help="fail where time is off, too")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(CASES)}")
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "data", arguments.tokens * 2 * (arguments.steps + 1))
    found = []
    print(
        f"{'case':36} {'predicted':>10} {'measured':>10} {'error':>7}   {'predicted':>10} {'measured':>9} {'error':>7}"
    )
    for name in arguments.cases or CASES:
        one = check(name, folder, arguments)
        memory, time = one["memory"], one["time"]
        print(
            f"{name:36} {memory['predicted'] / 1e6:7.0f} MB {memory['measured'] / 1e6:7.0f} MB "
            f"{memory['error']:7.1%}   "
            f"{time['predicted']:8.3f} s {time['measured']:7.3f} s {time['error']:7.1%}",
            flush=True,
        )
        found.append(one)
    (folder / "report.json").write_text(json.dumps(found, indent=2) + "\n")
    bad = [one["name"] for one in found if abs(one["memory"]["error"]) > MEMORY_BOUND]
    bad += [one["name"] for one in found if arguments.judge_time and abs(one["time"]["error"]) > TIME_BOUND]
    if bad:
        print(f"outside of {MEMORY_BOUND:.0%} for memory or {TIME_BOUND:.0%} for time: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""`kt-sft compare`: kt_sft against plain LLaMA-Factory and DeepSpeed's parameter offload, on this machine.

This process only starts the runs and reads what they leave; it stays free of torch (see training_runs.py).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kt_sft.cli import compare_figures as figures
from kt_sft.cli import compare_plan as plan
from kt_sft.cli.compare_machine import watched_device
from kt_sft.cli.compare_model import ARCHITECTURES, ModelRequest, write_text
from kt_sft.cli.compare_rates import predicted
from kt_sft.cli.shapes import ShapeError
from kt_sft.cli.training_runs import RunError, cause, run_process, train


def compare(
    model: Annotated[
        str,
        typer.Option(help=f"A checkpoint's folder, or random weights of {', '.join(ARCHITECTURES)}."),
    ] = "qwen3-30b-a3b",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of a random model, instead of its own.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Its hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Its expert intermediate size.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Its experts.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Its experts per token.")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=1, help="Its vocabulary; one token a byte if not given.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A training recipe with a kt_sft block; recipes/compare/lora.yaml if not given.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of a micro-batch, as 256,512,1024; the recipe's if not given.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a run.")] = 12,
    warmup: Annotated[int, typer.Option(min=1, help="First steps of a run, not measured.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Every contender runs once in each, in turn.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="On every side; what each program chooses if not given.")
    ] = None,
    contenders: Annotated[
        str | None, typer.Option(help=f"Which, of {', '.join(c.name for c in plan.CONTENDERS)}; all if not given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where models, logs and the report go.")] = Path("saves/compare"),
) -> None:
    """Train the same model with kt_sft, plain LLaMA-Factory and DeepSpeed ZeRO-3 offload, in turn, and compare.

    Writes report.md, report.json and report.png. The exit status is 1 where losses do not agree.
    """
    from kt_sft.cli.compare_report import write_report

    try:
        length = plan.Length(steps, warmup, rounds)
        chosen = plan.choose(contenders)
        common = plan.read_recipe(recipe or plan.RECIPES / "lora.yaml")
        sizes = plan.workloads(common, tokens)
        largest = max(size.tokens for size in sizes) * int(common.get("gradient_accumulation_steps", 1))
        own = {"layers": layers, "hidden": hidden, "intermediate": intermediate, "experts": experts, "top_k": top_k}
        request = ModelRequest(model, **own, vocabulary=vocabulary, tokens=largest * (steps + 1))
        if not Path(model).is_dir():
            request.shape  # noqa: B018  # raises, before anything is written
        elif any(own.values()) or vocabulary:
            raise plan.CompareError(f"--layers and the other sizes are those of random models; {model} has its own")
        comparison = Comparison(request, common, chosen, length, threads, out.resolve())
        report = comparison.run(sizes)
    except (plan.CompareError, ShapeError, RunError) as error:
        typer.echo(f"kt-sft compare: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(write_report(report, out))
    if any(not agrees for agrees in report["agree"].values()):
        raise typer.Exit(1)


class Comparison:
    """One comparison's settings and runs.

    Args:
        request: The model.
        recipe: The common one.
        contenders: Who takes part.
        length: Steps and rounds.
        threads: Of the engine and of torch's OpenMP; None: what each chooses.
        out: An absolute folder.
    """

    def __init__(
        self,
        request: ModelRequest,
        recipe: dict[str, Any],
        contenders: list[plan.Contender],
        length: plan.Length,
        threads: int | None,
        out: Path,
    ) -> None:
        self._request = request
        block = recipe[plan.PLUGIN_KEY] or {}
        self._recipe = recipe | {plan.PLUGIN_KEY: block | ({"num_threads": threads} if threads else {})}
        self._contenders = contenders
        self._length = length
        self._environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._out = out
        self._missing: dict[str, str] = {}

    def run(self, sizes: list[plan.Workload]) -> dict[str, Any]:
        """Prepares, runs everything, and gives the report's content.

        Raises:
            CompareError: Fewer than two contenders can run here.
            RunError: The model could not be made, or kt_sft itself failed.
        """
        started = datetime.datetime.now(datetime.UTC)
        facts = self._facts()
        if len(facts["accelerators"]) > 1:
            raise plan.CompareError(
                f"{len(facts['accelerators'])} accelerators are visible and one is compared; hide the others, as with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        folder = self._model()
        weights = plan.weight_bytes(folder)
        for contender in self._contenders:
            if (reason := plan.obstacle(contender, facts, weights)) is not None:
                self._missing[contender.name] = reason
                typer.echo(f"{contender.name} does not run here: {reason}", err=True)
        running = [contender for contender in self._contenders if contender.name not in self._missing]
        if len(running) < 2:
            raise plan.CompareError(
                "fewer than two contenders can run here: "
                + "; ".join(f"{name}: {reason}" for name, reason in self._missing.items())
            )
        layers, accumulation = plan.layers_of(folder), int(self._recipe.get("gradient_accumulation_steps", 1))
        same = self._recipe[plan.PLUGIN_KEY].get("expert_format", "auto") in plan.SAME_WEIGHTS
        predictions = self._predictions(sizes, folder, accumulation) if weights is not None else [None] * len(sizes)
        results = []
        for size, prediction in zip(sizes, predictions, strict=True):
            runs = self._workload(size, folder, running, facts)
            result = figures.compared(runs, layers, size.tokens * accumulation, same)
            results.append({"cutoff_len": size.cutoff, "batch": size.batch, **result, "prediction": prediction})
            # A comparison of hours that is stopped leaves what it has.
            (self._out / "results.json").write_text(json.dumps(results, indent=2))
        return {
            "kind": "kt-sft compare",
            "date": started.isoformat(timespec="seconds"),
            "command": ["kt-sft", *sys.argv[1:]],
            "machine": facts,
            "model": {"path": _shown(folder), "layers": layers, "weight_bytes": weights, "random": self._random()},
            "settings": {
                **dataclasses.asdict(self._length),
                "threads": self._recipe[plan.PLUGIN_KEY].get("num_threads"),
            },
            "recipe": self._recipe,
            "deepspeed": {c.name: _read(plan.RECIPES / c.deepspeed) for c in self._contenders if c.deepspeed},
            "descriptions": {contender.name: contender.description for contender in self._contenders},
            "missing": self._missing,
            "results": results,
            "agree": {
                f"{name}, {result['tokens']} tokens": own["agreement"]["agrees"]
                for result in results
                for name, own in result["contenders"].items()
                if own["agreement"] is not None and own["agreement"]["agrees"] is not None
            },
        }

    def _facts(self) -> dict[str, Any]:
        file = self._out / "machine.json"
        self._child("machine", ["kt_sft.cli.compare_machine", "facts", str(file)])
        return json.loads(file.read_text())

    def _random(self) -> dict[str, Any] | None:
        """What a random model is made of; None for a checkpoint."""
        if Path(self._request.name).is_dir():
            return None
        return {key: value for key, value in vars(self._request).items() if key != "tokens"}

    def _model(self) -> Path:
        """The checkpoint's folder, made if it is random; one that an earlier comparison made is used again."""
        if self._recipe.get("dataset") == "compare_text":
            write_text(self._out / "data", self._request.tokens)
        made = self._random()
        if made is None:
            return Path(self._request.name).resolve()
        folder, record = self._out / "model", self._out / "model.json"
        if not record.is_file() or json.loads(record.read_text()) != made:
            record.unlink(missing_ok=True)
            for stale in folder.glob("*"):
                stale.unlink()
            typer.echo("making the model ...", err=True)
            self._child("model", ["kt_sft.cli.compare_model", json.dumps({**made, "folder": str(folder)})])
            record.write_text(json.dumps(made))
        return folder

    def _predictions(self, sizes: list[plan.Workload], folder: Path, micro_batches: int) -> list[dict[str, Any]]:
        """What the model of the step says of each size, from speeds measured now."""
        typer.echo("measuring the machine's speeds ...", err=True)
        request = {
            "folder": str(folder),
            "workloads": [(size.cutoff, size.batch) for size in sizes],
            "settings": self._recipe[plan.PLUGIN_KEY],
        }
        file = self._out / "rates.json"
        self._child("rates", ["kt_sft.cli.compare_rates", json.dumps(request), str(file)])
        checkpointing = not self._recipe.get("disable_gradient_checkpointing", False)
        retained = self._recipe[plan.PLUGIN_KEY].get("activation_policy") != "recompute"
        return [
            predicted(found["work"], found["rates"], checkpointing, micro_batches, retained=retained)
            for found in json.loads(file.read_text())
        ]

    def _child(self, name: str, arguments: list[str]) -> None:
        log = self._out / "logs" / f"{name}.log"
        run_process(name, [sys.executable, "-m", *arguments], log, environment=self._environment)

    def _workload(
        self, size: plan.Workload, folder: Path, running: list[plan.Contender], facts: dict[str, Any]
    ) -> dict[str, list[figures.Measured]]:
        """All rounds of one size. A baseline that fails once is out, and the report says why; kt_sft must not fail."""
        runs: dict[str, list[figures.Measured]] = {}
        for number, contender in plan.alternating(running, self._length.rounds):
            label = f"{contender.name}, {size.tokens} tokens"
            if label in self._missing:
                continue
            typer.echo(f"{label}, round {number + 1} of {self._length.rounds} ...", err=True)
            try:
                measured = self._run(contender, size, folder, number, facts)
            except RunError as error:
                if contender.name == plan.PLUGIN_KEY:
                    raise
                log = self._out / "logs" / f"{contender.name}_{size.tokens}_{number + 1}.log"
                found = cause(log) if log.is_file() else None
                self._missing[label] = str(error) if found is None else f"{str(error).partition(':')[0]}: {found}"
                runs.pop(contender.name, None)
                typer.echo(f"{label} failed; the report has its output", err=True)
                continue
            runs.setdefault(contender.name, []).append(measured)
        return runs

    def _run(
        self, contender: plan.Contender, size: plan.Workload, folder: Path, number: int, facts: dict[str, Any]
    ) -> figures.Measured:
        name = f"{contender.name}_{size.tokens}"
        recipe, output = self._out / "recipes" / f"{name}.yaml", self._out / "runs" / name
        settings = {
            "model_name_or_path": str(folder),
            "output_dir": str(output),
            "overwrite_output_dir": True,
            "cutoff_len": size.cutoff,
            "per_device_train_batch_size": size.batch,
            "max_steps": self._length.steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "plot_loss": False,
            "include_num_input_tokens_seen": "non_padding",
            "use_cpu": not facts["accelerators"],
        }
        if self._recipe.get("dataset") == "compare_text":
            settings["dataset_dir"] = str(self._out / "data")
        own = plan.recipe_for(contender, self._recipe, settings, plan.RECIPES)
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(json.dumps(own, indent=2))  # JSON is YAML
        log = self._out / "logs" / f"{name}_{number + 1}.log"
        visible = bool(facts["accelerators"]) and facts["accelerators"][0]["free_bytes"] is not None
        with watched_device(self._out / "device.json", visible) as device:
            run = train(name, recipe, [], output, log, environment=contender.environment | self._environment)
        return figures.measured(number, run, self._length.warmup, device["peak_bytes"])


def _shown(folder: Path) -> str:
    """The folder as a user here would name it."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())

"""`kt-sft plan`: what a recipe needs and how fast it would be, without loading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table


def plan(
    recipe: Annotated[Path, typer.Argument(help="A training recipe with a kt_sft block.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that differ from it: key=value, kt_sft.expert_format=int4.")
    ] = None,
    machine: Annotated[
        Path | None, typer.Option(help="Another machine: a file that `kt-sft doctor --json` wrote there.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Training processes on the machine, as torchrun starts.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure this machine's speeds at the run's sizes.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
) -> None:
    """Say what memory a recipe needs, whether it fits, how fast it trains, and what to set instead.

    Reads the model's config.json and the headers of its safetensors files only. The exit status is 1 where it does not
    fit.
    """
    found = _planned(recipe, overrides or [], machine, processes, measure)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found, recipe, Console())
    if not found["fits"]:
        raise typer.Exit(1)


def _planned(recipe: Path, overrides: list[str], machine: Path | None, processes: int, measure: bool) -> dict[str, Any]:
    from kt_sft.config import ConfigError
    from kt_sft.integrations.memory_check import setup_with_adapter
    from kt_sft.loading.errors import CheckpointError, UnsupportedModelError
    from kt_sft.planning.machine import measured_base, read_machine, this_machine
    from kt_sft.planning.model import read_model
    from kt_sft.planning.plan import as_json, make_plan
    from kt_sft.planning.setup import RecipeError, read_recipe
    from kt_sft.planning.suggestion import suggest

    try:
        setup = setup_with_adapter(read_recipe(recipe, _settings(overrides)))
        found = this_machine(setup.settings.num_threads) if machine is None else read_machine(machine)
        base = measured_base()  # before anything of a model is in this process
        facts = read_model(setup)
        planned = make_plan(facts, setup, found, base=base, processes=processes, measures=measure)
        return as_json(planned, suggest(planned, facts))
    except (RecipeError, ConfigError, CheckpointError, UnsupportedModelError) as error:
        typer.echo(f"kt-sft plan: {str(error).removeprefix('kt_sft: ')}", err=True)
        raise typer.Exit(2) from error


def _settings(overrides: list[str]) -> dict[str, Any]:
    from kt_sft.planning.setup import RecipeError

    found = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"{text!r} is no key=value")
        found[key] = yaml.safe_load(value)
    return found


def show(found: dict[str, Any], recipe: Path, console: Console) -> None:
    """Prints a plan as tables and sentences."""
    console.print(_memory_table(found, recipe))
    console.print(_verdict(found), style="green" if found["fits"] else "red")
    if found["step_seconds"] is not None:
        shares = found["shares"]
        parts = [f"experts {shares['experts']:.0%}", f"CPU {shares['cpu']:.0%}"]
        parts += [f"{name.upper()} {shares[name]:.0%}" for name in ("gpu", "link") if shares[name]]
        console.print(
            f"About {found['step_seconds']:.3g} s a step, {found['tokens_per_second']:.4g} tokens/s "
            f"({', '.join(parts)} of the time)",
            highlight=False,
        )
    suggestion = found["suggestion"]
    console.print(f"Suggestion: {suggestion['reason']}.", highlight=False, markup=False)
    for key, value in suggestion["changes"].items():
        console.print(f"  {key}: {value}", highlight=False, markup=False)
    for sentence in found["warnings"]:
        console.print(f"- {sentence}", highlight=False, markup=False)


def _memory_table(found: dict[str, Any], recipe: Path) -> Table:
    table = Table("memory", title=f"{recipe}", title_justify="left")
    table.add_column("host", justify="right")
    if found["device_terms"] is not None:
        table.add_column("accelerator", justify="right")
    for name in found["host_terms"]:
        sides = [found["host_terms"], *([found["device_terms"]] if found["device_terms"] is not None else [])]
        mapped = name == "experts" and found["experts_mapped"]
        cells = [_gib(side[name]) for side in sides]
        if mapped:
            cells[0] = f"({_gib(found['experts_bytes'])} mapped)"
        table.add_row("process" if name == "base" else name, *cells)
    table.add_section()
    needs = [("needed", "host_need_bytes", "device_need_bytes"), ("there", "host_have_bytes", "device_have_bytes")]
    for label, host, device in needs:
        cells = [_gib(found[host])] + ([_gib(found[device])] if found["device_terms"] is not None else [])
        table.add_row(label, *cells)
    return table


def _verdict(found: dict[str, Any]) -> str:
    return "It fits this memory." if found["fits"] else "It does not fit this memory."


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.2f} GiB"

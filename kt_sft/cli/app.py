"""The commands of `kt-sft` and their options. What they do lives in modules that are imported when a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kt_sft.cli.compare import compare
from kt_sft.cli.convert_adapter import convert_adapter
from kt_sft.cli.migrate import migrate
from kt_sft.cli.plan import plan
from kt_sft.cli.quantize import quantize, verify
from kt_sft.cli.shapes import MODELS, ShapeError

app = typer.Typer(
    name="kt-sft",
    help="Routed experts on the CPU: how ready and fast this machine is, and adapters and recipes of other tools.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(compare)
app.command()(convert_adapter)
app.command()(migrate)
app.command()(plan)
app.command()(quantize)
app.command()(verify)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Show what the engine runs on, how fast that is, whether the hosts fit, and what to do about it.

    The exit status is 0 unless the engine cannot run.
    """
    from kt_sft.cli.doctor import examine, show

    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        show(facts, Console())
    if facts["engine"]["error"] is not None:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help=f"A model's name ({', '.join(MODELS)}), or a folder with its config.json.")
    ] = "qwen3-30b-a3b",
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size, instead of the model's.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Expert intermediate size.")] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts held; enough to be cold in the caches if not given.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts per token.")] = None,
    formats: Annotated[
        str,
        typer.Option(help="Weight formats, as int8, int8:32 (group of 32), int4:32:zp (zero points); or all."),
    ] = "all",
    compute: Annotated[str, typer.Option(help="What forward products multiply: bf16, int8, or both.")] = "bf16",
    rows: Annotated[str, typer.Option(help="Rows per expert.")] = "1,4,16,64,256",
    passes: Annotated[str, typer.Option(help="forward, backward, or both.")] = "forward,backward",
    threads: Annotated[int | None, typer.Option(min=1, help="On every side; this process's CPUs if not given.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; every contender runs once in each.")] = 7,
    clock: Annotated[
        str, typer.Option(help="elapsed, or cpu: CPU time, which others on the machine disturb less; one thread only.")
    ] = "elapsed",
    memory: Annotated[
        float | None, typer.Option(help="GiB that all weights together may take; half of what is free if not given.")
    ] = None,
    torch: Annotated[bool, typer.Option("--torch/--no-torch", help="Measure torch and transformers too.")] = True,
    kt_kernel: Annotated[
        Path | None, typer.Option(help="An interpreter that can import kt_kernel, to be measured too.")
    ] = None,
    kt_kernel_lora: Annotated[
        int, typer.Option(min=0, help="Rank of the LoRA on kt-kernel's experts; 0 takes its methods without.")
    ] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this PNG file.")] = None,
) -> None:
    """Measure the engine's forward and backward on this machine, against its own peak and against other libraries.

    KT_SFT_ISA=<tier> measures a lower instruction tier.
    """
    from kt_sft.cli.bench import measure
    from kt_sft.cli.bench_plan import BenchError
    from kt_sft.cli.bench_plan import plan as plan_bench
    from kt_sft.cli.bench_report import draw, show
    from kt_sft.config import ConfigError

    console = Console()
    try:
        for option, file in (("--json", json_file), ("--plot", plot)):  # before minutes of measuring, not after
            if file is not None and not file.absolute().parent.is_dir():
                raise BenchError(f"{option}: the folder {file.absolute().parent} does not exist")
        planned = plan_bench(
            model=model,
            hidden=hidden,
            intermediate=intermediate,
            experts=experts,
            top_k=top_k,
            formats=formats,
            compute=compute,
            rows=rows,
            passes=passes,
            threads=threads,
            repeats=repeats,
            clock=clock,
            memory_gib=memory,
            with_torch=torch,
            kt_kernel=kt_kernel,
            kt_kernel_lora=kt_kernel_lora,
        )
        report = measure(planned, note=lambda line: console.print(line, style="dim", highlight=False))
    except (BenchError, ConfigError, ShapeError) as error:
        typer.echo(f"kt-sft bench: {error}", err=True)
        raise typer.Exit(2) from error
    show(report, console)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if plot is not None:
        draw(report, plot)


def main() -> None:
    """The console script."""
    app()

"""`kt-sft quantize` and `kt-sft verify`: ready stores, and whether one is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from kt_sft.loading.ready.manifest import Manifest


def quantize(
    source: Annotated[
        str, typer.Argument(help="A checkpoint (BF16, FP16, FP8, MXFP4, INT4): a folder, or an id in the hub's cache.")
    ],
    target: Annotated[Path, typer.Argument(help="A new folder for the store.")],
    expert_format: Annotated[
        str, typer.Option("--format", help="How experts are stored: int4, int8, nf4, fp8, mxfp4, bf16, or auto.")
    ] = "int4",
    group_size: Annotated[
        int | None, typer.Option(min=0, help="Weights that share a scale; 0: a row; the format's own if not given.")
    ] = None,
    zero_point: Annotated[bool, typer.Option("--zero-point", help="Asymmetric int4.")] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Texts to choose four-bit codes for (GPTQ): plain text, or a .json or .jsonl dataset."),
    ] = None,
    calibrate_tokens: Annotated[int, typer.Option(min=2, help="How many tokens of them.")] = 32768,
    threads: Annotated[int | None, typer.Option(min=1, help="This process's CPUs if not given.")] = None,
) -> None:
    """Quantise a model's experts once, to a folder that recipes and from_pretrained load from then on.

    A run that was interrupted, however it was, goes on where it was when it is started again.
    """
    from kt_sft.config import ConfigError, KTConfig
    from kt_sft.engine.cpus import usable_cpus
    from kt_sft.loading.errors import CheckpointError, NotEnoughMemoryError, UnsupportedModelError
    from kt_sft.loading.hub import model_folder
    from kt_sft.loading.memory import readable
    from kt_sft.loading.ready.calibration import Calibration, ErrorFeedback, capture, check_format
    from kt_sft.loading.ready.planning import plan_store
    from kt_sft.loading.ready.writing import StoreWriter, incomplete

    console = Console(stderr=True)
    try:
        config = KTConfig(expert_format=expert_format, group_size=group_size, zero_point=zero_point)
        calibration = None
        if calibrate is not None:
            check_format(config.stored_format)
            calibration = Calibration(calibrate, calibrate_tokens)
        folder = model_folder(source)
        plan = plan_store(folder, config, None if calibration is None else calibration.facts())
        with _progress(console) as progress:
            task = progress.add_task("Quantising", total=plan.source_bytes, start=False)
            work = incomplete(target) / "calibration"
            writer = StoreWriter(
                plan,
                target,
                threads=threads or len(usable_cpus()),
                advance=lambda count: progress.advance(task, count),
                filler=None if calibration is None else ErrorFeedback(work),
            )
            if not writer.prepare():
                typer.echo(f"{target} is complete already")
                return
            with writer.locked():
                if not writer.prepare():  # now that nobody else can change anything
                    typer.echo(f"{target} is complete already")
                    return
                if calibration is not None:
                    capture(folder, calibration, work)
                progress.start_task(task)
                manifest = writer.write()
    except (ConfigError, CheckpointError, UnsupportedModelError, NotEnoughMemoryError, OSError) as error:
        typer.echo(f"kt-sft quantize: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{target}: {readable(plan.nbytes)} of {readable(plan.source_bytes)}; {_summary(manifest)}")


def verify(
    store: Annotated[
        str, typer.Argument(help="What `kt-sft quantize` made: a folder, or a repository's id in the hub's cache.")
    ],
    threads: Annotated[int | None, typer.Option(min=1, help="This process's CPUs if not given.")] = None,
) -> None:
    """Read all of a ready store and compare it with the hashes in its manifest.

    Loading compares sizes, shapes and headers every time; this compares every byte. The exit status is 1 for a store
    that is damaged.
    """
    from kt_sft.config import ConfigError
    from kt_sft.engine.cpus import usable_cpus
    from kt_sft.loading.errors import CheckpointError
    from kt_sft.loading.hub import model_folder
    from kt_sft.loading.memory import readable
    from kt_sft.loading.ready.manifest import read_manifest
    from kt_sft.loading.ready.verifying import total_bytes, verify_store

    console = Console(stderr=True)
    try:
        folder = model_folder(store)
        manifest = read_manifest(folder)
        with _progress(console) as progress:
            task = progress.add_task("Verifying", total=total_bytes(manifest))
            defects = verify_store(
                folder, manifest, threads or len(usable_cpus()), lambda count: progress.advance(task, count)
            )
    except ConfigError as error:
        typer.echo(f"kt-sft verify: {error}", err=True)
        raise typer.Exit(2) from error
    except CheckpointError as error:
        defects = [str(error)]
    for defect in defects:
        typer.echo(f"kt-sft verify: {defect}", err=True)
    if defects:
        raise typer.Exit(1)
    typer.echo(f"{store}: {readable(total_bytes(manifest))} as they were written; {_summary(manifest)}")


def _summary(manifest: Manifest) -> str:
    formats = sorted({experts.expert_format for experts in manifest.experts.values()})
    errors = [experts.relative_error for experts in manifest.experts.values()]
    lost = f", relative error {min(errors):.2e} to {max(errors):.2e} by layer" if max(errors) > 0 else ""
    return f"experts of {len(errors)} layers as {' and '.join(formats)}{lost}, from {manifest.source.get('name')}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

"""`kt-sft migrate`: a recipe for LLaMA-Factory's KTransformers backend, as one for kt_sft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kt_sft.cli.migrate_recipe import Migration


def migrate(
    recipe: Annotated[Path, typer.Argument(help="The recipe, with use_kt: true or infer_backend: ktransformers.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the new recipe; standard output if not given.")
    ] = None,
    accelerate: Annotated[
        Path | None, typer.Option(help="The Accelerate file of the run: LLaMA-Factory 0.9.5 keeps kt_config there.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file that -o names.")] = False,
) -> None:
    """Rewrite a recipe made for LLaMA-Factory's KTransformers backend, and name what has no counterpart."""
    from kt_sft.cli.migrate_keys import MigrateError
    from kt_sft.cli.migrate_recipe import migrate as rewrite

    try:
        if output is not None and output.exists() and not (force and output.is_file()):
            raise MigrateError(
                f"{output} exists; name another file" + (", or give --force" if output.is_file() else "")
            )
        if output is not None and not output.absolute().parent.is_dir():
            raise MigrateError(f"the folder {output.absolute().parent} does not exist")
        migration = rewrite(recipe, accelerate)
    except MigrateError as error:
        typer.echo(f"kt-sft migrate: {error}", err=True)
        raise typer.Exit(2) from error
    if output is None:
        typer.echo(migration.text, nl=False)
    else:
        with output.open("w", encoding="utf-8", newline="") as file:
            file.write(migration.text)
    typer.echo(_report(migration), err=True)


def _report(migration: Migration) -> str:
    lines = ["translated:"]
    lines += [f"  {name}, from {source}" for name, source in migration.translated.items()]
    if migration.dropped:
        lines.append("without counterpart:")
        lines += [f"  {name}: {value}  ({reason})" for name, value, reason in migration.dropped]
    if migration.notes:
        lines.append("to know:")
        lines += [f"  {note}" for note in migration.notes]
    return "\n".join(lines)

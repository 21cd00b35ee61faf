"""`kt-sft convert-adapter`: an adapter with LoRA on routed experts, in the layout that another tool reads."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Layout(enum.StrEnum):
    """Where an adapter goes."""

    PER_EXPERT = "per-expert"
    PEFT = "peft"


def convert_adapter(
    source: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    target: Annotated[Path, typer.Argument(help="A new folder for the converted adapter.")],
    to: Annotated[
        Layout, typer.Option(help="per-expert, which vLLM and SGLang load; or peft, which PEFT and kt_sft load.")
    ],
    base: Annotated[
        Path | None,
        typer.Option(help="A folder with the base model's config.json; what the adapter names if not given."),
    ] = None,
    peft_version: Annotated[
        str | None, typer.Option(help="The PEFT that shall read it, as 0.18 or 0.19; the installed one if not given.")
    ] = None,
) -> None:
    """Convert an adapter with LoRA on routed experts to the layout that another tool reads. Nothing is rounded."""
    from kt_sft.integrations.adapter_files import convert
    from kt_sft.integrations.adapter_layouts import AdapterFileError

    try:
        typer.echo(convert(source, target, to, base=base, peft_version=peft_version))
    except AdapterFileError as error:
        typer.echo(f"kt-sft convert-adapter: {error}", err=True)
        raise typer.Exit(2) from error

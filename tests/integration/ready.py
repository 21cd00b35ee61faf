"""Makes ready stores of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kt_sft.config import KTConfig
from kt_sft.loading.ready.manifest import Manifest
from kt_sft.loading.ready.planning import plan_store
from kt_sft.loading.ready.writing import StoreWriter


def make_store(source: Path, target: Path, *, threads: int = 2, **settings: Any) -> Manifest:
    """What `kt-sft quantize SOURCE TARGET` does; `settings` are KTConfig's."""
    writer = StoreWriter(plan_store(source, KTConfig(**settings)), target, threads=threads)
    assert writer.prepare()
    return writer.write()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }

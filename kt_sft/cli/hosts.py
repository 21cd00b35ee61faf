"""The libraries kt_sft attaches to: which versions are here, and whether they are those it asks for."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from packaging.requirements import Requirement

#: Packages that a run may use, in the order they are shown.
HOSTS = (
    "torch",
    "llamafactory",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "datasets",
    "safetensors",
    "deepspeed",
    "wandb",
)


def versions() -> list[dict[str, Any]]:
    """Each host's `name`, `version` (None: not installed), `wanted` (a range, or ""), `optional`, and whether it
    `fits`.

    A host that is not asked for, or only by an extra, fits if it is absent.
    """
    wanted = _wanted(importlib.metadata.requires("kt_sft") or [])
    found = []
    for name in HOSTS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        requirement, optional = wanted.get(name, (Requirement(name), True))
        found.append(
            {
                "name": name,
                "version": version,
                "wanted": str(requirement.specifier),
                "optional": optional,
                "fits": optional if version is None else requirement.specifier.contains(version, prereleases=True),
            }
        )
    return found


def _wanted(requirements: list[str]) -> dict[str, tuple[Requirement, bool]]:
    """Package -> (what is asked for, whether only an extra asks)."""
    parsed = [Requirement(text) for text in requirements]
    return {requirement.name: (requirement, requirement.marker is not None) for requirement in parsed}

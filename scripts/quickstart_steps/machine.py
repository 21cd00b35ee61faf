"""Writes what this machine is and what runs on it: `python -m quickstart_steps.machine --out FILE`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch

import kt_sft

PACKAGES = ("kt_sft", "torch", "transformers", "peft", "llamafactory")


def describe_machine() -> dict[str, object]:
    """CPU, accelerator (None where there is none), package versions and the engine's own account."""
    accelerator = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None
    return {
        "accelerator": accelerator,
        "cpus": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "engine": kt_sft.system_info(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line of this step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.out.write_text(json.dumps(describe_machine(), indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

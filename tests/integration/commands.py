"""Runs of LLaMA-Factory's own commands, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent

#: What makes a recipe one with adapters on experts.
LORA_EXPERTS: dict[str, Any] = {"kt_sft": {"lora_experts": True}, "lora_target": "all", "lora_dropout": 0.1}

#: No network, and threads that do not fight with those of other processes of this machine.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
}


def run_command(
    arguments: list[str], *, environment: dict[str, str] | None = None, stdin: str = "", timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    """Runs a command of this virtual environment; stdout holds both streams."""
    env = os.environ | ENVIRONMENT | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | (environment or {})
    return subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        timeout=timeout,
        check=False,
    )


def train_losses(output: Path) -> list[float]:
    """The loss of every logged step."""
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

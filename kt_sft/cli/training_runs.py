"""Runs of LLaMA-Factory in processes of their own: their output, memory, time and losses.

This module and those that import it stay free of torch: on Linux a child's peak memory starts at its parent's size at
the time of the fork, so a large parent would hide what the child itself needs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOG_LINES_SHOWN = 40
#: Nothing may be fetched: model and data are local.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
#: Keeps torch from loading plugins, ours among them: what stock runs is what it would run without kt_sft installed.
WITHOUT_PLUGIN = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


_ERROR = re.compile(r"(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception): .+)")
_LAUNCHERS_ERRORS = ("subprocess.", "torch.distributed.elastic.")


class RunError(RuntimeError):
    """A run failed; the message names it and shows the end of its output."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a finished process took."""

    seconds: float
    peak_rss_mb: float


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """The outcome of one `llamafactory-cli train`."""

    output_dir: Path
    losses: list[float]  # one a step
    tokens_per_second: float  # without padding
    step_seconds: float  # the median step
    peak_rss_mb: float
    seconds: float  # the whole process
    #: One entry a step as the Trainer logged it: `loss`, `train_runtime` and `num_input_tokens_seen` since the start.
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def run_process(
    name: str, command: list[str], log: Path, *, environment: dict[str, str] | None = None, folder: Path | None = None
) -> Usage:
    """Runs a command, without network, and measures it with the processes that it starts and waits for.

    Args:
        name: What to call it in a message.
        command: The program and its arguments.
        log: A file for its output.
        environment: Variables beside this process's own.
        folder: Where it runs; here if not given.

    Raises:
        RunError: The command could not be started, or did not exit with 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **OFFLINE, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise RunError(f"{name}: cannot start {command[0]}: {error}") from error
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        raise RunError(
            f"{name} failed (exit status {process.returncode}): {' '.join(command)}\n"
            + "\n".join(f"  | {line}" for line in lines)
            + f"\nThe whole output: {log}"
        )
    # ru_maxrss is in kB on Linux.
    return Usage(seconds=time.monotonic() - start, peak_rss_mb=usage.ru_maxrss * 1024 / 1e6)


def train(
    name: str,
    recipe: Path,
    arguments: list[str],
    output_dir: Path,
    log: Path,
    *,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
) -> TrainingRun:
    """`llamafactory-cli train` with a recipe that logs every step and counts tokens (`include_num_input_tokens_seen`).

    Args:
        name: What to call it in a message.
        recipe: The recipe's file.
        arguments: Settings that differ from it, as `key=value`.
        output_dir: The `output_dir` that recipe and arguments come to.
        log: A file for the output.
        environment: Variables beside this process's own.
        folder: Where it runs; here if not given.

    Raises:
        RunError: It failed, or logged fewer than two steps.
    """
    # What an earlier run left must not be taken for this one's.
    state_file = output_dir / "trainer_state.json"
    state_file.unlink(missing_ok=True)
    command = [llamafactory_cli(), "train", str(recipe), *arguments]
    usage = run_process(name, command, log, environment=environment, folder=folder)
    if not state_file.is_file():
        raise RunError(f"{name} wrote no {state_file}; its output: {log}")
    steps = [entry for entry in json.loads(state_file.read_text())["log_history"] if "loss" in entry]
    if len(steps) < 2:
        raise RunError(f"{name} logged fewer than two steps in {state_file}")
    return TrainingRun(
        output_dir=output_dir,
        losses=[entry["loss"] for entry in steps],
        tokens_per_second=steps[-1]["num_input_tokens_seen"] / steps[-1]["train_runtime"],
        step_seconds=statistics.median(
            later["train_runtime"] - earlier["train_runtime"] for earlier, later in itertools.pairwise(steps)
        ),
        peak_rss_mb=usage.peak_rss_mb,
        seconds=usage.seconds,
        steps=steps,
    )


def cause(log: Path) -> str | None:
    """The first error that a run's output names, without those of launchers; None if there is none."""
    for line in log.read_text(errors="replace").splitlines():
        found = _ERROR.match(line)
        if found and not found.group(1).startswith(_LAUNCHERS_ERRORS):
            return found.group(1)
    return None


def llamafactory_cli() -> str:
    """The `llamafactory-cli` installed beside this Python."""
    return str(Path(sys.executable).parent / "llamafactory-cli")

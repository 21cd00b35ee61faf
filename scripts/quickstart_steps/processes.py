"""Runs the quickstart's programs, each in a process of its own, and measures them.

This module and those that import it stay free of torch, as kt_sft/cli/training_runs.py says why.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from kt_sft.cli.training_runs import OFFLINE, Usage, llamafactory_cli, run_process
from kt_sft.cli.training_runs import RunError as StepError

__all__ = [
    "IDLE_THREADS_SLEEP",
    "OFFLINE",
    "REPOSITORY",
    "StepError",
    "exit_status",
    "llamafactory_cli",
    "run",
    "run_step",
]

SCRIPTS = Path(__file__).resolve().parent.parent
REPOSITORY = SCRIPTS.parent

#: For our own steps: idle OpenMP threads sleep instead of spinning, which on a busy machine is worth a factor of three.
#: Training runs keep what a user has.
IDLE_THREADS_SLEEP = {"OMP_WAIT_POLICY": "passive"}


def run(name: str, command: list[str], log: Path, environment: dict[str, str] | None = None) -> Usage:
    """Runs a command from the repository's root, its output into `log`.

    Raises:
        StepError: The command could not be started, or did not exit with 0.
    """
    return run_process(name, command, log, environment=environment, folder=REPOSITORY)


def run_step(module: str, arguments: list[str], log: Path, environment: dict[str, str] | None = None) -> Usage:
    """Runs a module of this folder as a program."""
    command = [sys.executable, "-m", f"quickstart_steps.{module}", *arguments]
    search_path = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": search_path, **IDLE_THREADS_SLEEP, **(environment or {})}
    return run(module.replace("_", " "), command, log, environment)


def exit_status(program: str, steps: Callable[[], bool]) -> int:
    """Runs a program's steps, which say whether all targets were reached, and says what went wrong.

    Returns:
        0 where they were, else 1.
    """
    try:
        reached = steps()
    except StepError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    if not reached:
        print(f"{program}: a target was missed (see above)", file=sys.stderr)
    return 0 if reached else 1

"""Runs the quickstart's programs, each in a process of its own, and measures them.

This module and those that import it stay free of torch: on Linux a child's peak memory starts at its parent's size at
the time of the fork, so a large parent would hide what the child itself needs.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent
REPOSITORY = SCRIPTS.parent
LOG_LINES_SHOWN = 40
#: Nothing may be fetched: model and data are local.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


#: For our own steps: idle OpenMP threads sleep instead of spinning, which on a busy machine is worth a factor of three.
#: Training runs keep what a user has.
IDLE_THREADS_SLEEP = {"OMP_WAIT_POLICY": "passive"}


class StepError(RuntimeError):
    """A step of the quickstart failed; the message names it and shows the end of its output."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a finished process took."""

    seconds: float
    peak_rss_mb: float


def run(name: str, command: list[str], log: Path, environment: dict[str, str] | None = None) -> Usage:
    """Runs a command from the repository's root, its output into `log`.

    Raises:
        StepError: The command could not be started, or did not exit with 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **OFFLINE, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise StepError(f"{name}: cannot start {command[0]}: {error}") from error
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        raise StepError(
            f"{name} failed (exit status {process.returncode}): {' '.join(command)}\n"
            + "\n".join(f"  | {line}" for line in lines)
            + f"\nThe whole output: {log}"
        )
    # ru_maxrss is in kB on Linux.
    return Usage(seconds=time.monotonic() - start, peak_rss_mb=usage.ru_maxrss * 1024 / 1e6)


def run_step(module: str, arguments: list[str], log: Path, environment: dict[str, str] | None = None) -> Usage:
    """Runs a module of this folder as a program."""
    command = [sys.executable, "-m", f"quickstart_steps.{module}", *arguments]
    search_path = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": search_path, **IDLE_THREADS_SLEEP, **(environment or {})}
    return run(module.replace("_", " "), command, log, environment)


def llamafactory_cli() -> str:
    """The `llamafactory-cli` installed beside this Python."""
    return str(Path(sys.executable).parent / "llamafactory-cli")


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

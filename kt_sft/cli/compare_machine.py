"""What `kt-sft compare` must know of the machine, found out in processes of their own because they import torch.

`python -m kt_sft.cli.compare_machine facts FILE` writes the facts as JSON; `... watch FILE` writes the least free
memory of the accelerator to FILE, again and again, until its standard input closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Seconds between two looks at the accelerator's memory. Allocators keep what they took, so few peaks are missed.
_WATCH_SECONDS = 0.1


def facts() -> dict[str, Any]:
    """Hardware, versions, what the engine says of itself, and whether DeepSpeed can be imported."""
    import kt_sft
    from kt_sft.cli import hosts, machine
    from kt_sft.config import openmp_threads, openmp_wait_policy, requested_tier

    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": machine.cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": machine.memory_bytes(),
        "accelerators": machine.accelerators(),
        "versions": {"kt_sft": kt_sft.__version__} | {host["name"]: host["version"] for host in hosts.versions()},
        "engine": kt_sft.system_info(),
        "environment": {
            "KT_SFT_ISA": requested_tier(),
            "OMP_NUM_THREADS": openmp_threads(),
            "OMP_WAIT_POLICY": openmp_wait_policy(),
        },
        "deepspeed_error": _deepspeed_error(),
    }


def _deepspeed_error() -> str | None:
    try:
        import deepspeed  # noqa: F401
    except Exception as error:  # its import builds and probes things
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def watched_device(file: Path, present: bool) -> Iterator[dict[str, Any]]:
    """Watches the accelerator's free memory meanwhile.

    Args:
        file: Where the watching process writes.
        present: Whether there is an accelerator.

    Yields:
        A dict that has `peak_bytes` afterwards: how much less was free than at the start; None without accelerator.
    """
    found: dict[str, Any] = {"peak_bytes": None}
    if not present:
        yield found
        return
    file.unlink(missing_ok=True)
    watch = subprocess.Popen([sys.executable, "-m", __name__, "watch", str(file)], stdin=subprocess.PIPE)
    try:
        while not file.exists() and watch.poll() is None:
            threading.Event().wait(_WATCH_SECONDS)
        yield found
    finally:
        watch.communicate()
    seen = json.loads(file.read_text())
    found["peak_bytes"] = seen["first"] - seen["least"]


def watch(file: Path) -> None:
    """Follows the first accelerator's free memory until standard input closes."""
    from kt_sft.cli.machine import accelerators

    closed = threading.Event()

    def await_end() -> None:
        sys.stdin.read()
        closed.set()

    threading.Thread(target=await_end, daemon=True).start()
    first = least = accelerators()[0]["free_bytes"]
    while True:
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps({"first": first, "least": least}))
        fresh.replace(file)
        if closed.wait(_WATCH_SECONDS):
            return
        least = min(least, accelerators()[0]["free_bytes"])


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(Path(sys.argv[2]))
    else:
        Path(sys.argv[2]).write_text(json.dumps(facts(), indent=2, default=str) + "\n")

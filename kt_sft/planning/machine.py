"""A machine as plans see it: this one, or the one whose `kt-sft doctor --json` was written to a file."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from kt_sft.planning.setup import RecipeError

#: Tiers whose panels hold BF16 values; the others hold FP32.
_BF16_TIERS = ("avx512_bf16", "amx")
#: What comes to a process between its imports and its first step: data, the Trainer, threads, compiled kernels.
_STARTED = 128 << 20
#: Host memory of a process that has imported all that training imports, where it cannot be measured.
USUAL_BASE = 800 << 20


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine has.

    Args:
        name: For people.
        host_bytes: Memory that a run may take, a container's limit counted; None where nobody says.
        device: The accelerator's name; None where there is none.
        device_bytes: Its memory that is free.
        threads: Of the engine.
        tier: Of the engine.
        peak_flops: Of the engine's products, all threads.
        read_bytes: Per second from memory, all threads.
        is_here: Whether it is this machine, whose speeds can be measured.
    """

    name: str
    host_bytes: int | None
    device: str | None = None
    device_bytes: int | None = None
    threads: int = 1
    tier: str = "portable"
    peak_flops: float | None = None
    read_bytes: float | None = None
    is_here: bool = False

    @property
    def element_bytes(self) -> int:
        """Of a value in the engine's panels."""
        return 2 if self.tier in _BF16_TIERS else 4


def this_machine(num_threads: int | None = None) -> Machine:
    """The one that this runs on."""
    import torch

    from kt_sft.engine.info import system_info

    info = system_info(num_threads)
    device, free = None, None
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
        module = torch.get_device_module(kind)
        number = torch.accelerator.current_device_index()  # a context on another device would take memory there
        device = module.get_device_name(number) if hasattr(module, "get_device_name") else kind
        free = module.mem_get_info(number)[0] if hasattr(module, "mem_get_info") else None
    return Machine(
        name=info["cpu"],
        host_bytes=info["memory_available_bytes"],
        device=device,
        device_bytes=free,
        threads=info["threads"],
        tier=info["tier"],
        peak_flops=info["peak_gflops"] * 1e9,
        read_bytes=info["read_bandwidth_gbs"] * 1e9,
        is_here=True,
    )


def read_machine(path: Path) -> Machine:
    """The machine of a file that `kt-sft doctor --json` wrote there.

    Raises:
        RecipeError: It cannot be read, or lacks what a plan needs.
    """
    try:
        facts = json.loads(path.read_text())
        chosen: dict[str, Any] = next((tier for tier in facts["tiers"] if tier["chosen"]), {})
        found: list[dict[str, Any]] = facts["accelerators"]
        first = found[0] if found else {}
        rate = facts["memory"].get("read_gbs")
        peak = chosen.get("peak_gflops")
        return Machine(
            name=facts["cpu"]["model"] or str(path),
            host_bytes=facts["memory"]["available_bytes"] or facts["memory"]["total_bytes"],
            device=first.get("name"),
            device_bytes=first.get("free_bytes") or first.get("memory_bytes"),
            threads=facts["engine"]["threads"] or 1,
            tier=facts["engine"]["tier"] or "portable",
            peak_flops=None if peak is None else peak * 1e9,
            read_bytes=None if rate is None else rate * 1e9,
        )
    except OSError as error:
        raise RecipeError(f"--machine: {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise RecipeError(
            f"--machine: {path} is not what `kt-sft doctor --json` prints ({error!r}); write one with "
            f"`kt-sft doctor --json > {path.name}` on that machine"
        ) from error


def measured_base() -> int:
    """Bytes of a training process without a model: what this one has once it has imported the same, and some more."""
    try:
        importlib.import_module("llamafactory.train.tuner")
    except Exception:  # its imports probe devices and packages; without it the usual size must do
        return USUAL_BASE
    resident = resident_bytes()
    return USUAL_BASE if resident is None else resident + _STARTED


def resident_bytes() -> int | None:
    """Of this process's memory, what is resident now; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None

"""What `kt-sft bench` is going to measure, settled and checked before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

from kt_sft.cli import machine
from kt_sft.cli.shapes import LayerShape, shape_of
from kt_sft.config import AVAILABLE_FORMATS, COMPUTE_TYPES, ConfigError, KTConfig
from kt_sft.engine.cpus import engine_cpus, usable_cpus
from kt_sft.engine.memory import available_bytes

PASSES = ("forward", "backward")

#: What is counted as time: what passes, or what this process's threads (the other's, for kt-kernel) spend on a CPU.
CLOCKS = ("elapsed", "cpu")

#: Weights are cold when they are this many times the last-level cache.
COLD = 4

#: Enough experts that they can be shared out among threads as in a real layer.
_LEAST_EXPERTS = 32

#: Bytes a weight of the whole bench, at worst: the BF16 source, the engine's copy, oneDNN's packed one.
_BYTES_PER_WEIGHT = 6
#: And in the other process: kt-kernel's source, its forward and its backward copies.
_PEER_BYTES_PER_WEIGHT = 8


class BenchError(ValueError):
    """What is asked for cannot be measured; the message names the option and the way out."""


@dataclasses.dataclass(frozen=True)
class FormatChoice:
    """A weight format with its settings, written as on the command line."""

    text: str
    expert_format: str
    group_size: int | None = None
    zero_point: bool = False

    def config(self, compute: str, threads: int) -> KTConfig:
        """The engine's settings for this format; raises ConfigError where it does not take them."""
        return KTConfig(
            expert_format=self.expert_format,
            group_size=self.group_size,
            zero_point=self.zero_point,
            compute=compute,
            num_threads=threads,
        )

    @property
    def cold_bytes_per_weight(self) -> float:
        """A lower bound, scales not counted."""
        return {"bf16": 2.0, "int8": 1.0, "fp8": 1.0}.get(self.expert_format, 0.5)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked bench.

    Attributes:
        shape: The layer that is measured; `experts` is how many are held, not how many the model has.
        variants: What of ours is measured: a format and what its forward products multiply.
        cache_bytes: Last-level cache, or None where the system does not say.
    """

    shape: LayerShape
    variants: tuple[tuple[FormatChoice, str], ...]
    rows: tuple[int, ...]
    passes: tuple[str, ...]
    threads: int
    repeats: int
    clock: str
    with_torch: bool
    kt_kernel: Path | None
    kt_kernel_lora: int
    cache_bytes: int | None


def plan(
    *,
    model: str,
    hidden: int | None,
    intermediate: int | None,
    experts: int | None,
    top_k: int | None,
    formats: str,
    compute: str,
    rows: str,
    passes: str,
    threads: int | None,
    repeats: int,
    clock: str,
    memory_gib: float | None,
    with_torch: bool,
    kt_kernel: Path | None,
    kt_kernel_lora: int,
) -> Plan:
    """Settles a bench from the command line's options.

    Raises:
        BenchError: An option is not possible.
        ConfigError: A format or its settings are not possible in this version.
        ShapeError: The model is not known.
    """
    shape = shape_of(model)
    given = {"hidden": hidden, "intermediate": intermediate, "top_k": top_k}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes:
        most = max(shape.experts, top_k or 0)
        shape = dataclasses.replace(shape, **changes, experts=most, name=f"{shape.name}, changed")
    threads = engine_cpus(threads)[0]
    if clock not in CLOCKS:
        raise BenchError(f"--clock: {clock!r} is none of {', '.join(CLOCKS)}")
    if clock == "cpu" and threads > 1:
        raise BenchError("--clock cpu adds up the time of all threads, waiting ones included; give --threads 1 with it")
    choices = _formats(formats)
    computes, measured = _words("--compute", compute, COMPUTE_TYPES), _words("--passes", passes, PASSES)
    if "bf16" not in computes and "forward" not in measured:
        raise BenchError("--compute int8 changes forward products only; add forward to --passes")
    variants = _variants(choices, computes, threads)
    most_rows = _numbers("--rows", rows)
    if kt_kernel is not None and not kt_kernel.exists():
        raise BenchError(f"--kt-kernel {kt_kernel} does not exist; give the python of an environment with kt-kernel")
    cache = machine.last_level_cache_bytes(usable_cpus())
    allowed = _allowed_bytes(memory_gib)
    held = _experts(shape, experts, choices, max(most_rows), cache, allowed, peer=kt_kernel is not None)
    return Plan(
        shape=dataclasses.replace(shape, experts=held),
        variants=variants,
        rows=most_rows,
        passes=measured,
        threads=threads,
        repeats=repeats,
        clock=clock,
        with_torch=with_torch,
        kt_kernel=kt_kernel,
        kt_kernel_lora=kt_kernel_lora,
        cache_bytes=cache,
    )


def _experts(
    shape: LayerShape,
    asked: int | None,
    choices: tuple[FormatChoice, ...],
    most_rows: int,
    cache: int | None,
    allowed: int,
    peer: bool,
) -> int:
    """How many experts are held: a multiple of K, so that all get equally many rows."""
    per_expert = shape.expert_weights * (_BYTES_PER_WEIGHT + (_PEER_BYTES_PER_WEIGHT if peer else 0))
    # Rows in and out, pre-activations, what autograd of transformers' experts keeps: a generous bound.
    per_expert += most_rows * (8 * shape.hidden + 8 * shape.intermediate) * 2
    if asked is not None:
        if asked % shape.top_k:
            raise BenchError(
                f"--experts {asked} is no multiple of the {shape.top_k} experts per token, so experts would not get "
                "equally many rows; give a multiple"
            )
        if asked * per_expert > allowed:
            raise BenchError(
                f"--experts {asked} needs {asked * per_expert / 2**30:.1f} GiB, {allowed / 2**30:.1f} GiB may be used; "
                "give fewer, or raise --memory"
            )
        return asked
    smallest = min(choice.cold_bytes_per_weight for choice in choices) * shape.expert_weights
    cold = COLD * (cache if cache is not None else 64 << 20)
    least = max(cold / smallest, min(_LEAST_EXPERTS, shape.experts))
    groups = math.ceil(least / shape.top_k)
    groups = min(groups, allowed // per_expert // shape.top_k)
    if groups == 0:
        raise BenchError(
            f"{shape.top_k} experts of this size need {shape.top_k * per_expert / 2**30:.1f} GiB, "
            f"{allowed / 2**30:.1f} GiB may be used; raise --memory or lower --top-k"
        )
    return groups * shape.top_k


def _allowed_bytes(memory_gib: float | None) -> int:
    if memory_gib is None:
        return (available_bytes() or sys.maxsize) // 2
    if not memory_gib > 0:
        raise BenchError(f"--memory must be above 0 GiB, got {memory_gib}")
    return int(memory_gib * 2**30)


def _formats(text: str) -> tuple[FormatChoice, ...]:
    if text.strip() == "all":
        return tuple(FormatChoice(name, name) for name in AVAILABLE_FORMATS)
    return tuple(_format(part.strip()) for part in text.split(","))


def _format(text: str) -> FormatChoice:
    name, *settings = text.split(":")
    zero_point = "zp" in settings
    groups = [setting for setting in settings if setting != "zp"]
    if len(groups) > 1 or not all(group.isdecimal() for group in groups):
        raise BenchError(f"--formats: {text!r} is no format; write name, name:group or name:group:zp, as in int4:64:zp")
    return FormatChoice(text, name, int(groups[0]) if groups else None, zero_point)


def _variants(
    choices: tuple[FormatChoice, ...], computes: tuple[str, ...], threads: int
) -> tuple[tuple[FormatChoice, str], ...]:
    """Every format with every way to compute that it takes; a format that takes none is an error."""
    variants = []
    for choice in choices:
        problems = []
        for compute in computes:
            try:
                choice.config(compute, threads)
            except ConfigError as error:
                problems.append(error)
            else:
                variants.append((choice, compute))
        if len(problems) == len(computes):
            raise problems[0]
    return tuple(variants)


def _words(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for word in words:
        if word not in known:
            raise BenchError(f"{option}: {word!r} is none of {', '.join(known)}")
    return words


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) == 0:
            raise BenchError(f"{option}: {part!r} is no number of at least 1; write numbers with commas between")
    return tuple(sorted({int(part) for part in parts}))

"""How fast a step's parts are: measured here at a run's sizes, or taken from what another machine's doctor says."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kt_sft.config import KTConfig
from kt_sft.engine.operands import Factors, Term
from kt_sft.experts import CpuExperts
from kt_sft.loading.layout import ExpertLayout
from kt_sft.planning.machine import Machine
from kt_sft.planning.setup import TrainingSetup

#: Bytes of experts that are measured: more than caches hold, less than a whole layer of the largest models.
_EXPERT_BYTES = 1 << 28
_LINK_BYTES = 1 << 28
_MOVED_VALUES = 1 << 24
_REPEATS = 5
#: What of a run's settings concerns the speed of one layer; the rest is about checkpoints and where adapters lie.
_LAYER_SETTINGS = ("compute", "num_threads", "activation_policy", "scratch_mb")
#: Of a machine that only its doctor describes: the part of its peaks that long products reach.
_USUAL_SHARE, _USUAL_BACKWARD = 0.6, 0.8
#: Of accelerators that nobody has measured: BF16 products a second, memory and link in bytes a second, by name.
_KNOWN_DEVICES = (
    ("H100", 4.0e14, 3.0e12, 5.0e10),
    ("H200", 4.0e14, 4.5e12, 5.0e10),
    ("A100", 1.8e14, 1.5e12, 2.2e10),
    ("RTX 4090", 1.2e14, 9.0e11, 2.2e10),
    ("RTX 3090", 5.0e13, 9.0e11, 2.2e10),
)
_USUAL_DEVICE = (5.0e13, 6.0e11, 1.2e10)
_DEVICE_OPERATION, _HOST_OPERATION = 1.2e-5, 1.0e-5


@dataclasses.dataclass(frozen=True)
class StepRates:
    """Speeds.

    Args:
        expert_forward: Operations a second of the engine.
        expert_backward: Likewise, its recomputation and adapters included, for as many operations as forward has.
        dense: Operations a second of the rest's products, on the accelerator or else by torch on the CPU.
        memory: Bytes a second of the rest's other operations.
        operation_seconds: What each of them takes besides, Python and autograd included.
        link: Bytes a second between host and accelerator, each way; None where there is none.
        is_measured: Whether all were measured at these sizes; else some are known or usual figures.
    """

    expert_forward: float
    expert_backward: float
    dense: float
    memory: float
    operation_seconds: float
    link: float | None = None
    is_measured: bool = True


def measure_rates(
    layout: ExpertLayout, storage: dict[str, Any], slots: int, setup: TrainingSetup, *, on_device: bool
) -> StepRates:
    """Measures this machine with layers and batches of a run's sizes; some seconds.

    Args:
        layout: Of a layer of experts.
        storage: How they are stored.
        slots: Experts per token.
        setup: Of the run.
        on_device: Whether the rest is on the accelerator.
    """
    device = str(torch.accelerator.current_accelerator()) if on_device else "cpu"
    forward, backward = _engine_rates(layout, storage, slots, setup)
    return StepRates(
        expert_forward=forward,
        expert_backward=backward,
        dense=_dense_rate(setup.tokens, layout.hidden_size, device),
        memory=_memory_rate(device),
        operation_seconds=_operation_seconds(device),
        link=link_rate(device) if on_device else None,
    )


def usual_rates(machine: Machine, *, on_device: bool) -> StepRates | None:
    """What another machine's doctor, and what is known of its accelerator, lets expect; None where it says nothing."""
    if machine.peak_flops is None:
        return None
    engine = machine.peak_flops * _USUAL_SHARE
    if not on_device:
        memory = machine.read_bytes or 1e10
        return StepRates(engine, engine * _USUAL_BACKWARD, engine, memory, _HOST_OPERATION, None, is_measured=False)
    known = next((figures for name, *figures in _KNOWN_DEVICES if name in (machine.device or "")), [*_USUAL_DEVICE])
    dense, memory, link = known
    return StepRates(engine, engine * _USUAL_BACKWARD, dense, memory, _DEVICE_OPERATION, link, is_measured=False)


def _engine_rates(
    layout: ExpertLayout, storage: dict[str, Any], slots: int, setup: TrainingSetup
) -> tuple[float, float]:
    """Of a layer whose experts get as many rows each as in training; fewer experts where a layer is large."""
    hidden, inner, parts = layout.hidden_size, layout.intermediate_size, 2 if layout.gated else 1
    affordable = _EXPERT_BYTES // (2 * (parts + 1) * hidden * inner) // slots * slots
    experts = max(min(layout.num_experts // slots * slots, affordable), slots)
    tokens = max(1, round(setup.tokens * experts / layout.num_experts))
    own = {name: storage[name] for name in ("expert_format", "group_size", "zero_point")}
    own |= {name: getattr(setup.settings, name) for name in _LAYER_SETTINGS}
    if layout.gated:
        activation = layout.activation
        first = torch.rand(experts, 2 * inner, hidden, dtype=torch.bfloat16).sub_(0.5)
    else:
        activation, first = layout.activation, torch.rand(experts, inner, hidden, dtype=torch.bfloat16).sub_(0.5)
    down = torch.rand(experts, hidden, inner, dtype=torch.bfloat16).sub_(0.5)
    layer = CpuExperts.from_weights(first, down, KTConfig(**own), activation)
    terms = [_term(experts, setup.rank, first.shape[1], hidden, inner)] if setup.settings.lora_experts else []
    x_TH = torch.rand(tokens, hidden).to(torch.bfloat16).requires_grad_()
    # Every expert gets as many rows.
    index = (torch.arange(tokens * slots) % experts).reshape(tokens, slots)
    weights = torch.full((tokens, slots), 1.0 / slots).requires_grad_()
    forwards, backwards = [], []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        y_TH = layer(x_TH, index, weights, adapters=terms)
        middle = time.perf_counter()
        y_TH.backward(torch.ones_like(y_TH))
        forwards.append(middle - start)
        backwards.append(time.perf_counter() - middle)
    flops = 2.0 * tokens * slots * (parts + 1) * hidden * inner
    return flops / statistics.median(forwards[1:]), flops / statistics.median(backwards[1:])


def _term(experts: int, rank: int, rows: int, hidden: int, inner: int) -> Term:
    def parameter(*shape: int) -> Tensor:
        return torch.full(shape, 1e-3).requires_grad_()

    gate_up = Factors(parameter(experts, rank, hidden), parameter(experts, rows, rank), 1.0)
    return Term(gate_up, Factors(parameter(experts, rank, inner), parameter(experts, hidden, rank), 1.0))


def _dense_rate(tokens: int, hidden: int, device: str) -> float:
    """Of BF16 products of T tokens with matrices of a layer's usual size."""
    x = torch.rand(tokens, hidden, device=device).to(torch.bfloat16)
    weight = torch.rand(hidden, hidden, device=device).to(torch.bfloat16)
    return 2.0 * tokens * hidden * hidden / seconds_of(lambda: torch.nn.functional.linear(x, weight), device)


def _memory_rate(device: str) -> float:
    """Of what norms and casts do: read FP32, write BF16."""
    values = torch.rand(_MOVED_VALUES, device=device)
    return values.numel() * 6.0 / seconds_of(lambda: values.to(torch.bfloat16), device)


def _operation_seconds(device: str) -> float:
    """Of a small operation, a module's call and autograd's node counted."""
    module = torch.nn.Sequential(*(torch.nn.SiLU() for _ in range(50)))
    x = torch.zeros(8, 8, device=device, requires_grad=True)
    return seconds_of(lambda: module(x).sum().backward(), device) / 100


def link_rate(device: str) -> float:
    """Of copies between pinned memory and the accelerator, in the slower direction."""
    host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    slower = max(seconds_of(lambda: there.copy_(host), device), seconds_of(lambda: host.copy_(there), device))
    return _LINK_BYTES / slower


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Of a call, the median of a few after a first one; what it starts on an accelerator is waited for."""
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return max(statistics.median(times[1:]), math.ulp(1.0))

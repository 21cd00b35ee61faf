"""Figures of a training step: where its time went, how much of the CPU's was hidden, how experts were loaded."""

from __future__ import annotations

import dataclasses
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kt_sft.engine.meter import EnginePass
from kt_sft.experts import CpuExperts

_GIB, _PAGE = float(1 << 30), resource.getpagesize()

#: Passes of one layer in a step, with the layer's name.
LayerPasses = tuple[str, list[EnginePass]]


@dataclasses.dataclass
class _Totals:
    """Sums over passes."""

    forward: float = 0.0
    backward: float = 0.0
    waiting: float = 0.0
    hidden: float = 0.0
    flops: float = 0.0

    def add(self, passes: Sequence[EnginePass]) -> None:
        for each in passes:
            if each.is_backward:
                self.backward += each.seconds
            else:
                self.forward += each.seconds
            self.waiting += each.waiting
            self.hidden += each.hidden
            self.flops += each.flops

    @property
    def engine(self) -> float:
        return self.forward + self.backward

    def figures(self, steps: int) -> dict[str, float]:
        """Seconds are means of `steps` steps."""
        return {
            "forward_seconds": self.forward / steps,
            "backward_seconds": self.backward / steps,
            "waiting_seconds": self.waiting / steps,
            "hidden_share": self.hidden / self.engine if self.engine else 0.0,
            "gflops": self.flops / self.engine / 1e9 if self.engine else 0.0,
        }


class StepMetrics:
    """Meters the routed experts of a model, from construction until `close`.

    Args:
        model: Whose experts are metered.
        per_layer: Whether `take` gives the figures of every layer, too.
    """

    def __init__(self, model: nn.Module, per_layer: bool) -> None:
        self._per_layer = per_layer
        self._layers = layer_names(model)
        for experts in self._layers.values():
            experts.meter = experts.new_meter()
        self._reset()
        self._step_began = time.monotonic()

    def _reset(self) -> None:
        self._totals = {name: _Totals() for name in self._layers}
        self._loads = {name: torch.zeros(experts.num_experts, dtype=torch.int64, device="cpu")
                       for name, experts in self._layers.items()}  # fmt: skip
        self._steps, self._tokens, self._seconds = 0, 0, 0.0

    def begin(self) -> None:
        """A run begins: what passed before it belongs to no step."""
        for experts in self._layers.values():
            if experts.meter is not None:
                experts.meter.take()
        self._step_began = time.monotonic()

    def end_step(self) -> list[LayerPasses]:
        """A step is over; gives its passes."""
        now = time.monotonic()
        self._seconds, self._steps = self._seconds + now - self._step_began, self._steps + 1
        self._step_began = now
        tokens, passed = 0, []
        for name, experts in self._layers.items():
            assert experts.meter is not None
            passes, load_E = experts.meter.take()
            passed.append((name, passes))
            self._totals[name].add(passes)
            self._loads[name] += load_E
            # With checkpointing a token passes forward twice, but backward once.
            for direction in (True, False):
                count = sum(each.tokens for each in passes if each.is_backward == direction)
                if count:
                    tokens = max(tokens, count)
                    break
        self._tokens += tokens
        return passed

    def take(self) -> dict[str, float]:
        """The figures of the steps since the last time, in this process; empty if there were none.

        Times are seconds of one step on average, `forward_`, `backward_` those of the engine at work, `waiting_` those
        of threads blocked until it was done; `hidden_share` is the part of the engine's time in which none was;
        `imbalance` is the rows of the most loaded expert over the mean, of the worst layer; `dead_experts` are those
        of all layers without a row.
        """
        if not self._steps:
            return {}
        whole = _Totals()
        for totals in self._totals.values():
            for field in dataclasses.fields(_Totals):
                setattr(whole, field.name, getattr(whole, field.name) + getattr(totals, field.name))
        figures = {"step_seconds": self._seconds / self._steps} | whole.figures(self._steps)
        figures["tokens_per_second"] = self._tokens / self._seconds
        figures["imbalance"] = max(_imbalance(load_E) for load_E in self._loads.values())
        figures["dead_experts"] = float(sum(_dead(load_E) for load_E in self._loads.values()))
        figures |= memory_figures()
        if self._per_layer:
            for name, totals in self._totals.items():
                load_E = self._loads[name]
                layer = totals.figures(self._steps)
                layer |= {"imbalance": _imbalance(load_E), "dead_experts": float(_dead(load_E))}
                figures |= {f"{name}/{key}": value for key, value in layer.items()}
        self._reset()
        return figures

    def close(self) -> None:
        """Takes the meters off."""
        for experts in self._layers.values():
            experts.meter = None


def summary(figures: dict[str, float]) -> str:
    """The figures of `StepMetrics.take` in one line."""
    engine = figures["forward_seconds"] + figures["backward_seconds"]
    device = f", device {figures['device_gib']:.2f} GiB" if "device_gib" in figures else ""
    return (
        f"{figures['step_seconds']:.3g} s a step, {figures['tokens_per_second']:.4g} tokens/s; experts {engine:.3g} s "
        f"({figures['forward_seconds']:.3g} forward, {figures['backward_seconds']:.3g} backward) at "
        f"{figures['gflops']:.4g} GFLOP/s, {figures['hidden_share']:.0%} of it hidden, waited "
        f"{figures['waiting_seconds']:.3g} s; busiest expert {figures['imbalance']:.2f} x the mean, "
        f"{figures['dead_experts']:.0f} idle; host {figures['host_gib']:.2f} GiB{device}"
    )


def layer_names(model: nn.Module) -> dict[str, CpuExperts]:
    """The routed experts of a model by the number of their layer: layer_03, or with more of their name where it is
    needed to tell them apart.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, CpuExperts)]
    short = [re.sub(r"^.*\.(\d+)\..*$", lambda match: f"layer_{int(match[1]):02d}", f".{name}") for name, _ in found]
    return {
        number if short.count(number) == 1 else f"{number}.{name.rpartition('.experts')[0].rpartition('.')[2]}": module
        for number, (name, module) in zip(short, found, strict=True)
    }


def memory_figures() -> dict[str, float]:
    """What this process occupies in host memory, and the most that tensors occupied on its accelerator, in GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    figures = {"host_gib": pages * _PAGE / _GIB}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    most = getattr(torch.get_device_module(accelerator), "max_memory_allocated", None) if accelerator else None
    if most is not None:
        figures["device_gib"] = most() / _GIB
    return figures


def _imbalance(load_E: Tensor) -> float:
    total = int(load_E.sum())
    return int(load_E.max()) * len(load_E) / total if total else 1.0


def _dead(load_E: Tensor) -> int:
    return int((load_E == 0).sum())

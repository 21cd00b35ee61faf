"""What a layer's passes through the engine cost, noted while they run, where somebody has asked for it.

Times are seconds of `time.monotonic()`, which is also the engine's own clock.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class EnginePass:
    """One forward or backward of a layer."""

    is_backward: bool
    tokens: int
    flops: float  # of the products with the layer's own matrices
    submitted: float
    started: float  # by the engine
    finished: float
    awaited: float  # a thread began to wait for it
    returned: float  # and went on

    @property
    def seconds(self) -> float:
        """The engine at work."""
        return self.finished - self.started

    @property
    def waiting(self) -> float:
        """A thread blocked until the result was there."""
        return self.returned - self.awaited

    @property
    def hidden(self) -> float:
        """The engine at work while no thread was blocked for the result."""
        blocked = min(self.finished, self.returned) - max(self.started, self.awaited)
        return self.seconds - max(0.0, blocked)


class Meter:
    """Notes the passes of one layer, from any thread.

    Args:
        num_experts: Of the layer.
        flops_per_row: Of its matrices' products, for one routed row in one direction.
        flops_to_recompute: Of those that backward repeats where pre-activations were not retained.
    """

    def __init__(self, num_experts: int, flops_per_row: float, flops_to_recompute: float) -> None:
        self._num_experts = num_experts
        self._flops_per_row, self._flops_to_recompute = flops_per_row, flops_to_recompute
        self._passes: list[EnginePass] = []
        self._loads: list[Tensor] = []

    def wait(
        self,
        ticket: Any,
        submitted: float,
        idx_TK: Tensor,
        *,
        asked: float,
        is_backward: bool = False,
        recomputes: bool = False,
    ) -> None:
        """Waits for a ticket of a pass over tokens routed by `idx_TK`, and notes it.

        `asked` is when this thread began to wait: maybe before the tokens, on their way from a device, were submitted.
        """
        awaited = max(asked, submitted)
        ticket.wait()
        returned = time.monotonic()
        started, finished = ticket.span
        load_E = torch.bincount(idx_TK.flatten(), minlength=self._num_experts + 1)[: self._num_experts]
        flops = float(load_E.sum()) * (self._flops_per_row + (self._flops_to_recompute if recomputes else 0.0))
        if not is_backward:
            self._loads.append(load_E)
        self._passes.append(
            EnginePass(is_backward, idx_TK.shape[0], flops, submitted, started, finished, awaited, returned)
        )

    def take(self) -> tuple[list[EnginePass], Tensor]:
        """What was noted since the last time: the passes, and the rows of each expert in forward, [E] int64."""
        passes, self._passes = self._passes, []
        loads, self._loads = self._loads, []
        return passes, sum(loads, torch.zeros(self._num_experts, dtype=torch.int64, device="cpu"))


def wait(meter: Meter | None, ticket: Any, submitted: float, idx_TK: Tensor, **what: Any) -> None:
    """Waits for a ticket, as `Meter.wait` where there is a meter."""
    if meter is None:
        ticket.wait()
    else:
        meter.wait(ticket, submitted, idx_TK, **what)

"""What a layer's passes through the engine cost, noted while they run, where somebody has asked for it.

Times are seconds of `time.monotonic()`, which is also the engine's own clock.
"""

from __future__ import annotations

import dataclasses
import threading
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
    awaited: float  # a thread, or the accelerator, began to wait for it
    returned: float  # and went on

    @property
    def seconds(self) -> float:
        """The engine at work."""
        return self.finished - self.started

    @property
    def waiting(self) -> float:
        """A thread, or the accelerator, blocked until the result was there."""
        return self.returned - self.awaited

    @property
    def hidden(self) -> float:
        """The engine at work while neither a thread nor the accelerator was blocked for the result."""
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
        self._lock = threading.Lock()

    def note(self, ticket: Any, idx_TK: Tensor, awaited: float, returned: float, *, is_backward: bool) -> None:
        """Notes a pass that is done.

        Args:
            ticket: The native engine's.
            idx_TK: Its routing.
            awaited: When somebody, or the accelerator, began to wait for it; maybe before it was submitted.
            returned: When they went on.
            is_backward: Its direction.
        """
        started, finished = ticket.span
        load_E = torch.bincount(idx_TK.flatten(), minlength=self._num_experts + 1)[: self._num_experts]
        flops = float(load_E.sum()) * (self._flops_per_row + (self._flops_to_recompute if ticket.recomputed else 0.0))
        awaited = max(awaited, ticket.submitted)
        with self._lock:
            if not is_backward:
                self._loads.append(load_E)
            self._passes.append(
                EnginePass(is_backward, idx_TK.shape[0], flops, ticket.submitted, started, finished, awaited, returned)
            )

    def take(self) -> tuple[list[EnginePass], Tensor]:
        """What was noted since the last time: the passes, and the rows of each expert in forward, [E] int64."""
        with self._lock:
            passes, self._passes = self._passes, []
            loads, self._loads = self._loads, []
        return passes, sum(loads, torch.zeros(self._num_experts, dtype=torch.int64, device="cpu"))

"""How long a step takes: the experts' products, the rest's work as a step without values has counted it, the link.

The rest takes as long as its products at their rate, what its other operations move at memory's rate, and a fixed time
for each operation. Host and accelerator work in turn, or side by side where micro-batches are interleaved: then a way
of as many equal stages as there are layers of experts stands for a micro-batch (offload/step_model.py).
"""

from __future__ import annotations

import dataclasses

from kt_sft.offload.step_model import ACTIVATION_BYTES, in_turn, side_by_side
from kt_sft.planning.activations import Cost
from kt_sft.planning.memory import Memory, interleaves
from kt_sft.planning.model import ModelFacts
from kt_sft.planning.rates import StepRates
from kt_sft.planning.setup import TrainingSetup

#: An optimizer's pass over a trained parameter: AdamW reads four FP32 values and writes three, clipping reads one.
_OPTIMIZER_TRAFFIC = 32


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of a step, in seconds.

    Args:
        experts: On the CPU.
        rest: On the accelerator, or on the CPU as well where there is none.
        link: Both ways.
        tokens: Of a step, on one device.
        has_device: Whether the rest is on an accelerator.
        step: Of all: the sum, or less where micro-batches run side by side.
    """

    experts: float
    rest: float
    link: float
    tokens: int
    has_device: bool
    step: float

    @property
    def tokens_per_second(self) -> float:
        """On one device."""
        return self.tokens / self.step

    def shares(self) -> dict[str, float]:
        """Parts of a step that each resource works; `experts` is a part of `cpu`."""
        cpu = self.experts if self.has_device else self.experts + self.rest
        device = self.rest if self.has_device else 0.0
        parts = {"cpu": cpu, "gpu": device, "link": self.link, "experts": self.experts}
        return {name: seconds / self.step for name, seconds in parts.items()}


def speed_of(facts: ModelFacts, setup: TrainingSetup, cost: Cost, memory: Memory, rates: StepRates) -> Speed:
    """A step's time."""
    rows = setup.tokens * facts.slots
    layouts = facts.layouts.values()
    flops = sum(2.0 * rows * (3 if x.gated else 2) * x.hidden_size * x.intermediate_size for x in layouts)
    again = setup.checkpointing and setup.settings.activation_policy == "recompute"
    experts = flops * (2 if again else 1) / rates.expert_forward + flops / rates.expert_backward
    rest = cost.flops / rates.dense + cost.moved_bytes / rates.memory + cost.operations * rates.operation_seconds
    link = 0.0
    if rates.link is not None:
        # Tokens there and sums back, forward, again where layers are checkpointed, and backward.
        passes = 3 if setup.checkpointing else 2
        crossings = sum(2.0 * passes * setup.tokens * x.hidden_size * ACTIVATION_BYTES for x in layouts)
        link = crossings / rates.link
    optimizer = memory.trained * _OPTIMIZER_TRAFFIC / rates.memory
    count = setup.accumulation
    return Speed(
        experts=experts * count,
        rest=rest * count + optimizer,
        link=link * count,
        tokens=setup.tokens * count,
        has_device=rates.link is not None,
        step=_step_seconds(setup, experts, rest, link, len(layouts)) + optimizer,
    )


def _step_seconds(setup: TrainingSetup, experts: float, rest: float, link: float, layers: int) -> float:
    """Without the optimizer; the others are of one micro-batch."""
    parts = (("device", rest), ("to_host", link / 2), ("cpu", experts), ("to_device", link / 2))
    way = [(name, seconds / layers) for name, seconds in parts] * layers
    if link == 0.0 or not interleaves(setup, True):
        return in_turn(way) * setup.accumulation
    pairs, left = divmod(setup.accumulation, 2)
    half = [(name, seconds / 2) for name, seconds in way]
    single = side_by_side([half, half]) if setup.batch > 1 else in_turn(way)
    return pairs * side_by_side([way, way]) + left * single

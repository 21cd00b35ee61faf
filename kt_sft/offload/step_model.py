"""How long a training step takes, from measured speeds: with CPU and accelerator in turn, and side by side.

Pure functions of work and rates, so that a plan or a placement can be judged before anything runs. T tokens of a
micro-batch, S of a sequence, K experts per token, E experts, H hidden size, I expert intermediate size.

What it leaves out: the optimizer, LoRA's own products (few columns), norms and other work whose time is
memory's, and what Python takes between operations. A prediction is therefore a lower bound for small layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

#: Bytes of an activation on its way between host and accelerator: BF16.
ACTIVATION_BYTES = 2
#: Matrices of an expert: gate, up, down.
EXPERT_MATRICES = 3
#: The accelerator's backward of attention needs the scores again, and two products for each of the forward's two.
ATTENTION_BACKWARD = 2.5


class StepModelError(ValueError):
    """Work or rates that no step can have; the message says which."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One micro-batch's work, in one direction.

    Args:
        tokens: T.
        sequence: S.
        hidden: H.
        intermediate: I.
        experts: E.
        top_k: K.
        layers: Layers with routed experts.
        dense_weights: Weights outside the routed experts in one layer that every token is multiplied by.
        attention_size: Query heads x their size, 0 for a layer without attention.
        head_weights: Of the output layer.
    """

    tokens: int
    sequence: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    dense_weights: float
    attention_size: int = 0
    head_weights: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in ("dense_weights", "attention_size", "head_weights") else 1
            if value < least:
                raise StepModelError(f"{name} must be at least {least}, got {value}")
        if self.top_k > self.experts:
            raise StepModelError(f"{self.top_k} experts per token cannot be chosen among {self.experts}")

    @property
    def expert_flops(self) -> float:
        """Of one layer's routed experts, forward; backward of frozen weights needs as many: 2 T K 3 H I."""
        return 2.0 * self.tokens * self.top_k * EXPERT_MATRICES * self.hidden * self.intermediate

    @property
    def dense_flops(self) -> float:
        """Of the rest of a layer, forward, without attention's scores; backward of frozen weights needs as many."""
        return 2.0 * self.tokens * self.dense_weights

    @property
    def attention_flops(self) -> float:
        """Of a layer's causal scores and their weighted sum, forward: 2 products of T S A / 2 multiplications."""
        return 2.0 * self.tokens * self.sequence * self.attention_size

    @property
    def transfer_bytes(self) -> float:
        """What crosses the link in one direction for a layer and pass: hidden states, or their gradients."""
        return float(self.tokens * self.hidden * ACTIVATION_BYTES)

    @property
    def expert_weights(self) -> float:
        """Weights of one layer's routed experts."""
        return float(self.experts * EXPERT_MATRICES * self.hidden * self.intermediate)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured speeds of a machine.

    Args:
        expert_forward: FLOP/s of the engine on such experts with as many rows each.
        expert_backward: The same for backward.
        dense: FLOP/s of the accelerator, or of torch on the CPU, on such matrices.
        link: Bytes per second between host and accelerator, each way; None where both are the same CPU, which then does
            one thing after the other.
    """

    expert_forward: float
    expert_backward: float
    dense: float
    link: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value > 0:
                raise StepModelError(f"{name} must be a positive rate, got {value}")


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often forward runs: twice under gradient checkpointing, once more for whatever keeps nothing."""

    dense_forwards: int = 2
    expert_forwards: int = 2


#: A piece of a micro-batch's way: which resource it takes, and for how many seconds.
Stage = tuple[str, float]


def stages(work: Work, rates: Rates, passes: Passes) -> list[Stage]:
    """The way of one micro-batch through a step: each layer on `device`, over the link, on `cpu`, and back.

    Checkpointing recomputes a layer right before its backward.
    """
    dense = (work.dense_flops + work.attention_flops) / rates.dense
    dense_backward = (work.dense_flops + ATTENTION_BACKWARD * work.attention_flops) / rates.dense
    forward = _layer(work, rates, dense, work.expert_flops / rates.expert_forward)
    again = forward if passes.expert_forwards > 1 else [("device", dense)]
    backward = _layer(work, rates, dense_backward, work.expert_flops / rates.expert_backward)[::-1]
    head = 2.0 * 2.0 * work.tokens * work.head_weights / rates.dense  # forward, and the gradient of hidden states
    recomputed = again if passes.dense_forwards > 1 else []
    return [*forward * work.layers, ("device", head), *(recomputed + backward) * work.layers]


def _layer(work: Work, rates: Rates, device: float, cpu: float) -> list[Stage]:
    if rates.link is None:
        return [("device", device), ("cpu", cpu)]
    transfer = work.transfer_bytes / rates.link
    return [("device", device), ("to_host", transfer), ("cpu", cpu), ("to_device", transfer)]


def in_turn(way: Sequence[Stage]) -> float:
    """Seconds of one micro-batch when every stage waits for the one before: the sum."""
    return math.fsum(seconds for _, seconds in way)


def side_by_side(ways: Sequence[Sequence[Stage]]) -> float:
    """Seconds of several micro-batches that share the resources: each resource serves who is ready first.

    Args:
        ways: One list of stages a micro-batch.
    """
    ready, free, position = (
        [0.0] * len(ways),
        dict.fromkeys(("device", "cpu", "to_host", "to_device"), 0.0),
        [0] * len(ways),
    )
    while any(at < len(way) for at, way in zip(position, ways, strict=True)):
        # Of the next stages, the one that can start first; of equals, the earlier micro-batch.
        start, number = min(
            (max(ready[number], free[way[position[number]][0]]), number)
            for number, way in enumerate(ways)
            if position[number] < len(way)
        )
        resource, seconds = ways[number][position[number]]
        ready[number] = free[resource] = start + seconds
        position[number] += 1
    return max(ready, default=0.0)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of a step of one or more micro-batches."""

    #: CPU and accelerator in turn.
    in_turn: float
    #: Two micro-batches at a time side by side; None where CPU and accelerator are one.
    side_by_side: float | None
    #: What the experts take of it, and what the rest does.
    cpu: float
    device: float
    #: Each way, where there is a link.
    transfer: float

    @property
    def gain(self) -> float | None:
        """How many times faster side by side is."""
        return None if self.side_by_side is None else self.in_turn / self.side_by_side

    @property
    def most_gain(self) -> float | None:
        """What it could be at most, (c + g) / max(c, g): the busier of CPU and accelerator never waits."""
        return None if self.side_by_side is None else (self.cpu + self.device) / max(self.cpu, self.device)


def predict(work: Work, rates: Rates, passes: Passes, micro_batches: int = 1) -> Prediction:
    """A step's time.

    Args:
        work: Of one micro-batch. A single one is split along its batch to be worked on side by side.
        rates: Measured at this size.
        passes: How often forward runs.
        micro_batches: Of a step (gradient accumulation).

    Raises:
        StepModelError: There is no micro-batch.
    """
    if micro_batches < 1:
        raise StepModelError(f"a step has at least one micro-batch, got {micro_batches}")
    way = stages(work, rates, passes)
    sums = {resource: math.fsum(s for name, s in way if name == resource) for resource in ("cpu", "device", "to_host")}
    overlapped = None
    if rates.link is not None:
        half = [(name, seconds / 2) for name, seconds in way]
        pairs, left = divmod(micro_batches, 2)
        overlapped = pairs * side_by_side([way, way]) + left * side_by_side([half, half])
    return Prediction(
        in_turn=in_turn(way) * micro_batches,
        side_by_side=overlapped,
        cpu=sums["cpu"] * micro_batches,
        device=sums["device"] * micro_batches,
        transfer=sums["to_host"] * micro_batches,
    )


def streamed(work: Work, rates: Rates, passes: int = 3, weight_bytes: float = 2.0) -> float:
    """Seconds of one micro-batch when every pass streams all experts to the accelerator, prefetched one layer ahead.

    Args:
        work: Of the micro-batch.
        rates: With a link.
        passes: Forward, recomputation and backward.
        weight_bytes: Of a weight on the link.

    Raises:
        StepModelError: There is no link.
    """
    if rates.link is None:
        raise StepModelError("link must be known: without one nothing is streamed")
    stream = work.expert_weights * weight_bytes / rates.link
    compute = (work.expert_flops + work.dense_flops + work.attention_flops) / rates.dense
    layers = [(stream, compute)] * (work.layers * passes)
    # The first layer's weights come before anything can be computed; the last is computed when nothing comes any more.
    overlap = math.fsum(max(later[0], earlier[1]) for earlier, later in itertools.pairwise(layers))
    return stream + overlap + compute


def crossover_tokens(work: Work, rates: Rates, weight_bytes: float = 2.0) -> float:
    """T*: with more tokens in a micro-batch, streaming the experts beats computing them on the CPU.

    F b (E / K) / (2 BW): the CPU takes 2 T K 3 H I / F, the link E 3 H I b / BW.

    Raises:
        StepModelError: There is no link.
    """
    if rates.link is None:
        raise StepModelError("link must be known: without one nothing is streamed")
    return rates.expert_forward * weight_bytes * work.experts / work.top_k / (2.0 * rates.link)

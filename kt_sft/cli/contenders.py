"""What `kt-sft bench` measures in this process: the engine, and what torch and transformers offer for the same layer.

T tokens, K experts per token, E experts, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from kt_sft.cli.shapes import LayerShape

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens that give every expert the same number of rows."""

    rows_per_expert: int
    hidden_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    grad_TH: Tensor


class Contender(Protocol):
    """One implementation of the layer."""

    name: str
    description: str
    #: Whether it has a backward.
    trains: bool

    def prepare(self, batch: Batch) -> None:
        """Takes the batch that the next runs use; not timed."""

    def run(self, backward: bool) -> dict[str, float]:
        """Computes once; seconds by pass: forward, and backward if asked for and `trains`."""


def random_weights(shape: LayerShape) -> tuple[Tensor, Tensor]:
    """BF16 gate_up [E, 2I, H] and down [E, H, I], scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16)
    down = torch.empty(shape.experts, shape.hidden, shape.intermediate, dtype=torch.bfloat16)
    gate_up.normal_(0, shape.hidden**-0.5, generator=generator)
    down.normal_(0, shape.intermediate**-0.5, generator=generator)
    return gate_up, down


def balanced_batch(shape: LayerShape, rows_per_expert: int) -> Batch:
    """Random tokens and routing in which every expert gets exactly `rows_per_expert` rows; E is a multiple of K."""
    generator = torch.Generator().manual_seed(rows_per_expert)
    orders = [torch.randperm(shape.experts, generator=generator) for _ in range(rows_per_expert)]
    index_TK = torch.cat(orders).view(-1, shape.top_k)
    tokens = index_TK.shape[0]
    hidden_TH = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16).normal_(generator=generator)
    grad_TH = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16).normal_(generator=generator)
    weights_TK = torch.rand(tokens, shape.top_k, generator=generator).softmax(dim=1)
    return Batch(rows_per_expert, hidden_TH, index_TK, weights_TK, grad_TH)


class LayerContender:
    """A differentiable layer, measured as training runs it: forward keeps what backward needs.

    Args:
        name: What the report calls it.
        description: What the report says of it.
        layer: Called with hidden_states [T, H], top_k_index [T, K] and top_k_weights [T, K].
        clock: Gives seconds.
    """

    trains = True

    def __init__(self, name: str, description: str, layer: Layer, clock: Clock = time.perf_counter) -> None:
        self.name = name
        self.description = description
        self._layer = layer
        self._clock = clock

    def prepare(self, batch: Batch) -> None:
        """Takes the batch that the next runs use."""
        self._batch = batch

    def run(self, backward: bool) -> dict[str, float]:
        """One forward, and a backward that gives the gradients of hidden states and routing weights."""
        x_TH = self._batch.hidden_TH.clone().requires_grad_()
        w_TK = self._batch.weights_TK.clone().requires_grad_()
        start = self._clock()
        y_TH = self._layer(x_TH, self._batch.index_TK, w_TK)
        middle = self._clock()
        seconds = {"forward": middle - start}
        if backward:
            y_TH.backward(self._batch.grad_TH)
            seconds["backward"] = self._clock() - middle
        return seconds


class TorchLinears:
    """The fastest BF16 forward that torch alone has on the CPU: a loop of linear layers with weights packed by oneDNN.

    oneDNN packs for a number of rows, so the weights are packed anew for each batch; that is not timed. There is no
    backward: packed weights have none.

    Args:
        gate_up: [E, 2I, H].
        down: [E, H, I].
        clock: Gives seconds.
    """

    name = "torch_linears"
    description = "torch's BF16 linear layers with weights packed by oneDNN, in a loop; forward only"
    trains = False

    def __init__(self, gate_up: Tensor, down: Tensor, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._weights = (gate_up, down)
        self._packed: list[tuple[Tensor, Tensor]] = []

    def prepare(self, batch: Batch) -> None:
        """Packs the weights for the batch's number of rows."""
        self._batch = batch
        self._packed.clear()
        for gate_up, down in zip(*self._weights, strict=True):
            self._packed.append((_pack(gate_up, batch.rows_per_expert), _pack(down, batch.rows_per_expert)))

    @torch.no_grad()
    def run(self, backward: bool) -> dict[str, float]:
        """One forward."""
        start = self._clock()
        self.forward(self._batch.hidden_TH, self._batch.index_TK, self._batch.weights_TK)
        return {"forward": self._clock() - start}

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The layer's output [T, H]."""
        experts = len(self._packed)
        slots = index_TK.flatten().argsort(stable=True)
        counts = index_TK.flatten().bincount(minlength=experts).tolist()
        tokens, weights = slots // index_TK.shape[1], weights_TK.flatten()[slots, None].to(hidden_TH.dtype)
        y_TH = torch.zeros_like(hidden_TH)
        parts = zip(self._packed, tokens.split(counts), weights.split(counts), strict=True)
        for (gate_up, down), token, weight in parts:
            gate, up = _linear(hidden_TH[token], gate_up).chunk(2, dim=1)
            y_TH.index_add_(0, token, _linear(nn.functional.silu(gate) * up, down) * weight)
        return y_TH


def onednn_packs() -> bool:
    """Whether torch can pack BF16 weights for this CPU (it wants AVX-512 or AVX-NE-CONVERT on x86)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def stock_experts(shape: LayerShape, gate_up: Tensor, down: Tensor) -> nn.Module:
    """The experts of transformers' Qwen3-MoE over the given weights, as `from_pretrained` would set them up."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    # What transformers chooses for a model of its own; without it the slower loop over experts would run.
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(down, requires_grad=False)
    return module


def _pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _linear(x: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

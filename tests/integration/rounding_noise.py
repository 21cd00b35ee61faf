"""How far the engine's roundings can move what a model with adapters on its experts computes.

The engine rounds to BF16, relative 2^-8: adapters' matrices on every tier; hidden states, activations, the low-rank
products and, in backward, their gradients where the tier multiplies BF16. Which way each rounding goes is as good as
random. How they show in logits, gradients and losses is measured by Monte Carlo arithmetic (Parker 1997): the model
runs with its experts computed in FP32 by the formulas below, where every value that may be rounded is multiplied by
1 + u r, r uniform in [-1, 1]. The largest deviation over hundreds of values varies little from draw to draw, so twice
the largest of eight draws holds what the engine's roundings, one more draw, do. Without noise the formulas are plain
PEFT's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kt_sft.engine.operands import Term
from kt_sft.experts import CpuExperts

UNIT_ROUNDOFF = 2.0**-8
DRAWS = 8


class _Noisy(torch.autograd.Function):
    """Values, and their gradient, each multiplied by a number of its own within a unit roundoff of 1."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, unit: float, random: torch.Generator) -> Tensor:
        ctx.unit, ctx.random = unit, random
        return _with_noise(values, unit, random)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _with_noise(grad, ctx.unit, ctx.random), None, None


def _with_noise(values: Tensor, unit: float, random: torch.Generator) -> Tensor:
    return values * (1 + unit * (2 * torch.rand(values.shape, generator=random) - 1))


def _activate(pre: Tensor, activation: str, gated: bool) -> Tensor:
    if activation == "swiglu_oai":
        gate, up = pre.chunk(2, -1)
        gate = gate.clamp(max=7)
        return (up.clamp(-7, 7) + 1) * gate * torch.sigmoid(1.702 * gate)
    if activation == "relu2":
        return pre.relu().square()
    assert (activation, gated) == ("silu", True)
    gate, up = pre.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _experts_with_noise(unit: float, seed: int) -> Callable[..., Tensor]:
    """A forward for CpuExperts: all experts on all tokens, which tiny ones can afford."""
    random = torch.Generator().manual_seed(seed)

    def noisy(values: Tensor) -> Tensor:
        return _Noisy.apply(values, unit, random)

    def change(inputs: str, x: Tensor, term: Term, down: bool) -> Tensor | float:
        factors = term.down if down else term.gate_up
        if factors is None:
            return 0.0
        low = noisy(torch.einsum(f"{inputs},erk->etr", x, noisy(factors.a)))
        return torch.einsum("etr,enr->etn", low, noisy((factors.b * factors.scale).flatten(1, -2)))

    def forward(self: CpuExperts, x_TH: Tensor, idx_TK: Tensor, w_TK: Tensor, adapters: Sequence[Term] = ()) -> Tensor:
        terms = [*adapters, *([] if self.merged is None else [Term.of(self.merged)])]
        assert not any(term.dropout for term in terms)
        gate_up, down = self.dequantized()
        x = noisy(x_TH.float())
        pre = torch.einsum("tk,enk->etn", x, gate_up) + sum(change("tk", x, term, False) for term in terms)
        if self.store.gate_up_bias is not None:
            pre = pre + self.store.gate_up_bias[:, None]
        act = noisy(_activate(noisy(pre), self.store.activation, self.store.gated))
        y = torch.einsum("etk,enk->etn", act, down) + sum(change("etk", act, term, True) for term in terms)
        if self.store.down_bias is not None:
            y = y + self.store.down_bias[:, None]
        w_TE = torch.zeros(len(x), self.num_experts).scatter_add(1, idx_TK, w_TK.float())
        return torch.einsum("etn,te->tn", noisy(y), w_TE).to(x_TH.dtype)

    return forward


@contextlib.contextmanager
def noise(unit: float, seed: int = 0) -> Iterator[None]:
    """While it lasts, experts are computed by the formulas here; a `unit` of 0 is FP32 alone."""
    engine = CpuExperts.forward
    CpuExperts.forward = _experts_with_noise(unit, seed)  # type: ignore[method-assign]
    try:
        yield
    finally:
        CpuExperts.forward = engine  # type: ignore[method-assign]


def bounds_of_rounding(
    run: Callable[[], Sequence[Tensor]],
    distance: Callable[[Tensor], Tensor],
    draws: int = DRAWS,
    exact: Sequence[Tensor] | None = None,
) -> list[float]:
    """Of each tensor that `run` gives: how far roundings can move it.

    Args:
        run: Computes with experts in the engine.
        distance: Of a difference of two such tensors.
        draws: How many; fewer where a run takes long.
        exact: What `run` gives without any rounding, where plain PEFT has given it already.
    """
    if exact is None:
        with noise(0.0):
            exact = run()
    furthest = [0.0] * len(exact)
    for seed in range(draws):
        with noise(UNIT_ROUNDOFF, seed):
            found = run()
        moved = [float(distance(one - other)) for one, other in zip(found, exact, strict=True)]
        furthest = [max(pair) for pair in zip(furthest, moved, strict=True)]
    return [2 * each for each in furthest]

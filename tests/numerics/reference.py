"""A MoE layer in float64, with a bound on how far the engine's result may be from it.

The bound is a first-order error analysis, term by term:

* u: half the spacing of the operands at 1: 2^-8 where the tier multiplies BF16, 0 where it multiplies FP32 (whose
  rounding the sums cover).
* Inputs (hidden states, dL/dy) are rounded to operands once: relative u, or 0 if they are BF16 already.
* Weights are code x scale in float64, and exact. Where operands are FP32 they are rounded to FP32 once, or the scale
  multiplies a group's sum: one rounding of 2^-24, and another to add that sum. Where operands are BF16, forward
  multiplies exact codes and scales the sums likewise; backward rounds code x scale to BF16 once, relative 2^-8, but for
  formats whose products are BF16 already (EXACT_IN_BF16: no scales, or powers of two).
* A sum of n products in FP32, in whatever order: n · 2^-24 · Σ|terms|, and 4 roundings more for scales and biases.
* An activation f passes an error δ of its argument on with at most max|f'| · δ, its derivative with max|f''| · δ; its
  own evaluation in FP32 is within 2^-20 of
  (1 + |x|)² (exp within 2^-22 relative, a handful of roundings of values up to x²).
* Activations, dgate and dup are rounded to operands once: relative u.
* Backward reads gate and up rounded to BF16 (relative 2^-8), on every tier.
* With integer products (compute "int8") forward multiplies the stored codes by tokens rounded to 8 bits: each value is
  off by at most half a step, the largest magnitude of its group of columns / 254 (and the step's own rounding, and
  1e-36: smaller groups become zeros), for hidden states in place of their rounding to operands, for activations on top
  of it. Groups are the weights' own, of at most 256 columns. Blocks of few rows are rounded to BF16 instead, which is
  less: 2^-8 of a value is below 1/254 of the largest. Sums of codes are exact, scaling them is what the sums cover.
* The result is rounded to its dtype once.

Products of two errors are left out term by term and covered by SECOND_ORDER: with u = 2^-8 and less than ten factors
per term they stay below 10 %.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

#: Tiers whose products take BF16 operands.
BF16_TIERS = ("avx512_bf16", "amx")
#: Formats whose weights, code x scale, are BF16 values.
EXACT_IN_BF16 = ("bf16", "mxfp4")

#: Columns of a token that share a scale at most, where products are of integers.
MOST_TOKEN_GROUP = 256

SECOND_ORDER = 1.1
FLOAT_ROUNDING = 2.0**-24
BF16_ROUNDING = 2.0**-8
EVALUATION = 2.0**-20
RESULT_ROUNDING = {torch.float32: FLOAT_ROUNDING, torch.bfloat16: BF16_ROUNDING, torch.float16: 2.0**-11}
SMALLEST = {
    torch.float32: 1e-37,
    torch.bfloat16: 1e-37,
    torch.float16: 2.0**-25,
}  # half the spacing of the smallest values


def _swiglu_oai(gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate)


#: f, max|f'|, max|f''|; for relu2 both depend on x and are given as functions of |x|.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (torch.nn.functional.silu, lambda a: torch.full_like(a, 1.1), lambda a: torch.full_like(a, 0.5)),
    "gelu": (torch.nn.functional.gelu, lambda a: torch.full_like(a, 1.13), lambda a: torch.full_like(a, 0.8)),
    "gelu_pytorch_tanh": (
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda a: torch.full_like(a, 1.13),
        lambda a: torch.full_like(a, 0.81),
    ),
    "relu2": (lambda x: x.relu().square(), lambda a: 2 * a, lambda a: torch.full_like(a, 2.0)),
    "swiglu_oai": (_swiglu_oai, lambda a: torch.full_like(a, 1.1), lambda a: torch.full_like(a, 0.86)),
}


@dataclasses.dataclass
class Bounded:
    """float64 values and the largest error each may have before the result is rounded to its dtype."""

    value: Tensor
    error: Tensor

    def excess(self, actual: Tensor) -> float:
        """The largest error of `actual` as a multiple of its bound; 0 for no values."""
        rounding, smallest = RESULT_ROUNDING[actual.dtype], SMALLEST[actual.dtype]
        bound = SECOND_ORDER * self.error + rounding * self.value.abs() + smallest
        difference = (actual.detach().cpu().double() - self.value).abs()
        return float((difference / bound).max()) if actual.numel() else 0.0


@dataclasses.dataclass
class LayerResult:
    """What one layer call gives: y [T, H], dx [T, H], dw [T, K]."""

    y: Bounded
    dx: Bounded
    dw: Bounded


def moe_layer(
    x_TH: Tensor,
    idx_TK: Tensor,
    w_TK: Tensor,
    dy_TH: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    *,
    tier: str,
    expert_format: str = "bf16",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    int8_group: int | None = None,
) -> LayerResult:
    """The layer and its gradients, with bounds for a tier and a format.

    `gate_up` [E, 2I, H] ([E, I, H] ungated) and `down` [E, H, I] are the weights as stored, dequantised.
    `int8_group` is the weights' group_size (0: whole rows) where products are of integers.
    """
    hidden = x_TH.shape[1]
    experts, _, intermediate = down.shape
    gated = gate_up.shape[1] == 2 * intermediate
    u = BF16_ROUNDING if tier in BF16_TIERS else 0.0
    u_in = 0.0 if x_TH.dtype == torch.bfloat16 else u
    u_weight = 0.0 if expert_format in EXACT_IN_BF16 else u
    sum_h, sum_i = (hidden + 4) * FLOAT_ROUNDING, (2 * intermediate + 4) * FLOAT_ROUNDING
    f, slope_bound, curvature_bound = ACTIVATIONS[activation]
    x, dy, w = x_TH.double().cpu(), dy_TH.double().cpu(), w_TK.detach().double().cpu()
    gate_up, down = gate_up.double(), down.double()
    zeros = torch.zeros_like
    y, dx, dw = (Bounded(zeros(t), zeros(t)) for t in (x, x, w))
    for e in range(experts):
        token, slot = (idx_TK == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        xe, dye, we = x[token], dy[token], w[token, slot][:, None]
        weights = gate_up[e].chunk(2) if gated else (gate_up[e],)
        biases = [torch.zeros(intermediate, dtype=torch.float64)] * len(weights)
        if gate_up_bias is not None:
            biases = list(gate_up_bias[e].double().chunk(len(weights)))
        pre = [xe @ m.T + b for m, b in zip(weights, biases, strict=True)]
        x_steps = torch.zeros_like(xe) if int8_group is None else _half_steps(xe, int8_group)
        pre_error = [
            (xe.abs() * (u_in + sum_h) + x_steps) @ m.T.abs() + b.abs() * sum_h
            for m, b in zip(weights, biases, strict=True)
        ]

        act, act_error, _, _, _, _ = _activate(f, slope_bound, curvature_bound, activation, pre, pre_error)
        bias = torch.zeros(hidden, dtype=torch.float64) if down_bias is None else down_bias[e].double()
        y.value.index_add_(0, token, we * (act @ down[e].T + bias))
        if int8_group is not None:
            act_error += _half_steps(act.abs() + act_error, int8_group)
        y_error = (act_error + act.abs() * (u + sum_i)) @ down[e].T.abs() + bias.abs() * sum_i
        y.error.index_add_(0, token, we.abs() * y_error)

        back_error = [error + BF16_ROUNDING * value.abs() for value, error in zip(pre, pre_error, strict=True)]
        _, act_error, gate_slope, gate_slope_error, up_slope, up_slope_error = _activate(
            f, slope_bound, curvature_bound, activation, pre, back_error
        )
        d_act = dye @ down[e]
        d_act_error = (dye.abs() @ down[e].abs()) * (u_in + u_weight + sum_h)
        inner_error = d_act.abs() * (act_error + sum_i * act.abs()) + d_act_error * (act.abs() + act_error)
        dw.value[token, slot] += (d_act * act).sum(1) + dye @ bias
        dw.error[token, slot] += inner_error.sum(1) + (dye.abs() @ bias.abs()) * sum_h
        slopes = [(gate_slope, gate_slope_error), (up_slope, up_slope_error)][-len(weights) :]
        for matrix, (slope, slope_error) in zip(weights, slopes, strict=True):
            d_pre = we * d_act * slope
            d_pre_error = we.abs() * (d_act_error * (slope.abs() + slope_error) + d_act.abs() * slope_error)
            dx.value.index_add_(0, token, d_pre @ matrix)
            dx.error.index_add_(0, token, (d_pre_error + d_pre.abs() * (u + u_weight + sum_i)) @ matrix.abs())
    return LayerResult(y, dx, dw)


def _half_steps(values: Tensor, group_size: int) -> Tensor:
    """How far rounding to 8 bits moves each value at most, group by group of the columns; `values` [S, columns]."""
    group = min(group_size or MOST_TOKEN_GROUP, MOST_TOKEN_GROUP)
    largest = [part.abs().amax(1, keepdim=True).expand_as(part) for part in values.split(group, 1)]
    return torch.cat(largest, 1) * (0.5 / 127 + 2.0**-22) + 1e-36


def _activate(
    f: Callable[[Tensor], Tensor],
    slope_bound: Callable[[Tensor], Tensor],
    curvature_bound: Callable[[Tensor], Tensor],
    activation: str,
    pre: list[Tensor],
    error: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """act and its error; d act / d gate and its error; d act / d up and its error (for ungated experts, d act / d up
    alone counts).
    """
    gated = len(pre) == 2
    argument, up = (pre[0], pre[1]) if gated else (pre[0], torch.ones_like(pre[0]))
    argument_error, up_error = (error[0], error[1]) if gated else (error[0], torch.zeros_like(pre[0]))
    inside_gate, inside_up = torch.ones_like(up), torch.ones_like(up)
    unsure_gate, unsure_up = torch.zeros_like(up), torch.zeros_like(up)
    if activation == "swiglu_oai":
        # Within its error of a clamp the derivative may be taken from either side.
        inside_gate, unsure_gate = (argument <= 7).double(), ((argument - 7).abs() <= argument_error).double()
        inside_up, unsure_up = (up.abs() <= 7).double(), ((up.abs() - 7).abs() <= up_error).double()
        argument, up = argument.clamp(max=7), up.clamp(-7, 7) + 1
    leaf = argument.clone().requires_grad_()
    value = f(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    value = value.detach()
    evaluation = EVALUATION * (1 + argument.abs()).square()
    reach = argument.abs() + argument_error
    value_error = slope_bound(reach) * argument_error + evaluation
    slope_error = curvature_bound(reach) * argument_error + evaluation
    act = value * up
    act_error = value_error * (up.abs() + up_error) + value.abs() * up_error
    gate_slope = inside_gate * slope * up
    gate_slope_error = slope_error * (up.abs() + up_error) + slope.abs() * up_error + unsure_gate * (slope * up).abs()
    if not gated:
        return act, act_error, gate_slope, gate_slope_error, gate_slope, gate_slope_error
    up_slope = inside_up * value
    return act, act_error, gate_slope, gate_slope_error, up_slope, value_error + unsure_up * value.abs()

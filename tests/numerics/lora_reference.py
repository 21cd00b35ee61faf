"""A MoE layer with adapters in float64, with a bound on every output and gradient.

Errors are carried along the computation as the engine goes through it, rounding by rounding (see `reference` for what
rounds where); nothing is linearised but the activation, so products of errors are in the bounds, too. The adapters'
matrices are what the engine reads: BF16 values, with the scale in B.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kt_sft.engine.operands import Dropout, Term
from tests.numerics.cases import Case
from tests.numerics.reference import BF16_ROUNDING, BF16_TIERS, EVALUATION, EXACT_IN_BF16, FLOAT_ROUNDING, Bounded


def exact(values: Tensor) -> Bounded:
    values = values.detach().double().cpu()
    return Bounded(values, torch.zeros_like(values))


def rounded(x: Bounded, rounding: float) -> Bounded:
    return Bounded(x.value, x.error + rounding * (x.value.abs() + x.error))


def times(a: Bounded, b: Bounded) -> Bounded:
    return Bounded(a.value * b.value, a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error)


def product(*pairs: tuple[Bounded, Bounded]) -> Bounded:
    """The sum of matrix products, one sum in FP32 of all their terms."""
    value = sum(a.value @ b.value for a, b in pairs)
    error = sum(a.error @ (b.value.abs() + b.error) + a.value.abs() @ b.error for a, b in pairs)
    magnitude = sum((a.value.abs() + a.error) @ (b.value.abs() + b.error) for a, b in pairs)
    terms = sum(a.value.shape[1] for a, _ in pairs)
    return Bounded(value, error + (terms + 8) * FLOAT_ROUNDING * magnitude)


def turned(x: Bounded) -> Bounded:
    return Bounded(x.value.T, x.error.T)


def half(x: Bounded, part: int) -> Bounded:
    return Bounded(x.value.chunk(2, 1)[part], x.error.chunk(2, 1)[part])


def silu_and_slope(x: Bounded) -> tuple[Bounded, Bounded]:
    """silu(x) and its derivative, of which 1.1 and 0.5 are the largest slopes."""
    sigmoid = torch.sigmoid(x.value)
    evaluation = EVALUATION * (1 + x.value.abs()).square()
    value, slope = x.value * sigmoid, sigmoid * (1 + x.value * (1 - sigmoid))
    return Bounded(value, 1.1 * x.error + evaluation), Bounded(slope, 0.5 * x.error + evaluation)


def operands(term: Term) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the engine reads of one term that changes both parameters: a, b, a, b."""
    values = []
    for factors in (term.gate_up, term.down):
        assert factors is not None
        values += [factors.a.bfloat16(), (factors.b * factors.scale).bfloat16()]
    return tuple(values)


def added(a: Bounded, b: Bounded) -> Bounded:
    value = a.value + b.value
    return Bounded(value, a.error + b.error + FLOAT_ROUNDING * (a.value.abs() + a.error + b.value.abs() + b.error))


_STEP = 0x9E3779B97F4A7C15


def mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(_STEP)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def kept(dropout: Dropout, of: int, slots: Tensor, columns: int) -> Bounded:
    """1 where a value is kept and 0 where it is left out, [slots, columns]: csrc/moe/dropout.h in numpy."""
    with np.errstate(over="ignore"):
        keys = mixed(np.uint64(dropout.seed) + mixed(np.uint64(2) * slots.numpy().astype(np.uint64) + np.uint64(of)))
        column = np.arange(columns, dtype=np.uint64)
        bits = mixed(keys[:, None] + (column >> np.uint64(1)) * np.uint64(_STEP))
        numbers = (bits >> (column % np.uint64(2) * np.uint64(32))) & np.uint64(0xFFFFFFFF)
    return exact(torch.from_numpy(numbers >= np.uint64(dropout.below)))


def expected(
    case: Case,
    gate_up: Tensor,
    down: Tensor,
    term: Term,
    *,
    tier: str,
    expert_format: str,
    dropout: Dropout = Dropout(),  # noqa: B008  # frozen
) -> list[Bounded]:
    """y, dx, dw and the gradients of the term's four tensors; SwiGLU experts without biases."""
    raised = exact(torch.tensor(dropout.scale))
    u = BF16_ROUNDING if tier in BF16_TIERS else 0.0
    u_in = 0.0 if case.x.dtype == torch.bfloat16 else u
    u_weight = 0.0 if expert_format in EXACT_IN_BF16 else u
    matrices = [exact(matrix) for matrix in operands(term)]
    totals = [exact(torch.zeros_like(t)) for t in (case.x, case.x, case.w, *(m.value for m in matrices))]
    for e in range(down.shape[0]):
        token, slot = (case.idx == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        x, dy = rounded(exact(case.x[token]), u_in), rounded(exact(case.dy[token]), u_in)
        w = exact(case.w[token, slot][:, None])
        gate_up_a, gate_up_b, down_a, down_b = (Bounded(m.value[e], m.error[e]) for m in matrices)
        first, second = exact(gate_up[e]), exact(down[e])

        slots = token * case.idx.shape[1] + slot
        kept_x, kept_act = (kept(dropout, of, slots, m.value.shape[1]) for of, m in ((0, gate_up_a), (1, down_a)))

        z = rounded(times(raised, product((times(kept_x, x), turned(gate_up_a)))), u)
        pre = product((x, turned(first)), (z, turned(gate_up_b)))
        act = rounded(times(silu_and_slope(half(pre, 0))[0], half(pre, 1)), u)
        down_z = rounded(times(raised, product((times(kept_act, act), turned(down_a)))), u)
        y = times(w, product((act, turned(second)), (down_z, turned(down_b))))

        pre = rounded(pre, BF16_ROUNDING)
        value, slope = silu_and_slope(half(pre, 0))
        act = rounded(times(value, half(pre, 1)), u)
        v = times(raised, product((dy, down_b)))
        d_act = added(product((dy, rounded(second, u_weight))), times(kept_act, product((rounded(v, u), down_a))))
        d_gate = times(times(w, d_act), times(slope, half(pre, 1)))
        d_up = times(times(w, d_act), value)
        d_pre = rounded(
            Bounded(torch.cat([d_gate.value, d_up.value], 1), torch.cat([d_gate.error, d_up.error], 1)), u + 2.0**-22
        )
        d_z = times(raised, product((d_pre, gate_up_b)))
        inner = times(d_act, times(value, half(pre, 1)))
        inner_error = inner.error.sum(1) + (inner.value.shape[1] + 8) * FLOAT_ROUNDING * inner.value.abs().sum(1)
        act = times(kept_act, act)
        down_z = times(raised, product((act, turned(down_a))))
        weighted = [rounded(times(w, low), u + 2.0**-22) for low in (down_z, v)]
        dx = added(product((d_pre, rounded(first, u_weight))), times(kept_x, product((rounded(d_z, u), gate_up_a))))

        for total, part in zip(totals[:2], (y, dx), strict=True):
            total.value.index_add_(0, token, part.value)
            total.error.index_add_(0, token, part.error)
        totals[2].value[token, slot] += inner.value.sum(1)
        totals[2].error[token, slot] += inner_error
        gradients = (
            product((turned(rounded(d_z, u)), times(kept_x, x))),
            product((turned(d_pre), z)),
            product((turned(weighted[1]), act)),
            product((turned(dy), weighted[0])),
        )
        for total, part in zip(totals[3:], gradients, strict=True):
            total.value[e], total.error[e] = part.value, part.error
    scales = [1, 1, 1, 1, term.gate_up.scale, 1, term.down.scale]
    return [
        Bounded(t.value * scale, t.error * scale + FLOAT_ROUNDING * t.value.abs() * scale)
        for t, scale in zip(totals, scales, strict=True)
    ]

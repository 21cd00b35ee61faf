"""Adapters through CpuExperts: outputs and gradients of all their tensors against float64, within derived bounds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kt_sft
from kt_sft.engine.low_rank import LowRank
from kt_sft.engine.operands import Dropout, Factors, Term
from tests.numerics.cases import Case, make_case, make_case_with_rows
from tests.numerics.lora_reference import expected

NAMES = ("y", "dx", "dw", "gate_up_a", "gate_up_b", "down_a", "down_b")


def make_term(case: Case, rank: int, scale: float = 1.5, seed: int = 0, parts: int = 2) -> Term:
    random = torch.Generator().manual_seed(seed)
    experts, hidden, intermediate = case.down.shape

    def leaf(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) / shape[-1] ** 0.5).requires_grad_()

    return Term(
        Factors(leaf(experts, rank, hidden), leaf(experts, parts * intermediate, rank), scale),
        Factors(leaf(experts, rank, intermediate), leaf(experts, hidden, rank), scale),
    )


def layer_of(case: Case, **config) -> kt_sft.CpuExperts:
    return kt_sft.CpuExperts.from_weights(case.gate_up, case.down, kt_sft.KTConfig(**config), case.activation)


def run(case: Case, layer: kt_sft.CpuExperts, *terms: Term) -> list[torch.Tensor]:
    """y, dx, dw and the gradients of the terms' tensors."""
    x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
    tensors = [tensor for term in terms for tensor in term.tensors]
    y = layer(x, case.idx, w, adapters=terms)
    return [y.detach(), *torch.autograd.grad(y, [x, w, *tensors], case.dy)]


def excesses(
    case: Case,
    tier: str,
    layer: kt_sft.CpuExperts,
    term: Term,
    results: list[torch.Tensor],
    dropout: Dropout | None = None,
) -> dict[str, float]:
    bounds = expected(
        case,
        *layer.dequantized(),
        term,
        tier=tier,
        expert_format=layer.config.stored_format,
        dropout=dropout or Dropout(),
    )
    # The bounds carry all products of errors, which excess' allowance for them then only adds to.
    return {name: bound.excess(result) for name, bound, result in zip(NAMES, bounds, results, strict=True)}


@pytest.mark.parametrize(
    ("rank", "expert_format"),
    [(1, "bf16"), (3, "int4"), (8, "bf16"), (17, "int8"), (64, "bf16"), (128, "int4")],
)
def test_all_gradients(tier, rank, expert_format):
    case = make_case_with_rows((1, 3, 0, 12, 65), 72, 40, seed=rank)
    layer, term = layer_of(case, expert_format=expert_format), make_term(case, rank)
    found = excesses(case, tier, layer, term, run(case, layer, term))
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(tier, dtype):
    case = make_case(40, 2, 4, 50, 33, dtype=dtype)
    layer, term = layer_of(case), make_term(case, 5)
    found = excesses(case, tier, layer, term, run(case, layer, term))
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize(("rank", "expert_format"), [(3, "bf16"), (8, "int4"), (64, "bf16")])
def test_dropout(tier, monkeypatch, rank, expert_format):
    case = make_case_with_rows((1, 3, 0, 12, 65), 73, 41, seed=rank)
    layer, term = layer_of(case, expert_format=expert_format), make_term(case, rank)
    dropout = Dropout(seed=2**62 + rank, below=2**30)
    monkeypatch.setattr(Dropout, "drawn", classmethod(lambda cls, share: dropout))
    results = run(case, layer, dataclasses.replace(term, dropout=0.25))
    found = excesses(case, tier, layer, term, results, dropout)
    assert max(found.values()) <= 1, found
    assert min(excesses(case, tier, layer, term, results, Dropout(1, 2**30)).values()) > 1  # of other values
    recomputed = run(
        case, layer_of(case, expert_format=expert_format, activation_policy="recompute", num_threads=1), term
    )
    assert all(torch.equal(a, b) for a, b in zip(recomputed, results, strict=True))


def test_dropout_does_not_depend_on_how_calls_are_cut(tier, monkeypatch):
    """Sums of gradients over pieces have another order, so they are held to the bound that holds for every order."""
    case = make_case(2000, 2, 3, 40, 24)
    term = make_term(case, 4)
    dropout = Dropout(seed=2**61 + 1, below=2**31)
    monkeypatch.setattr(Dropout, "drawn", classmethod(lambda cls, share: dropout))
    layers = [layer_of(case, num_threads=threads, scratch_mb=scratch) for threads, scratch in ((2, 64), (3, 1))]
    whole, cut = (run(case, layer, dataclasses.replace(term, dropout=0.5)) for layer in layers)
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], cut[:3], strict=True))
    for results in (whole, cut):
        found = excesses(case, tier, layers[0], term, results, dropout)
        assert max(found.values()) <= 1, found


@pytest.mark.parametrize("name", NAMES[3:])
def test_the_bound_sees_a_rank_left_out(tier, name):
    """One of eight ranks missing in a matrix must exceed the bound, or the bound would prove nothing."""
    case = make_case(64, 2, 4, 48, 36, dtype=torch.float32)
    layer, term = layer_of(case), make_term(case, 8)
    results = run(case, layer, term)
    part, matrix = name.rsplit("_", 1)
    factors = getattr(term, part)
    wrong = getattr(factors, matrix).detach().clone()
    (wrong if matrix == "a" else wrong.transpose(1, 2))[:, 3] = 0
    changed = dataclasses.replace(term, **{part: dataclasses.replace(factors, **{matrix: wrong})})
    assert max(excesses(case, tier, layer, changed, results).values()) > 1


def test_bits_are_the_same_for_any_number_of_threads_and_either_policy(tier):
    case = make_case(200, 3, 6, 130, 70)
    term = make_term(case, 6)
    reference = run(case, layer_of(case, num_threads=1), term)
    for threads in (1, 2, 5):
        for policy in ("retain", "recompute"):
            result = run(case, layer_of(case, num_threads=threads, activation_policy=policy), term)
            assert all(torch.equal(a, b) for a, b in zip(result, reference, strict=True)), (threads, policy)


def test_terms_add_up_and_may_change_one_parameter_alone(tier):
    """Two adapters at once are one of their joint rank; an absent one is one of zeros."""
    case = make_case(50, 2, 4, 40, 24)
    layer = layer_of(case)
    both, other = make_term(case, 3), make_term(case, 2, scale=0.5, seed=1)
    alone = Term(other.gate_up, None)
    results = run(case, layer, both, alone)
    zeros = Factors(torch.zeros_like(other.down.a), torch.zeros_like(other.down.b), 1.0)
    joint = Term(
        *(
            Factors(
                torch.cat([f.a, g.a], 1), torch.cat([f.b * f.scale, g.b * g.scale], 2).detach().requires_grad_(), 1.0
            )
            for f, g in ((both.gate_up, other.gate_up), (both.down, zeros))
        )
    )
    joint = Term(*(dataclasses.replace(f, a=f.a.detach().requires_grad_()) for f in (joint.gate_up, joint.down)))
    one = run(case, layer, joint)
    assert all(torch.equal(a, b) for a, b in zip(results[:3], one[:3], strict=True))
    assert torch.equal(results[3], one[3][:, :3])
    assert torch.equal(results[4], one[4][:, :, :3] * 1.5)
    assert torch.equal(results[5], one[5][:, :3])
    assert torch.equal(results[7], one[3][:, 3:])
    assert torch.equal(results[8], one[4][:, :, 3:] * 0.5)


def test_merged_changes_are_computed_without_gradients_of_their_own(tier):
    """What merging leaves behind gives the bits of the adapter itself, in both passes."""
    case = make_case(50, 2, 4, 40, 24)
    layer, term = layer_of(case), make_term(case, 4)
    results = run(case, layer, term)
    layer.merged = LowRank(
        term.gate_up.a.detach(),
        term.gate_up.b.detach() * term.gate_up.scale,
        term.down.a.detach(),
        term.down.b.detach() * term.down.scale,
    )
    merged = run(case, layer)
    assert all(torch.equal(a, b) for a, b in zip(merged, results[:3], strict=True))

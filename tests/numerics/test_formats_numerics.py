"""Every format on every tier in every regime of rows per expert, against float64 on the dequantised weights."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.cases import STORED, assert_within_bounds, make_case, make_case_with_rows
from tests.numerics.reference import BF16_TIERS, EXACT_IN_BF16, moe_layer

#: Rows of each expert: streamed from memory, short panels, panels that are not full, many panels; and all in one call.
REGIMES = {
    "1-3": (1, 2, 3),
    "4-12": (4, 7, 12),
    "13-32": (13, 24, 32),
    "many": (33, 257),
    "mixed": (1, 3, 4, 0, 12, 13, 32, 65),
}

stored = pytest.mark.parametrize("config", STORED.values(), ids=STORED)
regimes = pytest.mark.parametrize("rows", REGIMES.values(), ids=REGIMES)


@regimes
@stored
def test_every_regime(tier, config, rows):
    assert_within_bounds(make_case_with_rows(rows, 150, 100, biased=True), tier, **config)


@pytest.mark.parametrize(("hidden", "intermediate"), [(1300, 40), (40, 1100)])
@stored
def test_depths_that_are_worked_on_in_pieces(tier, config, hidden, intermediate):
    """Products are cut along the contraction; scales of the whole row do not fit one piece."""
    assert_within_bounds(make_case_with_rows((2, 9, 40), hidden, intermediate), tier, **config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@stored
def test_other_dtypes(tier, config, dtype):
    assert_within_bounds(make_case_with_rows((3, 12, 40), 70, 90, dtype=dtype), tier, **config)


@stored
def test_sizes_below_a_vector(tier, config):
    for hidden, intermediate in ((1, 1), (5, 3), (33, 7), (31, 65)):
        assert_within_bounds(make_case_with_rows((1, 5, 20), hidden, intermediate), tier, **config)


@stored
def test_bits_are_the_same_for_any_number_of_threads_and_either_policy(tier, config):
    case = make_case_with_rows(REGIMES["mixed"], 130, 270, biased=True)
    reference = case.run(num_threads=1, **config)[:3]
    for threads in (1, 2, 5):
        for policy in ("retain", "recompute"):
            result = case.run(num_threads=threads, activation_policy=policy, **config)[:3]
            assert all(torch.equal(a, b) for a, b in zip(result, reference, strict=True)), (threads, policy)


@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
@stored
def test_the_bound_sees_wrong_scales(tier, config, matrix):
    """Scales that are a third too large in one group of each row must exceed the bound, or it would prove nothing."""
    case = make_case(64, 2, 4, 64, 96, dtype=torch.float32)
    y, dx, dw, experts = case.run(**config)
    gate_up, down = experts.dequantized()
    wrong = down[0] if matrix == "down" else gate_up[0].chunk(2)[("gate", "up").index(matrix)]
    wrong[:, 32:64] *= 4 / 3
    expected = moe_layer(
        case.x,
        case.idx,
        case.w,
        case.dy,
        gate_up,
        down,
        case.activation,
        tier=tier,
        expert_format=config["expert_format"],
    )
    assert max(expected.y.excess(y), expected.dx.excess(dx), expected.dw.excess(dw)) > 1


def test_backward_rounds_weights_once_more_where_operands_are_bf16():
    """The bound differs between formats in backward on BF16 tiers, and nowhere else."""
    case = make_case(40, 2, 4, 64, 64)
    for config in STORED.values():
        experts = case.run(**config)[3]
        for tier in ("portable", *BF16_TIERS):
            exact = case.expected(experts, tier, expert_format="bf16")
            given = case.expected(experts, tier)
            rounds = tier in BF16_TIERS and config["expert_format"] not in EXACT_IN_BF16
            assert torch.equal(given.y.error, exact.y.error)
            assert bool((given.dx.error > exact.dx.error).any()) == rounds
            assert bool((given.dw.error > exact.dw.error).any()) == rounds

"""Forward and both gradients of CpuExperts against float64, on every tier of this machine, within the bound that
`reference` derives.
"""

from __future__ import annotations

import pytest
import torch

from tests.numerics.cases import assert_within_bounds, make_case
from tests.numerics.reference import moe_layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_shape(seed: int) -> tuple[int, int, int, int, int]:
    random = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=random))

    return draw(1, 90), draw(1, 5), draw(1, 9), draw(1, 150), draw(1, 300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(tier, dtype, seed):
    assert_within_bounds(make_case(*random_shape(seed), dtype=dtype, biased=seed % 2 == 1, seed=seed), tier)


# gpt-oss' activation is defined with a gate only; asking for it without is refused (tests/unit/test_experts.py).
ACTIVATIONS = [
    (activation, gated)
    for activation in ("silu", "gelu", "gelu_pytorch_tanh", "relu2", "swiglu_oai")
    for gated in (True, False)
    if gated or activation != "swiglu_oai"
]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("activation", "gated"), ACTIVATIONS)
def test_every_activation(tier, activation, gated, biased):
    case = make_case(33, 2, 3, 50, 41, dtype=torch.float32, activation=activation, gated=gated, biased=biased)
    case.x *= 3  # far enough out for clamps and tails to matter
    assert_within_bounds(case, tier)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 31, 32, 33, 257, 3000])
def test_token_counts(tier, tokens):
    assert_within_bounds(make_case(tokens, 2, 4, 48, 36), tier)


@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_activation_policies(tier, policy):
    assert_within_bounds(make_case(70, 3, 5, 64, 96), tier, activation_policy=policy)


def test_bits_are_the_same_for_any_number_of_threads_and_either_policy(tier):
    case = make_case(300, 3, 6, 130, 270, biased=True)
    reference = case.run(num_threads=1)[:3]
    for threads in (1, 2, 5):
        for policy in ("retain", "recompute"):
            result = case.run(num_threads=threads, activation_policy=policy)[:3]
            assert all(torch.equal(a, b) for a, b in zip(result, reference, strict=True)), (threads, policy)


@pytest.mark.parametrize("matrix", ["gate", "up", "down"])
def test_the_bound_sees_one_wrong_row(tier, matrix):
    """One of some hundred weight rows left out must exceed the bound, or the bound would prove nothing."""
    case = make_case(64, 2, 4, 48, 36, dtype=torch.float32)
    y, dx, dw, experts = case.run()
    gate_up, down = experts.dequantized()
    wrong = down[0] if matrix == "down" else gate_up[0].chunk(2)[("gate", "up").index(matrix)]
    wrong[5] = 0
    expected = moe_layer(case.x, case.idx, case.w, case.dy, gate_up, down, case.activation, tier=tier)
    assert max(expected.y.excess(y), expected.dx.excess(dx), expected.dw.excess(dw)) > 1


def test_scales_with_the_operands_precision():
    """FP32 tiers are as exact as FP32 sums; the test's bound for them is far tighter than for BF16 tiers."""
    case = make_case(40, 2, 4, 64, 64, dtype=torch.float32)
    _, _, _, experts = case.run()
    fine, coarse = case.expected(experts, "portable"), case.expected(experts, "avx512_bf16")
    assert float(fine.y.error.max()) < 0.01 * float(coarse.y.error.max())

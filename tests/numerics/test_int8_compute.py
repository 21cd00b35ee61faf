"""Integer products (compute "int8"): forward and gradients within the derived bound, and what the setting promises."""

from __future__ import annotations

import pytest
import torch

import kt_sft
from tests.numerics.cases import STORED, assert_within_bounds, make_case, make_case_with_rows

INTEGER = {name: options for name, options in STORED.items() if options["expert_format"] in ("int8", "int4")}


@pytest.mark.parametrize("stored", INTEGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_stored_form_is_within_the_bound(tier, stored, dtype):
    # Blocks of few rows, of one panel and of several, and an expert without any.
    case = make_case_with_rows([70, 1, 0, 17, 33], 100, 70, dtype=dtype, biased=True)
    assert_within_bounds(case, tier, compute="int8", **INTEGER[stored])


@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (33, 290), (600, 18), (64, 32)])
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_ragged_sizes_are_within_the_bound(tier, hidden, intermediate, policy):
    case = make_case(90, 2, 3, hidden, intermediate)
    for stored in ("int8", "int4", "int4-128-zero"):
        assert_within_bounds(case, tier, compute="int8", activation_policy=policy, **INTEGER[stored])


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu2", "swiglu_oai"])
def test_every_activation_is_within_the_bound(tier, activation):
    gated = activation != "relu2"
    case = make_case(60, 2, 2, 70, 45, activation=activation, gated=gated, biased=True)
    assert_within_bounds(case, tier, compute="int8", expert_format="int8")


def test_outliers_cost_their_own_group_alone(tier):
    case = make_case_with_rows([64], 512, 32)
    case.x[:, 3] *= 1000
    case.gate_up[:, :, :256] = 0  # only the outliers' group meets these weights
    y, _, _, experts = case.run(compute="int8", expert_format="int8", group_size=256)
    case.x[:, :256] = 0  # which leaves the result, and a bound without outliers
    assert case.expected(experts, tier).y.excess(y) <= 1


def test_few_tokens_are_computed_as_with_bf16(tier):
    case = make_case(1, 2, 4, 96, 64)
    for stored in ("int8", "int4"):
        y = [case.run(compute=compute, **INTEGER[stored])[0] for compute in ("bf16", "int8")]
        assert torch.equal(*y)


@pytest.mark.parametrize("expert_format", ["bf16", "nf4", "fp8", "mxfp4"])
def test_formats_without_integer_codes_are_refused(expert_format):
    with pytest.raises(kt_sft.config.ConfigError, match="compute 'int8' needs experts in int8 or int4"):
        kt_sft.KTConfig(expert_format=expert_format, compute="int8")

"""Layers with inputs for the numerics tests, and their comparison with `reference`."""

from __future__ import annotations

import dataclasses

import torch

import kt_sft
from tests.numerics.reference import LayerResult, moe_layer

#: Every format with every kind of option it has: KTConfig's keyword arguments, by name.
STORED = {
    "bf16": {"expert_format": "bf16"},
    "int8": {"expert_format": "int8"},
    "int8-32": {"expert_format": "int8", "group_size": 32},
    "int8-512": {"expert_format": "int8", "group_size": 512},
    "int4": {"expert_format": "int4"},
    "int4-64": {"expert_format": "int4", "group_size": 64},
    "int4-128-zero": {"expert_format": "int4", "group_size": 128, "zero_point": True},
    "int4-row": {"expert_format": "int4", "group_size": 0},
    "int4-row-zero": {"expert_format": "int4", "group_size": 0, "zero_point": True},
    "nf4": {"expert_format": "nf4"},
    "nf4-2048": {"expert_format": "nf4", "group_size": 2048},
    "fp8": {"expert_format": "fp8"},
    "fp8-row": {"expert_format": "fp8", "group_size": 0},
    "mxfp4": {"expert_format": "mxfp4"},
}


@dataclasses.dataclass
class Case:
    """One layer with its inputs."""

    x: torch.Tensor
    idx: torch.Tensor
    w: torch.Tensor
    dy: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: str

    def run(self, **config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, kt_sft.CpuExperts]:
        experts = kt_sft.CpuExperts.from_weights(
            self.gate_up,
            self.down,
            kt_sft.KTConfig(**config),
            self.activation,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
        )
        x, w = self.x.clone().requires_grad_(), self.w.clone().requires_grad_()
        y = experts(x, self.idx, w)
        y.backward(self.dy)
        return y.detach(), x.grad, w.grad, experts

    def expected(self, experts: kt_sft.CpuExperts, tier: str, expert_format: str | None = None) -> LayerResult:
        """What `experts` (or the same weights in another format) may give on a tier."""
        gate_up, down = experts.dequantized()
        int8_group = None
        if experts.config.compute == "int8":
            default = {"int8": 0, "int4": 32}[experts.config.stored_format]
            int8_group = default if experts.config.group_size is None else experts.config.group_size
        return moe_layer(
            self.x,
            self.idx,
            self.w,
            self.dy,
            gate_up,
            down,
            self.activation,
            tier=tier,
            expert_format=expert_format or experts.config.stored_format,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            int8_group=int8_group,
        )


def make_case(
    tokens,
    slots,
    experts,
    hidden,
    intermediate,
    *,
    dtype=torch.bfloat16,
    activation="silu",
    gated=True,
    biased=False,
    seed=0,
) -> Case:
    """A layer of normally distributed weights, called with random tokens, weights and gradients.

    Routing is skewed: the first experts get most tokens, the sentinel occurs, the last experts may get nothing.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    rows = 2 * intermediate if gated else intermediate
    share = torch.rand(tokens, slots, generator=random) ** 3
    return Case(
        x=normal(tokens, hidden).to(dtype),
        idx=(share * (experts + 1)).long(),
        w=normal(tokens, slots),
        dy=normal(tokens, hidden).to(dtype),
        gate_up=normal(experts, rows, hidden) * (2 / hidden**0.5),
        down=normal(experts, hidden, intermediate) / intermediate**0.5,
        gate_up_bias=normal(experts, rows) if biased else None,
        down_bias=normal(experts, hidden) if biased else None,
        activation=activation,
    )


def assert_within_bounds(case: Case, tier: str, **config) -> None:
    y, dx, dw, experts = case.run(**config)
    expected = case.expected(experts, tier)
    excesses = {"y": expected.y.excess(y), "dx": expected.dx.excess(dx), "dw": expected.dw.excess(dw)}
    assert max(excesses.values()) <= 1, excesses


def make_case_with_rows(rows_per_expert, hidden, intermediate, *, slots=2, seed=0, **options) -> Case:
    """The same with a given number of rows for each expert, in random order; a token may have an expert twice."""
    experts = len(rows_per_expert)
    tokens = -(-sum(rows_per_expert) // slots)
    case = make_case(tokens, slots, experts, hidden, intermediate, seed=seed, **options)
    idx = torch.full((tokens * slots,), experts)  # the sentinel fills the last token
    idx[: sum(rows_per_expert)] = torch.arange(experts).repeat_interleave(torch.tensor(rows_per_expert))
    case.idx = idx[torch.randperm(len(idx), generator=torch.Generator().manual_seed(seed))].reshape(tokens, slots)
    return case

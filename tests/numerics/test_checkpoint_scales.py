"""Four-bit experts with a checkpoint's own scales and zero points compute what the same values stored otherwise do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kt_sft
from kt_sft.config import KTConfig
from kt_sft.engine.store import LayerStore

E, H, I, T, K = 4, 160, 96, 24, 2
GROUP = 32


def make_store(scale_dtype: torch.dtype | None, zero_point: bool) -> LayerStore:
    return LayerStore(
        num_experts=E,
        hidden_size=H,
        intermediate_size=I,
        activation="silu",
        expert_format="int4",
        group_size=GROUP,
        zero_point=zero_point,
        scale_dtype=scale_dtype,
    )


def fill(store: LayerStore, *, flipped: bool = False) -> None:
    """Codes 1 to 15 under scales that every dtype holds exactly; with zero points, one in four of them is 16.

    `flipped` stores 16 - code - (16 - zero) under the negative scale: the same values with other bytes.
    """
    generator = torch.Generator().manual_seed(4)
    for expert in range(E):
        for matrix in store.matrices:
            rows, columns = store.shape(matrix)
            groups = -(-columns // GROUP)
            codes = torch.randint(1, 16, (rows, columns), generator=generator).byte()
            zeros = torch.randint(8, 12, (rows, groups), generator=generator).byte()
            zeros[zeros == 11] = 16
            scales = (1 + torch.randint(0, 8, (rows, groups), generator=generator) / 8) / 64
            if flipped:
                codes, zeros, scales = 16 - codes, 16 - zeros, -scales
            packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
            scales = scales.to(store.scale_dtype or torch.bfloat16)
            store.write_codes(matrix, expert, packed, scales, zeros if store.zero_point else None)


def run(store: LayerStore, compute: str) -> list[Tensor]:
    """Output and gradients of one forward and backward."""
    torch.manual_seed(5)
    x = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(T, K, requires_grad=True)
    index = torch.randint(0, E, (T, K))
    experts = kt_sft.CpuExperts(store, KTConfig(expert_format="int4", compute=compute))
    output = experts(x, index, weights)
    output.backward(torch.randn_like(output))
    return [output.detach(), x.grad, weights.grad]


@pytest.mark.parametrize("compute", ["bf16", "int8"])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
def test_the_dtype_of_scales_makes_no_difference(scale_dtype: torch.dtype, zero_point: bool, compute: str) -> None:
    usual, own = make_store(None, zero_point), make_store(scale_dtype, zero_point)
    for store in (usual, own):
        fill(store)
    for expected, actual in zip(run(usual, compute), run(own, compute), strict=True):
        assert expected.any()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("compute", ["bf16", "int8"])
def test_a_zero_above_the_codes(compute: str) -> None:
    usual, flipped = make_store(torch.float16, True), make_store(torch.float16, True)
    fill(usual)
    fill(flipped, flipped=True)
    for one, other in zip(usual.dequantized(), flipped.dequantized(), strict=True):
        assert torch.equal(one, other)
    for expected, actual in zip(run(usual, compute), run(flipped, compute), strict=True):
        assert torch.equal(actual, expected)

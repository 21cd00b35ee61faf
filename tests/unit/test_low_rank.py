"""Low-rank changes of experts: what they mean, how they add up, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kt_sft.engine.low_rank import LowRank, concatenate

EXPERTS, HIDDEN, INTERMEDIATE = 3, 7, 5


def change(rank: int, parts: int = 2, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return LowRank(
        random(EXPERTS, rank, HIDDEN),
        random(EXPERTS, parts * INTERMEDIATE, rank),
        random(EXPERTS, rank, INTERMEDIATE),
        random(EXPERTS, HIDDEN, rank),
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_a_change_is_b_times_a(parts: int) -> None:
    some = change(2, parts)
    gate_up, down = some.delta(1)
    assert (some.num_experts, some.rank) == (EXPERTS, 2)
    torch.testing.assert_close(gate_up, torch.einsum("or,rh->oh", some.gate_up_b[1], some.gate_up_a[1]))
    torch.testing.assert_close(down, torch.einsum("hr,ri->hi", some.down_b[1], some.down_a[1]))
    assert gate_up.shape == (parts * INTERMEDIATE, HIDDEN)
    assert down.shape == (HIDDEN, INTERMEDIATE)


def test_concatenated_changes_add_up() -> None:
    parts = [change(1, seed=1), change(4, seed=2)]
    total = concatenate(parts)
    assert total.rank == 5
    for expert in range(EXPERTS):
        for both, first, second in zip(total.delta(expert), *(part.delta(expert) for part in parts), strict=True):
            torch.testing.assert_close(both, first + second)


def test_changes_of_other_layers_cannot_be_concatenated() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        concatenate([change(1), change(1, parts=1)])
    with pytest.raises(ValueError, match="no low-rank change"):
        concatenate([])


def test_a_change_of_the_wrong_shape_or_type_is_refused() -> None:
    some = change(2)
    with pytest.raises(ValueError, match=r"down_b .* must be \(3, 7, 2\)"):
        dataclasses.replace(some, down_b=some.down_b[..., :1])
    with pytest.raises(TypeError, match=r"gate_up_a .* torch\.bfloat16"):
        dataclasses.replace(some, gate_up_a=some.gate_up_a.bfloat16())

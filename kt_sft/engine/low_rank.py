"""Low-rank changes of one layer's experts: each expert's weights W become W + B A.

Shape letters: E experts, H hidden size, I expert intermediate size, R rank. Ungated experts have I rows where gated
ones have 2I, gate rows first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

_NAMES = ("gate_up_a", "gate_up_b", "down_a", "down_b")


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """One layer's low-rank change, FP32 on the CPU. Every scale is already folded into the B matrices.

    Args:
        gate_up_a: [E, R, H].
        gate_up_b: [E, 2I, R].
        down_a: [E, R, I].
        down_b: [E, H, R].

    Raises:
        ValueError: The shapes do not fit each other, or a tensor is not on the CPU.
        TypeError: A tensor is not FP32.
    """

    gate_up_a: Tensor
    gate_up_b: Tensor
    down_a: Tensor
    down_b: Tensor

    def __post_init__(self) -> None:
        for name in _NAMES:
            tensor = getattr(self, name)
            if tensor.dtype != torch.float32:
                raise TypeError(f"kt_sft: {name} of a low-rank change has dtype {tensor.dtype}; use torch.float32")
            if tensor.device.type != "cpu" or tensor.dim() != 3:
                raise ValueError(
                    f"kt_sft: {name} of a low-rank change must be a 3-dimensional tensor on the CPU, got "
                    f"{tuple(tensor.shape)} on {tensor.device}"
                )
        experts, rank, hidden = self.gate_up_a.shape
        intermediate = self.down_a.shape[2]
        expected = {
            "gate_up_b": [(experts, parts * intermediate, rank) for parts in (2, 1)],
            "down_a": [(experts, rank, intermediate)],
            "down_b": [(experts, hidden, rank)],
        }
        for name, shapes in expected.items():
            if tuple(getattr(self, name).shape) not in shapes:
                raise ValueError(
                    f"kt_sft: {name} of a low-rank change must be {shapes[0]} beside gate_up_a "
                    f"{tuple(self.gate_up_a.shape)} and down_a {tuple(self.down_a.shape)}, got "
                    f"{tuple(getattr(self, name).shape)}"
                )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate_up_a.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.gate_up_a.shape[1]

    def delta(self, expert: int) -> tuple[Tensor, Tensor]:
        """What one expert's weights change by.

        Returns:
            FP32 gate_up [2I, H], gate rows first ([I, H] ungated), and down [H, I].
        """
        return self.gate_up_b[expert] @ self.gate_up_a[expert], self.down_b[expert] @ self.down_a[expert]


def concatenate(changes: Sequence[LowRank]) -> LowRank:
    """The sum of several changes of one layer, as one whose rank is the sum of theirs.

    Raises:
        ValueError: There are none, or they are not of layers of the same sizes.
    """
    if not changes:
        raise ValueError("kt_sft: there is no low-rank change to concatenate")
    sizes = {(change.gate_up_a.shape[::2], change.gate_up_b.shape[:2], change.down_a.shape[::2]) for change in changes}
    if len(sizes) > 1:
        raise ValueError(f"kt_sft: low-rank changes of layers of different sizes cannot be concatenated: {sizes}")
    return LowRank(
        gate_up_a=torch.cat([change.gate_up_a for change in changes], dim=1),
        gate_up_b=torch.cat([change.gate_up_b for change in changes], dim=2),
        down_a=torch.cat([change.down_a for change in changes], dim=1),
        down_b=torch.cat([change.down_b for change in changes], dim=2),
    )

"""Biases of experts, as the engine takes them."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_bias(name: str, bias: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """A bias in FP32 on the CPU.

    Raises:
        ValueError: Its shape is not `shape`, or a value is not finite; `name` says which bias.
    """
    if bias is None:
        return None
    if tuple(bias.shape) != shape:
        raise ValueError(f"kt_sft: {name} must be {shape}, got {tuple(bias.shape)}")
    bias = bias.detach().to("cpu", torch.float32).contiguous()
    if not bias.isfinite().all():
        raise ValueError(f"kt_sft: {name} holds a value that is not finite")
    return bias


def bias_values(bias: Tensor | None) -> list[float]:
    """Its values one after the other; none where there is no bias."""
    return [] if bias is None else bias.flatten().tolist()

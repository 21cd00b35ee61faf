"""Biases of experts: those that a model has, and those of zeros that it has not."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kt_sft.loading.checkpoint import TensorEntry
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.layout import ExpertLayout


def adds_nothing(entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether a tensor is a bias of zeros beside its weight: GPTQ's writers give one to every layer.

    Args:
        entry: The tensor, of which the values are read only if it is a bias.
        tensors: All of the checkpoint, quantised ones folded.

    Raises:
        CheckpointError: It is a bias that cannot be read.
    """
    stem, _, last = entry.key.rpartition(".")
    weight = tensors.get(f"{stem}.weight")
    if last != "bias" or weight is None or entry.shape != weight.shape[:1]:
        return False
    return not bool(entry.read().any())


def read_bias(entry: TensorEntry, layout: ExpertLayout, *, first: bool) -> torch.Tensor:
    """A bias [E, 2I] with gate columns first (`first`), or [E, H], on the CPU.

    Raises:
        CheckpointError: It holds a NaN or Inf.
    """
    bias = entry.read()
    if not bool(torch.isfinite(bias).all()):
        raise CheckpointError(f"{entry.path}: tensor {entry.key} holds NaN or Inf values")
    if first and layout.gated and layout.interleaved:
        bias = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1)
    return bias

"""Looks over the part of a model that transformers loaded, which checks no values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.mapping import ModulePlan, block_of

_CHECKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_finite(model: nn.Module, plans: Sequence[ModulePlan]) -> None:
    """Refuses NaN and Inf in the parameters, and in the buffers around the experts (routers keep biases in them).

    Smallest and largest value tell, for both are NaN where any value is: one pass, nothing allocated, and one wait for
    each device. What lies on the meta device is not looked at.

    Raises:
        CheckpointError: A value is not finite; names the first such tensor.
    """
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters())}
    for plan in plans:
        block = block_of(plan.name)
        tensors |= dict(model.get_submodule(block).named_buffers(prefix=block))
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in _CHECKED and tensor.numel() and not tensor.is_meta:
            by_device.setdefault(tensor.device, {})[name] = tensor.detach()
    bad = {name for found in by_device.values() for name in _not_finite(found)}
    for name in tensors:
        if name in bad:
            raise CheckpointError(
                f"{name} holds NaN or Inf values: the checkpoint is damaged, or has values too large for the "
                f"{tensors[name].dtype} it is loaded as"
            )


def _not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    extremes = torch.stack([torch.stack(torch.aminmax(tensor)).double() for tensor in tensors.values()])
    finite = extremes.isfinite().all(dim=1).tolist()
    return [name for name, good in zip(tensors, finite, strict=True) if not good]

"""The quantised weights of a model's dense part: dequantised once, on load, into the model's own dtype.

transformers never sees them: while it loads, their parameters are set aside and their tensors are none that it knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from kt_sft.config import ConfigError
from kt_sft.loading.checkpoint import TensorEntry
from kt_sft.loading.errors import CheckpointError, UnsupportedModelError
from kt_sft.loading.mapping import ModulePlan
from kt_sft.loading.sources.entries import QuantisedEntry, RequantisationError, whole
from kt_sft.loading.threads import run_all

#: Each holds some rows in FP32, or the whole of a matrix that is packed along the other axis.
_MOST_THREADS = 8

_INITIALIZED = "_is_hf_initialized"  # transformers' own mark; nn.Module's annotations know nothing of it


@dataclass
class DenseWeight:
    """One parameter, what it is stored as, and the dtype it was loaded in."""

    name: str
    entry: QuantisedEntry
    meta: nn.Parameter

    def loaded(self, dtype: torch.dtype) -> Tensor:
        """Its value as it was loaded, cast to `dtype` since then; on the CPU."""
        value = torch.empty(self.entry.shape, dtype=dtype, device="cpu")
        for rows in self.entry.bands():
            part = self.entry.dequantised(rows).to(self.meta.dtype)
            value[rows.start : rows.start + rows.count] = part
        return value

    def written(self, value: Tensor, error: RequantisationError) -> dict[str, Tensor] | None:
        """What its stored tensors are to hold for a new value, by key; None where it is the one that was loaded.

        Raises:
            CheckpointError: The checkpoint's format cannot be written, or the value is not finite.
        """
        value = value.detach().to("cpu")
        if torch.equal(value, self.loaded(value.dtype)):
            return None
        if not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{self.name} holds NaN or Inf values, which cannot be saved as {self.entry.description}"
            )
        parts, stored = self.entry.rewritten(whole(self.entry), value.float())
        error.add(value.float(), stored)
        return {
            self.entry.parts[name].key: part.values.reshape(self.entry.parts[name].shape)
            for name, part in parts.items()
        }


def plan_dense(
    model: nn.Module, tensors: Mapping[str, TensorEntry], plans: Sequence[ModulePlan], conversions: Sequence[Any]
) -> list[DenseWeight]:
    """Finds the parameter of every quantised tensor that feeds no experts, where the model has it.

    Args:
        model: On the meta device.
        tensors: The checkpoint's, quantised ones folded.
        plans: Of the experts.
        conversions: transformers' weight transforms for `model`.

    Raises:
        CheckpointError: A shape is not the model's.
        UnsupportedModelError: The model makes the parameter from several tensors.
    """
    taken = {key for plan in plans for key in plan.entries()}
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix, parameters = getattr(model, "base_model_prefix", None), dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, DenseWeight] = {}
    for key, entry in tensors.items():
        if key in taken or not isinstance(entry, QuantisedEntry):
            continue
        name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = key, None
        if name not in parameters:
            continue
        if pattern is not None or name in (getattr(model, "all_tied_weights_keys", None) or {}) or name in found:
            raise UnsupportedModelError(
                f"{entry.path}: tensor {key} is {entry.description} and only a part of {name}, or shared with another "
                "weight; kt_sft cannot put these together, so take or make a BF16 copy of the model"
            )
        if entry.shape != tuple(parameters[name].shape):
            raise CheckpointError(
                f"{entry.path}: tensor {key} has shape {list(entry.shape)}, the model expects "
                f"{list(parameters[name].shape)}"
            )
        found[name] = DenseWeight(name, entry, parameters[name])
    return list(found.values())


def set_aside(model: nn.Module, weights: Sequence[DenseWeight]) -> list[str]:
    """Takes the parameters out of `model`, in whose place None stands.

    Returns:
        Patterns of the keys that are not to be missed, numbers left open.
    """
    for weight in weights:
        module, name = _place(model, weight.name)
        module._parameters[name] = None
        setattr(module, _INITIALIZED, True)  # or transformers would draw a random value for it
    return sorted({pattern for weight in weights for pattern in _patterns(weight)})


def load_dense(model: nn.Module, weights: Sequence[DenseWeight], device_map: Any) -> None:
    """Puts the parameters back, dequantised in FP32 and rounded once to the dtype that they had.

    Args:
        model: From which `set_aside` took them.
        weights: These.
        device_map: Module prefixes to devices; None or anything else stands for the CPU.

    Raises:
        CheckpointError: A file ends early.
        ConfigError: A weight is to be on disk.
    """

    def load(weight: DenseWeight) -> None:
        module, name = _place(model, weight.name)
        value = weight.loaded(weight.meta.dtype).to(_device(weight.name, device_map))
        module._parameters[name] = nn.Parameter(value, requires_grad=weight.meta.requires_grad)

    run_all(load, weights, _MOST_THREADS)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _patterns(weight: DenseWeight) -> list[str]:
    """The keys of its stored tensors, as they are and as transformers renames them."""
    stem = weight.entry.key.rpartition(".")[0]
    renamed = weight.name.rpartition(".")[0]
    keys = [f"{module}{part.key.removeprefix(stem)}" for part in weight.entry.stored() for module in (stem, renamed)]
    return [rf"(^|\.){re.sub('[0-9]+', '[0-9]+', re.escape(key))}$" for key in keys]


def _device(name: str, device_map: Any) -> torch.device:
    if not isinstance(device_map, dict):
        return torch.device("cpu")
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
    device = next((device_map[prefix] for prefix in prefixes if prefix in device_map), "cpu")
    if device == "disk":
        raise ConfigError(f"kt_sft: {name} is quantised and cannot be kept on disk; give it a device in device_map")
    return torch.device(device)

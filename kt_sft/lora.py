"""LoRA on routed experts in the engine, as PEFT layers.

A layer stands for one parameter of the experts, as PEFT's ParamWrapper does for fused experts that are the model's own:
same tensors, same names, one layer around the other where both parameters are adapted. What differs is what they do.
ParamWrapper adds the change to the weights of all experts; here the outermost layer hands the low-rank matrices of all
to the engine, which multiplies them.

Shape letters: E experts, H hidden size, I expert intermediate size, r rank.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from kt_sft.engine.operands import Factors, Term
from kt_sft.experts import CpuExperts
from kt_sft.merged_adapters import MergedAdapters, snapshot

#: Ranks that an adapter may have.
MOST_RANK = 256

_LOADED_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def parameters_of(experts: CpuExperts) -> tuple[str, str]:
    """The parameters that adapters can be put on, as the model's own class of experts names them."""
    return ("gate_up_proj" if experts.store.gated else "up_proj"), "down_proj"


def sizes_of(experts: CpuExperts, parameter_name: str) -> tuple[int, int]:
    """What one expert's matrix takes and what it gives: (H, 2I) ((H, I) ungated), or (I, H) for down_proj."""
    if parameter_name == "down_proj":
        return experts.intermediate_dim, experts.hidden_dim
    return experts.hidden_dim, experts.intermediate_dim * (2 if experts.store.gated else 1)


@functools.cache
def peft_turns_parameters() -> bool:
    """Whether PEFT takes parameters [E, out, in] as such (from 0.19 on), not as [E, in, out] (up to 0.18).

    Found by looking at what it makes of one. `is_transposed` marks parameters that do lie as [E, in, out].
    """
    from peft import LoraConfig, get_peft_model

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.weight = nn.Parameter(torch.zeros(2, 3, 5, device="cpu"))

    config = LoraConfig(r=1, target_modules=[], target_parameters=["inner.weight"])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class that PEFT does not know
        found: Any = get_peft_model(Probe(), config)  # type: ignore[arg-type]  # any module will do
    return bool(found.base_model.model.inner.lora_A["default"].in_features == 5)


class ExpertLora(nn.Module, LoraLayer):
    """LoRA on one parameter of routed experts.

    Args:
        base_layer: The experts, or the layer on their other parameter.
        parameter_name: One of `parameters_of`.
        device: Where adapters are kept, as FP32. With `lora_memory: host` that is the CPU, and stays it.

    Raises:
        ValueError: The experts' products cannot have adapters.
    """

    def __init__(self, base_layer: CpuExperts | ExpertLora, parameter_name: str, device: torch.device) -> None:
        nn.Module.__init__(self)
        with warnings.catch_warnings():  # PEFT does not know the base layer's class, and says so
            warnings.simplefilter("ignore", UserWarning)
            LoraLayer.__init__(self, base_layer)
        experts = self.experts
        if experts.config.compute == "int8":
            raise ValueError(
                "kt_sft: compute 'int8' multiplies rounded tokens, which adapters on experts cannot take; set compute: "
                "bf16"
            )
        self.parameter_name = parameter_name
        self.device = device
        self.num_experts = experts.num_experts
        self.is_down = parameter_name == "down_proj"
        inputs, outputs = sizes_of(experts, parameter_name)
        #: Whether A is what meets the inputs. The values do not change with it, only where they are kept.
        self.a_meets_inputs = experts.is_transposed or peft_turns_parameters()
        self.sizes = (inputs, outputs) if self.a_meets_inputs else (outputs, inputs)
        self.in_features, self.out_features = self.sizes  # as PEFT calls them
        sizes = [sizes_of(experts, name) for name in parameters_of(experts)]
        self._merged: MergedAdapters = (
            base_layer._merged
            if isinstance(base_layer, ExpertLora)
            else MergedAdapters(experts.merged, experts.merged_digests, experts.num_experts, *sizes)
        )

    @property
    def experts(self) -> CpuExperts:
        """The experts that this layer, or the one in it, is around."""
        experts = self.get_base_layer()
        assert isinstance(experts, CpuExperts)
        return experts

    def chain(self) -> Iterator[ExpertLora]:
        """This layer and the one in it."""
        layer: nn.Module = self
        while isinstance(layer, ExpertLora):
            yield layer
            layer = layer.base_layer

    def update_layer(  # type: ignore[override]
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        *,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        inference_mode: bool = False,
    ) -> None:
        """Adds an adapter.

        Raises:
            ValueError: Rank, initialisation or dropout is not possible.
        """
        if not 1 <= r <= MOST_RANK:
            raise ValueError(f"kt_sft: adapters on experts may have ranks from 1 to {MOST_RANK}, got {r}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"kt_sft: lora_dropout must be at least 0 and less than 1, got {lora_dropout}")
        if lora_dropout and not inference_mode and self._merged.for_good:
            raise ValueError(
                "kt_sft: an adapter on experts that others were merged into cannot be trained with dropout; set "
                "lora_dropout: 0, or start from an exported model"
            )
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"kt_sft: init_lora_weights {init_lora_weights!r} reads weights that are rounded and frozen in the "
                "engine; use true, false or gaussian for adapters on experts"
            )
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.use_rslora[adapter_name] = use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(self.sizes[0], r * self.num_experts, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * self.num_experts, self.sizes[1], bias=False)
        if init_lora_weights:
            self.reset_lora_parameters(adapter_name, init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertLora:
        # `to`, `cuda`, `half` and their like, of this module and of any around it.
        return super()._apply(_kept_in_host_memory(fn) if self.in_host_memory else fn, recurse)

    @property
    def in_host_memory(self) -> bool:
        """Whether adapters stay there, as FP32, wherever the model is moved and whatever it is cast to."""
        return self.experts.config.lora_memory == "host"

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The experts themselves are on none; masters are FP32 whatever the model is.
        for layers in (self.lora_A, self.lora_B):
            if all(weight.device.type != "meta" for weight in layers[adapter_name].parameters()):
                layers[adapter_name].to(device or self.device, torch.float32)

    def train(self, mode: bool = True) -> ExpertLora:
        """As every module's. With a change of mode the engine sees what was written through `.data`."""
        if mode != self.training:
            self.experts.forget_adapters()
        return super().train(mode)

    def _weights(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a, b

    def factors(self, adapter_name: str) -> Factors | None:
        """An adapter's matrices as the engine knows them, views of its parameters; None if it has none here."""
        if adapter_name not in self.lora_A:
            return None
        first_weight, second_weight = self._weights(adapter_name)
        first = first_weight.unflatten(0, (self.num_experts, -1))
        second = second_weight.unflatten(1, (-1, self.num_experts))
        if self.a_meets_inputs:
            a, b = first, second.permute(2, 0, 1)
        else:
            a, b = second.permute(2, 1, 0), first.transpose(1, 2)
        if self.experts.interleaved and not self.is_down:
            b = b.unflatten(1, (-1, 2)).transpose(1, 2)
        return Factors(a, b, self.scaling[adapter_name])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any) -> Tensor:
        """As the experts', with what the active adapters add.

        Raises:
            ValueError: `adapter_names` is given.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError("kt_sft: adapters on experts apply to whole batches; leave adapter_names out")
        if self.disable_adapters and self.merged:
            for layer in self.chain():
                layer.unmerge()
        terms = [] if self.disable_adapters or self.merged else self._terms()
        return self.experts(hidden_states, top_k_index, top_k_weights, adapters=terms)

    def _terms(self) -> list[Term]:
        layers = {layer.is_down: layer for layer in self.chain()}
        terms = []
        for name in self.active_adapters:
            gate_up, down = (layers[down].factors(name) if down in layers else None for down in (False, True))
            if gate_up is not None or down is not None:
                terms.append(Term(gate_up, down, max(layer.dropout(name) for layer in layers.values())))
        return terms

    def dropout(self, adapter_name: str) -> float:
        """The share of what an adapter reads that is left out now: none outside of training."""
        dropout = dict(self.lora_dropout.items()).get(adapter_name)
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes adapters part of what the experts compute, until `unmerge`.

        Args:
            safe_merge: Whether to look for values that are not finite.
            adapter_names: None for the active ones.

        Raises:
            ValueError: One is merged already, under whatever name, or has a value that is not finite.
        """
        try:
            for name in self.active_adapters if adapter_names is None else adapter_names:
                factors = self.factors(name)
                if factors is not None:
                    self._merge(name, factors, safe_merge)
        finally:
            self._tell_experts()

    def _tell_experts(self) -> None:
        self.experts.merged, self.experts.merged_digests = self._merged.total(), self._merged.digests()

    def check_merge(self) -> None:
        """Whether the active adapters can be merged, before any is: PEFT merges layer after layer.

        Raises:
            ValueError: One has the values of one that is merged already.
        """
        for name in self.active_adapters if self._merged.digests() else ():
            factors = self.factors(name)
            if factors is not None and name not in self.merged_adapters:
                self._merged.check_new(name, self.is_down, *snapshot(factors))

    def _merge(self, name: str, factors: Factors, safe_merge: bool) -> None:
        if name in self.merged_adapters:
            raise ValueError(
                f"kt_sft: adapter {name!r} is merged into the experts already; call unmerge_adapter() first"
            )
        with torch.inference_mode(False):  # what is merged stays, and may meet training
            a, b = snapshot(factors)
        if safe_merge and not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"kt_sft: adapter {name!r} has values on {self.parameter_name} that are not finite")
        self._merged.add(name, self.is_down, a, b)
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes merged adapters back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self._merged.remove(self.merged_adapters.pop(), self.is_down)
        self._tell_experts()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> CpuExperts:
        """The experts without these layers, adapters merged or left out; PEFT calls it on the outermost layer."""
        for layer in self.chain() if merge else ():
            names = layer.active_adapters if adapter_names is None else adapter_names
            layer.merge(safe_merge, [name for name in names if name not in layer.merged_adapters])
        self.experts.forget_adapters()
        return self.experts

    def delete_adapter(self, adapter_name: str) -> None:
        """As every layer's; what the engine has of it goes, too."""
        super().delete_adapter(adapter_name)
        self.experts.forget_adapters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.lora_A:
            keys = [f"{prefix}lora_{side}.{name}.weight" for side in "AB"]
            if all(key in state_dict for key in keys):
                for key, value in zip(keys, self._fitted(keys[0], *(state_dict[key] for key in keys)), strict=True):
                    state_dict[key] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _fitted(self, key: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A pair of tensors from a file, turned if it is of a version of PEFT that keeps A on the other side."""
        name = key.removesuffix(".weight").rpartition(".")[2]
        ranks, sizes = self.r[name] * self.num_experts, self.sizes
        stored = (a.shape[-1], b.shape[0])
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] != ranks or {*stored} != {*sizes}:
            raise ValueError(
                f"kt_sft: {key} is {tuple(a.shape)}, with a B of {tuple(b.shape)}; an adapter of rank {self.r[name]} "
                f"on {self.parameter_name} of {self.num_experts} experts has {(ranks, sizes[0])} and "
                f"{(sizes[1], ranks)}. It is of another rank, or was made for another model"
            )
        if not {a.dtype, b.dtype} <= _LOADED_DTYPES:
            raise ValueError(f"kt_sft: {key} is {a.dtype}, its B {b.dtype}; adapters are kept in FP32, FP16 or BF16")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"kt_sft: {key} or its B has values that are not finite; the file is damaged")
        turned = stored != sizes
        if sizes[0] == sizes[1] and self.experts.loaded_a_meets_inputs is not None:
            turned = self.experts.loaded_a_meets_inputs != self.a_meets_inputs
        if not turned:
            return a, b
        # A is [E·r, p], expert-major; B is [q, r·E], rank-major.
        by_expert = b.unflatten(1, (-1, self.num_experts)).permute(2, 1, 0).flatten(0, 1)
        by_rank = a.unflatten(0, (self.num_experts, -1)).permute(2, 1, 0).flatten(1, 2)
        return by_expert.contiguous(), by_rank.contiguous()

    def __repr__(self) -> str:
        return super().__repr__().replace("ExpertLora(", f"ExpertLora(\n  parameter_name={self.parameter_name!r},", 1)


def attach(
    experts: CpuExperts | ExpertLora, parameter_names: Sequence[str], device: torch.device
) -> dict[str, ExpertLora]:
    """Puts layers around experts, or finds the ones that are there.

    Args:
        experts: The experts, or the outermost layer around them.
        parameter_names: The parameters to be adapted.
        device: Where adapters are kept.

    Returns:
        Parameter's name -> layer, in the order from the inside out.

    Raises:
        ValueError: There are layers already, but for other parameters.
    """
    if isinstance(experts, ExpertLora):
        layers = {layer.parameter_name: layer for layer in experts.chain()}
        if {*layers} != {*parameter_names}:
            raise ValueError(
                f"kt_sft: adapters of one model must be on the same parameters of its experts; the new one is on "
                f"{', '.join(sorted(parameter_names))}, those before it on {', '.join(sorted(layers))}"
            )
        for layer in layers.values():
            layer.device = device  # the model may have been moved since
        return dict(reversed(layers.items()))
    found = {}
    for name in parameters_of(experts):
        if name in parameter_names:
            experts = found[name] = ExpertLora(experts, name, device)
    return found


def _kept_in_host_memory(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # What is not there yet is on the meta device, and comes by `to_empty`.
    return lambda tensor: tensor if tensor.device.type == "cpu" else fn(tensor).to("cpu", torch.float32)

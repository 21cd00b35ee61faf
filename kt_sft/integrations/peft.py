"""Where kt_sft attaches to PEFT: adapters on routed experts that run in the engine.

PEFT puts LoRA on fused experts by `target_parameters`, for which it looks for parameters. Experts in the engine have
none, so they are found here, and get layers of their own (kt_sft.lora) whose tensors have the names and shapes of
PEFT's. What PEFT does besides, as saving, loading, choosing, merging, is its own code on these layers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import InvalidVersion, Version
from torch import nn

from kt_sft.integrations.adapter_saving import saving_whole
from kt_sft.integrations.peft_configs import check_weights, restore_dropout, stored_config

if TYPE_CHECKING:
    from kt_sft.experts import CpuExperts
    from kt_sft.lora import ExpertLora

logger = logging.getLogger("kt_sft")

#: Settings of a LoraConfig that adapters on experts do not have, with the way out.
_EXCLUDED = {
    "use_dora": "train plain LoRA",
    "lora_bias": "leave it out",
    "fan_in_fan_out": "leave it out",
    "alora_invocation_tokens": "train plain LoRA",
    "use_qalora": "train plain LoRA",
}


def extend_lora_model(module: ModuleType) -> None:
    """Wraps the two places of `LoraModel` that know of `target_parameters`; those that begin an adapter and its merge.

    Args:
        module: `peft.tuners.lora.model`.
    """
    model_class: Any = module.LoraModel
    inject, create = model_class._inject_parameters, model_class._create_and_replace

    @functools.wraps(inject)
    def _inject_parameters(
        self: Any, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str] | None:
        ours = _inject_experts(self, peft_config, model, adapter_name, low_cpu_mem_usage)
        theirs = inject(
            self, peft_config=peft_config, model=model, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        if theirs is not None:  # newer versions of PEFT (0.21) return what was adapted instead of noting it
            return [*ours, *theirs]
        self.targeted_parameter_names += ours
        return None

    @functools.wraps(create)
    def _create_and_replace(self: Any, lora_config: Any, *args: Any, **kwargs: Any) -> None:
        # PEFT refuses a second adapter whose config has target_parameters, also where it is about other modules.
        if kwargs.get("parameter_name") is None and lora_config.target_parameters and _has_experts(self.model):
            lora_config = copy.copy(lora_config)
            lora_config.target_parameters = None
        create(self, lora_config, *args, **kwargs)

    inject_adapter = model_class.inject_adapter

    @functools.wraps(inject_adapter)
    def inject_checked(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        from kt_sft.integrations.adapter_files import check_numbers

        config = self.peft_config[adapter_name]
        if _has_experts(model):
            restore_dropout(config)
            if config.target_parameters:
                check_numbers(config.to_dict(), f"kt_sft: the config of adapter {adapter_name!r}")
        inject_adapter(self, model, adapter_name, *args, **kwargs)

    check_merge = model_class._check_merge_allowed

    @functools.wraps(check_merge)
    def _check_merge_allowed(self: Any) -> None:
        check_merge(self)
        if not _has_experts(self.model):
            return
        from kt_sft.lora import ExpertLora

        for layer in self.model.modules():
            if isinstance(layer, ExpertLora):
                layer.check_merge()

    model_class._check_merge_allowed = _check_merge_allowed
    model_class.inject_adapter = inject_checked
    model_class._inject_parameters = _inject_parameters
    model_class._create_and_replace = _create_and_replace


def extend_peft_model(module: ModuleType) -> None:
    """Wraps `PeftModel.load_adapter`, which drops tensors without a home and does not compare configs; and saving.

    Args:
        module: `peft.peft_model`.
    """
    model_class: Any = module.PeftModel
    load = model_class.load_adapter

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not _has_experts(self):
            return load(self, model_id, adapter_name, *args, **kwargs)
        stored = stored_config(model_id, kwargs)
        if stored.get("peft_type") != "LORA":  # of no other kind there is anything on experts
            return load(self, model_id, adapter_name, *args, **kwargs)
        if adapter_name in self.peft_config:
            _check_same(model_id, stored, self.peft_config[adapter_name])
        check_weights(model_id, kwargs)
        if len(args) < 2 and _in_host_memory(self):  # PEFT would read all of it to the accelerator first
            kwargs.setdefault("torch_device", "cpu")
        with _orientation(self, stored):
            result = load(self, model_id, adapter_name, *args, **kwargs)
        _check_complete(model_id, adapter_name, result)
        _warn_if_merged(self, model_id, adapter_name)
        return result

    model_class.load_adapter = load_adapter
    module.safe_save_file = saving_whole(module.safe_save_file)  # type: ignore[attr-defined]


def target_parameters(model: nn.Module) -> list[str]:
    """What a LoraConfig's `target_parameters` must be to cover a model's routed experts, by its own class's names.

    Args:
        model: Before it has adapters.

    Raises:
        ValueError: It has no routed experts in the engine.
    """
    from kt_sft.lora import parameters_of

    found = {
        f"{_without_layers(name)}.{parameter}"
        for name, experts in _experts_of(model)
        for parameter in parameters_of(experts)
    }
    if not found:
        raise ValueError(
            f"kt_sft: lora_experts is set, but {type(model).__name__} has no routed experts in the engine; leave it out"
        )
    return sorted(found)


def _without_layers(name: str) -> str:
    """The part of a module's name after its layer's number, which is the same in every layer."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _experts_of(model: nn.Module) -> Iterator[tuple[str, CpuExperts]]:
    """The modules of experts in the engine, by the names that the model's own class gives them."""
    from kt_sft.experts import CpuExperts

    for name, module in list(model.named_modules()):
        if isinstance(module, CpuExperts):
            yield name.replace(".base_layer", ""), module


def _has_experts(model: nn.Module) -> bool:
    return any(True for _ in _experts_of(model))


def _in_host_memory(model: nn.Module) -> bool:
    return any(experts.config.lora_memory == "host" for _, experts in _experts_of(model))


def _inject_experts(
    tuner: Any, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
) -> list[str]:
    """Puts an adapter on the experts that `peft_config` is about; returns the names of the adapted parameters."""
    from accelerate import init_empty_weights

    from kt_sft.experts import CpuExperts
    from kt_sft.integrations.host_memory import check_parallel, require_memory
    from kt_sft.lora import ExpertLora, attach, parameters_of, sizes_of

    targets, adapted, parameters = {*peft_config.target_parameters}, [], 0
    wanted_of: dict[str, tuple[CpuExperts, list[str]]] = {}
    for name, experts in _experts_of(model):
        possible = parameters_of(experts)
        _check_targets(name, possible, targets)
        wanted = [parameter for parameter in possible if _is_target(f"{name}.{parameter}", targets)]
        if not wanted:
            continue
        _check_config(peft_config, experts)
        if not peft_config.inference_mode:
            check_parallel(experts.config)
        wanted_of[name] = experts, wanted
        if _device(experts, model.get_submodule(name.rpartition(".")[0]), model).type == "cpu":
            for parameter in wanted:
                rank, _ = _rank_and_alpha(peft_config, f"{name}.{parameter}")
                parameters += rank * sum(sizes_of(experts, parameter)) * experts.num_experts
    require_memory(parameters, trained=not peft_config.inference_mode)
    for name, (experts, wanted) in wanted_of.items():
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        present = parent.get_submodule(child)
        assert isinstance(present, CpuExperts | ExpertLora)
        layers = attach(present, wanted, _device(experts, parent, model))
        for parameter, layer in layers.items():
            key = f"{name}.{parameter}"
            with init_empty_weights() if low_cpu_mem_usage else torch.device("cpu"):
                _add_adapter(layer, adapter_name, key, peft_config)
            if adapter_name not in tuner.active_adapters:
                layer.set_requires_grad(adapter_name, False)
            adapted.append(key)
        parent.add_module(child, layers[wanted[-1]])
    return adapted


def _rank_and_alpha(peft_config: Any, key: str) -> tuple[int, float]:
    from peft.utils.other import get_pattern_key

    ranks, alphas = peft_config.rank_pattern, peft_config.alpha_pattern
    rank = ranks.get(get_pattern_key(ranks.keys(), key), peft_config.r)
    alpha = alphas.get(get_pattern_key(alphas.keys(), key), peft_config.lora_alpha)
    return rank, alpha


def _add_adapter(layer: ExpertLora, adapter_name: str, key: str, peft_config: Any) -> None:
    layer.update_layer(
        adapter_name,
        *_rank_and_alpha(peft_config, key),
        lora_dropout=peft_config.lora_dropout,
        init_lora_weights=peft_config.init_lora_weights,
        use_rslora=peft_config.use_rslora,
        inference_mode=peft_config.inference_mode,
    )


def _is_target(key: str, targets: set[str]) -> bool:
    """As PEFT matches names."""
    return key in targets or any(key.endswith(f".{target}") for target in targets)


def _check_targets(name: str, possible: tuple[str, ...], targets: set[str]) -> None:
    for target in targets:
        module, _, parameter = target.rpartition(".")
        if (name == module or name.endswith(f".{module}")) and parameter not in possible:
            raise ValueError(
                f"kt_sft: target_parameters names {target}, which experts in the engine cannot be adapted on; possible "
                f"are {' and '.join(possible)}"
            )


def _check_config(peft_config: Any, experts: CpuExperts) -> None:
    for name, way_out in _EXCLUDED.items():
        if getattr(peft_config, name, None):
            raise ValueError(f"kt_sft: adapters on experts cannot have {name}; {way_out}")
    if peft_config.bias == "all" and experts.store.gate_up_bias is not None:
        raise ValueError("kt_sft: bias 'all' would train the experts' biases, frozen in the engine; use none")


def _device(experts: CpuExperts, parent: nn.Module, model: nn.Module) -> torch.device:
    """Where adapters on experts are kept: with the router, which stands beside them, or in host memory."""
    if experts.config.lora_memory == "host":
        return torch.device("cpu")
    for module in (parent, model):
        for parameter in module.parameters():
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cpu")


@contextlib.contextmanager
def _orientation(model: nn.Module, stored: Mapping[str, Any]) -> Iterator[None]:
    """While an adapter is loaded: lets the experts know on which side its A is, where sizes do not tell."""
    version = stored.get("peft_version")  # not written by PEFT before 0.18
    try:
        turned = version is not None and Version(str(version).partition("@")[0]) >= Version("0.19.dev0")
    except InvalidVersion as error:
        raise ValueError(f"kt_sft: the adapter's peft_version {version!r} is no version as 0.18.1") from error
    modules = [experts for _, experts in _experts_of(model)]
    try:
        for experts in modules:
            experts.loaded_a_meets_inputs = turned or experts.is_transposed
        yield
    finally:
        for experts in modules:
            experts.loaded_a_meets_inputs = None


#: What an adapter must have in common with the one that its tensors are loaded into. Targets can be written in several
#: ways; where they differ, tensors are missing or have no place.
_COMPARED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def _check_same(model_id: Any, stored: Mapping[str, Any], present: Any) -> None:
    different = []
    for name in _COMPARED:
        there, here = stored.get(name), getattr(present, name, None)
        if (there or None) != (here or None):  # absent, empty and false are the same
            different.append(f"{name} {there!r} there, {here!r} here")
    if different:
        raise ValueError(
            f"kt_sft: the adapter in {model_id} is not the one that this run trains ({'; '.join(different)}); use the "
            "settings it was trained with, or load it with adapter_name_or_path"
        )


def _check_complete(model_id: Any, adapter_name: str, result: Any) -> None:
    # PEFT looks for the adapter's name anywhere in a key: "a" is in every other adapter's, too.
    own = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")
    missing = [key for key in result.missing_keys if own.search(key)]
    for keys, what in (
        (result.unexpected_keys, "has tensors that this model has no place for"),
        (missing, "lacks tensors that its config asks for"),
    ):
        if keys:
            raise ValueError(f"kt_sft: the adapter in {model_id} {what}: {keys[0]} and {len(keys) - 1} more")


def _warn_if_merged(model: nn.Module, model_id: Any, adapter_name: str) -> None:
    """Merging such an adapter is an error; to go on with it is for the user to decide."""
    from kt_sft.lora import ExpertLora
    from kt_sft.merged_adapters import digest_of, snapshot

    for layer in model.modules():
        if not isinstance(layer, ExpertLora) or not layer.experts.merged_digests:
            continue
        factors = layer.factors(adapter_name)
        if factors is not None and digest_of(layer.is_down, *snapshot(factors)) in layer.experts.merged_digests:
            logger.warning(
                "the adapter in %s is merged into this model's experts already; with it its change counts twice, so "
                "leave it out if that is not what you want",
                model_id,
            )
            return

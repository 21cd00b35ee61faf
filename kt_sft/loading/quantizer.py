"""The transformers quantizer: swaps experts for CpuExperts and streams their weights into the engine's stores."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel, is_fsdp_enabled
from transformers.quantizers.base import HfQuantizer

from kt_sft.config import ConfigError, KTConfig, local_rank_and_size
from kt_sft.engine.memory import available_bytes
from kt_sft.engine.store import LayerStore
from kt_sft.experts import CpuExperts
from kt_sft.loading.announce import announce, announce_untouched
from kt_sft.loading.checkpoint import Checkpoint
from kt_sft.loading.dense import check_finite
from kt_sft.loading.errors import CheckpointError, NotEnoughMemoryError
from kt_sft.loading.hub import complete_snapshot
from kt_sft.loading.layout import ExpertLayout, find_experts
from kt_sft.loading.mapped import bytes_beside_files, decide_mapped
from kt_sft.loading.mapping import ModulePlan, block_of, feeds_experts, plan_experts
from kt_sft.loading.memory import experts_bytes, not_enough, require_bytes
from kt_sft.loading.merged_record import RECORD, read_record, write_record
from kt_sft.loading.merging import merge_saved, merged_changes
from kt_sft.loading.processes import Loader, loader_for
from kt_sft.loading.ready.manifest import MANIFEST, NOT_SAVED
from kt_sft.loading.ready.reading import ReadyStore, dense_quantization, is_store
from kt_sft.loading.saving import check_target, keep_quantization, state_with_experts
from kt_sft.loading.sharing import publish_store, shared_store
from kt_sft.loading.sources.dense import DenseWeight, load_dense, plan_dense, set_aside
from kt_sft.loading.sources.entries import resolve_storage
from kt_sft.loading.sources.methods import check_config, check_method, fold_tensors
from kt_sft.offload.shared import overlap_shared_experts

# Attributes that transformers itself keeps on a model; nn.Module's annotations know nothing of them.
_CONVERSIONS, _QUANTIZER, _INITIALIZED = "_weight_conversions", "hf_quantizer", "_is_hf_initialized"
#: What is said to be needed besides where predictions count.
_PREDICTED = ", and activations and buffers as predicted"


class KTQuantizer(HfQuantizer):
    """Loads a model with its routed experts in the CPU engine; everything else loads as always.

    Afterwards the model looks like an unquantised one to the libraries above (its dense part is one: adapters merge,
    `to(dtype)` casts it), except that `is_quantized` and `hf_quantizer` stay, by which the Trainer asks for adapters
    and `save_pretrained` asks for the experts; for `is_quantized`, transformers refuses `half()` and `float()`. A model
    without routed experts is left exactly as without kt_sft.
    """

    requires_calibration = False

    def __init__(self, quantization_config: KTConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._config = quantization_config
        self.pre_quantized = False  # the checkpoint's own dtypes apply to everything but the experts
        #: The checkpoint's own `quantization_config`, if it is quantised.
        found: dict[str, Any] | None = getattr(quantization_config, "source_quantization", None)
        #: Whether the checkpoint is a ready store; `_source` is then that of its dense part.
        self._ready, self._source = is_store(found), dense_quantization(found)
        self._plans: list[ModulePlan] = []
        self._storages: dict[str, dict[str, Any]] = {}
        self._dense: list[DenseWeight] = []
        self._device_map: Any = None
        self._identity: tuple[tuple[str, int, int], ...] = ()
        self._merged_before: frozenset[str] = frozenset()
        self._loader = Loader()
        self._model_class: type | None = None

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the dense part."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A model can be saved: its experts are copied from the checkpoint they came from."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what cannot work, before anything is loaded.

        Raises:
            ConfigError: A checkpoint quantised in a way that cannot be read, DeepSpeed ZeRO-3 or FSDP.
        """
        if self._source is not None:
            check_method(self._source)
        if is_deepspeed_zero3_enabled():
            raise ConfigError(
                "kt_sft: DeepSpeed ZeRO-3 cannot partition experts that live in the engine; use ZeRO-2 or DDP"
            )
        if is_fsdp_enabled():
            raise ConfigError("kt_sft: FSDP is not supported in this version; use DDP")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dense part's dtype, where transformers took that of the first tensor for it, which may be of codes."""
        return torch.bfloat16 if isinstance(dtype, torch.dtype) and dtype.itemsize == 1 else dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Turns an automatic placement into one device: without its experts the model fits, and needs no hooks."""
        if not isinstance(device_map, str):
            return device_map
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None:
            return {"": "cpu"}
        return {"": torch.device(accelerator.type, torch.accelerator.current_device_index())}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        layouts = find_experts(model)
        check_config(model.config)
        if not layouts and (self._ready or self._source is not None):
            raise ConfigError(
                f"kt_sft: {type(model).__name__} has no routed experts, and kt_sft reads quantised checkpoints only of "
                "models that have some; leave kt_sft out for this one"
            )
        if not layouts:
            return model
        if not checkpoint_files:
            raise ConfigError("kt_sft: experts are loaded from safetensors files; a state_dict cannot be given instead")
        path = model.config.name_or_path
        local, folder = os.path.isdir(path or ""), Path(checkpoint_files[0]).parent
        checkpoint = Checkpoint(checkpoint_files, path if local else None)
        hub = vars(self._config).pop("hub", {})  # which may hold a token: not kept
        if not local:
            complete_snapshot(folder, [RECORD, MANIFEST] if self._ready else [RECORD], hub)
        self._merged_before = read_record(folder)
        ready = ReadyStore(checkpoint, self._source) if self._ready else None
        if self._source is not None:
            checkpoint.tensors = fold_tensors(checkpoint.tensors, self._source)
        key_mapping = getattr(self._config, "key_mapping", None)
        conversions = get_model_conversion_mapping(model, key_mapping, self)
        planned = ready.plan if ready is not None else plan_experts
        self._plans = planned(model, layouts, checkpoint, conversions)
        self._storages = {plan.name: resolve_storage(plan, self._config) for plan in self._plans}
        for storage in self._storages.values():
            self._config.check_compute(storage["expert_format"])
        self._dense = plan_dense(model, checkpoint.tensors, self._plans, conversions)
        self._device_map = device_map
        self._identity = checkpoint.identity()
        self._model_class = type(model)
        self._loader = loader_for([self._key(plan) for plan in self._plans if shared_store(self._key(plan)) is None])
        # This runs under torch.device("meta"): what the experts allocate must be real.
        with torch.device("cpu"), self._loader.reporting():
            self._loader.decide(lambda: self._decide_mapped(model, device_map))
            for plan in self._plans:
                model.set_submodule(plan.name, self._experts(plan))
                _keep_from_initializing(model, plan.name)
        _ignore_keys(model, layouts, set_aside(model, self._dense))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self._plans:
            self.remove_quantization_config(model)
            announce_untouched(type(model).__name__)
            return model
        with self._loader.reporting():
            load_dense(model, self._dense, self._device_map)
            check_finite(model, self._plans)
        stores = [(plan, _store_of(model, plan.name)) for plan in self._plans]
        self._loader.fill([(plan, store) for plan, store in stores if shared_store(self._key(plan)) is not store])
        for plan, store in stores:
            publish_store(self._key(plan), store)
        self._look_unquantised(model)
        announce(self._config, self._plans, [store for _, store in stores], self._loader.sharers)
        overlap_shared_experts(model)
        return model

    def check_save_directory(
        self, save_directory: str | os.PathLike[str], state_dict: Mapping[str, Any] | None = None
    ) -> None:
        """Called before a whole model is saved.

        Args:
            save_directory: Where to.
            state_dict: What `save_pretrained` was given to save instead of the model's own state.

        Raises:
            CheckpointError: The experts' own source lies there.
            ValueError: A state dict is given: transformers drops it for what a quantizer gives, and one without the
                experts would make no checkpoint.
        """
        if state_dict is not None:
            raise ValueError(
                "kt_sft: save_pretrained(state_dict=...) is not supported for a model whose experts are in the engine; "
                "load the values into the model and save it without state_dict"
            )
        check_target(save_directory, self._identity)

    def finishes(self, model: PreTrainedModel) -> bool:
        """Whether what is saved of `model` is incomplete before `finish_saving`.

        Raises:
            CheckpointError: An adapter on experts is attached and not merged, or only a part of the model is saved; or
                its experts come from a ready store.
        """
        if self._ready:
            raise CheckpointError(f"kt_sft: {NOT_SAVED}")
        self._check_whole(model)
        return bool(merged_changes(model, self._plans)) or self._source is not None

    def finish_saving(self, model: PreTrainedModel, folder: Path) -> None:
        """Called when a whole model has been saved to `folder`: merges adapters into the experts there.

        A record of them goes with it. Of a quantised source, config.json gets its `quantization_config` back.

        Raises:
            CheckpointError: A changed weight is not finite in its dtype, or cannot be quantised as it was, or a file
                cannot be read or written.
        """
        merge_saved(folder, model, self._plans, self._source)
        write_record(folder, {digest for plan in self._plans for digest in _digests_of(model, plan.name)})
        if self._source is not None:
            keep_quantization(folder, self._source)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes: the dense part as it is now, the experts as they were in the checkpoint.

        Raises:
            CheckpointError: The source checkpoint is gone or changed, or only a part of the model is saved.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only adapters are saved
        self._check_whole(model)
        return state_with_experts(model, self._plans, self._dense, self._identity), {}

    def _check_whole(self, model: PreTrainedModel) -> None:
        if type(model) is not self._model_class:
            raise CheckpointError(
                f"kt_sft: {type(model).__name__} is a part of {getattr(self._model_class, '__name__', 'a model')}; "
                "save the whole model, whose experts' names are known"
            )

    def _key(self, plan: ModulePlan) -> tuple[Any, ...]:
        storage = tuple(self._storages[plan.name].values())
        return (self._identity, plan.name, plan.layout, storage, self._config.store)

    def _experts(self, plan: ModulePlan) -> CpuExperts:
        layout = plan.layout
        experts = CpuExperts(
            self._store(plan), self._config, is_transposed=layout.transposed, interleaved=layout.interleaved
        )
        experts.merged_digests = self._merged_before
        return experts

    def _store(self, plan: ModulePlan) -> LayerStore:
        layout, storage = plan.layout, self._storages[plan.name]
        try:
            return shared_store(self._key(plan)) or self._loader.store(
                num_experts=layout.num_experts,
                hidden_size=layout.hidden_size,
                intermediate_size=layout.intermediate_size,
                activation=layout.activation,
                gated=layout.gated,
                **storage,
            )
        except MemoryError as error:  # a limit that the check beforehand cannot see, as of the address space
            raise not_enough(
                experts_bytes(layout, storage), available_bytes(), f"the experts of {plan.name}"
            ) from error

    def _decide_mapped(self, model: PreTrainedModel, device_map: Any) -> bool:
        """Whether the experts stay in the checkpoint's files; sees, before anything is allocated, that the rest fits.

        Raises:
            ConfigError: They should, but cannot.
            NotEnoughMemoryError: Something has no place.
        """
        plans = [plan for plan in self._plans if shared_store(self._key(plan)) is None]
        experts, dense = sum(experts_bytes(plan.layout, self._storages[plan.name]) for plan in plans), 0
        devices = device_map.values() if isinstance(device_map, dict) else ("cpu",)
        if any(torch.device(device).type == "cpu" for device in devices if device != "disk"):
            taken = {id(value) for plan in self._plans for value in model.get_submodule(plan.name).parameters()}
            dense = sum(value.nbytes for value in model.parameters() if id(value) not in taken)
        # Training is checked with its weights; what of it is only predicted is no reason to refuse it.
        training: Any = getattr(self._config, "training_check", None)
        shared = self._loader.sharers > 1
        check = None if training is None else training.of(model, self._plans, self._storages, shared)
        what = f"the experts of {len(plans)} layers"
        if check is not None:
            dense += check.certain_bytes
            what += ", the weights beside them, adapters and optimizer"
        each, together = (dense, experts) if shared else (dense + experts, 0)
        processes = local_rank_and_size()[1]
        scales = bytes_beside_files(plans, self._storages)
        beside = "the weights beside the experts" + (", and the experts' scales" if scales else "")

        def resident(predicted: int = 0) -> None:
            require_bytes(each + predicted, what + (_PREDICTED if predicted else ""), processes, together)

        def mapped(predicted: int = 0) -> None:
            require_bytes(dense + scales + predicted, beside + (_PREDICTED if predicted else ""), processes)

        try:
            is_mapped = decide_mapped(
                plans,
                self._storages,
                self._config.store,
                resident=resident,
                predicted=lambda: None if check is None else check.require_predicted(resident, is_mapped=False),
                mapped=mapped,
            )
        except NotEnoughMemoryError as error:
            if check is None:
                raise
            raise check.refusal(error) from None
        if check is not None and self._loader.speaks:
            check.warn(mapped if is_mapped else resident, is_mapped=is_mapped)
        return is_mapped

    def _look_unquantised(self, model: PreTrainedModel) -> None:
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        if hasattr(model, "quantization_method"):
            del model.quantization_method
        # Saving experts again would undo a conversion; they are saved as they were read.
        kept = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not feeds_experts(conversion, self._plans)
        ]
        setattr(model, _CONVERSIONS, kept)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module is not model and _has_experts(module):
                setattr(module, _QUANTIZER, self)  # or saving that part would silently lose its experts


def _digests_of(model: nn.Module, name: str) -> frozenset[str]:
    experts = model.get_submodule(name)
    assert isinstance(experts, CpuExperts)
    return experts.merged_digests


def _store_of(model: nn.Module, name: str) -> LayerStore:
    experts = model.get_submodule(name)
    assert isinstance(experts, CpuExperts)
    return experts.store


def _keep_from_initializing(model: nn.Module, name: str) -> None:
    """Stops a block's own weight initialisation from reaching for parameters that its experts no longer have.

    Qwen3-Omni initialises its experts from the block around them. A block with tensors of its own is left to do so.
    """
    block = model.get_submodule(block_of(name))
    if not [*block.parameters(recurse=False), *block.buffers(recurse=False)]:
        setattr(block, _INITIALIZED, True)


def _has_experts(module: nn.Module) -> bool:
    return any(isinstance(child, CpuExperts) for child in module.modules())


def _ignore_keys(model: PreTrainedModel, layouts: dict[str, ExpertLayout], others: list[str]) -> None:
    """The experts' keys are unexpected now, on purpose; a checkpoint may write them with or without the base prefix.

    `others` are patterns of what else we load ourselves.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    names = [re.escape(name.removeprefix(prefix)) for name in layouts]
    patterns = [rf"(^|\.){name}\." for name in names]
    model._keys_to_ignore_on_load_unexpected = [*(model._keys_to_ignore_on_load_unexpected or []), *patterns, *others]

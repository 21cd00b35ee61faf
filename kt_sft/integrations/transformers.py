"""Where kt_sft attaches to transformers: its quantizer registry, and four seams beyond it."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from kt_sft.config import QUANT_METHOD, STORE_METHOD, KTConfig, StoreOnItsOwn


def register(auto: ModuleType) -> None:
    """Registers config and quantizer in `transformers.quantizers.auto`, and lets KTConfig meet quantised checkpoints.

    Args:
        auto: The module `transformers.quantizers.auto`.
    """
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(KTConfig)
    # transformers goes on without the quantization_config of a method that it does not know.
    auto.register_quantization_config(STORE_METHOD)(StoreOnItsOwn)
    auto.register_quantizer(QUANT_METHOD)(_made_on_use(auto.HfQuantizer))
    _let_config_win(auto.AutoHfQuantizer)


def extend_models(modeling: ModuleType) -> None:
    """Wraps methods of `PreTrainedModel`.

    `from_pretrained` and `save_pretrained` do not tell a quantizer all it must know; `_set_gradient_checkpointing` says
    how layers are checkpointed.

    Args:
        modeling: The module `transformers.modeling_utils`.
    """
    _pass_arguments(modeling.PreTrainedModel)
    _guard_saving(modeling.PreTrainedModel)
    _remember_checkpointed(modeling.PreTrainedModel)


def _pass_arguments(model_class: Any) -> None:
    """Lets the quantizer know the `key_mapping` by which transformers is going to rename the checkpoint's keys.

    And how to reach the hub, which may have more files for us beside those that transformers downloads.
    """
    load = model_class.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        config, key_mapping = kwargs.get("quantization_config"), kwargs.get("key_mapping")
        if isinstance(config, Mapping) and config.get("quant_method") == QUANT_METHOD:
            config = KTConfig.from_dict(config)
        hub = {name: kwargs[name] for name in ("token", "local_files_only") if kwargs.get(name) is not None}
        if isinstance(config, KTConfig) and (key_mapping or hub):
            kwargs["quantization_config"] = config = copy.copy(config)
            config.key_mapping, config.hub = dict(key_mapping or {}), hub  # type: ignore[attr-defined]
        return load(cls, *args, **kwargs)

    model_class.from_pretrained = classmethod(from_pretrained)


def _guard_saving(model_class: Any) -> None:
    """Lets the quantizer see where a model is going to be saved to, and finish what the host has written.

    The model appears in its folder when it is complete: transformers writes config.json first and shards in place.
    """
    save = model_class.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = getattr(self, "hf_quantizer", None)
        check = getattr(quantizer, "check_save_directory", None)
        if quantizer is None or check is None:
            return save(self, save_directory, *args, **kwargs)
        given = args[1] if len(args) > 1 else kwargs.get("state_dict")
        # A model with adapters saves those alone; the Trainer may hand it a state_dict, which does no harm then.
        only_adapters = getattr(self, "_hf_peft_config_loaded", False)
        check(save_directory, state_dict=None if only_adapters else given)
        if only_adapters or os.path.isfile(save_directory):  # of a file the host says what it thinks
            return save(self, save_directory, *args, **kwargs)
        finishes = quantizer.finishes(self)
        if args[2] if len(args) > 2 else kwargs.get("push_to_hub"):  # the host uploads before we could finish
            if finishes:
                raise ValueError(
                    "kt_sft: save_pretrained(push_to_hub=True) would upload the model before merged adapters and the "
                    "quantization_config are in it; save the model first, then call push_to_hub"
                )
            return save(self, save_directory, *args, **kwargs)

        from kt_sft.loading.staging import staged

        with staged(save_directory) as folder:
            saved = save(self, folder, *args, **kwargs)
            quantizer.finish_saving(self, folder)
        return saved

    model_class.save_pretrained = save_pretrained


def _remember_checkpointed(model_class: Any) -> None:
    """Lets routed experts in the engine remember their results where checkpointing is going to call them again."""
    set_checkpointing = model_class._set_gradient_checkpointing
    signature = inspect.signature(set_checkpointing)

    @functools.wraps(set_checkpointing)
    def _set_gradient_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        experts = sys.modules.get("kt_sft.experts")  # not imported into processes that have no use for it
        if experts is None or not any(isinstance(part, experts.CpuExperts) for part in self.modules()):
            return set_checkpointing(self, *args, **kwargs)
        from kt_sft.engine.retention import in_pieces

        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        call.arguments["gradient_checkpointing_func"] = in_pieces(call.arguments["gradient_checkpointing_func"])
        return set_checkpointing(*call.args, **call.kwargs)

    model_class._set_gradient_checkpointing = _set_gradient_checkpointing


def _made_on_use(base: type) -> type:
    """A quantizer class that becomes a KTQuantizer when one is asked for.

    The registry is filled while transformers is still being imported, and in processes that never use kt_sft: neither
    can import our loading code and the native engine at that moment.
    """

    class DeferredKTQuantizer(base):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from kt_sft.loading.quantizer import KTQuantizer

            return KTQuantizer(*args, **kwargs)

    return DeferredKTQuantizer


def _let_config_win(quantizers: Any) -> None:
    """Wraps `AutoHfQuantizer.merge_quantization_configs`.

    transformers raises there when a checkpoint's own quantization config is of another class than the one passed to
    `from_pretrained`. A KTConfig says how to *run* the experts, whatever they are stored in, so it wins, and carries
    the checkpoint's format to our quantizer.
    """
    merge = quantizers.merge_quantization_configs

    @functools.wraps(merge)
    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if not isinstance(quantization_config_from_args, KTConfig):
            return merge(quantization_config, quantization_config_from_args)
        config = copy.copy(quantization_config_from_args)
        source = _as_dict(quantization_config)
        if source.get("quant_method") != QUANT_METHOD:
            config.source_quantization = source  # type: ignore[attr-defined]
        return config

    quantizers.merge_quantization_configs = staticmethod(merge_quantization_configs)


def _as_dict(quantization_config: Any) -> dict[str, Any]:
    """A checkpoint's quantization config as its config.json has it."""
    found = dict(quantization_config if isinstance(quantization_config, Mapping) else quantization_config.to_dict())
    method = found.get("quant_method", "unknown")
    return found | {"quant_method": str(getattr(method, "value", method))}

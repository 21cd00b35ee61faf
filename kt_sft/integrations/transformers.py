"""Where kt_sft attaches to transformers: its quantizer registry, and two seams beyond it."""

from __future__ import annotations

import copy
import functools
import importlib
from types import ModuleType
from typing import Any

from kt_sft.config import QUANT_METHOD, KTConfig


def register(auto: ModuleType) -> None:
    """Registers config and quantizer in `transformers.quantizers.auto`, and lets KTConfig meet quantised checkpoints.

    Args:
        auto: The module `transformers.quantizers.auto`.
    """
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(KTConfig)
    auto.register_quantizer(QUANT_METHOD)(_made_on_use(auto.HfQuantizer))
    _let_config_win(auto.AutoHfQuantizer)


def guard_saving(modeling: ModuleType) -> None:
    """Wraps `PreTrainedModel.save_pretrained`, once, which tells a quantizer what to save but not where.

    Args:
        modeling: The module `transformers.modeling_utils`.
    """
    save = modeling.PreTrainedModel.save_pretrained
    if getattr(save, "guarded_by_kt_sft", False):
        return

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        check = getattr(getattr(self, "hf_quantizer", None), "check_save_directory", None)
        if check is not None:
            given = args[1] if len(args) > 1 else kwargs.get("state_dict")
            # A model with adapters saves those alone; the Trainer may hand it a state_dict, which does no harm then.
            only_adapters = getattr(self, "_hf_peft_config_loaded", False)
            check(save_directory, state_dict=None if only_adapters else given)
        return save(self, save_directory, *args, **kwargs)

    save_pretrained.guarded_by_kt_sft = True  # type: ignore[attr-defined]
    modeling.PreTrainedModel.save_pretrained = save_pretrained


def _made_on_use(base: type) -> type:
    """A quantizer class that becomes a KTQuantizer when one is asked for.

    The registry is filled while transformers is still being imported, and in processes that never use kt_sft: neither
    can import our loading code and the native engine at that moment.
    """

    class DeferredKTQuantizer(base):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from kt_sft.loading.quantizer import KTQuantizer

            # Not attached yet where transformers.modeling_utils itself was what imported torch first.
            guard_saving(importlib.import_module("transformers.modeling_utils"))
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
        source = _method_name(quantization_config)
        if source != QUANT_METHOD:
            config.source_quantization = source  # type: ignore[attr-defined]
        return config

    quantizers.merge_quantization_configs = staticmethod(merge_quantization_configs)


def _method_name(quantization_config: Any) -> str:
    if isinstance(quantization_config, dict):
        method = quantization_config.get("quant_method", "unknown")
    else:
        method = getattr(quantization_config, "quant_method", "unknown")
    return str(getattr(method, "value", method))

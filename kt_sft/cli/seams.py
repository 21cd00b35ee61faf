"""Whether kt_sft fits the hosts that are installed here: one check for each thing it relies on in them.

A check says what is wrong, or nothing. The tests run the same checks, so what CI holds is what `kt-sft doctor` shows.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

Check = Callable[[], str | None]


def check_all() -> list[dict[str, Any]]:
    """Every seam's `name`, and its `problem` or None."""
    return [{"name": name, "problem": _problem(check)} for name, check in SEAMS.items()]


def _problem(check: Check) -> str | None:
    try:
        return check()
    except Exception as error:  # whatever a host does when it is imported or has lost a name
        return f"{type(error).__name__}: {error}"


def _entry_point() -> str | None:
    import torch

    points = [point for point in importlib.metadata.entry_points(group="torch.backends") if point.name == "kt_sft"]
    if not points:
        return "torch does not find kt_sft's entry point; install kt_sft with pip"
    if not torch._is_device_backend_autoload_enabled():
        return "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from calling kt_sft"
    return None


def _hooks() -> str | None:
    from kt_sft.integrations import autoload

    return "; ".join(autoload.unattached()) or None


def _recipe_key() -> str | None:
    parser = importlib.import_module("llamafactory.hparams.parser")
    hparams = importlib.import_module("llamafactory.hparams")
    if "kt_sft" not in hparams.ModelArguments.__dataclass_fields__:
        return "LLaMA-Factory's ModelArguments have no field kt_sft"
    if hparams.ModelArguments not in parser._TRAIN_ARGS or hparams.ModelArguments not in parser._INFER_ARGS:
        return "LLaMA-Factory's parser does not take the ModelArguments that know kt_sft"
    return None


def _configure_quantization() -> str | None:
    quantization = importlib.import_module("llamafactory.model.model_utils.quantization")
    patcher = importlib.import_module("llamafactory.model.patcher")
    if patcher.configure_quantization is not quantization.configure_quantization:
        return "LLaMA-Factory loads models with another configure_quantization than kt_sft wraps"
    return _takes(
        quantization.configure_quantization, ["config", "tokenizer", "model_args", "is_trainable", "init_kwargs"]
    )


def _patch_model() -> str | None:
    patcher = importlib.import_module("llamafactory.model.patcher")
    loader = importlib.import_module("llamafactory.model.loader")
    if loader.patch_model is not patcher.patch_model:
        return "LLaMA-Factory finishes models with another patch_model than kt_sft wraps"
    return _takes(patcher.patch_model, ["model", "tokenizer", "model_args", "is_trainable", "add_valuehead"])


def _registry() -> str | None:
    auto = importlib.import_module("transformers.quantizers.auto")
    known = "kt_sft" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING and "kt_sft" in auto.AUTO_QUANTIZER_MAPPING
    return None if known else "transformers' registries of quantizers do not know kt_sft"


def _merge_configs() -> str | None:
    auto = importlib.import_module("transformers.quantizers.auto")
    merge = auto.AutoHfQuantizer.merge_quantization_configs
    if not hasattr(merge, "__wrapped__"):
        return "kt_sft is not attached to AutoHfQuantizer.merge_quantization_configs"
    return _takes(merge, ["quantization_config", "quantization_config_from_args"])


def _quantizer_hooks() -> str | None:
    base = importlib.import_module("transformers.quantizers.base").HfQuantizer
    return (
        _takes(base._process_model_before_weight_loading, ["self", "model", "kwargs"])
        or _takes(base._process_model_after_weight_loading, ["self", "model", "kwargs"])
        or _takes(base.get_state_dict_and_metadata, ["self", "model"])
        or _takes(base.update_device_map, ["self", "device_map"])
    )


def _saving() -> str | None:
    modeling = importlib.import_module("transformers.modeling_utils")
    save = modeling.PreTrainedModel.save_pretrained
    if not hasattr(save, "__wrapped__"):
        return "kt_sft is not attached to PreTrainedModel.save_pretrained"
    given = list(inspect.signature(inspect.unwrap(save)).parameters)[:5]
    expected = ["self", "save_directory", "is_main_process", "state_dict", "push_to_hub"]
    return None if given == expected else f"save_pretrained takes {', '.join(given)} first"


def _checkpoints() -> str | None:
    trainer = importlib.import_module("transformers.trainer").Trainer
    for name, expected in (
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
    ):
        method = getattr(trainer, name)
        wrong = _takes(method, expected) if hasattr(method, "__wrapped__") else f"kt_sft is not attached to {name}"
        if wrong is not None:
            return wrong
    return None


def _steps() -> str | None:
    trainer = importlib.import_module("transformers.trainer").Trainer
    if not hasattr(trainer.training_step, "__wrapped__"):
        return "kt_sft is not attached to Trainer.training_step"
    accelerator = importlib.import_module("accelerate").Accelerator
    if not isinstance(accelerator.sync_gradients, property):
        return "accelerate's Accelerator has no sync_gradients"
    return _takes(trainer.training_step, ["self", "model", "inputs", "num_items_in_batch"]) or _takes(
        accelerator.backward, ["self", "loss", "kwargs"]
    )


def _key_mapping() -> str | None:
    modeling = importlib.import_module("transformers.modeling_utils")
    attached = hasattr(modeling.PreTrainedModel.from_pretrained, "__wrapped__")
    return None if attached else "kt_sft is not attached to PreTrainedModel.from_pretrained"


def _conversions() -> str | None:
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping")
    for name in ("WeightRenaming", "WeightConverter", "MergeModulelist", "Concatenate", "Transpose"):
        if not hasattr(loading, name):
            return f"transformers.core_model_loading has no {name}"
    return _takes(
        loading.rename_source_key,
        ["source_key", "weight_renamings", "weight_converters", "prefix", "meta_state_dict"],
    ) or _takes(
        mapping.get_model_conversion_mapping,
        ["model", "key_mapping", "hf_quantizer", "add_legacy"],
    )


def _experts_interface() -> str | None:
    experts = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeExperts
    return _takes(experts.forward, ["self", "hidden_states", "top_k_index", "top_k_weights"])


def _takes(function: Any, expected: list[str]) -> str | None:
    given = list(inspect.signature(inspect.unwrap(function)).parameters)
    if given == expected:
        return None
    return f"{function.__qualname__} takes ({', '.join(given)}), kt_sft expects ({', '.join(expected)})"


#: Seam -> its check, in the order a run meets them.
SEAMS: dict[str, Check] = {
    "torch: entry point": _entry_point,
    "LLaMA-Factory: hooks": _hooks,
    "LLaMA-Factory: recipe key": _recipe_key,
    "LLaMA-Factory: model loading": _configure_quantization,
    "LLaMA-Factory: loaded models": _patch_model,
    "transformers: quantizer registry": _registry,
    "transformers: quantised checkpoints": _merge_configs,
    "transformers: loading hooks": _quantizer_hooks,
    "transformers: renamed keys": _key_mapping,
    "transformers: saving": _saving,
    "transformers: checkpoints": _checkpoints,
    "transformers: training steps": _steps,
    "transformers: weight conversions": _conversions,
    "transformers: experts": _experts_interface,
}

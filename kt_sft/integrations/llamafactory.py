"""Where kt_sft attaches to LLaMA-Factory: the recipe key `kt_sft:`, the model loading, and what is refused.

Every function here is called with a module of LLaMA-Factory right after that module has run, so what other modules
import from it is already ours.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from kt_sft.config import ConfigError, KTConfig
from kt_sft.integrations import autoload
from kt_sft.integrations.adapters import (
    adapter_names,
    check_adapter,
    check_dropout,
    check_resumed,
    continued_adapter,
    loading_settings,
)
from kt_sft.integrations.checkpoints import FoundCheckpoint, check_complete, mark_found, settle_resumed
from kt_sft.integrations.host_memory import check_parallel, check_training
from kt_sft.integrations.memory_check import check_before_loading, remember_setup
from kt_sft.integrations.peft import target_parameters
from kt_sft.integrations.peft_configs import trained_dropout
from kt_sft.integrations.ready_stores import check_export


class Absent(enum.Enum):
    """The field's value in a recipe without the key: nothing that YAML, JSON or a command line can write."""

    ABSENT = "no kt_sft block"

    def __str__(self) -> str:
        return self.value


ABSENT = Absent.ABSENT

_HELP = (
    "Run the routed experts on the CPU with kt_sft: a block of its settings, {} for the defaults (or a JSON string)."
)

#: Settings of a recipe that exclude kt_sft, with the way out.
_EXCLUDED_MODEL_ARGUMENTS = {
    "quantization_bit": "remove quantization_bit; the experts' format is kt_sft's expert_format",
    "export_quantization_bit": "export the merged model first, then quantise it without kt_sft",
    "use_kt": "remove use_kt and the kt_* keys",
    "use_unsloth": "remove use_unsloth",
    "mixture_of_depths": "remove mixture_of_depths",
    "train_from_scratch": "remove train_from_scratch: frozen experts must come from a checkpoint",
}
_EXCLUDED_FINETUNING_ARGUMENTS = {
    "use_dora": "remove use_dora and train plain LoRA",
    "pissa_init": "remove pissa_init and train plain LoRA",
    "use_mca": "remove USE_MCA from the environment",
    "use_hyper_parallel": "remove use_hyper_parallel",
}


def extend_model_arguments(module: ModuleType) -> None:
    """Adds the field `kt_sft` to `ModelArguments`, so that YAML, overrides, --help, chat, api and export know it.

    Args:
        module: `llamafactory.hparams.model_args`.
    """
    base: Any = module.ModelArguments

    @dataclasses.dataclass
    class ModelArguments(base):
        kt_sft: dict | str | None = dataclasses.field(default=ABSENT, metadata={"help": _HELP})  # type: ignore[assignment]

        def __post_init__(self) -> None:
            super().__post_init__()
            self.kt_sft = _read_block(self.kt_sft)
            if self.kt_sft is not ABSENT:
                _refuse_failures(autoload.unattached())
                _check_model_arguments(self)

        def to_dict(self) -> dict[str, Any]:
            """As LLaMA-Factory gives it to loggers: JSON, so without our marker."""
            return {key: value for key, value in super().to_dict().items() if value is not ABSENT}

    ModelArguments.__module__ = base.__module__
    ModelArguments.__qualname__ = base.__qualname__
    ModelArguments.__doc__ = base.__doc__
    module.ModelArguments = ModelArguments  # type: ignore[attr-defined]


def settle_package(package: ModuleType) -> None:
    """Makes `llamafactory.hparams` give out the extended `ModelArguments`, also where it had imported the plain one.

    Args:
        package: `llamafactory.hparams`.
    """
    package.ModelArguments = sys.modules["llamafactory.hparams.model_args"].ModelArguments  # type: ignore[attr-defined]


def check_parsed_arguments(parser: ModuleType) -> None:
    """Wraps `get_train_args`, and `get_infer_args` of chat, api and export, to refuse what kt_sft cannot do.

    Args:
        parser: `llamafactory.hparams.parser`.
    """
    parse_train, parse_infer = parser.get_train_args, parser.get_infer_args

    @functools.wraps(parse_train)
    def get_train_args(*args: Any, **kwargs: Any) -> Any:
        parsed = parse_train(*args, **kwargs)
        model_args, _, training_args, finetuning_args, _ = parsed
        settings = config_of(model_args)
        if settings is not None:
            _check_finetuning_arguments(finetuning_args)
            _check_other_adapters(model_args, finetuning_args)
            _check_training_arguments(training_args)
            check_training(settings, training_args, finetuning_args)
            _check_trained_adapter(model_args, finetuning_args, training_args)
            remember_setup(settings, *parsed)
        if isinstance(training_args.resume_from_checkpoint, FoundCheckpoint):
            training_args.resume_from_checkpoint = str(training_args.resume_from_checkpoint)
        return parsed

    @functools.wraps(parse_infer)
    def get_infer_args(*args: Any, **kwargs: Any) -> Any:
        parsed = parse_infer(*args, **kwargs)
        model_args, _, finetuning_args, _ = parsed
        if config_of(model_args) is not None:
            _check_finetuning_arguments(finetuning_args)
            check_export(model_args)
        return parsed

    mark_found(parser)
    parser.get_train_args = get_train_args  # type: ignore[attr-defined]
    parser.get_infer_args = get_infer_args  # type: ignore[attr-defined]


def extend_quantization(module: ModuleType) -> None:
    """Wraps `configure_quantization`, the place that hands `quantization_config` to `from_pretrained`.

    Args:
        module: `llamafactory.model.model_utils.quantization`.
    """
    configure: Callable[..., None] = module.configure_quantization

    @functools.wraps(configure)
    def configure_quantization(
        config: Any, tokenizer: Any, model_args: Any, is_trainable: bool, init_kwargs: dict[str, Any]
    ) -> None:
        settings = config_of(model_args)
        if settings is None:
            configure(config, tokenizer, model_args, is_trainable, init_kwargs)
            return
        from kt_sft.loading.sources.methods import check_config

        _show_log()
        check_config(config)  # transformers refuses some of these itself, without a name
        if is_trainable:
            check_before_loading(model_args, settings)
        init_kwargs["quantization_config"] = settings

    module.configure_quantization = configure_quantization  # type: ignore[attr-defined]


def extend_adapters(module: ModuleType) -> None:
    """Wraps `get_peft_model`, with which a new adapter is made: `lora_experts` puts it on the routed experts, too.

    Args:
        module: `llamafactory.model.adapter`.
    """
    make: Callable[..., Any] = module.get_peft_model

    @functools.wraps(make)
    def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        settings = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        if isinstance(settings, KTConfig) and settings.lora_experts:
            peft_config.target_parameters = target_parameters(model)
        return make(model, peft_config, *args, **kwargs)

    module.get_peft_model = get_peft_model  # type: ignore[attr-defined]


def extend_v1_adapters(module: ModuleType) -> None:
    """Likewise in LLaMA-Factory's v1.

    Args:
        module: `llamafactory.v1.plugins.model_plugins.peft`.
    """
    extend_adapters(module)


def check_loaded_model(patcher: ModuleType) -> None:
    """Wraps `patch_model`, which every loaded model passes before it gets adapters: was the quantizer used?

    Args:
        patcher: `llamafactory.model.patcher`.
    """
    patch: Callable[..., None] = patcher.patch_model

    @functools.wraps(patch)
    def patch_model(model: Any, tokenizer: Any, model_args: Any, is_trainable: bool, add_valuehead: bool) -> None:
        settings = config_of(model_args)
        if settings is not None:
            _check_quantizer_was_used(model)
        if settings is not None and settings.lora_experts and is_trainable:
            target_parameters(model)
        patch(model, tokenizer, model_args, is_trainable, add_valuehead)

    patcher.patch_model = patch_model  # type: ignore[attr-defined]


def register_v1(module: ModuleType) -> None:
    """Registers kt_sft in the plugin registry of LLaMA-Factory's v1: `quant_config: {name: kt_sft, ...}`.

    Args:
        module: `llamafactory.v1.plugins.model_plugins.quantization`.
    """

    @module.QuantizationPlugin("kt_sft").register()
    def quantization_with_kt_sft(
        init_kwargs: dict[str, Any], model_args: Any = None, is_trainable: bool = False, **_: Any
    ) -> dict[str, Any]:
        _refuse_failures(autoload.failures())
        _check_v1_tuning(dict(model_args.peft_config or {}), is_trainable)
        settings = {key: value for key, value in dict(model_args.quant_config).items() if key != "name"}
        _show_log()
        init_kwargs["quantization_config"] = KTConfig.from_dict(settings)
        if is_trainable:
            check_parallel(init_kwargs["quantization_config"])
        return init_kwargs


def _check_v1_tuning(peft_config: dict[str, Any], is_trainable: bool) -> None:
    if is_trainable and peft_config.get("name") != "lora":
        raise ConfigError(
            f"kt_sft: fine-tuning of the kind {peft_config.get('name', 'full')} cannot train experts that stay frozen "
            "on the CPU; set peft_config: {name: lora, ...}"
        )
    if is_trainable and peft_config.get("use_dora"):
        raise ConfigError(f"kt_sft: cannot be combined with use_dora; {_EXCLUDED_FINETUNING_ARGUMENTS['use_dora']}")
    for adapter in adapter_names(peft_config.get("adapter_name_or_path")):
        check_adapter(adapter)


def config_of(model_args: Any) -> KTConfig | None:
    """The settings in a recipe's `kt_sft:` block, or None where the recipe has none.

    Raises:
        ConfigError: The block holds something unknown or impossible, or kt_sft could not attach everywhere.
    """
    block: Any = getattr(model_args, "kt_sft", ABSENT)
    if block is ABSENT:
        return None
    _refuse_failures(autoload.failures())
    return KTConfig.from_dict(block)


def _refuse_failures(failures: list[str]) -> None:
    """With a part of us missing a recipe would train something else than it says."""
    if failures:
        raise ConfigError(
            f"kt_sft: {'; '.join(failures)}. This version of kt_sft does not fit the installed LLaMA-Factory or "
            "transformers; install the versions kt_sft names, or remove the kt_sft block"
        )


def _check_quantizer_was_used(model: Any) -> None:
    """Routed experts that are still the model's own would train on the accelerator, whatever the recipe says."""
    from kt_sft.loading.layout import find_experts

    if find_experts(model):
        raise ConfigError(
            f"kt_sft: {type(model).__name__} was loaded without kt_sft although the recipe has a kt_sft block; "
            "LLaMA-Factory or transformers has changed how it loads models, so install the versions kt_sft names"
        )


def _read_block(block: Any) -> Any:
    """Checks a block; returns it as a plain dict, or ABSENT."""
    if block is ABSENT:
        return ABSENT
    if block is None:
        raise ConfigError("kt_sft: the block is empty; write `kt_sft: {}` for the defaults, or remove the key")
    if isinstance(block, str):
        try:
            block = json.loads(block)
        except json.JSONDecodeError as error:
            raise ConfigError(f"kt_sft: {block!r} is no JSON object ({error})") from error
    KTConfig.from_dict(block)
    return dict(block)


def exclusions(recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe sets that cannot be combined with a `kt_sft:` block, one sentence each, with the way out."""
    excluded = _EXCLUDED_MODEL_ARGUMENTS | _EXCLUDED_FINETUNING_ARGUMENTS
    return [
        f"{name} cannot be combined with kt_sft; {way_out}" for name, way_out in excluded.items() if recipe.get(name)
    ]


def _refuse(arguments: Any, excluded: dict[str, str]) -> None:
    for name, way_out in excluded.items():
        if getattr(arguments, name, None) not in (None, False):
            raise ConfigError(f"kt_sft: cannot be combined with {name}; {way_out}")


def _check_model_arguments(model_args: Any) -> None:
    _refuse(model_args, _EXCLUDED_MODEL_ARGUMENTS)
    if model_args.infer_backend != "huggingface":
        raise ConfigError("kt_sft: chat and api run with infer_backend huggingface only; remove infer_backend")
    adapters = adapter_names(model_args.adapter_name_or_path)
    if len({os.path.realpath(adapter) if os.path.isdir(adapter) else adapter for adapter in adapters}) < len(adapters):
        raise ConfigError(f"kt_sft: adapter_name_or_path names an adapter twice ({', '.join(adapters)}); name it once")
    _check_adapters(model_args, adapters)


def _check_adapters(model_args: Any, adapters: Any) -> str | None:
    """Looks at each; returns the name of a tensor of routed experts of the last one, if it has any."""
    key = None
    for adapter in adapter_names(adapters):
        key = check_adapter(adapter, **loading_settings(vars(model_args)))
    return key


def _check_other_adapters(model_args: Any, finetuning_args: Any) -> None:
    """Adapters that training stages load beside the trained one: LLaMA-Factory hands our block to their models, too."""
    _check_adapters(model_args, finetuning_args.ref_model_adapters)
    _check_adapters(model_args, finetuning_args.reward_model_adapters)
    if finetuning_args.reward_model is not None and finetuning_args.reward_model_type in ("lora", "oft"):
        check_adapter(finetuning_args.reward_model)  # loaded without adapter_folder, from the hub's default place


def _check_finetuning_arguments(finetuning_args: Any) -> None:
    if finetuning_args.finetuning_type != "lora":
        raise ConfigError(
            f"kt_sft: finetuning_type {finetuning_args.finetuning_type} cannot train experts that stay frozen on the "
            "CPU; set finetuning_type: lora (or leave it out, to serve or export a model as it is)"
        )
    _refuse(finetuning_args, _EXCLUDED_FINETUNING_ARGUMENTS)


def _check_training_arguments(training_args: Any) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.modeling_utils import is_fsdp_enabled

    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "kt_sft: DeepSpeed ZeRO-3 cannot partition experts that live in the engine; use ZeRO-2 or DDP"
        )
    if getattr(training_args, "fsdp", None) or is_fsdp_enabled():
        raise ConfigError("kt_sft: FSDP is not supported in this version; use DDP")


def _check_trained_adapter(model_args: Any, finetuning_args: Any, training_args: Any) -> None:
    """Whether what the run goes on training covers routed experts if, and only if, the recipe says so."""
    if not training_args.do_train:
        return
    settings = config_of(model_args)
    assert settings is not None
    adapters = adapter_names(model_args.adapter_name_or_path)
    continued = continued_adapter(vars(model_args) | vars(finetuning_args))
    if continued is not None and settings.lora_experts and _check_adapters(model_args, continued) is None:
        raise ConfigError(
            f"kt_sft: lora_experts is set, but training goes on with the adapter {continued}, which has no weights for "
            "routed experts; set create_new_adapter: true to train a new one, or leave lora_experts out"
        )
    dropout = finetuning_args.lora_dropout if settings.lora_experts else 0.0
    if continued is not None:
        dropout = trained_dropout(continued, loading_settings(vars(model_args)))
    merged = [each for each in adapters if each != continued and _check_adapters(model_args, each) is not None]
    check_dropout(dropout, merged, unsloth_gc=model_args.use_unsloth_gc)
    _show_log()
    resumed = settle_resumed(training_args, finetuning_args.stage)
    if resumed is not None:
        check_resumed(resumed, settings.lora_experts if continued is None else None)
        check_complete(resumed, training_args, finetuning_args.stage)


def _show_log() -> None:
    """Lets the log lines of kt_sft be seen; LLaMA-Factory shows only its own and transformers'."""
    logger = logging.getLogger("kt_sft")
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(levelname)s|%(name)s] %(asctime)s >> %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

"""The recipe key: what it accepts and refuses before anything is loaded, and that every seam knows it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from commands import run_command
from transformers import HfArgumentParser

from kt_sft.config import ConfigError, KTConfig
from kt_sft.integrations import autoload
from kt_sft.integrations.llamafactory import ABSENT, config_of

SETTINGS = ", ".join(field.name for field in dataclasses.fields(KTConfig) if field.name != "quant_method")

BLOCKS = {
    "unknown key": ({"expert_fromat": "bf16"}, f"unknown setting 'expert_fromat'; the settings are {SETTINGS}"),
    "ill-typed": ({"num_threads": "four"}, "num_threads must be a whole number of at least 1, got 'four'"),
    "unknown format": ({"expert_format": "int3"}, "expert_format must be one of auto, bf16, int8"),
    "odd group": ({"expert_format": "int4", "group_size": 48}, "group_size must be 0 (one scale per row) or a power"),
    "fixed group": ({"expert_format": "mxfp4", "group_size": 64}, "group_size must be 32 for mxfp4 experts, got 64"),
    "group of bf16": ({"group_size": 64}, "group_size applies to quantised formats only"),
    "zero point": ({"expert_format": "int8", "zero_point": True}, "zero_point applies to expert_format int4 only"),
    "no block": (5, "must be a block of settings"),
    "a list": (["bf16"], "must be a block of settings"),
    "empty": (None, "the block is empty; write `kt_sft: {}`"),
    "empty string": ("", "is no JSON object"),
    "no JSON": ("{expert_format: bf16}", "is no JSON object"),
    "adapters on integers": (
        {"lora_experts": True, "expert_format": "int8", "compute": "int8"},
        "lora_experts cannot be combined with compute 'int8'",
    ),
}

COMBINATIONS = {
    "full": ({"finetuning_type": "full"}, "finetuning_type full cannot train experts"),
    "freeze": ({"finetuning_type": "freeze"}, "finetuning_type freeze cannot train experts"),
    "oft": ({"finetuning_type": "oft"}, "finetuning_type oft cannot train experts"),
    "DoRA": ({"use_dora": True}, "cannot be combined with use_dora; remove use_dora and train plain LoRA"),
    "PiSSA": ({"pissa_init": True}, "cannot be combined with pissa_init"),
    "quantization_bit": ({"quantization_bit": 4}, "cannot be combined with quantization_bit"),
    "unsloth": ({"use_unsloth": True}, "cannot be combined with use_unsloth"),
    "KTransformers": ({"use_kt": True}, "cannot be combined with use_kt"),
    "from scratch": ({"train_from_scratch": True}, "cannot be combined with train_from_scratch"),
    "FSDP": ({"fsdp": "full_shard"}, "FSDP is not supported"),
}


@pytest.mark.parametrize(("block", "message"), BLOCKS.values(), ids=BLOCKS)
def test_bad_blocks(block: Any, message: str, parse: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(kt_sft=block)
    assert message in str(error.value)


@pytest.mark.parametrize(("changes", "message"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_bad_combinations(changes: dict[str, Any], message: str, parse: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(kt_sft={}, **changes)
    assert message in str(error.value)


def test_dropout_on_experts_with_a_checkpointing_that_draws_anew(parse: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="use_unsloth_gc does not restore them; remove use_unsloth_gc"):
        parse(kt_sft={"lora_experts": True}, use_unsloth_gc=True, lora_dropout=0.1)
    parse(kt_sft={"lora_experts": True}, use_unsloth_gc=True, lora_dropout=0.0)
    parse(kt_sft={}, use_unsloth_gc=True, lora_dropout=0.1)


@pytest.mark.parametrize("changes", [{"finetuning_type": "full"}, {"use_dora": True}])
def test_without_the_key_nothing_is_refused(changes: dict[str, Any], parse: Callable[..., Any]) -> None:
    model_args = parse(**changes)[0]
    assert model_args.kt_sft is ABSENT
    assert "kt_sft" not in model_args.to_dict()


def test_zero_3_is_refused(parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # deepspeed is not a requirement of the tests: only its state, as transformers reports it, is made.
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match="ZeRO-3"):
        parse(kt_sft={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetuning_type": "full"}, "finetuning_type full cannot train experts that stay frozen on the CPU; set"),
        ({"finetuning_type": "oft"}, "finetuning_type oft cannot train experts"),
        ({"use_dora": True}, "cannot be combined with use_dora"),
    ],
)
def test_chat_api_and_export_refuse_what_training_does(changes: Any, message: str, tiny_moe: Path) -> None:
    from llamafactory.hparams import get_infer_args

    recipe = {"model_name_or_path": str(tiny_moe), "template": "qwen"}
    assert get_infer_args(recipe | {"kt_sft": {}})[0].kt_sft == {}
    assert get_infer_args(recipe | changes)[0].kt_sft is ABSENT
    with pytest.raises(ConfigError, match=message):
        get_infer_args(recipe | changes | {"kt_sft": {}})


def test_an_inference_engine_of_its_own_is_refused(tiny_moe: Path) -> None:
    from llamafactory.hparams import get_infer_args

    recipe = {"model_name_or_path": str(tiny_moe), "template": "qwen", "kt_sft": {}}
    get_infer_args(recipe)
    with pytest.raises(ConfigError, match="infer_backend huggingface only"):
        get_infer_args(recipe | {"infer_backend": "vllm"})


def test_a_json_string_is_as_good_as_a_block(parse: Callable[..., Any]) -> None:
    assert parse(kt_sft='{"num_threads": 2}')[0].kt_sft == {"num_threads": 2}


def test_the_command_line_knows_the_key(tiny_moe: Path) -> None:
    from llamafactory.hparams import ModelArguments

    parser = HfArgumentParser([ModelArguments])
    assert "--kt_sft" in parser.format_help()
    (arguments,) = parser.parse_args_into_dataclasses(
        ["--model_name_or_path", str(tiny_moe), "--kt_sft", '{"num_threads": 2}']
    )
    assert arguments.kt_sft == {"num_threads": 2}


def test_copies_of_the_arguments_keep_the_block(parse: Callable[..., Any]) -> None:
    # How LLaMA-Factory makes the arguments of a DPO reference model.
    model_args = parse(kt_sft={"num_threads": 2})[0]
    copy = type(model_args).copyfrom(model_args, model_name_or_path="elsewhere")
    assert copy.kt_sft == {"num_threads": 2}
    assert copy.model_name_or_path == "elsewhere"
    plain = parse()[0]
    assert type(plain).copyfrom(plain).kt_sft is ABSENT


def test_bad_block_on_the_command_line(write_recipe: Callable[..., Path]) -> None:
    result = run_command(["llamafactory-cli", "train", str(write_recipe(kt_sft={})), "kt_sft.num_threads=many"])

    assert result.returncode != 0
    assert "kt_sft: num_threads must be a whole number of at least 1, got 'many'" in result.stdout
    assert "Loading" not in result.stdout


def test_registration_in_v1() -> None:
    pytest.importorskip("llamafactory.v1")
    plugins = importlib.import_module("llamafactory.v1.plugins.model_plugins.quantization")
    arguments = SimpleNamespace(quant_config={"name": "kt_sft", "num_threads": 2}, peft_config=None)

    init_kwargs = plugins.QuantizationPlugin("kt_sft")({"device_map": "cpu"}, model_args=arguments)

    assert init_kwargs["device_map"] == "cpu"
    assert isinstance(init_kwargs["quantization_config"], KTConfig)
    assert init_kwargs["quantization_config"].num_threads == 2
    arguments.quant_config["threads"] = 2
    with pytest.raises(ConfigError, match="unknown setting 'threads'"):
        plugins.QuantizationPlugin("kt_sft")({}, model_args=arguments)


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (None, "fine-tuning of the kind full cannot train experts"),
        ({"name": "freeze"}, "fine-tuning of the kind freeze cannot train experts"),
        ({"name": "lora", "use_dora": True}, "cannot be combined with use_dora"),
        ({"name": "lora", "adapter_name_or_path": "/missing/adapter"}, "the adapter /missing/adapter has no"),
    ],
)
def test_what_v1_cannot_tune_is_refused(peft_config: dict[str, Any] | None, message: str) -> None:
    pytest.importorskip("llamafactory.v1")
    plugins = importlib.import_module("llamafactory.v1.plugins.model_plugins.quantization")
    arguments = SimpleNamespace(quant_config={"name": "kt_sft"}, peft_config=peft_config)
    with pytest.raises(ConfigError, match=message):
        plugins.QuantizationPlugin("kt_sft")({}, model_args=arguments, is_trainable=True)


def test_a_model_loads_through_v1(tiny_moe: Path) -> None:
    pytest.importorskip("llamafactory.v1")
    script = (
        "import sys; from llamafactory.v1.config import ModelArguments\n"
        "from llamafactory.v1.core.model_engine import ModelEngine\n"
        "from kt_sft import CpuExperts\n"
        "lora = {'name': 'lora', 'r': 4, 'lora_alpha': 8, 'target_modules': 'all'}\n"
        "arguments = ModelArguments(model=sys.argv[1], quant_config={'name': 'kt_sft'}, peft_config=lora)\n"
        "model = ModelEngine(arguments, is_train=True).model\n"
        "assert sum(isinstance(module, CpuExperts) for module in model.modules()) == 2\n"
        "assert any(parameter.requires_grad for parameter in model.parameters())\n"
    )
    result = run_command(["python", "-c", script, str(tiny_moe)], environment={"USE_V1": "1"})
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "first",
    ["llamafactory.hparams.model_args", "transformers", "llamafactory.model"],
)
def test_the_key_is_known_whichever_module_is_imported_first(first: str) -> None:
    script = (
        f"import {first}\n"
        "from llamafactory.hparams import ModelArguments, parser\n"
        "from llamafactory.model import patcher\n"
        "import transformers.quantizers.auto as auto\n"
        "assert 'kt_sft' in ModelArguments.__dataclass_fields__\n"
        "assert parser.ModelArguments is ModelArguments and parser._TRAIN_ARGS[0] is ModelArguments\n"
        "assert hasattr(patcher.configure_quantization, '__wrapped__')\n"
        "assert hasattr(parser.get_train_args, '__wrapped__')\n"
        "assert 'kt_sft' in auto.AUTO_QUANTIZER_MAPPING\n"
    )
    result = run_command(["python", "-c", script])
    assert result.returncode == 0, result.stdout


HOOKS = [pytest.param(name, hook, id=hook[1]) for name, hook in autoload._HOOKS.items()]


@pytest.mark.parametrize(("name", "hook"), HOOKS)
def test_a_host_that_moved_warns_and_refuses_the_key(
    name: str, hook: tuple[str, str], parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(module: ModuleType) -> None:
        raise AttributeError(f"{module.__name__} has changed")

    args = parse(kt_sft={})[0]
    monkeypatch.setattr(autoload, "_outcomes", dict(autoload._outcomes))
    monkeypatch.setattr(f"{hook[0]}.{hook[1]}", broken)

    with pytest.warns(RuntimeWarning, match=f"could not attach to {name}: .*recipes with a kt_sft block will not run"):
        autoload._call(hook, ModuleType(name))

    with pytest.raises(ConfigError, match=f"kt_sft: could not attach to {name}"):
        parse(kt_sft={})
    with pytest.raises(ConfigError, match=f"kt_sft: could not attach to {name}"):
        config_of(args)  # a hook that broke between the parsing and the loading
    assert parse()[0].kt_sft is ABSENT


@pytest.mark.parametrize(
    "hook", ["extend_model_arguments", "check_parsed_arguments", "extend_quantization", "check_loaded_model"]
)
def test_a_command_with_a_broken_hook_trains_nothing(hook: str, write_recipe: Callable[..., Path]) -> None:
    script = (
        "import sys\n"
        "import kt_sft.integrations.llamafactory as ours\n"
        "def broken(module): raise AttributeError('changed')\n"
        "setattr(ours, sys.argv[1], broken)\n"
        "from llamafactory.train.tuner import run_exp\n"
        "import yaml\n"
        "run_exp(yaml.safe_load(open(sys.argv[2])))\n"
    )
    result = run_command(["python", "-c", script, hook, str(write_recipe(kt_sft={}))])

    assert result.returncode != 0
    assert "kt_sft" in result.stdout.splitlines()[-1] or "kt_sft" in result.stdout.splitlines()[-2]
    assert "Running training" not in result.stdout


def test_a_model_loaded_without_the_quantizer_is_refused(write_recipe: Callable[..., Path]) -> None:
    # transformers that no longer heeds what configure_quantization hands over.
    script = (
        "import sys, yaml\n"
        "import llamafactory.model.loader as loader\n"
        "patch_config = loader.patch_config\n"
        "def forgetful(config, tokenizer, model_args, init_kwargs, is_trainable):\n"
        "    patch_config(config, tokenizer, model_args, init_kwargs, is_trainable)\n"
        "    del init_kwargs['quantization_config']\n"
        "loader.patch_config = forgetful\n"
        "from llamafactory.train.tuner import run_exp\n"
        "run_exp(yaml.safe_load(open(sys.argv[1])))\n"
    )
    result = run_command(["python", "-c", script, str(write_recipe(kt_sft={}))])

    assert result.returncode != 0
    assert "Qwen3MoeForCausalLM was loaded without kt_sft although the recipe has a kt_sft block" in result.stdout
    assert "Running training" not in result.stdout


def test_models_are_extended_although_transformers_imported_torch_first() -> None:
    script = (
        "import transformers.modeling_utils\n"
        "from kt_sft import KTConfig\n"
        "from transformers import AutoModelForCausalLM, PreTrainedModel\n"
        "assert hasattr(PreTrainedModel.save_pretrained, '__wrapped__')\n"
        "assert hasattr(PreTrainedModel.from_pretrained, '__wrapped__')\n"
    )
    result = run_command(["python", "-c", script])
    assert result.returncode == 0, result.stdout


def test_a_process_without_hosts_imports_none() -> None:
    script = (
        "import torch, sys\n"
        "hosts = {'transformers', 'llamafactory', 'peft', 'kt_sft.experts', 'kt_sft.config'} & set(sys.modules)\n"
        "assert 'kt_sft.integrations.autoload' in sys.modules and not hosts, hosts\n"
    )
    result = run_command(["python", "-c", script])
    assert result.returncode == 0, result.stdout

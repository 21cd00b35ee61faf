"""The recipe key: what it accepts and refuses before anything is loaded, and that every seam knows it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run_command
from safetensors.torch import save_file
from transformers import HfArgumentParser

from kt_sft.config import ConfigError, KTConfig

SETTINGS = "expert_format, group_size, zero_point, compute, num_threads, activation_policy, lora_experts"

BLOCKS = {
    "unknown key": ({"expert_fromat": "bf16"}, f"unknown setting 'expert_fromat'; the settings are {SETTINGS}"),
    "ill-typed": ({"num_threads": "four"}, "num_threads must be a whole number of at least 1, got 'four'"),
    "unknown format": ({"expert_format": "int3"}, "expert_format must be one of auto, bf16, int8"),
    "no block": (5, "must be a block of settings"),
    "a list": (["bf16"], "must be a block of settings"),
    "empty": (None, "the block is empty; write `kt_sft: {}`"),
    "no JSON": ("{expert_format: bf16}", "is no JSON object"),
    "format of a later version": ({"expert_format": "int4"}, "'int4' is not available in this version"),
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


@pytest.fixture
def parse(base_recipe: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """LLaMA-Factory's own parsing of the base recipe with changes."""
    from llamafactory.hparams import get_train_args

    return lambda **changes: get_train_args(base_recipe | {"output_dir": str(tmp_path / "out")} | changes)


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


@pytest.mark.parametrize("changes", [{"finetuning_type": "full"}, {"use_dora": True}])
def test_without_the_key_nothing_is_refused(changes: dict[str, Any], parse: Callable[..., Any]) -> None:
    model_args = parse(**changes)[0]
    assert model_args.kt_sft == ""


def test_zero_3_is_refused(parse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # deepspeed is not a requirement of the tests: only its state, as transformers reports it, is made.
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match="ZeRO-3"):
        parse(kt_sft={})


def test_an_inference_engine_of_its_own_is_refused(tiny_moe: Path) -> None:
    from llamafactory.hparams import get_infer_args

    recipe = {"model_name_or_path": str(tiny_moe), "template": "qwen", "kt_sft": {}}
    get_infer_args(recipe)
    with pytest.raises(ConfigError, match="infer_backend huggingface only"):
        get_infer_args(recipe | {"infer_backend": "vllm"})


def test_an_adapter_on_experts_is_refused(parse: Callable[..., Any], tmp_path: Path) -> None:
    keys = {
        "attention": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "shared": "base_model.model.model.layers.0.mlp.shared_experts.up_proj.lora_A.weight",
        "experts": "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight",
    }
    for name, key in keys.items():
        (tmp_path / name).mkdir()
        save_file({key: torch.zeros(2, 2)}, tmp_path / name / "adapter_model.safetensors")
    fine = f"{tmp_path / 'attention'},{tmp_path / 'shared'}"
    assert parse(kt_sft={}, adapter_name_or_path=fine)[0].kt_sft == {}
    with pytest.raises(ConfigError, match="has weights for routed experts"):
        parse(kt_sft={}, adapter_name_or_path=f"{fine},{tmp_path / 'experts'}")


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
    assert type(plain).copyfrom(plain).kt_sft == ""


def test_bad_block_on_the_command_line(write_recipe: Callable[..., Path]) -> None:
    result = run_command(["llamafactory-cli", "train", str(write_recipe(kt_sft={})), "kt_sft.num_threads=many"])

    assert result.returncode != 0
    assert "kt_sft: num_threads must be a whole number of at least 1, got 'many'" in result.stdout
    assert "Loading" not in result.stdout


def test_registration_in_v1() -> None:
    pytest.importorskip("llamafactory.v1")
    plugins = importlib.import_module("llamafactory.v1.plugins.model_plugins.quantization")
    arguments = SimpleNamespace(quant_config={"name": "kt_sft", "num_threads": 2})

    init_kwargs = plugins.QuantizationPlugin("kt_sft")({"device_map": "cpu"}, model_args=arguments)

    assert init_kwargs["device_map"] == "cpu"
    assert isinstance(init_kwargs["quantization_config"], KTConfig)
    assert init_kwargs["quantization_config"].num_threads == 2
    arguments.quant_config["threads"] = 2
    with pytest.raises(ConfigError, match="unknown setting 'threads'"):
        plugins.QuantizationPlugin("kt_sft")({}, model_args=arguments)


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


def test_a_host_that_moved_warns_and_goes_on_without_us() -> None:
    script = (
        "import sys, types, warnings\n"
        "import kt_sft.integrations.autoload as autoload\n"
        "moved = types.ModuleType('llamafactory.hparams.model_args')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    autoload._call(autoload._AFTER[moved.__name__], moved)\n"
        "assert 'could not attach to llamafactory.hparams.model_args' in str(caught[0].message), caught\n"
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

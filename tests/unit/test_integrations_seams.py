"""What kt_sft relies on in its hosts beyond their documented interfaces. A failure here means upstream has moved."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect

import llamafactory.hparams.parser
import llamafactory.model.patcher
import pytest
import torch
import transformers.quantizers.auto as auto
from llamafactory.hparams import ModelArguments
from llamafactory.model.model_utils import quantization
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, core_model_loading
from transformers.integrations import moe
from transformers.quantizers.base import HfQuantizer

from kt_sft.config import KTConfig
from kt_sft.integrations import autoload


def parameters(function: object) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)  # type: ignore[arg-type]


def test_torch_calls_our_entry_point() -> None:
    assert torch._is_device_backend_autoload_enabled()
    (entry_point,) = (e for e in importlib.metadata.entry_points(group="torch.backends") if e.name == "kt_sft")
    assert entry_point.load() is autoload.arm


@pytest.mark.parametrize("name", sorted({*autoload._BEFORE, *autoload._AFTER}))
def test_every_hooked_module_and_hook_exists(name: str) -> None:
    importlib.import_module(name)
    for hooks in (autoload._BEFORE, autoload._AFTER):
        if name in hooks:
            module, function = hooks[name]
            assert callable(getattr(importlib.import_module(module), function))


class TestLlamaFactory:
    def test_configure_quantization(self) -> None:
        expected = ["config", "tokenizer", "model_args", "is_trainable", "init_kwargs"]
        assert parameters(quantization.configure_quantization) == expected
        assert llamafactory.model.patcher.configure_quantization is quantization.configure_quantization
        assert quantization.configure_quantization.__wrapped__.__module__ == quantization.__name__

    def test_get_train_args_gives_five_parts(self) -> None:
        arguments = inspect.unwrap(llamafactory.hparams.parser.get_train_args)
        assert arguments.__annotations__["return"] == llamafactory.hparams.parser._TRAIN_CLS
        assert [part.__name__ for part in llamafactory.hparams.parser._TRAIN_CLS.__args__] == [
            "ModelArguments",
            "DataArguments",
            "TrainingArguments",
            "FinetuningArguments",
            "GeneratingArguments",
        ]

    def test_the_parser_has_the_extended_arguments(self) -> None:
        assert ModelArguments in llamafactory.hparams.parser._TRAIN_ARGS
        assert ModelArguments in llamafactory.hparams.parser._INFER_ARGS
        assert "kt_sft" in ModelArguments.__dataclass_fields__

    @pytest.mark.parametrize(
        "field", ["quantization_bit", "use_kt", "use_unsloth", "train_from_scratch", "infer_backend"]
    )
    def test_arguments_that_are_refused_exist(self, field: str) -> None:
        assert field in ModelArguments.__dataclass_fields__

    @pytest.mark.parametrize("field", ["finetuning_type", "use_dora", "pissa_init"])
    def test_ways_of_training_that_are_refused_exist(self, field: str) -> None:
        assert field in llamafactory.hparams.FinetuningArguments.__dataclass_fields__


class TestTransformers:
    def test_registry(self) -> None:
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["kt_sft"] is KTConfig
        assert issubclass(auto.AUTO_QUANTIZER_MAPPING["kt_sft"], HfQuantizer)

    def test_merge_quantization_configs(self) -> None:
        merge = auto.AutoHfQuantizer.merge_quantization_configs
        assert parameters(merge) == ["quantization_config", "quantization_config_from_args"]
        merged = merge({"quant_method": "fp8"}, KTConfig(num_threads=3))
        assert isinstance(merged, KTConfig)
        assert (merged.num_threads, merged.source_quantization) == (3, "fp8")
        assert not hasattr(merge({"quant_method": "kt_sft"}, KTConfig()), "source_quantization")

    def test_other_quantised_checkpoints_merge_as_always(self) -> None:
        with pytest.raises(ValueError, match="is quantized with"):
            auto.AutoHfQuantizer.merge_quantization_configs(
                {"quant_method": "gptq", "bits": 4}, auto.BitsAndBytesConfig(load_in_4bit=True)
            )

    def test_hooks_of_a_quantizer(self) -> None:
        assert parameters(HfQuantizer._process_model_before_weight_loading) == ["self", "model", "kwargs"]
        assert parameters(HfQuantizer._process_model_after_weight_loading) == ["self", "model", "kwargs"]
        assert parameters(HfQuantizer.get_state_dict_and_metadata) == ["self", "model"]
        assert parameters(HfQuantizer.update_device_map) == ["self", "device_map"]
        load = inspect.getsource(PreTrainedModel.from_pretrained)
        assert "checkpoint_files=checkpoint_files" in load  # given to the hook that runs before loading
        assert "_weight_conversions" in inspect.getsource(core_model_loading)  # what saving reverts
        save = inspect.getsource(inspect.unwrap(PreTrainedModel.save_pretrained))
        assert "hf_quantizer.get_state_dict_and_metadata(self)" in save

    def test_save_pretrained_is_guarded(self) -> None:
        assert parameters(PreTrainedModel.save_pretrained)[:2] == ["self", "save_directory"]
        assert hasattr(PreTrainedModel.save_pretrained, "__wrapped__")

    def test_rename_source_key(self) -> None:
        expected = ["source_key", "weight_renamings", "weight_converters", "prefix", "meta_state_dict"]
        assert parameters(core_model_loading.rename_source_key) == expected

    def test_the_experts_decorator_marks_instances(self) -> None:
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(
                Qwen3MoeConfig(num_hidden_layers=1, num_experts=2, hidden_size=64, vocab_size=8)
            )
        experts = model.model.layers[0].mlp.experts
        assert (experts.has_gate, experts.has_bias, experts.is_transposed) == (True, False, False)
        assert callable(experts._apply_gate)
        assert parameters(moe.use_experts_implementation)[0] == "experts_class"

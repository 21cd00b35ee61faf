"""What kt_sft relies on in its hosts beyond their documented interfaces. A failure here means upstream has moved."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import llamafactory.chat.chat_model
import llamafactory.extras.constants
import llamafactory.hparams.parser
import llamafactory.model.loader
import llamafactory.model.patcher
import llamafactory.train.callbacks
import llamafactory.train.tuner
import pytest
import safetensors.torch
import torch
import transformers
import transformers.quantizers.auto as auto
from llamafactory.hparams import ModelArguments
from llamafactory.model import adapter
from llamafactory.model.model_utils import checkpointing, quantization
from packaging.version import Version
from peft import LoraConfig, PeftConfig, peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, conversion_mapping, core_model_loading
from transformers.integrations import moe
from transformers.quantizers.base import HfQuantizer

from kt_sft.config import KTConfig
from kt_sft.integrations import adapters, autoload, checkpoints, value_heads
from kt_sft.integrations import llamafactory as ours
from kt_sft.integrations import peft as ours_peft
from kt_sft.lora import ExpertLora, peft_turns_parameters


def parameters(function: object) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)  # type: ignore[arg-type]


def test_torch_calls_our_entry_point() -> None:
    assert torch._is_device_backend_autoload_enabled()
    (entry_point,) = (e for e in importlib.metadata.entry_points(group="torch.backends") if e.name == "kt_sft")
    assert entry_point.load() is autoload.arm


@pytest.mark.parametrize("name", autoload._HOOKS)
def test_every_hooked_module_and_hook_exists(name: str) -> None:
    importlib.import_module(name)
    module, function = autoload._HOOKS[name]
    assert callable(getattr(importlib.import_module(module), function))
    assert autoload._outcomes[module, function] == ""


def test_a_host_that_was_running_when_we_were_armed_is_caught_up_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(ours, "settle_package", lambda module: called.append(module.FINISHED))
    monkeypatch.setattr(autoload, "_HOOKS", {"an_early_host": ("kt_sft.integrations.llamafactory", "settle_package")})
    monkeypatch.setattr(autoload, "_outcomes", {})
    monkeypatch.setattr(autoload, "_running", [])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "an_early_host.py").write_text(
        "from kt_sft.integrations import autoload\n"
        "autoload.arm()\n"  # as `import torch` does
        "import imported_meanwhile\n"
        "FINISHED = 'finished'\n"
    )
    for name in ("imported_meanwhile", "imported_later", "imported_last"):
        (tmp_path / f"{name}.py").write_text("")
    others = [finder for finder in sys.meta_path if not isinstance(finder, autoload._HookFinder)]
    monkeypatch.setattr(sys, "meta_path", others)  # ours is put in by the host

    importlib.import_module("an_early_host")
    assert called == []
    importlib.import_module("imported_later")
    assert called == ["finished"]
    importlib.import_module("imported_last")
    assert called == ["finished"]


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

    def test_get_infer_args_gives_four_parts(self) -> None:
        arguments = inspect.unwrap(llamafactory.hparams.parser.get_infer_args)
        assert arguments.__annotations__["return"] == llamafactory.hparams.parser._INFER_CLS
        assert [part.__name__ for part in llamafactory.hparams.parser._INFER_CLS.__args__] == [
            "ModelArguments",
            "DataArguments",
            "FinetuningArguments",
            "GeneratingArguments",
        ]
        assert hasattr(llamafactory.chat.chat_model.get_infer_args, "__wrapped__")
        assert hasattr(llamafactory.train.tuner.get_infer_args, "__wrapped__")  # export

    def test_what_a_run_resumes_from(self) -> None:
        """Read from the arguments after LLaMA-Factory may have filled it in; True means the Trainer's last one."""
        assert "training_args.resume_from_checkpoint = last_checkpoint" in inspect.getsource(
            inspect.unwrap(llamafactory.hparams.parser.get_train_args)
        )
        parse = inspect.getsource(inspect.unwrap(llamafactory.hparams.parser.get_train_args))
        assert "last_checkpoint = get_last_checkpoint(training_args.output_dir)" in parse
        assert hasattr(llamafactory.hparams.parser.get_last_checkpoint, "__wrapped__")
        train = inspect.getsource(transformers.Trainer.train)
        assert "get_last_checkpoint(args.output_dir)" in train
        files = [adapters._SAFETENSORS, adapters._PICKLED, adapters._MODEL, adapters._PICKLED_MODEL]
        names = transformers.utils
        assert files == [
            names.ADAPTER_SAFE_WEIGHTS_NAME,
            names.ADAPTER_WEIGHTS_NAME,
            names.SAFE_WEIGHTS_NAME,
            names.WEIGHTS_NAME,
        ]

    def test_the_parser_has_the_extended_arguments(self) -> None:
        assert ModelArguments in llamafactory.hparams.parser._TRAIN_ARGS
        assert ModelArguments in llamafactory.hparams.parser._INFER_ARGS
        assert "kt_sft" in ModelArguments.__dataclass_fields__

    @pytest.mark.parametrize("field", [*ours._EXCLUDED_MODEL_ARGUMENTS, "infer_backend", "adapter_name_or_path"])
    def test_arguments_that_are_refused_exist(self, field: str) -> None:
        """A renamed field would no longer be refused, as a missing one counts as not set."""
        assert field in ModelArguments.__dataclass_fields__

    @pytest.mark.parametrize("field", ["adapter_folder", "model_revision", "cache_dir", "hf_hub_token"])
    def test_where_adapters_are_looked_for(self, field: str) -> None:
        """Adapters must be inspected where LLaMA-Factory is going to take them from."""
        assert field in ModelArguments.__dataclass_fields__
        assert f"model_args.{field}" in inspect.getsource(adapter._setup_lora_tuning)

    @pytest.mark.parametrize("field", [*ours._EXCLUDED_FINETUNING_ARGUMENTS, "finetuning_type"])
    def test_ways_of_training_that_are_refused_exist(self, field: str) -> None:
        """A renamed field would no longer be refused, as a missing one counts as not set."""
        assert field in llamafactory.hparams.FinetuningArguments.__dataclass_fields__

    @pytest.mark.parametrize(
        "field", ["ref_model_adapters", "reward_model_adapters", "reward_model", "reward_model_type"]
    )
    def test_other_models_adapters(self, field: str) -> None:
        """The adapters of reference and reward models are inspected, too."""
        assert field in llamafactory.hparams.FinetuningArguments.__dataclass_fields__

    def test_patch_model(self) -> None:
        """Every loaded model passes here before it gets adapters: the place to see that the quantizer was used."""
        expected = ["model", "tokenizer", "model_args", "is_trainable", "add_valuehead"]
        assert parameters(llamafactory.model.patcher.patch_model) == expected
        assert llamafactory.model.loader.patch_model is llamafactory.model.patcher.patch_model
        assert hasattr(llamafactory.model.loader.patch_model, "__wrapped__")

    def test_get_peft_model(self) -> None:
        """The one place where LLaMA-Factory makes a new adapter; what it changes is what `lora_experts` asks for."""
        assert "get_peft_model(model, peft_config)" in inspect.getsource(adapter._setup_lora_tuning)
        assert hasattr(adapter.get_peft_model, "__wrapped__")
        assert parameters(adapter.get_peft_model)[:2] == ["model", "peft_config"]


class TestPeft:
    def test_inject_parameters(self) -> None:
        """Called for `target_parameters`, with the adapter's config: experts in the engine are found before it."""
        inject = lora_model.LoraModel._inject_parameters
        assert parameters(inject) == ["self", "peft_config", "model", "adapter_name", "low_cpu_mem_usage"]
        assert hasattr(inject, "__wrapped__")
        assert "self._inject_parameters(" in inspect.getsource(tuners_utils.BaseTuner.inject_adapter)
        assert hasattr(lora_model.LoraModel, "targeted_parameter_names") or "targeted_parameter_names" in (
            inspect.getsource(tuners_utils.BaseTuner.__init__)
        )

    def test_create_and_replace(self) -> None:
        """Refuses a second adapter with `target_parameters` on any module, so it is not told of them."""
        create = lora_model.LoraModel._create_and_replace
        assert hasattr(create, "__wrapped__")
        assert parameters(create)[:3] == ["self", "lora_config", "adapter_name"]
        assert inspect.signature(inspect.unwrap(create)).parameters["parameter_name"].default is None

    def test_merging_is_checked_before_it_begins(self) -> None:
        check = lora_model.LoraModel._check_merge_allowed
        assert hasattr(check, "__wrapped__")
        assert parameters(check) == ["self"]
        for merge in (tuners_utils.BaseTuner.merge_adapter, tuners_utils.BaseTuner._unload_and_optionally_merge):
            source = inspect.getsource(merge)
            assert source.index("self._check_merge_allowed()") < source.index(".merge(")

    def test_load_adapter(self) -> None:
        load = peft_model.PeftModel.load_adapter
        assert hasattr(load, "__wrapped__")
        assert parameters(load)[:3] == ["self", "model_id", "adapter_name"]
        source = inspect.getsource(inspect.unwrap(load))
        assert "load_result = set_peft_model_state_dict(" in source
        assert "return load_result" in source

    def test_a_config_is_saved_and_loaded_by_its_class(self) -> None:
        for method in (LoraConfig.save_pretrained, LoraConfig.from_pretrained.__func__):
            assert hasattr(method, "__wrapped__")
        assert parameters(LoraConfig.save_pretrained) == ["self", "save_directory", "kwargs"]
        assert parameters(LoraConfig.from_pretrained.__func__)[1:3] == ["pretrained_model_name_or_path", "subfolder"]
        assert "peft_config.save_pretrained(" in inspect.getsource(peft_model.PeftModel.save_pretrained)
        assert hasattr(PeftConfig.from_pretrained.__func__, "__wrapped__")
        assert hasattr(PeftConfig.from_json_file.__func__, "__wrapped__")
        assert "safe_save_file(" in inspect.getsource(peft_model.PeftModel.save_pretrained)
        assert parameters(peft_model.safe_save_file)[:3] == ["tensors", "filename", "metadata"]
        assert peft_model.safe_save_file.__wrapped__ is safetensors.torch.save_file
        assert parameters(lora_model.LoraModel.inject_adapter)[:3] == ["self", "model", "adapter_name"]

    @pytest.mark.parametrize("name", [*ours_peft._EXCLUDED, *ours_peft._COMPARED, "lora_dropout", "init_lora_weights"])
    def test_settings_of_a_config_exist(self, name: str) -> None:
        """A renamed setting would no longer be seen, as a missing one counts as not set."""
        assert name in LoraConfig.__dataclass_fields__

    def test_a_layer_is_what_peft_calls_one(self) -> None:
        """The methods and attributes by which PEFT handles a layer without knowing its class."""
        assert issubclass(ExpertLora, tuners_utils.BaseTunerLayer)
        assert LoraLayer.adapter_layer_names[:2] == ("lora_A", "lora_B")
        for name in ("r", "lora_alpha", "scaling", "lora_dropout"):
            assert name in LoraLayer.other_param_names
        unload = inspect.getsource(tuners_utils.BaseTuner._unload_and_optionally_merge) + inspect.getsource(
            lora_model.LoraModel
        )
        assert 'hasattr(target, "unload_and_optionally_merge_module")' in unload

    def test_on_which_side_parameters_are_taken(self) -> None:
        """Up to 0.18 as [E, in, out], from 0.19 on as [E, out, in]."""
        assert peft_turns_parameters() == (Version(importlib.metadata.version("peft")) >= Version("0.19.dev0"))


class TestTransformers:
    def test_registry(self) -> None:
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["kt_sft"] is KTConfig
        assert issubclass(auto.AUTO_QUANTIZER_MAPPING["kt_sft"], HfQuantizer)

    def test_merge_quantization_configs(self) -> None:
        merge = auto.AutoHfQuantizer.merge_quantization_configs
        assert parameters(merge) == ["quantization_config", "quantization_config_from_args"]
        merged = merge({"quant_method": "fp8"}, KTConfig(num_threads=3))
        assert isinstance(merged, KTConfig)
        assert (merged.num_threads, merged.source_quantization) == (3, {"quant_method": "fp8"})
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
        load = inspect.getsource(inspect.unwrap(PreTrainedModel.from_pretrained.__func__))
        assert "checkpoint_files=checkpoint_files" in load  # given to the hook that runs before loading
        assert "_weight_conversions" in inspect.getsource(core_model_loading)  # what saving reverts
        save = inspect.getsource(inspect.unwrap(PreTrainedModel.save_pretrained))
        assert "hf_quantizer.get_state_dict_and_metadata(self)" in save

    def test_a_checkpoint_is_complete_when_its_state_is_written(self) -> None:
        """What tells a complete checkpoint from one that a kill left: the names of its files, and which comes last."""
        save = transformers.Trainer._save_checkpoint
        assert hasattr(save, "__wrapped__")
        assert parameters(save) == ["self", "model", "trial"]
        source = inspect.getsource(inspect.unwrap(save))
        places = ["_get_output_dir(trial=trial)", "self.save_model(output_dir", "self._save_optimizer_and_scheduler("]
        places += ["self._save_rng_state(", "self.state.save_to_json(", "rotate_checkpoints("]
        assert sorted(places, key=source.index) == places
        names = transformers.trainer
        assert checkpoints._STATE == names.TRAINER_STATE_NAME
        assert checkpoints._RESUMED_STATES[:2] == (names.OPTIMIZER_NAME, names.SCHEDULER_NAME)
        assert checkpoints._NUMBERED.fullmatch(f"{names.PREFIX_CHECKPOINT_DIR}-12")

    def test_checkpoints_of_reward_models_are_loaded(self) -> None:
        """By one method; LLaMA-Factory keeps the value head beside the adapter, under names as its module has it."""
        resume = transformers.Trainer._load_from_checkpoint
        assert hasattr(resume, "__wrapped__")
        assert parameters(resume) == ["self", "resume_from_checkpoint", "model"]
        assert "self._load_from_checkpoint(resume_from_checkpoint)" in inspect.getsource(transformers.Trainer)
        assert value_heads.VALUE_HEAD == llamafactory.extras.constants.V_HEAD_SAFE_WEIGHTS_NAME
        fix = inspect.getsource(llamafactory.train.callbacks.fix_valuehead_checkpoint)
        assert 'if name.startswith("v_head."):' in fix
        assert "model.pretrained_model.save_pretrained(" in fix

    def test_layers_are_told_how_they_are_checkpointed(self) -> None:
        """One method hands all layers the checkpointing function; they call it with a partial of their own call."""
        tell = PreTrainedModel._set_gradient_checkpointing
        assert hasattr(tell, "__wrapped__")
        assert parameters(tell) == ["self", "enable", "gradient_checkpointing_func"]
        for enable in (PreTrainedModel.gradient_checkpointing_enable, checkpointing._gradient_checkpointing_enable):
            assert "self._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=" in (
                inspect.getsource(enable)
            )
        call = inspect.getsource(transformers.modeling_layers.GradientCheckpointingLayer.__call__)
        assert "self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)" in call
        looked_at = inspect.getsource(checkpointing.get_custom_gradient_checkpointing_func)
        assert "if isinstance(func, partial):" in looked_at
        assert "func.func.__self__" in looked_at

    def test_save_pretrained_is_guarded(self) -> None:
        expected = ["self", "save_directory", "is_main_process", "state_dict"]
        assert parameters(PreTrainedModel.save_pretrained)[:4] == expected
        assert hasattr(PreTrainedModel.save_pretrained, "__wrapped__")

    def test_from_pretrained_passes_the_key_mapping_on(self) -> None:
        load = PreTrainedModel.from_pretrained.__func__
        assert hasattr(load, "__wrapped__")
        assert "key_mapping" not in parameters(load)  # taken from the keyword arguments
        assert 'kwargs.pop("key_mapping", None)' in inspect.getsource(inspect.unwrap(load))

    def test_the_experts_decorator_marks_instances(self) -> None:
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(
                Qwen3MoeConfig(num_hidden_layers=1, num_experts=2, hidden_size=64, vocab_size=8)
            )
        experts = model.model.layers[0].mlp.experts
        assert (experts.has_gate, experts.has_bias, experts.is_transposed) == (True, False, False)
        assert callable(experts._apply_gate)
        assert parameters(moe.use_experts_implementation)[0] == "experts_class"


class TestCoreModelLoading:
    """The names of transformers.core_model_loading by which kt_sft.loading reads a checkpoint's experts.

    The loader does not run transformers' conversions: it looks at what they are, and reads each expert's matrix from
    where they would take it. So the names must exist, carry these attributes, and still mean what they meant.
    """

    def test_rename_source_key(self) -> None:
        """Gives a checkpoint key's name in the model, and the converter's pattern that took it; also undone to save."""
        expected = ["source_key", "weight_renamings", "weight_converters", "prefix", "meta_state_dict"]
        assert parameters(core_model_loading.rename_source_key) == expected
        renaming = core_model_loading.WeightRenaming("block_sparse_moe", "mlp")
        converter = core_model_loading.WeightConverter(
            "mlp.experts.*.w1.weight", "mlp.experts.down_proj", [core_model_loading.MergeModulelist(dim=0)]
        )
        renamed = core_model_loading.rename_source_key("block_sparse_moe.experts.3.w1.weight", [renaming], [converter])
        assert renamed == ("mlp.experts.down_proj", converter.source_patterns[0])
        assert core_model_loading.rename_source_key("other", [renaming], [converter]) == ("other", None)

    def test_weight_renaming(self) -> None:
        """Told apart from converters by its class, and reversed to find the names under which experts are saved."""
        renaming = core_model_loading.WeightRenaming("old", "new")
        assert not isinstance(renaming, core_model_loading.WeightConverter)
        back = renaming.reverse_transform()
        assert isinstance(back, core_model_loading.WeightRenaming)
        assert core_model_loading.rename_source_key("a.new.b", [back], []) == ("a.old.b", None)

    def test_weight_converter(self) -> None:
        """Says by its patterns which tensors feed a parameter of experts, in which order, by which operations."""
        operations = [core_model_loading.MergeModulelist(dim=0), core_model_loading.Concatenate(dim=1)]
        converter = core_model_loading.WeightConverter(["x.*.gate", "x.*.up"], "x.gate_up", operations)
        assert converter.source_patterns == ["x.*.gate", "x.*.up"]
        assert converter.target_patterns == ["x.gate_up"]
        assert converter.operations == operations
        assert isinstance(converter.reverse_transform(), core_model_loading.WeightConverter)

    def test_merge_modulelist(self) -> None:
        """Experts of a list become rows of dimension 0, so expert i is read from the list's tensor i."""
        merge = core_model_loading.MergeModulelist(dim=0)
        assert merge.dim == 0
        experts = [torch.full((2, 3), float(i)) for i in range(4)]
        (merged,) = merge.convert({"x.*.up": experts}, source_patterns=["x.*.up"], target_patterns=["x.up"]).values()
        assert torch.equal(merged, torch.stack(experts))

    def test_concatenate(self) -> None:
        """Gate and up lie one after the other in the order of the patterns, whichever was read first."""
        concatenate = core_model_loading.Concatenate(dim=1)
        assert concatenate.dim == 1
        gate, up = torch.zeros(4, 2, 3), torch.ones(4, 2, 3)
        patterns = ["x.*.gate", "x.*.up"]
        (both,) = concatenate.convert({patterns[1]: up, patterns[0]: gate}, patterns, ["x.gate_up"]).values()
        assert torch.equal(both, torch.cat([gate, up], dim=1))

    def test_transpose(self) -> None:
        """A stored matrix is read with its strides exchanged; with check_dims only if its shape does not fit."""
        transpose = core_model_loading.Transpose(1, 2, check_dims=True)
        assert (transpose.dim0, transpose.dim1, transpose.check_dims) == (1, 2, True)
        stored = torch.arange(24.0).view(4, 2, 3)
        always = core_model_loading.Transpose(1, 2)
        assert always.check_dims is False
        (turned,) = always.convert({"x": stored}, source_patterns=["x"], target_patterns=["y"]).values()
        assert torch.equal(turned, stored.transpose(1, 2))

    def test_ernie_fuse_and_split_text_vision_experts(self) -> None:
        """Ernie's list holds the text experts, then as many vision experts: each target has its equal share."""
        split = core_model_loading.ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1)
        gate = [torch.full((2, 3), float(i)) for i in range(4)]
        up = [torch.full((2, 3), float(10 + i)) for i in range(4)]
        sources, targets = ["x.*.gate", "x.*.up"], ["x.text", "x.vision"]
        parts = split.convert(
            dict(zip(sources, (gate, up), strict=True)), sources, targets, config=SimpleNamespace(moe_num_experts=2)
        )
        fused = torch.cat([torch.stack(gate), torch.stack(up)], dim=1)
        assert torch.equal(parts["x.text"], fused[:2])
        assert torch.equal(parts["x.vision"], fused[2:])

    def test_get_model_conversion_mapping(self) -> None:
        """The conversions that transformers itself would apply to a model's checkpoint."""
        expected = ["model", "key_mapping", "hf_quantizer", "add_legacy"]
        assert parameters(conversion_mapping.get_model_conversion_mapping) == expected

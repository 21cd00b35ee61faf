"""`from_pretrained(..., quantization_config=KTConfig())`: checkpoints as they come, damaged ones, and saving again."""

from __future__ import annotations

import copy
import filecmp
import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from checkpoints import cached, load, rewrite, same_experts, set_matrix, set_value, stores
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kt_sft.config import KTConfig
from kt_sft.integrations.adapter_files import convert
from kt_sft.loading.errors import CheckpointError

_VL_EXPERTS = "model.language_model.layers.0.mlp.experts"


class TestLayouts:
    """The same experts, however they lie in the checkpoint."""

    def test_in_shards(self, tiny_moe: Path, tmp_path: Path) -> None:
        plain = AutoModelForCausalLM.from_pretrained(tiny_moe)
        plain.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        assert same_experts(load(tmp_path), load(tiny_moe))

    def test_fused(self, tiny_moe: Path, tmp_path: Path) -> None:
        plain = AutoModelForCausalLM.from_pretrained(tiny_moe)
        plain.save_pretrained(tmp_path, save_original_format=False)
        assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
        assert same_experts(load(tmp_path), load(tiny_moe))

    def test_fused_and_transposed(self, tmp_path: Path) -> None:
        # Qwen3-VL-MoE checkpoints are [E, H, 2I] where transformers has [E, 2I, H].
        from families import FAMILIES, make

        plain = make(FAMILIES["qwen3_vl_moe"][0])
        plain.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        for key in [key for key in tensors if ".mlp.experts." in key]:
            tensors[key] = tensors[key].transpose(1, 2).contiguous()
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        again = type(plain).from_pretrained(tmp_path)  # transformers turns them back
        experts = again.get_submodule(_VL_EXPERTS)
        assert torch.equal(experts.gate_up_proj, plain.get_submodule(_VL_EXPERTS).gate_up_proj)

        ours = type(plain).from_pretrained(tmp_path, quantization_config=KTConfig())

        assert torch.equal(stores(ours)[0].dequantized()[0], experts.gate_up_proj)
        assert torch.equal(stores(ours)[0].dequantized()[1], experts.down_proj)

    def test_saved_from_the_base_model(self, tiny_moe: Path, tmp_path: Path) -> None:
        plain = AutoModelForCausalLM.from_pretrained(tiny_moe)
        plain.model.save_pretrained(tmp_path)
        assert "layers.0.mlp.experts.0.up_proj.weight" in load_file(tmp_path / "model.safetensors")
        assert same_experts(load(tmp_path), load(tiny_moe))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_other_dtypes_are_rounded_to_bf16(
        self, dtype: torch.dtype, tiny_moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        plain = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=dtype)
        experts = plain.model.layers[0].mlp.experts
        experts.gate_up_proj.data.mul_(1.01)  # no longer BF16 values
        plain.save_pretrained(tmp_path)

        ours = load(tmp_path)

        assert torch.equal(stores(ours)[0].dequantized()[0], experts.gate_up_proj.bfloat16().float())
        assert "experts are stored rounded to BF16" in caplog.text

    @pytest.mark.parametrize("as_dict", [False, True])
    def test_under_other_keys(self, as_dict: bool, tiny_moe: Path, checkpoint: Path, tmp_path: Path) -> None:
        def rename(tensors: dict[str, torch.Tensor]) -> None:
            for key in list(tensors):
                tensors[key.replace("mlp.experts", "mlp.crowd").replace("mlp.gate", "mlp.doorman")] = tensors.pop(key)

        rewrite(checkpoint, rename)
        key_mapping = {r"mlp\.crowd": "mlp.experts", r"mlp\.doorman": "mlp.gate"}
        config = {"quant_method": "kt_sft"} if as_dict else KTConfig()

        ours = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, key_mapping=key_mapping)

        assert same_experts(ours, load(tiny_moe))
        assert all(map(torch.equal, ours.parameters(), load(tiny_moe).parameters()))
        ours.save_pretrained(tmp_path / "saved")
        saved, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", checkpoint))
        assert saved.keys() == source.keys()
        assert all(torch.equal(saved[key], source[key]) for key in source)
        with pytest.raises(CheckpointError, match="the checkpoint has no tensor for"):
            load(checkpoint)

    def test_by_name_from_the_hubs_cache(self, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        cached(tiny_moe, tmp_path, "someone/tiny")

        ours = AutoModelForCausalLM.from_pretrained("someone/tiny", quantization_config=KTConfig(), cache_dir=tmp_path)

        assert same_experts(ours, load(tiny_moe))

    def test_layers_that_the_model_does_not_have_are_left_alone(
        self, tiny_moe: Path, edit: Any, checkpoint: Path
    ) -> None:
        # As DeepSeek-V3's and GLM's checkpoints carry a layer for multi-token prediction.
        extra = {"model.layers.2.mlp.experts.0.up_proj.weight": torch.zeros(24, 32, dtype=torch.bfloat16)}
        edit(lambda tensors: tensors.update(extra))
        assert same_experts(load(checkpoint), load(tiny_moe))

    def test_a_dense_model_is_untouched(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=40)).save_pretrained(tmp_path)
        plain, ours = AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path)
        assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
        assert not hasattr(ours, "hf_quantizer")
        assert not ours.is_quantized
        assert "quantization_config" not in ours.config.to_dict()
        assert all(parameter.requires_grad for parameter in ours.parameters())


class TestSharing:
    """One store per checkpoint and options in a process."""

    def test_a_second_load_shares_the_store(self, tiny_moe: Path) -> None:
        first, second = load(tiny_moe), load(tiny_moe)
        assert [id(store) for store in stores(first)] == [id(store) for store in stores(second)]

    def test_another_checkpoint_does_not(self, tiny_moe: Path, checkpoint: Path) -> None:
        first, second = load(tiny_moe), load(checkpoint)
        assert {id(store) for store in stores(first)}.isdisjoint(id(store) for store in stores(second))

    def test_a_changed_checkpoint_does_not(self, checkpoint: Path, edit: Callable[..., None]) -> None:
        first = load(checkpoint)
        edit(set_matrix("up", torch.full((24, 32), 0.5).bfloat16()))
        second = load(checkpoint)
        assert not same_experts(first, second)

    def test_another_activation_does_not(self, tiny_moe: Path) -> None:
        first, second = load(tiny_moe), load(tiny_moe, hidden_act="gelu")
        assert {store.activation for store in stores(first)} == {"silu"}
        assert {store.activation for store in stores(second)} == {"gelu"}

    def test_half_filled_stores_are_not_shared(
        self, checkpoint: Path, edit: Callable[..., None], tiny_moe: Path
    ) -> None:
        edit(set_value(float("nan")))
        for _ in range(2):
            with pytest.raises(CheckpointError, match="gate of expert 3"):
                load(checkpoint)

    def test_models_let_go_free_their_stores_at_once(self, checkpoint: Path) -> None:
        model = load(checkpoint)
        held = weakref.ref(stores(model)[0])
        gc.disable()  # a cycle would keep the experts of a large model in memory for long
        try:
            del model
            assert held() is None
        finally:
            gc.enable()

    def test_copies_share(self, tiny_moe: Path) -> None:
        model = load(tiny_moe)
        assert stores(copy.deepcopy(model))[0] is stores(model)[0]


class TestSaving:
    """A model saved is an ordinary checkpoint."""

    @pytest.mark.parametrize("shard", ["5GB", "40KB"])
    def test_what_was_loaded_is_saved(self, shard: str, tiny_moe: Path, tmp_path: Path) -> None:
        load(tiny_moe).save_pretrained(tmp_path, max_shard_size=shard)

        saved = {key: value for file in tmp_path.glob("*.safetensors") for key, value in load_file(file).items()}
        source = load_file(tiny_moe / "model.safetensors")
        assert saved.keys() == source.keys()
        assert all(torch.equal(saved[key], source[key]) for key in source)
        assert filecmp.cmp(tmp_path / "config.json", tiny_moe / "config.json")
        tokens = torch.arange(12).reshape(1, 12)
        plain = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (tmp_path, tiny_moe)]
        assert torch.equal(*plain)

    def test_every_family_is_saved_under_its_own_keys(self, tmp_path: Path) -> None:
        from families import FAMILIES, make

        for name in ("mixtral", "nemotron_h", "gpt_oss", "qwen3_vl_moe", "ernie4_5_vl_moe", "phimoe", "qwen3_5_moe"):
            source, target = tmp_path / name, tmp_path / f"{name}-saved"
            model = make(FAMILIES[name][0])
            model.save_pretrained(source)
            ours = type(model).from_pretrained(source, quantization_config=KTConfig(), dtype=torch.float32)
            ours.save_pretrained(target)
            assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes(), name

    def test_a_source_that_changed_is_refused(
        self, checkpoint: Path, edit: Callable[..., None], tmp_path: Path
    ) -> None:
        model = load(checkpoint)
        edit(set_matrix("up", torch.ones(24, 32).bfloat16()))
        with pytest.raises(CheckpointError, match="which has changed"):
            model.save_pretrained(tmp_path / "saved")

    def test_a_source_that_is_gone_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        model = load(checkpoint)
        shutil.rmtree(checkpoint)
        with pytest.raises(CheckpointError, match="which is gone"):
            model.save_pretrained(tmp_path / "saved")

    def test_the_source_itself_is_not_overwritten(self, checkpoint: Path, tmp_path: Path) -> None:
        before = (checkpoint / "model.safetensors").read_bytes()
        (tmp_path / "link").symlink_to(checkpoint)
        model = load(checkpoint)
        for folder in (checkpoint, str(checkpoint) + "/", tmp_path / "link"):
            for candidate in (model, copy.deepcopy(model)):
                with pytest.raises(CheckpointError, match="save into another folder"):
                    candidate.save_pretrained(folder)
        copied = copy.deepcopy(model)
        copied.lm_head.weight.data.zero_()
        copied.save_pretrained(tmp_path / "elsewhere")
        assert not load_file(tmp_path / "elsewhere" / "model.safetensors")["lm_head.weight"].any()
        assert (checkpoint / "model.safetensors").read_bytes() == before

    def test_only_adapters_are_saved_where_transformers_holds_them(self, tiny_moe: Path) -> None:
        model = load(tiny_moe)
        model._hf_peft_config_loaded = True  # what model.add_adapter sets
        assert model.hf_quantizer.get_state_dict_and_metadata(model) == (None, {})

    def test_a_state_dict_of_ones_own_is_refused(self, tiny_moe: Path, tmp_path: Path) -> None:
        model = load(tiny_moe)
        with pytest.raises(ValueError, match=r"save_pretrained\(state_dict=\.\.\.\) is not supported"):
            model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())
        with pytest.raises(ValueError, match=r"save_pretrained\(state_dict=\.\.\.\) is not supported"):
            model.save_pretrained(tmp_path / "saved", True, model.state_dict())
        assert not (tmp_path / "saved").exists()
        model.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "model.safetensors").exists()

    def test_experts_keep_the_dtype_of_their_checkpoint(
        self, tiny_moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).save_pretrained(source)

        load(source, dtype=torch.float32).save_pretrained(target)
        assert "the experts are saved as" not in caplog.text
        load(source, dtype=torch.bfloat16).save_pretrained(target)
        assert "the experts are saved as F32" in caplog.text

        saved, plain = load_file(target / "model.safetensors"), load_file(source / "model.safetensors")
        for key, value in saved.items():
            assert torch.equal(value, plain[key] if ".experts." in key else plain[key].bfloat16())
            assert value.dtype == (torch.float32 if ".experts." in key else torch.bfloat16)

    def test_a_part_of_the_model_is_refused(self, tiny_moe: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="Qwen3MoeModel is a part of Qwen3MoeForCausalLM"):
            load(tiny_moe).model.save_pretrained(tmp_path)


class TestUse:
    """The loaded model in the hands of the libraries above."""

    def test_automatic_placement_uses_one_device_and_no_hooks(self, tiny_moe: Path) -> None:
        model = load(tiny_moe, device_map="auto")
        assert len({parameter.device for parameter in model.parameters()}) == 1
        assert not any(hasattr(module, "_hf_hook") for module in model.modules())

    def test_nothing_of_the_experts_is_a_parameter_or_reported_missing(self, tiny_moe: Path) -> None:
        model, info = load(tiny_moe, output_loading_info=True)
        assert not any("experts" in name for name in model.state_dict())
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    def test_the_dense_part_can_be_cast(self, tiny_moe: Path) -> None:
        model = load(tiny_moe).to(torch.float32)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model(torch.arange(12).reshape(1, 12)).logits.dtype == torch.float32
        with pytest.raises(ValueError, match="not supported for quantized model"):
            model.half()  # as the quantizer's documentation says

    def test_an_adapter_in_the_layout_of_servers_is_refused(self, tiny_moe: Path, tmp_path: Path) -> None:
        on_experts = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
        plain = AutoModelForCausalLM.from_pretrained(tiny_moe)
        peft.get_peft_model(plain, on_experts).save_pretrained(tmp_path / "adapter")
        convert(tmp_path / "adapter", tmp_path / "listed", "per-expert")
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.0\.gate_proj\.lora_A"):
            peft.PeftModel.from_pretrained(load(tiny_moe), tmp_path / "listed")

    def test_a_state_dict_with_experts_is_refused(self, tiny_moe: Path) -> None:
        model, plain = load(tiny_moe), AutoModelForCausalLM.from_pretrained(tiny_moe)
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is a weight of routed experts"):
            model.load_state_dict(plain.state_dict(), strict=False)
        model.load_state_dict(model.state_dict())

    def test_experts_trained_themselves_are_refused(self, tiny_moe: Path) -> None:
        whole = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"])
        with pytest.raises(ValueError, match="take them out of modules_to_save"):
            peft.get_peft_model(load(tiny_moe), whole)
        model = load(tiny_moe).requires_grad_(False).requires_grad_(True)  # of the model: only its parameters
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_training_without_adapters_is_refused(self, tiny_moe: Path, tmp_path: Path) -> None:
        arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to="none")
        with pytest.raises(ValueError, match="attach trainable adapters"):
            transformers.Trainer(load(tiny_moe), arguments)

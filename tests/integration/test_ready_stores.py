"""Ready stores: the same model as quantising on load, to the bit, from every kind of checkpoint."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import pytest
import quantised
import torch
import transformers
from checkpoints import same_experts, stores
from commands import run_command, train_losses
from families import FAMILIES, make
from ready import make_store
from safetensors.torch import load_file
from test_sources_mxfp4 import write as write_gpt_oss
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

from kt_sft.config import STORE_METHOD, ConfigError, KTConfig
from kt_sft.loading import memory
from kt_sft.loading.errors import CheckpointError
from tests.forked import forked_ranks
from tests.pages import mappings

#: kt-sft quantize's options -> what a recipe without a store would say.
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"expert_format": "int8"},
    "int8 in groups": {"expert_format": "int8", "group_size": 32},
    "int4": {"expert_format": "int4"},
    "int4 with zero points": {"expert_format": "int4", "zero_point": True, "group_size": 0},
    "nf4": {"expert_format": "nf4"},
    "fp8": {"expert_format": "fp8"},
    "fp8 in rows": {"expert_format": "fp8", "group_size": 0},
    "mxfp4": {"expert_format": "mxfp4"},
}


def load(folder: Path, model_class: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    return model_class.from_pretrained(folder, quantization_config=KTConfig(**settings)).eval()


def same_model(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return same_experts(one, other) and all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kept", ["mapped", "resident"])
def test_it_is_the_model_that_loading_would_quantise(name: str, kept: str, tiny_moe: Path, tmp_path: Path) -> None:
    """Experts, logits and gradients."""
    make_store(tiny_moe, tmp_path / "store", **FORMATS[name])

    ours, reference = load(tmp_path / "store", store=kept), load(tiny_moe, **FORMATS[name])

    assert all(store.mapped is (kept == "mapped") for store in stores(ours))
    assert {store.expert_format for store in stores(ours)} == {store.expert_format for store in stores(reference)}
    assert same_model(ours, reference)
    results = []
    for model in (ours, reference):
        embedded = torch.linspace(-1, 1, 2 * 24 * 32).reshape(2, 24, 32).bfloat16().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        logits.float().square().sum().backward()
        results.append((logits, embedded.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "mixtral", "ernie4_5_vl_moe", "qwen3_vl_moe"])
def test_models_of_every_layout(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed and interleaved with biases, ungated, renamed, of two sizes, and wrapped.

    Whoever loads them without kt_sft fails.
    """
    model = make(FAMILIES[family][0]).bfloat16()
    model.save_pretrained(tmp_path / "source")

    make_store(tmp_path / "source", tmp_path / "store", expert_format="int4")

    ours = load(tmp_path / "store", type(model), store="mapped")
    reference = load(tmp_path / "source", type(model), expert_format="int4")
    assert same_model(ours, reference)
    for one, other in zip(stores(ours), stores(reference), strict=True):
        assert (one.gate_up_bias is None) == (other.gate_up_bias is None)
        assert one.gate_up_bias is None or torch.equal(one.gate_up_bias, other.gate_up_bias)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, STORE_METHOD)
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes|during automatic conversion"):
        type(model).from_pretrained(tmp_path / "store")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "fp8": quantised.write_fp8,
    "fp8 in rows": quantised.write_compressed_fp8,
    "compressed int4": lambda folder: quantised.write_compressed_int4(folder, symmetric=False, scales=torch.float16),
    "gptq": quantised.write_gptq,
    "awq": quantised.write_awq,
}


class TestSources:
    """Checkpoints that are quantised already."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(
            vocab_size=96,
            hidden_size=160,
            intermediate_size=128,
            moe_intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
        )
        model = transformers.Qwen3MoeForCausalLM(config).bfloat16()
        with torch.no_grad():
            for value in model.parameters():
                value.normal_(0, 0.2)
        model.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    @pytest.mark.parametrize("name", SOURCES)
    @pytest.mark.parametrize("expert_format", ["auto", "int8"])
    def test_codes_are_kept_or_quantised_again_as_on_load(
        self, name: str, expert_format: str, source: Path, tmp_path: Path
    ) -> None:
        SOURCES[name](source)

        manifest = make_store(source, tmp_path / "store", expert_format=expert_format)

        ours, reference = load(tmp_path / "store", store="mapped"), load(source, expert_format=expert_format)
        assert same_model(ours, reference)  # the dense part, too
        assert {store.expert_format for store in stores(ours)} == {store.expert_format for store in stores(reference)}
        errors = {experts.relative_error > 0 for experts in manifest.experts.values()}
        assert errors == {expert_format == "int8"}

    @pytest.mark.parametrize("expert_format", ["auto", "nf4"])
    def test_mxfp4(self, expert_format: str, tmp_path: Path) -> None:
        write_gpt_oss(tmp_path / "source")

        make_store(tmp_path / "source", tmp_path / "store", expert_format=expert_format)

        ours, reference = load(tmp_path / "store"), load(tmp_path / "source", expert_format=expert_format)
        assert same_model(ours, reference)
        assert torch.equal(stores(ours)[1].gate_up_bias, stores(reference)[1].gate_up_bias)


@pytest.fixture(scope="module")
def store(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "int4"
    make_store(tiny_moe, folder, expert_format="int4")
    return folder


class TestAsAModelPath:
    def test_a_model_without_its_head_has_other_names(self, store: Path, tiny_moe: Path) -> None:
        ours = load(store, transformers.AutoModel)
        assert same_experts(ours, load(tiny_moe, transformers.AutoModel, expert_format="int4"))

    def test_asking_for_what_there_is_changes_nothing(self, store: Path) -> None:
        assert same_model(load(store), load(store, expert_format="int4", group_size=32, compute="int8"))

    def test_another_format_is_quantised_again(self, store: Path) -> None:
        again = load(store, expert_format="int8", group_size=32)
        assert {one.expert_format for one in stores(again)} == {"int8"}
        for one, other in zip(stores(again), stores(load(store)), strict=True):
            for ours, theirs in zip(one.dequantized(), other.dequantized(), strict=True):
                # A scale is at most 1/127 of a group's largest magnitude, and rounding is off by half of it.
                assert bool(((ours - theirs).abs() <= theirs.abs().max() / 127).all())

    def test_it_is_mapped_where_memory_is_too_small(
        self, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        dense = sum(parameter.nbytes for parameter in load(store).parameters())
        monkeypatch.setattr(memory, "available_bytes", lambda: dense)
        with caplog.at_level(logging.INFO, "kt_sft"):
            model = load(store)
        assert all(one.mapped for one in stores(model))
        assert "int4, 20.5 KiB mapped" in caplog.text

    def test_another_format_cannot_be_mapped(self, store: Path) -> None:
        why = "holds int4 of a ready store, which is to be quantised again to int8"
        ways = "leave out expert_format, group_size and zero_point, so that it is taken as it is, or set store: auto"
        with pytest.raises(ConfigError, match=f"store 'mapped' is not possible: .* {why}; {ways} or resident"):
            load(store, store="mapped", expert_format="int8")

    def test_a_recipe_trains_on_it(self, store: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
        changes = {"model_name_or_path": str(store), "lora_target": "all", "max_steps": 2, "save_steps": 2}
        recipe = write_recipe(kt_sft={"lora_experts": True}, **changes)
        result = run_command(["llamafactory-cli", "train", str(recipe)])
        assert result.returncode == 0, result.stdout
        assert "16 experts in 2 layers, int4, " in result.stdout
        assert len(train_losses(tmp_path / "out")) == 2
        assert any(".mlp.experts." in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))

    def test_it_is_not_saved_from(self, store: Path, tmp_path: Path) -> None:
        model = load(store)
        with pytest.raises(CheckpointError, match=r"export from the checkpoint that the store was made from"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

    def test_an_export_is_refused_before_loading(self, store: Path, tmp_path: Path) -> None:
        from llamafactory.hparams import get_infer_args

        recipe = {"model_name_or_path": str(store), "template": "qwen", "export_dir": str(tmp_path / "out")}
        with pytest.raises(ConfigError, match="export from the checkpoint that the store was made from"):
            get_infer_args(recipe | {"kt_sft": {}})

    def test_without_settings_it_is_refused(self, store: Path) -> None:
        with pytest.raises(ConfigError, match=r"only kt_sft reads; pass quantization_config=kt_sft\.KTConfig\(\)"):
            AutoModelForCausalLM.from_pretrained(store)

    def test_a_process_without_kt_sft_fails(self, store: Path) -> None:
        script = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
        result = run_command(["python", "-c", script, str(store)], environment={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
        assert result.returncode != 0
        assert re.search(r"experts\.gate_up_proj +\| MISMATCH", result.stdout), result.stdout

    def test_what_belongs_to_the_model_is_there(self, store: Path, tiny_moe: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (store / name).read_bytes() == (tiny_moe / name).read_bytes()
        config = json.loads((store / "config.json").read_text())
        quantization = config.pop("quantization_config")
        assert quantization == {"quant_method": "kt_sft_store", "source_quantization": None}
        assert config == json.loads((tiny_moe / "config.json").read_text())

    def test_of_another_model_it_is_refused(self, store: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(store, tmp_path / "other"))
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 16}))
        with pytest.raises(CheckpointError, match=r"kt_sft_store\.json: the experts of model\.layers\.0\.mlp\.experts"):
            load(other)


def test_two_processes_have_the_stores_pages(store: Path, tmp_path: Path) -> None:
    """Codes and scales: nothing of the experts is either process's own."""

    def rank(pipe: Connection) -> None:
        torch.set_num_threads(1)  # a forked child has none of its parent's threads
        model = load(store, store="mapped", num_threads=1)
        for one in stores(model):
            one.dequantized()
        pipe.send(None)
        pipe.recv()  # until the other has read its pages
        pipe.send([mappings(str(file)) for file in sorted(store.glob("*.safetensors"))[1:]])
        pipe.recv()

    with forked_ranks(port=str(tmp_path)) as start:
        ranks = [start(rank), start(rank)]
        for one in ranks:
            one.hears()
        for one in ranks:
            one.go_on()
        pages = [one.hears() for one in ranks]
    for found in (fields for files in pages for places in files for fields in places.values()):
        assert found["Rss"] >= 8  # KiB: a layer's experts are 10.25, and its file no whole number of pages
        assert found["Anonymous"] == found["Private_Clean"] == found["Private_Dirty"] == 0
    assert [[len(places) > 0 for places in files] for files in pages] == [[True, True], [True, True]]

"""`store: mapped` with quantised checkpoints: codes stay in the files, scales are held in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import test_sources_fp8
import test_sources_int4
import test_sources_mxfp4
import torch
from checkpoints import rewrite, stores
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_sources_export import same_bytes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kt_sft.config import ConfigError, KTConfig
from kt_sft.loading import memory
from kt_sft.loading.errors import CheckpointError, NotEnoughMemoryError
from tests.forked import forked_ranks
from tests.pages import mappings


def _of(module: Any, name: str) -> Callable[[Path], Any]:
    return lambda folder: module.publish(name, folder)


#: How rows lie on disk -> who writes such a checkpoint.
WRITERS: dict[str, Callable[[Path], Any]] = {
    "FP8, FP32 scales of blocks": _of(test_sources_fp8, "DeepSeek-V3"),
    "FP8, BF16 scales of blocks": _of(test_sources_fp8, "Qwen3-FP8"),
    "FP8, E8M0 scales of blocks": _of(test_sources_fp8, "scales E8M0"),
    "FP8, scales of rows": _of(test_sources_fp8, "GLM-4.5-FP8"),
    "FP8, one scale": _of(test_sources_fp8, "one scale"),
    "MXFP4, gate and up alternate": test_sources_mxfp4.write,
    "INT4": _of(test_sources_int4, "Kimi-K2-Thinking"),
    "INT4, zero points": _of(test_sources_int4, "llm-compressor, asymmetric"),
}
TURNED = _of(test_sources_int4, "Qwen3-GPTQ")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("published")
            WRITERS[name](folders[name])
        return folders[name]

    return get


def load(folder: Path, **settings: Any) -> nn.Module:
    config = KTConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def adapted(model: nn.Module) -> nn.Module:
    """With an adapter on attention and experts that changes what it computes."""
    torch.manual_seed(3)
    parameters = [f"experts.{name}" for name in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=2, target_modules=["o_proj"], target_parameters=parameters, init_lora_weights=False)
    return get_peft_model(model, config)


def step(model: nn.Module) -> list[Tensor]:
    """Logits, and every gradient."""
    size = model.get_input_embeddings().weight.shape[1]
    embedded = torch.linspace(-1, 1, 2 * 24 * size).reshape(2, 24, size).requires_grad_()
    model.zero_grad()
    logits = model(inputs_embeds=embedded).logits
    logits.square().sum().backward()
    assert embedded.grad is not None
    return [logits, embedded.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", WRITERS)
def test_it_computes_what_the_resident_one_does(name: str, published: Callable[[str], Path]) -> None:
    mapped, resident = (load(published(name), store=store).eval() for store in ("mapped", "resident"))
    for one, other in zip(stores(mapped), stores(resident), strict=True):
        assert (one.mapped, other.mapped) == (True, False)
        assert one.missing() == []
        assert one.expert_format == other.expert_format != "bf16"
        for ours, theirs in zip(one.dequantized(), other.dequantized(), strict=True):
            assert torch.equal(ours, theirs)
    assert same(step(mapped), step(resident))


@pytest.mark.parametrize("name", ["FP8, BF16 scales of blocks", "MXFP4, gate and up alternate", "INT4"])
class TestUse:
    def test_adapters_on_experts_and_checkpointed_layers(self, name: str, published: Callable[[str], Path]) -> None:
        results = []
        for store in ("mapped", "resident"):
            model = adapted(load(published(name), store=store, lora_experts=True)).train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            results.append(step(model))
        assert len(results[0]) >= 2 + 2 * 2 + 4  # with adapters on two layers' attention and one layer's experts
        assert same(*results)

    def test_it_saves_what_it_was_loaded_from(
        self, name: str, published: Callable[[str], Path], tmp_path: Path
    ) -> None:
        source = published(name)
        load(source, store="mapped").save_pretrained(tmp_path)
        before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path))
        experts = {key for key in before if ".experts." in key}
        assert experts <= {*same_bytes(before, after)}

    def test_the_next_layers_pages_are_read(
        self, name: str, published: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(published(name), store="mapped").eval()
        read: list[bool] = []
        for store in stores(model):
            store.native.read_ahead()
            monkeypatch.setattr(store.neighbours, "read", lambda *, forward: read.append(forward))
        step(model)
        assert read == [True] * len(stores(model)) + [False] * len(stores(model))

    def test_two_processes_have_the_codes_once(
        self, name: str, published: Callable[[str], Path], tmp_path: Path
    ) -> None:
        file = published(name) / "model.safetensors"

        def rank(pipe: Connection) -> None:
            torch.set_num_threads(1)  # a forked child has none of its parent's threads
            model = load(file.parent, store="mapped", num_threads=1)

            def read() -> dict[str, dict[str, int]]:
                for store in stores(model):
                    store.dequantized()
                return mappings(str(file))

            pipe.send(read())
            pipe.recv()  # until the other has read its pages
            # More than once: a page that the system is just moving is mapped nowhere.
            pipe.send([read() for _ in range(20)])
            pipe.recv()

        with forked_ranks(port=str(tmp_path)) as start:
            ranks = [start(rank), start(rank)]
            for one in ranks:
                one.hears()
            for one in ranks:
                one.go_on()
            pages = [one.hears() for one in ranks]
        tensors = load_file(file)
        codes = [key for key in tensors if re.search(r"experts.*(_proj\.weight|_blocks|weight_packed)$", key)]
        least = sum(tensors[key].nbytes for key in codes) >> 10
        for reads in pages:
            (all_fields,) = zip(*(found.values() for found in reads), strict=True)  # one mapping for all layers
            # Of pages beside the codes the system may map some in one process alone.
            assert max(fields["Rss"] - fields["Private_Clean"] for fields in all_fields) >= least > 0
            assert {fields["Anonymous"] + fields["Private_Dirty"] for fields in all_fields} == {0}


class TestDecision:
    @pytest.fixture
    def available(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        return lambda size: monkeypatch.setattr(memory, "available_bytes", lambda: size)

    def test_mapped_where_it_does_not_fit(
        self, tmp_path: Path, available: Callable[[int], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        test_sources_mxfp4.write(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        dense = sum(4 * tensor.numel() for key, tensor in tensors.items() if ".experts." not in key)
        scales = sum(tensor.nbytes for key, tensor in tensors.items() if key.endswith("_scales"))
        available(dense + scales - 1)
        with pytest.raises(NotEnoughMemoryError, match="the weights beside the experts, and the experts' scales"):
            load(tmp_path, store="mapped")
        available(dense + scales)
        assert all(store.mapped for store in stores(load(tmp_path)))
        assert "the experts stay in the checkpoint's files" in caplog.text

    def test_its_own_format_may_be_named(self, published: Callable[[str], Path]) -> None:
        model = load(published("INT4"), store="mapped", expert_format="int4")
        assert all(store.mapped for store in stores(model))

    @pytest.mark.parametrize(
        ("name", "settings", "why"),
        [
            ("INT4", {"expert_format": "int8"}, "holds INT4 in groups of 32, which is to be quantised again to int8"),
            ("FP8, one scale", {"expert_format": "bf16"}, "which is to be quantised again to bf16"),
        ],
    )
    def test_what_is_quantised_again_cannot_be_mapped(
        self, name: str, settings: dict[str, str], why: str, published: Callable[[str], Path]
    ) -> None:
        ways = rf"leave out expert_format, .*, or make a ready store .* --format {settings['expert_format']}\)"
        with pytest.raises(ConfigError, match=rf"store 'mapped' .*{why}; {ways}, or set store: auto or resident"):
            load(published(name), store="mapped", **settings)

    def test_what_is_turned_cannot_be_mapped(self, tmp_path: Path, available: Callable[[int], None]) -> None:
        TURNED(tmp_path)
        why = (
            r"weight holds INT4 in groups of 32, packed along the other axis than the engine reads; make a ready store "
            r"of it, which can be mapped \(kt-sft quantize --format auto\)"
        )
        with pytest.raises(ConfigError, match=why):
            load(tmp_path, store="mapped")
        assert not any(store.mapped for store in stores(load(tmp_path)))  # auto
        available(1000)
        with pytest.raises(NotEnoughMemoryError, match=rf"They cannot stay in the checkpoint's files either: .*{why}"):
            load(tmp_path)


def test_bad_scales_are_found_when_they_are_mapped(tmp_path: Path) -> None:
    test_sources_mxfp4.write(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{test_sources_mxfp4.EXPERTS}.gate_up_proj_scales"][3, 5, 1] = 255  # row 2 of up

    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"\(up of expert 3 of .*\): the scale at row 2, column 1 is no number"):
        load(tmp_path, store="mapped")

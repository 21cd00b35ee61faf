"""`store: mapped`: experts that stay in the checkpoint's own files."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kt_sft import CpuExperts, KTConfig
from kt_sft.config import ConfigError
from kt_sft.loading import memory
from kt_sft.loading.errors import NotEnoughMemoryError
from tests.forked import Rank, forked_ranks
from tests.pages import mappings

Layout = Callable[[Path, Path], None]


@pytest.fixture(autouse=True)
def nothing_is_loaded() -> None:
    """A model that an earlier test left in a reference cycle would share its experts, which then need no memory."""
    gc.collect()


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=KTConfig(**settings)).eval()


def layers(model: Any) -> list[CpuExperts]:
    return [module for module in model.modules() if isinstance(module, CpuExperts)]


def in_shards(model: Path, target: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(target, max_shard_size="40KB")


def fused(model: Path, target: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(target, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(target / "model.safetensors")


@pytest.mark.parametrize("layout", [in_shards, fused])
def test_it_is_the_same_model(layout: Layout, tiny_moe: Path, tmp_path: Path) -> None:
    layout(tiny_moe, tmp_path)
    mapped, resident = load(tmp_path, store="mapped"), load(tmp_path, store="resident")
    for one, other in zip(layers(mapped), layers(resident), strict=True):
        assert one.store.mapped
        assert not other.store.mapped
        assert one.store.missing() == []
        assert one.store.relative_error == 0
        assert one.store.nbytes == 8 * 3 * 24 * 32 * 2
        for ours, theirs in zip(one.dequantized(), other.dequantized(), strict=True):
            assert torch.equal(ours, theirs)
    results = []
    for model in (mapped, resident):
        embedded = torch.linspace(-1, 1, 2 * 24 * 32).reshape(2, 24, 32).bfloat16().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        logits.float().square().sum().backward()
        results.append((logits, embedded.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_it_saves_what_it_was_loaded_from(tiny_moe: Path, tmp_path: Path) -> None:
    load(tiny_moe, store="mapped").save_pretrained(tmp_path)
    saved, source = load_file(tmp_path / "model.safetensors"), load_file(tiny_moe / "model.safetensors")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[key], source[key]) for key in source)


def test_two_models_and_two_processes_have_the_files_pages(tiny_moe: Path, tmp_path: Path) -> None:
    def rank(pipe: Connection) -> None:
        torch.set_num_threads(1)  # a forked child has none of its parent's threads
        model = load(tiny_moe, store="mapped", num_threads=1)
        reference = load(tiny_moe, store="mapped", num_threads=1)  # as DPO's
        assert all(a.store is b.store for a, b in zip(layers(model), layers(reference), strict=True))
        for layer in layers(model):
            layer.dequantized()
        pipe.send(None)
        pipe.recv()  # until the other has read its pages
        pipe.send(mappings(str(tiny_moe / "model.safetensors")))
        pipe.recv()

    with forked_ranks(port=str(tmp_path)) as start:
        ranks = [start(rank), start(rank)]
        for one in ranks:
            one.hears()
        for one in ranks:
            one.go_on()
        pages = [one.hears() for one in ranks]
    assert pages[0].keys() == pages[1].keys()
    for found in pages:
        (fields,) = found.values()  # one mapping for all layers
        assert fields["Rss"] >= 72  # the experts
        assert fields["Anonymous"] == 0
        assert fields["Private_Clean"] == fields["Private_Dirty"] == 0


class TestDecision:
    """`store: auto` is resident where that fits, and mapped otherwise."""

    @pytest.fixture
    def available(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        return lambda size: monkeypatch.setattr(memory, "available_bytes", lambda: size)

    def dense_bytes(self, model: Path) -> int:
        return sum(parameter.nbytes for parameter in load(model).parameters())

    def test_resident_where_it_fits(self, tiny_moe: Path, available: Callable[[int], None]) -> None:
        available(self.dense_bytes(tiny_moe) + (72 << 10))
        assert not any(layer.store.mapped for layer in layers(load(tiny_moe)))

    def test_mapped_where_it_does_not(
        self, tiny_moe: Path, available: Callable[[int], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        available(self.dense_bytes(tiny_moe) + (72 << 10) - 1)
        with caplog.at_level(logging.INFO, "kt_sft"):
            model = load(tiny_moe)
        assert all(layer.store.mapped for layer in layers(model))
        assert "the experts stay in the checkpoint's files" in caplog.text
        assert "not enough memory for the experts of 2 layers" in caplog.text
        said = "bf16, 72.0 KiB mapped from the checkpoint's files, which must stay as they are; values are not checked"
        assert said in caplog.text

    def test_the_rest_must_fit_in_any_case(self, tiny_moe: Path, available: Callable[[int], None]) -> None:
        available(self.dense_bytes(tiny_moe) - 1)
        with pytest.raises(NotEnoughMemoryError, match="for the experts of 2 layers"):
            load(tiny_moe)
        with pytest.raises(NotEnoughMemoryError, match="for the weights beside the experts"):
            load(tiny_moe, store="mapped")
        with pytest.raises(NotEnoughMemoryError, match="for the experts of 2 layers"):
            load(tiny_moe, store="resident")

    def test_what_cannot_be_mapped_is_said(self, tmp_path: Path, available: Callable[[int], None]) -> None:
        make(FAMILIES["gpt_oss"][0]).bfloat16().save_pretrained(tmp_path)
        why = (
            r"gate_up_proj holds BF16 values, the gate matrix transposed; make a ready store of it, which can be "
            r"mapped \(kt-sft quantize --format bf16\)"
        )
        with pytest.raises(ConfigError, match=rf"store 'mapped' .*{why}, or set store: auto or resident"):
            load(tmp_path, store="mapped")
        available(100_000)
        with pytest.raises(NotEnoughMemoryError, match=rf"They cannot stay in the checkpoint's files either: .*{why}"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            ({}, r"holds F32 values, which are to be stored as bf16; make .* \(kt-sft quantize --format bf16\)"),
            ({"expert_format": "int4"}, r"holds F32 values, which are to be stored as int4; make .* --format int4\)"),
        ],
    )
    def test_what_would_be_converted_cannot_be_mapped(
        self, settings: dict[str, str], why: str, tiny_moe: Path, tmp_path: Path, available: Callable[[int], None]
    ) -> None:
        AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).save_pretrained(tmp_path)
        available(self.dense_bytes(tmp_path))
        with pytest.raises(NotEnoughMemoryError, match=why):
            load(tmp_path, **settings)

    def test_bf16_rows_are_no_rows_of_another_format(self, tiny_moe: Path) -> None:
        why = "holds BF16 values, which are to be stored as int4; leave out expert_format, .*, or make a ready store"
        with pytest.raises(ConfigError, match=f"store 'mapped' is not possible: .* {why}"):
            load(tiny_moe, store="mapped", expert_format="int4")

    def test_settings_that_contradict_each_other(self) -> None:
        with pytest.raises(ConfigError, match="store must be one of auto, resident, mapped, got 'disk'"):
            KTConfig(store="disk")
        with pytest.raises(ValueError, match="store 'mapped' is for checkpoints"):
            CpuExperts.from_weights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4), config=KTConfig(store="mapped"))

    def test_one_process_decides_for_all(self, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dense, asked = self.dense_bytes(tiny_moe), []

        def short(each: int, what: str, processes: int, together: int = 0) -> None:
            asked.append((each, processes, together))
            if together:
                raise NotEnoughMemoryError(what)

        monkeypatch.setattr("kt_sft.loading.quantizer.require_bytes", short)

        def rank(pipe: Connection) -> None:
            torch.set_num_threads(1)
            model = load(tiny_moe, num_threads=1)
            pipe.send((asked, [layer.store.mapped for layer in layers(model)]))
            pipe.recv()

        with forked_ranks(port=str(tmp_path)) as start:
            ranks: list[Rank] = [start(rank), start(rank)]
            (first, mapped), (second, also) = (one.hears() for one in ranks)
        assert mapped == also == [True, True]
        assert first + second == [(dense, 2, 72 << 10), (dense, 2, 0)]


class TestUse:
    """What happens to the files while the model runs."""

    @pytest.fixture
    def mapped(self, checkpoint: Path) -> Any:
        return load(checkpoint, store="mapped")

    def test_a_file_that_was_rewritten_is_an_error(self, mapped: Any, checkpoint: Path) -> None:
        file = checkpoint / "model.safetensors"
        with file.open("r+b") as opened:
            opened.truncate(20_000)
        with pytest.raises(RuntimeError, match=rf"{file} has changed since it was mapped.*load the model anew"):
            self.call(
                mapped
            )  # the experts alone: the rest of the model may be mapped by its host, which checks nothing

    def test_a_file_that_was_replaced_stays_what_it_was(self, mapped: Any, checkpoint: Path) -> None:
        before = self.call(mapped)
        (checkpoint / "other").write_bytes(b"another model")
        (checkpoint / "other").replace(checkpoint / "model.safetensors")
        assert torch.equal(self.call(mapped), before)

    def call(self, model: Any) -> torch.Tensor:
        return layers(model)[0](torch.ones(8, 32), torch.arange(8)[:, None], torch.ones(8, 1))

    def test_the_next_layer_is_read_where_most_experts_are_asked(
        self, mapped: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[bool] = []
        first, second = (layer.store for layer in layers(mapped))
        for store in (first, second):
            monkeypatch.setattr(store.neighbours, "read", lambda *, forward: read.append(forward))
        mapped(input_ids=torch.arange(3)[None])  # 6 routed rows for 8 experts
        assert read == []
        embedded = torch.zeros(1, 4, 32, dtype=torch.bfloat16, requires_grad=True)
        mapped(inputs_embeds=embedded).logits.sum().backward()
        assert read == [True, True, False, False]

    def test_resident_stores_have_nothing_to_read(self, tiny_moe: Path) -> None:
        assert all(layer.store.neighbours is None for layer in layers(load(tiny_moe)))

"""`kt-sft quantize --calibrate`: codes chosen for what the experts are given."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import stores
from families import FAMILIES, make
from ready import contents
from test_ready_stores import load
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from kt_sft import CpuExperts
from kt_sft.cli.app import app
from kt_sft.config import ConfigError
from kt_sft.loading.ready import writing
from kt_sft.loading.ready.manifest import read_manifest
from kt_sft.loading.ready.texts import token_sequences


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    colours = ["red", "green", "blue", "black", "white", "grey"]
    rows = [{"instruction": f"say {a} {b}", "input": "", "output": f"{a} {b}"} for a in colours for b in colours]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "texts.jsonl"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def given_to(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """What each layer of experts is given."""
    found: list[tuple[torch.Tensor, ...]] = []
    layers = [module for module in model.modules() if isinstance(module, CpuExperts)]
    hooks = [layer.register_forward_pre_hook(lambda _, given: found.append(given[:3])) for layer in layers]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


def off(exact: Any, model: Any, sequences: list[torch.Tensor]) -> float:
    """Squared distance of what each layer of experts gives, given the same."""
    found = 0.0
    layers = zip(exact.modules(), model.modules(), strict=True)
    pairs = [(one, other) for one, other in layers if isinstance(one, CpuExperts)]
    for ids in sequences:
        for (one, other), given in zip(pairs, given_to(exact, ids), strict=True):
            with torch.no_grad():
                found += (one(*given).float() - other(*given).float()).square().sum().item()
    return found


def test_layers_give_what_they_should_more_nearly(tiny_moe: Path, texts: Path, tmp_path: Path) -> None:
    result = run(tiny_moe, tmp_path / "store", "--calibrate", texts, "--threads", 2)
    assert result.exit_code == 0, result.output

    calibrated, plain = load(tmp_path / "store"), load(tiny_moe, expert_format="int4")
    ids = token_sequences(texts, AutoTokenizer.from_pretrained(tiny_moe), 32768, 64)
    assert off(load(tiny_moe), calibrated, ids) < off(load(tiny_moe), plain, ids)
    assert {store.expert_format for store in stores(calibrated)} == {"int4"}
    settings = read_manifest(tmp_path / "store").settings["calibration"]
    assert (settings["method"], settings["tokens"]) == ("gptq", 32768)


def with_words(folder: Path) -> Path:
    """Gives a model a tokenizer; returns a file of words that it knows."""
    words = {f"w{place}": place for place in range(90)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(folder)
    file = folder.parent / "words.txt"
    file.write_text(" ".join(f"w{7 * place % 90}" for place in range(600)))
    return file


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_other_kinds_of_experts(family: str, tmp_path: Path) -> None:
    """Transposed, interleaved and biased with a clamped gate; and without a gate.

    What down multiplies, computed beside the engine, must be what the engine multiplies: products lose less.
    """
    model = make(FAMILIES[family][0]).bfloat16()
    model.save_pretrained(tmp_path / "source")
    words = with_words(tmp_path / "source")

    result = run(tmp_path / "source", tmp_path / "store", "--format", "nf4", "--calibrate", words)

    assert result.exit_code == 0, result.output
    assert {store.expert_format for store in stores(load(tmp_path / "store", type(model)))} == {"nf4"}
    exact, plain = load(tmp_path / "source", type(model)), load(tmp_path / "source", type(model), expert_format="nf4")
    ids = token_sequences(words, AutoTokenizer.from_pretrained(tmp_path / "source"), 600, 64)
    calibrated = load(tmp_path / "store", type(model))
    assert off(exact, calibrated, ids) < off(exact, plain, ids)


def plain_experts(one: Any, other: Any) -> dict[str, int]:
    """How many experts of each layer are the same in two models."""
    found, layers = {}, zip(one.named_modules(), other.modules(), strict=True)
    for name, values, others in (
        (name, module.dequantized(), alike.dequantized())
        for (name, module), alike in layers
        if isinstance(module, CpuExperts)
    ):
        same = [(ours == theirs).flatten(1).all(dim=1) for ours, theirs in zip(values, others, strict=True)]
        found[name] = int((same[0] & same[1]).sum())
    return found


def test_experts_without_tokens_are_plain(
    tiny_moe: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(tiny_moe, tmp_path / "store", "--calibrate", texts, "--calibrate-tokens", 2)

    assert result.exit_code == 0, result.output
    unreached = read_manifest(tmp_path / "store").settings["calibration"]["unreached_experts"]
    assert unreached >= 2 * (8 - 2 * 2)  # two tokens come to two experts each
    assert f"no token of the texts came to {unreached} of 16 experts" in caplog.text
    same = plain_experts(load(tmp_path / "store"), load(tiny_moe, expert_format="int4"))
    assert sum(same.values()) >= unreached


def test_a_layer_without_tokens_is_plain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make(FAMILIES["ernie4_5_vl_moe"][0]).bfloat16()
    model.save_pretrained(tmp_path / "source")
    words = with_words(tmp_path / "source")

    result = run(tmp_path / "source", tmp_path / "store", "--calibrate", words)

    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "store").settings["calibration"]["unreached_experts"] >= 2 * 8
    calibrated = load(tmp_path / "store", type(model))
    same = plain_experts(calibrated, load(tmp_path / "source", type(model), expert_format="int4"))
    assert all(count == 8 for name, count in same.items() if "vision_moe" in name)
    assert any(count < 8 for name, count in same.items() if "text_moe" in name)


def test_a_run_that_was_killed_ends_the_same(tiny_moe: Path, texts: Path, tmp_path: Path) -> None:
    arguments = ("--calibrate", texts, "--format", "nf4", "--threads", 1)
    assert run(tiny_moe, tmp_path / "whole", *arguments).exit_code == 0

    def body() -> None:
        torch.set_num_threads(1)
        replace = os.replace

        def dies(source: Any, target: Any) -> None:
            if str(target).endswith("model-00002-of-00003.safetensors"):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        writing.os.replace = dies  # type: ignore[assignment]
        run(tiny_moe, tmp_path / "store", *arguments)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "store.incomplete" / "calibration" / "done.json").exists()
    assert run(tiny_moe, tmp_path / "store", *arguments).exit_code == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


class TestTexts:
    @pytest.fixture
    def tokenizer(self, tiny_moe: Path) -> Any:
        return AutoTokenizer.from_pretrained(tiny_moe)

    def words(self, tokenizer: Any, file: Path, tokens: int = 1000, length: int = 1000) -> list[str]:
        return [tokenizer.decode(ids[0]) for ids in token_sequences(file, tokenizer, tokens, length)]

    @pytest.mark.parametrize(
        "row",
        [
            {"text": "say red"},
            {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "red"}]},
            {"conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": "red"}]},
            {"instruction": "say", "input": "", "output": "red"},
            {"prompt": "say", "chosen": "red", "rejected": "no"},
        ],
    )
    def test_rows(self, row: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row))
        (tmp_path / "rows.json").write_text(json.dumps([row, row]))
        found = self.words(tokenizer, tmp_path / "rows.jsonl")
        assert found == self.words(tokenizer, tmp_path / "rows.json")
        assert len(found) == 2
        assert "say" in found[0]
        assert "red" in found[0]

    def test_plain_text_is_cut(self, tokenizer: Any, tmp_path: Path) -> None:
        (tmp_path / "plain.txt").write_text("red green blue " * 50)
        found = token_sequences(tmp_path / "plain.txt", tokenizer, 100, 32)
        assert [ids.shape[1] for ids in found] == [32, 32, 32, 4]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("rows.json", '[{"text": "a"}, {"label": 3}]', "row 1 has neither text"),
            ("rows.jsonl", '{"text": ', "cannot be read"),
            ("plain.txt", "", "holds no text"),
        ],
    )
    def test_files_that_are_none(self, name: str, content: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=message):
            token_sequences(tmp_path / name, tokenizer, 100, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "int8"], "calibration is for formats of four bits (int4, nf4, mxfp4)"),
        (["--calibrate", "nowhere.txt"], "nowhere.txt to calibrate with does not exist"),
    ],
)
def test_what_cannot_be_calibrated(
    arguments: list[str], message: str, tiny_moe: Path, texts: Path, tmp_path: Path
) -> None:
    result = run(tiny_moe, tmp_path / "store", "--calibrate", texts, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.glob("store*"))


def test_a_model_without_a_tokenizer(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    result = run(checkpoint, tmp_path / "store", "--calibrate", texts)
    assert result.exit_code == 2
    assert "has no tokenizer to calibrate with" in result.output

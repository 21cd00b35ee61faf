"""Training looks for memory before it loads anything: what it certainly needs must be there, the rest is a warning."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llamafactory.model import load_model, load_tokenizer

from kt_sft.engine import info
from kt_sft.loading import memory
from kt_sft.loading.errors import NotEnoughMemoryError
from kt_sft.planning.check import TrainingCheck
from kt_sft.planning.memory import lora_parameters
from kt_sft.planning.model import ModelFacts, read_model
from kt_sft.planning.setup import setup_of

BLOCK: dict[str, Any] = {"kt_sft": {"lora_experts": True, "store": "resident"}}


@pytest.fixture
def grant(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how much memory there is."""

    def grant(size: int) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda: size)
        monkeypatch.setattr(info, "available_bytes", lambda: size)

    return grant


def train_model(parse: Callable[..., Any], **changes: Any) -> Any:
    """As LLaMA-Factory's stages load the model that they train."""
    model_args, _, _, finetuning_args, _ = parse(**changes)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    return load_model(tokenizer, model_args, finetuning_args, is_trainable=True)


def facts_of(recipe: dict[str, Any]) -> tuple[ModelFacts, TrainingCheck]:
    setup = setup_of(recipe)
    return read_model(setup), TrainingCheck(setup)


def need_of(base_recipe: dict[str, Any]) -> tuple[int, int]:
    """(of the weights, of adapters and optimizer)."""
    facts, check = facts_of(base_recipe | BLOCK)
    return facts.experts_bytes + facts.dense_bytes, check.host_bytes(facts)


def test_what_training_certainly_takes(base_recipe: dict[str, Any]) -> None:
    """Rank 4 on q and v, and on both parameters of 2 x 8 experts: master, gradient, two moments, the engine's copy."""
    facts, check = facts_of(base_recipe | BLOCK)
    linear = 2 * 4 * (32 + 32 + 32 + 16)
    routed = 2 * 8 * 4 * (32 + 48 + 24 + 32)
    assert lora_parameters(facts, check.setup) == (linear, routed)
    assert check.host_bytes(facts) == 16 * linear + 18 * routed


def test_a_run_without_room_for_its_optimizer_is_refused_before_it_loads(
    base_recipe: dict[str, Any],
    parse: Callable[..., Any],
    grant: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, training = need_of(base_recipe)
    monkeypatch.setattr("kt_sft.loading.processes.stream", lambda *_, **__: pytest.fail("weights were loaded"))
    grant(weights + training // 2)
    with pytest.raises(NotEnoughMemoryError) as error:
        train_model(parse, **BLOCK)
    text = str(error.value)
    assert "not enough memory for the experts of 2 layers, the weights beside them, adapters and optimizer" in text
    found = re.findall(r"(experts|other weights|adapters|optimizer|activations \(predicted\)) ([\d.]+ [KM]iB)", text)
    assert [name for name, _ in found[-5:]] == [
        "experts",
        "other weights",
        "adapters",
        "optimizer",
        "activations (predicted)",
    ]
    assert "check_memory: false in the kt_sft block" in text


def test_the_check_can_be_left_out(
    base_recipe: dict[str, Any], parse: Callable[..., Any], grant: Callable[[int], None]
) -> None:
    weights, training = need_of(base_recipe)
    grant(weights + training // 2)
    block = {"kt_sft": BLOCK["kt_sft"] | {"lora_experts": False, "check_memory": False}}
    assert train_model(parse, **block) is not None


def test_activations_that_may_not_fit_are_a_warning(
    base_recipe: dict[str, Any],
    parse: Callable[..., Any],
    grant: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("kt_sft"), "propagate", True)
    weights, training = need_of(base_recipe)
    # What is certain, and a quarter of a mebibyte for all else.
    grant(weights + training + (1 << 18))
    with caplog.at_level(logging.WARNING, logger="kt_sft"):
        assert train_model(parse, **BLOCK) is not None
    assert "training may run out of host memory: about" in caplog.text
    assert "`kt-sft plan` says what to set" in caplog.text
    caplog.clear()
    grant(1 << 40)
    with caplog.at_level(logging.WARNING, logger="kt_sft"):
        train_model(parse, **BLOCK)
    assert "may run out" not in caplog.text


def test_experts_stay_in_their_files_where_training_leaves_them_no_room(
    base_recipe: dict[str, Any],
    parse: Callable[..., Any],
    grant: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kt_sft.experts import CpuExperts

    # Two models of the same checkpoint would share their experts.
    monkeypatch.setattr("kt_sft.loading.quantizer.shared_store", lambda _: None)
    facts, check = facts_of(base_recipe | {"kt_sft": {}})
    weights, training = facts.experts_bytes + facts.dense_bytes, check.host_bytes(facts)

    def is_mapped(have: int) -> bool:
        grant(have)
        model = train_model(parse, kt_sft={"check_memory": True})
        return any(part.store.mapped for part in model.modules() if isinstance(part, CpuExperts))

    assert is_mapped(weights)  # which alone would fit
    assert not is_mapped(weights + training)


def test_nothing_is_checked_where_nothing_is_trained(parse: Callable[..., Any], base_recipe: dict[str, Any]) -> None:
    model_args, *_ = parse(**BLOCK)
    assert model_args._kt_sft_setup == setup_of(base_recipe | BLOCK)
    model_args, *_ = parse(kt_sft={"check_memory": False})
    assert not hasattr(model_args, "_kt_sft_setup")


def test_a_plan_of_the_recipe_counts_the_same(base_recipe: dict[str, Any], tiny_moe: Path) -> None:
    facts, _ = facts_of(base_recipe | BLOCK)
    files = sum(file.stat().st_size for file in tiny_moe.glob("*.safetensors"))
    # BF16 as stored; the file has a header besides.
    assert facts.experts_bytes + facts.dense_bytes == pytest.approx(files, rel=0.1)

"""Training looks for memory before it loads anything: what it certainly needs must be there, the rest is a warning."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from ready import make_store
from trainers import train_model
from transformers import AutoModelForCausalLM

from kt_sft import CpuExperts, KTConfig
from kt_sft.engine import info
from kt_sft.loading import memory
from kt_sft.loading.errors import NotEnoughMemoryError
from kt_sft.planning import check as planning_check
from kt_sft.planning.activations import Cost
from kt_sft.planning.check import ModelCheck, TrainingCheck
from kt_sft.planning.machine import Machine, this_machine
from kt_sft.planning.memory import lora_parameters, memory_of
from kt_sft.planning.model import ModelFacts, read_model
from kt_sft.planning.plan import make_plan
from kt_sft.planning.setup import setup_of
from tests.forked import forked_ranks

BLOCK: dict[str, Any] = {"kt_sft": {"lora_experts": True, "store": "resident"}}


@pytest.fixture
def grant(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how much memory there is."""

    def grant(size: int) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda: size)
        monkeypatch.setattr(info, "available_bytes", lambda: size)

    return grant


def facts_of(recipe: dict[str, Any]) -> tuple[ModelFacts, ModelCheck]:
    setup = setup_of(recipe)
    facts = read_model(setup)
    return facts, ModelCheck(setup, facts)


def need_of(base_recipe: dict[str, Any]) -> tuple[int, int]:
    """(of the weights, of adapters and optimizer)."""
    facts, check = facts_of(base_recipe | BLOCK)
    return facts.experts_bytes + facts.dense_bytes, check.certain_bytes


def is_mapped(model: Any) -> bool:
    return any(part.store.mapped for part in model.modules() if isinstance(part, CpuExperts))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged as a warning."""
    monkeypatch.setattr(logging.getLogger("kt_sft"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="kt_sft")
    return caplog


@pytest.fixture(autouse=True)
def nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of the same checkpoint would share their experts."""
    monkeypatch.setattr("kt_sft.loading.quantizer.shared_store", lambda _: None)


def test_what_training_certainly_takes(base_recipe: dict[str, Any]) -> None:
    """Rank 4 on q and v, and on both parameters of 2 x 8 experts: master, gradient, two moments, the engine's copy."""
    facts, check = facts_of(base_recipe | BLOCK)
    linear = 2 * 4 * (32 + 32 + 32 + 16)
    routed = 2 * 8 * 4 * (32 + 48 + 24 + 32)
    assert lora_parameters(facts, check.setup) == (linear, routed)
    assert check.certain_bytes == 16 * linear + 18 * routed


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
    log: pytest.LogCaptureFixture,
) -> None:
    weights, training = need_of(base_recipe)
    # What is certain, and a quarter of a mebibyte for all else.
    grant(weights + training + (1 << 18))
    assert train_model(parse, **BLOCK) is not None
    assert "training may run out of host memory: not enough memory for the experts of 2 layers" in log.text
    assert "adapters and optimizer, and activations and buffers as predicted" in log.text
    assert "`kt-sft plan` says what to set" in log.text
    log.clear()
    grant(1 << 40)
    train_model(parse, **BLOCK)
    assert "may run out" not in log.text


def test_experts_stay_in_their_files_where_training_leaves_them_no_room(
    base_recipe: dict[str, Any], parse: Callable[..., Any], grant: Callable[[int], None]
) -> None:
    """And a plan says so, of what is certain and of what is predicted."""
    setup = setup_of(base_recipe | {"kt_sft": {}})
    facts = read_model(setup)
    resident = make_plan(facts, setup, this_machine(setup.settings.num_threads), base=0, measures=False)
    need, certain = resident.memory.host_least, resident.memory.host.certain
    assert not resident.memory.is_mapped
    assert need - certain > 1 << 20

    def planned_and_loaded(have: int) -> tuple[bool, bool]:
        grant(have)
        plan = make_plan(facts, setup, this_machine(setup.settings.num_threads), base=0, measures=False)
        return plan.memory.is_mapped, is_mapped(train_model(parse, kt_sft={"check_memory": True}))

    assert facts.experts_bytes + facts.dense_bytes < certain
    assert planned_and_loaded(facts.experts_bytes + facts.dense_bytes) == (True, True)  # which alone would fit
    assert planned_and_loaded(certain) == (True, True)  # without activations
    assert planned_and_loaded(need - (1 << 10)) == (True, True)
    assert planned_and_loaded(need) == (False, False)


def test_without_the_check_only_weights_decide_where_experts_are(
    base_recipe: dict[str, Any], parse: Callable[..., Any], grant: Callable[[int], None]
) -> None:
    block = {"kt_sft": {"check_memory": False}}
    setup = setup_of(base_recipe | block)
    facts = read_model(setup)
    for short in (0, 1 << 12):
        grant(facts.experts_bytes + facts.dense_bytes - short)
        plan = make_plan(facts, setup, this_machine(setup.settings.num_threads), base=0, measures=False)
        assert plan.memory.is_mapped is is_mapped(train_model(parse, **block)) is bool(short)


class UnforeseenError(Exception):
    """Of a kind that nobody expects."""


@pytest.mark.parametrize("what", ["facts_of", "memory_of", "step_cost"])
def test_what_cannot_be_predicted_is_said_and_training_goes_on(
    what: str,
    base_recipe: dict[str, Any],
    parse: Callable[..., Any],
    grant: Callable[[int], None],
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, training = need_of(base_recipe)

    def fail(*_: Any, **__: Any) -> None:
        raise UnforeseenError("the model's code is of a new kind")

    monkeypatch.setattr(planning_check, what, fail)
    grant(weights + training + 1)
    assert train_model(parse, **BLOCK) is not None
    assert log.text.count("before training: the model's code is of a new kind") == 1


def test_a_refusal_without_advice_is_still_the_refusal(
    base_recipe: dict[str, Any],
    parse: Callable[..., Any],
    grant: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, _ = need_of(base_recipe)
    monkeypatch.setattr(planning_check, "suggest", lambda *_: 1 / 0)
    grant(weights)
    with pytest.raises(NotEnoughMemoryError, match="not enough memory for the experts of 2 layers"):
        train_model(parse, **BLOCK)


@pytest.mark.parametrize("first", [0, 1])
def test_whichever_process_loads_the_experts_warns_for_all(
    first: int,
    base_recipe: dict[str, Any],
    grant: Callable[[int], None],
    tmp_path: Path,
) -> None:
    """Experts once and all else twice: less than that is a warning, by the one process that looks."""
    facts, check = facts_of(base_recipe | BLOCK)
    grant(facts.experts_bytes + 2 * (facts.dense_bytes + check.certain_bytes) + (1 << 18))

    def rank(pipe: Connection) -> None:
        torch.set_num_threads(1)
        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("kt_sft").addHandler(handler)
        pipe.recv()  # who goes on first loads the experts
        config = KTConfig.from_dict(BLOCK["kt_sft"])
        config.training_check = TrainingCheck(check.setup)  # type: ignore[attr-defined]
        AutoModelForCausalLM.from_pretrained(check.setup.model, quantization_config=config)
        pipe.send([message for message in said if "may run out of host memory" in message])
        pipe.recv()

    with forked_ranks(port=str(tmp_path)) as start:
        ranks = [start(rank), start(rank)]
        loading, waiting = ranks[first], ranks[1 - first]
        loading.go_on()
        warnings = loading.hears()
        waiting.go_on()
        assert waiting.hears() == []
    assert len(warnings) == 1
    assert "in each of 2 processes" in warnings[0]


@pytest.mark.parametrize("expert_format", ["int4", "int8", "bf16"])
def test_of_a_mapped_ready_store_nothing_is_in_memory(
    base_recipe: dict[str, Any],
    parse: Callable[..., Any],
    grant: Callable[[int], None],
    tiny_moe: Path,
    tmp_path: Path,
    expert_format: str,
) -> None:
    """Scales are mapped like their codes, so what training needs beside them is enough; a plan says so as well."""
    make_store(tiny_moe, tmp_path / "store", expert_format=expert_format)
    changes = {"model_name_or_path": str(tmp_path / "store"), "kt_sft": {}}
    facts, check = facts_of(base_recipe | changes)
    memory = memory_of(facts, check.setup, Machine("any", None), Cost(), base=0, is_mapped=True)
    assert memory.host.experts == 0
    grant(memory.host.certain)
    assert is_mapped(train_model(parse, **changes))


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

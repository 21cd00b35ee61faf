"""Micro-batches interleaved give what they give one after the other, in models of several families.

The order of what the engine sees is written as a string: S a pass is submitted, A it has been awaited.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import adapted
from adapted_models import load as load_tiny
from families import FAMILIES, VOCABULARY, make
from recording import record_engine
from torch import Tensor, nn

import kt_sft
from kt_sft.offload.interleave import Interleaver

Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def interleaver() -> Interleaver:
    return Interleaver(torch.device("cpu"))


def micro_batches(count: int, seed: int = 1) -> list[Batch]:
    """Of different sizes; every second one is padded, so that its mask makes other nodes for autograd."""
    random = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(count):
        ids = torch.randint(3, VOCABULARY, (2, 9 + 2 * number), generator=random)
        mask = torch.ones_like(ids)
        if number % 2:
            mask[0, -4:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_turn(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[float], Gradients]:
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
    return losses, gradients(model)


def interleaved(model: nn.Module, batches: Sequence[Batch], interleaver: Interleaver) -> tuple[list[float], Gradients]:
    model.zero_grad()
    losses: list[float] = []
    for first in range(0, len(batches), 2):
        pair = [functools.partial(loss_of, model, batch) for batch in batches[first : first + 2]]
        made = interleaver.run(pair)
        functools.reduce(torch.add, made).backward()
        losses += [loss.item() for loss in made]
    return losses, gradients(model)


def assert_same(found: tuple[list[float], Gradients], expected: tuple[list[float], Gradients]) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert [name for name in found[1] if not torch.equal(found[1][name], expected[1][name])] == []


def checkpoint(model: nn.Module, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral", "nemotron_h", "qwen2_moe", "qwen3_next"])
def test_gradients_are_the_same_bits(family: str, interleaver: Interleaver, tmp_path: Path) -> None:
    """Of all parameters. Shared experts run before the routed ones, after them or, overlapping, beside them."""
    plain = make(FAMILIES[family][0])
    plain.save_pretrained(tmp_path)
    model = type(plain).from_pretrained(tmp_path, dtype=torch.float32, quantization_config=kt_sft.KTConfig()).train()
    batches = micro_batches(2)
    for overlap in (False, True):
        for part in model.modules():
            if isinstance(part, kt_sft.CpuExperts):
                part.config.overlap_shared_experts = overlap
        assert_same(interleaved(model, batches, interleaver), in_turn(model, batches))
    if not model.supports_gradient_checkpointing:
        return
    checkpoint(model, use_reentrant=True)  # as LLaMA-Factory asks for
    assert_same(interleaved(model, batches, interleaver), in_turn(model, batches))


RECOMPUTE, NONE_RETAINED = {"activation_policy": "recompute"}, {"retained_mb": 0}


@pytest.mark.parametrize(
    ("policy", "checkpointing", "lora_experts"),
    [
        *((policy, way, True) for policy in ({}, RECOMPUTE) for way in (None, True, False)),
        (NONE_RETAINED, True, True),
        ({}, True, False),
    ],
    ids=str,
)
def test_adapters_get_the_same_bits(
    tiny_moe: Path, policy: dict[str, Any], checkpointing: bool | None, lora_experts: bool, interleaver: Interleaver
) -> None:
    model = adapted(load_tiny(tiny_moe, **policy), **({} if lora_experts else {"target_parameters": None})).train()
    if checkpointing is not None:
        checkpoint(model, checkpointing)
    batches = micro_batches(2)
    expected = in_turn(model, batches)
    assert any(".experts." in name for name in expected[1]) == lora_experts
    assert_same(interleaved(model, batches, interleaver), expected)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_one_is_submitted_before_the_other_is_awaited(
    tiny_moe: Path, checkpointing: bool | None, interleaver: Interleaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(load_tiny(tiny_moe), target_parameters=None).train()
    if checkpointing is not None:
        checkpoint(model, checkpointing)
    events: list[str] = []
    record_engine(monkeypatch, events.append)
    a, b = (functools.partial(loss_of, model, batch) for batch in micro_batches(2))
    losses = interleaver.run([a, b])
    assert "".join(events) == "SSASASAA"  # of layer 0: S of a, S of b, A of a; then S of a in layer 1, ...
    events.clear()
    torch.add(*losses).backward()
    assert "".join(events) == "SSASASAA"
    events.clear()
    in_turn(model, micro_batches(2))
    assert "".join(events) == "SA" * 8


def test_what_runs_without_gradients_runs_in_one_go(
    tiny_moe: Path, interleaver: Interleaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DPO's reference does: the same model, with its adapters switched off meanwhile."""
    model = adapted(load_tiny(tiny_moe), target_parameters=None).train()
    batches = micro_batches(2)

    def function(batch: Batch) -> tuple[Tensor, float]:
        loss = loss_of(model, batch)
        with torch.no_grad(), model.disable_adapter():
            return loss, loss_of(model, batch).item()

    expected = [function(batch)[1] for batch in batches]
    found = interleaver.run([functools.partial(function, batch) for batch in batches])
    torch.add(found[0][0], found[1][0]).backward()
    assert [reference for _, reference in found] == expected
    assert gradients(model).keys() == in_turn(model, batches)[1].keys()


@pytest.mark.parametrize("count", [3, 4])
def test_more_than_two_are_added_up_in_another_order(tiny_moe: Path, count: int, interleaver: Interleaver) -> None:
    """The terms are the same bits, so n of them, added in either order, are within (n - 1) 2**-24 times the sum of
    their magnitudes of the exact sum (Higham 2002, 4.2, to first order), and within twice that of each other. Three are
    added in the same order: two at a time, and the third."""
    model = adapted(load_tiny(tiny_moe)).train()
    batches = micro_batches(count)
    losses, expected = in_turn(model, batches)
    found_losses, found = interleaved(model, batches, interleaver)
    assert found_losses == losses
    terms = [in_turn(model, [batch])[1] for batch in batches]
    for name in expected:
        magnitude = torch.stack([term[name].abs() for term in terms]).sum(0)
        bound = 2 * (count - 1) * 2.0**-24 * magnitude if count > 3 else torch.zeros_like(magnitude)
        assert ((found[name] - expected[name]).abs() <= bound).all(), name


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_surfaces_and_the_next_step_works(
    tiny_moe: Path, where: str, failing: int, interleaver: Interleaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(load_tiny(tiny_moe)).train()
    batches = micro_batches(2)
    expected = in_turn(model, batches)
    tokens = batches[failing]["input_ids"].numel()
    submit: Callable[..., Any] = kt_sft.CpuExperts.engine.fget  # type: ignore[attr-defined]

    class Broken:
        """An engine that fails for the micro-batch of so many tokens, in the second layer."""

        def __init__(self, experts: kt_sft.CpuExperts) -> None:
            self._engine, self._experts = submit(experts), experts

        def __getattr__(self, name: str) -> Any:
            function = getattr(self._engine, name)

            def call(**arguments: Any) -> Any:
                if arguments["tokens"] == tokens and self._experts is last:
                    raise MemoryError("no memory is left")
                return function(**arguments)

            return call if name == f"prepare_{where}" else function

    last = [part for part in model.modules() if isinstance(part, kt_sft.CpuExperts)][-1]
    with monkeypatch.context() as patch:
        patch.setattr(kt_sft.CpuExperts, "engine", property(Broken))
        with pytest.raises(RuntimeError, match="no memory was left"):
            interleaved(model, batches, interleaver)
    assert_same(interleaved(model, batches, interleaver), expected)

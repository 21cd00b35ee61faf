"""transformers' Trainer with interleaved micro-batches beside the same Trainer without."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recording import record_engine
from trainers import PAIR, PLAIN, load, losses, same, trainer_of

import kt_sft
from kt_sft.integrations import interleaving

ON = "two micro-batches at a time"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    happened: list[str] = []
    record_engine(monkeypatch, happened.append)
    return happened


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "bf16": True},
        {"left_out": 1, "batch": 1},  # the last step has one micro-batch of the two
    ],
    ids=str,
)
def test_two_micro_batches_give_the_same_bits(
    tiny_moe: Path, tmp_path: Path, arguments: dict[str, Any], events: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for interleave in (False, True):
        events.clear()
        with caplog.at_level(logging.INFO, "kt_sft"):
            trainer, recorder = trainer_of(load(tiny_moe, interleave), tmp_path, **arguments)
            trainer.train()
        found.append((losses(trainer), recorder.steps, "".join(events), trainer.model.state_dict()))
        assert (ON in caplog.text) == interleave
    (plain_losses, plain_steps, plain_events, plain_model), (our_losses, our_steps, our_events, our_model) = found
    assert our_losses == plain_losses
    assert same(our_steps, plain_steps)
    assert same([our_model], [plain_model])
    if "left_out" not in arguments:
        # The first step is watched: does it draw random numbers?
        assert (plain_events, our_events) == (PLAIN * 6, PLAIN * 2 + PAIR * 4)
    assert caplog.text.count(ON) == 1


def test_four_are_two_pairs(tiny_moe: Path, tmp_path: Path, events: list[str]) -> None:
    """(a + b) + (c + d) beside ((a + b) + c) + d: each within 3 u of the sum of magnitudes (Higham 2002, 4.2).

    The magnitudes are known to 3 u from what the plain run had added up after each, so 4 instead of 3 holds them.
    """
    found = []
    for interleave in (False, True):
        events.clear()
        trainer, recorder = trainer_of(load(tiny_moe, interleave), tmp_path, accumulation=4, steps=2)
        trainer.train()
        found.append((losses(trainer), recorder, "".join(events)))
    (plain_losses, plain, _), (our_losses, ours, our_events) = found
    assert our_losses == plain_losses
    assert our_events == PLAIN * 4 + PAIR * 4
    assert same(ours.steps[:1], plain.steps[:1])
    partial = [*plain.substeps[3:], plain.steps[1]]
    for name, expected in plain.steps[1].items():
        sums = torch.stack([torch.zeros_like(expected), *(gradients[name] for gradients in partial)])
        bound = 2 * 4 * 2.0**-24 * sums.diff(dim=0).abs().sum(0)
        assert ((ours.steps[1][name] - expected).abs() <= bound).all()
        assert expected.any()
    # Of a pair the first call does nothing, the second all.
    assert [gradients.keys() == plain.steps[0].keys() for gradients in ours.substeps[3:]] == [False, True, True]
    assert same(ours.substeps[4:5], ours.substeps[5:6])


class NotANumber(transformers.Trainer):
    """The loss of every third micro-batch is not a number."""

    count = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        number = self.count
        loss = super().compute_loss(*args, **kwargs)
        return loss + float("nan") if number % 3 == 0 else loss  # whose gradients are numbers


@pytest.mark.parametrize("filtered", [True, False])
def test_losses_that_are_no_numbers_are_reported_alike(tiny_moe: Path, tmp_path: Path, filtered: bool) -> None:
    found = []
    for interleave in (False, True):
        model = load(tiny_moe, interleave)
        trainer, _ = trainer_of(model, tmp_path, steps=4, kind=NotANumber, logging_nan_inf_filter=filtered)
        trainer.train()
        found.append(losses(trainer))
    assert str(found[0]) == str(found[1])
    assert ("nan" in str(found[0])) != filtered


class Failing(transformers.TrainerCallback):
    """Fails at the second step: after its first micro-batch, or while its second is computed."""

    def __init__(self, experts: kt_sft.CpuExperts, within: bool) -> None:
        self.experts, self.within, self.done = experts, within, False

    def on_substep_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 1 and not self.done:
            self.done = True
            if not self.within:
                raise MemoryError("no memory is left")
            handle = self.experts.register_forward_pre_hook(self.fail)
            self.remove = handle.remove

    def fail(self, *_: Any) -> None:
        self.remove()
        raise MemoryError("no memory is left")


@pytest.mark.parametrize("within", [False, True])
def test_after_an_error_it_trains_as_if_it_had_never_been_interleaved(
    tiny_moe: Path, tmp_path: Path, within: bool
) -> None:
    found = []
    for interleave in (False, True):
        trainer, recorder = trainer_of(load(tiny_moe, interleave), tmp_path)
        experts = [part for part in trainer.model.modules() if isinstance(part, kt_sft.CpuExperts)]
        trainer.add_callback(Failing(experts[-1], within))
        with pytest.raises(MemoryError, match="no memory is left"):
            trainer.train()
        trainer.train()
        found.append((losses(trainer), recorder.steps))
    assert found[0][0] == found[1][0]
    assert len(found[0][1]) == 1 + 3
    assert same(found[0][1], found[1][1])


class TestOff:
    @pytest.mark.parametrize(
        ("lora", "reason"),
        [({"lora_dropout": 0.1}, r"\S+lora_dropout\S* draws dropout masks"), ({}, "the model draws random numbers")],
        ids=["dropout", "noise"],
    )
    def test_where_random_numbers_would_differ(
        self,
        tiny_moe: Path,
        tmp_path: Path,
        lora: dict[str, Any],
        reason: str,
        events: list[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        found = []
        for interleave in (False, True):
            events.clear()
            model = load(tiny_moe, interleave, lora)
            if not lora:  # of a kind that no module's name tells
                for layer in model.get_base_model().model.layers:
                    layer.mlp.gate.register_forward_hook(draw)
            with caplog.at_level(logging.INFO, "kt_sft"):
                trainer, recorder = trainer_of(model, tmp_path)
                trainer.train()
            found.append((losses(trainer), recorder.steps, "".join(events)))
        assert found[0][0] == found[1][0]
        assert same(found[0][1], found[1][1])
        assert found[1][2] == PLAIN * 6
        said = [record.getMessage() for record in caplog.records if "one after the other" in record.getMessage()]
        assert len(said) == 1
        assert re.search(reason, said[0])

    @pytest.mark.parametrize("interleave", [False, None])
    def test_where_it_is_not_wanted(
        self,
        tiny_moe: Path,
        tmp_path: Path,
        interleave: bool | None,
        events: list[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """By default on the CPU: nothing could run beside the engine there."""
        with caplog.at_level(logging.INFO, "kt_sft"):
            trainer_of(load(tiny_moe, interleave), tmp_path)[0].train()
        assert "".join(events) == PLAIN * 6
        assert "micro-batch" not in caplog.text

    def test_in_a_model_without_experts_in_the_engine(self, tiny_moe: Path, tmp_path: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_moe)
        trainer, recorder = trainer_of(model, tmp_path)
        trainer.train()
        assert len(recorder.steps) == 3
        assert not trainer._kt_sft_interleaving  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda t: setattr(t.accelerator.state, "distributed_type", "DEEPSPEED"), "DEEPSPEED has a backward"),
            (lambda t: setattr(t.args, "_n_gpu", 2), "copies the model to 2 devices"),
            (lambda t: setattr(t.args, "torch_compile", True), "torch_compile is set"),
            (lambda t: setattr(t.args, "activation_offloading", True), "activation_offloading is set"),
            (lambda t: t.accelerator.gradient_state.plugin_kwargs.update(sync_each_batch=True), "sync_each_batch"),
            (lambda t: checkpoint_by_itself(t.model), "not torch's"),
            (lambda t: checkpoint_with_router_loss(t.model), "set use_reentrant_gc: false"),
            (lambda t: train_tied(t.model), "is trained and also"),
        ],
        ids=["deepspeed", "data parallel", "compiled", "offloaded", "synchronised", "checkpointing", "routers", "tied"],
    )
    def test_where_it_cannot_be(
        self, tiny_moe: Path, tmp_path: Path, change: Callable[[Any], Any], reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer, _ = trainer_of(load(tiny_moe, True), tmp_path)
        assert interleaving.reason_against(trainer, trainer.model) is None
        monkeypatch.setattr(trainer.accelerator, "state", FakeState())
        state = trainer.accelerator.gradient_state.plugin_kwargs
        monkeypatch.setattr(trainer.accelerator.gradient_state, "plugin_kwargs", dict(state))
        change(trainer)
        assert reason in str(interleaving.reason_against(trainer, trainer.model))


def draw(*_: Any) -> None:
    torch.rand(1)


class FakeState:
    """Accelerate's is one for all of a process."""

    distributed_type = "NO"


def checkpoint_by_itself(model: Any) -> None:
    model.get_base_model()._set_gradient_checkpointing(True, lambda function, *args: function(*args))


def checkpoint_with_router_loss(model: Any) -> None:
    model.config.output_router_logits = True
    model.gradient_checkpointing_enable({"use_reentrant": True})


def train_tied(model: Any) -> None:
    base = model.get_base_model()
    base.lm_head.weight = base.model.embed_tokens.weight
    base.lm_head.weight.requires_grad_(True)


class FakeAccelerator:
    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        self.calls.append(kwargs)
        loss.backward()  # type: ignore[no-untyped-call]


def test_every_loss_of_a_step_gets_its_gradient() -> None:
    accelerator, weight = FakeAccelerator(), torch.ones((), requires_grad=True)
    with interleaving._held_backward(accelerator) as held:
        accelerator.backward(weight * 1.0, tag=1)
        accelerator.backward(weight * 10.0, tag=1)
    held.run()
    assert weight.grad == 11
    assert accelerator.calls == [{"tag": 1}]


def test_different_arguments_of_backward_are_an_error() -> None:
    accelerator, weight = FakeAccelerator(), torch.ones((), requires_grad=True)
    with interleaving._held_backward(accelerator) as held:
        accelerator.backward(weight * 1.0)
        accelerator.backward(weight * 10.0, tag=2)
    with pytest.raises(RuntimeError, match=r"different arguments \(tag\)"):
        held.run()
    assert weight.grad is None


class WithHooks(transformers.Trainer):
    """From its second step on, so that a micro-batch of its first is never left waiting."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return super().training_step(*args, **kwargs)


class WithDefaultDevice(transformers.Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.device("cpu"):
            return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(("kind", "reason"), [(WithHooks, "hooks for saved tensors"), (WithDefaultDevice, "a mode of")])
def test_it_is_off_where_torch_has_state_of_the_thread(
    tiny_moe: Path, tmp_path: Path, kind: Any, reason: str, events: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kt_sft"):
        trainer_of(load(tiny_moe, True), tmp_path, kind=kind, steps=2)[0].train()
    assert "".join(events) == PLAIN * 4
    assert f"one after the other: {reason}" in caplog.text


def test_it_is_off_where_a_trained_module_is_called_twice(
    tiny_moe: Path, tmp_path: Path, events: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tiny_moe, True)
    part = next(part for name, part in model.named_modules() if name.endswith("lora_A.default"))
    called: list[int] = []

    def twice(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if len(called) % 2:
            return None
        called.append(1)
        again = module(*args)
        called.append(1)
        return (output + again) / 2

    part.register_forward_hook(twice)
    with caplog.at_level(logging.INFO, "kt_sft"):
        trainer_of(model, tmp_path, steps=2)[0].train()
    assert "".join(events) == PLAIN * 4
    assert re.search(r"lora_A.default is trained and called more than once", caplog.text)

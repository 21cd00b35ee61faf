"""A micro-batch that has no second one is cut in two along its batch, and the halves are interleaved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recording import record_engine
from rounding_noise import bounds_of_rounding
from torch import Tensor
from trainers import PAIR, PLAIN, load, losses, padded, trainer_of

import kt_sft
from kt_sft.integrations import interleaving

LORA_EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_halves_give_the_same_but_for_rounding(
    tiny_moe: Path, tmp_path: Path, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three sequences of different lengths, the first two and the last.

    Products of other shapes may add in another order, and the engine may then round a value to another BF16 neighbour:
    both runs are within the bound of those roundings of what is computed without any, and within twice of each other.
    """
    events: list[str] = []
    record_engine(monkeypatch, events.append)
    found = []
    for interleave in (False, True):
        events.clear()
        model, batches = load(tiny_moe, interleave, LORA_EXPERTS), []

        def collate(rows: Any, batches: list[dict[str, Tensor]] = batches) -> dict[str, Tensor]:
            batches.append(padded(rows))
            return batches[-1]

        trainer, recorder = trainer_of(
            model, tmp_path, accumulation, steps=2, batch=3, learning_rate=0.0, data_collator=collate
        )
        trainer.train()
        found.append((losses(trainer)[1], recorder.steps[1], "".join(events)))
    (plain_loss, plain, plain_events), (our_loss, ours, our_events) = found
    assert plain_events == PLAIN * 2 * accumulation
    # The first step is watched. Of three micro-batches, two are a pair and the third is cut; each has two directions.
    assert our_events == PLAIN * accumulation + PAIR * (accumulation + 1)

    def run() -> list[Tensor]:
        model.zero_grad()
        step = batches[accumulation:]
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in step)
        made = [model(**batch, num_items_in_batch=tokens).loss for batch in step]
        torch.stack(made).sum().backward()
        return [torch.stack(made).sum().detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    names = [name for name, p in model.named_parameters() if p.requires_grad]
    loss_bound, *bounds = bounds_of_rounding(run, Tensor.norm)
    assert abs(our_loss - plain_loss) <= 2 * loss_bound < 0.01 * plain_loss
    assert ours.keys() == plain.keys() == set(names)
    for name, bound in zip(names, bounds, strict=True):
        # A mean of halves' means would be off by a fifth or more: they have unequal numbers of tokens.
        assert (ours[name] - plain[name]).norm() <= 2 * bound < 0.1 * plain[name].norm(), name


def batch_of(count: int = 4) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + 6 * count).view(count, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class OtherLoss(transformers.Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def set_router_loss(trainer: transformers.Trainer, _: dict[str, Any]) -> None:
    trainer.model.config.output_router_logits = True  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (OtherLoss, lambda trainer, batch: None, "no sum over tokens"),
        (transformers.Trainer, lambda trainer, batch: setattr(trainer, "label_smoother", print), "no sum over tokens"),
        (transformers.Trainer, lambda trainer, batch: setattr(trainer, "compute_loss_func", print), "no sum"),
        (transformers.Trainer, lambda trainer, batch: setattr(trainer, "model_accepts_loss_kwargs", False), "a mean"),
        (transformers.Trainer, set_router_loss, "auxiliary loss"),
        (transformers.Trainer, lambda trainer, batch: batch.update(pixel_values=torch.ones(4, 3)), "other kinds"),
        (
            transformers.Trainer,
            lambda trainer, batch: batch.update(position_ids=torch.ones(3, 4, 6)),
            "first dimension",
        ),
        (transformers.Trainer, lambda trainer, batch: batch.update(batch_of(1)), "one sequence"),
        (
            transformers.Trainer,
            lambda trainer, batch: batch.update(batch_of(3), position_ids=torch.ones(3, 3, 6)),
            "position_ids are no rows",
        ),
    ],
    ids=["loss", "smoothing", "loss function", "mean", "routers", "images", "positions", "one", "mrope of three"],
)
def test_what_stays_whole(
    tiny_moe: Path,
    tmp_path: Path,
    kind: type[transformers.Trainer],
    change: Callable[[transformers.Trainer, dict[str, Any]], None],
    reason: str,
) -> None:
    trainer, _ = trainer_of(load(tiny_moe, True), tmp_path, kind=kind)
    batch = batch_of()
    whole = interleaving.reason_to_stay_whole
    trainer.label_smoother = trainer.compute_loss_func = None
    if kind is transformers.Trainer:
        assert whole(trainer, trainer.model, batch) is None
    change(trainer, batch)
    assert reason in str(whole(trainer, trainer.model, batch))


@pytest.mark.parametrize(("interleave", "sequences", "cut"), [(True, 2, True), (None, 62, False), (None, 64, True)])
def test_few_rows_are_not_cut_by_default(
    tiny_moe: Path,
    tmp_path: Path,
    interleave: bool | None,
    sequences: int,
    cut: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Half of 64 sequences of 6 tokens is 192 tokens, of which each of 8 experts gets one in 8."""
    trainer, _ = trainer_of(load(tiny_moe, interleave), tmp_path)
    experts = next(part for part in trainer.model.modules() if isinstance(part, kt_sft.CpuExperts))
    state = interleaving._Interleaving(trainer, [experts])
    state._slots = 1
    batch = batch_of(sequences)
    with caplog.at_level(logging.INFO, "kt_sft"):
        halves = state._halves(trainer.model, batch)
        state._halves(trainer.model, batch)
    assert (halves is not None) == cut
    if halves is not None:
        for key in batch:
            assert torch.equal(torch.cat([half[key] for half in halves]), batch[key])
    assert len([record for record in caplog.records if "not cut in two" in record.getMessage()]) == (not cut)
    state._draws = True
    assert state._halves(trainer.model, batch) is None

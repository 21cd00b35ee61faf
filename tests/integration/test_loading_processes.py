"""Processes of one job on one machine hold one copy of the experts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Change
from transformers import AutoModelForCausalLM

from kt_sft import CpuExperts, KTConfig
from kt_sft.engine.store import LayerStore
from kt_sft.loading import memory, processes
from kt_sft.loading.errors import CheckpointError, NotEnoughMemoryError, SharedLoadError
from tests.forked import Rank, forked_ranks
from tests.pages import shared_experts

Start = Callable[..., Rank]

#: A format that loses something, so that the processes must tell each other how much.
CONFIG = {"expert_format": "int4", "num_threads": 1}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with forked_ranks(port=str(tmp_path)) as start:
        yield start


def load(folder: Path, **settings: Any) -> Any:
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    config = KTConfig(**(CONFIG | settings))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()


def stores(model: Any) -> list[LayerStore]:
    return [module.store for module in model.modules() if isinstance(module, CpuExperts)]


def facts(model: Any) -> list[Any]:
    """What the stores say of themselves, and what the model computes."""
    with torch.no_grad():
        logits = model(input_ids=torch.arange(48).reshape(2, 24)).logits.float().numpy()
    return [[(store.nbytes, store.relative_error, store.missing()) for store in stores(model)], logits.tolist()]


def test_they_hold_the_same_pages_and_compute_the_same(tiny_moe: Path, start: Start) -> None:
    def rank(pipe: Connection) -> None:
        model = load(tiny_moe)
        pipe.send(facts(model))
        pipe.recv()  # until the other has read its pages
        pipe.send(shared_experts())
        pipe.recv()

    ranks = [start(rank), start(rank)]
    alone = load(tiny_moe)
    assert not shared_experts()
    assert [one.hears() for one in ranks] == [facts(alone)] * 2
    for one in ranks:
        one.go_on()
    pages = [one.hears() for one in ranks]

    assert len(pages[0]) == 2  # layers
    assert pages[0].keys() == pages[1].keys()  # the same memory
    size = sum(store.nbytes for store in stores(alone)) // 1024
    for found in pages:
        rss, pss, private = (sum(fields[name] for fields in found.values()) for name in ("Rss", "Pss", "Private_Dirty"))
        # Of a page that both have read, each has half; Pss is rounded down to KiB in each mapping.
        assert rss == size
        assert rss / 2 - len(found) <= pss <= rss / 2
        assert private == 0


def test_a_model_that_is_gone_is_loaded_anew_and_one_that_lives_is_not(tiny_moe: Path, start: Start) -> None:
    def rank(pipe: Connection) -> None:
        model = load(tiny_moe)
        again = load(tiny_moe)  # as a reference model of DPO
        pipe.send(({*shared_experts()}, [a is b for a, b in zip(stores(model), stores(again), strict=True)]))
        pipe.recv()
        del model, again
        gc.collect()
        pipe.send(shared_experts())
        pipe.recv()
        model = load(tiny_moe)
        pipe.send(({*shared_experts()}, facts(model)))
        pipe.recv()

    ranks = [start(rank), start(rank)]
    first, shared = ranks[0].hears()
    assert ranks[1].hears() == (first, shared)
    assert shared == [True, True]
    for one in ranks:
        one.go_on()
    assert [one.hears() for one in ranks] == [{}, {}]
    for one in ranks:
        one.go_on()
    anew = [one.hears() for one in ranks]
    assert anew[0] == anew[1]
    assert anew[0][0].isdisjoint(first)


def test_one_rank_alone_does_not_wait(tiny_moe: Path, start: Start) -> None:
    def rank(pipe: Connection) -> None:
        pipe.send(facts(load(tiny_moe)))

    assert start(rank).hears() == facts(load(tiny_moe))


def test_different_options_are_different_copies(tiny_moe: Path, start: Start) -> None:
    def rank(**settings: Any) -> Callable[[Connection], None]:
        def run(pipe: Connection) -> None:
            model = load(tiny_moe, **settings)
            pipe.send([store.expert_format for store in stores(model)])
            pipe.recv()

        return run

    first, second = start(rank()), start(rank(expert_format="int8"))
    assert first.hears() == ["int4"] * 2
    assert second.hears() == ["int8"] * 2


def watched_rank(folder: Path) -> Callable[[Connection], None]:
    """Loads; says "filling" and waits, or "waiting"; then what it has come to."""

    def run(pipe: Connection) -> None:
        stream, fill = processes.stream, processes.Reader.fill

        def held_stream(*work: Any, **settings: Any) -> None:
            pipe.send("filling")
            pipe.recv()
            stream(*work, **settings)

        def said_fill(self: processes.Reader, work: Any) -> None:
            pipe.send("waiting")
            fill(self, work)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "stream", held_stream)
            patch.setattr(processes.Reader, "fill", said_fill)
            try:
                load(folder)
                pipe.send("loaded")
            except (CheckpointError, NotEnoughMemoryError, SharedLoadError) as error:
                pipe.send((type(error).__name__, str(error)))

    return run


def test_all_hear_what_is_wrong_with_the_checkpoint(
    checkpoint: Path, edit: Callable[[Change], None], start: Start
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.6.down_proj.weight"][3, 4] = float("nan")

    edit(damage)
    filler, reader = start(watched_rank(checkpoint)), start(watched_rank(checkpoint))
    if (said := filler.hears()) == "waiting":
        filler, reader, said = reader, filler, reader.hears()
    else:
        assert reader.hears() == "waiting"
    assert said == "filling"
    filler.go_on()
    name, text = filler.hears()
    assert name == "CheckpointError"
    assert "tensor model.layers.1.mlp.experts.6.down_proj.weight" in text
    failed = "the process that was loading the experts for all processes of this machine failed with CheckpointError"
    assert reader.hears() == ("SharedLoadError", f"kt_sft: {failed}: {text}")


def test_a_death_while_filling_ends_the_wait(tiny_moe: Path, start: Start) -> None:
    filler = start(watched_rank(tiny_moe))
    assert filler.hears() == "filling"
    reader = start(watched_rank(tiny_moe))
    assert reader.hears() == "waiting"
    filler.kill()
    name, text = reader.hears()
    assert name == "SharedLoadError"
    assert "the process that was loading the experts for all processes of this machine has ended" in text
    # What is left of it is in nobody's way.
    heir = start(watched_rank(tiny_moe))
    assert heir.hears() == "filling"
    heir.go_on()
    assert heir.hears() == "loaded"


def test_memory_is_asked_for_once(tiny_moe: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("kt_sft.loading.quantizer.require_bytes", lambda *what: asked.append(what))

    def rank(pipe: Connection) -> None:
        model = load(tiny_moe, expert_format="bf16")  # which fills whole pages
        pipe.send((asked, sum(store.nbytes for store in stores(model)), sum(p.nbytes for p in model.parameters())))
        pipe.recv()

    ranks = [start(rank), start(rank)]
    (first, experts, dense), (second, *_) = (one.hears() for one in ranks)
    assert first + second == [(dense, "the experts of 2 layers", 2, experts)]


def test_too_little_memory_is_an_error_in_all(tiny_moe: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    ranks = [start(watched_rank(tiny_moe)), start(watched_rank(tiny_moe))]
    for name, text in (one.hears() for one in ranks):
        assert name in ("NotEnoughMemoryError", "SharedLoadError")
        assert "not enough memory for the experts of 2 layers" in text
        assert "1000 bytes available" in text

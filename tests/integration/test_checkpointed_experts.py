"""Under gradient checkpointing of transformers and of LLaMA-Factory, retained experts run forward once a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import peft
import pytest
import torch
import transformers
from llamafactory.model.model_utils import checkpointing
from torch import Tensor

import kt_sft


def load(folder: Path, **settings: Any) -> Any:
    config = kt_sft.KTConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return adapted.train()


def step(model: Any) -> tuple[dict[str, Tensor], int, int]:
    """Gradients, and how many forwards and backwards the engine ran for them."""
    engine = next(part for part in model.modules() if isinstance(part, kt_sft.CpuExperts)).engine
    before = engine.stats()
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    after = engine.stats()
    counts = [after[key] - before[key] for key in ("forward_calls", "backward_calls")]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, *counts


def with_transformers(model: Any, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def with_llamafactory(model: Any, **settings: Any) -> None:
    base = model.get_base_model()
    MethodType(checkpointing._gradient_checkpointing_enable, base)(**settings)
    base.enable_input_require_grads()


WAYS = {
    "transformers, reentrant": lambda model: with_transformers(model, True),
    "transformers, non-reentrant": lambda model: with_transformers(model, False),
    "llamafactory, reentrant": lambda model: with_llamafactory(model),
    "llamafactory, non-reentrant": lambda model: with_llamafactory(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    ),
    "llamafactory, unsloth": lambda model: with_llamafactory(model, use_unsloth_gc=True),
}
#: It calls torch.cuda, whatever the model is on.
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("way", [pytest.param(way, marks=ON_CUDA if "unsloth" in way else ()) for way in WAYS])
@pytest.mark.parametrize(("policy", "times"), [("retain", 1), ("recompute", 2)])
def test_forward_runs_once_where_it_is_retained(tiny_moe: Path, way: str, policy: str, times: int) -> None:
    enable: Callable[[Any], None] = WAYS[way]
    model = load(tiny_moe, activation_policy=policy)
    expected, *_ = step(model)
    enable(model)
    assert model.get_base_model().is_gradient_checkpointing
    for _ in range(2):
        found, forwards, backwards = step(model)
        assert (forwards, backwards) == (2 * times, 2)  # two layers
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_models_without_our_experts_are_checkpointed_as_always(tiny_moe: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_moe)
    given: list[Any] = []

    def checkpoint(function: Any, *args: Any) -> Any:
        given.append(type(function))
        return function(*args)

    model._set_gradient_checkpointing(True, checkpoint)
    model.train()(input_ids=torch.arange(5)[None])
    assert {kind.__name__ for kind in given} == {"partial"}

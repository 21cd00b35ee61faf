"""Every family of transformers on the standard experts interface: saved, loaded with KTConfig, compared with itself.

How they are compared is in agreement.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from agreement import deviations
from families import FAMILIES, families_of_transformers, make
from torch import nn

import kt_sft
from kt_sft.loading.layout import find_experts

CASES = [
    pytest.param(maker, id=name if len(makers) == 1 else f"{name}-{i}")
    for name, makers in FAMILIES.items()
    for i, maker in enumerate(makers)
]


def test_every_family_of_transformers_is_covered() -> None:
    assert families_of_transformers() == set(FAMILIES)


def _load_both(maker: Callable[[], nn.Module], folder: Path) -> tuple[nn.Module, nn.Module]:
    model = make(maker)
    model.save_pretrained(folder)
    plain = type(model).from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    ours = type(model).from_pretrained(folder, dtype=torch.float32, quantization_config=kt_sft.KTConfig())
    return plain.eval(), ours.eval()


@pytest.mark.parametrize("maker", CASES)
def test_family_agrees_with_plain_transformers(maker: Callable[[], nn.Module], tmp_path: Path) -> None:
    plain, ours = _load_both(maker, tmp_path)
    swapped = [name for name, module in ours.named_modules() if isinstance(module, kt_sft.CpuExperts)]
    assert swapped
    assert swapped == list(find_experts(plain))
    assert {name.rpartition(".")[2] for name in swapped} == {"experts"}  # by which adapters are looked at beforehand

    for deviation, bound, size in deviations(plain, ours):
        assert deviation <= bound
        assert bound <= 0.25 * size


@pytest.mark.parametrize("damage", ["gate and up exchanged", "two experts exchanged", "one row moved"])
def test_the_bound_catches_misplaced_weights(damage: str, tmp_path: Path) -> None:
    plain, ours = _load_both(FAMILIES["qwen3_moe"][0], tmp_path)
    store = next(module for module in ours.modules() if isinstance(module, kt_sft.CpuExperts)).store
    gate_up, _ = store.dequantized()
    gate, up = gate_up.chunk(2, dim=1)
    if damage == "gate and up exchanged":
        for expert in range(store.num_experts):
            store.write("gate", expert, up[expert])
            store.write("up", expert, gate[expert])
    elif damage == "two experts exchanged":
        store.write("gate", 0, gate[1])
        store.write("gate", 1, gate[0])
    else:
        for expert in range(store.num_experts):
            store.write("up", expert, up[expert].roll(1, dims=0))

    (deviation, bound, _), *_ = deviations(plain, ours)
    assert deviation > bound


@pytest.mark.parametrize("maker", CASES)
def test_family_keeps_every_expert_where_it_was(maker: Callable[[], nn.Module], tmp_path: Path) -> None:
    plain, ours = _load_both(maker, tmp_path)
    layouts = find_experts(plain)

    for name, layout in layouts.items():
        source = plain.get_submodule(name)
        gate_up, down = (getattr(source, key).detach() for key in (layout.first_parameter, "down_proj"))
        if layout.transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        if layout.interleaved:
            gate_up = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], dim=1)
        stored_gate_up, stored_down = ours.get_submodule(name).dequantized()
        assert torch.equal(stored_gate_up, gate_up)
        assert torch.equal(stored_down, down)
    assert not any(name.startswith(f"{known}.") for name, _ in ours.named_parameters() for known in layouts)

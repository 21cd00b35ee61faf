"""Every family of transformers on the standard experts interface: saved, loaded with KTConfig, compared with itself.

The plain model records what its routers chose; that routing (indices and weights) is then replayed in both models,
because top-k may flip on a rounding difference, which is no error of the experts. Compared are the logits and the
gradients of the input embeddings and of the replayed routing weights.

The bound. The engine may round to BF16 (unit roundoff u = 2**-8, relative): the rows that meet gate and up, the gate
and up pre-activations it retains, the activation that meets down, and in backward the gradients that meet the weights
and the results it returns. Weights are BF16 already; sums are FP32, whose 2**-24 is drowned. How roundings of that
size show in the logits is measured by Monte Carlo arithmetic (Parker 1997): the plain model is run with every one of
those values multiplied by 1 + u r, r uniform in [-1, 1], its gradient likewise. Rounding errors of the engine lie
within those intervals; the largest deviation over a tensor of hundreds of values varies little from draw to draw, so
twice the largest of `DRAWS` draws holds every correct engine. That it does not hold wrong ones has its own test.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, families_of_transformers, make
from torch import Tensor, nn

import kt_sft
from kt_sft.loading.layout import ExpertLayout, find_experts

UNIT_ROUNDOFF = 2.0**-8
DRAWS = 4

CASES = [
    pytest.param(maker, id=name if len(makers) == 1 else f"{name}-{i}")
    for name, makers in FAMILIES.items()
    for i, maker in enumerate(makers)
]


def test_every_family_of_transformers_is_covered() -> None:
    assert families_of_transformers() == set(FAMILIES)


class _Noise(torch.autograd.Function):
    """Multiplies by 1 + u r, and the gradient by another 1 + u r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * (1 + UNIT_ROUNDOFF * (2 * torch.rand_like(x) - 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 + UNIT_ROUNDOFF * (2 * torch.rand_like(grad) - 1))


def _add_noise(model: nn.Module, layouts: dict[str, ExpertLayout]) -> None:
    """Makes the plain model's experts round randomly wherever the engine may round."""
    for name, layout in layouts.items():
        experts = model.get_submodule(name)
        attribute = "_apply_gate" if layout.gated else "act_fn"
        gate = getattr(experts, attribute)
        if isinstance(gate, nn.Module):
            delattr(experts, attribute)  # a module's name cannot be given to a function
        setattr(experts, attribute, lambda x, gate=gate: _Noise.apply(gate(_Noise.apply(x))))
        experts.register_forward_pre_hook(lambda _, args: (_Noise.apply(args[0]), *args[1:]))
        experts.register_forward_hook(lambda _, args, output: _Noise.apply(output))
    # Of transformers' implementations these run through `_apply_gate`, also for classes with a loop of their own.
    model.set_experts_implementation("batched_mm")


def _run(
    model: nn.Module, names: list[str], inputs: dict[str, Tensor], routing: list[tuple[Tensor, Tensor]] | None
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """One forward and backward; replays `routing` where given.

    Returns:
        [logits, gradient of the input embeddings, gradients of the replayed weights ...], and the routing used.
    """
    used: list[tuple[Tensor, Tensor]] = []

    def replay(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index, weights = args[1:] if routing is None else routing[len(used)]
        weights = weights.detach().clone().requires_grad_(True)
        used.append((index, weights))
        return args[0], index, weights

    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_(True)
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    with ExitStack() as hooks:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(replay, prepend=True)
            hooks.callback(handle.remove)
        output = model(inputs_embeds=embedded, **rest)
    logits = output["logits"] if "logits" in output else output["last_hidden_state"]
    generator = torch.Generator().manual_seed(1)
    logits.backward(torch.randn(logits.shape, generator=generator))
    gradients = [embedded.grad, *(weights.grad for _, weights in used)]
    return [logits.detach(), *gradients], used


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 11), generator=generator)}
    if any("vision_moe" in name for name, _ in model.named_modules()):  # tokens of images take other experts
        inputs["moe_mm_token_type_ids"] = torch.arange(11).expand(2, 11) % 2
    return inputs


def _deviations(plain: nn.Module, ours: nn.Module) -> list[tuple[float, float, float]]:
    """(deviation, bound, size) of the logits, the embeddings' gradients and each layer's weights' gradients.

    Leaves noise in `plain`.
    """
    layouts = find_experts(plain)
    names = list(layouts)
    inputs = _inputs(plain)
    _, routing = _run(plain, names, inputs, None)
    expected, _ = _run(plain, names, inputs, routing)
    actual, _ = _run(ours, names, inputs, routing)
    _add_noise(plain, layouts)
    torch.manual_seed(3)
    draws = [_run(plain, names, inputs, routing)[0] for _ in range(DRAWS)]

    def furthest(one: Tensor, other: Tensor) -> float:
        return (one - other).abs().max().item()

    assert len(actual) == len(expected)
    return [
        (
            furthest(mine, reference),
            2 * max(furthest(draw[i], reference) for draw in draws),
            reference.abs().max().item(),
        )
        for i, (mine, reference) in enumerate(zip(actual, expected, strict=True))
    ]


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

    for deviation, bound, size in _deviations(plain, ours):
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

    (deviation, bound, _), *_ = _deviations(plain, ours)
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

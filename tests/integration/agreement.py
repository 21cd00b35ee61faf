"""How far a model with its experts in the engine may be from the same model in plain transformers.

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

from contextlib import ExitStack
from typing import Any

import torch
from families import VOCABULARY
from torch import Tensor, nn

from kt_sft.loading.layout import ExpertLayout, find_experts

UNIT_ROUNDOFF = 2.0**-8
DRAWS = 4


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


def deviations(plain: nn.Module, ours: nn.Module) -> list[tuple[float, float, float]]:
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

"""How far rounding experts' weights once to BF16 can move a model's logits.

A rounded weight is w (1 + u r) with |r| <= 1 and u = 2^-8. How such roundings show in the logits is measured by Monte
Carlo arithmetic (Parker 1997): the model with unrounded weights runs with every one of them multiplied by 1 + u r, r
uniform in [-1, 1]. The largest deviation over hundreds of logits varies little from draw to draw, so twice the largest
of eight draws holds what rounding does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

UNIT_ROUNDOFF = 2.0**-8
DRAWS = 8


def bound_of_rounding(model: nn.Module, names: Iterable[str], run: Callable[[], Tensor]) -> float:
    """The bound for the logits that `run` gives, for rounding the weights of the modules `names` of `model`."""
    weights = [weight for name in names for weight in model.get_submodule(name).parameters()]
    exact = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        expected = run()
        furthest = 0.0
        for seed in range(DRAWS):
            generator = torch.Generator().manual_seed(seed)
            for weight, value in zip(weights, exact, strict=True):
                noise = 2 * torch.rand(value.shape, generator=generator) - 1
                weight.copy_(value * (1 + UNIT_ROUNDOFF * noise))
            furthest = max(furthest, (run() - expected).abs().max().item())
        for weight, value in zip(weights, exact, strict=True):
            weight.copy_(value)
    return 2 * furthest

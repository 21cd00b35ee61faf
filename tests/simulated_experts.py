"""Experts whose tensors are those of a simulated device, and small layers of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import kt_sft
from kt_sft import autograd
from kt_sft.engine.engine import get_engine
from kt_sft.offload.transfers import Transfers
from tests.simulated_device import SimulatedDevice

E, H, I, T, K = 5, 24, 16, 30, 2

#: How passes are started and awaited: wholly in the order of streams, started there and awaited on the host, or by a
#: thread that waits for tokens.
WAYS = {"in stream": {}, "on the host": {"waits": False}, "by a thread": {"calls": False, "waits": False}}


@contextmanager
def on_device(
    monkeypatch: pytest.MonkeyPatch, seed: int = 3, way: str = "in stream", *, eager: bool = True
) -> Iterator[Transfers]:
    """Experts take the tensors they are given for those of a simulated device.

    Args:
        monkeypatch: Of the test.
        seed: Decides the order in which the device does things.
        way: A key of `WAYS`.
        eager: Its own work seems to run at once. Otherwise all runs when somebody waits, and nothing but experts may be
            computed.
    """
    device = SimulatedDevice(seed, eager, **WAYS[way])
    transfers = Transfers(device)
    engine = get_engine()
    engine.set_patience(1e-3, 100_000)  # a device that is simulated runs when somebody looks
    try:
        with monkeypatch.context() as patch:
            patch.setattr(autograd, "cross", lambda _, *given, **settings: transfers.cross(*given, **settings))
            yield transfers
    finally:
        device.run_on()
        transfers.stop()
        engine.set_patience(1.0, 600)


def make_layers(count: int, **settings: Any) -> list[kt_sft.CpuExperts]:
    """Layers of BF16 experts, always the same."""
    torch.manual_seed(0)
    weights = [(torch.randn(E, 2 * I, H) / 5, torch.randn(E, H, I) / 4) for _ in range(count)]
    return [kt_sft.CpuExperts.from_weights(*both, kt_sft.KTConfig(**settings)) for both in weights]


def routings(count: int) -> list[tuple[Tensor, Tensor]]:
    """Experts and weights of one call for each layer."""
    random = torch.Generator().manual_seed(2)
    return [(torch.randint(E + 1, (T, K), generator=random), torch.rand(T, K, generator=random)) for _ in range(count)]


def hidden() -> Tensor:
    """Hidden states, always the same."""
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1)).requires_grad_()


def in_a_row(layers: list[kt_sft.CpuExperts], routed: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The layers one after the other, with nothing between them."""
    for layer, (idx, w) in zip(layers, routed, strict=True):
        x = layer(x, idx, w)
    return x


def gradient(y: Tensor, x: Tensor) -> Tensor:
    """Of a sum; not copied, as it may not be there yet."""
    return torch.autograd.grad(y, x, torch.ones(T, H))[0]


def out_of_range(idx: Tensor) -> Tensor:
    """The same with one index that no expert has."""
    wrong = idx.clone()
    wrong[3, 1] = E + 4
    return wrong


def forwards() -> int:
    """How many the engine has computed."""
    return get_engine().stats()["forward_calls"]

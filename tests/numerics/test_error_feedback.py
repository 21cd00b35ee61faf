"""Error feedback against its definition: what quantising does to products with correlated inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kt_sft.engine.geometry import default_group
from kt_sft.engine.store import LayerStore
from kt_sft.loading.ready.feedback import inverse_factor, lost, quantise

#: With a short group at the end, but for whole rows.
ROWS, COLUMNS = 24, 208

STORAGES: dict[str, dict[str, Any]] = {
    "int4": {"expert_format": "int4", "group_size": 32, "zero_point": False},
    "int4 in long groups": {"expert_format": "int4", "group_size": 256, "zero_point": False},
    "int4 in rows": {"expert_format": "int4", "group_size": 0, "zero_point": False},
    "int4 with zero points": {"expert_format": "int4", "group_size": 64, "zero_point": True},
    "nf4": {"expert_format": "nf4", "group_size": 64, "zero_point": False},
    "mxfp4": {"expert_format": "mxfp4", "group_size": 32, "zero_point": False},
}


@pytest.fixture
def weights() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(ROWS, COLUMNS)


def moments(correlated: bool) -> torch.Tensor:
    """Of inputs that share a few directions, or of none."""
    if not correlated:
        return torch.eye(COLUMNS)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, 12, generator=generator) @ torch.randn(12, COLUMNS, generator=generator)
    inputs += 0.3 * torch.randn(400, COLUMNS, generator=generator)
    return inputs.T @ inputs / len(inputs)


def stored(storage: dict[str, Any]) -> LayerStore:
    return LayerStore(
        num_experts=1, hidden_size=COLUMNS, intermediate_size=ROWS, activation="silu", gated=False, **storage
    )


def values_of(store: LayerStore) -> torch.Tensor:
    values = torch.empty(ROWS, COLUMNS)
    store.native.dequantize("up", 0, values.data_ptr())
    return values


@pytest.mark.parametrize("name", STORAGES)
def test_without_correlation_there_is_nothing_to_feed_back(name: str, weights: torch.Tensor) -> None:
    """The factor is diagonal, so every weight goes to the nearest code of the engine's own scale."""
    plain = stored(STORAGES[name])
    plain.write("up", 0, weights)
    found = quantise(weights, inverse_factor(moments(correlated=False)), STORAGES[name])
    assert torch.equal(found.values, values_of(plain))


@pytest.mark.parametrize("name", STORAGES)
def test_products_lose_less(name: str, weights: torch.Tensor) -> None:
    """Directions that inputs share can be made up for: 12 of 208, with nearly all of the inputs' length."""
    plain, given = stored(STORAGES[name]), moments(correlated=True)
    plain.write("up", 0, weights)
    found = quantise(weights, inverse_factor(given), STORAGES[name])
    assert lost(weights, found.values, given) < 0.5 * lost(weights, values_of(plain), given)


@pytest.mark.parametrize("name", STORAGES)
def test_the_engine_decodes_the_same_values(name: str, weights: torch.Tensor) -> None:
    store = stored(STORAGES[name])
    found = quantise(weights, inverse_factor(moments(correlated=True)), STORAGES[name])
    store.write_codes("up", 0, found.codes, found.scales, found.zero_points)
    # Code x scale is one FP32 product, but of zero points the codes' difference first, which is exact.
    assert torch.equal(values_of(store), found.values)


def test_the_formats_own_group_is_taken(weights: torch.Tensor) -> None:
    factor = inverse_factor(moments(correlated=True))
    own = quantise(weights, factor, STORAGES["nf4"] | {"group_size": None})
    assert default_group("nf4") == 64
    assert torch.equal(own.values, quantise(weights, factor, STORAGES["nf4"]).values)


def test_columns_that_no_input_has(weights: torch.Tensor) -> None:
    given = moments(correlated=True)
    given[:, 40:80] = 0
    given[40:80] = 0
    found = quantise(weights, inverse_factor(given), STORAGES["int4"])
    assert bool(found.values.isfinite().all())
    assert bool((found.values - weights)[:, 40:80].abs().max() < 0.5)  # half a step of a scale of at most 4 / 7

"""What is made of the engine's passes: figures of a step, the summary, and the meter that notes them."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import kt_sft
from kt_sft.engine.meter import EnginePass
from kt_sft.offload.metrics import StepMetrics, layer_names, summary

E, H, I, T, K = 4, 8, 6, 10, 2


def engine_pass(started: float, finished: float, awaited: float, returned: float) -> EnginePass:
    return EnginePass(False, T, 1e9, 0.0, started, finished, awaited, returned)


@pytest.mark.parametrize(
    ("awaited", "returned", "hidden", "waiting"),
    [
        (1.0, 5.0, 0.0, 4.0),  # awaited before the engine began
        (3.0, 4.0, 1.0, 1.0),  # awaited half-way
        (6.0, 6.5, 2.0, 0.5),  # awaited when it was done
        (2.0, 4.5, 0.0, 2.5),
    ],
)
def test_what_is_hidden_is_the_engines_time_in_which_nobody_waited(
    awaited: float, returned: float, hidden: float, waiting: float
) -> None:
    each = engine_pass(2.0, 4.0, awaited, returned)
    assert each.seconds == 2.0
    assert each.hidden == hidden
    assert each.waiting == waiting


@pytest.fixture
def experts() -> kt_sft.CpuExperts:
    torch.manual_seed(0)
    return kt_sft.CpuExperts.from_weights(torch.randn(E, 2 * I, H), torch.randn(E, H, I))


class Layers(nn.Module):
    def __init__(self, *experts: kt_sft.CpuExperts) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": each})}) for each in experts)


def step(experts: kt_sft.CpuExperts, index: torch.Tensor) -> None:
    x = torch.randn(len(index), H, requires_grad=True)
    experts(x, index, torch.rand(index.shape)).sum().backward()


class TestMeter:
    @pytest.mark.parametrize("policy", ["retain", "recompute"])
    def test_notes_forward_and_backward_of_a_call(self, policy: str) -> None:
        config = kt_sft.KTConfig(activation_policy=policy)
        experts = kt_sft.CpuExperts.from_weights(torch.randn(E, 2 * I, H), torch.randn(E, H, I), config)
        meter = experts.meter = experts.new_meter()
        index = torch.tensor([[0, 1], [0, 3], [0, E]])  # E: no expert
        before = time.monotonic()
        step(experts, index)
        after = time.monotonic()
        passes, load_E = meter.take()
        forward, backward = passes
        assert (forward.is_backward, backward.is_backward) == (False, True)
        assert load_E.tolist() == [3, 1, 0, 1]
        products = 5 * 2 * H * I  # one matrix, five rows
        assert forward.flops == 3 * products
        assert backward.flops == (3 if policy == "retain" else 5) * products
        for each in passes:
            assert each.tokens == 3
            # One clock for all: the engine's and Python's.
            assert before <= each.submitted <= each.started <= each.finished <= each.returned <= after
            assert each.submitted <= each.awaited <= each.returned
            assert 0 <= each.hidden <= each.seconds
        assert forward.returned <= backward.submitted
        assert meter.take() == ([], pytest.approx(torch.zeros(E)))


class TestStepMetrics:
    def test_figures_of_a_step(self, experts: kt_sft.CpuExperts) -> None:
        clone = kt_sft.CpuExperts(experts.store, experts.config)
        metrics = StepMetrics(Layers(experts, clone), per_layer=True)
        began = time.monotonic()
        metrics.begin()
        for _ in range(2):
            step(experts, torch.tensor([[0], [0], [0], [1]]))
            step(clone, torch.tensor([[0], [1], [2], [3]]))
            metrics.end_step()
        took = time.monotonic() - began
        figures = metrics.take()
        assert figures["imbalance"] == 3.0  # 3 of 4 rows on one of four experts; the other layer has 1.0
        assert figures["dead_experts"] == 2
        assert (figures["layer_00/imbalance"], figures["layer_01/imbalance"]) == (3.0, 1.0)
        assert (figures["layer_00/dead_experts"], figures["layer_01/dead_experts"]) == (2, 0)
        assert 0 <= figures["hidden_share"] <= 1
        for key in ("forward_seconds", "backward_seconds", "waiting_seconds"):
            assert figures[key] == pytest.approx(sum(figures[f"layer_0{n}/{key}"] for n in (0, 1)))
            assert 0 < figures[key] < figures["step_seconds"]
        assert figures["step_seconds"] * 2 <= took
        assert figures["tokens_per_second"] == pytest.approx(4 / figures["step_seconds"])
        engine = figures["forward_seconds"] + figures["backward_seconds"]
        assert figures["gflops"] == pytest.approx(2 * 4 * 3 * 2 * 2 * H * I / engine / 1e9)  # both directions, layers
        assert figures["host_gib"] > 0.1
        assert metrics.take() == {}

        line = summary(figures)
        assert "\n" not in line
        assert "busiest expert 3.00 x the mean, 2 idle" in line
        metrics.close()
        assert experts.meter is clone.meter is None

    def test_what_came_before_the_first_step_does_not_count(self, experts: kt_sft.CpuExperts) -> None:
        metrics = StepMetrics(Layers(experts), per_layer=False)
        step(experts, torch.tensor([[0], [1]]))
        metrics.begin()
        step(experts, torch.tensor([[2], [3]]))
        ((name, passes),) = metrics.end_step()
        assert name == "layer_00"
        assert len(passes) == 2
        assert metrics.take()["dead_experts"] == 2

    def test_evaluation_counts_its_tokens_too(self, experts: kt_sft.CpuExperts) -> None:
        metrics = StepMetrics(Layers(experts), per_layer=False)
        metrics.begin()
        with torch.no_grad():
            experts(torch.randn(5, H), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1))
        metrics.end_step()
        figures = metrics.take()
        assert figures["tokens_per_second"] * figures["step_seconds"] == pytest.approx(5)
        assert figures["backward_seconds"] == 0

    def test_layers_are_told_apart(self, experts: kt_sft.CpuExperts) -> None:
        kinds = nn.ModuleDict({kind: nn.ModuleDict({"experts": experts.__class__(experts.store, experts.config)})
                               for kind in ("text_moe", "vision_moe")})  # fmt: skip
        model = nn.ModuleDict({"layers": nn.ModuleList([kinds, nn.ModuleDict({"experts": experts})])})
        assert list(layer_names(model)) == ["layer_00.text_moe", "layer_00.vision_moe", "layer_01"]

"""The model of a step: sums in turn, pipelines side by side, and where streaming weights begins to win."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kt_sft.offload.step_model import (
    Passes,
    Rates,
    StepModelError,
    Work,
    crossover_tokens,
    in_turn,
    predict,
    side_by_side,
    stages,
    streamed,
)

# Qwen3-30B-A3B's layers: q and o 2048 x 4096, k and v 2048 x 512.
WORK = Work(
    tokens=1024,
    sequence=512,
    hidden=2048,
    intermediate=768,
    experts=128,
    top_k=8,
    layers=48,
    dense_weights=2 * 2048 * 4096 + 2 * 2048 * 512,
    attention_size=4096,
)
RATES = Rates(expert_forward=1e12, expert_backward=0.8e12, dense=1e14, link=2.5e10)
ONCE = Passes(dense_forwards=1, expert_forwards=1)


class TestWork:
    def test_flops_by_hand(self) -> None:
        work = Work(3, 3, 5, 7, 4, 2, layers=1, dense_weights=11, attention_size=13)
        assert work.expert_flops == 2 * (3 * 2) * 3 * 5 * 7
        assert work.dense_flops == 2 * 3 * 11
        # Each token sees half of the sequence: scores and weighted sum, 13 multiplications and additions each.
        assert work.attention_flops == 2 * (2 * 3 * 3 / 2 * 13)
        assert work.transfer_bytes == 3 * 5 * 2
        assert work.expert_weights == 4 * 3 * 5 * 7

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tokens": 0}, "tokens must be at least 1, got 0"),
            ({"dense_weights": -1}, "dense_weights must be at least 0, got -1"),
            ({"top_k": 200}, "200 experts per token cannot be chosen among 128"),
        ],
    )
    def test_work_that_cannot_be(self, change: dict[str, int], message: str) -> None:
        with pytest.raises(StepModelError, match=message):
            dataclasses.replace(WORK, **change)

    @pytest.mark.parametrize("name", ["expert_forward", "expert_backward", "dense", "link"])
    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
    def test_rates_that_cannot_be(self, name: str, value: float) -> None:
        with pytest.raises(StepModelError, match=f"{name} must be a positive rate"):
            dataclasses.replace(RATES, **{name: value})


class TestInTurn:
    def test_a_step_is_the_sum_of_its_parts(self) -> None:
        found = predict(WORK, RATES, ONCE)
        layers = WORK.layers
        cpu = layers * (WORK.expert_flops / 1e12 + WORK.expert_flops / 0.8e12)
        device = layers * (2 * WORK.dense_flops + 3.5 * WORK.attention_flops) / 1e14
        transfer = layers * 2 * WORK.transfer_bytes / 2.5e10
        assert found.cpu == pytest.approx(cpu)
        assert found.device == pytest.approx(device)
        assert found.transfer == pytest.approx(transfer)
        assert found.in_turn == pytest.approx(cpu + device + 2 * transfer)  # there and back

    def test_checkpointing_computes_forward_twice(self) -> None:
        once, twice = predict(WORK, RATES, ONCE), predict(WORK, RATES, Passes())
        retained = predict(WORK, RATES, Passes(expert_forwards=1))
        forward = WORK.layers * WORK.expert_flops / RATES.expert_forward
        assert twice.cpu - once.cpu == pytest.approx(forward)
        assert retained.cpu == pytest.approx(once.cpu)
        assert retained.device == pytest.approx(twice.device)
        assert retained.transfer == pytest.approx(once.transfer)

    def test_accumulation_repeats_the_step(self) -> None:
        assert predict(WORK, RATES, ONCE, 3).in_turn == pytest.approx(3 * predict(WORK, RATES, ONCE).in_turn)
        with pytest.raises(StepModelError, match="at least one micro-batch, got 0"):
            predict(WORK, RATES, ONCE, 0)

    def test_one_cpu_for_both_does_one_after_the_other(self) -> None:
        found = predict(WORK, dataclasses.replace(RATES, link=None), ONCE, 2)
        assert found.side_by_side is None
        assert found.gain is None
        assert found.in_turn == pytest.approx(found.cpu + found.device)
        assert found.transfer == 0


class TestSideBySide:
    def test_two_equal_pipelines_by_hand(self) -> None:
        way = [("device", 1.0), ("cpu", 3.0)] * 2
        # Device 0-1 and 1-2; then the CPU is never idle: 1-4 a, 4-7 b, 7-10 a, 10-13 b; the device comes between.
        assert side_by_side([way, way]) == 13.0
        assert in_turn(way) * 2 == 16.0

    def test_nothing_takes_no_time(self) -> None:
        assert side_by_side([]) == 0.0
        assert side_by_side([[], []]) == 0.0

    def test_a_single_micro_batch_gains_nothing(self) -> None:
        way = stages(WORK, RATES, ONCE)
        assert side_by_side([way]) == pytest.approx(in_turn(way))

    @pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
    def test_the_gain_approaches_c_plus_g_over_the_larger(self, ratio: float) -> None:
        way = [("device", ratio), ("cpu", 1.0)] * 200
        gain = 2 * in_turn(way) / side_by_side([way, way])
        # But for filling the pipeline once: one stage of 400.
        assert gain == pytest.approx((1 + ratio) / max(1, ratio), rel=1 / 200)

    @given(
        st.lists(
            st.lists(
                st.tuples(st.sampled_from(["device", "cpu", "to_host", "to_device"]), st.floats(0, 9)), max_size=12
            ),
            max_size=4,
        )
    )
    def test_no_schedule_beats_the_busiest_resource_or_loses_to_taking_turns(
        self, ways: list[list[tuple[str, float]]]
    ) -> None:
        found = side_by_side(ways)
        busy = max((sum(s for way in ways for name, s in way if name == r) for r in ("device", "cpu")), default=0.0)
        rounding = 1e-9 * (1 + found)
        assert found >= busy - rounding
        assert found >= max((in_turn(way) for way in ways), default=0.0) - rounding
        assert found <= sum(in_turn(way) for way in ways) + rounding

    def test_pairs_of_micro_batches_and_a_split_one(self) -> None:
        two, three = predict(WORK, RATES, ONCE, 2), predict(WORK, RATES, ONCE, 3)
        one = predict(WORK, RATES, ONCE)
        assert three.side_by_side == pytest.approx(two.side_by_side + one.side_by_side)
        assert one.side_by_side == pytest.approx(two.side_by_side / 2)  # halves of it, of everything
        assert two.gain > 1


class TestStreaming:
    def test_bandwidth_bounds_it_with_few_tokens_and_compute_with_many(self) -> None:
        few = dataclasses.replace(WORK, tokens=1, sequence=1)
        stream = WORK.expert_weights * 2 / RATES.link
        assert streamed(few, RATES) == pytest.approx(3 * WORK.layers * stream, rel=1e-3)
        many = dataclasses.replace(WORK, tokens=1 << 20)
        compute = (many.expert_flops + many.dense_flops + many.attention_flops) / RATES.dense
        assert streamed(many, RATES) == pytest.approx(3 * WORK.layers * compute, rel=1e-2)

    def test_at_the_crossover_the_link_takes_as_long_as_the_cpu(self) -> None:
        tokens = crossover_tokens(WORK, RATES)
        assert tokens == 1e12 * 2 * 16 / (2 * 2.5e10)
        cpu = 2 * tokens * WORK.top_k * 3 * WORK.hidden * WORK.intermediate / RATES.expert_forward
        assert cpu == pytest.approx(WORK.expert_weights * 2 / RATES.link)

    def test_without_a_link_nothing_is_streamed(self) -> None:
        alone = dataclasses.replace(RATES, link=None)
        with pytest.raises(StepModelError, match="link must be known"):
            crossover_tokens(WORK, alone)
        with pytest.raises(StepModelError, match="link must be known"):
            streamed(WORK, alone)


def test_the_most_that_interleaving_can_gain() -> None:
    """With a link that takes no time: a step is at least what the busier of CPU and accelerator takes."""
    found = predict(WORK, dataclasses.replace(RATES, link=1e30), ONCE, 2)
    assert found.most_gain == pytest.approx(found.in_turn / max(found.cpu, found.device))
    assert 1 < found.gain <= found.most_gain + 1e-9
    assert predict(WORK, dataclasses.replace(RATES, link=None), ONCE, 2).most_gain is None

"""`kt-sft bench`: what is measured computes the same layer, and the report is what it says. No timing is asserted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import kt_sft
from kt_sft.cli import bench
from kt_sft.cli.bench import OURS, Timing, measure, spread
from kt_sft.cli.bench_plan import FormatChoice, Plan
from kt_sft.cli.bench_report import draw, show
from kt_sft.cli.contenders import (
    Batch,
    LayerContender,
    TorchLinears,
    balanced_batch,
    onednn_packs,
    random_weights,
    stock_experts,
)
from kt_sft.cli.shapes import LayerShape
from kt_sft.engine.peaks import Peak, measure_peak

SHAPE = LayerShape("small", 64, 32, 6, 2)

needs_packing = pytest.mark.skipif(not onednn_packs(), reason="oneDNN packs no BF16 weights on this CPU")


def a_plan(**changes: Any) -> Plan:
    settled = Plan(
        shape=SHAPE,
        variants=((FormatChoice("bf16", "bf16"), "bf16"),),
        rows=(1, 3),
        passes=("forward", "backward"),
        threads=1,
        repeats=2,
        clock="elapsed",
        with_torch=True,
        kt_kernel=None,
        kt_kernel_lora=8,
        cache_bytes=None,
    )
    return dataclasses.replace(settled, **changes)


def reference(batch: Batch, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The layer in float64."""
    x_TH, y_TH = batch.hidden_TH.double(), torch.zeros(batch.hidden_TH.shape, dtype=torch.float64)
    for t, (experts, weights) in enumerate(zip(batch.index_TK.tolist(), batch.weights_TK.tolist(), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (gate_up[expert].double() @ x_TH[t]).chunk(2)
            y_TH[t] += weight * (down[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return y_TH


class TestContenders:
    @pytest.mark.parametrize("rows", [1, 3, 8])
    def test_every_expert_gets_equally_many_rows_and_no_token_one_twice(self, rows: int) -> None:
        batch = balanced_batch(SHAPE, rows)
        assert batch.index_TK.shape == (6 * rows // 2, 2)
        assert batch.index_TK.flatten().bincount().tolist() == [rows] * 6
        assert bool((batch.index_TK[:, 0] != batch.index_TK[:, 1]).all())

    @pytest.mark.parametrize("name", ["engine", "transformers", pytest.param("torch_linears", marks=needs_packing)])
    def test_all_compute_the_same_layer(self, name: str) -> None:
        """A norm-wise bound: along a path through the layer at most 8 values are rounded to BF16 (gate, up, silu, their
        product, down, the routing weight, the weighted row, each of the K sums), each with a relative error of at most
        2^-8, and no operation between them enlarges an error by more than max |silu'| = 1.1.
        """
        gate_up, down = random_weights(SHAPE)
        batch = balanced_batch(SHAPE, 5)
        if name == "torch_linears":
            linears = TorchLinears(gate_up, down)
            linears.prepare(batch)
            layer: Any = linears.forward
        elif name == "transformers":
            layer = stock_experts(SHAPE, gate_up, down)
        else:
            layer = kt_sft.CpuExperts.from_weights(gate_up, down, kt_sft.KTConfig(num_threads=1))
        expected = reference(batch, gate_up, down)
        with torch.no_grad():
            output = layer(batch.hidden_TH, batch.index_TK, batch.weights_TK).double()
        assert float((output - expected).norm() / expected.norm()) <= 1.1 * 8 * 2**-8

    def test_a_differentiable_layer_gives_both_passes(self) -> None:
        seen = []

        def layer(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            seen.append((x.requires_grad, weights.requires_grad))
            return x * weights.sum()

        contender = LayerContender("name", "what it is", layer)
        contender.prepare(balanced_batch(SHAPE, 1))
        assert list(contender.run(backward=False)) == ["forward"]
        assert list(contender.run(backward=True)) == ["forward", "backward"]
        assert seen == [(True, True)] * 2


class Recorder:
    """A contender that says when it runs."""

    def __init__(self, name: str, trains: bool, log: list[tuple[str, bool]]) -> None:
        self.name, self.trains, self.description, self._log = name, trains, "", log

    def prepare(self, batch: Batch) -> None:
        self._log.append((f"prepare {self.name}", True))

    def run(self, backward: bool) -> dict[str, float]:
        self._log.append((self.name, backward))
        return {"forward": len(self._log) / 10} | ({"backward": 1.0} if backward else {})


class TestRounds:
    @pytest.fixture(autouse=True)
    def no_settling(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench, "_SETTLE_SECONDS", 0)

    def test_contenders_take_turns_and_the_first_round_does_not_count(self) -> None:
        log: list[tuple[str, bool]] = []
        contenders = [Recorder("a", True, log), Recorder("b", False, log)]
        seconds, _ = bench._alternate(contenders, a_plan(), "bf16", 1)  # type: ignore[arg-type]
        assert log == [("prepare a", True), ("prepare b", True)] + [("a", True), ("b", False)] * 3
        assert seconds == {"a": {"forward": [0.5, 0.7], "backward": [1.0, 1.0]}, "b": {"forward": [0.6, 0.8]}}

    def test_passes_that_are_not_asked_for_are_not_run_or_not_told(self) -> None:
        log: list[tuple[str, bool]] = []
        only_forward, _ = bench._alternate([Recorder("a", True, log)], a_plan(passes=("forward",)), "bf16", 1)  # type: ignore[list-item]
        assert list(only_forward["a"]) == ["forward"]
        assert ("a", True) not in log
        only_backward, _ = bench._alternate([Recorder("a", True, log)], a_plan(passes=("backward",)), "bf16", 1)  # type: ignore[list-item]
        assert list(only_backward["a"]) == ["backward"]

    def test_int8_products_run_forward_only(self) -> None:
        log: list[tuple[str, bool]] = []
        seconds, _ = bench._alternate([Recorder("a", True, log)], a_plan(), "int8", 1)  # type: ignore[list-item]
        assert list(seconds["a"]) == ["forward"]


class TestFigures:
    def result(self, rows: int, compute: str = "bf16", clock: str = "elapsed") -> dict[str, Any]:
        seconds = {OURS: {"forward": [2.0, 1.0, 4.0]}, "other": {"forward": [3.0, 3.0, 8.0]}, "silent": {}}
        peaks = [Peak(threads=1, gflops=gflops, int8_gflops=0.004, read_gbs=0.0005) for gflops in (0.001, 0.1, 0.0001)]
        timing = Timing(FormatChoice("int8:32", "int8", 32), compute, rows, 100_000, seconds, peaks)
        return bench._result(a_plan(clock=clock), timing, "forward")

    def test_medians_shares_and_ratios(self) -> None:
        result = self.result(rows=4)
        operations = 2 * 3 * 64 * 32 * 6 * 4
        assert result["seconds"] == 2.0
        assert result["gflops"] == pytest.approx(operations / 2.0 / 1e9)
        assert result["peak_share"] == pytest.approx(operations / 2.0 / 1e6)
        assert result["read_gbs"] is result["read_share"] is None
        # The rounds' ratios are 1.5, 3 and 2: their median, not the quotient of the medians, which is 1.5.
        assert result["others"] == {
            "other": {
                "seconds": 3.0,
                "spread": pytest.approx(2.5 / 2 / 3.0),
                "gflops": pytest.approx(operations / 3.0 / 1e9),
                "ratio": 2.0,
            }
        }

    def test_one_row_per_expert_is_a_matter_of_reading(self) -> None:
        result = self.result(rows=1)
        assert result["read_gbs"] == pytest.approx(100_000 / 2.0 / 1e9)
        assert result["read_share"] == pytest.approx(100_000 / 2.0 / 1e9 / 0.0005)

    def test_cpu_time_is_no_share_of_a_bandwidth_by_elapsed_time(self) -> None:
        result = self.result(rows=1, clock="cpu")
        assert result["read_gbs"] is not None
        assert result["read_share"] is None

    def test_int8_products_are_a_share_of_their_own_peak(self) -> None:
        bf16, int8 = self.result(rows=4), self.result(rows=4, compute="int8")
        assert int8["peak_share"] == pytest.approx(bf16["peak_share"] / 4)

    def test_spread(self) -> None:
        assert spread([5.0]) == 0.0
        assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4.0 - 2.0) / 2 / 3.0)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Of two formats, both passes, and what torch has."""
    return measure(a_plan(variants=((FormatChoice("bf16", "bf16"), "bf16"), (FormatChoice("int8", "int8"), "bf16"))))


class TestReport:
    def test_has_a_result_for_every_format_pass_and_number_of_rows(self, report: dict[str, Any]) -> None:
        cells = {(r["format"], r["pass"], r["rows_per_expert"]) for r in report["results"]}
        assert cells == {(f, p, n) for f in ("bf16", "int8") for p in ("forward", "backward") for n in (1, 3)}
        assert all(r["seconds"] > 0 for r in report["results"])
        bytes_of = {r["format"]: r["stored_bytes"] for r in report["results"]}
        assert bytes_of["bf16"] == SHAPE.experts * SHAPE.expert_weights * 2
        assert bytes_of["int8"] < bytes_of["bf16"]

    def test_names_machine_layer_and_baselines(self, report: dict[str, Any]) -> None:
        assert report["machine"]["tier"] == kt_sft.system_info(num_threads=1)["tier"]
        assert report["layer"] == {"name": "small", "hidden": 64, "intermediate": 32, "experts": 6, "top_k": 2}
        assert report["peaks"]["gflops_range"][0] <= report["peaks"]["gflops"] <= report["peaks"]["gflops_range"][1]
        assert "transformers" in report["baselines"]
        for result in report["results"]:
            assert set(result["others"]) <= set(report["baselines"])
            assert "transformers" in result["others"]
            assert ("torch_linears" in result["others"]) == (result["pass"] == "forward" and onednn_packs())

    def test_is_shown_whole_in_80_columns(self, report: dict[str, Any]) -> None:
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        show(report, console)
        text = console.export_text()
        assert "…" not in text
        for expected in ("forward", "backward", "bf16", "int8", "GFLOP/s", "formers", "grouped_mm"):
            assert expected in text

    def test_is_drawn(self, report: dict[str, Any], tmp_path: Path) -> None:
        draw(report, tmp_path / "bench.png")
        assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")

    def test_leaves_torchs_threads_as_they_were(self) -> None:
        threads = torch.get_num_threads()
        measure(a_plan(threads=threads + 1, rows=(1,), repeats=1))
        assert torch.get_num_threads() == threads

    def test_without_torch_and_with_one_pass(self) -> None:
        report = measure(a_plan(with_torch=False, passes=("backward",), rows=(1,)))
        assert report["baselines"] == {}
        assert [result["pass"] for result in report["results"]] == ["backward"]


def test_peaks_are_of_the_tier_that_is_asked_for() -> None:
    tiers = kt_sft.system_info()["tiers"]
    peaks = {tier: measure_peak(tier, 1) for tier in tiers}
    assert all(peak.threads == 1 and peak.gflops > 0 and peak.read_gbs > 0 for peak in peaks.values())
    with pytest.raises(ValueError, match="tier 'avx1024' is not available here"):
        measure_peak("avx1024")

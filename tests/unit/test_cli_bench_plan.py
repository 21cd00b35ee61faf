"""What `kt-sft bench` settles before it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kt_sft.cli import bench_plan
from kt_sft.cli.bench_plan import BenchError, Plan, plan
from kt_sft.config import AVAILABLE_FORMATS, ConfigError

DEFAULTS: dict[str, Any] = {
    "model": "qwen3-30b-a3b",
    "hidden": None,
    "intermediate": None,
    "experts": None,
    "top_k": None,
    "formats": "bf16",
    "compute": "bf16",
    "rows": "1,4",
    "passes": "forward,backward",
    "threads": 2,
    "repeats": 1,
    "clock": "elapsed",
    "memory_gib": 64.0,
    "with_torch": True,
    "kt_kernel": None,
    "kt_kernel_lora": 8,
}


def planned(**changes: Any) -> Plan:
    return plan(**(DEFAULTS | changes))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 32 MiB of last-level cache."""
    monkeypatch.setattr(bench_plan.machine, "last_level_cache_bytes", lambda cpus: 32 << 20)


class TestExperts:
    def test_enough_to_be_cold_in_every_format_and_a_multiple_of_the_slots(self) -> None:
        held = planned(formats="bf16,int4").shape.experts
        weights = 3 * 2048 * 768
        assert held % 8 == 0
        assert held * weights * 0.5 >= 4 * (32 << 20)
        assert (held - 8) * weights * 0.5 < 4 * (32 << 20)

    def test_enough_to_be_shared_out_where_few_would_be_cold(self) -> None:
        assert planned().shape.experts == 32

    def test_no_more_than_memory_allows(self) -> None:
        # An expert takes 3 x 2048 x 768 weights x 6 bytes and some activations, with kt-kernel 14 bytes.
        assert planned(memory_gib=0.7).shape.experts == 24
        assert planned(memory_gib=0.7, kt_kernel=Path("/")).shape.experts == 8

    def test_memory_for_nothing_is_an_error(self) -> None:
        with pytest.raises(
            BenchError, match=r"8 experts of this size need .* GiB, 0\.1 GiB may be used; raise --memory"
        ):
            planned(memory_gib=0.1)
        with pytest.raises(BenchError, match="--memory must be above 0"):
            planned(memory_gib=0.0)

    def test_as_asked_for(self) -> None:
        assert planned(experts=8).shape.experts == 8
        with pytest.raises(BenchError, match="--experts 12 is no multiple of the 8"):
            planned(experts=12)
        with pytest.raises(BenchError, match=r"--experts 8000 needs .* give fewer, or raise --memory"):
            planned(experts=8000)


class TestShape:
    def test_given_sizes_take_the_place_of_the_models(self) -> None:
        shape = planned(hidden=100, intermediate=30, top_k=4, experts=12).shape
        assert (shape.hidden, shape.intermediate, shape.experts, shape.top_k) == (100, 30, 12, 4)
        assert shape.name == "qwen3-30b-a3b, changed"

    def test_more_slots_than_the_model_has_experts(self) -> None:
        assert planned(hidden=64, intermediate=32, top_k=200).shape.experts % 200 == 0


class TestVariants:
    def test_all_is_what_this_version_has(self) -> None:
        variants = planned(formats="all").variants
        assert [(choice.expert_format, compute) for choice, compute in variants] == [
            (name, "bf16") for name in AVAILABLE_FORMATS
        ]

    def test_group_and_zero_points(self) -> None:
        ((choice, _),) = planned(formats="int4:64:zp").variants
        config = choice.config("bf16", threads=2)
        assert (config.expert_format, config.group_size, config.zero_point) == ("int4", 64, True)

    @pytest.mark.parametrize("text", ["int4:x", "int4:32:64", "int4:-1"])
    def test_a_format_that_cannot_be_read(self, text: str) -> None:
        with pytest.raises(BenchError, match="is no format; write name, name:group or name:group:zp"):
            planned(formats=text)

    @pytest.mark.parametrize("text", ["int3", "bf16:32", "bf16:zp"])
    def test_a_format_that_the_engine_does_not_take(self, text: str) -> None:
        with pytest.raises(ConfigError, match="kt_sft: "):
            planned(formats=text)

    def test_formats_that_cannot_multiply_int8_are_left_out_of_it(self) -> None:
        computes = [compute for choice, compute in planned(formats="bf16", compute="bf16,int8").variants]
        assert computes == ["bf16"]
        with pytest.raises(ConfigError, match="int8"):
            planned(formats="bf16", compute="int8")

    def test_int8_products_have_no_backward_of_their_own(self) -> None:
        with pytest.raises(BenchError, match="--compute int8 changes forward products only"):
            planned(formats="bf16", compute="int8", passes="backward")


class TestWords:
    def test_rows_are_sorted_and_named_once(self) -> None:
        assert planned(rows="16, 1,16").rows == (1, 16)

    @pytest.mark.parametrize("text", ["", "1,,2", "0", "1.5", "-1"])
    def test_rows_that_are_none(self, text: str) -> None:
        with pytest.raises(BenchError, match=r"--rows: .* is no number of at least 1"):
            planned(rows=text)

    def test_a_pass_there_is_not(self) -> None:
        with pytest.raises(BenchError, match="--passes: 'sideways' is none of forward, backward"):
            planned(passes="forward,sideways")

    def test_cpu_time_is_of_one_thread(self) -> None:
        assert planned(clock="cpu", threads=1).clock == "cpu"
        with pytest.raises(BenchError, match="give --threads 1"):
            planned(clock="cpu", threads=2)
        with pytest.raises(BenchError, match="--clock: 'sun' is none of elapsed, cpu"):
            planned(clock="sun")

    def test_an_interpreter_there_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(BenchError, match=r"--kt-kernel .* does not exist"):
            planned(kt_kernel=tmp_path / "python")

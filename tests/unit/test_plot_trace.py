"""What a profile says about who worked when."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from plot_trace import TraceError, figures, main, overlap, read_lanes, union, without  # noqa: E402

KT_SFT, HOST, DEVICE = 1, 4711, 0
LANES = [
    {"ph": "M", "pid": KT_SFT, "tid": 1, "name": "thread_name", "args": {"name": "CPU engine"}},
    {"ph": "M", "pid": KT_SFT, "tid": 2, "name": "thread_name", "args": {"name": "waiting for the engine"}},
    {"ph": "M", "pid": HOST, "tid": HOST, "name": "thread_name", "args": {"name": "thread 4711 (python)"}},
    {"ph": "X", "pid": "Spans", "tid": "PyTorch Profiler", "cat": "Trace", "name": "a", "ts": 0, "dur": 1e9},
    {"ph": "s", "pid": HOST, "tid": HOST, "cat": "fwdbwd", "name": "fwdbwd", "ts": 5e6},
]


def span(category: str, lane: int, begin: float, end: float) -> dict[str, Any]:
    """From and to in seconds."""
    return {
        "ph": "X",
        "cat": category,
        "pid": 0,
        "tid": lane,
        "name": "it",
        "ts": begin * 1e6,
        "dur": (end - begin) * 1e6,
    }


def written(folder: Path, *events: dict[str, Any]) -> Path:
    path = folder / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*LANES, *events]}))
    return path


def test_times_are_united_cut_and_taken_away():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert overlap([(0, 4), (5, 9)], [(1, 2), (3, 6), (8, 10)]) == [(1, 2), (3, 4), (5, 6), (8, 9)]
    assert without([(0, 4), (5, 9)], [(1, 2), (3, 6), (8, 10)]) == [(0, 1), (2, 3), (6, 8)]
    assert without([], [(1, 2)]) == []


def test_what_an_accelerator_and_the_engine_did_side_by_side(tmp_path: Path):
    """The engine works 4 s of 10, kernels and a copy 7, both together 2: 2 (10 - 7) of 10 s were lost."""
    path = written(
        tmp_path,
        span("kernel", 7, 100, 105),
        span("kernel", 20, 104, 106),
        span("gpu_memcpy", 7, 109, 110),
        span("kt_sft", 1, 104, 108),
        span("kt_sft", 2, 106, 108),
        span("cpu_op", HOST, 100, 109),
    )
    lanes = read_lanes(path)
    assert lanes["kernels"] == [(0, 6)]
    assert lanes["host"] == [(0, 6), (8, 9)], "a thread that waits is not at work"
    assert figures(lanes) == pytest.approx(
        {"seconds": 10, "engine": 0.4, "accelerator": 0.7, "both": 0.2, "idle_beyond_forced": 0.6}
    )


def test_without_an_accelerator_the_host_takes_its_place(tmp_path: Path):
    lanes = read_lanes(written(tmp_path, span("kt_sft", 1, 2, 4), span("kt_sft", 2, 2, 4), span("cpu_op", HOST, 0, 8)))
    assert figures(lanes) == pytest.approx(
        {"seconds": 8, "engine": 0.25, "host": 0.75, "both": 0, "idle_beyond_forced": 0.5}
    )


def test_it_draws_a_picture_and_prints_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, span("kt_sft", 1, 2, 4), span("cpu_op", HOST, 0, 8))
    assert main([str(path), str(tmp_path / "it.png"), "--milliseconds", "500"]) == 0
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(capsys.readouterr().out)["engine"] == 0.25


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00"])
def test_what_is_no_trace_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "trace.json").write_text(text)
    assert main([str(tmp_path / "trace.json"), str(tmp_path / "it.png")]) == 1
    assert "trace.json cannot be read as a Chrome trace" in capsys.readouterr().err
    assert not (tmp_path / "it.png").exists()


def test_a_profile_without_the_engine_is_named(tmp_path: Path):
    with pytest.raises(TraceError, match="holds no work of the expert engine"):
        read_lanes(written(tmp_path, span("cpu_op", HOST, 0, 8)))

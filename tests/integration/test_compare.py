"""`kt-sft compare` from a random model to its report, with the contenders that every machine has."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from commands import run_command


def test_compares_and_reports(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--hidden", "64", "--intermediate", "32", "--experts", "8", "--top-k", "2"]
    length = ["--steps", "3", "--warmup", "1", "--rounds", "1", "--tokens", "64", "--threads", "1"]
    # DeepSpeed is an extra; where it is installed its runs belong to a maintainer's comparison, not to the tests.
    names = "kt_sft,llamafactory" + (",zero3" if importlib.util.find_spec("deepspeed") is None else "")

    result = run_command(["kt-sft", "compare", *sizes, *length, "--contenders", names, "--out", str(tmp_path)])

    assert result.returncode == 0, result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    (found,) = report["results"]
    assert json.loads((tmp_path / "results.json").read_text()) == report["results"]
    assert found["reference"] == "llamafactory"
    assert set(found["contenders"]) == {"kt_sft", "llamafactory"}
    for figures in found["contenders"].values():
        assert figures["tokens_per_second"] > 0
        assert len(figures["losses"]) == 3
        assert figures["peak_host_bytes"] > 1 << 28
    assert report["agree"] == {"kt_sft, 128 tokens": True}  # of two micro-batches
    assert found["prediction"]["in_turn"] > 0
    assert report["machine"]["versions"]["llamafactory"]
    if "zero3" in names:
        assert "pip install 'kt_sft[deepspeed]'" in report["missing"]["zero3"]
    # Both really ran with, and without, the engine.
    assert "routed experts on the CPU" in (tmp_path / "logs" / "kt_sft_64_1.log").read_text()
    assert "kt_sft" not in json.loads((tmp_path / "recipes" / "llamafactory_64.yaml").read_text())
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in (tmp_path / "report.md").read_text()

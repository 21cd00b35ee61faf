"""The `kt-sft` command: options, output, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kt_sft.cli.app import app, main
from kt_sft.config import TIERS

TINY = ["bench", "--hidden", "64", "--intermediate", "32", "--experts", "8", "--threads", "1", "--repeats", "1"]

runner = CliRunner()


def test_is_installed_as_a_command() -> None:
    (script,) = (point for point in entry_points(group="console_scripts") if point.name == "kt-sft")
    assert script.load() is main


def test_help_names_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "doctor" in result.stdout
    assert "bench" in result.stdout


class TestDoctor:
    def test_facts_as_json(self) -> None:
        result = runner.invoke(app, ["doctor", "--json"])
        assert result.exit_code == 0
        facts = json.loads(result.stdout)
        assert facts["engine"]["error"] is None
        assert [tier["name"] for tier in facts["tiers"]] == list(TIERS)
        (chosen,) = (tier for tier in facts["tiers"] if tier["chosen"])
        assert chosen["name"] == facts["engine"]["tier"]
        for peak in ("peak_gflops", "int8_peak_gflops"):
            assert all((tier[peak] is not None) == tier["available"] for tier in facts["tiers"])
        assert facts["memory"]["read_gbs"] > 0
        assert facts["memory"]["total_bytes"] > 0
        assert {"kt_sft", "cpu", "numa", "huge_pages", "accelerators", "hosts", "seams", "advice"} <= set(facts)

    def test_tables_for_people(self) -> None:
        result = runner.invoke(app, ["doctor"])
        assert result.exit_code == 0
        for expected in ("engine", "avx2", "llamafactory", "huge pages", "in use"):
            assert expected in result.stdout

    def test_an_engine_that_cannot_run_is_told_and_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KT_SFT_ISA", "avx1024")
        result = runner.invoke(app, ["doctor", "--json"])
        assert result.exit_code == 1
        facts = json.loads(result.stdout)
        assert "avx1024" in facts["engine"]["error"]
        assert facts["advice"][0].startswith("The engine does not run")
        table = runner.invoke(app, ["doctor"])
        assert table.exit_code == 1
        assert "avx1024" in table.stdout

    def test_a_native_module_that_cannot_be_loaded_is_told_and_fails(self) -> None:
        program = "import sys; sys.modules['kt_sft.engine._native'] = None; from kt_sft.cli.app import main; main()"
        command = [sys.executable, "-c", program, "doctor", "--json"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 1, run.stderr
        facts = json.loads(run.stdout)
        assert "_native" in facts["engine"]["error"]
        assert not any(tier["available"] for tier in facts["tiers"])

    def test_a_lowered_tier_is_explained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KT_SFT_ISA", "portable")
        facts = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
        assert facts["engine"]["tier"] == "portable"
        assert facts["tiers"][0]["reason"] == "in use: KT_SFT_ISA=portable"


class TestBench:
    def test_writes_what_it_shows(self, tmp_path: Path) -> None:
        files = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
        result = runner.invoke(app, [*TINY, "--formats", "bf16,int4:32", "--rows", "1,2", *files])
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "bench.json").read_text())
        assert report["kind"] == "kt-sft bench"
        assert {r["format"] for r in report["results"]} == {"bf16", "int4:32"}
        assert "int4:32" in result.stdout
        assert (tmp_path / "bench.png").stat().st_size > 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--formats", "int3"], "expert_format must be one of"),
            (["--model", "gpt-9"], "neither a known model"),
            (["--rows", "none"], "--rows: 'none' is no number"),
            (["--memory", "0.000001"], "raise --memory"),
            (["--json", "/nowhere/bench.json"], "--json: the folder /nowhere does not exist"),
        ],
    )
    def test_what_is_not_possible_is_one_sentence(self, options: list[str], message: str) -> None:
        result = runner.invoke(app, [*TINY, *options])
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.output

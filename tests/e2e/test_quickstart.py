"""The quickstart, shortened: every step runs, the report is whole and the loss falls."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "scripts" / "quickstart.py"
BASE_STEPS, TUNING_STEPS = 20, 8


def run_quickstart(*arguments):
    return subprocess.run(
        [sys.executable, str(QUICKSTART), *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run too short to learn anything: the required gain is one that it cannot miss."""
    out = tmp_path_factory.mktemp("quickstart")
    result = run_quickstart(
        *("--out", str(out), "--base-steps", str(BASE_STEPS), "--max-steps", str(TUNING_STEPS)),
        *("--timing-runs", "0", "--required-gain", "-1"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result


def test_the_report_has_every_figure(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    for key in ("exact_match_base", "exact_match_tuned", "exact_match_stock", "exact_match_merged"):
        assert 0 <= report[key] <= 1
    for key in (
        *("loss_first", "loss_last", "speed_ratio"),
        *("tokens_per_second_kt_sft", "tokens_per_second_stock", "peak_rss_mb_kt_sft", "peak_rss_mb_stock"),
    ):
        assert report[key] > 0
    assert report["recipe"]["kt_sft"] == {"expert_format": "bf16"}
    assert report["machine"]["engine"]["tier"]
    assert report["chat"]["question"].startswith("reverse: ")
    assert [target["reached"] for target in report["targets"]] == [True, True]


def test_the_loss_falls(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    assert report["loss_last"] < report["loss_first"]


def test_both_kinds_ran_the_same_steps_from_the_same_loss(finished):
    losses = {}
    for name in ("kt_sft", "stock"):
        state = json.loads((finished[0] / name / "trainer_state.json").read_text())
        losses[name] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert len(losses[name]) == TUNING_STEPS
    # Before the first update both compute the loss of the same BF16 weights. Its terms are rounded to BF16 some tens of
    # times on the way, each by 2^-9 at most, in either program: 5 % is far above that, and far below another model's.
    assert losses["kt_sft"][0] == pytest.approx(losses["stock"][0], rel=0.05)


def test_the_engine_was_used_by_one_and_not_by_the_other(finished):
    logs = finished[0] / "logs"
    assert "kt_sft" in (logs / "kt_sft.log").read_text()
    stock_recipe = (logs / "stock.yaml").read_text()
    assert "kt_sft:" not in stock_recipe
    assert "lora_rank" in stock_recipe


def test_the_adapter_the_merged_model_and_the_curves_are_there(finished):
    out, result = finished
    assert (out / "kt_sft" / "adapter_model.safetensors").is_file()
    assert (out / "merged" / "config.json").is_file()
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "exact match" in result.stdout


def test_a_failing_step_is_named_with_its_output(tmp_path):
    (tmp_path / "base").write_text("a file where the base model's folder should be")
    result = run_quickstart("--out", str(tmp_path), "--base-steps", "1", "--prepare-only")
    assert result.returncode == 1
    assert "base model failed" in result.stderr
    assert "base_model.log" in result.stderr

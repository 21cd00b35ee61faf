"""The example of LoRA on experts, shortened: every step runs, and the report is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "scripts" / "expert_lora_example.py"
BASE_STEPS, TUNING_STEPS = 1, 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run too short to learn anything: the required gain is one that it cannot miss."""
    folder = tmp_path_factory.mktemp("example")
    arguments = ["--out", str(folder / "out"), "--quickstart", str(folder / "quickstart"), "--required-gain", "-1"]
    arguments += ["--base-steps", str(BASE_STEPS), "--max-steps", str(TUNING_STEPS), "--examples", "8"]
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "out", result.stdout


def test_the_report_has_every_figure(finished):
    report = json.loads((finished[0] / "report.json").read_text())
    assert report["exact_match"].keys() == {"base", "attention", "experts", "plain_peft", "merged"}
    assert report["steps"] == {"experts": TUNING_STEPS, "attention": TUNING_STEPS}
    assert all(target["reached"] for target in report["targets"])
    assert len(report["targets"]) == 5
    for key in ("loss_last", "tokens_per_second", "peak_rss_mb"):
        assert all(value > 0 for value in report[key].values())
    assert report["loss_first"]["experts"] == report["loss_first"]["attention"]  # new adapters change nothing
    assert report["loss_last"]["experts"] != report["loss_last"]["attention"]


def test_the_logits_of_a_process_without_kt_sft_are_the_engines(finished):
    logits = json.loads((finished[0] / "report.json").read_text())["logits"]
    assert 0 < logits["largest_difference"] <= logits["allowed_difference"]


def test_one_adapter_covers_the_experts(finished):
    for name, on_experts in (("experts", True), ("attention", False)):
        config = json.loads((finished[0] / name / "adapter_config.json").read_text())
        assert bool(config.get("target_parameters")) == on_experts
    assert (finished[0] / "merged" / "config.json").is_file()


def test_the_merged_model_answers_over_http(finished):
    out, printed = finished
    answers = json.loads((out / "report.json").read_text())["answers"]
    assert len(answers) == 8
    assert all(answer["question"].startswith("reverse: ") and answer["answer"] for answer in answers)
    assert "routed experts on the CPU" in (out / "logs" / "api.server.log").read_text()
    assert "over HTTP" in printed

"""The quickstart's runs and report: recipes, measured processes, figures and targets."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from quickstart_losses import mean_difference  # noqa: E402
from quickstart_steps import processes, report, training  # noqa: E402


def make_run(tokens_per_second, losses=(4.0, 0.5), peak_rss_mb=1000.0):
    return training.TrainingRun(
        output_dir=Path("out"),
        losses=list(losses),
        tokens_per_second=tokens_per_second,
        step_seconds=0.1,
        peak_rss_mb=peak_rss_mb,
        seconds=10.0,
    )


def make_evaluation(base=0.0, tuned=1.0, stock=1.0):
    scores = {"base": base, "tuned": tuned, "stock": stock, "merged": tuned}
    return {name: {"new_skill": score, "base_skills": 0.9} for name, score in scores.items()}


def test_the_recipe_is_complete_and_local():
    recipe = training.load_recipe()
    assert recipe["model_name_or_path"] == "saves/quickstart/base"
    assert recipe["use_cpu"] is True
    assert recipe["bf16"] is True
    assert recipe["finetuning_type"] == "lora"
    assert recipe["report_to"] == "none"
    assert recipe["kt_sft"] == {"expert_format": "bf16"}


def test_the_stock_recipe_lacks_the_key_and_nothing_else():
    recipe = training.load_recipe()
    stock = training.without_plugin(recipe)
    assert "kt_sft" not in stock
    assert stock | {"kt_sft": recipe["kt_sft"]} == recipe


def test_a_recipe_without_the_key_is_an_error(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump({"stage": "sft"}))
    with pytest.raises(processes.StepError, match=r"plain\.yaml has no `kt_sft:` block"):
        training.load_recipe(path)


def test_only_settings_that_differ_become_arguments():
    recipe = {"use_cpu": True, "max_steps": 160, "output_dir": "a"}
    settings = {"use_cpu": False, "max_steps": 160, "output_dir": "b"}
    assert training.changed_settings(recipe, settings) == ["use_cpu=false", "output_dir=b"]
    assert training.changed_settings(recipe, recipe) == []


def test_a_process_is_measured_by_its_peak_memory(tmp_path):
    # 200 MiB of ones, all touched, are 209.7 MB, beside the interpreter.
    usage = processes.run("large", [sys.executable, "-c", "print(len(b'\\x01' * (200 << 20)))"], tmp_path / "large.log")
    assert (tmp_path / "large.log").read_text().strip() == str(200 << 20)
    assert usage.peak_rss_mb >= 209.7


@pytest.mark.parametrize("program", ["quickstart", "expert_lora_example"])
def test_the_program_that_measures_never_imports_torch(program):
    # A child's peak starts at its parent's size; see processes.py.
    command = f"import sys; sys.path.insert(0, 'scripts'); import {program}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=SCRIPTS.parent).returncode == 0


def test_a_failing_process_is_an_error_that_shows_its_last_lines(tmp_path):
    command = [sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"]
    with pytest.raises(processes.StepError, match=r"(?s)export failed \(exit status 3\).*the reason.*export\.log"):
        processes.run("export", command, tmp_path / "export.log")


def test_a_program_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(processes.StepError, match="chat: cannot start /no/such/program"):
        processes.run("chat", ["/no/such/program"], tmp_path / "chat.log")


def test_speeds_are_medians_over_all_runs_and_their_ratio():
    engine = [make_run(speed) for speed in (100, 900, 300)]
    stock = [make_run(speed, losses=(4.1, 0.7), peak_rss_mb=2000.0) for speed in (50, 200, 150)]
    figures = report.build_figures(make_evaluation(), engine, stock)
    assert figures["tokens_per_second_kt_sft"] == 300
    assert figures["tokens_per_second_stock"] == 150
    assert figures["speed_ratio"] == 2
    assert (figures["loss_first"], figures["loss_last"], figures["loss_last_stock"]) == (4.0, 0.5, 0.7)
    assert (figures["peak_rss_mb_kt_sft"], figures["peak_rss_mb_stock"]) == (1000.0, 2000.0)


@pytest.mark.parametrize(
    ("scores", "reached"),
    [
        ({"base": 0.0, "tuned": 1.0, "stock": 1.0}, [True, True]),
        ({"base": 0.1, "tuned": 0.59, "stock": 0.59}, [False, True]),
        ({"base": 0.0, "tuned": 0.9, "stock": 1.0}, [True, False]),
        ({"base": 0.0, "tuned": 1.0, "stock": 0.9}, [True, False]),
    ],
)
def test_targets_are_a_gain_and_agreement_with_stock(scores, reached):
    figures = report.build_figures(make_evaluation(**scores), [make_run(1)], [make_run(1)])
    assert [target.reached for target in report.check_targets(figures, required_gain=0.5)] == reached


def test_the_curves_are_a_png(tmp_path):
    report.draw_losses(make_run(1), make_run(1, losses=(4.0, 1.0)), tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_deviation_is_the_mean_absolute_difference():
    assert mean_difference([1.0, 2.0, 3.0], [1.5, 1.5, 3.0]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="shorter"):
        mean_difference([1.0, 2.0], [1.0])

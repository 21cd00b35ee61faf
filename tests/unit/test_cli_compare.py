"""`kt-sft compare`: who takes part with which recipe, what the figures are, and when losses do not agree."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llamafactory.hparams import get_train_args
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from kt_sft.cli import compare_machine
from kt_sft.cli import compare_plan as plan
from kt_sft.cli.app import app
from kt_sft.cli.compare_figures import Measured, agreement, compared, measured, rounding_bounds
from kt_sft.cli.compare_model import ARCHITECTURES, ModelRequest, architecture, write_model, write_text
from kt_sft.cli.compare_rates import measure, predicted, work_of
from kt_sft.cli.compare_report import write_report
from kt_sft.cli.shapes import MODELS, ShapeError, shape_of
from kt_sft.cli.training_runs import TrainingRun, cause
from kt_sft.config import KTConfig
from kt_sft.offload.step_model import Work

runner = CliRunner()
KT_SFT, IN_TURN, LLAMAFACTORY, ZERO3, TUNED = plan.CONTENDERS
FACTS: dict[str, Any] = {
    "accelerators": [],
    "deepspeed_error": None,
    "engine": {"memory_available_bytes": 8 << 30, "tier": "avx2", "threads": 2},
    "cpu": "a CPU",
    "cpus": 2,
    "memory_bytes": 16 << 30,
    "python": "3.11",
    "platform": "Linux",
    "versions": {"kt_sft": "0", "deepspeed": None},
    "environment": {"KT_SFT_ISA": None, "OMP_WAIT_POLICY": "passive"},
}


def common() -> dict[str, Any]:
    return plan.read_recipe(plan.RECIPES / "lora.yaml")


class TestRecipes:
    def test_kt_sft_and_llamafactory_accept_the_recipe(self, tmp_path: Path) -> None:
        recipe = common()
        assert KTConfig.from_dict(recipe["kt_sft"]).stored_format == "bf16"
        model_args, *_ = get_train_args(recipe | {"output_dir": str(tmp_path), "use_cpu": True})
        assert model_args.kt_sft == recipe["kt_sft"]

    @pytest.mark.parametrize("contender", [ZERO3, TUNED], ids=lambda contender: contender.name)
    def test_both_baselines_offload_parameters_under_zero_3(self, contender: plan.Contender) -> None:
        config = json.loads((plan.RECIPES / str(contender.deepspeed)).read_text())
        assert config["zero_optimization"]["stage"] == 3
        assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
        assert config["train_micro_batch_size_per_gpu"] == "auto"

    def test_the_tuned_one_pins_memory_and_prefetches_a_whole_moe_block(self) -> None:
        zero = json.loads((plan.RECIPES / str(TUNED.deepspeed)).read_text())["zero_optimization"]
        shape = shape_of("qwen3-30b-a3b")
        assert zero["offload_param"]["pin_memory"]
        assert zero["stage3_prefetch_bucket_size"] >= shape.experts * shape.expert_weights
        # One block computes while the next one comes.
        assert zero["stage3_max_live_parameters"] >= 2 * shape.experts * shape.expert_weights

    @pytest.mark.parametrize("contender", plan.CONTENDERS, ids=lambda contender: contender.name)
    def test_contenders_differ_in_their_own_key_only(self, contender: plan.Contender) -> None:
        own = plan.recipe_for(contender, common(), {"max_steps": 3}, plan.RECIPES)
        shared = common() | {"max_steps": 3}
        del shared["kt_sft"]
        expected = {KT_SFT: {"kt_sft"}, IN_TURN: {"kt_sft"}, LLAMAFACTORY: set()}.get(contender, {"deepspeed"})
        assert set(own) - set(shared) == expected
        assert {key: own[key] for key in shared} == shared

    def test_one_of_two_with_kt_sft_does_not_interleave(self) -> None:
        blocks = [plan.recipe_for(contender, common(), {}, plan.RECIPES)["kt_sft"] for contender in (KT_SFT, IN_TURN)]
        assert blocks == [common()["kt_sft"], common()["kt_sft"] | {"interleave_micro_batches": False}]
        assert not KTConfig.from_dict(blocks[1]).interleave_micro_batches
        assert KT_SFT.environment == IN_TURN.environment == {}
        assert common()["gradient_accumulation_steps"] == 2  # or there is nothing to interleave

    def test_kt_sft_is_not_loaded_by_the_others(self) -> None:
        assert KT_SFT.environment == {}
        for contender in (LLAMAFACTORY, ZERO3, TUNED):
            assert contender.environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
        assert ZERO3.environment["FORCE_TORCHRUN"] == "1"
        assert "FORCE_TORCHRUN" not in LLAMAFACTORY.environment

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a: [", "cannot be read as YAML"),
            ("do_train: true\n", "no training recipe with a kt_sft block"),
            ("kt_sft: {}\n", "no training recipe with a kt_sft block"),
            ("do_train: true\nkt_sft: {}\ndeepspeed: a.json\n", "has deepspeed: already"),
            ("do_train: true\nkt_sft: {lora_experts: true}\n", "has lora_experts, which the others cannot train"),
        ],
    )
    def test_other_files_are_refused(self, content: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text(content)
        with pytest.raises(plan.CompareError, match=message):
            plan.read_recipe(tmp_path / "recipe.yaml")


class TestPlan:
    def test_chosen_contenders_keep_their_order(self) -> None:
        assert plan.choose("zero3_tuned, kt_sft") == [KT_SFT, TUNED]
        assert plan.choose(None) == list(plan.CONTENDERS)

    def test_micro_batches_of_so_many_tokens(self) -> None:
        sizes = plan.workloads({"cutoff_len": 512}, "256,512,2048")
        assert sizes == [plan.Workload(256, 1), plan.Workload(512, 1), plan.Workload(512, 4)]
        assert [size.tokens for size in sizes] == [256, 512, 2048]
        own = {"cutoff_len": 512, "per_device_train_batch_size": 3}
        assert plan.workloads(own, None) == [plan.Workload(512, 3)]

    def test_everyone_runs_once_a_round_and_nobody_is_always_first(self) -> None:
        order = plan.alternating([KT_SFT, LLAMAFACTORY, ZERO3], 3)
        for number in range(3):
            assert {contender for at, contender in order if at == number} == {KT_SFT, LLAMAFACTORY, ZERO3}
        assert {order[0][1], order[3][1], order[6][1]} == {KT_SFT, LLAMAFACTORY, ZERO3}

    def test_what_keeps_a_contender_from_running(self) -> None:
        gib = 1 << 30
        device = FACTS | {"accelerators": [{"memory_bytes": 4 * gib}]}
        without = FACTS | {"deepspeed_error": "ModuleNotFoundError: no"}
        assert plan.obstacle(LLAMAFACTORY, FACTS, 7 * gib) is None
        assert "memory has 8.0" in str(plan.obstacle(LLAMAFACTORY, FACTS, 8 * gib))
        assert "the accelerator has 4.0" in str(plan.obstacle(LLAMAFACTORY, device, 7 * gib))
        assert plan.obstacle(ZERO3, device, 7 * gib) is None  # that is what offloading is for
        assert "pip install 'kt_sft[deepspeed]'" in str(plan.obstacle(TUNED, without, gib))
        assert plan.obstacle(KT_SFT, without, 99 * gib) is None  # it looks for itself
        assert plan.obstacle(IN_TURN, device, 99 * gib) is None
        assert "one micro-batch after the other by itself" in str(plan.obstacle(IN_TURN, FACTS, gib))

    def test_the_parent_of_measured_runs_never_imports_torch(self) -> None:
        # A child's peak starts at its parent's size; see training_runs.py.
        command = "import sys; import kt_sft.cli.app, kt_sft.cli.compare_report; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def a_run(
    number: int = 0, speed: float = 100.0, losses: tuple[float, ...] = (5.0, 4.5, 4.0), norm: float = 2.0
) -> Measured:
    return Measured(number, speed, 1.0, 1e9, None, list(losses), [norm] * len(losses), {})


class TestFigures:
    def test_the_first_steps_are_not_measured(self) -> None:
        steps = [
            {
                "loss": 3.0,
                "grad_norm": 1.0,
                "train_runtime": at,
                "num_input_tokens_seen": 10 * n,
                "kt_sft/cpu": n,
                "e": n,
            }
            for n, at in enumerate((30.0, 35.0, 36.0, 38.0), 1)
        ]
        run = TrainingRun(Path("out"), [3.0] * 4, 0.0, 0.0, 5.0, 0.0, steps)
        found = measured(1, run, 2, 7)
        assert found.tokens_per_second == pytest.approx(20 / 3)  # two steps of ten tokens in 1 + 2 seconds
        assert found.step_seconds == 1.5
        assert found.logged == {"kt_sft/cpu": 3.5}
        assert (found.peak_host_bytes, found.peak_device_bytes, found.round) == (5e6, 7, 1)
        with pytest.raises(ValueError, match="leave none"):
            measured(1, run, 4, None)

    def test_ratios_are_taken_within_a_round(self) -> None:
        # The machine is four times slower in the second round, for both.
        fast = [a_run(0, 400.0), a_run(1, 100.0), a_run(2, 330.0)]
        slow = [a_run(0, 200.0), a_run(1, 50.0), a_run(2, 110.0)]
        result = compared({"kt_sft": fast, "llamafactory": slow}, 2, 64, True)
        assert result["contenders"]["kt_sft"]["ratios"]["llamafactory"] == {
            "median": 2.0,
            "least": 2.0,
            "greatest": 3.0,
        }
        assert result["contenders"]["kt_sft"]["spread"] == pytest.approx(300 / 330)

    def test_bounds_follow_depth_and_tokens(self) -> None:
        one, deep, long = rounding_bounds(2, 100), rounding_bounds(8, 100), rounding_bounds(2, 400)
        assert deep.loss == pytest.approx(2 * one.loss)
        assert deep.gradient == pytest.approx(2 * one.gradient)
        assert long.loss == pytest.approx(one.loss / 2)
        assert long.gradient == one.gradient

    @pytest.mark.parametrize(
        ("change", "agrees"),
        [
            ({}, True),
            ({"losses": (5.001, 4.5, 4.0)}, True),
            ({"losses": (5.02, 4.5, 4.0)}, False),  # the first step
            ({"losses": (5.0, 4.6, 4.1)}, False),  # learns less: 0.067 in the mean, of a fall of 1
            ({"norm": 2.02}, True),
            ({"norm": 2.2}, False),
            ({"losses": (math.nan, 4.5, 4.0)}, False),
            ({"losses": (5.0, 4.5, math.nan)}, False),
        ],
    )
    def test_agreement_can_fail(self, change: dict[str, Any], agrees: bool) -> None:
        found = agreement(a_run(**change), a_run(), rounding_bounds(2, 128))  # 0.012 of the loss, 6.7 % of the norm
        assert found["agrees"] is agrees

    def test_another_format_is_shown_and_not_judged(self) -> None:
        runs = {"kt_sft": [a_run(losses=(9.0, 9.0, 9.0))], "zero3": [a_run()], "zero3_tuned": [a_run()]}
        found = compared(runs, 2, 64, same_weights=False)
        assert found["reference"] == "zero3"
        assert found["contenders"]["kt_sft"]["agreement"]["agrees"] is None
        assert found["contenders"]["zero3_tuned"]["agreement"]["agrees"] is True
        assert found["contenders"]["zero3"]["agreement"] is None


def small(name: str) -> ModelRequest:
    return ModelRequest(name, layers=2, hidden=64, intermediate=32, experts=8, top_k=2)


class TestModel:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_sizes_are_those_of_the_published_model(self, name: str, tmp_path: Path) -> None:
        architecture(ModelRequest(name), 1000).save_pretrained(tmp_path)
        shape = shape_of(str(tmp_path))
        assert (shape.hidden, shape.intermediate, shape.experts, shape.top_k) == MODELS[name]

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_transformers_loads_all_of_it(self, name: str, tmp_path: Path) -> None:
        write_model(small(name), tmp_path)
        model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        assert model.config.num_hidden_layers == 2
        assert any("experts" in key for key, _ in model.named_parameters())
        assert len(AutoTokenizer.from_pretrained(tmp_path)("any text\n")["input_ids"]) == 9

    def test_its_loss_depends_on_the_experts_by_more_than_the_bound(self, tmp_path: Path) -> None:
        # Or agreement would say nothing of them.
        write_model(small("qwen3-30b-a3b"), tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        tokens = torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            right = model(input_ids=tokens, labels=tokens).loss.item()
            for layer in model.model.layers:
                layer.mlp.experts.down_proj.zero_()
            wrong = model(input_ids=tokens, labels=tokens).loss.item()
        assert abs(right - wrong) > rounding_bounds(2, 512).loss

    def test_text_is_enough_for_long_tokens(self, tmp_path: Path) -> None:
        write_text(tmp_path, 1000)
        lines = (tmp_path / "text.jsonl").read_text().splitlines()
        assert sum(len(json.loads(line)["text"]) for line in lines) >= 8000
        assert "compare_text" in json.loads((tmp_path / "dataset_info.json").read_text())

    def test_what_has_no_random_weights_is_told(self) -> None:
        with pytest.raises(
            ShapeError, match=r"no random weights for 'gpt-9': give the folder of a checkpoint, or one of"
        ):
            _ = ModelRequest("gpt-9").shape
        with pytest.raises(ShapeError, match="9 experts cannot be divided among the 8 groups"):
            architecture(dataclasses.replace(small("deepseek-v3"), experts=9), 100)


def test_the_watch_keeps_the_least_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, free = threading.Event(), [100, 40, 70]

    def accelerators() -> list[dict[str, int]]:
        if len(free) == 1:
            ended.set()
        return [{"free_bytes": free.pop(0) if len(free) > 1 else free[0]}]

    class Input:
        def read(self) -> None:
            ended.wait(60)

    monkeypatch.setattr("kt_sft.cli.machine.accelerators", accelerators)
    monkeypatch.setattr(sys, "stdin", Input())
    compare_machine.watch(tmp_path / "seen.json")
    assert json.loads((tmp_path / "seen.json").read_text()) == {"first": 100, "least": 40}


def a_prediction(link: float | None) -> dict[str, Any]:
    work = Work(64, 64, 64, 32, 8, 2, layers=2, dense_weights=4096)
    rates = {"expert_forward": 1e9, "expert_backward": 2e9, "dense": 4e9, "link": link}
    return predicted(dataclasses.asdict(work), rates, True, 1, retained=True)


class TestPrediction:
    def test_work_is_read_from_the_checkpoint(self, tmp_path: Path) -> None:
        write_model(small("qwen3-30b-a3b"), tmp_path)
        work = work_of(tmp_path, 32, 3)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        linear = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n}
        head = linear.pop("lm_head.weight")
        assert work.dense_weights * 2 == sum(linear.values())
        assert (work.head_weights, work.tokens, work.sequence, work.layers) == (head, 96, 32, 2)
        assert (work.hidden, work.intermediate, work.experts, work.top_k) == (64, 32, 8, 2)
        assert work.attention_size == 32 * 128

    def test_rates_are_measured_at_the_work(self) -> None:
        work = Work(64, 64, 64, 32, 8, 2, layers=2, dense_weights=4096)
        rates = measure(work, {"expert_format": "int8", "num_threads": 1})
        assert rates.expert_forward > 0
        assert rates.expert_backward > 0
        assert (rates.link is None) is not torch.accelerator.is_available()

    def test_without_a_link_there_is_no_crossover(self) -> None:
        alone, linked = a_prediction(None), a_prediction(1e9)
        assert alone["crossover_tokens"] is alone["streamed"] is alone["side_by_side"] is None
        assert linked["crossover_tokens"] == 1e9 * 2 * 4 / 2e9
        assert 0 < linked["side_by_side"] <= linked["in_turn"]


def a_report(agrees: bool = True) -> dict[str, Any]:
    other = a_run(0, 50.0, losses=(5.0, 4.5, 4.0) if agrees else (7.0, 6.0, 5.0))
    runs = {"kt_sft": [a_run(0, 100.0)], "zero3": [other]}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "command": ["kt-sft", "compare"],
        "machine": FACTS,
        "model": {"path": "m", "layers": 2, "weight_bytes": 1 << 30, "random": {"name": "qwen3-30b-a3b"}},
        "settings": {"steps": 3, "warmup": 1, "rounds": 1, "threads": None},
        "recipe": common(),
        "deepspeed": {"zero3": json.loads((plan.RECIPES / "zero3_stock.json").read_text())},
        "descriptions": {contender.name: contender.description for contender in plan.CONTENDERS},
        "missing": {"llamafactory": "training failed (exit status 1): a b\n  | x\n  | ValueError: why\nThe output: f"},
        "results": [{"cutoff_len": 64, "batch": 1, **compared(runs, 2, 64, True), "prediction": a_prediction(None)}],
    }


def test_the_cause_is_the_first_error_and_not_its_launcher_s(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(
        "ready\n[rank0]:   raise ValueError('no')\n[rank0]: ValueError: no module\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: x\nsubprocess.CalledProcessError: y\n"
    )
    assert cause(log) == "ValueError: no module"
    log.write_text("subprocess.CalledProcessError: y\nkilled\n")
    assert cause(log) is None


class TestReport:
    def test_everything_is_in_it(self, tmp_path: Path) -> None:
        write_report(a_report(), tmp_path)
        text = (tmp_path / "report.md").read_text()
        assert "| kt_sft | 100 | 0% | 1 | 0.93 | 2.00 (2.00 to 2.00) |" in text
        assert "no accelerator: every contender computes on the CPU" in text
        assert "fewer than ZeRO-3 may keep gathered" in text
        assert "- llamafactory: training failed (exit status 1): ValueError: why" in text
        in_turn = a_prediction(None)["in_turn"]
        assert f"| {in_turn:.3g} |  | 1 | {1 / in_turn:.2f} |  |  |" in text  # 1 s was measured
        assert "Environment: OMP_WAIT_POLICY=passive." in text
        assert '"learning_rate"' in text
        assert '"offload_param"' in text
        assert json.loads((tmp_path / "report.json").read_text())["results"][0]["tokens"] == 64
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(("link", "goal"), [(1e6, "| 4000 | 50.00 |"), (6e7, "| 67 | 1.00 |"), (1e9, "| 4 |  |")])
    def test_the_goal_follows_the_crossover(self, link: float, goal: str, tmp_path: Path) -> None:
        report = a_report()
        report["results"][0]["prediction"] = a_prediction(link)
        write_report(report, tmp_path)
        assert goal in (tmp_path / "report.md").read_text()

    def test_the_gain_of_interleaving_is_beside_what_was_predicted(self, tmp_path: Path) -> None:
        report = a_report()
        prediction = a_prediction(1e9)
        most = (prediction["cpu"] + prediction["device"]) / max(prediction["cpu"], prediction["device"])
        assert prediction["most_gain"] == pytest.approx(most)
        predicted = f"({prediction['gain']:.2f}, {most:.2f})"
        for slow, shown in ([], predicted), ([a_run(0, 80.0)], f"1.25 {predicted}"):
            runs = {"kt_sft": [a_run(0, 100.0)], "zero3": [a_run(0, 50.0)]} | ({"kt_sft_in_turn": slow} if slow else {})
            report["results"][0] |= compared(runs, 2, 64, True) | {"prediction": prediction}
            write_report(report, tmp_path)
            assert f"| {shown} |" in (tmp_path / "report.md").read_text()

    @pytest.mark.parametrize("agrees", [True, False])
    def test_disagreement_is_said(self, agrees: bool, tmp_path: Path) -> None:
        write_report(a_report(agrees), tmp_path)
        # kt_sft to the reference, zero3.
        assert ("| NO |" in (tmp_path / "report.md").read_text()) is not agrees


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-9"], "no random weights for 'gpt-9'"),
        (["--model", ".", "--layers", "2"], ". has its own"),
        (["--steps", "3", "--warmup", "3"], "--warmup: 3 of 3 steps leave none to measure"),
        (["--tokens", "many"], "--tokens: 'many' is no number of tokens"),
        (["--tokens", "700"], "--tokens: 700 is no multiple of the recipe's cutoff_len 512"),
        (["--contenders", "kt_sft"], "--contenders: name at least two"),
        (
            ["--contenders", "kt_sft,unsloth"],
            "--contenders: unsloth is none of kt_sft, kt_sft_in_turn, llamafactory, zero3, zero3_tuned",
        ),
        (["--recipe", "nowhere.yaml"], "--recipe: nowhere.yaml cannot be read"),
        (["--top-k", "9", "--experts", "8"], "9 experts per token cannot be chosen among 8"),
    ],
)
def test_what_is_not_possible_is_one_sentence_before_any_work(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = runner.invoke(app, ["compare", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("kt-sft compare: ")
    assert not (tmp_path / "out").exists()


def test_recipes_hold_no_logic() -> None:
    assert {path.suffix for path in plan.RECIPES.iterdir()} == {".yaml", ".json"}
    assert yaml.safe_load((plan.RECIPES / "lora.yaml").read_text())

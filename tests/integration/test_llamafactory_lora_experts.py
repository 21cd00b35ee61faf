"""`lora_experts: true` in recipes: trained, resumed, continued, merged, and read by a process without kt_sft."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import assert_close, logits
from commands import LORA_EXPERTS, run_command, train_losses
from llamafactory.hparams import get_infer_args
from llamafactory.model import load_model, load_tokenizer
from peft import PeftModel
from rounding_noise import UNIT_ROUNDOFF
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kt_sft
from kt_sft.config import ConfigError

WITHOUT_PLUGIN = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def test_it_learns_on_experts_and_says_so_in_the_adapter(lora_experts_run: Path) -> None:
    losses = train_losses(lora_experts_run)
    assert losses[-1] < losses[0]
    values = load_file(lora_experts_run / "adapter_model.safetensors")
    on_experts = [key for key in values if ".mlp.experts." in key]
    assert len(on_experts) == 2 * 2 * 2  # layers, parameters, sides
    assert all(values[key].any() and values[key].dtype == torch.float32 for key in on_experts)
    config = json.loads((lora_experts_run / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert "q_proj" in config["target_modules"]
    assert config["lora_dropout"] == 0  # PEFT loads no other with target_parameters
    assert json.loads((lora_experts_run / "kt_sft_adapter.json").read_text()) == {"lora_dropout": 0.1}


def test_resume_continues_as_if_uninterrupted(
    lora_experts_run: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        **LORA_EXPERTS, resume_from_checkpoint=str(lora_experts_run / "checkpoint-2"), overwrite_output_dir=None
    )

    result = run_command(["llamafactory-cli", "train", str(recipe)])

    assert result.returncode == 0, result.stdout
    assert train_losses(tmp_path / "out") == train_losses(lora_experts_run)
    resumed, whole = (load_file(out / "adapter_model.safetensors") for out in (tmp_path / "out", lora_experts_run))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_training_goes_on_from_an_adapter(
    lora_experts_run: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(kt_sft={}, adapter_name_or_path=str(lora_experts_run), max_steps=1)

    result = run_command(["llamafactory-cli", "train", str(recipe)])

    assert result.returncode == 0, result.stdout
    assert train_losses(tmp_path / "out")[0] < train_losses(lora_experts_run)[0]
    before, after = (load_file(out / "adapter_model.safetensors") for out in (lora_experts_run, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[key], after[key]) for key in before)


ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "val_size": 0.2, "load_best_model_at_end": True}
#: Several examples, of about 110 tokens with the template's system prompt, fit a row.
PACKED = {"packing": True, "cutoff_len": 400, "per_device_train_batch_size": 2}
#: A learning rate that makes the model worse from the first or second step on.
OVERSHOT = {"learning_rate": 0.3, "early_stopping_steps": 1, "save_steps": 1, "max_steps": 8}

REWARD = {"stage": "rm", "dataset": "pair", "max_steps": 3}

STAGES: dict[str, dict[str, Any]] = {
    "pt": {"stage": "pt", "dataset": "pt"},
    "dpo": {"stage": "dpo", "dataset": "pair", "ref_model": "MODEL"},
    "kto": {"stage": "kto", "dataset": "kto"},
    "rm": REWARD,
    "rm resumed": REWARD | {"resume_from_checkpoint": "RM", "overwrite_output_dir": None},
    "accumulated": ACCUMULATED,
    "accumulated in host memory": ACCUMULATED | {"kt_sft": {"lora_experts": True, "lora_memory": "host"}},
    "evaluated": EVALUATED | {"save_steps": 1},
    "stopped early": EVALUATED | OVERSHOT,
    "packed": PACKED,
    "packed neatly": PACKED | {"neat_packing": True},
    "without dropout": {"lora_dropout": 0.0, "max_steps": 3},
}
#: With every value that the engine rounds moved within a unit roundoff, a number of times, and not at all.
NOISY = {f"without dropout, moved {draw}": STAGES["without dropout"] for draw in range(4)}
EXACT = {"without dropout, exact": STAGES["without dropout"]}
#: LLaMA-Factory's own LoRA, on attention alone.
STOCK = {
    f"{name}, stock": STAGES[name] | {"kt_sft": None, "lora_target": "q_proj"} for name in ("packed", "packed neatly")
}


@pytest.fixture(scope="module")
def stages(base_recipe: dict[str, Any], tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all of these runs; one process for all, to save its start."""
    folder, recipes = tmp_path_factory.mktemp("stages"), []
    for name, changes in (STAGES | STOCK | EXACT | NOISY).items():
        places = {"MODEL": str(tiny_moe), "RM": str(folder / "rm" / "checkpoint-2")}
        changes = {key: places.get(str(value), value) for key, value in changes.items()}
        recipe = base_recipe | LORA_EXPERTS | {"max_steps": 2} | changes | {"output_dir": str(folder / name)}
        unit = UNIT_ROUNDOFF if name in NOISY else 0.0 if name in EXACT else None
        recipes.append((unit, {key: value for key, value in recipe.items() if value is not None}))
    script = (
        "import contextlib, json, sys; from llamafactory.train.tuner import run_exp; from rounding_noise import noise\n"
        "for seed, (unit, recipe) in enumerate(json.loads(sys.argv[1])):\n"
        "    with contextlib.nullcontext() if unit is None else noise(unit, seed): run_exp(recipe)\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    result = run_command(["python", "-c", script, json.dumps(recipes)], environment=environment)
    assert result.returncode == 0, result.stdout
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_other_ways_of_training(name: str, stages: Path) -> None:
    losses = train_losses(stages / name)
    assert len({*losses}) == len(losses) > 1
    values = load_file(stages / name / "adapter_model.safetensors")
    assert all(values[key].any() for key in values if ".mlp.experts." in key)


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_host_memory_changes_nothing_where_there_is_no_accelerator(stages: Path) -> None:
    one, other = (stages / name for name in ("accumulated", "accumulated in host memory"))
    assert train_losses(one) == train_losses(other)
    assert same(adapter_in(one), adapter_in(other))
    assert sorted(file.name for file in one.rglob("*")) == sorted(file.name for file in other.rglob("*"))


@pytest.mark.parametrize("name", ["packed", "packed neatly"])
def test_packed_rows_are_those_of_stock(name: str, stages: Path) -> None:
    """Before the first step B is zero, so the loss is the base model's, of the same rows with the same masks.

    Roundings must be told from masks: ours is nearer to stock's of the same kind than half of what lies between kinds.
    """
    stock = {kind: train_losses(stages / f"{kind}, stock")[0] for kind in ("packed", "packed neatly")}
    between = abs(stock["packed"] - stock["packed neatly"])
    assert abs(train_losses(stages / name)[0] - stock[name]) < between / 2


def test_the_best_model_is_reloaded_after_an_early_stop(stages: Path) -> None:
    state = json.loads((stages / "stopped early" / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(evaluated, key=evaluated.__getitem__)
    assert max(evaluated) == best + 1 < 8  # patience of one evaluation, of eight steps
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    saved = adapter_in(stages / "stopped early")
    assert same(saved, adapter_in(stages / "stopped early" / f"checkpoint-{best}"))
    assert not same(saved, adapter_in(stages / "stopped early" / f"checkpoint-{best + 1}"))


def test_a_reward_model_is_resumed_as_if_uninterrupted(stages: Path) -> None:
    """With its value head; stock LLaMA-Factory cannot."""
    whole, resumed = stages / "rm", stages / "rm resumed"
    assert train_losses(resumed) == train_losses(whole)
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert same(load_file(resumed / name), load_file(whole / name))
        assert not same(load_file(whole / "checkpoint-2" / name), load_file(whole / name))


def test_evaluation_during_training_sees_what_was_learnt(stages: Path) -> None:
    state = json.loads((stages / "evaluated" / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_two_processes_are_one_with_the_double_batch(
    stages: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Within what the roundings of two engines can do (rounding_noise.py), which Adam makes whole steps of near zero.

    A loss is moved by the sum of very many of them, as good as normally distributed. The deviation is that of all draws
    and steps; of the difference of two losses it is root 2 times that, four times which is exceeded once in 15,000.
    That sums have another order moves them less.
    """
    recipe = write_recipe(
        **(LORA_EXPERTS | STAGES["without dropout"]), per_device_train_batch_size=2, ddp_backend="gloo"
    )
    result = run_command(
        ["llamafactory-cli", "train", str(recipe)], environment={"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    )
    assert result.returncode == 0, result.stdout
    assert "world size: 2" in result.stdout
    losses = {name: torch.tensor(train_losses(stages / name)) for name in ("without dropout", *EXACT, *NOISY)}
    moved = torch.stack([losses[name] - losses[next(iter(EXACT))] for name in NOISY])
    apart = torch.tensor(train_losses(tmp_path / "out")) - losses["without dropout"]
    assert float(apart.abs().max()) <= 4 * 2**0.5 * float(moved.square().mean().sqrt())


def test_a_process_without_kt_sft_computes_the_same(lora_experts_run: Path, tiny_moe: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, num_experts_per_tok=8)\n"
        "model = PeftModel.from_pretrained(model, sys.argv[2]).eval()\n"
        "assert 'kt_sft' not in sys.modules\n"
        "with torch.no_grad():\n"
        "    torch.save(model(input_ids=torch.arange(48).reshape(2, 24)).logits, sys.argv[3])\n"
    )
    arguments = ["python", "-c", script, str(tiny_moe), str(lora_experts_run), str(tmp_path / "logits.pt")]
    result = run_command(arguments, environment=WITHOUT_PLUGIN)
    assert result.returncode == 0, result.stdout

    settings = {"dtype": torch.float32, "num_experts_per_tok": 8}  # no rounding sends a token elsewhere
    base = AutoModelForCausalLM.from_pretrained(tiny_moe, quantization_config=kt_sft.KTConfig(), **settings)
    without = logits(base)
    adapted, theirs = PeftModel.from_pretrained(base, lora_experts_run), torch.load(tmp_path / "logits.pt")
    assert_close(adapted, theirs)
    assert not torch.allclose(without, theirs, rtol=0.1, atol=0.1)


def test_chat_api_and_export_merge_it(lora_experts_run: Path, tiny_moe: Path) -> None:
    """They load a model with `adapter_name_or_path`, which LLaMA-Factory merges."""
    arguments = {"model_name_or_path": str(tiny_moe), "adapter_name_or_path": str(lora_experts_run), "template": "qwen"}
    model_args, _, finetuning_args, _ = get_infer_args(arguments | {"kt_sft": {}, "infer_dtype": "float32"})
    model = load_model(load_tokenizer(model_args)["tokenizer"], model_args, finetuning_args)

    experts = [module for module in model.modules() if isinstance(module, kt_sft.CpuExperts)]
    assert [module.merged.rank for module in experts] == [4, 4]
    settings = {"dtype": model.dtype, "quantization_config": kt_sft.KTConfig()}
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_moe, **settings), lora_experts_run)
    for router in [*model.modules(), *adapted.modules()]:
        if hasattr(router, "top_k"):
            router.top_k = 8  # no rounding sends a token elsewhere
    assert_close(model, logits(adapted), engines=2)


def test_it_is_trained_through_v1(tiny_moe: Path) -> None:
    pytest.importorskip("llamafactory.v1")
    peft_plugin = importlib.import_module("llamafactory.v1.plugins.model_plugins.peft")
    settings = kt_sft.KTConfig(lora_experts=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, quantization_config=settings)
    adapted = peft_plugin.get_lora_model(model, {"r": 2}, is_train=True)
    trained = {key for key, value in adapted.named_parameters() if value.requires_grad}
    assert "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.default.weight" in trained


def test_a_dense_model_is_refused(parse: Callable[..., Any]) -> None:
    from llamafactory.model import patcher
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=1, hidden_size=64, vocab_size=8))
    model_args = parse(**LORA_EXPERTS)[0]
    with pytest.raises((ConfigError, ValueError), match="Qwen3ForCausalLM has no routed experts in the engine"):
        patcher.patch_model(model, None, model_args, is_trainable=True, add_valuehead=False)

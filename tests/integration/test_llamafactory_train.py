"""`llamafactory-cli train` with a kt_sft block, as subprocesses: every stage, resume, and several processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run_command, train_losses
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.tiny import make_tokenizer

KT_SFT: dict[str, Any] = {"kt_sft": {}}
WITHOUT_PLUGIN = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@pytest.fixture(scope="session")
def trained(base_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of one uninterrupted run of the base recipe with kt_sft."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(base_recipe | KT_SFT | {"output_dir": str(folder / "out")}))
    result = run_command(["llamafactory-cli", "train", str(recipe)])
    assert result.returncode == 0, result.stdout
    return folder / "out", result.stdout


def test_training_learns_and_says_what_runs(trained: tuple[Path, str]) -> None:
    output, log = trained
    losses = train_losses(output)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert (output / "adapter_model.safetensors").exists()
    assert "routed experts on the CPU: 16 experts in 2 layers, bf16" in log
    assert "tier " in log
    assert "experts' activations are retained in up to" in log
    assert "step 4: " in log  # the line that sums the engine's work up
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert all(0 <= entry["kt_sft/hidden_share"] <= 1 for entry in history if "loss" in entry)


def test_resume_continues_as_if_uninterrupted(
    trained: tuple[Path, str], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    uninterrupted = train_losses(trained[0])
    checkpoint = trained[0] / "checkpoint-2"
    recipe = write_recipe(**KT_SFT, resume_from_checkpoint=str(checkpoint), overwrite_output_dir=None)

    result = run_command(["llamafactory-cli", "train", str(recipe)])

    assert result.returncode == 0, result.stdout
    assert train_losses(tmp_path / "out") == uninterrupted


def assert_as_stock(losses: list[float], stock: list[float]) -> None:
    """Two runs that differ only in where their experts round to BF16 (unit roundoff u = 2^-9).

    Step 1 has the same weights: each expert output, rounded at other places, is off by a few u, and a mean over tokens
    of such errors of either sign by less than one u of the loss (measured at most 6.2e-4 of it, 0.31 u). Then Adam
    turns the rounding of a gradient near zero into a whole step of the learning rate, so the rest is a measured bound:
    at most 5.5e-3 over the stages here, held to 8 u = 1.6e-2. What it must tell apart: with the weights of a token's
    two experts exchanged every stage breaks it (pt at step 1 by 1.1e-2, rm by 4.8e-2; dpo at step 3 by 9.6e-2 and kto
    by 4.5e-2, whose first loss is a constant).
    """
    unit = 2.0**-9
    assert losses[0] == pytest.approx(stock[0], rel=unit)
    assert losses == pytest.approx(stock, rel=8 * unit)


STAGES: dict[str, dict[str, Any]] = {
    "pt": {"stage": "pt", "dataset": "pt"},
    "dpo": {"stage": "dpo", "dataset": "pair", "pref_beta": 0.1},
    "dpo with a reference model": {"stage": "dpo", "dataset": "pair", "ref_model": "MODEL"},
    "kto": {"stage": "kto", "dataset": "kto", "pref_beta": 0.1},
    "rm": {"stage": "rm", "dataset": "pair"},
}


def stage_recipe(name: str, model: Path) -> dict[str, Any]:
    changes = {key: str(model) if value == "MODEL" else value for key, value in STAGES[name].items()}
    return changes | {"max_steps": 3, "save_steps": 3}


@pytest.fixture(scope="module")
def stock_stages(
    base_recipe: dict[str, Any], tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    """The losses of every stage as LLaMA-Factory trains it without kt_sft; one process for all, to save its start."""
    folders = {name: tmp_path_factory.mktemp("stock") for name in STAGES}
    recipes = [
        base_recipe | stage_recipe(name, tiny_moe) | {"output_dir": str(folder)} for name, folder in folders.items()
    ]
    script = (
        "import json, sys; from llamafactory.train.tuner import run_exp\n"
        "for recipe in json.loads(sys.argv[1]): run_exp(recipe)\n"
    )
    result = run_command(["python", "-c", script, json.dumps(recipes)], environment=WITHOUT_PLUGIN)
    assert result.returncode == 0, result.stdout
    return {name: train_losses(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", STAGES)
def test_other_stages(
    name: str,
    stock_stages: dict[str, list[float]],
    write_recipe: Callable[..., Path],
    tiny_moe: Path,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(**KT_SFT, **stage_recipe(name, tiny_moe))

    result = run_command(["llamafactory-cli", "train", str(recipe)])

    assert result.returncode == 0, result.stdout
    losses = train_losses(tmp_path / "out")
    assert_as_stock(losses, stock_stages[name])
    assert len(set(losses)) == 3, "the loss does not move: nothing is trained"
    assert "routed experts on the CPU" in result.stdout


# One rank of a run that torchrun starts; when it is trained, it writes down what pages of the experts it has.
RANK = """
import json, os, sys, yaml
import torch.distributed
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback
from kt_sft.engine.engine import get_engine
from tests.pages import shared_experts

class Pages(TrainerCallback):
    def on_train_end(self, *_, **__):
        torch.distributed.barrier()  # all have read theirs, and still have them
        facts = {"tier": get_engine().tier, "pages": shared_experts()}
        open(f"{sys.argv[2]}/rank{os.environ['RANK']}.json", "w").write(json.dumps(facts))
        torch.distributed.barrier()

run_exp(yaml.safe_load(open(sys.argv[1])), [Pages()])
"""


def test_two_processes_under_torchrun(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Losses are stock's, and the processes have one copy of the experts: the same pages, whole."""
    recipe = write_recipe(max_steps=2, ddp_backend="gloo")
    # LLaMA-Factory hands torchrun a free port where MASTER_PORT is not set.
    environment = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    stock = run_command(["llamafactory-cli", "train", str(recipe)], environment=environment)
    assert stock.returncode == 0, stock.stdout
    assert "routed experts on the CPU" not in stock.stdout
    stock_losses = train_losses(tmp_path / "out")

    recipe = write_recipe(**KT_SFT, max_steps=2, ddp_backend="gloo")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launch = ["torchrun", "--standalone", "--nproc_per_node", "2", str(script), str(recipe), str(tmp_path)]
    result = run_command(launch, environment={"PYTHONPATH": str(Path(__file__).parents[2])})

    assert result.returncode == 0, result.stdout
    assert "world size: 2" in result.stdout
    # Said once, not by every process.
    said = "routed experts on the CPU: 16 experts in 2 layers, bf16, 72.0 KiB resident once for all 2 processes"
    assert result.stdout.count(said) == result.stdout.count("routed experts on the CPU") == 1
    assert_as_stock(train_losses(tmp_path / "out"), stock_losses)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["tier"] == ranks[1]["tier"]
    assert len(ranks[0]["pages"]) == 2  # layers
    assert ranks[0]["pages"].keys() == ranks[1]["pages"].keys()
    for rank in ranks:
        rss, pss, private = (
            sum(fields[name] for fields in rank["pages"].values()) for name in ("Rss", "Pss", "Private_Dirty")
        )
        # Of a page that both have read, each has half; Pss is rounded down to KiB in each mapping.
        assert rss == 72
        assert rss / 2 - 2 <= pss <= rss / 2
        assert private == 0


def test_accelerate_launch(trained: tuple[Path, str], write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(**KT_SFT, max_steps=2)
    launch = ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "llamafactory.launcher", str(recipe)]

    result = run_command(launch)

    assert result.returncode == 0, result.stdout
    assert train_losses(tmp_path / "out") == train_losses(trained[0])[:2]


def test_recipe_with_the_key_is_refused_where_kt_sft_is_not_active(write_recipe: Callable[..., Path]) -> None:
    result = run_command(["llamafactory-cli", "train", str(write_recipe(**KT_SFT))], environment=WITHOUT_PLUGIN)

    assert result.returncode != 0
    assert "kt_sft" in result.stdout
    assert "are not used by the HfArgumentParser" in result.stdout


def test_recipe_without_the_key_trains_saves_and_resumes_as_without_kt_sft(
    base_recipe: dict[str, Any], tmp_path: Path
) -> None:
    script = (
        "import json, sys; from llamafactory.train.tuner import run_exp\n"
        "for recipe in json.loads(sys.argv[1]): run_exp(recipe)\n"
    )
    outputs = []
    for name, environment in (("installed", {}), ("without", WITHOUT_PLUGIN)):
        environment = environment | {"PYTHONHASHSEED": "0"}  # PEFT writes the modules' names in a set's order
        whole, resumed = base_recipe | {"output_dir": str(tmp_path / name / "whole")}, dict(base_recipe)
        resumed |= {"output_dir": str(tmp_path / name / "resumed"), "overwrite_output_dir": False}
        resumed |= {"resume_from_checkpoint": str(tmp_path / name / "whole" / "checkpoint-2")}
        result = run_command(["python", "-c", script, json.dumps([whole, resumed])], environment=environment)
        assert result.returncode == 0, result.stdout
        assert "routed experts on the CPU" not in result.stdout
        outputs.append(tmp_path / name)

    ours, stock = outputs
    for run in ("whole", "resumed"):
        assert train_losses(ours / run) == train_losses(stock / run)
    assert train_losses(ours / "resumed") == train_losses(ours / "whole")
    files = sorted(path.relative_to(stock) for path in stock.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(ours) for path in ours.rglob("*") if path.is_file())
    for file in files:
        if file.name in ("adapter_config.json", "adapter_model.safetensors"):  # other files hold times
            assert (ours / file).read_bytes() == (stock / file).read_bytes(), file


def test_a_damaged_checkpoint_stops_the_run_before_it_trains(
    write_recipe: Callable[..., Path], tiny_moe: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_moe, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    key = "model.layers.0.mlp.experts.6.down_proj.weight"
    tensors[key][3, 4] = float("inf")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})

    result = run_command(["llamafactory-cli", "train", str(write_recipe(**KT_SFT, model_name_or_path=str(model)))])

    assert result.returncode != 0
    assert f"{model / 'model.safetensors'}: tensor {key}" in result.stdout
    assert "row 3, column 4" in result.stdout
    assert "Running training" not in result.stdout
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_a_dense_model_trains_with_the_key_as_without(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "dense"
    make_dense(model)
    losses = []
    for block in ({}, None):
        recipe = write_recipe(model_name_or_path=str(model), kt_sft=block, max_steps=3)
        result = run_command(["llamafactory-cli", "train", str(recipe)])
        assert result.returncode == 0, result.stdout
        assert ("has no routed experts; kt_sft leaves it as it is" in result.stdout) == (block is not None)
        losses.append(train_losses(tmp_path / "out"))

    assert losses[0] == losses[1]


def make_dense(folder: Path) -> None:
    """Writes a tiny random dense model with the tokenizer of the tiny MoE model."""
    tokens = make_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=tokens,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)

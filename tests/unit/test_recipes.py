"""Every recipe is one that LLaMA-Factory and kt_sft accept, for the architecture and the sizes it speaks of.

The models are built on the meta device from the sizes their publishers give, so nothing is downloaded or allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import get_infer_args, get_train_args
from llamafactory.hparams.finetuning_args import FinetuningArguments
from llamafactory.model.model_utils.visual import patch_target_modules
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3_5MoeConfig,
    Qwen3MoeConfig,
)

from kt_sft.config import KTConfig
from tests.recipes import RECIPES, auto_class, read


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A published checkpoint's sizes and the template LLaMA-Factory registers for it."""

    hub_ids: tuple[str, ...]
    templates: tuple[str, ...]
    config: PreTrainedConfig


ARCHITECTURES = {
    "deepseek_v2_lite": Architecture(
        ("deepseek-ai/DeepSeek-V2-Lite-Chat",),
        ("deepseek",),
        DeepseekV2Config(
            vocab_size=102400,
            hidden_size=2048,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            num_attention_heads=16,
            num_key_value_heads=16,
            n_shared_experts=2,
            n_routed_experts=64,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
        ),
    ),
    # The defaults of DeepseekV3Config are DeepSeek-V3's own sizes; R1 shares them.
    "deepseek_r1": Architecture(("unsloth/DeepSeek-R1-BF16",), ("deepseekr1",), DeepseekV3Config()),
    "qwen3_30b_a3b": Architecture(
        ("Qwen/Qwen3-30B-A3B-Instruct-2507",),
        ("qwen3_nothink",),
        Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
        ),
    ),
    "qwen3_235b_a22b": Architecture(
        ("Qwen/Qwen3-235B-A22B-Instruct-2507",),
        ("qwen3_nothink",),
        Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
        ),
    ),
    # The defaults of Qwen3_5MoeConfig are Qwen3.5-35B-A3B's own sizes.
    "qwen3_5_35b_a3b": Architecture(("Qwen/Qwen3.5-35B-A3B",), ("qwen3_5",), Qwen3_5MoeConfig()),
    # The defaults of Glm4MoeConfig are GLM-4.5-Air's own sizes, but for the two given here.
    "glm4_5_air": Architecture(
        ("zai-org/GLM-4.5-Air",), ("glm4_moe",), Glm4MoeConfig(head_dim=128, attention_bias=True)
    ),
    "glm4_6": Architecture(
        ("zai-org/GLM-4.6",),
        ("glm4_moe",),
        Glm4MoeConfig(
            hidden_size=5120,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=92,
            num_attention_heads=96,
            num_key_value_heads=8,
            head_dim=128,
            n_routed_experts=160,
            first_k_dense_replace=3,
            use_qk_norm=True,
            attention_bias=True,
        ),
    ),
    # The defaults of MixtralConfig are Mixtral-8x7B's own sizes.
    "mixtral_8x7b": Architecture(("mistralai/Mixtral-8x7B-Instruct-v0.1",), ("mistral",), MixtralConfig()),
    "gpt_oss_20b": Architecture(
        ("unsloth/gpt-oss-20b-BF16",), ("gpt_oss",), GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    ),
}
#: Made on the spot by its own script, which its own tests cover.
LOCAL_MODEL_RECIPES = {"quickstart"}

ALL = sorted(RECIPES.glob("*.yaml"))
HUB = [path for path in ALL if path.stem not in LOCAL_MODEL_RECIPES]
TRAINED = [path for path in HUB if path.stem.endswith(("_sft", "_dpo"))]
INFERRED = [path for path in HUB if path not in TRAINED]

MEMORY_NOTE = re.compile(
    r"# Host memory: experts (\d+) layers x (\d+) experts x 3 x (\d+) x (\d+) weights x 2 bytes = ([\d.]+) GiB\.\n"
    r"# Accelerator memory: the rest, ([\d.]+) billion parameters x 2 bytes = ([\d.]+) GiB"
)


def architecture_name(path: Path) -> str:
    names = [name for name in ARCHITECTURES if path.stem.startswith(name)]
    assert len(names) == 1, f"{path.name} is named after none or several of {sorted(ARCHITECTURES)}"
    return names[0]


@functools.cache
def meta_model(name: str) -> nn.Module:
    config = ARCHITECTURES[name].config
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def by_stem(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def test_every_model_of_the_list_has_a_supervised_recipe() -> None:
    stems = {path.stem for path in ALL}
    assert {f"{name}_lora_sft" for name in ARCHITECTURES} <= stems
    assert {f"qwen3_30b_a3b_{use}" for use in ("lora_dpo", "chat", "api", "export")} <= stems


@by_stem(ALL)
def test_block_is_a_valid_configuration(path: Path) -> None:
    assert KTConfig.from_dict(read(path)["kt_sft"]).stored_format == "bf16"


@by_stem([path for path in ALL if path not in INFERRED])
def test_llamafactory_accepts_the_training_recipe(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    recipe = read(path)

    model_args, data_args, training_args, finetuning_args, _ = get_train_args(
        {**recipe, "output_dir": str(tmp_path), "use_cpu": True}
    )

    assert model_args.model_name_or_path == recipe["model_name_or_path"]
    assert data_args.template == recipe["template"]
    assert training_args.bf16
    assert finetuning_args.stage == recipe["stage"]
    assert finetuning_args.lora_target == recipe["lora_target"].split(",")


@by_stem(INFERRED)
def test_llamafactory_accepts_the_inference_recipe(path: Path, tmp_path: Path) -> None:
    recipe = read(path)
    # The recipe names the output of the one that trains; adapters are looked at before anything is loaded.
    assert recipe["adapter_name_or_path"] == read(RECIPES / "qwen3_30b_a3b_lora_sft.yaml")["output_dir"]
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    recipe["adapter_name_or_path"] = str(tmp_path)

    model_args, data_args, _, _ = get_infer_args(dict(recipe))

    assert model_args.adapter_name_or_path == [recipe["adapter_name_or_path"]]
    assert model_args.infer_backend == "huggingface"
    assert data_args.template == recipe["template"]


@by_stem(HUB)
def test_model_and_template_belong_together(path: Path) -> None:
    recipe, architecture = read(path), ARCHITECTURES[architecture_name(path)]
    assert recipe["model_name_or_path"] in architecture.hub_ids
    assert recipe["template"] in architecture.templates
    assert recipe["template"] in TEMPLATES


@by_stem(TRAINED)
def test_dataset_is_described(path: Path) -> None:
    recipe = read(path)
    described = yaml.safe_load((RECIPES.parent / recipe["dataset_dir"] / "dataset_info.json").read_text())
    assert described[recipe["dataset"]].get("ranking", False) == (recipe["stage"] == "dpo")


@by_stem(TRAINED)
def test_lora_targets_are_linear_layers_outside_the_routed_experts(path: Path) -> None:
    model = meta_model(architecture_name(path))
    recipe = read(path)
    targets = recipe["lora_target"].split(",")
    # The names LLaMA-Factory hands to PEFT, which for image-text models are full names without the vision tower's.
    names = patch_target_modules(model, FinetuningArguments(lora_target=recipe["lora_target"]), list(targets))

    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    wrapped = {name: layer for name, layer in tuned.named_modules() if isinstance(layer, LoraLayer)}
    tuned.unload()
    del model.peft_config  # left behind by unload(); the model is shared by the tests

    assert {name.rpartition(".")[2] for name in wrapped} == set(targets)
    assert {type(layer.base_layer) for layer in wrapped.values()} == {nn.Linear}
    assert not [name for name in wrapped if ".experts." in name or "visual" in name]


@by_stem([path for path in HUB if not path.stem.endswith("_export")])
def test_memory_note_states_the_architecture(path: Path) -> None:
    model = meta_model(architecture_name(path))
    note = MEMORY_NOTE.search(path.read_text())
    assert note, f"{path.name} states no memory in the common form"
    layers, experts, hidden, intermediate = (int(value) for value in note.groups()[:4])
    experts_gib, rest_billion, rest_gib = (float(value) for value in note.groups()[4:])

    # Matrices only: gpt-oss' expert biases are vectors and below the digit the notes show.
    expert_weights = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3)
    rest_weights = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name)

    assert layers * experts * 3 * hidden * intermediate == expert_weights
    assert experts_gib == round(expert_weights * 2 / 2**30, 1)
    assert rest_billion == round(rest_weights / 1e9, 2)
    assert rest_gib == round(rest_weights * 2 / 2**30, 1)

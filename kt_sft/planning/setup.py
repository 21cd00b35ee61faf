"""What of a recipe decides memory and time; read from its YAML, or from what LLaMA-Factory made of it.

The names are LLaMA-Factory's. A plan needs none of its checks, which also ask for data and for this machine's devices,
so a recipe for another machine can be read here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kt_sft.config import KTConfig

#: Defaults of LLaMA-Factory's and the Trainer's for keys that a recipe leaves out; a test compares them.
DEFAULTS: dict[str, Any] = {
    "stage": "sft",
    "finetuning_type": "lora",
    "cutoff_len": 2048,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "bf16": False,
    "fp16": False,
    "pure_bf16": False,
    "lora_rank": 8,
    "lora_target": "all",
    "lora_dropout": 0.0,
    "optim": "adamw_torch_fused",
    "disable_gradient_checkpointing": False,
    "use_reentrant_gc": True,
    "flash_attn": "auto",
    "upcast_layernorm": False,
    "upcast_lmhead_output": False,
    "freeze_vision_tower": True,
    "use_cpu": False,
    "trust_remote_code": False,
    "model_revision": "main",
    "create_new_adapter": False,
}

#: What changes memory in ways that are not worked out here: key -> what of it is left out.
UNMODELLED = {
    "additional_target": "modules that are trained whole (additional_target)",
    "deepspeed": "what DeepSpeed shards or offloads",
    "enable_liger_kernel": "what Liger kernels save",
    "predict_with_generate": "the caches of generation",
    "ref_model": "a reference model of its own: its dense part comes on top",
    "reward_model": "the reward model",
    "use_apollo": "APOLLO's projections",
    "use_badam": "BAdam's blocks",
    "use_galore": "GaLore's projections",
    "use_llama_pro": "expanded blocks",
    "use_unsloth_gc": "activations that use_unsloth_gc moves to host memory",
}

#: Sequences that an example makes, where it is not one.
_SEQUENCES = {"rm": 2, "dpo": 2, "kto": 2}


#: How messages name an adapter's rank.
_RANK = "r in the config of the adapter that training goes on with"


class RecipeError(ValueError):
    """A recipe cannot be read or planned; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """A training run, as far as memory and time go.

    Args:
        model: `model_name_or_path`.
        settings: The `kt_sft:` block.
        stage: pt, sft, rm, dpo, kto or ppo.
        cutoff: Tokens of a sequence, all of which are taken to be as long.
        batch: Sequences of a micro-batch on one device, both of a pair counted.
        accumulation: Micro-batches of a step.
        autocast: "bfloat16" or "float16" where the forward pass runs under autocast, else None.
        pure_bf16: Whether adapters are kept in BF16.
        rank: Of LoRA.
        targets: Names of modules, or ("all",).
        dropout: Of LoRA.
        optimizer: The Trainer's name of it.
        checkpointing: Whether layers are computed again in backward.
        reentrant: Whether torch's older way of doing so is taken.
        attention: LLaMA-Factory's `flash_attn`.
        packed: Whether sequences are filled up with others, so that there is no padding.
        upcast_layernorm: As LLaMA-Factory's.
        upcast_logits: `upcast_lmhead_output`.
        freezes_vision: Whether "all" leaves vision towers out.
        on_cpu: Whether an accelerator, if there is one, is left idle.
        trust_remote_code: Whether code of the model's folder may run.
        revision: Of the model on the hub.
        cache_dir: Where the hub's files are kept; None for its own place.
        unmodelled: What the recipe asks for that is not worked out, in words.
    """

    model: str
    settings: KTConfig
    stage: str
    cutoff: int
    batch: int
    accumulation: int
    autocast: str | None
    pure_bf16: bool
    rank: int
    targets: tuple[str, ...]
    dropout: float
    optimizer: str
    checkpointing: bool
    reentrant: bool
    attention: str
    packed: bool
    upcast_layernorm: bool = False
    upcast_logits: bool = False
    freezes_vision: bool = True
    on_cpu: bool = False
    trust_remote_code: bool = False
    revision: str = "main"
    cache_dir: str | None = None
    unmodelled: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.cutoff * self.batch


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A recipe's keys.

    Args:
        path: A YAML or JSON file.
        overrides: Keys to set, `kt_sft.x` for those in the block, as LLaMA-Factory's command line takes them.

    Raises:
        RecipeError: It cannot be read, or is no recipe for training with a `kt_sft:` block.
    """
    try:
        recipe = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} holds no keys; a recipe is a YAML file of LLaMA-Factory's settings")
    for key, value in (overrides or {}).items():
        block, _, name = key.partition(".")
        if name and not isinstance(recipe.setdefault(block, {}), dict):
            raise RecipeError(f"{path}: {block} is no block, so {key} cannot be set in it")
        (recipe[block] if name else recipe)[name or block] = value
    if "kt_sft" not in recipe:
        raise RecipeError(f"{path} has no kt_sft block; add one (`kt_sft: {{}}` for the defaults), or see its docs")
    if not recipe.get("model_name_or_path"):
        raise RecipeError(f"{path} names no model_name_or_path")
    return recipe


def setup_of(recipe: Mapping[str, Any], adapter: Mapping[str, Any] | None = None) -> TrainingSetup:
    """The setup that a recipe, or the parsed arguments as one mapping, describes.

    Args:
        recipe: Its keys.
        adapter: The config of the adapter that training goes on with, as PEFT stores it: it, not the recipe, says then
            what is trained.

    Raises:
        RecipeError: A number is none, or the recipe or the adapter does not train LoRA.
        ConfigError: The `kt_sft:` block is not possible.
    """
    keys = DEFAULTS | {key: value for key, value in recipe.items() if value is not None}
    if keys["finetuning_type"] != "lora":
        raise RecipeError(f"finetuning_type {keys['finetuning_type']} cannot be planned: kt_sft trains LoRA only")
    if adapter is not None:
        keys |= _trained(adapter, keys["lora_target"])
    settings = KTConfig.from_dict(keys["kt_sft"])
    if adapter is not None:
        settings = dataclasses.replace(settings, lora_experts=bool(adapter.get("target_parameters")))
    stage = str(keys["stage"])
    autocast = "bfloat16" if keys["bf16"] else "float16" if keys["fp16"] else None
    optimizer = keys["optim"]
    unmodelled = [what for key, what in UNMODELLED.items() if keys.get(key)]
    unmodelled += _unmodelled_adapters(keys, adapter)
    if stage not in ("pt", "sft"):
        unmodelled.append(f"the loss of stage {stage}, and passes that it makes besides")
    return TrainingSetup(
        model=str(keys["model_name_or_path"]),
        settings=settings,
        stage=stage,
        cutoff=_count(keys, "cutoff_len"),
        batch=_count(keys, "per_device_train_batch_size") * sequences_of(stage),
        accumulation=_count(keys, "gradient_accumulation_steps"),
        autocast=autocast,
        pure_bf16=bool(keys["pure_bf16"]),
        rank=_count(keys, "lora_rank"),
        targets=_names(keys["lora_target"]),
        dropout=float(keys["lora_dropout"]),
        optimizer=_optimizer(keys, str(getattr(optimizer, "value", optimizer))),
        checkpointing=not keys["disable_gradient_checkpointing"],
        reentrant=bool(keys["use_reentrant_gc"]),
        attention=str(getattr(keys["flash_attn"], "value", keys["flash_attn"])),
        packed=bool(keys.get("packing") or keys.get("neat_packing") or stage == "pt"),
        upcast_layernorm=bool(keys["upcast_layernorm"]),
        upcast_logits=bool(keys["upcast_lmhead_output"]),
        freezes_vision=bool(keys["freeze_vision_tower"]),
        on_cpu=bool(keys["use_cpu"]),
        trust_remote_code=bool(keys["trust_remote_code"]),
        revision=str(keys["model_revision"]),
        cache_dir=None if keys.get("cache_dir") is None else str(keys["cache_dir"]),
        unmodelled=tuple(unmodelled),
    )


def _trained(adapter: Mapping[str, Any], lora_target: Any) -> dict[str, Any]:
    """What an adapter's config says in place of the recipe's keys."""
    kind = adapter.get("peft_type", "LORA")
    if kind != "LORA":
        raise RecipeError(f"the adapter that training goes on with is of the kind {kind}: kt_sft trains LoRA only")
    targets = adapter.get("target_modules") or []
    return {
        "lora_rank": _count({_RANK: adapter.get("r")}, _RANK),
        "lora_target": lora_target if isinstance(targets, str) else targets,
        "lora_dropout": adapter.get("lora_dropout") or 0.0,
        "freeze_vision_tower": False,  # the names say what is trained
    }


def _unmodelled_adapters(keys: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> list[str]:
    names = _names(keys.get("adapter_name_or_path") or [])
    found = []
    if len(names) > 1 or (names and keys["create_new_adapter"]):
        found.append("merging of adapters before training")
    if adapter is None:
        return found
    if isinstance(adapter.get("target_modules"), str):
        found.append("the pattern by which the trained adapter names its modules (lora_target is taken)")
    if adapter.get("rank_pattern"):
        found.append(f"ranks of single modules of the trained adapter (all have rank {adapter['r']} here)")
    if adapter.get("modules_to_save"):
        found.append("modules that the adapter trains whole (modules_to_save)")
    return found


def sequences_of(stage: str) -> int:
    """Sequences that one example of a stage's data makes."""
    return _SEQUENCES.get(stage, 1)


def _count(keys: Mapping[str, Any], name: str) -> int:
    value = keys[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _names(targets: Any) -> tuple[str, ...]:
    names = targets.split(",") if isinstance(targets, str) else targets
    return tuple(str(name).strip() for name in names)


def _optimizer(keys: Mapping[str, Any], name: str) -> str:
    """LLaMA-Factory's own optimizers have switches of their own."""
    own = next((key for key in ("use_muon", "use_adam_mini") if keys.get(key)), None)
    return name if own is None else own

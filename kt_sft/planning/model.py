"""A model without its weights: built on the meta device from config.json, and what the checkpoint's headers say of it.

The very functions that load a model find its experts and their tensors, so every source that they know can be planned,
and what they refuse is refused here as well.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from kt_sft.loading.checkpoint import Checkpoint, checkpoint_files
from kt_sft.loading.hub import model_folder
from kt_sft.loading.layout import ExpertLayout, find_experts
from kt_sft.loading.mapped import bytes_beside_files, obstacle
from kt_sft.loading.mapping import MatrixRead, ModulePlan, plan_experts
from kt_sft.loading.memory import experts_bytes
from kt_sft.loading.ready.reading import ReadyStore, dense_quantization, is_store
from kt_sft.loading.sources.dense import plan_dense
from kt_sft.loading.sources.entries import QuantisedEntry, keeps, resolve_storage
from kt_sft.loading.sources.methods import check_config, check_method, fold_tensors
from kt_sft.planning.setup import RecipeError, TrainingSetup

#: Model types that transformers has under another name, whose sizes and tensors are the same.
_SAME_AS = {"kimi_k2": "deepseek_v3"}
#: Characters of a reason that transformers gives; some name every class that there is.
_REASON = 300
#: LLaMA-Factory's `flash_attn` -> transformers' name. Kernels that keep no scores need the same memory.
ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "sdpa", "fa3": "sdpa"}
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector)\.")


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a model holds.

    Args:
        model: On the meta device, with its experts.
        layouts: Of its modules of routed experts, by name.
        storages: How each is stored, as LayerStore's arguments.
        slots: Experts per token.
        staged_bytes: Of host memory for each matrix that is being loaded, where its source is quantised.
        obstacle: Why the experts cannot stay in the checkpoint's files; None if they can.
        bytes_beside_files: What they take of host memory if they do: scales that cannot be mapped as well.
        notes: What was taken for something else.
    """

    model: PreTrainedModel
    layouts: Mapping[str, ExpertLayout]
    storages: Mapping[str, Mapping[str, Any]]
    slots: int
    staged_bytes: int = 0
    obstacle: str | None = None
    bytes_beside_files: int = 0
    notes: tuple[str, ...] = ()

    @property
    def experts_bytes(self) -> int:
        """Of all routed experts as they are stored, scales included."""
        return sum(experts_bytes(layout, self.storages[name]) for name, layout in self.layouts.items())

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats in which they are stored."""
        return tuple(sorted({storage["expert_format"] for storage in self.storages.values()}))

    @property
    def dense_bytes(self) -> int:
        """Of everything else: parameters in the dtype they are loaded in, and buffers; what is tied counts once."""
        experts = {
            id(value) for name in self.layouts for value in self.model.get_submodule(name).parameters(recurse=True)
        }
        tensors = {id(value): value.nbytes for value in (*self.model.parameters(), *self.model.buffers())}
        return sum(size for key, size in tensors.items() if key not in experts)

    @property
    def stack(self) -> str:
        """The name of the list of layers that holds the experts."""
        return next(iter(self.layouts)).partition(".layers.")[0] + ".layers"


def read_model(setup: TrainingSetup) -> ModelFacts:
    """The model of a recipe whose checkpoint is on this machine, in a folder or the hub's cache.

    Raises:
        RecipeError: It has no routed experts.
        ConfigError: There is no such checkpoint; and, as CheckpointError and UnsupportedModelError, where loading it
            would.
    """
    folder = model_folder(setup.model, revision=setup.revision, cache_dir=setup.cache_dir)
    config, notes = _config(folder, setup)
    check_config(config)
    source, stored = getattr(config, "quantization_config", None), False
    if source is not None:
        source = dict(source if isinstance(source, Mapping) else source.to_dict())
        stored, source = is_store(source), dense_quantization(source)
        if source is not None:
            check_method(source)
        del config.quantization_config
    checkpoint = Checkpoint(checkpoint_files(folder))
    ready = ReadyStore(checkpoint, source) if stored else None
    if source is not None:
        checkpoint.tensors = fold_tensors(checkpoint.tensors, source)
    model = _build(config, setup, _dtype(config, checkpoint), folder)
    layouts = find_experts(model)
    if not layouts:
        raise RecipeError(
            f"{setup.model}: {type(model).__name__} has no routed experts; kt_sft leaves such models as they are"
        )
    conversions = get_model_conversion_mapping(model, None, None)
    planned = ready.plan if ready is not None else plan_experts
    plans = planned(model, layouts, checkpoint, conversions)
    plan_dense(model, checkpoint.tensors, plans, conversions)  # raises where loading would
    storages = {plan.name: resolve_storage(plan, setup.settings) for plan in plans}
    return facts_of(model, plans, storages, setup, notes)


def facts_of(
    model: PreTrainedModel,
    plans: Sequence[ModulePlan],
    storages: Mapping[str, Mapping[str, Any]],
    setup: TrainingSetup,
    notes: Sequence[str] = (),
) -> ModelFacts:
    """The facts of a model that is about to be loaded: on the meta device, with its experts still in it."""
    return ModelFacts(
        model,
        {plan.name: plan.layout for plan in plans},
        storages,
        _slots(model.config),
        max((_staged_bytes(read, storages[plan.name]) for plan in plans for read in plan.reads), default=0),
        obstacle(plans, storages),
        bytes_beside_files(plans, storages),
        tuple(notes),
    )


def _staged_bytes(read: MatrixRead, storage: Mapping[str, Any]) -> int:
    """What reading one matrix takes beside its place: nothing where rows or codes are read into it."""
    entry, weights = read.view.entry, read.view.rows * read.view.cols
    if not isinstance(entry, QuantisedEntry):
        return 0
    if keeps(entry, storage):  # codes that are turned are unpacked to bytes, and packed again
        return 3 * weights if entry.turns else 0
    return 12 * weights  # codes, their values and their scales in FP32


def text_config(config: Any) -> Any:
    """The part of a config that is about the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _slots(config: Any) -> int:
    text = text_config(config)
    names = ("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts")
    for found in (text, config):
        for name in names:
            if isinstance(value := getattr(found, name, None), int) and value > 0:
                return value
    raise RecipeError(f"the config does not say how many experts a token has; looked for {', '.join(names)}")


def _config(folder: Path, setup: TrainingSetup) -> tuple[PreTrainedConfig, list[str]]:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder / 'config.json'} cannot be read as JSON: {error}") from error
    kind = found.get("model_type") if isinstance(found, dict) else None
    try:
        if kind not in _SAME_AS:
            code = {"trust_remote_code": setup.trust_remote_code, "cache_dir": setup.cache_dir}
            return AutoConfig.from_pretrained(folder, **code), []
        keys = {key: value for key, value in found.items() if key not in ("model_type", "auto_map")}
        config = AutoConfig.for_model(_SAME_AS[kind], **keys)
    except Exception as error:  # a config's own code may raise anything
        raise _no_model(folder, error) from error
    other = _SAME_AS[kind]
    return config, [
        f"model_type {kind} is planned as {other}, whose layers are the same; transformers has no class of its own"
    ]


def _dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """As from_pretrained(dtype="auto"): the config's, else the first floating tensor's; never one of codes."""
    dtype = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if dtype is None:
        names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        dtype = next((names[e.dtype_name] for e in checkpoint.tensors.values() if e.dtype_name in names), torch.float32)
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _build(config: PreTrainedConfig, setup: TrainingSetup, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    classes = (
        AutoModelForImageTextToText
        if type(config) in AutoModelForImageTextToText._model_mapping
        else AutoModelForCausalLM
    )
    asked, failure = ATTENTION.get(setup.attention), None
    for attention in ({"attn_implementation": asked} if asked else {}, {"attn_implementation": "eager"}):
        try:
            with torch.device("meta"):
                return classes.from_config(config, dtype=dtype, trust_remote_code=setup.trust_remote_code, **attention)
        except Exception as error:  # a model's own code may raise anything
            failure = error
    raise _no_model(folder, failure) from failure


def _no_model(folder: Path, failure: Exception | None) -> RecipeError:
    """The error of a config of which transformers, or a model's own code, makes no model."""
    reason = textwrap.shorten(str(failure), _REASON) or repr(failure)
    return RecipeError(
        f"{folder / 'config.json'}: transformers makes no language model of it: {reason.rstrip('.')}; a plan needs a "
        "model, with or without images, of a class that transformers has, or with trust_remote_code: true the folder, "
        "so take such a model, or put the config right"
    )


def targets_of(model: nn.Module, setup: TrainingSetup, experts: Sequence[str]) -> dict[str, Any]:
    """The linear modules that get adapters, by name; as LLaMA-Factory chooses them, "all" without the output layer.

    Other targets are names or the ends of names, as PEFT takes them.
    """
    found = {}
    for name, module in model.named_modules():
        if "Linear" not in type(module).__name__ or any(name.startswith(f"{e}.") for e in experts):
            continue
        if setup.freezes_vision and _VISION.search(name):
            continue
        named = any(f".{name}".endswith(f".{target}") for target in setup.targets)
        if ("lm_head" not in name) if setup.targets == ("all",) else named:
            found[name] = module
    return found

"""Adapter directories with LoRA on routed experts: read, written, and converted between the layouts that tools read.

kt_sft and PEFT save experts' LoRA in PEFT's `target_parameters` layout; vLLM and SGLang load one pair of matrices per
expert (kt_sft.integrations.adapter_layouts describes both). What is not of routed experts, as LoRA on attention, is
carried through unchanged.

PEFT 0.19 exchanged the sides of A and B in its layout. How a file is read:

1. Where both parameters of gated experts have LoRA, the sizes of the tensors say it, and nothing else can.
2. Else, if the base model's hidden size is known (its config.json is at hand) and is one of the two sizes, it says it.
3. Else `peft_version` in adapter_config.json says it: A stands on the input side from 0.19 on, and on the output side
   before (PEFT writes no version before 0.18).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kt_sft.integrations.adapter_layouts import (
    DEFAULT_NAMES,
    PARAMETERS,
    AdapterFileError,
    Experts,
    fuse,
    is_of_experts,
    layout_of,
    plain_name,
    read_fused,
    read_listed,
    write_fused,
    write_listed,
)
from kt_sft.integrations.base_facts import BaseFacts, base_facts
from kt_sft.loading.checkpoint import read_header
from kt_sft.loading.durable import publish
from kt_sft.loading.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"

#: What the Trainer keeps beside an adapter to go on training it.
_TRAINING_STATE = re.compile(r".*\.(bin|pt|pth)|trainer_state\.json")


@dataclass(frozen=True)
class ExpertAdapter:
    """An adapter with LoRA on routed experts."""

    config: dict[str, Any]  # adapter_config.json
    experts: Experts
    others: dict[str, Tensor]  # every other tensor, by key
    layout: str  # "peft" or "per-expert"
    input_side: bool  # in PEFT's layout: whether A stands on the input side
    base: BaseFacts | None  # of the base model, where known

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(rank)."""
        return bool(self.config.get("use_rslora"))

    def scale(self, alpha: float, rank: int) -> float:
        """By which B A is multiplied."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter(folder: Path, base: Path | None = None) -> ExpertAdapter:
    """Reads an adapter directory in either layout.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors.
        base: A folder with the base model's config.json. Without it, the one that adapter_config.json names, where that
            is a local folder.

    Raises:
        AdapterFileError: It is no adapter directory, has no LoRA on routed experts, or a tensor is missing or does not
            fit the config, the other tensors or the base model.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    facts = base_facts(base, config.get("base_model_name_or_path"))
    of_experts = {key: tensor for key, tensor in tensors.items() if is_of_experts(key)}
    others = {key: tensor for key, tensor in tensors.items() if key not in of_experts}
    rank_of = _ranks(config)
    try:
        _check_ranks(others, rank_of)
        if layout_of(list(of_experts)) == "listed":
            experts, layout, input_side = read_listed(of_experts, rank_of), "per-expert", True
        else:
            targeted = {str(name).rpartition(".")[2] for name in config.get("target_parameters") or []}
            side_of = _side(config, facts)
            experts, input_side = read_fused(of_experts, rank_of, targeted, side_of)
            layout = "peft"
        _check_base(experts, facts)
    except AdapterFileError as error:
        raise AdapterFileError(f"{folder}: {error}") from error
    return ExpertAdapter(config, experts, others, layout, input_side, facts)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterFileError(f"{folder} is no adapter directory: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterFileError(f"{path} describes no LoRA adapter; only LoRA can be converted")
    if config.get("use_dora"):
        raise AdapterFileError(f"{path}: DoRA on routed experts is unknown to PEFT and to kt_sft; convert plain LoRA")
    check_numbers(config, str(path))
    return config


def check_numbers(config: Mapping[str, Any], path: str) -> None:
    """Checks ranks, alphas and target parameters of a LoRA adapter's config, which PEFT takes for whatever they are.

    Args:
        config: As adapter_config.json has it.
        path: What it is called in errors.

    Raises:
        AdapterFileError: One is not what it must be.
    """
    rank: Any = config.get("r")
    alpha = config.get("lora_alpha")
    if not _is_number(rank, int) or rank < 1 or not _is_number(alpha, (int, float)):
        raise AdapterFileError(f"{path} has no usable rank and alpha: r is {rank!r}, lora_alpha is {alpha!r}")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = config.get(name)
        patterns = {} if patterns is None else patterns
        if not isinstance(patterns, dict):
            raise AdapterFileError(f"{path}: {name} is {patterns!r}, not an object of names and numbers")
        for pattern, value in patterns.items():
            if not _is_number(value, kind) or (kind is int and value < 1):
                raise AdapterFileError(f"{path}: {name} gives {pattern} {value!r}, which is no rank or alpha")
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdapterFileError(f"{path}: {name} names {pattern!r}, no regular expression ({error})") from error
    targets = config.get("target_parameters")
    if targets is not None and not isinstance(targets, list):
        raise AdapterFileError(f"{path}: target_parameters is {targets!r}, not a list of names")


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return (
        isinstance(value, int | float)
        and isinstance(value, kind)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file() and (folder / _PICKLED).is_file():
        raise AdapterFileError(
            f"{folder / _PICKLED} is a pickle, which can run code when it is read; load the adapter with PEFT, if you "
            f"trust it, and save it again, as {WEIGHTS}"
        )
    if not path.is_file():
        raise AdapterFileError(f"{folder} is no adapter directory: it has no {WEIGHTS}")
    try:
        read_header(path)  # names the tensor that a damaged header gets wrong
        return load_file(path)
    except (CheckpointError, SafetensorError, OSError) as error:
        raise AdapterFileError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _ranks(config: dict[str, Any]) -> Callable[[str], tuple[int, float]]:
    ranks: dict[str, int] = config.get("rank_pattern") or {}
    alphas: dict[str, float] = config.get("alpha_pattern") or {}

    def rank_of(name: str) -> tuple[int, float]:
        rank = ranks.get(get_pattern_key([*ranks], name), config["r"])
        return rank, alphas.get(get_pattern_key([*alphas], name), config["lora_alpha"])

    return rank_of


def _check_ranks(others: dict[str, Tensor], rank_of: Callable[[str], tuple[int, float]]) -> None:
    for key, tensor in others.items():
        rank, _ = rank_of(plain_name(key))
        if key.endswith(".lora_A.weight") and tensor.shape[0] != rank:
            raise AdapterFileError(f"tensor {key} has rank {tensor.shape[0]}, adapter_config.json says {rank}")


def _side(config: dict[str, Any], facts: BaseFacts | None) -> Callable[[int, int], bool]:
    def side_of(first: int, second: int) -> bool:
        if facts is not None and facts.transposed:
            return True
        hidden = facts.hidden_size if facts is not None else None
        if hidden in (first, second) and first != second:
            return first == hidden
        return _is_new(config.get("peft_version"))

    return side_of


def _is_new(peft_version: Any) -> bool:
    """Whether this version of PEFT, None for one that wrote none, puts A on the input side."""
    if peft_version is None:
        return False
    match = re.match(r"(\d+)\.(\d+)", str(peft_version))
    if match is None:
        raise AdapterFileError(f"PEFT version {peft_version!r} is not one as 0.18.1")
    return (int(match[1]), int(match[2])) >= (0, 19)


def _check_base(experts: Experts, facts: BaseFacts | None) -> None:
    if facts is None or facts.num_experts is None:
        return
    for module, matrices in experts.items():
        count = next(iter(matrices.values())).num_experts
        if count != facts.num_experts:
            raise AdapterFileError(
                f"{module} has LoRA for {count} experts, {facts.path} has {facts.num_experts}: the adapter is for "
                "another base model, or its rank is not the one in adapter_config.json"
            )


def convert(source: Path, target: Path, to: str, *, base: Path | None = None, peft_version: str | None = None) -> str:
    """Writes the adapter in `source` to the new folder `target` in another layout; nothing is rounded.

    Args:
        source: An adapter directory.
        target: A folder that does not exist yet. It appears complete or not at all.
        to: "per-expert" or "peft".
        base: A folder with the base model's config.json, see `read_adapter`.
        peft_version: Of the PEFT that shall read layout "peft"; None for the installed one.

    Returns:
        What was written, in one sentence.

    Raises:
        AdapterFileError: `source` cannot be read or converted, or `target` is there already.
    """
    if target.exists() or target.is_symlink():
        raise AdapterFileError(f"{target} is there already; name a new folder")
    adapter = read_adapter(source, base)
    if to == "per-expert":
        config, tensors = _to_per_expert(adapter, source)
    elif to == "peft":
        config, tensors = _to_peft(adapter, source, peft_version or peft.__version__)
    else:
        raise AdapterFileError(f"unknown layout {to!r}; use per-expert or peft")
    _write(target, config, adapter.others | tensors, source)
    counts = {factors.num_experts for matrices in adapter.experts.values() for factors in matrices.values()}
    return (
        f"{target}: LoRA on {len(adapter.experts)} layers of {'/'.join(map(str, sorted(counts)))} experts in layout "
        f"{to}, and {len(adapter.others)} other tensors as they were"
    )


def _to_per_expert(adapter: ExpertAdapter, source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if adapter.layout == "per-expert":
        raise AdapterFileError(f"{source} is in the layout per-expert already")
    _refuse_transposed(adapter, source)
    config, names = adapter.config, adapter.base.matrix_names if adapter.base else DEFAULT_NAMES
    usual = adapter.scale(config["lora_alpha"], config["r"])
    for module, matrices in adapter.experts.items():
        for matrix, factors in matrices.items():
            scale = adapter.scale(factors.alpha, factors.rank)
            if scale != usual:
                raise AdapterFileError(
                    f"{source}: alpha_pattern or rank_pattern scale {PARAMETERS[matrix]} of {module} by {scale:g}, the "
                    f"rest by {usual:g}; what loads the layout per-expert knows one scale"
                )
    experts = {_renamed(module, adapter.base, back=True): matrices for module, matrices in adapter.experts.items()}
    tensors = write_listed(experts, names)
    matrices_of = {matrix: ("gate", "up") if matrix == "gate_up" else (matrix,) for matrix in PARAMETERS}
    ranked = {
        rf"{re.escape(plain_name(module))}\.\d+\.{names[part]}": (factors.rank, factors.alpha)
        for module, matrices in experts.items()
        for matrix, factors in matrices.items()
        for part in matrices_of[matrix]
    }
    used = {key.split(".")[-3] for key in tensors}
    dense = {key.split(".")[-3] for key in adapter.others if ".lora_" in key}
    targets = config.get("target_modules")
    targets = {*targets} if isinstance(targets, list) else dense
    written = config | {"target_modules": sorted(targets | used), "target_parameters": None}
    return _with_patterns(written, adapter, ranked), tensors


def _to_peft(adapter: ExpertAdapter, source: Path, version: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    input_side = _is_new(version)
    if adapter.layout == "peft":
        _refuse_transposed(adapter, source)
        if adapter.input_side == input_side:
            raise AdapterFileError(f"{source} is in the layout of PEFT {version} already")
    experts = {
        _renamed(module, adapter.base, back=False): fuse(module, matrices, rslora=adapter.rslora)
        for module, matrices in adapter.experts.items()
    }
    config = adapter.config
    ranked = {
        re.escape(plain_name(f"{module}.{PARAMETERS[matrix]}")): (factors.rank, factors.alpha)
        for module, matrices in experts.items()
        for matrix, factors in matrices.items()
    }
    parameters = {
        f"{'.'.join(module.split('.')[-2:])}.{PARAMETERS[matrix]}": None
        for module, matrices in experts.items()
        for matrix in matrices
    }
    targets = config.get("target_modules")
    if isinstance(targets, list) and adapter.layout == "per-expert":
        dense = {key.split(".")[-3] for key in adapter.others if ".lora_" in key}
        of_experts = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
        targets = [name for name in targets if name not in of_experts or name in dense]
    written = config | {
        "target_modules": targets,
        "target_parameters": config.get("target_parameters") or list(parameters),
        "lora_dropout": 0.0,  # PEFT loads no config with dropout on parameters, which plays no role in inference
        "peft_version": version,
    }
    return _with_patterns(written, adapter, ranked), write_fused(experts, input_side=input_side)


def _refuse_transposed(adapter: ExpertAdapter, source: Path) -> None:
    """Experts stored [in, out]: with A on the input side before PEFT 0.19, or by what the base model is."""
    proven = adapter.input_side and not _is_new(adapter.config.get("peft_version"))
    if proven or (adapter.base is not None and adapter.base.transposed):
        raise AdapterFileError(
            f"{source} is for a model that stores its experts as [in, out] (as gpt-oss): every PEFT and vLLM read its "
            "layout as it is, and there is no other"
        )


def _renamed(module: str, base: BaseFacts | None, *, back: bool) -> str:
    """A module of experts by transformers' name, or (`back`) by the name in the base model's checkpoint."""
    for checkpoint, model in base.renamings if base else ():
        module = module.replace(model, checkpoint) if back else module.replace(checkpoint, model)
    return module


def _with_patterns(
    config: dict[str, Any], adapter: ExpertAdapter, ranked: dict[str, tuple[int, float]]
) -> dict[str, Any]:
    """`config` with the patterns that give experts' tensors their ranks and alphas under their new names.

    `ranked` maps patterns to (rank, alpha). What the config's own patterns say of other tensors stays.
    """
    dense = [plain_name(key) for key in adapter.others if key.endswith(".lora_A.weight")]

    def kept(patterns: dict[str, Any]) -> dict[str, Any]:
        used = {get_pattern_key([*patterns], name) for name in dense}
        return {key: value for key, value in patterns.items() if key in used}

    default = (config["r"], config["lora_alpha"])
    other = {pattern: pair for pattern, pair in ranked.items() if pair != default}
    # In front: PEFT takes the first pattern that matches.
    ranks = {pattern: rank for pattern, (rank, _) in other.items()} | kept(config.get("rank_pattern") or {})
    alphas = {pattern: alpha for pattern, (_, alpha) in other.items()} | kept(config.get("alpha_pattern") or {})
    return config | {"rank_pattern": ranks, "alpha_pattern": alphas}


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write to that gets the name `target` at the end, or vanishes if anything fails."""
    partial = target.absolute().with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        publish(partial, target)
    except OSError as error:
        raise AdapterFileError(f"{target} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(target: Path, config: dict[str, Any], tensors: dict[str, Tensor], source: Path) -> None:
    with _appearing(target) as folder:
        for file in sorted(source.iterdir()):  # tokenizer, templates, model card, what kt_sft keeps
            if file.is_file() and file.name not in (CONFIG, WEIGHTS) and not _TRAINING_STATE.fullmatch(file.name):
                shutil.copy2(file, folder / file.name)
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise AdapterFileError(f"{target / WEIGHTS} cannot be written ({error})") from error
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

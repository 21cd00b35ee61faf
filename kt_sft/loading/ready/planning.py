"""What a ready store of a checkpoint will hold, tensor by tensor, from headers alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

import kt_sft
from kt_sft.config import ConfigError, KTConfig
from kt_sft.engine.geometry import default_group
from kt_sft.engine.stored import part_bytes, stored_parts
from kt_sft.loading.checkpoint import Checkpoint, TensorEntry, checkpoint_files
from kt_sft.loading.layout import find_experts
from kt_sft.loading.mapping import ModulePlan, plan_experts
from kt_sft.loading.ready.manifest import METHOD, VERSION, StoredExperts, scale_dtype_name
from kt_sft.loading.ready.names import NOTE, bias_key, note_key, part_key
from kt_sft.loading.sources.entries import resolve_storage
from kt_sft.loading.sources.methods import check_method, fold_tensors

#: Of a file of tensors that are copied; one module of experts is a file, whatever its size.
_MOST_FILE_BYTES = 4 << 30
_ALIGNMENT = 64
#: Of other files those that a model, a tokenizer or a processor may read.
_COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".md")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_FOLDERS = ("additional_chat_templates",)
_WRITTEN_ANEW = ("config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the store: copied from `source`, filled with `text`, or a part of all experts' matrices."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: TensorEntry | None = None
    text: str | None = None


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file of the store; `plan` is of the experts that it holds, if it does."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    plan: ModulePlan | None
    store_id: str

    @property
    def header(self) -> bytes:
        """All before the first tensor."""
        offset, entries = 0, {}
        for tensor in self.tensors:
            places = [offset, offset := offset + tensor.nbytes]
            entries[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": places}
        metadata = {"__metadata__": {"format": "pt", METHOD: self.store_id}}
        text = json.dumps(metadata | entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def offsets(self) -> dict[str, int]:
        """Where each tensor begins in the file."""
        offset, found = len(self.header), {}
        for tensor in self.tensors:
            found[tensor.key] = offset
            offset += tensor.nbytes
        return found

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        """What is read to write it."""
        stored = self.plan.stored().values() if self.plan is not None else ()
        copied = [tensor.source for tensor in self.tensors if tensor.source is not None]
        return sum({entry.key: entry.nbytes for entry in (*stored, *copied)}.values())


@dataclass(frozen=True)
class StorePlan:
    """Everything that `kt-sft quantize` is going to write."""

    source: Path
    quantization: dict[str, Any] | None
    source_sha256: str
    settings: dict[str, Any]
    config: KTConfig
    store_id: str
    experts: dict[str, StoredExperts]
    files: tuple[PlannedFile, ...]
    others: tuple[str, ...]
    identity: tuple[tuple[str, int, int], ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Of all files with weights."""
        return sum(file.nbytes for file in self.files)

    @property
    def source_bytes(self) -> int:
        """What is read."""
        return sum(file.source_bytes for file in self.files)


def plan_store(source: Path, config: KTConfig, calibration: dict[str, Any] | None = None) -> StorePlan:
    """Plans a store of the checkpoint in `source`, with its experts as `config` wants them stored.

    Args:
        source: A folder with config.json and safetensors files.
        config: expert_format, group_size and zero_point.
        calibration: What tells its data from other data; None for none.

    Raises:
        ConfigError: No folder of a model with routed experts, or one that cannot be read.
        CheckpointError: Its files are damaged or incomplete.
        UnsupportedModelError: Its experts cannot run on the engine.
    """
    settings = read_settings(source)
    quantization = settings.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ConfigError(f"kt_sft: {source / 'config.json'}: quantization_config is no JSON object")
    if quantization is not None and quantization.get("quant_method") == METHOD:
        raise ConfigError(
            f"kt_sft: {source} is a ready store already; make another one from the checkpoint that it was made from"
        )
    if quantization is not None:
        check_method(quantization)
    model = model_of(source)
    layouts = find_experts(model)
    if not layouts:
        raise ConfigError(f"kt_sft: {type(model).__name__} in {source} has no routed experts to quantise")
    checkpoint = Checkpoint(checkpoint_files(source), source)
    plain = dict(checkpoint.tensors)
    if quantization is not None:
        checkpoint.tensors = fold_tensors(checkpoint.tensors, quantization)
    plans = plan_experts(model, layouts, checkpoint, get_model_conversion_mapping(model, None, None))
    experts = {plan.name: _stored_experts(plan, resolve_storage(plan, config)) for plan in plans}
    source_sha256 = _hash_of_source(source, checkpoint.files)
    wanted: dict[str, Any] = {
        "expert_format": config.expert_format,
        "group_size": config.group_size,
        "zero_point": config.zero_point,
        "calibration": calibration,
    }
    name = [VERSION, kt_sft.__version__, source.resolve().name, source_sha256, wanted]
    store_id = hashlib.sha256(json.dumps(name, sort_keys=True).encode()).hexdigest()
    files = _files(plain, plans, experts, store_id)
    others = _others(source)
    return StorePlan(
        source, quantization, source_sha256, wanted, config, store_id, experts, files, others, checkpoint.identity()
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        ConfigError: There is none that can be read.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"kt_sft: {folder} is no folder of a model: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"kt_sft: {folder / 'config.json'} cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"kt_sft: {folder / 'config.json'} is no JSON object")
    return settings


def model_of(folder: Path) -> transformers.PreTrainedModel:
    """The model of a folder, on the meta device, of the class that its config.json names.

    Raises:
        ConfigError: transformers has no such class.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        names = getattr(config, "architectures", None) or []
        model_class = getattr(transformers, names[0], None) if names else None
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            if model_class is None:
                return AutoModelForCausalLM.from_config(config)
            return model_class._from_config(config)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ConfigError(
            f"kt_sft: {folder}: transformers cannot make this model without running code of its folder ({error})"
        ) from error


def _stored_experts(plan: ModulePlan, storage: dict[str, Any]) -> StoredExperts:
    layout, group = plan.layout, storage["group_size"]
    if group is None:
        group = default_group(storage["expert_format"])  # said, so that asking for it is asking for what there is
    return StoredExperts(
        layout.num_experts,
        layout.hidden_size,
        layout.intermediate_size,
        layout.gated,
        layout.biased,
        storage["expert_format"],
        group,
        storage["zero_point"],
        scale_dtype_name(storage.get("scale_dtype")),
        0.0,
    )


def _files(
    tensors: dict[str, TensorEntry], plans: Sequence[ModulePlan], experts: dict[str, StoredExperts], store_id: str
) -> tuple[PlannedFile, ...]:
    taken = {key for plan in plans for key in plan.stored()}
    dense = sorted(
        (entry for key, entry in tensors.items() if key not in taken), key=lambda entry: (entry.path, entry.offset)
    )
    groups: list[tuple[list[PlannedTensor], ModulePlan | None]] = []
    size = 0
    for entry in dense:
        if not groups or size + entry.nbytes > _MOST_FILE_BYTES:
            groups.append(([], None))
            size = 0
        groups[-1][0].append(PlannedTensor(entry.key, entry.dtype_name, entry.shape, entry.nbytes, source=entry))
        size += entry.nbytes
    groups += [(_expert_tensors(plan, experts[plan.name]), plan) for plan in plans]
    return tuple(
        PlannedFile(f"model-{place:05}-of-{len(groups):05}.safetensors", _in_order(found), plan, store_id)
        for place, (found, plan) in enumerate(groups, start=1)
    )


def _in_order(tensors: Iterable[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    """Without gaps, which the format does not allow, the wider values first, so that all lie at their multiples."""

    def width(tensor: PlannedTensor) -> int:
        return tensor.nbytes // max(1, math.prod(tensor.shape))

    return tuple(sorted(tensors, key=width, reverse=True))


def _expert_tensors(plan: ModulePlan, experts: StoredExperts) -> list[PlannedTensor]:
    found = []
    for matrix in experts.matrices:
        for part, (dtype, shape) in stored_parts(*experts.shape(matrix), experts.storage).items():
            shape_EXX = (experts.num_experts, *shape)
            found.append(
                PlannedTensor(
                    part_key(plan.name, matrix, experts.expert_format, part),
                    dtype,
                    shape_EXX,
                    part_bytes(dtype, shape_EXX),
                )
            )
    for name, bias in (("gate_up", plan.gate_up_bias), ("down", plan.down_bias)):
        if bias is not None:
            key = bias_key(plan.name, name)
            found.append(PlannedTensor(key, bias.dtype_name, bias.shape, bias.nbytes, source=bias))
    note = PlannedTensor(note_key(plan.name, plan.layout), "U8", (len(NOTE),), len(NOTE), text=NOTE)
    return [*found, note]


def _others(source: Path) -> tuple[str, ...]:
    """The files beside the weights, by their place in the folder."""
    found = []
    for folder in (source, *(source / name for name in _FOLDERS)):
        for file in folder.iterdir() if folder.is_dir() else ():
            name = file.relative_to(source).as_posix()
            wanted = file.suffix in _COPIED or file.name.startswith(_COPIED_NAMES)
            skipped = file.name.endswith(".index.json") or file.name.startswith(".") or name in _WRITTEN_ANEW
            if wanted and not skipped and file.is_file():
                found.append(name)
    return tuple(sorted(found))


def _hash_of_source(source: Path, files: Sequence[str]) -> str:
    """Of the header of the only file, or of the index."""
    if len(files) > 1:
        return hashlib.sha256((source / "model.safetensors.index.json").read_bytes()).hexdigest()
    with open(files[0], "rb") as file:
        prefix = file.read(8)
        return hashlib.sha256(prefix + file.read(int.from_bytes(prefix, "little"))).hexdigest()

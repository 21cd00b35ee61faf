"""Which bytes of a checkpoint are which matrix of which expert.

transformers says how the keys of a checkpoint become a model's parameters: renamings, then converters that stack,
concatenate or transpose. Here the same rules are applied to *views* (file, offset, strides) instead of tensors, so
nothing is read, copied or stacked: the result is one strided view per expert matrix.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from kt_sft.loading.biases import adds_nothing
from kt_sft.loading.checkpoint import Checkpoint, TensorEntry
from kt_sft.loading.errors import CheckpointError, UnsupportedModelError
from kt_sft.loading.layout import ExpertLayout


@dataclass(frozen=True)
class MatrixView:
    """A strided [rows, cols] matrix inside a tensor of a file; strides in elements, offset in bytes of the file."""

    entry: TensorEntry
    offset: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int

    def transpose(self) -> MatrixView:
        """The same elements, rows and columns exchanged."""
        return dataclasses.replace(
            self, rows=self.cols, cols=self.rows, row_stride=self.col_stride, col_stride=self.row_stride
        )

    def take_rows(self, start: int, count: int, step: int = 1) -> MatrixView:
        """Rows start, start + step, ... (`count` of them)."""
        return dataclasses.replace(
            self,
            offset=self.offset + start * self.row_stride * self.entry.itemsize,
            rows=count,
            row_stride=step * self.row_stride,
        )


@dataclass(frozen=True)
class MatrixRead:
    """One matrix ("gate", "up" or "down") of one expert and where to read it."""

    matrix: str
    expert: int
    view: MatrixView


@dataclass(frozen=True)
class ModulePlan:
    """Everything one module of experts is filled from."""

    name: str
    layout: ExpertLayout
    reads: tuple[MatrixRead, ...]
    gate_up_bias: TensorEntry | None
    down_bias: TensorEntry | None
    #: Biases of zeros, for which the model has no place.
    idle: tuple[TensorEntry, ...] = dataclasses.field(default=(), kw_only=True)

    def entries(self) -> dict[str, TensorEntry]:
        """The checkpoint's tensors that feed this module, by key."""
        found = {read.view.entry.key: read.view.entry for read in self.reads}
        return found | {entry.key: entry for entry in (self.gate_up_bias, self.down_bias) if entry is not None}

    def stored(self) -> dict[str, TensorEntry]:
        """The tensors on disk that `entries` are made of, by key, and those that belong to them and add nothing."""
        found = {part.key: part for entry in self.entries().values() for part in entry.stored()}
        return found | {entry.key: entry for entry in self.idle}


@dataclass
class _Feed:
    """The checkpoint tensors that feed one parameter, by the converter's source pattern and the index in its `*`."""

    converter: WeightConverter | None = None
    tensors: dict[str | None, dict[int | None, TensorEntry]] = dataclasses.field(
        default_factory=lambda: defaultdict(dict)
    )


def plan_experts(
    model: nn.Module,
    layouts: Mapping[str, ExpertLayout],
    checkpoint: Checkpoint,
    conversions: Sequence[Any],
) -> list[ModulePlan]:
    """Finds the source of every expert matrix of `layouts` in `checkpoint`.

    Args:
        model: A PreTrainedModel that still has its experts' parameters (the meta device will do).
        layouts: From `find_experts(model)`.
        checkpoint: The checkpoint's headers.
        conversions: transformers' weight transforms for `model`.

    Raises:
        CheckpointError: An expert matrix is missing, there twice, of the wrong shape or of a dtype that cannot be read;
            or another weight of the block around experts, as its router's, is missing.
        UnsupportedModelError: The checkpoint's layout needs a conversion that is not known here.
    """
    feeds, others, idle = _collect(model, layouts, checkpoint, conversions)
    _check_blocks(model, layouts, others)
    return [_plan_module(name, layout, feeds, idle[name]) for name, layout in layouts.items()]


def check_routers(
    model: nn.Module, layouts: Mapping[str, ExpertLayout], checkpoint: Checkpoint, conversions: Sequence[Any]
) -> None:
    """Refuses a checkpoint of everything but the experts that lacks a weight of a block around them.

    Raises:
        CheckpointError: It does, or has weights of experts.
    """
    feeds, others, _ = _collect(model, layouts, checkpoint, conversions)
    for name, feed in feeds.items():
        for tensors in feed.tensors.values():
            entry = next(iter(tensors.values()))
            raise CheckpointError(f"{entry.path}: tensor {entry.key} feeds {name}, whose experts are stored already")
    _check_blocks(model, layouts, others)


def block_of(name: str) -> str:
    """The module that holds the experts `name`, and their router."""
    return name.rpartition(".")[0]


def feeds_experts(transform: Any, plans: Sequence[ModulePlan]) -> bool:
    """Whether one of transformers' weight transforms makes experts' parameters."""
    if not isinstance(transform, WeightConverter):
        return False
    names = [f"{plan.name}.{parameter}" for plan in plans for parameter in plan.layout.parameter_shapes()]
    return any(name.endswith(target) for target in transform.target_patterns for name in names)


def _collect(
    model: nn.Module, layouts: Mapping[str, ExpertLayout], checkpoint: Checkpoint, conversions: Sequence[Any]
) -> tuple[dict[str, _Feed], set[str], dict[str, list[TensorEntry]]]:
    """What feeds each parameter of experts, the names of other tensors that are fed, and what is idle, by module."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = getattr(model, "base_model_prefix", None), model.state_dict()
    feeds = {f"{name}.{key}": _Feed() for name, layout in layouts.items() for key in layout.parameter_shapes()}
    others: set[str] = set()
    idle: dict[str, list[TensorEntry]] = defaultdict(list)
    for key, entry in checkpoint.tensors.items():
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:  # as transformers does: a key that should not have been renamed
            target, pattern = rename_source_key(key, [], [], prefix, state)
        converter = by_pattern[pattern] if pattern is not None else None
        index = None
        if pattern is not None and ".*." in pattern:
            index = _index(rename_source_key(key, renamings, [])[0], pattern)
        for full_name in _targets(target, converter):
            if full_name in feeds:
                _add(feeds[full_name], converter, pattern, index, entry, full_name)
            elif name := _inside(full_name, layouts):
                if not adds_nothing(entry, checkpoint.tensors):
                    raise CheckpointError(
                        f"{entry.path}: tensor {key} belongs to the routed experts but is no weight that "
                        f"{layouts[name].class_name} has"
                    )
                idle[name].append(entry)
            else:
                others.add(full_name)
    return feeds, others, idle


def _check_blocks(model: nn.Module, layouts: Mapping[str, ExpertLayout], fed: set[str]) -> None:
    """Refuses a checkpoint without a router or another weight: transformers would warn, and go on with a random one.

    A head that is new to the model, as a classifier on a language model's checkpoint, may be missing.
    """
    elsewhere = [*(getattr(model, "all_tied_weights_keys", None) or {})]
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or []

    def lost(key: str) -> bool:
        found = key in fed or key in elsewhere or _inside(key, layouts)
        return not found and not any(re.search(pattern, key) for pattern in optional)

    for name in layouts:
        block = block_of(name)
        for key in model.get_submodule(block).state_dict(prefix=f"{block}." if block else ""):
            if lost(key):
                raise CheckpointError(f"the checkpoint has no tensor for {key}, of the block around {name}")
    own = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    prefix = "" if own else f"{getattr(model, 'base_model_prefix', '')}."
    for key, _ in model.named_parameters():
        if key.startswith(prefix) and lost(key):
            raise CheckpointError(f"the checkpoint has no tensor for {key}, and is no whole model without it")


def _targets(target: str, converter: WeightConverter | None) -> list[str]:
    if converter is None:
        return [target]
    first = converter.target_patterns[0]
    return [target.replace(first, pattern) for pattern in converter.target_patterns]


def _index(key: str, pattern: str) -> int | None:
    match = re.search(pattern.replace(".*.", r"\.(\d+)\."), key)
    return int(match.group(1)) if match else None


def _inside(full_name: str, layouts: Mapping[str, ExpertLayout]) -> str:
    """The module of experts that the tensor `full_name` lies in, or ""."""
    parts = full_name.split(".")
    return next((name for n in range(len(parts)) if (name := ".".join(parts[:n])) in layouts), "")


def _add(
    feed: _Feed,
    converter: WeightConverter | None,
    pattern: str | None,
    index: int | None,
    entry: TensorEntry,
    full_name: str,
) -> None:
    if feed.tensors and feed.converter is not converter:
        other = next(iter(next(iter(feed.tensors.values())).values()))
        raise CheckpointError(f"both {other.key} and {entry.key} feed {full_name}, in two different layouts")
    tensors = feed.tensors[pattern]
    if index in tensors:
        raise CheckpointError(f"both {tensors[index].key} and {entry.key} feed {full_name}")
    feed.converter = converter
    tensors[index] = entry


def _plan_module(
    name: str, layout: ExpertLayout, feeds: Mapping[str, _Feed], idle: Sequence[TensorEntry]
) -> ModulePlan:
    shapes = layout.parameter_shapes()
    first, down = layout.first_parameter, "down_proj"
    reads = []
    for expert, view in enumerate(_halves(name, layout, feeds[f"{name}.{first}"])):
        matrices = ("gate", "up") if layout.gated else ("up",)
        reads += [MatrixRead(matrix, expert, part) for matrix, part in zip(matrices, view, strict=True)]
    for expert, blocks in enumerate(_experts(f"{name}.{down}", shapes[down], feeds[f"{name}.{down}"])):
        reads.append(MatrixRead("down", expert, _single(f"{name}.{down}", blocks, layout.transposed)))
    biases = [
        _bias(f"{name}.{key}_bias", shapes[f"{key}_bias"], feeds[f"{name}.{key}_bias"]) if layout.biased else None
        for key in (first, down)
    ]
    return ModulePlan(name, layout, tuple(reads), *biases, idle=tuple(idle))


def _halves(name: str, layout: ExpertLayout, feed: _Feed) -> list[tuple[MatrixView, ...]]:
    """Per expert the gate and up matrices [I, H], or the up matrix alone."""
    full_name = f"{name}.{layout.first_parameter}"
    size = layout.intermediate_size
    halves: list[tuple[MatrixView, ...]] = []
    for blocks in _experts(full_name, layout.parameter_shapes()[layout.first_parameter], feed):
        if not layout.gated:
            halves.append((_single(full_name, blocks, layout.transposed),))
        elif len(blocks) == 2 and not layout.interleaved and not layout.transposed and blocks[0].rows == size:
            halves.append(tuple(blocks))
        else:
            both = _single(full_name, blocks, layout.transposed)
            start, step = (1, 2) if layout.interleaved else (size, 1)
            halves.append((both.take_rows(0, size, step), both.take_rows(start, size, step)))
    return halves


def _single(full_name: str, blocks: list[MatrixView], transposed: bool) -> MatrixView:
    if len(blocks) != 1:
        raise UnsupportedModelError(f"{full_name} is put together from {len(blocks)} parts in an unknown way")
    return blocks[0].transpose() if transposed else blocks[0]


def _experts(full_name: str, shape: tuple[int, ...], feed: _Feed) -> list[list[MatrixView]]:
    """Per expert the blocks whose rows, one after the other, are its matrix in the parameter `full_name` [E, R, C]."""
    if not feed.tensors:
        raise CheckpointError(f"the checkpoint has no tensor for {full_name}, shape {list(shape)}")
    operations: list[Any] = feed.converter.operations if feed.converter is not None else []
    kinds = [type(operation) for operation in operations]
    if not kinds or kinds == [Transpose]:
        experts = _fused(full_name, shape, feed, operations)
    elif kinds == [MergeModulelist] or kinds == [MergeModulelist, Concatenate]:
        concatenated = len(kinds) == 1 or operations[1].dim == 1
        if operations[0].dim != 0 or not concatenated:
            raise UnsupportedModelError(f"{full_name} is stacked along an unknown dimension: {operations}")
        experts = _listed(full_name, feed, count=shape[0], first=0, total=shape[0])
    elif kinds == [ErnieFuseAndSplitTextVisionExperts]:
        experts = _split(full_name, shape, feed)
    else:
        raise UnsupportedModelError(f"{full_name} is made by {[kind.__name__ for kind in kinds]}, unknown to kt_sft")
    for expert, blocks in enumerate(experts):
        _check_shape(full_name, expert, shape, blocks)
    return experts


def _check_shape(full_name: str, expert: int, shape: tuple[int, ...], blocks: list[MatrixView]) -> None:
    # A converter concatenates equal parts, so each block must have its share of the rows, not only the sum.
    rows, cols = shape[1] // len(blocks), shape[2]
    for block in blocks:
        if (block.rows, block.cols) != (rows, cols):
            raise CheckpointError(
                f"{block.entry.path}: tensor {block.entry.key} gives expert {expert} of {full_name} a matrix of shape "
                f"{[block.rows, block.cols]}, the model expects {[rows, cols]}"
            )


def _fused(full_name: str, shape: tuple[int, ...], feed: _Feed, operations: list[Any]) -> list[list[MatrixView]]:
    ((_, tensors),) = feed.tensors.items()
    entry = tensors[None]
    if len(entry.shape) != 3 or entry.shape[0] != shape[0]:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.key} has shape {list(entry.shape)}, the model expects {list(shape)}"
        )
    E, R, C = entry.shape
    views = [MatrixView(entry, entry.offset + e * R * C * entry.itemsize, R, C, C, 1) for e in range(E)]
    if entry.turned:
        views = [view.transpose() for view in views]
    for operation in operations:
        if {operation.dim0, operation.dim1} != {1, 2}:
            raise UnsupportedModelError(f"{full_name} is transposed along unknown dimensions: {operation}")
        # transformers' check_dims: only if the tensor does not fit as it is.
        if not (getattr(operation, "check_dims", False) and entry.shape == shape):
            views = [view.transpose() for view in views]
    return [[view] for view in views]


def _listed(full_name: str, feed: _Feed, *, count: int, first: int, total: int) -> list[list[MatrixView]]:
    """Experts first .. first + count - 1 of a list of `total`, one tensor each per source pattern."""
    assert feed.converter is not None
    patterns = feed.converter.source_patterns
    for pattern in patterns:
        _check_complete(full_name, pattern, feed, total)
    return [[_matrix(feed.tensors[pattern][index]) for pattern in patterns] for index in range(first, first + count)]


def _check_complete(full_name: str, pattern: str, feed: _Feed, total: int) -> None:
    tensors = feed.tensors.get(pattern, {})
    for index in range(total):
        if index not in tensors:
            raise CheckpointError(f"the checkpoint lacks {_missing_key(pattern, index, feed)}, which feeds {full_name}")
    for found, entry in tensors.items():
        if found is None or found >= total:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.key} is expert {found} of {full_name}, the model has {total}"
            )


def _missing_key(pattern: str, index: int, feed: _Feed) -> str:
    """The checkpoint key that should be there, guessed from one that is."""
    for tensors in feed.tensors.values():
        for known_index, entry in tensors.items():
            stem, found, _ = entry.key.rpartition(f".{known_index}.")
            if found:
                return f"{stem}.{index}.{pattern.rpartition('.*.')[2]}"
    return pattern.replace(".*.", f".{index}.")


def _split(full_name: str, shape: tuple[int, ...], feed: _Feed) -> list[list[MatrixView]]:
    """Ernie's list of text experts, then vision experts: equal shares (ErnieFuseAndSplitTextVisionExperts)."""
    assert feed.converter is not None
    targets = feed.converter.target_patterns
    place = next(i for i, target in enumerate(targets) if target in full_name)
    return _listed(full_name, feed, count=shape[0], first=place * shape[0], total=len(targets) * shape[0])


def _matrix(entry: TensorEntry) -> MatrixView:
    if len(entry.shape) != 2:
        raise CheckpointError(f"{entry.path}: tensor {entry.key} has shape {list(entry.shape)}, expected a matrix")
    rows, cols = entry.shape
    _ = entry.dtype  # raises for one that cannot be read
    return MatrixView(entry, entry.offset, rows, cols, cols, 1)


def _bias(full_name: str, shape: tuple[int, ...], feed: _Feed) -> TensorEntry:
    entries = [entry for tensors in feed.tensors.values() for entry in tensors.values()]
    if feed.converter is not None or len(entries) > 1:
        raise UnsupportedModelError(f"{full_name} is put together in an unknown way")
    if not entries:
        raise CheckpointError(f"the checkpoint has no tensor for {full_name}, shape {list(shape)}")
    (entry,) = entries
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.key} has shape {list(entry.shape)}, the model expects {list(shape)}"
        )
    return entry

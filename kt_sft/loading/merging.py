"""Adds what adapters changed to the experts of a checkpoint that has just been written.

Saving copies the experts from their source (kt_sft.loading.saving). Where adapters have been merged, each changed
matrix is then read from the new file, changed and written back in its place, so that never more than one expert is in
memory, whatever the layout: a matrix lies in the new tensor exactly as the plan says it lies in the source's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from kt_sft.config import local_rank_and_size
from kt_sft.engine.low_rank import LowRank
from kt_sft.experts import CpuExperts
from kt_sft.loading.checkpoint import TensorEntry, read_header
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.mapping import MatrixRead, ModulePlan
from kt_sft.loading.saving import announce_requantised, keys_for_saving
from kt_sft.loading.sources.entries import QuantisedEntry, RequantisationError, write_rows
from kt_sft.loading.sources.methods import fold_tensors
from kt_sft.loading.threads import run_all

#: Where experts are quantised again, which takes long. Each holds a few FP32 copies of a matrix.
_MOST_THREADS = 16


def merged_changes(model: nn.Module, plans: Sequence[ModulePlan]) -> dict[str, LowRank]:
    """What merged adapters left on the experts of `model`, by module.

    Raises:
        CheckpointError: An adapter on experts is attached and not merged, so that saving would lose it, or merged into
            experts of a checkpoint whose format has no room for it.
    """
    changes = {}
    for plan in plans:
        experts = model.get_submodule(plan.name)
        if not isinstance(experts, CpuExperts):
            raise CheckpointError(
                f"{plan.name} has an adapter attached; merge it (merge_and_unload) or take it off (unload) to save the "
                "model, or save the adapter alone"
            )
        if experts.merged is not None:
            for read in plan.reads:
                if isinstance(read.view.entry, QuantisedEntry) and not read.view.entry.rewritable:
                    raise read.view.entry.unwritable()
            changes[plan.name] = experts.merged
    return changes


def merge_saved(
    folder: Path, model: nn.Module, plans: Sequence[ModulePlan], quantization: Mapping[str, Any] | None = None
) -> None:
    """Adds merged adapters to the experts in `folder`: computed in FP32, rounded once to the tensor's dtype.

    A matrix that does not change keeps its bytes. Of a quantised checkpoint, one that does is quantised again, the way
    it was, and the log says with what error.

    Args:
        folder: Where `model` has just been saved.
        model: With `CpuExperts.merged` set where adapters were merged.
        plans: From loading.
        quantization: The source's `quantization_config`, if it has one.

    Raises:
        CheckpointError: A changed weight is not finite in its dtype, or cannot be quantised as it was, or a file cannot
            be read or written.
    """
    changes = merged_changes(model, plans)
    if not changes:
        return
    written = {key: entry for file in sorted(folder.glob("*.safetensors")) for key, entry in read_header(file).items()}
    if quantization is not None:
        written = fold_tensors(written, quantization)
    plans = [plan for plan in plans if plan.name in changes]
    keys = [key for plan in plans for key in plan.entries()]
    names = keys_for_saving(keys, getattr(model, "_weight_conversions", None) or [])
    targets = {key: _target(key, names[key], written) for key in keys}
    hidden, error = local_rank_and_size()[0] != 0, RequantisationError()
    for plan in logging.tqdm(plans, desc="Merging experts", disable=hidden):
        reads: dict[int, list[MatrixRead]] = {}
        for read in plan.reads:
            reads.setdefault(read.expert, []).append(read)
        merge = functools.partial(_merge_expert, plan, reads, changes[plan.name], targets, error)
        if quantization is not None:
            run_all(merge, reads, _MOST_THREADS)
            continue
        for expert in reads:
            merge(expert)
    announce_requantised(error, "matrices of experts")


def _target(key: str, name: str, written: Mapping[str, TensorEntry]) -> TensorEntry:
    entry = written.get(key) or written.get(name)
    if entry is None:
        raise CheckpointError(f"tensor {key} was not saved, so the adapter cannot be merged into it")
    return entry


def _parts(plan: ModulePlan, change: LowRank, expert: int) -> dict[str, Tensor]:
    """The changes of one expert's matrices, FP32; without those that are zero."""
    gate_up_b = change.gate_up_b[expert]
    halves = gate_up_b.chunk(2) if plan.layout.gated else (gate_up_b,)
    first = ("gate", "up") if plan.layout.gated else ("up",)
    factors = {matrix: (half, change.gate_up_a[expert]) for matrix, half in zip(first, halves, strict=True)}
    factors["down"] = (change.down_b[expert], change.down_a[expert])
    changed = {matrix for matrix, (b, a) in factors.items() if bool(b.any()) and bool(a.any())}
    if not changed:
        return {}
    gate_up, down = change.delta(expert)
    deltas = dict(zip(first, gate_up.chunk(len(first)), strict=True)) | {"down": down}
    return {matrix: delta for matrix, delta in deltas.items() if matrix in changed}


def _merge_expert(
    plan: ModulePlan,
    reads: Mapping[int, Sequence[MatrixRead]],
    change: LowRank,
    targets: Mapping[str, TensorEntry],
    error: RequantisationError,
    expert: int,
) -> None:
    changes = _parts(plan, change, expert)
    by_tensor: dict[str, list[MatrixRead]] = {}
    for read in reads[expert]:
        if read.matrix in changes:
            by_tensor.setdefault(read.view.entry.key, []).append(read)
    for key, inside in by_tensor.items():
        source, target = inside[0].view.entry, targets[key]
        if (target.dtype_name, target.shape) != (source.dtype_name, source.shape):
            raise CheckpointError(f"{target.path}: tensor {target.key} is not as in {source.path}")
        if isinstance(target, QuantisedEntry):
            for read in inside:
                _merge_quantised(plan, read, changes[read.matrix], target, error)
            continue
        try:
            _merge_span(plan, inside, changes, target)
        except OSError as failure:
            raise CheckpointError(f"{target.path}: tensor {target.key} cannot be merged into ({failure})") from failure


def _merge_quantised(
    plan: ModulePlan, read: MatrixRead, change: Tensor, target: QuantisedEntry, error: RequantisationError
) -> None:
    rows = target.rows_of(read.view)
    merged = target.dequantised(rows).add_(change)
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(merged)):
        raise CheckpointError(
            f"tensor {target.key} ({read.matrix} of expert {read.expert} of {plan.name}): with the adapter merged a "
            "weight is not finite"
        )
    parts, stored = target.rewritten(rows, merged)
    for name, part in parts.items():
        write_rows(target.parts[name], part)
    error.add(merged, stored)


def _merge_span(
    plan: ModulePlan, reads: Sequence[MatrixRead], changes: Mapping[str, Tensor], target: TensorEntry
) -> None:
    """Changes one expert's matrices within one tensor: gate and up may alternate there row by row."""
    source, size = reads[0].view.entry, target.dtype.itemsize
    start = min(read.view.offset for read in reads)
    end = max(_end(read) for read in reads)
    place = target.offset + start - source.offset
    with open(target.path, "r+b", buffering=0) as file:
        data = bytearray(os.pread(file.fileno(), end - start, place))
        if len(data) != end - start:
            raise CheckpointError(f"{target.path}: tensor {target.key} is cut off")
        span = torch.frombuffer(data, dtype=target.dtype)
        for read in reads:
            view = read.view
            strides = (view.row_stride, view.col_stride)
            weights = span.as_strided((view.rows, view.cols), strides, (view.offset - start) // size)
            weights += changes[read.matrix]  # torch adds in FP32, the wider dtype of the two, and rounds the sum
            if not all(torch.isfinite(extreme) for extreme in torch.aminmax(weights)):
                raise CheckpointError(
                    f"tensor {target.key} ({read.matrix} of expert {read.expert} of {plan.name}): with the adapter "
                    f"merged a weight is not finite in {target.dtype_name}"
                )
        written = os.pwrite(file.fileno(), data, place)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes could be written")


def _end(read: MatrixRead) -> int:
    view = read.view
    last = (view.rows - 1) * view.row_stride + (view.cols - 1) * view.col_stride
    return view.offset + (last + 1) * view.entry.dtype.itemsize

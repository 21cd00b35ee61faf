"""Finds the experts of a model in a ready store, and checks that all of it is as its manifest says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from kt_sft.engine.store import LayerStore
from kt_sft.engine.stored import map_stored, stored_parts
from kt_sft.loading.checkpoint import Checkpoint, TensorEntry, read_header
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.hashing import hash_span
from kt_sft.loading.layout import ExpertLayout
from kt_sft.loading.mapping import MatrixRead, MatrixView, ModulePlan, check_routers
from kt_sft.loading.ready.manifest import MANIFEST, METHOD, Manifest, StoredExperts, StoredFile, read_manifest
from kt_sft.loading.ready.names import MARK, bias_key, note_key, part_key
from kt_sft.loading.sources.entries import STORED_DTYPES, CodesInFile, QuantisedEntry, Rows, read_span


@dataclass(frozen=True)
class StoredEntry(QuantisedEntry):
    """One matrix of all experts of a module, [experts, rows, columns]; parts "codes", "scales" and "zeros"."""

    kind: Mapping[str, Any]

    @property
    def storage(self) -> dict[str, Any]:
        """The format that it was quantised to."""
        return dict(self.kind)

    @property
    def description(self) -> str:
        """Its format in words."""
        return f"{self.kind['expert_format']} of a ready store"

    def place(self, part: str, expert: int) -> int:
        """The first byte of a part of one expert's matrix in the file; 0 for a part that there is not."""
        entry = self.parts.get(part)
        return 0 if entry is None else entry.offset + expert * (entry.nbytes // self.shape[0])

    def scales(self, part: str, expert: int) -> Tensor | None:
        """Scales or zero points of one expert's matrix; None for a part that there is not."""
        entry = self.parts.get(part)
        if entry is None:
            return None
        count = math.prod(entry.shape[1:])
        return read_span(entry, expert * count, count).reshape(entry.shape[1:])

    def in_file(self, rows: Rows) -> CodesInFile:
        """Where the codes lie; reads the scales."""
        codes, expert = self.parts["codes"], rows.matrix
        stride = codes.shape[2] * STORED_DTYPES[codes.dtype_name].itemsize
        offset = self.place("codes", expert) + rows.start * stride
        scales, zeros = self.scales("scales", expert), self.scales("zeros", expert)
        return CodesInFile(codes.path, offset, rows.step * stride, scales, zeros)

    def map(self, store: LayerStore, read: MatrixRead, file: Any) -> None:
        """Lets a mapped store have one expert's matrix where it lies.

        Args:
            store: Of `storage`.
            read: Which matrix.
            file: A `MappedFile` of it.
        """
        expert = self.rows_of(read.view).matrix
        map_stored(store, read.matrix, read.expert, file, {part: self.place(part, expert) for part in self.parts})

    def dequantised(self, rows: Rows) -> Tensor:
        """Code x scale, by the engine's own definition."""
        height, width = self.shape[1:]
        store = LayerStore(
            num_experts=1,
            hidden_size=width,
            intermediate_size=height,
            activation="silu",
            gated=False,
            **self.kind,
        )
        everything = Rows(rows.matrix, 0, 1, height)
        self.put(store, MatrixRead("up", 0, MatrixView(self, 0, height, width, width, 1)), everything)
        values = torch.empty(height, width, device="cpu")
        store.native.dequantize("up", 0, values.data_ptr())
        return values[rows.slice()]


def is_store(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint's `quantization_config` says that it is a ready store."""
    return quantization is not None and quantization.get("quant_method") == METHOD


def dense_quantization(quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the tensors beside experts follow, of a checkpoint with this `quantization_config`."""
    if quantization is None:
        return None
    found: dict[str, Any] | None = (
        quantization.get("source_quantization") if is_store(quantization) else dict(quantization)
    )
    return found


class ReadyStore:
    """A ready store whose files and manifest fit each other.

    Args:
        checkpoint: Its files. What is of the experts is taken out of `checkpoint.tensors`; the rest is an ordinary
            checkpoint.
        quantization: The `quantization_config` of the source, which the rest still follows, as config.json has it.

    Raises:
        CheckpointError: A file or tensor is missing, surplus, or not as the manifest says.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: Mapping[str, Any] | None) -> None:
        self.folder = Path(checkpoint.files[0]).parent
        self.manifest = read_manifest(self.folder)
        if self.manifest.source.get("quantization") != quantization:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: says another quantization_config of the source than {MANIFEST} beside "
                "it; put back the one that `kt-sft quantize` wrote"
            )
        check_headers(self.folder, self.manifest, [Path(file).name for file in checkpoint.files])
        notes = {f"{module}.{name}" for module in self.manifest.experts for name in ("gate_up_proj", "up_proj")}
        self._tensors = {key: entry for key, entry in checkpoint.tensors.items() if MARK in key or key in notes}
        for key in self._tensors:
            del checkpoint.tensors[key]

    def plan(
        self,
        model: nn.Module,
        layouts: Mapping[str, ExpertLayout],
        checkpoint: Checkpoint,
        conversions: Sequence[Any],
    ) -> list[ModulePlan]:
        """What each module of experts is filled from; as `plan_experts`.

        Raises:
            CheckpointError: The store is of another model, or lacks something.
        """
        found = _by_layout(self.manifest.experts, model, layouts, conversions)
        used: set[str] = set()
        plans = [self._plan_module(name, layouts[name], module, used) for name, module in found.items()]
        surplus = sorted(self._tensors.keys() - used)
        if surplus:
            entry = self._tensors[surplus[0]]
            raise CheckpointError(f"{entry.path}: tensor {entry.key} belongs to no experts of the model")
        check_routers(model, layouts, checkpoint, conversions)
        return plans

    def _plan_module(self, name: str, layout: ExpertLayout, module: str, used: set[str]) -> ModulePlan:
        experts = self.manifest.experts[module]
        sizes = (layout.num_experts, layout.hidden_size, layout.intermediate_size, layout.gated, layout.biased)
        stored = (
            experts.num_experts,
            experts.hidden_size,
            experts.intermediate_size,
            experts.gated,
            experts.biased,
        )
        if sizes != stored:
            raise CheckpointError(
                f"{self.folder / MANIFEST}: the experts of {module} are (number, hidden, intermediate size, gated, "
                f"biased) {stored}, those of the model {sizes}"
            )
        used.add(note_key(module, layout))
        reads = []
        for matrix in experts.matrices:
            rows, columns = experts.shape(matrix)
            entry = self._matrix(module, matrix, experts, used)
            step = rows * columns * entry.itemsize
            start = 0 if isinstance(entry, StoredEntry) else entry.offset
            reads += [
                MatrixRead(matrix, expert, MatrixView(entry, start + expert * step, rows, columns, columns, 1))
                for expert in range(experts.num_experts)
            ]
        shapes = layout.parameter_shapes()
        biases = [
            self._tensor(bias_key(module, which), None, shapes[f"{parameter}_bias"], used) if layout.biased else None
            for which, parameter in (("gate_up", layout.first_parameter), ("down", "down_proj"))
        ]
        return ModulePlan(name, layout, tuple(reads), *biases)

    def _matrix(self, module: str, matrix: str, experts: StoredExperts, used: set[str]) -> TensorEntry:
        rows, columns = experts.shape(matrix)
        try:
            wanted = stored_parts(rows, columns, experts.storage)
        except (ValueError, KeyError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self.folder / MANIFEST}: {module} has no possible format ({error})") from error
        parts = {
            part: self._tensor(
                part_key(module, matrix, experts.expert_format, part), dtype, (experts.num_experts, *shape), used
            )
            for part, (dtype, shape) in wanted.items()
        }
        codes = parts["codes"]
        if "scales" not in parts:
            return codes
        shape = (experts.num_experts, rows, columns)
        return StoredEntry(
            f"{module}.{matrix}", codes.path, experts.expert_format, shape, 0, codes.nbytes, parts, experts.storage
        )

    def _tensor(self, key: str, dtype: str | None, shape: tuple[int, ...], used: set[str]) -> TensorEntry:
        entry = self._tensors.get(key)
        if entry is None:
            raise CheckpointError(f"{self.folder}: the store has no tensor {key}; make it again with `kt-sft quantize`")
        if entry.shape != shape or (dtype is not None and entry.dtype_name != dtype):
            raise CheckpointError(
                f"{entry.path}: tensor {key} is {entry.dtype_name} {list(entry.shape)}, expected {dtype or 'values'} "
                f"{list(shape)}"
            )
        used.add(key)
        return entry


def check_headers(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    """Compares files with the manifest: which there are, their sizes, and their headers.

    Args:
        folder: Of the store.
        manifest: Its manifest.
        names: The files that are to be loaded.

    Raises:
        CheckpointError: A file is missing, surplus or truncated, or holds other tensors than the manifest says.
    """
    for name in sorted(manifest.files.keys() - set(names)):
        raise CheckpointError(f"{folder / name}: missing, the manifest names it; copy the whole store")
    for name in sorted(set(names) - manifest.files.keys()):
        raise CheckpointError(f"{folder / name}: is no file of this store, its manifest does not name it")
    for name, file in manifest.files.items():
        _check_header(folder / name, file)


def _check_header(path: Path, file: StoredFile) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, the manifest names it; copy the whole store")
    size = path.stat().st_size
    if size != file.bytes:
        raise CheckpointError(f"{path}: has {size} bytes, the manifest says {file.bytes}: truncated or damaged")
    tensors = read_header(path)
    for key in sorted(tensors.keys() ^ file.tensors.keys()):
        where = "not in the manifest" if key in tensors else "missing, the manifest names it"
        raise CheckpointError(f"{path}: tensor {key} is {where}; is it a file of another store?")
    for key, tensor in file.tensors.items():
        found = tensors[key]
        if (found.dtype_name, found.shape) != (tensor.dtype, tensor.shape):
            raise CheckpointError(
                f"{path}: tensor {key} is {found.dtype_name} {list(found.shape)}, the manifest says {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    # The same tensors, elsewhere: a header of another store, or a damaged one.
    start = min((entry.offset for entry in tensors.values()), default=size)
    if hash_span(path, 0, start) != file.header_sha256:
        raise CheckpointError(f"{path}: its header is not the one of this store: damaged, or a file of another store")


def _by_layout(
    experts: Mapping[str, StoredExperts],
    model: nn.Module,
    layouts: Mapping[str, ExpertLayout],
    conversions: Sequence[Any],
) -> dict[str, str]:
    """The store's module for each of the model's, whose class may have other names for them than the store's.

    Raises:
        CheckpointError: One is missing, on one side or the other.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix, state = getattr(model, "base_model_prefix", None), model.state_dict()
    found: dict[str, str] = {}
    for module in experts:
        name = module
        if name not in layouts:
            renamed = rename_source_key(f"{module}.down_proj", renamings, converters, prefix, state)[0]
            name = renamed.rpartition(".")[0]
        if name not in layouts or name in found:
            raise CheckpointError(f"the store's experts {module} are no experts of {type(model).__name__}")
        found[name] = module
    for name in layouts:
        if name not in found:
            raise CheckpointError(f"the store has no experts for {name} of {type(model).__name__}")
    return {name: found[name] for name in layouts}

"""Writes a ready store: file by file, each complete or not there, so that a killed run goes on where it was.

All is made in `TARGET.incomplete`: files in `store`, and beside them a record of each that is complete, with its
hashes. The last step renames `store` to the target.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kt_sft
from kt_sft.config import ConfigError
from kt_sft.engine.store import LayerStore
from kt_sft.engine.stored import copy_stored
from kt_sft.loading.checkpoint import TensorEntry, identity_of
from kt_sft.loading.errors import CheckpointError
from kt_sft.loading.hashing import Advance, hash_file, hash_span, hash_tensors, nothing
from kt_sft.loading.hub import model_name
from kt_sft.loading.mapping import MatrixRead, ModulePlan
from kt_sft.loading.memory import readable
from kt_sft.loading.ready.manifest import MANIFEST, METHOD, Manifest, OtherFile, StoredFile, StoredTensor, read_manifest
from kt_sft.loading.ready.names import part_key
from kt_sft.loading.ready.planning import PlannedFile, PlannedTensor, StorePlan, read_settings
from kt_sft.loading.streaming import fill_matrix
from kt_sft.loading.threads import run_all

_CHUNK = 16 << 20
#: Left free on the disk for everything else.
_SPARE = 64 << 20


def incomplete(target: Path) -> Path:
    """Where everything of a store lies until it is complete."""
    path = Path(os.path.realpath(target))
    return path.with_name(f"{path.name}.incomplete")


class Plain:
    """Fills stores of one expert with matrices quantised as they are read; calibration does otherwise."""

    def begin(self, plan: ModulePlan) -> None:
        """Called before the matrices of a module."""

    def groups(self, plan: ModulePlan) -> list[list[MatrixRead]]:
        """The module's matrices, those that one thread is to fill together, in the order of the files."""
        return [[read] for read in sorted(plan.reads, key=lambda read: (read.view.entry.path, read.view.offset))]

    def fill(self, read: MatrixRead, store: LayerStore, plan: ModulePlan) -> None:
        """Fills one matrix; from many threads.

        Raises:
            CheckpointError: A value is NaN or Inf, or the file ends early.
        """
        fill_matrix(read, store, plan, place=0)

    def calibration(self, asked: dict[str, Any] | None, plans: Sequence[ModulePlan]) -> dict[str, Any] | None:
        """For the manifest: what was asked for, and what came of it for the experts of all modules."""
        return asked


class StoreWriter:
    """Writes one store.

    Args:
        plan: What.
        target: The folder that appears when all is there.
        threads: At most so many work at a time.
        advance: Hears of bytes of the source that are done.
        filler: Quantises matrices.
    """

    def __init__(
        self, plan: StorePlan, target: Path, *, threads: int, advance: Advance = nothing, filler: Plain | None = None
    ) -> None:
        self._plan = plan
        self._target = Path(os.path.realpath(target))
        self._work = incomplete(target)
        self._store = self._work / "store"
        self._threads = threads
        self._advance = advance
        self._filler = filler if filler is not None else Plain()
        self._local = threading.local()
        self._is_locked = False

    def prepare(self) -> bool:
        """Looks, before any work, whether it can be done; False where it was done already.

        Raises:
            ConfigError: The target is something else, or the disk is too small.
        """
        if self._target.is_mount():
            raise ConfigError(f"kt_sft: {self._target} is a mount point, which stays; give a folder inside it")
        if self._is_done():
            shutil.rmtree(self._work, ignore_errors=True)
            return False
        if not self._target.parent.is_dir():
            raise ConfigError(f"kt_sft: the folder {self._target.parent} does not exist")
        known = self._read_state()
        if known is not None and known != self._state() and self._has_begun():
            raise ConfigError(
                f"kt_sft: {self._work} is of another run: the source, the settings or the version of kt_sft were "
                "others; delete it to start anew, or give another target"
            )
        done = sum(file.nbytes for file in self._plan.files if self._record_of(file).exists())
        need, have = self._plan.nbytes - done + _SPARE, shutil.disk_usage(self._target.parent).free
        have += sum(part.stat().st_blocks * 512 for part in self._store.glob("*.part"))
        if need > have:
            raise ConfigError(
                f"kt_sft: the disk of {self._target.parent} is too small for the store: {readable(need)} needed, "
                f"{readable(have)} free; free some, or give a target on another disk"
            )
        self._begin()
        return True

    def write(self) -> Manifest:
        """Writes what is not there yet, and lets the store appear.

        Raises:
            ConfigError: Another process is writing this store.
            CheckpointError: The source cannot be read, or holds a value that is not finite.
            OSError: The disk is full.
        """
        self._begin()
        with self.locked():
            files, experts = {}, {}
            for file in self._plan.files:
                found, error = self._complete(file)
                files[file.name] = found
                if file.plan is not None:
                    stored = self._plan.experts[file.plan.name]
                    experts[file.plan.name] = dataclasses.replace(stored, relative_error=error)
            manifest = self._finish(files, experts)
        shutil.rmtree(self._work, ignore_errors=True)
        return manifest

    def _is_done(self) -> bool:
        if not self._target.exists():
            return False
        if not self._target.is_dir():
            raise ConfigError(f"kt_sft: {self._target} exists and is no folder; give a new one")
        if not any(self._target.iterdir()):
            return False
        if not (self._target / MANIFEST).exists():
            raise ConfigError(f"kt_sft: {self._target} exists and is not empty; give a new folder")
        if read_manifest(self._target).settings.get("store_id") != self._plan.store_id:
            raise ConfigError(
                f"kt_sft: {self._target} is a ready store of another source, of other settings or of another version "
                "of kt_sft; give a new folder, or delete it first"
            )
        if max(changed for _, _, changed in self._plan.identity) > (self._target / MANIFEST).stat().st_mtime_ns:
            raise ConfigError(
                f"kt_sft: {self._plan.source} has changed since the store in {self._target} was made of it; give a new "
                "folder, or delete the store first"
            )
        return True

    def _has_begun(self) -> bool:
        """Whether there is something of a run before that would be lost."""
        return any(self._work.glob("*.safetensors.json")) or any(self._work.glob("*/done.json"))

    def _begin(self) -> None:
        """Says, before anything else is there, what the folder is for."""
        self._store.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if self._read_state() != self._state():
                for folder in (self._store, self._work / "calibration"):
                    shutil.rmtree(folder, ignore_errors=True)
                self._store.mkdir()
                _write_text(self._work / "state.json", json.dumps(self._state()))

    def _state(self) -> dict[str, Any]:
        identity = [list(one) for one in self._plan.identity]
        return {"store_id": self._plan.store_id, "source": identity}

    def _read_state(self) -> Any:
        try:
            return json.loads((self._work / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return "damaged"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from this store, once it is prepared; may be entered again within.

        The lock goes with its process, however that ends.

        Raises:
            ConfigError: Another process has it.
        """
        if self._is_locked:
            yield
            return
        self._work.mkdir(exist_ok=True)
        with open(self._work / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"kt_sft: another process is writing {self._target}; wait until it has ended"
                ) from error
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False

    def _record_of(self, file: PlannedFile) -> Path:
        return self._work / f"{file.name}.json"

    def _complete(self, file: PlannedFile) -> tuple[StoredFile, float]:
        """A file with its hashes, and the relative error of the experts in it: kept if it is whole, else written."""
        kept = self._kept(file)
        if kept is not None:
            self._advance(file.source_bytes)
            return kept
        part = self._store / f"{file.name}.part"
        error = self._write_file(file, part)
        stored = self._hashed(file, part)
        record = {"file": dataclasses.asdict(stored), "relative_error": error}
        os.replace(part, self._store / file.name)
        _write_text(self._record_of(file), json.dumps(record))
        return stored, error

    def _kept(self, file: PlannedFile) -> tuple[StoredFile, float] | None:
        path, record = self._store / file.name, self._record_of(file)
        if not path.exists() or not record.exists():
            return None
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            if path.stat().st_size != file.nbytes:
                return None
            stored = self._hashed(file, path)
            # Through JSON, as the record went: tuples are lists there.
            same = json.loads(json.dumps(dataclasses.asdict(stored))) == found["file"]
            return (stored, float(found["relative_error"])) if same else None
        except (CheckpointError, ValueError, KeyError, TypeError, OSError):
            return None

    def _hashed(self, file: PlannedFile, path: Path) -> StoredFile:
        header, offsets = file.header, file.offsets()
        places = {tensor.key: (offsets[tensor.key], tensor.nbytes) for tensor in file.tensors}
        hashes = hash_tensors(path, places, self._threads)
        tensors = {tensor.key: StoredTensor(tensor.dtype, tensor.shape, hashes[tensor.key]) for tensor in file.tensors}
        return StoredFile(path.stat().st_size, hash_span(path, 0, len(header)), tensors)

    def _write_file(self, file: PlannedFile, path: Path) -> float:
        """Writes all of one file; returns the relative error of the experts in it."""
        with open(path, "wb", buffering=0) as opened:
            descriptor = opened.fileno()
            os.posix_fallocate(descriptor, 0, file.nbytes)  # a full disk is an error now, not in an hour
            _write_all(descriptor, file.header, 0)
            offsets = file.offsets()
            for tensor in file.tensors:
                if tensor.text is not None:
                    _write_all(descriptor, tensor.text.encode(), offsets[tensor.key])
            copied = [tensor for tensor in file.tensors if tensor.source is not None]
            run_all(lambda tensor: self._copy(tensor, descriptor, offsets[tensor.key]), copied, self._threads)
            error = self._write_experts(file, descriptor, offsets) if file.plan is not None else 0.0
            os.fsync(descriptor)
        return error

    def _copy(self, tensor: PlannedTensor, descriptor: int, offset: int) -> None:
        entry = tensor.source
        assert entry is not None
        for data in _chunks(entry):
            _write_all(descriptor, data, offset)
            offset += len(data)
            self._advance(len(data))

    def _write_experts(self, file: PlannedFile, descriptor: int, offsets: dict[str, int]) -> float:
        plan = file.plan
        assert plan is not None
        errors: dict[tuple[str, int], tuple[float, float]] = {}
        total = sum(entry.nbytes for entry in plan.stored().values())
        biases = sum(bias.nbytes for bias in (plan.gate_up_bias, plan.down_bias) if bias is not None)
        share = (total - biases) // max(1, len(plan.reads))
        expert_format = self._plan.experts[plan.name].expert_format

        def work(reads: list[MatrixRead]) -> None:
            for read in reads:
                store = self._one_expert(plan)
                store.adopt((0.0, 0.0))
                self._filler.fill(read, store, plan)
                errors[read.matrix, read.expert] = store.error
                for part, data in copy_stored(store, read.matrix, 0).items():
                    place = offsets[part_key(plan.name, read.matrix, expert_format, part)]
                    _write_all(descriptor, data.numpy(), place + read.expert * data.numel())
                self._advance(share)

        self._filler.begin(plan)
        run_all(work, self._filler.groups(plan), self._threads)
        self._advance(total - biases - share * len(plan.reads))
        # In a fixed order, or the sum would depend on which thread was first.
        ordered = [errors[read.matrix, read.expert] for read in plan.reads]
        squared_error, squared_values = (math.fsum(column) for column in zip(*ordered, strict=True))
        return math.sqrt(squared_error / squared_values) if squared_values else 0.0

    def _one_expert(self, plan: ModulePlan) -> LayerStore:
        """This thread's store for a matrix at a time."""
        experts = self._plan.experts[plan.name]
        key = (experts.hidden_size, experts.intermediate_size, experts.gated, tuple(experts.storage.values()))
        if getattr(self._local, "key", None) != key:
            self._local.store = LayerStore(
                num_experts=1,
                hidden_size=experts.hidden_size,
                intermediate_size=experts.intermediate_size,
                activation="silu",
                gated=experts.gated,
                **experts.storage,
            )
            self._local.key = key
        store: LayerStore = self._local.store
        return store

    def _finish(self, files: dict[str, StoredFile], experts: dict[str, Any]) -> Manifest:
        plan = self._plan
        if identity_of(path for path, _, _ in plan.identity) != plan.identity:
            raise CheckpointError(
                f"{plan.source}: the checkpoint has changed while it was read; delete {self._work} and start anew"
            )
        for name in plan.others:
            (self._store / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(plan.source / name, self._store / name)
        weight_map = {key: name for name, file in files.items() for key in file.tensors}
        index = {"metadata": {"total_size": sum(file.bytes for file in files.values())}, "weight_map": weight_map}
        _write_text(self._store / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        settings = read_settings(plan.source) | {
            "quantization_config": {"quant_method": METHOD, "source_quantization": plan.quantization}
        }
        _write_text(self._store / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
        others = {}
        for name in sorted((*plan.others, "config.json", "model.safetensors.index.json")):
            others[name] = OtherFile((self._store / name).stat().st_size, hash_file(self._store / name))
        source = {"name": model_name(plan.source), "sha256": plan.source_sha256, "quantization": plan.quantization}
        plans = [file.plan for file in plan.files if file.plan is not None]
        calibration = self._filler.calibration(plan.settings["calibration"], plans)
        manifest = Manifest(
            made_by=f"kt_sft {kt_sft.__version__}",
            source=source,
            settings=plan.settings | {"calibration": calibration, "store_id": plan.store_id},
            experts=experts,
            files=files,
            others=others,
        )
        _write_text(self._store / MANIFEST, manifest.to_json())
        for stale in (path for path in self._store.iterdir() if path.name.endswith((".part", ".tmp"))):
            stale.unlink()
        os.replace(self._store, self._target)  # an empty folder may be there
        _sync(self._target.parent)
        return manifest


def _chunks(entry: TensorEntry) -> Iterator[memoryview]:
    """The bytes of a stored tensor, some at a time."""
    buffer, offset, left = memoryview(bytearray(min(_CHUNK, max(entry.nbytes, 1)))), entry.offset, entry.nbytes
    try:
        with open(entry.path, "rb", buffering=0) as file:
            while left:
                got = os.preadv(file.fileno(), [buffer[: min(left, _CHUNK)]], offset)
                if got == 0:
                    raise CheckpointError(f"{entry.path}: tensor {entry.key} is cut off")
                yield buffer[:got]
                offset, left = offset + got, left - got
    except OSError as error:
        raise CheckpointError(f"{entry.path}: tensor {entry.key} cannot be read ({error.strerror})") from error


def _write_all(descriptor: int, data: Any, offset: int) -> None:
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_text(path: Path, text: str) -> None:
    """All of it or nothing."""
    partial = path.with_name(f"{path.name}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

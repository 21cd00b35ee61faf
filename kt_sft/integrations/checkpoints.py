"""Checkpoints of a run that was interrupted: the newest complete one is resumed from, never one that a kill left half.

The Trainer writes a checkpoint in place, trainer_state.json last, and takes the highest number to resume from, complete
or not. So a folder is complete if its trainer_state.json can be read and every other file is whole. For that to stay
true where a checkpoint is written over an earlier one, its trainer_state.json goes before anything else is written; and
for it to be true after a power loss, too, the others are on the disk before that file is written, and that file before
older checkpoints are removed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from kt_sft.config import ConfigError, local_rank_and_size
from kt_sft.integrations.value_heads import VALUE_HEAD
from kt_sft.loading.checkpoint import read_header
from kt_sft.loading.durable import write_out, write_out_folder
from kt_sft.loading.errors import CheckpointError

logger = logging.getLogger("kt_sft")

#: Written last.
_STATE = "trainer_state.json"
_ADAPTER = "adapter_model.safetensors"
#: Without these a resumed run would start its optimizer, schedule and random numbers anew, without a word.
_RESUMED_STATES = ("optimizer.pt", "scheduler.pt")
_RANDOM, _RANDOM_OF_RANK = "rng_state.pth", re.compile(r"rng_state_(\d+)\.pth")
_NUMBERED = re.compile(r"checkpoint-(\d+)")


class FoundCheckpoint(str):
    """The folder that LLaMA-Factory has found by itself, told apart from one that a recipe names."""


def mark_found(parser: ModuleType) -> None:
    """Wraps the `get_last_checkpoint` by which LLaMA-Factory finds what to resume from.

    Args:
        parser: `llamafactory.hparams.parser`.
    """
    find = parser.get_last_checkpoint

    @functools.wraps(find)
    def get_last_checkpoint(folder: str) -> str | None:
        found = find(folder)
        return None if found is None else FoundCheckpoint(found)

    parser.get_last_checkpoint = get_last_checkpoint  # type: ignore[attr-defined]


def extend_trainer(module: ModuleType) -> None:
    """Wraps `Trainer._save_checkpoint`: a folder counts as incomplete until it is whole, on the disk.

    Args:
        module: `transformers.trainer`.
    """
    trainer_class: Any = module.Trainer
    save = trainer_class._save_checkpoint

    @functools.wraps(save)
    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        from kt_sft.experts import CpuExperts

        if not self.args.should_save or not any(isinstance(part, CpuExperts) for part in self.model.modules()):
            save(self, model, trial)
            return
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        (folder / _STATE).unlink(missing_ok=True)
        with _written_last(self.state, folder):
            save(self, model, trial)

    trainer_class._save_checkpoint = _save_checkpoint


@contextlib.contextmanager
def _written_last(state: Any, folder: Path) -> Iterator[None]:
    """While it lasts, `state` is saved when the rest of the checkpoint in `folder` is on the disk."""
    save = state.save_to_json

    def save_to_json(json_path: str) -> None:
        write_out_folder(folder)
        save(json_path)
        write_out_folder(folder)
        write_out(folder.parent)

    state.save_to_json = save_to_json  # of this one state, not of its class: no field, and not saved with the others
    try:
        yield
    finally:
        del state.save_to_json


def settle_resumed(training_args: Any, stage: str) -> str | None:
    """Decides what a run resumes from; returns the folder, or None where training starts anew.

    Where the recipe names no folder, the newest complete one is taken, and a warning names those that are skipped.

    Args:
        training_args: As LLaMA-Factory has parsed them; `resume_from_checkpoint` is changed.
        stage: LLaMA-Factory's name of what is trained.

    Raises:
        ConfigError: The recipe asks for the last checkpoint, and none is complete.
    """
    resumed = training_args.resume_from_checkpoint if training_args.do_train else None
    if not resumed:
        return None
    if resumed is not True and not isinstance(resumed, FoundCheckpoint):
        return resumed
    complete, skipped = _newest_complete(training_args, stage)
    if complete is None and resumed is True:
        raise ConfigError(
            f"kt_sft: resume_from_checkpoint asks for the last checkpoint in {training_args.output_dir}, where none is "
            f"complete ({'; '.join(skipped) or 'there is none'}); leave it out to start from the beginning"
        )
    if skipped and local_rank_and_size()[0] == 0:
        logger.warning(
            "skipped as incomplete, as after a kill: %s; training %s",
            "; ".join(skipped),
            f"resumes from {complete}" if complete else "starts from the beginning",
        )
    training_args.resume_from_checkpoint = complete
    return complete


def check_complete(folder: str, training_args: Any, stage: str) -> None:
    """Refuses to resume from a checkpoint that is damaged or lacks something.

    Raises:
        ConfigError: It does.
    """
    defect = _defect(Path(folder), training_args, stage)
    if defect is not None:
        raise ConfigError(
            f"kt_sft: resume_from_checkpoint {folder} is no complete checkpoint: {defect}; name another one, or start "
            "a new run from its adapter, if that is whole, with adapter_name_or_path"
        )


def _newest_complete(training_args: Any, stage: str) -> tuple[str | None, list[str]]:
    """The folder, and what is wrong with the newer ones."""
    root = Path(training_args.output_dir)
    skipped: list[str] = []
    entries = root.iterdir() if root.is_dir() else ()
    numbered = [(int(match[1]), entry) for entry in entries if (match := _NUMBERED.fullmatch(entry.name))]
    for _, folder in sorted(numbered, reverse=True):
        if not folder.is_dir():
            continue
        defect = _defect(folder, training_args, stage)
        if defect is None:
            return os.fspath(folder), skipped
        skipped.append(f"{folder} ({defect})")
    return None, skipped


def _defect(folder: Path, training_args: Any, stage: str) -> str | None:
    """What keeps a run from resuming from a folder as if it had not been interrupted; None if nothing does."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        steps = json.loads((folder / _STATE).read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{_STATE}, which is written last, is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_STATE} cannot be read ({error!r})"
    if not isinstance(steps, int):
        return f"{_STATE} does not say the number of steps"
    adapters = [*folder.glob(_ADAPTER), *folder.glob(f"*/{_ADAPTER}")]  # of several each has a folder of its own
    if not adapters:
        return f"{_ADAPTER} is missing"
    if stage == "rm" and not (folder / VALUE_HEAD).is_file():
        return f"{VALUE_HEAD} is missing"
    for file in sorted({*adapters, *folder.glob("*.safetensors")}):
        try:
            read_header(file)
        except CheckpointError as error:
            return str(error)
    if not training_args.save_only_model and not training_args.deepspeed:
        for name in (*_RESUMED_STATES, *_random_states(folder, training_args)):
            if not (folder / name).is_file():
                return f"{name} is missing"
    for file in sorted({*folder.glob("*.pt"), *folder.glob("*.pth")}):
        if not zipfile.is_zipfile(file):  # torch.save writes archives, their directory last
            return f"{file.name} is cut off"
    return None


def _random_states(folder: Path, training_args: Any) -> list[str]:
    """The files of random numbers that a checkpoint must have: of each process of this machine, or of the one there is.

    A run may go on with another number of processes than it was started with. Its random numbers then begin anew, as
    the Trainer says; what the other run must have left is asked for all the same.
    """
    ranks = {int(match[1]) for file in folder.iterdir() if (match := _RANDOM_OF_RANK.fullmatch(file.name))}
    if training_args.world_size > 1 and (ranks or not (folder / _RANDOM).is_file()):
        local_rank, processes = local_rank_and_size()
        first = training_args.process_index - local_rank
        return [f"rng_state_{rank}.pth" for rank in range(first, first + processes)]
    if training_args.world_size == 1 and ranks and not (folder / _RANDOM).is_file():
        return [f"rng_state_{rank}.pth" for rank in range(max(2, max(ranks) + 1))]
    return [_RANDOM]

"""A `llamafactory-cli train` that is killed with SIGKILL while it writes a checkpoint, and the run after it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import BIN, ENVIRONMENT, run_command, train_losses
from safetensors.torch import load_file

BLOCK: dict[str, Any] = {"kt_sft": {"lora_experts": True}, "lora_target": "all", "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def whole(base_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of four steps, with checkpoints after the second and the fourth."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(base_recipe | BLOCK | {"output_dir": str(folder / "out")}))
    result = run_command(["llamafactory-cli", "train", str(recipe)])
    assert result.returncode == 0, result.stdout
    return folder / "out"


def kill_while_writing(file: Path, recipe: Path, log: Path) -> None:
    """Trains until something is being written to `file`, kills the process, and leaves there what had been written.

    A named pipe stands in the file's place: it says when writing begins, and holds it up there.
    """
    os.mkfifo(file)
    pipe = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    environment = os.environ | ENVIRONMENT
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(BIN / "llamafactory-cli"), "train", str(recipe)], env=environment, stdout=output, stderr=output
        )
    try:
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        assert poll.poll(180_000), log.read_text()
    finally:
        process.kill()
        assert process.wait(timeout=30) == -signal.SIGKILL, log.read_text()
    written = os.read(pipe, 1 << 20)
    os.close(pipe)
    file.unlink()
    file.write_bytes(written)


def test_a_run_after_a_kill_resumes_from_the_newest_complete_checkpoint(
    whole: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Of an earlier run: its files must not complete the ones of the run that writes over them.
    shutil.copytree(whole / "checkpoint-4", out / "checkpoint-4")
    (out / "checkpoint-4" / "optimizer.pt").unlink()

    kill_while_writing(out / "checkpoint-4" / "optimizer.pt", write_recipe(**BLOCK), tmp_path / "log")

    assert (out / "checkpoint-2" / "trainer_state.json").is_file()
    assert not (out / "checkpoint-4" / "trainer_state.json").exists()
    result = run_command(["llamafactory-cli", "train", str(write_recipe(**BLOCK, overwrite_output_dir=None))])
    assert result.returncode == 0, result.stdout
    skipped = f"skipped as incomplete, as after a kill: {out / 'checkpoint-4'} (trainer_state.json"
    assert skipped in result.stdout
    assert f"training resumes from {out / 'checkpoint-2'}" in result.stdout
    assert train_losses(out) == train_losses(whole)
    for folder in ("", "checkpoint-4"):
        resumed, reference = (load_file(run / folder / "adapter_model.safetensors") for run in (out, whole))
        assert all(torch.equal(resumed[key], reference[key]) for key in reference)

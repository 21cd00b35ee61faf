"""A `llamafactory-cli train` that is killed with SIGKILL while it writes a checkpoint, and the run after it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from commands import BIN, ENVIRONMENT, LORA_EXPERTS, run_command, train_losses
from safetensors.torch import load_file


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
    lora_experts_run: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Of an earlier run: its files must not complete the ones of the run that writes over them.
    shutil.copytree(lora_experts_run / "checkpoint-4", out / "checkpoint-4")
    (out / "checkpoint-4" / "optimizer.pt").unlink()

    kill_while_writing(out / "checkpoint-4" / "optimizer.pt", write_recipe(**LORA_EXPERTS), tmp_path / "log")

    assert (out / "checkpoint-2" / "trainer_state.json").is_file()
    assert not (out / "checkpoint-4" / "trainer_state.json").exists()
    result = run_command(["llamafactory-cli", "train", str(write_recipe(**LORA_EXPERTS, overwrite_output_dir=None))])
    assert result.returncode == 0, result.stdout
    skipped = f"skipped as incomplete, as after a kill: {out / 'checkpoint-4'} (trainer_state.json"
    assert skipped in result.stdout
    assert f"training resumes from {out / 'checkpoint-2'}" in result.stdout
    assert train_losses(out) == train_losses(lora_experts_run)
    for folder in ("", "checkpoint-4"):
        resumed, reference = (load_file(run / folder / "adapter_model.safetensors") for run in (out, lora_experts_run))
        assert all(torch.equal(resumed[key], reference[key]) for key in reference)

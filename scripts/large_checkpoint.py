#!/usr/bin/env python
"""A checkpoint larger than this machine's memory: planned, quantised to a store that fits, and trained on from there.

    scripts/large_checkpoint.py --gb 40

1. Writes a checkpoint of Qwen3-30B-A3B's layers in BF16, as many as `--gb` takes. Its files are sparse: of each expert
   the first rows of its matrices are random and the others zero, and take no room on the disk.
2. `kt-sft plan` says what training on it needs.
3. `kt-sft quantize` makes a store of INT4 experts of it, `kt-sft verify` reads that again.
4. `llamafactory-cli train` takes a few steps on the store from where it lies (`store: mapped`).

Prints, and writes to report.json, how long each took and the most memory that its processes had at one time, without
pages of files, which the system takes back when it needs them. Exit status: 0, or 1 where a step fails or takes more
than `--most-gb`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
_BIN = Path(sys.executable).parent
_MODEL = "qwen3-30b-a3b"
#: Rows of each expert's matrix that are not zero.
_ROWS = 32
_LOOK = 0.1  # seconds


def write_checkpoint(folder: Path, bytes_wanted: int) -> int:
    """Writes a sparse checkpoint of at least that size, one file a layer; returns its bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    from kt_sft.cli.compare_model import ModelRequest, architecture, random_values, write_text, write_tokenizer

    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder)
    shape = ModelRequest(_MODEL).shape
    layers = math.ceil(bytes_wanted / (2 * shape.experts * shape.expert_weights))
    config = architecture(ModelRequest(_MODEL, layers=layers), vocabulary)
    config.dtype = "bfloat16"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shards: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        number = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{number}.safetensors", {})[name] = tensor
    generator = torch.Generator().manual_seed(0)
    for file, tensors in shards.items():
        _write_shard(folder / file, tensors, lambda name, like: random_values(name, like, generator))
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    write_text(folder / "data", 1 << 14)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _write_shard(path: Path, tensors: dict[str, Any], values: Any) -> None:
    import torch

    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.numel()]}
        at += 2 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + at)
        for name, tensor in tensors.items():
            first = start + header[name]["data_offsets"][0]
            if tensor.dim() < 3:
                file.seek(first)
                file.write(values(name, tensor).view(torch.uint8).numpy().tobytes())
                continue
            experts, rows, columns = tensor.shape
            for expert in range(experts):
                file.seek(first + 2 * expert * rows * columns)
                file.write(values(name, tensor[0, :_ROWS]).view(torch.uint8).numpy().tobytes())


class Watched:
    """Runs commands and looks at the memory of each and of the processes that it starts."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.steps: list[dict[str, Any]] = []

    def run(self, name: str, *command: str, statuses: tuple[int, ...] = (0,)) -> str:
        """A command of this interpreter's folder; its output. Raises RuntimeError where it fails."""
        log, errors = self._out / f"{name}.log", self._out / f"{name}.err"
        start, peak, over = time.monotonic(), 0, threading.Event()
        with log.open("w") as output, errors.open("w") as stderr:
            arguments = [str(_BIN / command[0]), *command[1:]]
            process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=output, stderr=stderr)
            while process.poll() is None:
                peak = max(peak, _unshared_bytes(process.pid))
                over.wait(_LOOK)
        self.steps.append({"step": name, "seconds": time.monotonic() - start, "peak_gb": peak / 1e9})
        if process.returncode not in statuses:
            raise RuntimeError(f"{name} failed with exit status {process.returncode}; its output: {log}, {errors}")
        return log.read_text(encoding="utf-8")


def _unshared_bytes(pid: int) -> int:
    """Memory of a process and its children that is no page of a file."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += 1024 * int(line.split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return total
    return total + sum(_unshared_bytes(int(child)) for child in children)


def training(out: Path, model: Path) -> Path:
    """Writes the recipe of a few steps on a model; returns its file."""
    recipe = yaml.safe_load((REPOSITORY / "recipes/compare/lora.yaml").read_text(encoding="utf-8"))
    recipe |= {
        "model_name_or_path": str(model),
        "dataset_dir": str(out / "checkpoint" / "data"),
        "output_dir": str(out / "trained"),
        "cutoff_len": 256,
        "max_steps": 3,
        "gradient_accumulation_steps": 1,
        "plot_loss": False,
        "use_cpu": True,
        "kt_sft": {"expert_format": "auto", "store": "mapped"},
    }
    path = out / f"{model.name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saves/large"))
    parser.add_argument("--gb", type=float, default=40.0, help="of BF16 weights in experts, 10^9 bytes")
    parser.add_argument("--most-gb", type=float, default=8.0, help="the most memory that a step may take")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    checkpoint, store = out / "checkpoint", out / "store"
    if out.exists() and any(out.iterdir()) and not (checkpoint / "config.json").is_file():
        parser.error(f"{out} holds something else; give a new folder")
    shutil.rmtree(out, ignore_errors=True)
    console, watched = Console(), Watched(out)
    size = write_checkpoint(checkpoint, int(options.gb * 1e9))
    console.print(f"checkpoint: {size / 1e9:.1f} GB")
    try:
        plans = {}
        for name, model in (("plan_checkpoint", checkpoint), ("plan_store", store)):
            recipe = str(training(out, model))
            if model is store:
                watched.run("quantize", "kt-sft", "quantize", str(checkpoint), str(store), "--format", "int4")
                watched.run("verify", "kt-sft", "verify", str(store))
            text = watched.run(name, "kt-sft", "plan", recipe, "--json", "--no-measure", statuses=(0, 1))
            plans[name] = json.loads(text[text.index("{") :])
        watched.run("train", "llamafactory-cli", "train", str(training(out, store)))
    except RuntimeError as error:
        print(f"large_checkpoint: {error}", file=sys.stderr)
        return 1
    history = json.loads((out / "trained" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    stored = sum(file.stat().st_size for file in store.glob("*.safetensors"))
    report = {"checkpoint_bytes": size, "store_bytes": stored, "steps": watched.steps, "losses": losses, "plans": plans}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"{size / 1e9:.1f} GB of weights, a store of {stored / 1e9:.1f} GB")
    for heading in ("step", "seconds", "most memory, GB"):
        table.add_column(heading)
    for step in watched.steps:
        table.add_row(step["step"], f"{step['seconds']:.0f}", f"{step['peak_gb']:.2f}")
    console.print(table)
    console.print(f"losses: {losses}")
    bad = [step["step"] for step in watched.steps if step["peak_gb"] > options.most_gb]
    bad += [] if all(map(math.isfinite, losses)) and len(losses) == 3 else ["train"]
    if bad:
        console.print(f"[red]missed: {', '.join(bad)}[/]")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

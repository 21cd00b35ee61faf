#!/usr/bin/env python
"""How fast experts are loaded, beside what this machine's disk and memory allow, and what mapped ones cost.

Writes checkpoints of a Qwen3-MoE with random experts, then measures, in one run:

- the bounds: threads that only read the files, from the disk (their pages dropped first) and from memory, into new
  memory;
- resident loading, cold and warm, of experts kept as they are (BF16, FP8, INT4 of compressed-tensors) and quantised on
  the way (BF16 to INT8 and INT4), in bytes of the checkpoint a second;
- mapped start-up: `from_pretrained` with `store: mapped` of a sparse checkpoint, after Python's imports;
- forward and backward of a layer, mapped (its pages in memory) against resident, in turn.

Run it on a quiet machine. Exit status: 0, or 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

import kt_sft
from kt_sft.engine.cpus import usable_cpus
from kt_sft.engine.store import LayerStore
from kt_sft.loading.checkpoint import Checkpoint
from kt_sft.loading.layout import find_experts
from kt_sft.loading.mapping import ModulePlan, plan_experts
from kt_sft.loading.sources.entries import resolve_storage
from kt_sft.loading.sources.methods import fold_tensors
from kt_sft.loading.streaming import stream

HIDDEN, INTERMEDIATE, EXPERTS = 2048, 768, 64
CHUNK = 4 << 20
#: The targets: of the bound, in seconds, and mapped time over resident time.
LEAST_OF_BOUND, MOST_STARTUP, MOST_MAPPED = 0.70, 5.0, 1.05

#: How a weight [R, C] is stored -> its tensors: suffix, dtype, shape; and the quantization_config.
Tensors = Callable[[int, int], list[tuple[str, str, tuple[int, ...]]]]
SOURCES: dict[str, tuple[Tensors, dict[str, Any] | None]] = {
    "bf16": (lambda r, c: [("", "BF16", (r, c))], None),
    "fp8": (
        lambda r, c: [("", "F8_E4M3", (r, c)), ("_scale_inv", "F32", (-(-r // 128), -(-c // 128)))],
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ),
    "int4": (
        lambda r, c: [("_packed", "I32", (r, c // 8)), ("_scale", "BF16", (r, c // 32)), ("_shape", "I64", (2,))],
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
            },
        },
    ),
}
BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "I32": 4, "I64": 8}


def config_of(layers: int) -> Qwen3MoeConfig:
    """A model with experts and little else."""
    return Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=64,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def meta_model(config: Qwen3MoeConfig) -> Qwen3MoeForCausalLM:
    """Without weights."""
    with torch.device("meta"):
        return Qwen3MoeForCausalLM(config)


def content(dtype: str, shape: tuple[int, ...], matrix: tuple[int, int]) -> bytes:
    """Values that a weight of `matrix` may have: random codes, scales of one."""
    if dtype == "I64":
        return torch.tensor(matrix).numpy().tobytes()
    if dtype == "BF16" and shape == matrix:
        values = torch.randn(shape).mul_(0.02).bfloat16()
    elif dtype in ("BF16", "F32"):
        values = torch.full(shape, 2.0**-7, dtype=torch.bfloat16 if dtype == "BF16" else torch.float32)
    else:
        top = 0x77 if dtype == "F8_E4M3" else 256
        values = torch.randint(0, top, (torch.Size(shape).numel() * BYTES[dtype],), dtype=torch.uint8)
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def write(folder: Path, source: str, layers: int, *, sparse: bool = False) -> list[Path]:
    """A checkpoint in shards of one layer; of a sparse one only headers and what else is small take room."""
    folder.mkdir(parents=True)
    config, (tensors_of, quantization) = config_of(layers), SOURCES[source]
    settings = config.to_dict() | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(settings))
    shards: list[dict[str, tuple[str, tuple[int, ...], tuple[int, int] | None]]] = [{}]  # dtype, shape, its matrix
    for key, value in meta_model(config).state_dict().items():
        if ".experts." not in key:
            shards[0][key] = ("BF16", tuple(value.shape), None)
    for layer in range(layers):
        shards.append({})
        for expert in range(EXPERTS):
            for name, matrix in (
                ("gate", (INTERMEDIATE, HIDDEN)),
                ("up", (INTERMEDIATE, HIDDEN)),
                ("down", (HIDDEN, INTERMEDIATE)),
            ):
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
                for suffix, dtype, shape in tensors_of(*matrix):
                    shards[-1][stem + suffix] = (dtype, shape, matrix)
    known: dict[Any, bytes] = {}
    weight_map, files = {}, []
    for number, shard in enumerate(shards):
        files.append(folder / f"model-{number:05}.safetensors")
        weight_map |= dict.fromkeys(shard, files[-1].name)
        header, place = {}, 0
        for key, (dtype, shape, _) in shard.items():
            size = torch.Size(shape).numel() * BYTES[dtype]
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
            place += size
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with files[-1].open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            start = file.tell()
            for key, (dtype, shape, matrix) in shard.items():
                if matrix is None or (sparse and dtype in ("BF16", "F8_E4M3", "I32") and shape[-1] > 64):
                    continue
                kind = (dtype, shape, matrix)
                known.setdefault(kind, content(*kind))
                file.seek(start + header[key]["data_offsets"][0])
                file.write(known[kind])
            file.truncate(start + place)
            file.flush()
            os.fsync(file.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def drop(files: list[Path]) -> None:
    """Takes the files' pages out of memory."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(files: list[Path]) -> None:
    """Reads files into new memory with every CPU, and does nothing else: the bound."""
    size = sum(path.stat().st_size for path in files)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view, jobs, place = memoryview(memory), [], 0
    for path in files:
        length = path.stat().st_size
        jobs += [(path, at, place + at, min(16 * CHUNK, length - at)) for at in range(0, length, 16 * CHUNK)]
        place += length

    def read(job: tuple[Path, int, int, int]) -> None:
        path, at, to, count = job
        with path.open("rb", buffering=0) as file:
            while count:
                got = os.preadv(file.fileno(), [view[to : to + min(count, CHUNK)]], at)
                at, to, count = at + got, to + got, count - got

    with ThreadPoolExecutor(min(16, 2 * len(usable_cpus()))) as pool:
        list(pool.map(read, jobs))
    view.release()
    memory.close()


@dataclass
class Work:
    """A checkpoint's experts and how they are to be stored."""

    plans: list[ModulePlan]
    storages: list[dict[str, Any]]

    def load(self) -> None:
        """Fills new stores, as loading a model does."""
        work = []
        for plan, storage in zip(self.plans, self.storages, strict=True):
            layout = plan.layout
            sizes = {"num_experts": layout.num_experts, "hidden_size": layout.hidden_size}
            store = LayerStore(
                **sizes, intermediate_size=layout.intermediate_size, activation=layout.activation, **storage
            )
            work.append((plan, store))
        stream(work, shown=False)


def work_of(files: list[Path], source: str, layers: int, expert_format: str) -> Work:
    """What loading makes of the headers."""
    model, checkpoint, quantization = meta_model(config_of(layers)), Checkpoint(files), SOURCES[source][1]
    if quantization is not None:
        checkpoint.tensors = fold_tensors(checkpoint.tensors, quantization)
    plans = plan_experts(model, find_experts(model), checkpoint, get_model_conversion_mapping(model))
    config = kt_sft.KTConfig(expert_format=expert_format)
    return Work(plans, [resolve_storage(plan, config) for plan in plans])


def seconds(function: Callable[[], object], before: Callable[[], object], repeats: int) -> float:
    """The least of several times, for what else the machine does only adds to them."""

    def times() -> Iterator[float]:
        for _ in range(repeats):
            before()
            start = time.perf_counter()
            function()
            yield time.perf_counter() - start

    return min(times())


def measure_rates(folder: Path, gib: float, repeats: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """GB/s of each way to load, and of only reading the same files."""
    rows = []
    for source, formats in (("bf16", ("auto", "int8", "int4")), ("fp8", ("auto",)), ("int4", ("auto",))):
        per_layer = sum(
            torch.Size(shape).numel() * BYTES[dtype]
            for r, c in ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
            for _, dtype, shape in SOURCES[source][0](r, c)
        )
        layers = max(1, round(gib * 2**30 / (per_layer * EXPERTS)))
        target = folder / source
        note(f"writing {layers} layers of {source}")
        files = write(target, source, layers)
        size = sum(path.stat().st_size for path in files)
        states: dict[str, Callable[[], object]] = {"cold": lambda files=files: drop(files), "warm": lambda: None}
        for state, before in states.items():
            if state == "warm":
                read_all(files)
            bound = size / seconds(lambda files=files: read_all(files), before, repeats)
            for expert_format in formats:
                note(f"{source} -> {expert_format}, {state}")
                work = work_of(files, source, layers, expert_format)
                rate = size / seconds(work.load, before, repeats)
                rows.append(
                    {
                        "source": source,
                        "format": expert_format,
                        "state": state,
                        "gb_per_second": rate / 1e9,
                        "bound_gb_per_second": bound / 1e9,
                        "share": rate / bound,
                    }
                )
        shutil.rmtree(target)
    return rows


def measure_startup(folder: Path, gib: float, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of `from_pretrained` with mapped experts, of a sparse checkpoint."""
    rows = []
    for source in ("bf16", "fp8", "int4"):
        bytes_per_weight = {"bf16": 2, "fp8": 1, "int4": 0.5625}[source]
        layers = max(1, round(gib * 1e9 / (EXPERTS * 3 * HIDDEN * INTERMEDIATE * bytes_per_weight)))
        note(f"mapping {gib:g} GB of {source}: {layers} layers")
        files = write(folder / source, source, layers, sparse=True)
        found = {}
        for state in ("cold", "warm"):
            if state == "cold":
                drop(files)
            start = time.perf_counter()
            config = kt_sft.KTConfig(store="mapped")
            model = AutoModelForCausalLM.from_pretrained(
                folder / source, dtype=torch.bfloat16, quantization_config=config
            )
            found[f"{state}_seconds"] = time.perf_counter() - start
            del model
        rows.append({"source": source, "gb": sum(path.stat().st_size for path in files) / 1e9, **found})
        shutil.rmtree(folder / source)
    return rows


def measure_passes(folder: Path, repeats: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of forward and backward of one layer, mapped and resident, in turn."""
    rows = []
    for source in ("bf16", "fp8", "int4"):
        files = write(folder / source, source, 1)
        layers = {}
        for store in ("resident", "mapped"):
            drop(files)  # pages that a write has left in memory are small ones
            layers[store] = AutoModelForCausalLM.from_pretrained(
                folder / source, dtype=torch.bfloat16, quantization_config=kt_sft.KTConfig(store=store)
            ).get_submodule("model.layers.0.mlp.experts")
        layers["mapped"].dequantized()  # reads all pages
        for tokens in (8, 64, 512):
            note(f"{source}, {tokens} tokens")
            x = torch.randn(tokens, HIDDEN).bfloat16().requires_grad_()
            index = torch.rand(tokens, EXPERTS).argsort(dim=1)[:, :8]
            weights = torch.full((tokens, 8), 0.125)
            times: dict[str, list[tuple[float, float]]] = {store: [] for store in layers}
            for turn in range(repeats * 3 + 1):
                for store, layer in layers.items():
                    start = time.perf_counter()
                    y = layer(x, index, weights)
                    middle = time.perf_counter()
                    y.backward(torch.ones_like(y))
                    if turn:  # the first reads pages, and takes memory
                        times[store].append((middle - start, time.perf_counter() - middle))
            forward, backward = ({s: min(part[i] for part in times[s]) for s in times} for i in (0, 1))
            rows.append(
                {
                    "source": source,
                    "tokens": tokens,
                    "forward": forward["mapped"] / forward["resident"],
                    "backward": backward["mapped"] / backward["resident"],
                }
            )
        del layers
        shutil.rmtree(folder / source)
    return rows


def show(console: Console, report: dict[str, Any]) -> bool:
    """Prints the tables; True where every target is reached."""
    reached = True

    def mark(value: str, good: bool) -> str:
        nonlocal reached
        reached = reached and good
        return value if good else f"[red]{value}[/]"

    table = Table("checkpoint", "stored as", "pages", "GB/s", "only reading, GB/s", "share", title="resident loading")
    for row in report["rates"]:
        share = mark(f"{row['share']:.2f}", row["share"] >= LEAST_OF_BOUND)
        rates = (f"{row['gb_per_second']:.2f}", f"{row['bound_gb_per_second']:.2f}")
        table.add_row(row["source"], row["format"], row["state"], *rates, share)
    console.print(table)
    table = Table("checkpoint", "GB", "cold, s", "warm, s", title="mapped start-up")
    for row in report["startup"]:
        times = (mark(f"{row[key]:.2f}", row[key] <= MOST_STARTUP) for key in ("cold_seconds", "warm_seconds"))
        table.add_row(row["source"], f"{row['gb']:.1f}", *times)
    console.print(table)
    table = Table("checkpoint", "tokens", "forward", "backward", title="mapped time / resident time, pages in memory")
    for row in report["passes"]:
        ratios = (mark(f"{row[key]:.3f}", row[key] <= MOST_MAPPED) for key in ("forward", "backward"))
        table.add_row(row["source"], str(row["tokens"]), *ratios)
    console.print(table)
    shares = [row["share"] for row in report["rates"]]
    if shares:
        console.print(f"median share of the bound: {statistics.median(shares):.2f}", highlight=False)
    return reached


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a temporary one if not given")
    parser.add_argument("--gib", type=float, default=2.0, help="of each checkpoint that is loaded")
    parser.add_argument("--mapped-gb", type=float, default=10.0, help="of each sparse checkpoint that is mapped")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--parts", nargs="+", choices=("rates", "startup", "passes"), default=["rates", "startup", "passes"]
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    console = Console()

    def note(line: str) -> None:
        console.print(f"[dim]{line} ...[/]", highlight=False)

    report: dict[str, Any] = {"machine": kt_sft.system_info(), "rates": [], "startup": [], "passes": []}
    with tempfile.TemporaryDirectory(prefix="kt_sft-loading-", dir=options.folder) as name:
        folder = Path(name)
        if "rates" in options.parts:
            report["rates"] = measure_rates(folder, options.gib, options.repeats, note)
        if "startup" in options.parts:
            report["startup"] = measure_startup(folder, options.mapped_gb, note)
        if "passes" in options.parts:
            report["passes"] = measure_passes(folder, options.repeats, note)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if show(console, report) else 1


if __name__ == "__main__":
    sys.exit(main())

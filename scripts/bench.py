"""Measures the expert engine on this machine against the experts of stock transformers.

One layer of the given size, BF16, frozen weights, every expert with the same number of rows, and more weights than the
caches hold. Engine and stock run in turn within each repetition, so a disturbance of a shared machine meets both; the
figures are medians. "of peak" is the share of the peak that system_info() measured, "GB/s" counts every weight once a
pass, "ratio" is engine over stock. Backward gives the gradients of hidden states and routing weights, from retained
activations.

    .venv/bin/python scripts/bench.py                      # this machine's best tier
    .venv/bin/python scripts/bench.py --tiers all          # every tier it has, one process each
    .venv/bin/python scripts/bench.py --json bench.json    # the figures as JSON as well
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import kt_sft
from kt_sft.config import TIERS


@dataclasses.dataclass(frozen=True)
class LayerSize:
    """One MoE layer: sizes as in DESIGN's terms, H, I, E and K."""

    hidden: int
    intermediate: int
    experts: int
    slots: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all experts in BF16."""
        return self.experts * 3 * self.hidden * self.intermediate * 2

    def flops(self, rows_per_expert: int) -> float:
        """Floating-point operations of one pass; forward and backward without weight gradients need the same."""
        return 2.0 * 3 * self.hidden * self.intermediate * self.experts * rows_per_expert


class Contender:
    """One implementation of the layer under measurement.

    Args:
        name: What the table calls it.
        layer: Called with (hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]).
    """

    def __init__(self, name: str, layer: Callable[[Tensor, Tensor, Tensor], Tensor]):
        self.name = name
        self.layer = layer
        self.forward_seconds: list[float] = []
        self.backward_seconds: list[float] = []

    def run(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, grad_TH: Tensor) -> None:
        """One forward and backward, timed."""
        x_TH = hidden_TH.clone().requires_grad_()
        w_TK = weights_TK.clone().requires_grad_()
        start = time.perf_counter()
        y_TH = self.layer(x_TH, index_TK, w_TK)
        middle = time.perf_counter()
        y_TH.backward(grad_TH)
        end = time.perf_counter()
        self.forward_seconds.append(middle - start)
        self.backward_seconds.append(end - middle)


def make_weights(size: LayerSize) -> tuple[Tensor, Tensor]:
    """Random BF16 weights [E, 2I, H] and [E, H, I], scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.empty(size.experts, 2 * size.intermediate, size.hidden, dtype=torch.bfloat16)
    down = torch.empty(size.experts, size.hidden, size.intermediate, dtype=torch.bfloat16)
    gate_up.normal_(0, size.hidden**-0.5, generator=generator)
    down.normal_(0, size.intermediate**-0.5, generator=generator)
    return gate_up, down


def stock_experts(size: LayerSize, gate_up: Tensor, down: Tensor) -> nn.Module:
    """The experts module of transformers' Qwen3-MoE over the given weights, as `from_pretrained` would set it up."""
    config = Qwen3MoeConfig(
        hidden_size=size.hidden,
        moe_intermediate_size=size.intermediate,
        num_experts=size.experts,
        num_experts_per_tok=size.slots,
    )
    # What transformers chooses for a model of its own; without it the slower loop over experts would run.
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(down, requires_grad=False)
    return module


def balanced_batch(size: LayerSize, rows_per_expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens that give every expert `rows_per_expert` rows: hidden, index, weights and the output's gradient."""
    tokens = size.experts * rows_per_expert // size.slots
    generator = torch.Generator().manual_seed(rows_per_expert)
    hidden_TH = torch.empty(tokens, size.hidden, dtype=torch.bfloat16).normal_(generator=generator)
    grad_TH = torch.empty(tokens, size.hidden, dtype=torch.bfloat16).normal_(generator=generator)
    index_TK = (torch.arange(tokens * size.slots) % size.experts).view(tokens, size.slots)
    weights_TK = torch.full((tokens, size.slots), 1.0 / size.slots)
    return hidden_TH, index_TK, weights_TK, grad_TH


def measure(size: LayerSize, rows: list[int], repeats: int, threads: int) -> dict[str, Any]:
    """Measures engine and stock for each number of rows per expert; medians in seconds and GFLOP/s."""
    torch.set_num_threads(threads)
    gate_up, down = make_weights(size)
    config = kt_sft.KTConfig(num_threads=threads)
    engine_layer = kt_sft.CpuExperts.from_weights(gate_up, down, config=config, activation="silu")
    stock_layer = stock_experts(size, gate_up, down)
    results = []
    for rows_per_expert in rows:
        batch = balanced_batch(size, rows_per_expert)
        contenders = [Contender("kt_sft", engine_layer), Contender("stock", stock_layer)]
        for repeat in range(repeats + 1):
            for contender in contenders:
                contender.run(*batch)
            if repeat == 0:  # warm-up: buffers grow, threads start
                for contender in contenders:
                    contender.forward_seconds.clear()
                    contender.backward_seconds.clear()
        entry: dict[str, Any] = {"rows_per_expert": rows_per_expert}
        for contender in contenders:
            for phase, seconds in (("forward", contender.forward_seconds), ("backward", contender.backward_seconds)):
                median = statistics.median(seconds)
                entry[f"{contender.name}_{phase}_s"] = median
                entry[f"{contender.name}_{phase}_gflops"] = size.flops(rows_per_expert) / median / 1e9
        results.append(entry)
    return {
        "system": kt_sft.system_info(),
        "threads": threads,
        "size": {**dataclasses.asdict(size), "weight_bytes": size.weight_bytes},
        "repeats": repeats,
        "results": results,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Prints one tier's table."""
    size = report["size"]
    console.print(
        f"tier [bold]{report['system']['tier']}[/], {report['threads']} threads, H {size['hidden']}, "
        f"I {size['intermediate']}, {size['experts']} experts, {size['weight_bytes'] / 2**20:.0f} MiB of weights, "
        f"medians of {report['repeats']}"
    )
    table = Table()
    for heading in ("rows per expert", "pass", "GFLOP/s", "of peak", "GB/s", "stock GFLOP/s", "ratio"):
        table.add_column(heading, justify="right")
    for phase in ("forward", "backward"):
        for entry in report["results"]:
            ours, stock = entry[f"kt_sft_{phase}_gflops"], entry[f"stock_{phase}_gflops"]
            table.add_row(
                str(entry["rows_per_expert"]),
                phase,
                f"{ours:.0f}",
                f"{ours / report['system']['peak_gflops']:.0%}",
                f"{size['weight_bytes'] / entry[f'kt_sft_{phase}_s'] / 1e9:.1f}",
                f"{stock:.0f}",
                f"{ours / stock:.2f}",
            )
        table.add_section()
    console.print(table)


def measure_in_own_process(tier: str, arguments: list[str]) -> dict[str, Any] | None:
    """Runs this script with `KT_SFT_ISA` set, which the engine reads once; None where the CPU lacks the tier."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, __file__, *arguments, "--tiers", "best", "--json", str(path), "--quiet"]
        subprocess.run(command, check=True, env={**os.environ, "KT_SFT_ISA": tier})
        report = json.loads(path.read_text())
    return report if report["system"]["tier"] == tier else None


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8, help="experts per token; must divide --experts")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="rows per expert")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tiers", choices=["best", "all"], default="best")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    options = parser.parse_args(arguments)
    if options.experts % options.slots:
        parser.error("--slots must divide --experts, so that every expert gets the same number of rows")
    return options


def main(arguments: list[str]) -> None:
    """Measures, prints, writes."""
    options = parse(arguments)
    console = Console(quiet=options.quiet)
    size = LayerSize(options.hidden, options.intermediate, options.experts, options.slots)
    if options.tiers == "best":
        reports = [measure(size, options.rows, options.repeats, options.threads)]
    else:
        passed = [
            *("--hidden", str(size.hidden), "--intermediate", str(size.intermediate)),
            *("--experts", str(size.experts), "--slots", str(size.slots)),
            *("--rows", *map(str, options.rows)),
            *("--repeats", str(options.repeats), "--threads", str(options.threads)),
        ]
        measured = [measure_in_own_process(tier, passed) for tier in TIERS]
        reports = [report for report in measured if report is not None]
    for report in reports:
        show(report, console)
    if options.json:
        options.json.write_text(json.dumps(reports if options.tiers == "all" else reports[0], indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

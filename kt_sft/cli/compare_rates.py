"""The speeds that the model of a step asks for, measured at the sizes that `kt-sft compare` trains.

`python -m kt_sft.cli.compare_rates REQUEST FILE`: a process of its own as it imports torch (see training_runs.py).
T tokens, K experts per token, E experts, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from kt_sft.cli.shapes import LayerShape, shape_of
from kt_sft.offload.step_model import Passes, Prediction, Rates, Work, crossover_tokens, predict, streamed

#: Bytes of experts that are measured: more than caches hold, less than a whole layer of the largest models.
_EXPERT_BYTES = 1 << 30
#: What of a recipe's block concerns the speed of one layer; the rest is about checkpoints and adapters.
_LAYER_SETTINGS = ("expert_format", "group_size", "zero_point", "compute", "num_threads", "activation_policy")
_REPEATS = 5


def work_of(folder: Path, cutoff: int, batch: int) -> Work:
    """One micro-batch's work for a local checkpoint.

    Args:
        folder: With config.json and safetensors files.
        cutoff: Tokens of a sequence.
        batch: Sequences.

    Raises:
        ShapeError: config.json does not say a size.
    """
    shape = shape_of(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config |= config.get("text_config") or {}
    heads = config.get("num_attention_heads", 0)
    head = config.get("v_head_dim") or config.get("head_dim") or (shape.hidden // heads if heads else 0)
    layers, dense, output = set(), 0, 0
    for name, sizes in _tensors(folder):
        if (found := re.search(r"layers\.(\d+)\..*experts\.", name)) and "shared" not in name:
            layers.add(found.group(1))
        elif len(sizes) == 2 and "embed" not in name:
            dense, output = (dense, sizes[0] * sizes[1]) if "lm_head" in name else (dense + sizes[0] * sizes[1], output)
    return Work(
        tokens=cutoff * batch,
        sequence=cutoff,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        experts=shape.experts,
        top_k=shape.top_k,
        layers=len(layers),
        dense_weights=dense / len(layers),
        attention_size=heads * head,
        head_weights=output or config.get("vocab_size", 0) * shape.hidden,
    )


def _tensors(folder: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of a checkpoint's tensors, from the heads of its files."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            head = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        found += [(name, tensor["shape"]) for name, tensor in head.items() if name != "__metadata__"]
    return found


def predicted(
    work: dict[str, Any], rates: dict[str, Any], checkpointing: bool, micro_batches: int, *, retained: bool
) -> dict[str, Any]:
    """What the model says of a workload.

    Args:
        work: `Work`'s fields.
        rates: `Rates`' fields, measured.
        checkpointing: Whether forward runs twice.
        micro_batches: Of a step.
        retained: Whether the experts keep what backward needs, so that their forward runs once all the same.

    Returns:
        `work`, `rates`, the fields of `Prediction`, its `gain` and `most_gain`, and, where there is a link, `streamed`
        (seconds of a step that streams the experts) and `crossover_tokens`.
    """
    task, speeds = Work(**work), Rates(**rates)
    passes = Passes(2 if checkpointing else 1, 2 if checkpointing and not retained else 1)
    found: Prediction = predict(task, speeds, passes, micro_batches)
    result = {"work": work, "rates": rates, **dataclasses.asdict(found), "streamed": None, "crossover_tokens": None}
    result |= {"gain": found.gain, "most_gain": found.most_gain}
    if speeds.link is not None:
        result["streamed"] = micro_batches * streamed(task, speeds, 3 if checkpointing else 2)
        result["crossover_tokens"] = crossover_tokens(task, speeds)
    return result


def measure(work: Work, settings: dict[str, Any]) -> Rates:
    """Measures the engine, the accelerator (or torch on the CPU), and the link, at a workload's sizes."""
    import torch

    from kt_sft.planning.rates import link_rate

    forward, backward = _engine_rates(work, settings)
    if not torch.accelerator.is_available():
        return Rates(forward, backward, _dense_rate(work, "cpu"))
    device = str(torch.accelerator.current_accelerator())
    return Rates(forward, backward, _dense_rate(work, device), link_rate(device))


def _engine_rates(work: Work, settings: dict[str, Any]) -> tuple[float, float]:
    """FLOP/s forward and backward of a layer whose experts get as many rows each as in training."""
    from kt_sft.cli.contenders import LayerContender, balanced_batch, random_weights
    from kt_sft.config import KTConfig
    from kt_sft.experts import CpuExperts

    affordable = _EXPERT_BYTES // (2 * 3 * work.hidden * work.intermediate) // work.top_k * work.top_k
    experts = min(work.experts // work.top_k * work.top_k, max(affordable, work.top_k))
    shape = LayerShape("measured", work.hidden, work.intermediate, experts, work.top_k)
    rows = max(1, round(work.tokens * work.top_k / work.experts))
    config = KTConfig(**{key: value for key, value in settings.items() if key in _LAYER_SETTINGS})
    layer = CpuExperts.from_weights(*random_weights(shape), config=config)
    contender = LayerContender("engine", "", layer)
    contender.prepare(balanced_batch(shape, rows))
    contender.run(backward=True)
    runs = [contender.run(backward=True) for _ in range(_REPEATS)]
    flops = shape.flops(rows)
    forward = flops / statistics.median(run["forward"] for run in runs)
    return forward, flops / statistics.median(run["backward"] for run in runs)


def _dense_rate(work: Work, device: str) -> float:
    """FLOP/s of BF16 products of T tokens with a matrix of a layer's usual size."""
    import torch

    from kt_sft.planning.rates import seconds_of

    x = torch.randn(work.tokens, work.hidden, device=device).to(torch.bfloat16)
    weight = torch.randn(2 * work.hidden, work.hidden, device=device).to(torch.bfloat16)
    seconds = seconds_of(lambda: torch.nn.functional.linear(x, weight), device)
    return 2.0 * x.numel() * weight.shape[0] / seconds


def main() -> None:
    """Writes the work and rates of each workload of the request."""
    request = json.loads(sys.argv[1])
    found = []
    for cutoff, batch in request["workloads"]:
        work = work_of(Path(request["folder"]), cutoff, batch)
        rates = measure(work, request["settings"])
        found.append({"work": dataclasses.asdict(work), "rates": dataclasses.asdict(rates)})
    Path(sys.argv[2]).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Checks and measures on one machine all that depends on it, in one go: for a machine that is at hand for a short time.

    scripts/measure_machine.py --out saves/machine --minutes 25
    scripts/measure_machine.py --parts facts,cxx,gpu_tests

Parts, in this order, so that what a short time cuts off is what matters least:

    facts      lscpu, the accelerator, `kt-sft doctor`
    cxx        the C++ tests on every tier of the CPU; with AMX, on its own tiles
    gpu_tests  the tests marked `gpu`
    bench      `kt-sft bench`, every format, with plot; on AMX machines AVX512-BF16 as well
    profile    a few steps of a random model of Qwen3-30B-A3B's layers: trace.json, a picture, shares of idle time; with
               an accelerator the same where the host waits for the experts, to compare
    compare    against DeepSpeed's ZeRO-3 offload and LLaMA-Factory alone, over the size of a micro-batch

A part that fails is noted and the next one runs; one that is stopped for time keeps what it wrote. Each part's output
is in OUT/PART.log; OUT/summary.json has exit statuses and seconds. Exit status: 0 if every part ran and succeeded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
#: Beside this interpreter, as `make install` puts them.
_BIN = Path(sys.executable).parent
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_MODEL = ["--model", "qwen3-30b-a3b", "--layers", "4"]

#: Commands of a shell; they run in the repository, and `$OUT` is where results go.
PARTS: dict[str, list[str]] = {
    "facts": [
        "lscpu",
        "command -v nvidia-smi >/dev/null && nvidia-smi || true",
        'kt-sft doctor --json | tee "$OUT/doctor.json"',
    ],
    "cxx": ["make test-cxx"],
    "gpu_tests": ["python -m pytest -q -m gpu"],
    "bench": [
        'kt-sft bench --json "$OUT/bench.json" --plot "$OUT/bench.png"',
        "! grep -q amx_tile /proc/cpuinfo || "
        'KT_SFT_ISA=avx512_bf16 kt-sft bench --json "$OUT/bench_avx512_bf16.json" --plot "$OUT/bench_avx512_bf16.png"',
    ],
    "profile": [
        'python scripts/measure_machine.py --profile "$OUT"',
        'for trace in "$OUT"/trace*.json; do python scripts/plot_trace.py "$trace" "${trace%.json}.png" '
        '| tee "${trace%.json}_figures.txt"; done',
    ],
    "compare": ['python scripts/compare_zero_offload.py --rounds 1 --steps 8 --out "$OUT/compare"'],
}


def profile(out: Path) -> int:
    """Trains a few steps on a random model with `kt_sft: {profile: ...}`; returns the exit status.

    Where there is an accelerator it does so twice: the second time the host waits for the experts instead of it.
    """
    import torch
    import yaml

    recipe = yaml.safe_load((REPOSITORY / "recipes/compare/lora.yaml").read_text(encoding="utf-8"))
    recipe["per_device_train_batch_size"] = 4
    runs = {"trace": True} | ({"trace_host_waits": False} if torch.accelerator.is_available() else {})
    status = 0
    for name, in_stream in runs.items():
        settings = {"activation_policy": "retain", "await_in_stream": in_stream}
        recipe["kt_sft"] |= settings | {"profile": str(out / f"{name}.json")}
        (out / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        options = [*_MODEL, "--recipe", str(out / f"{name}.yaml"), "--contenders", "kt_sft", "--rounds", "1"]
        command = [str(_BIN / "kt-sft"), "compare", *options, "--out", str(out / name.replace("trace", "profile"))]
        status = status or subprocess.call(command)
    return status


def run(part: str, out: Path, seconds: float) -> int | None:
    """Runs a part's commands until one fails; its exit status, or None if the time was over.

    Args:
        part: A key of `PARTS`.
        out: Where results and the log go.
        seconds: How long it may take; then the processes it started are told to end, and killed if they do not.
    """
    environment = os.environ | _OFFLINE | {"OUT": str(out), "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}"}
    script = "set -e -o pipefail\n" + "\n".join(PARTS[part])
    with (out / f"{part}.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes], patience: float = 10) -> None:
    """Ends a process and those of its session that it started, whether it has ended itself or not."""
    for order in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, order)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def measure(parts: list[str], out: Path, minutes: float, say: Callable[[str], None] = print) -> dict[str, dict]:
    """Runs parts one after the other within a time; returns and writes `status` and `seconds` of each."""
    deadline = time.monotonic() + 60 * minutes
    summary: dict[str, dict] = {}
    for part in parts:
        start = time.monotonic()
        status = run(part, out, deadline - start) if start < deadline else None
        summary[part] = {"status": "out of time" if status is None else status, "seconds": time.monotonic() - start}
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        say(f"{part}: {summary[part]['status']} after {summary[part]['seconds']:.0f} s")
    return summary


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saves/machine"))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas between")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--profile", type=Path, metavar="OUT", help=argparse.SUPPRESS)  # the part, by itself
    options = parser.parse_args(arguments)
    if options.profile is not None:
        return profile(options.profile)
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = measure(parts, out, options.minutes)
    return int(any(part["status"] != 0 for part in summary.values()))


if __name__ == "__main__":
    sys.exit(main())

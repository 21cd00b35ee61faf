"""kt-kernel as a contender of `kt-sft bench`: a process of another interpreter that computes on request.

It is stopped whenever it is not asked for something, so that its threads cannot disturb what else is measured.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kt_sft.cli.bench_plan import BenchError
from kt_sft.cli.contenders import Batch
from kt_sft.cli.shapes import LayerShape

#: Weight format -> kt-kernel's methods for it: with LoRA on the experts, and without. AMXINT4_SFT has one scale a row,
#: RAWINT4_SFT groups of 32.
METHODS = {
    "bf16": (("AMXBF16_SFT",), ("AMXBF16_SFT_SkipLoRA",)),
    "int8": (("INT8_SFT",), ("AMXINT8_SFT_SkipLoRA",)),
    "int4": (("AMXINT4_SFT", "RAWINT4_SFT"), ("AMXINT4_SFT_SkipLoRA",)),
    "fp8": (("AMXFP8_SFT",), ()),
}

_DRIVER = Path(__file__).with_name("kt_kernel_driver.py")


def methods(expert_format: str, lora_rank: int) -> tuple[str, ...]:
    """kt-kernel's methods to compare with; none where it has no such format."""
    with_lora, without = METHODS.get(expert_format, ((), ()))
    return with_lora if lora_rank > 0 else without


class KtKernel:
    """One layer computed by kt-kernel.

    Args:
        python: The interpreter that can import kt_kernel.
        method: kt-kernel's name of how it stores weights and computes.
        shape: The layer; the weights are random ones of its own.
        threads: Of its pool, and of its torch.
        numa_nodes: It has a pool for each.
        lora_rank: Of the LoRA on its experts; 0 for the methods without.
        most_rows: The most rows per expert that are going to be asked for.
        clock: One of `bench_plan.CLOCKS`.
        driver: What the interpreter runs.

    Raises:
        BenchError: It cannot be started, has no such method for this CPU, or fails; the message says what it printed.
    """

    trains = True

    def __init__(
        self,
        python: Path,
        method: str,
        shape: LayerShape,
        *,
        threads: int,
        numa_nodes: int,
        lora_rank: int,
        most_rows: int,
        clock: str,
        driver: Path = _DRIVER,
    ) -> None:
        self.name = "kt_kernel_rawint4" if method == "RAWINT4_SFT" else "kt_kernel"
        self._method = method
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  closed with the process
        try:
            # -I: this folder's modules must not be found by that interpreter.
            self._process = subprocess.Popen(
                [str(python), "-I", str(driver)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            raise BenchError(f"--kt-kernel: {python} cannot be run: {error}") from error
        try:
            facts = self._ask(
                op="build",
                method=method,
                experts=shape.experts,
                hidden=shape.hidden,
                intermediate=shape.intermediate,
                top_k=shape.top_k,
                lora_rank=lora_rank,
                threads=threads,
                numa_nodes=numa_nodes,
                clock=clock,
                most_tokens=shape.experts * most_rows // shape.top_k,
            )
        except BenchError:
            self.close()
            raise
        lora = f"with LoRA of rank {lora_rank} on every expert in both passes" if lora_rank > 0 else "without LoRA"
        self.description = f"kt-kernel {facts['version']} ({facts['variant']}), {method}, {lora}"

    def prepare(self, batch: Batch) -> None:
        """Makes it draw a batch of its own with as many rows."""
        self._ask(op="prepare", rows=batch.rows_per_expert)

    def run(self, backward: bool) -> dict[str, float]:
        """One forward, and a backward where asked for; seconds by its own clock."""
        return self._ask(op="run", backward=backward)

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.kill()  # also where it is stopped
        self._process.communicate()
        self._log.close()

    def _ask(self, **request: Any) -> Any:
        """One request, for whose time the process runs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: reading says so, too
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise BenchError(f"kt-kernel's process ended ({self._method}): {self._printed()}")
        self._process.send_signal(signal.SIGSTOP)
        reply = json.loads(line)
        if "error" in reply:
            raise BenchError(f"kt-kernel failed ({self._method}): {reply['error']}")
        return reply

    def _printed(self) -> str:
        self._log.seek(0)
        return " | ".join(self._log.read().strip().splitlines()[-3:]) or f"status {self._process.returncode}"

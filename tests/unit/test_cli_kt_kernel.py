"""kt-kernel as a process of another interpreter: the protocol, on both sides, with stand-ins for the other one."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from kt_sft.cli import kt_kernel_driver
from kt_sft.cli.bench_plan import BenchError
from kt_sft.cli.contenders import balanced_batch
from kt_sft.cli.kt_kernel_client import METHODS, KtKernel, methods
from kt_sft.cli.shapes import LayerShape

SHAPE = LayerShape("small", 256, 128, 8, 2)

#: Stands in for the driver: answers without kt-kernel, and fails on demand.
ANSWERS = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "build":
        if request["method"] == "DIES":
            sys.exit("a library is missing")
        assert request["most_tokens"] == request["experts"] * 3 // request["top_k"]
        reply = {"version": "0.7.2", "variant": "made up"}
    elif request["op"] == "prepare":
        reply = {"error": "ValueError: too many rows"} if request["rows"] > 3 else {}
    else:
        reply = {"forward": 0.25, "backward": 0.5} if request["backward"] else {"forward": 0.25}
    print(json.dumps(reply), flush=True)
"""


def start(driver: Path, method: str = "AMXBF16_SFT", lora_rank: int = 8) -> KtKernel:
    return KtKernel(
        Path(sys.executable),
        method,
        SHAPE,
        threads=1,
        numa_nodes=1,
        lora_rank=lora_rank,
        most_rows=3,
        clock="cpu",
        driver=driver,
    )


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    driver = tmp_path / "driver.py"
    driver.write_text(ANSWERS)
    return driver


class TestClient:
    def test_runs_and_says_what_it_is(self, answers: Path) -> None:
        peer = start(answers)
        try:
            assert peer.description == (
                "kt-kernel 0.7.2 (made up), AMXBF16_SFT, with LoRA of rank 8 on every expert in both passes"
            )
            peer.prepare(balanced_batch(SHAPE, 3))
            assert peer.run(backward=False) == {"forward": 0.25}
            assert peer.run(backward=True) == {"forward": 0.25, "backward": 0.5}
        finally:
            peer.close()

    def test_without_lora(self, answers: Path) -> None:
        peer = start(answers, "AMXBF16_SFT_SkipLoRA", lora_rank=0)
        peer.close()
        assert peer.description.endswith("AMXBF16_SFT_SkipLoRA, without LoRA")

    def test_is_stopped_while_nothing_is_asked_of_it(self, answers: Path) -> None:
        peer = start(answers)
        try:
            process = peer._process.pid
            for _ in range(2):
                # Blocks until the process is stopped; WNOWAIT leaves its state to be seen again.
                found = os.waitid(os.P_PID, process, os.WSTOPPED | os.WNOWAIT)
                assert found is not None
                assert found.si_code == os.CLD_STOPPED
                assert peer.run(backward=False) == {"forward": 0.25}
        finally:
            peer.close()

    def test_an_error_there_is_an_error_here(self, answers: Path) -> None:
        peer = start(answers)
        try:
            with pytest.raises(BenchError, match=r"kt-kernel failed \(AMXBF16_SFT\): ValueError: too many rows"):
                peer.prepare(balanced_batch(SHAPE, 4))
            assert peer.run(backward=False) == {"forward": 0.25}
        finally:
            peer.close()

    def test_what_a_process_that_ends_has_printed_is_told(self, answers: Path) -> None:
        with pytest.raises(BenchError, match=r"process ended \(DIES\): a library is missing"):
            start(answers, "DIES")

    def test_what_cannot_be_run_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(BenchError, match="cannot be run"):
            KtKernel(tmp_path, "AMXBF16_SFT", SHAPE, threads=1, numa_nodes=1, lora_rank=8, most_rows=3, clock="cpu")

    def test_an_interpreter_without_kt_kernel(self) -> None:
        with pytest.raises(BenchError, match="No module named 'kt_kernel'"):
            start(Path(kt_kernel_driver.__file__))


def test_methods() -> None:
    assert methods("bf16", 8) == ("AMXBF16_SFT",)
    assert methods("int4", 8) == ("AMXINT4_SFT", "RAWINT4_SFT")
    assert methods("int4", 0) == ("AMXINT4_SFT_SkipLoRA",)
    assert methods("nf4", 8) == ()


class Wrapper:
    """What the driver sees of kt-kernel: it keeps what it is given and computes nothing."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.lora: tuple[torch.Tensor, ...] = ()
        self.loaded: Any = None
        self.calls: list[Any] = []

    def init_lora_weights(self, *tensors: torch.Tensor) -> None:
        self.lora = tensors

    def load_weights(self, order: torch.Tensor) -> None:
        self.loaded = {name: getattr(self, name) for name in ("gate_proj", "up_proj", "down_proj")}

    def load_rawint4_weights(self, weights: Any, order: torch.Tensor) -> None:
        self.loaded = vars(weights)

    def load_block_fp8_weights(self, weights: Any, order: torch.Tensor) -> None:
        self.loaded = vars(weights)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *, save_for_backward: bool) -> None:
        self.calls.append(("forward", tuple(x.shape), tuple(index.shape), save_for_backward))

    def backward(self, grad: torch.Tensor) -> None:
        self.calls.append(("backward", tuple(grad.shape)))


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds the driver's layer over the stand-in."""
    package = types.ModuleType("kt_kernel")
    package.KTMoEWrapper = Wrapper  # type: ignore[attr-defined]
    package.__cpu_variant__ = "made up"  # type: ignore[attr-defined]
    weights = types.ModuleType("kt_kernel.sft.weights")
    weights.RAWINT4ExpertWeights = weights.BlockFP8ExpertWeights = types.SimpleNamespace  # type: ignore[attr-defined]
    for name, module in (("kt_kernel", package), ("kt_kernel.sft", package), ("kt_kernel.sft.weights", weights)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kt_kernel_driver.importlib.metadata, "version", lambda name: "0.7.2")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    sizes = {"experts": 8, "hidden": 256, "intermediate": 128, "top_k": 2, "threads": 1, "numa_nodes": 1}

    def build(method: str, lora_rank: int = 8) -> Any:
        return kt_kernel_driver.Layer(
            {"method": method, "lora_rank": lora_rank, "most_tokens": 12, "clock": "cpu", **sizes}
        )

    return build


class TestDriver:
    @pytest.mark.parametrize("method", sorted({m for pair in METHODS.values() for kind in pair for m in kind}))
    def test_weights_in_the_form_each_method_takes(self, layer: Any, method: str) -> None:
        built = layer(method)
        loaded = built._wrapper.loaded
        assert built.facts == {"version": "0.7.2", "variant": "made up"}
        assert built._wrapper.settings["method"] == method
        if method == "RAWINT4_SFT":
            assert loaded["down_proj"].shape == (8, 256, 64)
            assert loaded["down_scale"].shape == (8, 256, 4)
        elif method == "AMXFP8_SFT":
            assert [tuple(t.shape) for t in loaded["gate_proj"]] == [(128, 256)] * 8
            assert [tuple(t.shape) for t in loaded["gate_scale"]] == [(1, 2)] * 8
        else:
            assert loaded["gate_proj"].shape == loaded["up_proj"].shape == (8, 128, 256)
            assert loaded["down_proj"].shape == (8, 256, 128)
            assert all(weights.dtype == torch.bfloat16 for weights in loaded.values())

    def test_lora_where_it_is_asked_for(self, layer: Any) -> None:
        weights, gradients = layer("AMXBF16_SFT")._wrapper.lora[:6], layer("AMXBF16_SFT")._wrapper.lora[6:]
        expected = [(8, 8, 256), (8, 128, 8), (8, 8, 256), (8, 128, 8), (8, 8, 128), (8, 256, 8)]
        assert [tuple(t.shape) for t in weights] == [tuple(t.shape) for t in gradients] == expected
        assert layer("AMXBF16_SFT_SkipLoRA", lora_rank=0)._wrapper.lora == ()

    def test_runs_a_balanced_batch(self, layer: Any) -> None:
        built = layer("AMXBF16_SFT")
        built.prepare(rows=3)
        assert built._index_TK.flatten().bincount().tolist() == [3] * 8
        assert set(built.run(backward=False)) == {"forward"}
        assert set(built.run(backward=True)) == {"forward", "backward"}
        shapes = ((12, 256), (12, 2))
        assert built._wrapper.calls == [
            ("forward", *shapes, False),
            ("forward", *shapes, True),
            ("backward", (12, 256)),
        ]

    def test_answers_by_line_and_keeps_what_libraries_print_out_of_it(self) -> None:
        """A request that fails is answered, and the next one too; the process ends with its input."""
        driver = Path(kt_kernel_driver.__file__)
        run = subprocess.run(
            [sys.executable, "-I", str(driver)], input='{"op": "run"}\n' * 2, capture_output=True, text=True, check=True
        )
        assert len(run.stdout.splitlines()) == 2
        assert all("error" in line for line in run.stdout.splitlines())

"""Computes one layer of routed experts with kt-kernel, on request. Run by the interpreter that has kt-kernel.

`kt_sft.cli.kt_kernel_client` starts this file and is its only user: kt-kernel 0.7 needs another torch than kt_sft does,
so the two cannot share a process. Nothing of kt_sft is imported here. Requests come as lines of JSON on standard input,
each is answered by a line of JSON on what was standard output when the program started; libraries print elsewhere.

    {"op": "build", "method": ..., "experts": E, "hidden": H, "intermediate": I, "top_k": K, "lora_rank": r,
     "threads": n, "numa_nodes": m, "most_tokens": T, "clock": "elapsed" or "cpu"}
                                                           -> {"version": ..., "variant": ...}
    {"op": "prepare", "rows": n}                          -> {}            rows per expert, balanced
    {"op": "run", "backward": true}                       -> {"forward": seconds, "backward": seconds}
    whatever fails                                        -> {"error": ...}
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import signal
import sys
import time
from typing import Any

_PR_SET_PDEATHSIG = 1


class Layer:
    """One layer with random weights, in whatever form its method takes them."""

    def __init__(self, request: dict[str, Any]) -> None:
        import kt_kernel
        import torch

        torch.set_num_threads(request["threads"])
        self._torch = torch
        self._clock = time.process_time if request["clock"] == "cpu" else time.perf_counter
        self._experts, self._top_k = request["experts"], request["top_k"]
        self._hidden, self._intermediate = request["hidden"], request["intermediate"]
        self._rank, self._method = request["lora_rank"], request["method"]
        self._wrapper = kt_kernel.KTMoEWrapper(
            layer_idx=0,
            num_experts=self._experts,
            num_experts_per_tok=self._top_k,
            hidden_size=self._hidden,
            moe_intermediate_size=self._intermediate,
            gpu_experts_mask=None,
            num_gpu_experts=0,
            cpuinfer_threads=request["threads"],
            threadpool_count=request["numa_nodes"],
            weight_path="",
            chunked_prefill_size=request["most_tokens"],
            method=self._method,
            mode="sft",
            lora_rank=max(1, self._rank),
            lora_alpha=2.0 * max(1, self._rank),
            max_cache_depth=1,
        )
        # FP8 demands it; the others keep a transposed copy of the weights for backward, which is their fastest way.
        self._wrapper.share_backward_bb = self._method == "AMXFP8_SFT"
        if self._rank > 0:
            self._init_lora()
        self._load()
        self.facts = {"version": importlib.metadata.version("kt-kernel"), "variant": kt_kernel.__cpu_variant__}

    def _init_lora(self) -> None:
        E, H, I, r, torch = self._experts, self._hidden, self._intermediate, self._rank, self._torch
        shapes = [(E, r, H), (E, I, r), (E, r, H), (E, I, r), (E, r, I), (E, H, r)]
        self._lora = [torch.randn(shape, dtype=torch.bfloat16) * 0.01 for shape in shapes]
        self._lora_grads = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
        self._wrapper.init_lora_weights(*self._lora, *self._lora_grads)

    def _load(self) -> None:
        """Random weights; their values do not change the time, as none are zero or not finite."""
        E, H, I, torch = self._experts, self._hidden, self._intermediate, self._torch
        shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
        order = torch.arange(E)
        if self._method == "RAWINT4_SFT":
            from kt_kernel.sft.weights import RAWINT4ExpertWeights

            packed = {
                f"{name}_proj": torch.randint(0, 256, (E, rows, columns // 2), dtype=torch.uint8)
                for name, (rows, columns) in shapes.items()
            }
            scales = {
                f"{name}_scale": torch.full((E, rows, columns // 32), columns**-0.5 / 4, dtype=torch.bfloat16)
                for name, (rows, columns) in shapes.items()
            }
            self._wrapper.load_rawint4_weights(RAWINT4ExpertWeights(**packed, **scales), order)
            return
        if self._method == "AMXFP8_SFT":
            from kt_kernel.sft.weights import BlockFP8ExpertWeights

            codes = {
                f"{name}_proj": [torch.randn(rows, columns).to(torch.float8_e4m3fn) for _ in range(E)]
                for name, (rows, columns) in shapes.items()
            }
            scales = {
                f"{name}_scale": [torch.full((rows // 128, columns // 128), columns**-0.5) for _ in range(E)]
                for name, (rows, columns) in shapes.items()
            }
            self._wrapper.load_block_fp8_weights(BlockFP8ExpertWeights(**codes, **scales), order)
            return
        for name, (rows, columns) in shapes.items():
            weights = torch.empty(E, rows, columns, dtype=torch.bfloat16).normal_(0, columns**-0.5)
            setattr(self._wrapper, f"{name}_proj", weights)
        self._wrapper.load_weights(order)  # quantises on the way in where the method is INT8 or INT4

    def prepare(self, rows: int) -> dict[str, Any]:
        """Takes a batch that gives every expert `rows` rows."""
        torch = self._torch
        orders = [torch.randperm(self._experts) for _ in range(rows)]
        self._index_TK = torch.cat(orders).view(-1, self._top_k)
        tokens = self._index_TK.shape[0]
        self._hidden_TH = torch.randn(tokens, self._hidden).bfloat16()
        self._grad_TH = torch.randn(tokens, self._hidden).bfloat16()
        self._weights_TK = torch.rand(tokens, self._top_k).softmax(dim=1)
        return {}

    def run(self, backward: bool) -> dict[str, float]:
        """One forward that keeps what backward needs, and the backward where asked for; seconds."""
        start = self._clock()
        self._wrapper.forward(self._hidden_TH, self._index_TK, self._weights_TK, save_for_backward=backward)
        middle = self._clock()
        seconds = {"forward": middle - start}
        if backward:
            self._wrapper.backward(self._grad_TH)
            seconds["backward"] = self._clock() - middle
        return seconds


def serve() -> None:
    """Answers requests until the input ends."""
    # The other side stops this process between requests; it must not stay behind, stopped, if that side is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    layer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "build":
                layer = Layer(request)
                reply = layer.facts
            elif request["op"] == "prepare":
                reply = layer.prepare(request["rows"])
            else:
                reply = layer.run(request["backward"])
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve()

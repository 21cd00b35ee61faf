"""The pair of autograd nodes that a call of CpuExperts is: one submits it to the engine, one awaits it.

Shape letters: T tokens, K experts per token, H hidden size, I expert intermediate size, S = T·K.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft.engine.meter import wait
from kt_sft.engine.operands import Dropout, Operands, Term, split_gradients
from kt_sft.engine.retention import Retained
from kt_sft.engine.store import dtype_name

if TYPE_CHECKING:
    from kt_sft.experts import CpuExperts


@dataclasses.dataclass(frozen=True)
class CallTensors:
    """What one forward of a layer reads and writes, on the CPU."""

    x_TH: Tensor  # in the hidden states' dtype
    idx_TK: Tensor  # int64
    w_TK: Tensor  # FP32
    y_TH: Tensor  # written by the engine
    retained: Retained | None  # None: not wanted, or to be recomputed
    is_computed: bool = False  # what the engine would write is there already


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Of what a call must give gradients."""

    x: bool
    w: bool
    adapters: bool

    def __bool__(self) -> bool:
        return self.x or self.w or self.adapters


@dataclasses.dataclass
class _Backward:
    """One backward of a call that the engine is working on, and the gradients it writes."""

    ticket: Any
    submitted: float
    x_grad: Tensor | None
    w_grad: Tensor | None
    adapter_grads: tuple[Tensor, ...] | None
    idx_TK: Tensor
    recomputes: bool


@dataclasses.dataclass
class Link:
    """What the two nodes of one call share.

    A graph may be walked more than once, even by several threads at a time, so each backward has a number. It travels
    from `Await`'s backward to `Submit`'s as the gradient of the scalar that ties the two nodes together.
    """

    experts: CpuExperts
    terms: Sequence[Term] = ()
    operands: Operands | None = None  # of `terms`: backward reads what forward did, whatever has become of them since
    dropout: Dropout = dataclasses.field(default_factory=Dropout)
    ticket: Any = None  # of the forward
    submitted: float = 0.0  # the forward, in seconds of time.monotonic()
    backwards: dict[int, _Backward] = dataclasses.field(default_factory=dict)
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def settings(self) -> dict[str, Any]:
        """What forward and backward of a call have in common."""
        return {
            "layer": self.experts.store.native,
            "scratch_bytes": self.experts.config.scratch_mb << 20,
            "compute": self.experts.config.compute,
            "lora": None if self.operands is None else self.operands.native(self.dropout),
        }


class Submit(torch.autograd.Function):
    """Hands the tokens to the engine; its backward awaits the gradients that `Await`'s backward asked for.

    What is computed between the two nodes runs beside the engine in forward, and autograd, which runs nodes in reverse,
    lets the same work run beside it in backward.

    `adapters` are the tensors of `link.terms`: the engine reads copies of them, autograd takes their gradients here.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, top_k_weights: Tensor, tensors: CallTensors, link: Link, *adapters: Tensor
    ) -> Tensor:
        """Gives the scalar that `Await` takes."""
        ctx.link = link
        ctx.device = hidden_states.device
        ctx.weights_device, ctx.weights_dtype = top_k_weights.device, top_k_weights.dtype
        ctx.adapters = [(tensor.device, tensor.dtype) for tensor in adapters]
        tokens, slots = tensors.idx_TK.shape
        # Ties the two nodes together. Its gradient is a number, exact in float64 (see Link).
        tie = torch.zeros((), dtype=torch.float64)
        if tensors.is_computed:
            return tie
        pre_SI = None if tensors.retained is None else tensors.retained.pre_SI
        link.experts.store.expect(tokens * slots, forward=True)
        link.submitted = time.monotonic()
        link.ticket = link.experts.engine.submit_forward(
            **link.settings(),
            tokens=tokens,
            slots=slots,
            dtype=dtype_name(tensors.x_TH.dtype, "hidden_states"),
            hidden=tensors.x_TH.data_ptr(),
            experts=tensors.idx_TK.data_ptr(),
            weights=tensors.w_TK.data_ptr(),
            retained=_address(pre_SI),
            output=tensors.y_TH.data_ptr(),
            held=(tensors, pre_SI, link.experts.store.native, link.operands),
        )
        return tie

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, number: Tensor) -> tuple[Tensor | None, ...]:
        """Takes the number of the backward; gives the gradients that the engine has computed for it."""
        pending = ctx.link.backwards.pop(int(number))
        meter, recomputes = ctx.link.experts.meter, pending.recomputes
        wait(meter, pending.ticket, pending.submitted, pending.idx_TK, is_backward=True, recomputes=recomputes)
        x_grad, w_grad = pending.x_grad, pending.w_grad
        if x_grad is not None:
            x_grad = x_grad.to(ctx.device)
        if w_grad is not None:
            w_grad = w_grad.to(ctx.weights_device, ctx.weights_dtype)
        adapter_grads: list[Tensor | None] = [None] * len(ctx.adapters)
        if pending.adapter_grads is not None:
            split = split_gradients(ctx.link.terms, pending.adapter_grads)
            adapter_grads = [
                grad.to(*kind) if wanted else None
                for grad, kind, wanted in zip(split, ctx.adapters, ctx.needs_input_grad[4:], strict=True)
            ]
        return x_grad, w_grad, None, None, *adapter_grads


class Await(torch.autograd.Function):
    """Turns a submitted call into its output; its backward hands the output's gradient to the engine."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, tensors: CallTensors, link: Link, device: torch.device, wanted: Wanted) -> Tensor:
        """Gives the output, [T, H], once the engine is done with it."""
        ticket, link.ticket = link.ticket, None
        if not tensors.is_computed:
            wait(link.experts.meter, ticket, link.submitted, tensors.idx_TK)
        ctx.link = link
        ctx.wanted = wanted
        # Pre-activations may be given up before backward, which then needs hidden states. Shapes do not depend on the
        # routing, as non-reentrant checkpointing demands.
        ctx.retained = tensors.retained
        ctx.save_for_backward(tensors.x_TH, tensors.idx_TK, tensors.w_TK)
        return tensors.y_TH.to(device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Takes the output's gradient; gives the number of the backward that the engine has begun."""
        link, wanted = ctx.link, ctx.wanted
        x_TH, idx_TK, w_TK = ctx.saved_tensors
        pre_SI = None if ctx.retained is None else ctx.retained.of(idx_TK, w_TK)
        dy_TH = y_grad.detach().to("cpu").contiguous()
        dx_TH = torch.empty_like(dy_TH) if wanted.x else None
        dw_TK = torch.empty_like(w_TK) if wanted.w else None
        adapter_grads = link.operands.new_gradients() if wanted.adapters else None
        tokens, slots = idx_TK.shape
        link.experts.store.expect(tokens * slots, forward=False)
        submitted = time.monotonic()
        ticket = link.experts.engine.submit_backward(
            **link.settings(),
            tokens=tokens,
            slots=slots,
            dtype=dtype_name(dy_TH.dtype, "the output's gradient"),
            hidden=_address(x_TH),
            experts=idx_TK.data_ptr(),
            weights=w_TK.data_ptr(),
            retained=_address(pre_SI),
            output_grad=dy_TH.data_ptr(),
            hidden_grad=_address(dx_TH),
            weights_grad=_address(dw_TK),
            lora_grads=None if adapter_grads is None else tuple(grad.data_ptr() for grad in adapter_grads),
            held=(
                x_TH,
                idx_TK,
                w_TK,
                pre_SI,
                dy_TH,
                dx_TH,
                dw_TK,
                adapter_grads,
                link.experts.store.native,
                link.operands,
            ),
        )
        number = next(link.numbers)
        link.backwards[number] = _Backward(ticket, submitted, dx_TH, dw_TK, adapter_grads, idx_TK, pre_SI is None)
        return torch.tensor(number, dtype=torch.float64), None, None, None, None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

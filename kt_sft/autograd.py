"""The pair of autograd nodes that a call of CpuExperts is: one submits it to the engine, one awaits it.

Shape letters: T tokens, K experts per token, H hidden size, I expert intermediate size, S = T·K.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft.engine.crossing import Crossing, Place, Submission, cross
from kt_sft.engine.meter import wait
from kt_sft.engine.operands import Dropout, Operands, Term, split_gradients
from kt_sft.engine.retention import CallKey, Result, Retained, remember, will_be_called_again
from kt_sft.engine.store import dtype_name
from kt_sft.engine.watchdog import explained

if TYPE_CHECKING:
    from kt_sft.experts import CpuExperts


@dataclasses.dataclass(frozen=True)
class CallTensors:
    """What one forward of a layer reads and writes, on the CPU, and is kept of it for backward."""

    x_TH: Tensor  # in the hidden states' dtype
    idx_TK: Tensor  # int64
    w_TK: Tensor  # FP32
    y_TH: Tensor  # written by the engine
    retained: Retained | None  # None: not wanted, or to be recomputed
    key: CallKey | None = None  # None: its result is not to be remembered, or was


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
    """One backward of a call that the engine is working on."""

    crossing: Crossing
    wanted: Wanted
    idx_TK: Tensor
    submission: Submission | None = None
    submitted: float = 0.0
    recomputes: bool = False

    def gradients(self) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """Of hidden states, weights and operands, where they are wanted, on their devices."""
        given = iter(self.crossing.deliver(self.crossing.results))
        return next(given) if self.wanted.x else None, next(given) if self.wanted.w else None, list(given)


@dataclasses.dataclass
class Link:
    """What the two nodes of one call share.

    A graph may be walked more than once, even by several threads at a time, so a backward is known by the number that
    autograd has for the walk.
    """

    experts: CpuExperts
    wanted: Wanted
    weights_device: torch.device
    terms: Sequence[Term] = ()
    operands: Operands | None = None  # of `terms`: backward reads what forward did, whatever has become of them since
    dropout: Dropout = dataclasses.field(default_factory=Dropout)
    crossing: Crossing | None = None  # of the forward, like what follows
    submission: Submission | None = None
    submitted: float = 0.0  # in seconds of time.monotonic()
    tensors: CallTensors | None = None  # once it is submitted
    backwards: dict[int, _Backward] = dataclasses.field(default_factory=dict)

    @property
    def adapters_device(self) -> torch.device:
        """Where gradients of operands go, to be divided among adapters: that of all adapters that are trained."""
        devices = {tensor.device for term in self.terms for tensor in term.tensors if tensor.requires_grad}
        return devices.pop() if len(devices) == 1 else torch.device("cpu")

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
        ctx: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, link: Link, *adapters: Tensor
    ) -> Tensor:
        """Gives the scalar that `Await` takes."""
        ctx.link = link
        ctx.weights_dtype = top_k_weights.dtype
        ctx.adapters = [(tensor.device, tensor.dtype) for tensor in adapters]
        sources = [
            (hidden_states, hidden_states.dtype),
            (top_k_index, torch.int64),
            (top_k_weights, torch.float32),
        ]
        output = Place(tuple(hidden_states.shape), hidden_states.dtype, hidden_states.device)
        link.crossing = cross(hidden_states.device, sources, [output])
        with explained("forward", top_k_index.shape[0]):
            link.submission = link.crossing.submit(functools.partial(link.experts.submit_forward, link))
        # Ties the two nodes together. Autograd has a queue for each device and runs a node in that of its output: on
        # this device both nodes keep their place among the model's, and what is beside them goes first.
        return torch.zeros((), device=hidden_states.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gives the gradients that the engine has computed."""
        pending = ctx.link.backwards.pop(_walk())
        meter, idx_TK = ctx.link.experts.meter, pending.idx_TK
        asked = time.monotonic()
        with explained("backward", idx_TK.shape[0]):
            ticket = pending.submission.ticket()
            noted = {"asked": asked, "is_backward": True, "recomputes": pending.recomputes}
            wait(meter, ticket, pending.submitted, idx_TK, **noted)
        x_grad, w_grad, operand_grads = pending.gradients()
        if w_grad is not None:
            w_grad = w_grad.to(ctx.weights_dtype)
        adapter_grads: list[Tensor | None] = [None] * len(ctx.adapters)
        if operand_grads:
            split = split_gradients(ctx.link.terms, operand_grads)
            adapter_grads = [
                grad.to(*kind) if wanted else None
                for grad, kind, wanted in zip(split, ctx.adapters, ctx.needs_input_grad[4:], strict=True)
            ]
        return x_grad, None, w_grad, None, *adapter_grads


class Await(torch.autograd.Function):
    """Turns a submitted call into its output; its backward hands the output's gradient to the engine."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, link: Link) -> Tensor:
        """Gives the output, [T, H], once the engine is done with it."""
        crossing, submission = link.crossing, link.submission
        assert crossing is not None
        assert submission is not None
        ctx.link = link
        asked = time.monotonic()
        try:
            with explained("forward", crossing.sources[1].shape[0]):
                ticket = submission.ticket()
                tensors = link.tensors
                assert tensors is not None
                if ticket is not None:
                    wait(link.experts.meter, ticket, link.submitted, tensors.idx_TK, asked=asked)
        finally:
            link.crossing = link.submission = link.tensors = None
        # Pre-activations may be given up before backward, which then needs hidden states. Shapes do not depend on the
        # routing, as non-reentrant checkpointing demands.
        ctx.retained = tensors.retained
        if link.wanted:
            ctx.save_for_backward(tensors.x_TH, tensors.idx_TK, tensors.w_TK)
        if tensors.key is not None:
            y_TH = crossing.keep(tensors.y_TH).detach()  # it must not keep the graph alive that keeps it
            result = Result(tensors.key, y_TH, y_TH._version, tensors.retained)
            if will_be_called_again():
                link.experts.count(y_TH, result)
                remember(link.experts, result)
        (output,) = crossing.deliver([tensors.y_TH])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor, None]:
        """Hands the output's gradient to the engine."""
        link, wanted, retained = ctx.link, ctx.link.wanted, ctx.retained
        x_TH, idx_TK, w_TK = ctx.saved_tensors
        places = []
        if wanted.x:
            places.append(Place(tuple(y_grad.shape), y_grad.dtype, y_grad.device))
        if wanted.w:
            places.append(Place(tuple(w_TK.shape), torch.float32, link.weights_device))
        if wanted.adapters:
            places += [Place(tuple(t.shape), torch.float32, link.adapters_device) for t in link.operands.tensors]
        pending = _Backward(cross(y_grad.device, [(y_grad, y_grad.dtype)], places), wanted, idx_TK)

        def submit() -> Any:
            pre_SI = None if retained is None else retained.of(idx_TK, w_TK)
            return _submit_backward(link, pending, x_TH, w_TK, pre_SI)

        with explained("backward", idx_TK.shape[0]):
            pending.submission = pending.crossing.submit(submit)
        link.backwards[_walk()] = pending
        return torch.zeros((), device=y_grad.device), None


def _walk() -> int:
    """Of the backward that this thread is in, a number that no other has."""
    return torch._C._current_graph_task_id()


def _submit_backward(link: Link, pending: _Backward, x_TH: Tensor, w_TK: Tensor, pre_SI: Tensor | None) -> Any:
    """Hands a backward to the engine, once the output's gradient is on the CPU; gives the ticket."""
    (dy_TH,), results = pending.crossing.sources, iter(pending.crossing.results)
    dx_TH = next(results) if pending.wanted.x else None
    dw_TK = next(results) if pending.wanted.w else None
    operand_grads = tuple(results)
    for grad in operand_grads:
        grad.zero_()  # the engine adds to them
    tokens, slots = pending.idx_TK.shape
    link.experts.store.expect(tokens * slots, forward=False)
    pending.submitted, pending.recomputes = time.monotonic(), pre_SI is None
    return link.experts.engine.submit_backward(
        **link.settings(),
        tokens=tokens,
        slots=slots,
        dtype=dtype_name(dy_TH.dtype, "the output's gradient"),
        hidden=address(x_TH),
        experts=pending.idx_TK.data_ptr(),
        weights=w_TK.data_ptr(),
        retained=address(pre_SI),
        output_grad=dy_TH.data_ptr(),
        hidden_grad=address(dx_TH),
        weights_grad=address(dw_TK),
        lora_grads=tuple(grad.data_ptr() for grad in operand_grads) or None,
        held=(x_TH, pending.idx_TK, w_TK, pre_SI, pending.crossing.held, link.experts.store.native, link.operands),
    )


def address(tensor: Tensor | None) -> int:
    """As the engine takes it."""
    return 0 if tensor is None else tensor.data_ptr()

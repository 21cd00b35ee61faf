"""The pair of autograd nodes that a call of CpuExperts is: one submits it to the engine, one awaits it.

Shape letters: T tokens, K experts per token, H hidden size, I expert intermediate size, S = T·K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft.config import launched_processes
from kt_sft.engine.crossing import Crossing, Place, cross
from kt_sft.engine.operands import Dropout, Operands, Term, split_gradients
from kt_sft.engine.retention import CallKey, Result, Retained, remember, will_be_called_again
from kt_sft.engine.store import dtype_name
from kt_sft.engine.ticket import Ticket
from kt_sft.engine.watchdog import explained

if TYPE_CHECKING:
    from kt_sft.experts import CpuExperts


@dataclasses.dataclass(frozen=True)
class CallTensors:
    """What is kept of one forward of a layer, on the CPU; filled when the engine is done with it."""

    x_TH: Tensor  # in the hidden states' dtype
    idx_TK: Tensor  # int64
    w_TK: Tensor  # FP32
    y_TH: Tensor | None  # to be remembered; None: not wanted
    retained: Retained | None  # None: not wanted, or to be recomputed
    key: CallKey | None  # None: of no call that is remembered


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
    ticket: Ticket

    def gradients(self, wanted: Wanted, around: int) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """Of hidden states, weights and operands, where they are wanted, on their devices."""
        given = iter(self.crossing.finish(self.ticket, around))
        return next(given) if wanted.x else None, next(given) if wanted.w else None, list(given)


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
    around: int = -1  # the backward within which a checkpointed piece was called again
    forward: tuple[Crossing, Ticket, CallTensors] | None = None  # until it is awaited
    backwards: dict[int, _Backward] = dataclasses.field(default_factory=dict)

    @property
    def adapters_device(self) -> torch.device:
        """Where gradients of operands go, to be divided among adapters: that of all adapters that are trained."""
        devices = {tensor.device for term in self.terms for tensor in term.tensors if tensor.requires_grad}
        return devices.pop() if len(devices) == 1 else torch.device("cpu")

    @property
    def in_stream(self) -> bool:
        """Whether a device may wait for a pass by itself."""
        wanted = self.experts.config.await_in_stream
        return _is_alone() if wanted is None else wanted

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
        link.around = _walk()
        with explained("forward", hidden_states.shape[0]):
            in_stream = link.in_stream and (bool(link.wanted) or will_be_called_again()) and not _saving_is_hooked()
            crossing = cross(hidden_states.device, sources, [output], in_stream=in_stream)
            ticket, tensors = link.experts.prepare_forward(link, crossing)
            crossing.start(ticket)
        link.forward = crossing, ticket, tensors
        # Ties the two nodes together. Autograd has a queue for each device and runs a node in that of its output: on
        # this device both nodes keep their place among the model's, and what is beside them goes first.
        return torch.zeros((), device=hidden_states.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gives the gradients that the engine has computed."""
        link = ctx.link
        x_grad, w_grad, operand_grads = link.backwards.pop(_walk()).gradients(link.wanted, link.around)
        if w_grad is not None:
            w_grad = w_grad.to(ctx.weights_dtype)
        adapter_grads: list[Tensor | None] = [None] * len(ctx.adapters)
        if operand_grads:
            split = split_gradients(link.terms, operand_grads)
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
        assert link.forward is not None
        crossing, ticket, tensors = link.forward
        link.forward = None
        ctx.link = link
        (output,) = crossing.finish(ticket, link.around)
        # Pre-activations may be given up before backward, which then needs hidden states. Shapes do not depend on the
        # routing, as non-reentrant checkpointing demands.
        ctx.retained = tensors.retained
        if link.wanted:
            ctx.save_for_backward(tensors.x_TH, tensors.idx_TK, tensors.w_TK)
        if tensors.y_TH is not None:
            assert tensors.key is not None
            y_TH = tensors.y_TH.detach()  # it must not keep the graph alive that keeps it
            result = Result(tensors.key, y_TH, y_TH._version, tensors.retained, ticket.completion)
            link.experts.count(y_TH, result)
            remember(link.experts, result)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor, None]:
        """Hands the output's gradient to the engine."""
        link, wanted = ctx.link, ctx.link.wanted
        _, _, w_TK = saved = ctx.saved_tensors
        places = []
        if wanted.x:
            places.append(Place(tuple(y_grad.shape), y_grad.dtype, y_grad.device))
        if wanted.w:
            places.append(Place(tuple(w_TK.shape), torch.float32, link.weights_device))
        if wanted.adapters:
            places += [Place(tuple(t.shape), torch.float32, link.adapters_device) for t in link.operands.tensors]
        with explained("backward", y_grad.shape[0]):
            crossing = cross(y_grad.device, [(y_grad, y_grad.dtype)], places, in_stream=link.in_stream)
            ticket = _prepare_backward(link, crossing, saved, ctx.retained)
            crossing.start(ticket)
        link.backwards[_walk()] = _Backward(crossing, ticket)
        return torch.zeros((), device=y_grad.device), None


def _walk() -> int:
    """Of the backward that this thread is in, a number that no other has; -1 outside of any."""
    return torch._C._current_graph_task_id()


def _is_alone() -> bool:
    """Whether no other process adds its gradients to this one's: those of a pass that failed must not be among them."""
    distributed = torch.distributed
    grouped = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return not grouped and launched_processes() == 1


def _saving_is_hooked() -> bool:
    """Whether somebody else than checkpointing is given what is saved for backward, and may read it at once."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # an older torch, which does not say
        return True
    hooks = top(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) != "torch.utils.checkpoint"


def _prepare_backward(
    link: Link, crossing: Crossing, saved: tuple[Tensor, Tensor, Tensor], retained: Retained | None
) -> Ticket:
    """Prepares a backward; the output's gradient may be on its way to the CPU yet."""
    (dy_TH,), results, (x_TH, idx_TK, w_TK) = crossing.sources, iter(crossing.results), saved
    dx_TH = next(results) if link.wanted.x else None
    dw_TK = next(results) if link.wanted.w else None
    tokens, slots = idx_TK.shape
    pre_SI = None if retained is None else retained.pre_SI
    routing = None if retained is None else retained.routing
    link.experts.store.expect(tokens * slots, forward=False)
    native = link.experts.engine.prepare_backward(
        **link.settings(),
        tokens=tokens,
        slots=slots,
        dtype=dtype_name(dy_TH.dtype, "the output's gradient"),
        hidden=address(x_TH),
        experts=idx_TK.data_ptr(),
        weights=w_TK.data_ptr(),
        retained=address(pre_SI),
        retained_routing=None if routing is None else tuple(address(tensor) for tensor in routing),
        output_grad=dy_TH.data_ptr(),
        hidden_grad=address(dx_TH),
        weights_grad=address(dw_TK),
        lora_grads=tuple(grad.data_ptr() for grad in results) or None,
        held=(saved, pre_SI, routing, crossing.held, link.experts.store.native, link.operands),
    )
    return Ticket(native, idx_TK, is_backward=True, meter=link.experts.meter)


def address(tensor: Tensor | None) -> int:
    """As the engine takes it."""
    return 0 if tensor is None else tensor.data_ptr()

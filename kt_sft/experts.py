"""CpuExperts: the routed experts of one MoE layer, computed by the CPU engine.

Shape letters: T tokens, K experts per token, E experts, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kt_sft.config import KTConfig
from kt_sft.engine.engine import get_engine
from kt_sft.engine.low_rank import LowRank
from kt_sft.engine.store import LayerStore, dtype_name


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """What one forward of a layer reads and writes, on the CPU."""

    x_TH: Tensor  # in the hidden states' dtype
    idx_TK: Tensor  # int64
    w_TK: Tensor  # FP32
    y_TH: Tensor  # written by the engine
    pre_SI: Tensor | None  # retained pre-activations, BF16 [T·K, 2I]; None: not wanted, or to be recomputed


@dataclasses.dataclass
class _Backward:
    """One backward of a call that the engine is working on, and the gradients it writes."""

    ticket: Any
    x_grad: Tensor | None
    w_grad: Tensor | None


@dataclasses.dataclass
class _Link:
    """What the two nodes of one call share.

    A graph may be walked more than once, even by several threads at a time, so each backward has a number. It travels
    from `_Await`'s backward to `_Submit`'s as the gradient of the scalar that ties the two nodes together.
    """

    experts: CpuExperts
    ticket: Any = None  # of the forward
    backwards: dict[int, _Backward] = dataclasses.field(default_factory=dict)
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)


class _Submit(torch.autograd.Function):
    """Hands the tokens to the engine; its backward awaits the gradients that `_Await`'s backward asked for.

    What is computed between the two nodes runs beside the engine in forward, and autograd, which runs nodes in reverse,
    lets the same work run beside it in backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, top_k_weights: Tensor, tensors: _Tensors, link: _Link) -> Tensor:
        ctx.link = link
        ctx.device = hidden_states.device
        ctx.weights_device, ctx.weights_dtype = top_k_weights.device, top_k_weights.dtype
        tokens, slots = tensors.idx_TK.shape
        link.ticket = link.experts.engine.submit_forward(
            layer=link.experts.store.native,
            tokens=tokens,
            slots=slots,
            dtype=dtype_name(tensors.x_TH.dtype, "hidden_states"),
            hidden=tensors.x_TH.data_ptr(),
            experts=tensors.idx_TK.data_ptr(),
            weights=tensors.w_TK.data_ptr(),
            retained=_address(tensors.pre_SI),
            scratch_bytes=link.experts.config.scratch_mb << 20,
            compute=link.experts.config.compute,
            output=tensors.y_TH.data_ptr(),
            held=(tensors, link.experts.store.native),
        )
        # Ties the two nodes together. Its gradient is a number, exact in float64 (see _Link).
        return torch.zeros((), dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, number: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        pending = ctx.link.backwards.pop(int(number))
        pending.ticket.wait()
        x_grad, w_grad = pending.x_grad, pending.w_grad
        if x_grad is not None:
            x_grad = x_grad.to(ctx.device)
        if w_grad is not None:
            w_grad = w_grad.to(ctx.weights_device, ctx.weights_dtype)
        return x_grad, w_grad, None, None


class _Await(torch.autograd.Function):
    """Turns a submitted call into its output; its backward hands the output's gradient to the engine."""

    @staticmethod
    def forward(
        ctx: Any,
        _: Tensor,
        tensors: _Tensors,
        link: _Link,
        device: torch.device,
        x_wanted: bool,
        w_wanted: bool,
    ) -> Tensor:
        ticket, link.ticket = link.ticket, None
        ticket.wait()
        ctx.link = link
        ctx.device = device
        ctx.wanted = (x_wanted, w_wanted)
        # With retained pre-activations backward needs no hidden states. Shapes do not depend on the routing, as
        # non-reentrant checkpointing demands.
        x_TH = tensors.x_TH if tensors.pre_SI is None else None
        ctx.save_for_backward(x_TH, tensors.idx_TK, tensors.w_TK, tensors.pre_SI)
        return tensors.y_TH.to(device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        link = ctx.link
        x_TH, idx_TK, w_TK, pre_SI = ctx.saved_tensors
        x_wanted, w_wanted = ctx.wanted
        dy_TH = y_grad.detach().to("cpu").contiguous()
        dx_TH = torch.empty_like(dy_TH) if x_wanted else None
        dw_TK = torch.empty_like(w_TK) if w_wanted else None
        tokens, slots = idx_TK.shape
        ticket = link.experts.engine.submit_backward(
            layer=link.experts.store.native,
            tokens=tokens,
            slots=slots,
            dtype=dtype_name(dy_TH.dtype, "the output's gradient"),
            hidden=_address(x_TH),
            experts=idx_TK.data_ptr(),
            weights=w_TK.data_ptr(),
            retained=_address(pre_SI),
            scratch_bytes=link.experts.config.scratch_mb << 20,
            compute=link.experts.config.compute,
            output_grad=dy_TH.data_ptr(),
            hidden_grad=_address(dx_TH),
            weights_grad=_address(dw_TK),
            held=(x_TH, idx_TK, w_TK, pre_SI, dy_TH, dx_TH, dw_TK, link.experts.store.native),
        )
        number = next(link.numbers)
        link.backwards[number] = _Backward(ticket, dx_TH, dw_TK)
        return torch.tensor(number, dtype=torch.float64), None, None, None, None, None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class CpuExperts(nn.Module):
    """Drop-in for the routed experts of a transformers 5 MoE layer; weights stay frozen in CPU memory.

    It has no parameters and no buffers, so moving, casting, sharding or saving a model leaves it alone.

    Args:
        store: The layer's weights.
        config: Settings.

    Attributes:
        merged: What merging adapters left behind. The weights themselves are frozen and rounded, so the engine goes on
            computing them plus this, in both passes; saving writes the source's weights plus `merged.delta`.
    """

    merged: LowRank | None = None

    def __init__(self, store: LayerStore, config: KTConfig) -> None:
        super().__init__()
        self.store = store
        self.config = config
        self.num_experts = store.num_experts
        self.hidden_dim = store.hidden_size
        self.intermediate_dim = store.intermediate_size

    @classmethod
    def from_weights(
        cls,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        config: KTConfig | None = None,
        activation: str = "silu",
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> CpuExperts:
        """Builds one layer from weights in memory, which are copied.

        Args:
            gate_up_proj: [E, 2I, H], gate rows first; [E, I, H] for ungated experts. FP32, FP16 or BF16, any device.
            down_proj: [E, H, I].
            config: Settings; None for the defaults.
            activation: "silu", "gelu", "gelu_pytorch_tanh", "relu2" or "swiglu_oai" (gpt-oss' clamped SwiGLU: clamp 7,
                alpha 1.702, up + 1).
            gate_up_bias: [E, 2I] ([E, I] ungated).
            down_bias: [E, H].

        Raises:
            ValueError: Shapes do not fit each other, or a value is not finite.
            TypeError: A dtype is not supported.
        """
        config = config or KTConfig()
        experts, hidden, intermediate = _check_shapes(gate_up_proj, down_proj)
        gated = gate_up_proj.shape[1] == 2 * intermediate
        store = LayerStore(
            num_experts=experts,
            hidden_size=hidden,
            intermediate_size=intermediate,
            activation=activation,
            gated=gated,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            **config.storage,
        )
        for expert in range(experts):
            gate_up = gate_up_proj[expert].detach().cpu()
            parts = dict(
                zip(store.matrices, (*gate_up.chunk(2 if gated else 1), down_proj[expert].detach().cpu()), strict=True)
            )
            for matrix, source in parts.items():
                try:
                    store.write(matrix, expert, source)
                except ValueError as error:
                    raise ValueError(f"kt_sft: {matrix} weights of expert {expert}: {error}") from error
        return cls(store, config)

    @property
    def engine(self) -> Any:
        """The engine that computes this layer."""
        return get_engine(self.config.num_threads)

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """What the kernels effectively multiply by, without biases.

        Returns:
            FP32 gate_up [E, 2I, H], gate rows first ([E, I, H] ungated), and down [E, H, I].
        """
        return self.store.dequantized()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sums each token's experts, weighted.

        Args:
            hidden_states: [T, H], FP32, FP16 or BF16, on any device.
            top_k_index: [T, K] int32 or int64 in [0, E]; E stands for "no expert".
            top_k_weights: [T, K], any float dtype.

        Returns:
            [T, H] with the dtype and device of `hidden_states`.

        Raises:
            ValueError: A shape does not fit.
            TypeError: A dtype is not supported.
            IndexError: An index is out of range.
        """
        self._check_inputs(hidden_states, top_k_index, top_k_weights)
        grad_wanted = torch.is_grad_enabled()
        x_wanted = grad_wanted and hidden_states.requires_grad
        w_wanted = grad_wanted and top_k_weights.requires_grad
        tensors = self._tensors(hidden_states, top_k_index, top_k_weights, backward_wanted=x_wanted or w_wanted)
        link = _Link(self)
        submitted = _Submit.apply(hidden_states, top_k_weights, tensors, link)
        return _Await.apply(submitted, tensors, link, hidden_states.device, x_wanted, w_wanted)

    def _tensors(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, backward_wanted: bool
    ) -> _Tensors:
        x_TH = hidden_states.detach().to("cpu").contiguous()
        idx_TK = top_k_index.detach().to("cpu", torch.int64).contiguous()
        w_TK = top_k_weights.detach().to("cpu", torch.float32).contiguous()
        if idx_TK.numel():
            low, high = (int(bound) for bound in idx_TK.aminmax())
            if low < 0 or high > self.num_experts:
                raise IndexError(
                    f"kt_sft: top_k_index holds {low if low < 0 else high}; valid are 0 to {self.num_experts - 1}, "
                    f"and {self.num_experts} for no expert"
                )
        pre_SI = None
        if backward_wanted and self.config.activation_policy == "retain":
            columns = self.intermediate_dim * (2 if self.store.gated else 1)
            pre_SI = torch.from_numpy(self.engine.take_bf16(idx_TK.numel(), columns)).view(torch.bfloat16)
        return _Tensors(x_TH, idx_TK, w_TK, torch.empty_like(x_TH), pre_SI)

    def _check_inputs(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.hidden_dim:
            raise ValueError(f"kt_sft: hidden_states must be [T, {self.hidden_dim}], got {tuple(hidden_states.shape)}")
        dtype_name(hidden_states.dtype, "hidden_states")
        if top_k_index.dim() != 2 or top_k_index.shape[0] != hidden_states.shape[0] or top_k_index.shape[1] < 1:
            raise ValueError(
                f"kt_sft: top_k_index must be [{hidden_states.shape[0]}, K], got {tuple(top_k_index.shape)}"
            )
        if top_k_index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"kt_sft: top_k_index has dtype {top_k_index.dtype}; use torch.int64 or torch.int32")
        if top_k_weights.shape != top_k_index.shape:
            raise ValueError(
                f"kt_sft: top_k_weights must be {tuple(top_k_index.shape)} like top_k_index, "
                f"got {tuple(top_k_weights.shape)}"
            )
        if not top_k_weights.is_floating_point():
            raise TypeError(f"kt_sft: top_k_weights has dtype {top_k_weights.dtype}; use a floating point dtype")

    def requires_grad_(self, requires_grad: bool = True) -> CpuExperts:
        """As every module's. Asked to train, there is nothing that could: PEFT's `modules_to_save` asks so.

        Raises:
            ValueError: `requires_grad` is true.
        """
        if requires_grad:
            raise ValueError(
                "kt_sft: routed experts stay frozen in the engine and cannot be trained themselves; take them out of "
                "modules_to_save (additional_target in a recipe)"
            )
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Neither strict=False nor PEFT, which always passes it, says a word about tensors that nobody takes.
        given = next((key for key in state_dict if key.startswith(prefix)), None)
        if given is not None:
            raise ValueError(
                f"kt_sft: {given} is a weight of routed experts, which stay frozen in the engine and take none; load a "
                "state dict or an adapter without them, or use the model without kt_sft"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return (
            f"num_experts={self.num_experts}, hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}, "
            f"activation={self.store.activation}, expert_format={self.store.expert_format}, "
            f"mebibytes={self.store.nbytes >> 20}"
        )


def _check_shapes(gate_up_proj: Tensor, down_proj: Tensor) -> tuple[int, int, int]:
    """The layer's (E, H, I)."""
    if down_proj.dim() != 3 or gate_up_proj.dim() != 3:
        raise ValueError(
            f"kt_sft: gate_up_proj must be [E, 2I, H] and down_proj [E, H, I], "
            f"got {tuple(gate_up_proj.shape)} and {tuple(down_proj.shape)}"
        )
    experts, hidden, intermediate = down_proj.shape
    if tuple(gate_up_proj.shape) not in ((experts, 2 * intermediate, hidden), (experts, intermediate, hidden)):
        raise ValueError(
            f"kt_sft: with down_proj {tuple(down_proj.shape)}, gate_up_proj must be "
            f"{(experts, 2 * intermediate, hidden)}, or {(experts, intermediate, hidden)} without a gate; "
            f"got {tuple(gate_up_proj.shape)}"
        )
    return experts, hidden, intermediate

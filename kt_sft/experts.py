"""CpuExperts: the routed experts of one MoE layer, computed by the CPU engine.

Shape letters: T tokens, K experts per token, E experts, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kt_sft.autograd import Await, CallTensors, Link, Submit, Wanted, address
from kt_sft.config import KTConfig
from kt_sft.engine.crossing import Crossing
from kt_sft.engine.engine import get_engine
from kt_sft.engine.low_rank import LowRank
from kt_sft.engine.meter import Meter
from kt_sft.engine.operands import Dropout, OperandCache, Operands, Term
from kt_sft.engine.retention import (
    CallKey,
    Retained,
    is_checkpointed,
    limit_of,
    recall,
    retention,
    will_be_called_again,
)
from kt_sft.engine.store import LayerStore, dtype_name
from kt_sft.engine.ticket import Ticket
from kt_sft.engine.turns import hand_over


class CpuExperts(nn.Module):
    """Drop-in for the routed experts of a transformers 5 MoE layer; weights stay frozen in CPU memory.

    It has no parameters and no buffers, so moving, casting, sharding or saving a model leaves it alone.

    Args:
        store: The layer's weights.
        config: Settings.
        is_transposed: Whether the class that this stands for keeps its parameters as [E, in, out].
        interleaved: Whether gate and up alternate there. Neither changes what is computed; adapters are kept likewise.

    Attributes:
        merged: What merging adapters left behind. The weights themselves are frozen and rounded, so the engine goes on
            computing them plus this, in both passes; saving writes the source's weights plus `merged.delta`.
        merged_digests: Of the adapters' parts in it, and of those that the weights had in them when they were loaded.
        loaded_a_meets_inputs: While an adapter is loaded: whether its A is on the input side, whatever the sizes.
        meter: Notes what the engine's passes cost, where there is one.
        beside: Called with the hidden states between submitting and awaiting: what it computes runs beside the engine.
    """

    merged: LowRank | None = None
    merged_digests: frozenset[str] = frozenset()
    loaded_a_meets_inputs: bool | None = None
    beside: Callable[[Tensor], None] | None = None
    meter: Meter | None = None

    def __init__(
        self, store: LayerStore, config: KTConfig, *, is_transposed: bool = False, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.store = store
        self.config = config
        self.num_experts = store.num_experts
        self.hidden_dim = store.hidden_size
        self.intermediate_dim = store.intermediate_size
        self.is_transposed = is_transposed
        self.interleaved = interleaved
        self._operands = OperandCache()

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
            ValueError: Shapes do not fit each other, a value is not finite, or `config` asks for mapped weights, or for
                products of integers where codes are none.
            TypeError: A dtype is not supported.
        """
        config = config or KTConfig()
        if config.store == "mapped":
            raise ValueError("kt_sft: store 'mapped' is for checkpoints; weights in memory are copied, so leave it out")
        config.check_compute(config.stored_format)
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

    def forget_adapters(self) -> None:
        """Frees the copies of the adapters of the last call, and the adapters where nobody else has them."""
        self._operands.clear()

    @property
    def engine(self) -> Any:
        """The engine that computes this layer."""
        return get_engine(self.config.num_threads)

    def new_meter(self) -> Meter:
        """A meter for this layer."""
        product = 2.0 * self.hidden_dim * self.intermediate_dim
        first = product * (2 if self.store.gated else 1)
        return Meter(self.num_experts, first + product, first)

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """What the kernels effectively multiply by, without biases.

        Returns:
            FP32 gate_up [E, 2I, H], gate rows first ([E, I, H] ungated), and down [E, H, I].
        """
        return self.store.dequantized()

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: Sequence[Term] = ()
    ) -> Tensor:
        """Sums each token's experts, weighted.

        Args:
            hidden_states: [T, H], FP32, FP16 or BF16, on any device.
            top_k_index: [T, K] int32 or int64 in [0, E]; E stands for "no expert".
            top_k_weights: [T, K], any float dtype.
            adapters: What adapters add to the experts' weights, on top of `merged`.

        Returns:
            [T, H] with the dtype and device of `hidden_states`.

        Raises:
            ValueError: A shape does not fit, or an adapter with dropout is not alone.
            TypeError: A dtype is not supported.
            IndexError: An index is out of range.
            EngineError: The pass failed. Of tensors on an accelerator this, and the index, may show later instead, in
                another call or in backward (config.await_in_stream); the output is NaN then.
            RuntimeError: `beside` wrote to `hidden_states`.
        """
        self._check_inputs(hidden_states, top_k_index, top_k_weights)
        terms = [*adapters, *([] if self.merged is None else [Term.of(self.merged)])]
        factors = [tensor for term in terms for tensor in term.tensors]
        grads = torch.is_grad_enabled()
        wanted = Wanted(
            x=grads and hidden_states.requires_grad,
            w=grads and top_k_weights.requires_grad,
            adapters=grads and any(tensor.requires_grad for tensor in factors),
        )
        link = Link(self, wanted, top_k_weights.device, terms, self._operands_of(terms), self._dropout_of(terms))
        version = None if hidden_states.is_inference() else hidden_states._version
        submitted = Submit.apply(hidden_states, top_k_index, top_k_weights, link, *factors)
        if self.beside is not None:
            self.beside(hidden_states)
        if grads:  # without them a model may be in a state of its own, as DPO's is while it is its own reference
            hand_over()  # before the node is made: kt_sft/offload/interleave.py
        if version is not None and hidden_states._version != version:
            raise RuntimeError(
                "kt_sft: hidden_states were changed in place while the experts read them; let what runs beside the "
                "experts write to a copy"
            )
        return Await.apply(submitted, link)

    def count(self, kept: Tensor, owner: object) -> None:
        """Takes what is kept in host memory off the room for pre-activations."""
        if self.config.activation_policy == "retain":
            retention().count(kept.nbytes, limit_of(self.config.retained_mb), owner)

    def _dropout_of(self, terms: Sequence[Term]) -> Dropout:
        share = max((term.dropout for term in terms), default=0.0)
        if share and len(terms) > 1:
            raise ValueError(
                "kt_sft: dropout on experts is for one adapter alone, not beside others or on top of merged ones; set "
                "lora_dropout: 0, or start from an exported model"
            )
        return Dropout.drawn(share)

    def _operands_of(self, terms: Sequence[Term]) -> Operands | None:
        if not terms:
            return None
        rows = self.intermediate_dim * (2 if self.store.gated else 1)
        return self._operands.operands(
            terms, (rows, self.hidden_dim), (self.hidden_dim, self.intermediate_dim), self.num_experts
        )

    def prepare_forward(self, link: Link, crossing: Crossing) -> tuple[Ticket, CallTensors]:
        """Prepares a call, whose tokens may be on their way to the CPU yet: no value of them is looked at.

        Returns:
            What is to be started when they are there, and what the call is about.
        """
        (x_TH, idx_TK, w_TK), (y_TH,) = crossing.sources, crossing.results
        is_kept = self.config.activation_policy == "retain" and is_checkpointed()
        is_first = will_be_called_again()
        idx_kept_TK, w_kept_TK = idx_TK, w_TK
        if link.wanted or is_kept:
            idx_kept_TK, w_kept_TK = crossing.keep(idx_TK), crossing.keep(w_TK)
        x_kept_TH = crossing.keep(x_TH) if link.wanted else x_TH
        y_kept_TH = crossing.keep(y_TH) if is_kept and is_first else None
        key = CallKey.of(x_TH, idx_kept_TK, w_kept_TK, link.operands, link.dropout) if is_kept else None
        known = None if key is None or is_first else recall(self, key)
        if known is None:
            if link.wanted and crossing.is_copied and not is_first:
                self.count(x_kept_TH, link)  # a copy, kept for backward
            retained = self._retained(idx_kept_TK, w_kept_TK, retains=bool(link.wanted))
        else:
            retained = known.retained
        tensors = CallTensors(x_kept_TH, idx_kept_TK, w_kept_TK, y_kept_TH, retained, key)
        tokens, slots = idx_TK.shape
        pre_SI = None if retained is None else retained.pre_SI
        self.store.expect(tokens * slots, forward=True)
        native = self.engine.prepare_forward(
            **link.settings(),
            tokens=tokens,
            slots=slots,
            dtype=dtype_name(x_TH.dtype, "hidden_states"),
            hidden=x_TH.data_ptr(),
            experts=idx_TK.data_ptr(),
            weights=w_TK.data_ptr(),
            retained=address(pre_SI),
            output=y_TH.data_ptr(),
            digests=0 if key is None else key.digests_T.data_ptr(),
            remembered=None if known is None else known.native,
            kept=list(crossing.kept),
            held=(crossing.held, pre_SI, self.store.native, link.operands, tensors, known),
        )
        return Ticket(native, idx_kept_TK, is_backward=False, meter=self.meter), tensors

    def _retained(self, idx_TK: Tensor, w_TK: Tensor, retains: bool) -> Retained | None:
        """Memory for pre-activations, where they are wanted and there is room."""
        if self.config.activation_policy != "retain" or not (retains or will_be_called_again()):
            return None
        rows, columns = idx_TK.numel(), self.intermediate_dim * (2 if self.store.gated else 1)
        return retention().take(
            2 * rows * columns,
            limit_of(self.config.retained_mb),
            lambda: torch.from_numpy(self.engine.take_bf16(rows, columns)).view(torch.bfloat16),
            idx_TK,
            w_TK,
        )

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
                "state dict without them, or an adapter whose config names the experts in target_parameters"
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

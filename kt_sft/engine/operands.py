"""What the engine multiplies for adapters: BF16 copies in its own format, and the way of their gradients back.

Shape letters: E experts, H hidden size, I expert intermediate size, R the engine's rank: that of all terms together,
padded. Ungated experts have I rows where gated ones have 2I.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from kt_sft.engine.low_rank import LowRank

#: The engine's rank is a multiple of this.
_RANK_STEP = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """A change of every expert's matrix, scale · B A.

    Args:
        a: [E, r, inputs], FP32, on any device and with any strides; may be part of a graph.
        b: [E, outputs, r], likewise; outputs may be two dimensions.
        scale: What the product is multiplied by.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[1]

    def detached(self) -> Factors:
        """The same values, part of no graph."""
        return Factors(self.a.detach(), self.b.detach(), self.scale)


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """What one adapter changes: gate and up, which share A, and down; None where it changes nothing.

    `dropout` is the share of what A reads that is left out.
    """

    gate_up: Factors | None
    down: Factors | None
    dropout: float = 0.0

    @classmethod
    def of(cls, change: LowRank) -> Term:
        """A change that is no longer trained."""
        return cls(Factors(change.gate_up_a, change.gate_up_b, 1.0), Factors(change.down_a, change.down_b, 1.0))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """A and B of gate and up, and of down."""
        return tuple(t for factors in (self.gate_up, self.down) if factors is not None for t in (factors.a, factors.b))

    def detached(self) -> Term:
        """The same values, part of no graph. A factor that two parts share stays one."""
        parts = {id(part): part.detached() for part in (self.gate_up, self.down) if part is not None}
        gate_up, down = (None if part is None else parts[id(part)] for part in (self.gate_up, self.down))
        return Term(gate_up, down, self.dropout)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """What a call's adapters leave out: a function of a seed and of each value's place, the same in every pass.

    Args:
        seed: Of 64 bits.
        below: How many of 2^32 equally likely numbers leave a value out.
    """

    seed: int = 0
    below: int = 0

    @classmethod
    def drawn(cls, share: float) -> Dropout:
        """With a new seed of torch's own generator of the CPU, which checkpointing restores to compute a call again."""
        if share == 0:
            return cls()
        return cls(int(torch.randint(1 << 62, (), device="cpu")), min(round(share * 2**32), 2**32 - 1))

    @property
    def scale(self) -> float:
        """What is left is multiplied by this, to keep its mean."""
        return 1 / (1 - self.below / 2**32)


@dataclasses.dataclass(frozen=True, eq=False)
class Operands:
    """Adapters in the engine's format, one after the other along the rank. Scales are folded into B.

    Args:
        gate_up_a: [E, R, H] BF16.
        gate_up_b: [E, 2I, R] BF16.
        down_a: [E, R, I] BF16.
        down_b: [E, H, R] BF16.
    """

    gate_up_a: Tensor
    gate_up_b: Tensor
    down_a: Tensor
    down_b: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The matrices, in the engine's order."""
        return self.gate_up_a, self.gate_up_b, self.down_a, self.down_b

    def native(self, dropout: Dropout) -> tuple[float, ...]:
        """As the native engine takes them; the tensors must be kept alive."""
        addresses = [tensor.data_ptr() for tensor in self.tensors]
        return self.gate_up_a.shape[1], dropout.scale, *addresses, dropout.seed, dropout.below

    def new_gradients(self) -> tuple[Tensor, ...]:
        """Zeros for the engine to add the matrices' gradients to, FP32 in their shapes."""
        return tuple(torch.zeros(tensor.shape, dtype=torch.float32, device="cpu") for tensor in self.tensors)


def pack(terms: Sequence[Term], gate_up_shape: tuple[int, int], down_shape: tuple[int, int], experts: int) -> Operands:
    """Copies adapters into the engine's format.

    Args:
        terms: At least one.
        gate_up_shape: (rows, columns) of gate and up together: (2I, H).
        down_shape: (H, I).
        experts: E.
    """
    ranks = [sum(factors.rank for _, factors in _parts(terms, part)) for part in (0, 1)]
    rank = -(-max(ranks) // _RANK_STEP) * _RANK_STEP
    tensors = []
    for part, (rows, columns) in enumerate((gate_up_shape, down_shape)):
        a = torch.zeros(experts, rank, columns, dtype=torch.bfloat16, device="cpu")
        b = torch.zeros(experts, rows, rank, dtype=torch.bfloat16, device="cpu")
        for first, factors in _parts(terms, part):
            # Rounded where they are: half as much to transfer.
            a[:, first : first + factors.rank] = factors.a.detach().to(torch.bfloat16)
            scaled = (factors.b.detach() * factors.scale).to(torch.bfloat16)
            b[:, :, first : first + factors.rank] = scaled.flatten(1, -2)
        tensors += [a, b]
    return Operands(*tensors)


def split_gradients(terms: Sequence[Term], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of every term's tensors, in their order, on the CPU.

    Args:
        terms: As packed.
        gradients: Of the operands' tensors.
    """
    places: list[dict[int, int]] = [{}, {}]
    for part in (0, 1):
        for first, factors in _parts(terms, part):
            places[part][id(factors)] = first
    split = []
    for term in terms:
        present = [(part, factors) for part, factors in enumerate((term.gate_up, term.down)) if factors is not None]
        for part, factors in present:
            a_grad, b_grad = gradients[2 * part : 2 * part + 2]
            place = slice(places[part][id(factors)], places[part][id(factors)] + factors.rank)
            split += [a_grad[:, place], (b_grad[:, :, place] * factors.scale).view(factors.b.shape)]
    return split


def _parts(terms: Sequence[Term], part: int) -> Iterator[tuple[int, Factors]]:
    """(place along the rank, factors) of the terms that change gate and up (part 0) or down (part 1)."""
    first = 0
    for term in terms:
        factors = (term.gate_up, term.down)[part]
        if factors is not None:
            yield first, factors
            first += factors.rank


@dataclasses.dataclass(frozen=True)
class _Packed:
    """Operands, and what they were made of. That is kept, or other tensors might come to lie at the same addresses."""

    state: tuple[Any, ...]
    operands: Operands
    terms: list[Term]  # detached
    is_trained: bool
    sizes: tuple[tuple[int, int], tuple[int, int], int]

    @classmethod
    def of(cls, terms: Sequence[Term], is_trained: bool, *sizes: Any) -> _Packed:
        state = _state(terms, is_trained)
        return cls(state, pack(terms, *sizes), [term.detached() for term in terms], is_trained, sizes)

    @property
    def is_behind(self) -> bool:
        """Whether an optimizer has taken a step since, and the adapters lie on an accelerator."""
        return self.is_trained and self.state[0] != _optimizer_steps().count and _is_far(self.terms)


class OperandCache:
    """The operands of the last call, made anew only where the adapters have changed since.

    Autograd's counter tells of changes in place, an optimizer's step of those made past it through `.data`.

    Copies from an accelerator make the host wait until it has come there. So all caches whose operands a step of an
    optimizer has put behind are made anew with the first: then it has nothing else to do yet.
    """

    def __init__(self) -> None:
        self._last: _Packed | None = None  # in one, as several threads may call a layer
        self._is_used = False  # since it was made anew for others
        _caches.add(self)

    def operands(
        self, terms: Sequence[Term], gate_up_shape: tuple[int, int], down_shape: tuple[int, int], experts: int
    ) -> Operands:
        """As `pack` gives them, for the present values."""
        self._is_used = True
        is_trained, last = any(tensor.requires_grad for term in terms for tensor in term.tensors), self._last
        if last is not None and last.state == _state(terms, is_trained):
            return last.operands
        packed = self._last = _Packed.of(terms, is_trained, gate_up_shape, down_shape, experts)
        if last is not None and last.is_behind:
            for cache in [*_caches]:
                cache._renew()
        return packed.operands

    def _renew(self) -> None:
        last = self._last
        if last is not None and self._is_used and last.is_behind:
            self._is_used = False
            self._last = _Packed.of(last.terms, last.is_trained, *last.sizes)

    def clear(self) -> None:
        """Lets go of the operands and of what they were made of."""
        self._last = None

    def __deepcopy__(self, memo: dict[int, object]) -> OperandCache:
        return OperandCache()


_caches: weakref.WeakSet[OperandCache] = weakref.WeakSet()


def _is_far(terms: Sequence[Term]) -> bool:
    return any(tensor.device.type != "cpu" for term in terms for tensor in term.tensors)


def _state(terms: Sequence[Term], is_trained: bool) -> tuple[Any, ...]:
    tensors = [tensor for term in terms for tensor in term.tensors]
    places = [(t.data_ptr(), t.device, t.shape, t.stride(), _version(t)) for t in tensors]
    scales = [
        (part, factors.scale) for term in terms for part, factors in enumerate((term.gate_up, term.down)) if factors
    ]
    return _optimizer_steps().count if is_trained else -1, *places, *scales


def _version(tensor: Tensor) -> object:
    """Autograd's counter of changes. What was made in inference mode has none, and is taken as changed every time."""
    return object() if tensor.is_inference() else tensor._version


class _OptimizerSteps:
    """How many steps the optimizers of this process have taken, all together."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


@functools.cache
def _optimizer_steps() -> _OptimizerSteps:
    return _OptimizerSteps()

"""What is kept of a layer's forward until its backward: pre-activations, and outputs of layers that are checkpointed.

Shape letters: T tokens, K experts per token, H hidden size, I expert intermediate size, S = T·K.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from kt_sft.config import local_rank_and_size
from kt_sft.engine.memory import available_bytes
from kt_sft.engine.turns import takes_turns

logger = logging.getLogger("kt_sft")

_MIB = 1 << 20

#: The part of the host memory that is free at the first retaining forward, where no setting says how much.
_SHARE = 0.5


class Retained:
    """The pre-activations of one forward, [S, 2I] BF16, until they are used up, or given up to make room.

    Their rows are sorted by expert, so they are of use only to a backward over the same routing.
    """

    def __init__(self, pre_SI: Tensor, idx_TK: Tensor, w_TK: Tensor) -> None:
        self.pre_SI: Tensor | None = pre_SI
        self._routing = idx_TK, w_TK

    @property
    def routing(self) -> tuple[Tensor, Tensor]:
        """Of what they are the pre-activations: experts and weights, [T, K] both.

        Checkpointing hands backward what the second call has computed. Should that have been routed otherwise, all of
        it counts: the engine compares, and computes pre-activations again.
        """
        return self._routing

    def give_up(self) -> None:
        """Lets go of the memory; backward computes pre-activations again."""
        self.pre_SI = None


class Retention:
    """All that this process retains: pre-activations, oldest first, and what is there beside them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # memory may be released, by its last owner, while this thread is in here
        self._kept: dict[int, tuple[weakref.ref[Retained], int]] = {}
        self._number = self.nbytes = 0
        self._beside = 0  # of `nbytes`: what cannot be given up
        self._said_spilling = False

    def count(self, nbytes: int, limit: int, owner: object) -> None:
        """Counts memory that cannot be given up: as much less is left for pre-activations.

        Args:
            nbytes: The size.
            limit: Of all together, in bytes.
            owner: The memory is there as long as this object.
        """
        with self._lock:
            self._beside += nbytes
            self.nbytes += nbytes
            weakref.finalize(owner, self._release, nbytes).atexit = False
        self._make_room(limit)

    def take(
        self, nbytes: int, limit: int, allocate: Callable[[], Tensor], idx_TK: Tensor, w_TK: Tensor
    ) -> Retained | None:
        """Memory for pre-activations; the oldest ones are given up where they would not all stay within the limit.

        Args:
            nbytes: The size.
            limit: Of all together, in bytes.
            allocate: Gives the memory.
            idx_TK: The routing of the forward whose pre-activations they are going to be.
            w_TK: Likewise.

        Returns:
            None if not even these alone fit beside what cannot be given up.
        """
        if self._beside + nbytes > limit:
            return None
        self._make_room(limit - nbytes)
        retained = Retained(allocate(), idx_TK, w_TK)
        with self._lock:
            self._number += 1
            self._kept[self._number] = weakref.ref(retained), nbytes
            self.nbytes += nbytes
            weakref.finalize(retained, self._forget, self._number).atexit = False
        return retained

    def _make_room(self, limit: int) -> None:
        with self._lock:
            while self.nbytes > limit and self._kept:
                # A collection in this thread may forget others, or this one, between any two of these lines.
                number = min(list(self._kept), default=0)
                kept, nbytes = self._kept.pop(number, (None, 0))
                self.nbytes -= nbytes
                retained = None if kept is None else kept()
                if retained is None:
                    continue
                retained.give_up()
                if not self._said_spilling:
                    self._said_spilling = True
                    logger.info(
                        "the memory for retained activations is full: the oldest are given up and computed again in "
                        "backward; set retained_mb higher where there is more"
                    )

    def _forget(self, number: int) -> None:
        with self._lock:
            _, nbytes = self._kept.pop(number, (None, 0))
            self.nbytes -= nbytes

    def _release(self, nbytes: int) -> None:
        with self._lock:
            self._beside -= nbytes
            self.nbytes -= nbytes


@functools.cache
def retention() -> Retention:
    """This process's."""
    return Retention()


@functools.cache
def _free_share() -> int:
    """The limit where no setting says one; found once, when the model's weights are there."""
    free = available_bytes()
    rank, processes = local_rank_and_size()
    if free is None:
        return sys.maxsize
    limit = int(free * _SHARE / processes)
    if rank == 0:
        logger.info(
            "experts' activations are retained in up to %.1f GiB of host memory, half of what is free%s; beyond that "
            "they are computed again (set retained_mb for another amount)",
            limit / (1024 * _MIB),
            f" for {processes} processes" if processes > 1 else "",
        )
    return limit


def limit_of(retained_mb: int | None) -> int:
    """Bytes that may be retained, by the setting."""
    return _free_share() if retained_mb is None else retained_mb * _MIB


@dataclasses.dataclass(frozen=True)
class CallKey:
    """What tells whether a call of a layer is the same as one before, to the bit.

    Of `facts` that is known when it is prepared. Tokens may be on their way then: the engine compares them and their
    routing when they are there, hidden states by a digest of each token. To keep them would take as much memory again
    as the output.
    """

    facts: tuple[Any, ...]  # dtype, shape, and whatever else the result depends on, to be compared by `==`
    digests_T: Tensor  # int64, written by the engine
    idx_TK: Tensor
    w_TK: Tensor

    @classmethod
    def of(cls, x_TH: Tensor, idx_TK: Tensor, w_TK: Tensor, *settings: Any) -> CallKey:
        """Of tensors on the CPU, which need not be filled yet."""
        digests_T = torch.empty(x_TH.shape[0], dtype=torch.int64, device="cpu")
        return cls((x_TH.dtype, x_TH.shape, idx_TK.shape, *settings), digests_T, idx_TK, w_TK)

    @property
    def native(self) -> tuple[int, int, int]:
        """As the native engine takes it; the tensors must be kept alive."""
        return self.digests_T.data_ptr(), self.idx_TK.data_ptr(), self.w_TK.data_ptr()


@dataclasses.dataclass(frozen=True)
class Result:
    """What a forward gave, for the time when it is asked for again."""

    key: CallKey
    y_TH: Tensor
    version: int
    retained: Retained | None
    completion: Any  # the native engine's, of the call: all of this is there when it is done

    @property
    def native(self) -> tuple[Any, ...]:
        """As the native engine takes it; the tensors must be kept alive."""
        return self.completion, *self.key.native, self.y_TH.data_ptr()


class _Results:
    """Of the layers of one checkpointed piece, in the order of their calls."""

    def __init__(self) -> None:
        self.is_first = True
        self._of: dict[Any, list[Result]] = {}

    def add(self, layer: Any, result: Result) -> None:
        self._of.setdefault(layer, []).append(result)

    def take(self, layer: Any, key: CallKey) -> Result | None:
        results = self._of.get(layer)
        result = results.pop(0) if results else None
        if result is None:
            return None
        if result.key.facts != key.facts:
            if result.retained is not None:
                result.retained.give_up()  # the first call is void: backward is over the second
            return None
        # The output is the model's own tensor where that is on the CPU: it may have been changed in place.
        return result if result.y_TH._version == result.version else None


_RESULTS: ContextVar[_Results | None] = ContextVar("kt_sft_checkpointed_results", default=None)


class CheckpointedPiece(functools.partial):
    """A function that is called in forward and again in backward, as activation checkpointing does.

    Layers that are called within remember their results from the first call for the second. It lives as long as
    the graph that may call it again, and so do they. It is a `partial`, as which LLaMA-Factory looks into it.
    """

    results: _Results

    @classmethod
    def of(cls, function: Callable[..., Any]) -> CheckpointedPiece:
        """Of what is given to a checkpointing function."""
        if isinstance(function, functools.partial):
            piece = cls(function.func, *function.args, **function.keywords)
        else:
            piece = cls(function)
        piece.results = _Results()
        return piece

    def __call__(self, /, *args: Any, **keywords: Any) -> Any:
        """As the function; the first call is told apart from those after it."""
        with _within(self.results):
            return super().__call__(*args, **keywords)


@contextmanager
def _within(results: _Results) -> Iterator[None]:
    token = _RESULTS.set(results)
    try:
        yield
    finally:
        results.is_first = False
        _RESULTS.reset(token)


def in_pieces(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointing function whose pieces let layers remember their results."""

    @functools.wraps(checkpoint)
    def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # otherwise there will be no second call, as in a pass of DPO's reference
            function = CheckpointedPiece.of(function)
        if takes_turns():  # a reentrant backward of one piece would wait for the CPU while that of another could run
            kwargs["use_reentrant"] = False
        return checkpoint(function, *args, **kwargs)

    return checkpointed


def is_checkpointed() -> bool:
    """Whether this thread is in a checkpointed piece."""
    return _RESULTS.get() is not None


def will_be_called_again() -> bool:
    """Whether this thread is in the first call of a checkpointed piece."""
    results = _RESULTS.get()
    return results is not None and results.is_first


def remember(layer: Any, result: Result) -> None:
    """Keeps a result for the second call of the piece that this thread is in."""
    results = _RESULTS.get()
    if results is not None and results.is_first:
        results.add(layer, result)


def recall(layer: Any, key: CallKey) -> Result | None:
    """The result of what may be the same call in the first call of the piece; None if there is none."""
    results = _RESULTS.get()
    return None if results is None or results.is_first else results.take(layer, key)

"""How the tensors of one pass cross between their device and the engine.

CPU tensors do not cross at all: the engine reads and writes them where they are. For an accelerator's see
kt_sft/offload/transfers.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kt_sft.engine.ticket import Ticket


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a result of a pass goes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Crossing(Protocol):
    """The tensors of one pass on their way to the engine and back."""

    @property
    def is_copied(self) -> bool:
        """Whether what is kept of the first source is a copy."""

    @property
    def held(self) -> object:
        """What must live as long as the engine works on them."""

    @property
    def sources(self) -> Sequence[Tensor]:
        """What the pass reads, contiguous and on the CPU; filled when the engine begins."""

    @property
    def results(self) -> Sequence[Tensor]:
        """What the engine writes, contiguous and on the CPU."""

    @property
    def kept(self) -> Sequence[tuple[int, int, int]]:
        """What the engine is to copy when results are there, for `keep`: (to, from, bytes)."""

    def keep(self, tensor: Tensor) -> Tensor:
        """A source or a result for longer than the crossing lasts; filled when the pass is done."""

    def start(self, ticket: Ticket) -> None:
        """Lets the engine begin as soon as the sources have arrived.

        Raises:
            EngineError: The engine has stopped.
        """

    def finish(self, ticket: Ticket, around: int) -> list[Tensor]:
        """The results at their places; ends the crossing.

        Args:
            ticket: That was started.
            around: The backward within which the forward ran, as one of a checkpointed piece does; -1: within none.

        Raises:
            EngineError: The pass failed, or the engine has stopped; or so did one before it.
            IndexError: As the engine raises it.
        """


class Direct:
    """A pass over tensors on the CPU; others are copied there and back while the caller waits.

    Args:
        sources: What the pass reads, and the dtype that the engine takes.
        places: Of its results.
    """

    kept: Sequence[tuple[int, int, int]] = ()

    def __init__(self, sources: Sequence[tuple[Tensor, torch.dtype]], places: Sequence[Place]) -> None:
        self.sources: Sequence[Tensor] = [t.detach().to("cpu", dtype).contiguous() for t, dtype in sources]
        self.is_copied = self.sources[0].data_ptr() != sources[0][0].data_ptr()
        self._places = places

    @functools.cached_property
    def results(self) -> Sequence[Tensor]:
        """Memory of their own, taken when first asked for."""
        return [torch.empty(place.shape, dtype=place.dtype, device="cpu") for place in self._places]

    @property
    def held(self) -> object:
        """The tensors."""
        return self.sources, self.results

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def start(self, ticket: Ticket) -> None:
        """Starts it now."""
        ticket.start()

    def finish(self, ticket: Ticket, around: int) -> list[Tensor]:
        """The results themselves, where their place is the CPU."""
        ticket.wait()
        return [result.to(place.device) for result, place in zip(self.results, self._places, strict=True)]


def cross(
    device: torch.device, sources: Sequence[tuple[Tensor, torch.dtype]], places: Sequence[Place], *, in_stream: bool
) -> Crossing:
    """Begins to take tensors to the engine.

    Args:
        device: Where the pass's main tensor is; others may be elsewhere.
        sources: What the pass reads, and the dtypes that the engine takes.
        places: Of its results.
        in_stream: Whether a device that can may wait for the results by itself, so that a failure shows later: at the
            end of a backward, at the latest.
    """
    if device.type in ("cpu", "meta"):
        return Direct(sources, places)
    # The accelerator's side lies above the engine's: it is looked up when the first tensor comes from one.
    from kt_sft.offload.transfers import transfers_of

    near = [(t if t.device in (device, torch.device("cpu")) else t.to(device), dtype) for t, dtype in sources]
    return transfers_of(device).cross(near, places, in_stream=in_stream)

"""How the tensors of one pass cross between their device and the engine.

CPU tensors do not cross at all: the engine reads and writes them where they are. For an accelerator's see
kt_sft/offload/transfers.py.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

#: Seconds between two looks whether the thread that submits is still there.
_LOOK = 1.0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a result of a pass goes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Submission:
    """A pass on its way to the engine. Thread-safe.

    Args:
        check: Called from time to time while somebody waits; raises where nobody is left who would submit.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._is_over = threading.Event()
        self._ticket: Any = None
        self._error: BaseException | None = None

    def run(self, job: Callable[[], Any]) -> None:
        """Calls what submits, and keeps what it gives or raises for whoever asks."""
        try:
            self._ticket = job()
        except BaseException as error:
            self._error = error
        self._is_over.set()

    def fail(self, error: BaseException) -> None:
        """Tells whoever asks that there will be no ticket."""
        self._error = error
        self._is_over.set()

    def ticket(self) -> Any:
        """The engine's ticket, once there is one; None where there was nothing to compute.

        Raises:
            Exception: What submitting raised.
            EngineError: The thread that should submit is not there any more.
        """
        while not self._is_over.wait(_LOOK):
            self._check()
        if self._error is not None:
            raise self._error
        return self._ticket


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
        """What the pass reads, contiguous and on the CPU; filled when `submit` calls its job."""

    @property
    def results(self) -> Sequence[Tensor]:
        """What the engine writes, contiguous and on the CPU."""

    def submit(self, job: Callable[[], Any]) -> Submission:
        """Calls `job` when the sources have arrived, maybe on another thread. It gives the engine's ticket."""

    def keep(self, tensor: Tensor) -> Tensor:
        """A source or a result to be kept for longer than the crossing lasts."""

    def deliver(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Takes the results to their places, and ends the crossing.

        Args:
            results: `self.results`, once the engine is done with them, or others like them.
        """


class Direct:
    """A pass over tensors on the CPU; others are copied there and back while the caller waits.

    Args:
        sources: What the pass reads, and the dtype that the engine takes.
        places: Of its results.
    """

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

    def submit(self, job: Callable[[], Any]) -> Submission:
        """Calls `job` now, and raises what it raises."""
        submission = Submission()
        ticket = job()
        submission.run(lambda: ticket)
        return submission

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def deliver(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The results themselves, where their place is the CPU."""
        return [result.to(place.device) for result, place in zip(results, self._places, strict=True)]


def cross(device: torch.device, sources: Sequence[tuple[Tensor, torch.dtype]], places: Sequence[Place]) -> Crossing:
    """Begins to take tensors to the engine.

    Args:
        device: Where the pass's main tensor is; others may be elsewhere.
        sources: What the pass reads, and the dtypes that the engine takes.
        places: Of its results.
    """
    if device.type in ("cpu", "meta"):
        return Direct(sources, places)
    # The accelerator's side lies above the engine's: it is looked up when the first tensor comes from one.
    from kt_sft.offload.transfers import transfers_of

    near = [(t if t.device in (device, torch.device("cpu")) else t.to(device), dtype) for t, dtype in sources]
    return transfers_of(device).cross(near, places)

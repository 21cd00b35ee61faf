"""One copy of the experts for all processes of a job on one machine: one of them fills it, the others read it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kt_sft.config import local_rank_and_size
from kt_sft.engine.cpus import usable_cpus
from kt_sft.engine.job import Following, LostPeerError, Offer, join
from kt_sft.engine.store import LayerStore
from kt_sft.loading.biases import read_bias
from kt_sft.loading.errors import CheckpointError, SharedLoadError
from kt_sft.loading.mapped import map_files
from kt_sft.loading.mapping import ModulePlan
from kt_sft.loading.streaming import stream

logger = logging.getLogger("kt_sft")

Work = Sequence[tuple[ModulePlan, LayerStore]]

#: Seconds in which the others should have heard of a failure, so that this process can end.
_FAREWELL = 5.0


class Loader:
    """Makes stores and fills them, for this process alone."""

    #: Processes of this machine that hold the experts together.
    sharers = 1
    #: Whether the experts stay in the checkpoint's files.
    mapped = False

    @property
    def speaks(self) -> bool:
        """Whether it is this process that says what concerns all of this machine."""
        return local_rank_and_size()[0] == 0

    def decide(self, mapped: Callable[[], bool]) -> None:
        """Settles, before any store is made, whether the experts stay in the checkpoint's files.

        Args:
            mapped: Decides so, and sees that there is enough memory; it is not asked where another process was.

        Raises:
            SharedLoadError: The process that was asked failed.
        """
        self.mapped = mapped()

    def store(self, **options: Any) -> LayerStore:
        """A store, not yet filled; `options` as LayerStore's."""
        return LayerStore(**options, mapped=self.mapped)

    def fill(self, work: Work) -> None:
        """Fills all stores that this made, in the same order.

        Raises:
            CheckpointError: As `stream` and `map_files`.
            SharedLoadError: The process that was to fill them failed.
        """
        if self.mapped:
            map_files(work)
        else:
            self._stream(work)
        for plan, store in work:
            _set_biases(plan, store)
            _check_complete(plan, store)

    def _stream(self, work: Work) -> None:
        stream(work, shown=local_rank_and_size()[0] == 0)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """What fails inside is said to the processes that wait for this one."""
        yield


class Filler(Loader):
    """Fills stores whose memory all processes of this machine have."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._living = 0
        self.sharers = local_rank_and_size()[1]

    @property
    def speaks(self) -> bool:
        """It decides for the others, whatever its rank."""
        return True

    def decide(self, mapped: Callable[[], bool]) -> None:
        """As Loader's."""
        super().decide(mapped)
        self._offer.send({"mapped": self.mapped})

    def store(self, **options: Any) -> LayerStore:
        """As Loader's."""
        store = LayerStore(**options, mapped=self.mapped, shared=not self.mapped)
        if not self.mapped:
            self._offer.send({}, [store.descriptor])
        # The offer keeps the memory as well, for those who come later; it must not outlive the model.
        self._living += 1
        weakref.finalize(store, self._release).atexit = False
        return store

    def fill(self, work: Work) -> None:
        """As Loader's."""
        with self.reporting():
            super().fill(work)
        self._offer.send({"errors": [store.error for _, store in work]})

    def _stream(self, work: Work) -> None:
        with ThreadPoolExecutor(len(usable_cpus()), "kt_sft-pages") as pool:
            list(pool.map(lambda item: item[1].take_huge_pages(), work))
        stream(work)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """As Loader's."""
        try:
            yield
        except BaseException as error:
            self._offer.send({"failure": f"{type(error).__name__}: {error}"[:8192]})
            self._offer.flush(_FAREWELL)
            self._offer.close()  # who asks only now may try for itself
            raise

    def _release(self) -> None:
        self._living -= 1
        if self._living == 0:
            self._offer.close()


class Reader(Loader):
    """Maps stores that another process fills."""

    def __init__(self, following: Following) -> None:
        self._following = following
        self.sharers = local_rank_and_size()[1]

    def decide(self, mapped: Callable[[], bool]) -> None:  # the other process was asked
        """As Loader's."""
        self.mapped = self._receive()[0]["mapped"]

    def store(self, **options: Any) -> LayerStore:
        """As Loader's."""
        if self.mapped:
            return super().store(**options)
        _, descriptors = self._receive()
        try:
            return LayerStore(**options, descriptor=descriptors[0])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def fill(self, work: Work) -> None:
        """As Loader's: waits until it is done."""
        super().fill(work)
        self._following.close()

    def _stream(self, work: Work) -> None:
        message, _ = self._receive()
        for (_, store), error in zip(work, message["errors"], strict=True):
            store.adopt(error)

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        try:
            message, descriptors = self._following.receive()
        except LostPeerError as error:
            raise SharedLoadError(
                "kt_sft: the process that was loading the experts for all processes of this machine has ended; its "
                "own output says why"
            ) from error
        if "failure" in message:
            raise SharedLoadError(
                "kt_sft: the process that was loading the experts for all processes of this machine failed with "
                f"{message['failure']}"
            )
        return message, descriptors


def _set_biases(plan: ModulePlan, store: LayerStore) -> None:
    """Gives a store the biases of its plan, if there are any.

    Raises:
        CheckpointError: One holds a NaN or Inf, or cannot be read.
    """
    if plan.gate_up_bias is not None and plan.down_bias is not None:
        store.set_biases(
            read_bias(plan.gate_up_bias, plan.layout, first=True), read_bias(plan.down_bias, plan.layout, first=False)
        )


def _check_complete(plan: ModulePlan, store: LayerStore) -> None:
    missing = store.missing()
    if missing:
        matrix, expert = missing[0]
        raise CheckpointError(f"{plan.name}: {matrix} of expert {expert} was never filled ({len(missing)} such)")


def loader_for(keys: Sequence[Hashable]) -> Loader:
    """Who fills stores: the first process of the job, on this machine, that asks for these.

    Args:
        keys: What tells the stores' content from others', in the order in which they will be made.

    Raises:
        RuntimeError: A process of this job does not answer.
    """
    if not keys or local_rank_and_size()[1] == 1:
        return Loader()
    joined = join(f"experts {hashlib.sha256(repr(keys).encode()).hexdigest()}")
    if isinstance(joined, Offer):
        return Filler(joined)
    if isinstance(joined, Following):
        return Reader(joined)
    if local_rank_and_size()[0] == 0:
        logger.warning(
            "the launcher started several processes but set no MASTER_PORT, so they cannot find each other: each loads "
            "its own copy of the experts; start them with torchrun to hold one"
        )
    return Loader()

"""Processes of one job, forked from the test's: they start at once, with everything imported."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

#: Seconds in which a message of another process must come.
PATIENCE = 60

Body = Callable[[Connection], None]


class Rank:
    """A process of a job, and a pipe to it."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process = process
        self._pipe = pipe

    def hears(self) -> Any:
        """What the process sends next."""
        assert self._pipe.poll(PATIENCE), "the process says nothing"
        return self._pipe.recv()

    def go_on(self) -> None:
        """Lets the process pass its next `recv`."""
        self._pipe.send(None)

    def kill(self) -> None:
        """kill -9, and waits for the end."""
        self.process.kill()
        self.process.join()


@contextmanager
def forked_ranks(port: str) -> Iterator[Callable[..., Rank]]:
    """Starts functions of a pipe as ranks 0, 1, 0, 1, ... of a job of two; what is left of them at the end is killed.

    Args:
        port: `MASTER_PORT`, which tells the job from others.
    """
    gc.collect()  # what an earlier test left in reference cycles, a child would have mapped, too
    context = multiprocessing.get_context("fork")
    ranks: list[Rank] = []

    def start(body: Body, **environment: str) -> Rank:
        ours, theirs = context.Pipe()
        launched = {"LOCAL_RANK": str(len(ranks) % 2), "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}

        def run() -> None:
            os.environ.update(launched | environment)
            body(theirs)

        process = context.Process(target=run, daemon=True)
        process.start()
        ranks.append(Rank(process, ours))
        return ranks[-1]

    try:
        yield start
    finally:
        for rank in ranks:
            rank.kill()

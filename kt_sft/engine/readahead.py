"""Reads the next layer's pages while the current one is computed, for layers whose weights are mapped from files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Neighbours:
    """What comes before and after a layer.

    Args:
        layers: The native layers of a model, in the order in which they are computed.
        place: This layer's.
        reader: Reads for all layers of the model.
    """

    def __init__(self, layers: Sequence[Any], place: int, reader: Reader) -> None:
        self._above = layers[place + 1] if place + 1 < len(layers) else None
        self._below = layers[place - 1] if place > 0 else None
        self._reader = reader

    def read(self, *, forward: bool) -> None:
        """Begins to read the layer that comes next."""
        layer = self._above if forward else self._below
        if layer is not None:
            self._reader.read(layer)


class Reader:
    """One thread that reads one layer after the other."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "kt_sft-readahead")
        self._reading: Future[None] | None = None

    def read(self, layer: Any) -> None:
        """Begins to read a layer, unless another is still being read: then the disk is the limit, and busy."""
        if self._reading is None or self._reading.done():
            self._reading = self._thread.submit(layer.read_ahead)

    def finish(self) -> None:
        """Waits until nothing is being read."""
        if self._reading is not None:
            self._reading.result()

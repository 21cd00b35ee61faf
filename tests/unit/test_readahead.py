"""Which layer's pages are read while another is computed."""

from __future__ import annotations

import threading

from kt_sft.engine.readahead import Neighbours, Reader


class Layer:
    """Says which layers were read; may hold a read back."""

    def __init__(self, read: list[Layer]) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self._read = read

    def read_ahead(self) -> None:
        self.go_on.wait()
        self._read.append(self)


def test_the_next_layer_is_the_one_above_in_forward_and_below_in_backward() -> None:
    read: list[Layer] = []
    layers = [Layer(read) for _ in range(3)]
    for place in range(3):
        for forward in (True, False):
            reader = Reader()
            Neighbours(layers, place, reader).read(forward=forward)
            reader.finish()
    assert [layers.index(layer) for layer in read] == [1, 2, 0, 1]


def test_what_comes_while_another_is_read_is_left_out() -> None:
    read: list[Layer] = []
    layers, reader = [Layer(read) for _ in range(3)], Reader()
    layers[0].go_on.clear()
    reader.read(layers[0])
    reader.read(layers[1])
    layers[0].go_on.set()
    reader.finish()
    reader.read(layers[2])
    reader.finish()
    assert read == [layers[0], layers[2]]

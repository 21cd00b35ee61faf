"""Functions that take turns where they wait for experts, and a joint backward of what they made.

Micro-batches are chains of a letter each: `a0` notes that micro-batch a submits layer 0, `A0` that it awaits it, which
in backward happens in reverse: its backward of `A0` submits, that of `a0` awaits.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_sft.engine.turns import hand_over, takes_turns
from kt_sft.offload import interleave
from kt_sft.offload.interleave import Interleaver


@pytest.fixture(scope="module")
def interleaver() -> Interleaver:
    return Interleaver(torch.device("cpu"))


class Noted(torch.autograd.Function):
    """The identity, which notes its name when it runs, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, events: list[str]) -> Tensor:
        ctx.name, ctx.events = name, events
        events.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(ctx.name)
        return grad, None, None


def chain(events: list[str], letter: str, layers: int, nodes: int) -> Callable[[], Tensor]:
    """As a model with `layers` of experts, and so many nodes in the attention of each."""

    def forward() -> Tensor:
        x = torch.ones((), requires_grad=True)
        for layer in range(layers):
            for _ in range(nodes):
                x = x * 2
            x = Noted.apply(x, f"{letter}{layer}", events)
            hand_over()
            x = Noted.apply(x, f"{letter.upper()}{layer}", events)
        return x

    return forward


@pytest.mark.parametrize("nodes", [(1, 1), (1, 9), (9, 1)], ids=str)
def test_backward_is_forward_in_reverse(interleaver: Interleaver, nodes: tuple[int, int]) -> None:
    """Whatever each has between its layers, and however far their threads have counted before."""
    for _ in range(2):
        events: list[str] = []
        made = interleaver.run([chain(events, "a", 3, nodes[0]), chain(events, "b", 3, nodes[1])])
        forward = ["a0", "b0", "A0", "a1", "B0", "b1", "A1", "a2", "B1", "b2", "A2", "B2"]
        assert events == forward
        events.clear()
        torch.add(*made).backward()
        assert events == forward[::-1]


def test_alone_they_do_not_interleave() -> None:
    events: list[str] = []
    made = [chain(events, letter, 2, 1)() for letter in "ab"]
    torch.add(*made).backward()
    assert events == ["a0", "A0", "a1", "A1", "b0", "B0", "b1", "B1", "B1", "b1", "B0", "b0", "A1", "a1", "A0", "a0"]


@pytest.mark.parametrize(
    ("layers", "expected"), [((3, 1), "a0b0A0a1B0A1a2A2"), ((0, 2), "b0B0b1B1"), ((2, 0), "a0A0a1A1")]
)
def test_one_goes_on_alone_when_the_other_is_done(
    interleaver: Interleaver, layers: tuple[int, int], expected: str
) -> None:
    events: list[str] = []
    interleaver.run([chain(events, letter, count, 1) for letter, count in zip("ab", layers, strict=True)])
    assert "".join(events) == expected


def test_one_alone_runs(interleaver: Interleaver) -> None:
    events: list[str] = []
    interleaver.run([chain(events, "a", 2, 1)])
    assert "".join(events) == "a0A0a1A1"


def test_they_have_the_callers_context_and_threads_that_stay(interleaver: Interleaver) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="nothing")
    variable.set("the caller's")

    def function(name: str) -> tuple[str, str, bool, int]:
        before = variable.get()
        variable.set(name)
        hand_over()
        return before, variable.get(), takes_turns(), threading.get_ident()

    assert not takes_turns()
    first = interleaver.run([lambda: function("a"), lambda: function("b")])
    again = interleaver.run([lambda: function("a"), lambda: function("b")])
    assert first == again
    assert [result[:3] for result in first] == [("the caller's", "a", True), ("the caller's", "b", True)]
    assert len({first[0][3], first[1][3], threading.get_ident()}) == 3
    assert variable.get() == "the caller's"
    assert not takes_turns()


class TestErrors:
    @pytest.mark.parametrize("failing", [0, 1])
    @pytest.mark.parametrize("turns", [0, 1, 2])
    def test_one_is_raised_and_stops_the_other(self, interleaver: Interleaver, failing: int, turns: int) -> None:
        left: list[int] = []

        def function(number: int) -> None:
            try:
                for turn in range(5):
                    if (number, turn) == (failing, turns):
                        raise MemoryError("the accelerator is full")
                    try:
                        hand_over()
                    except Exception:  # as of a model that tries again
                        raise AssertionError("what stops it must not be taken for an error of its own") from None
            finally:
                left.append(number)

        with pytest.raises(MemoryError, match="the accelerator is full"):
            interleaver.run([lambda: function(0), lambda: function(1)])
        # What has not begun need not end.
        assert left == ([0] if (failing, turns) == (0, 0) else [failing, 1 - failing])
        self.check_next(interleaver)

    def test_nothing_of_either_is_kept(self, interleaver: Interleaver) -> None:
        """Who is out of memory, and tries again with less, must have it back."""
        kept: list[weakref.ref[Tensor]] = []

        def function(fails: bool) -> None:
            activations = torch.ones(3)
            kept.append(weakref.ref(activations))
            hand_over()
            if fails:
                raise MemoryError("the accelerator is full")

        gc.disable()
        try:
            interleaver.run([lambda: function(False), lambda: function(True)])
        except MemoryError as error:
            caught = str(error)
        finally:
            gc.enable()
        assert caught == "the accelerator is full"
        assert [reference() for reference in kept] == [None, None]

    def test_the_first_of_two_is_raised(self, interleaver: Interleaver) -> None:
        def function(error: Exception) -> None:
            try:
                hand_over()
            finally:
                raise error

        with pytest.raises(ValueError, match="of the first"):
            interleaver.run([lambda: function(ValueError("of the first")), lambda: function(KeyError("another"))])
        self.check_next(interleaver)

    def test_an_interrupt_of_the_caller_stops_both(
        self, interleaver: Interleaver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun = threading.Event()
        wait = interleave.wait

        def interrupted(calls: Sequence[Any]) -> Any:
            assert begun.wait(60)
            monkeypatch.setattr(interleave, "wait", wait)
            raise KeyboardInterrupt

        def function() -> None:
            while True:  # until it is stopped
                begun.set()
                hand_over()

        monkeypatch.setattr(interleave, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            interleaver.run([function, function])
        self.check_next(interleaver)

    @staticmethod
    def check_next(interleaver: Interleaver) -> None:
        events: list[str] = []
        torch.add(*interleaver.run([chain(events, "a", 1, 1), chain(events, "b", 1, 1)])).backward()
        assert events == ["a0", "b0", "A0", "B0", "B0", "A0", "b0", "a0"]


def test_gradients_meet_in_the_parameters_dtype_under_autocast(interleaver: Interleaver) -> None:
    """Autocast keeps a parameter's BF16 copy: were it that of both, their gradients would be added up in BF16."""
    torch.manual_seed(0)
    weight = torch.randn(16, 16, requires_grad=True)
    inputs = torch.randn(2, 5, 16)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hand_over()
            y = torch.nn.functional.linear(x, weight)
            hand_over()
            return y.float().square().sum()

    for x in inputs:
        forward(x).backward()
    assert weight.grad is not None
    expected, weight.grad = weight.grad, None
    torch.add(*interleaver.run([lambda: forward(inputs[0]), lambda: forward(inputs[1])])).backward()
    assert torch.equal(weight.grad, expected)
    rounded = expected.to(torch.bfloat16).float()
    assert not torch.equal(rounded, expected)  # the test could tell

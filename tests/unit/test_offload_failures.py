"""Passes that a device awaits by itself and that fail: nothing is lost, and nothing taken for numbers.

Nothing but experts is computed here, so that the model's stream may run as late as the others.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_sft import autograd
from kt_sft.engine.watchdog import EngineError
from kt_sft.offload.outstanding import _MOST
from tests.simulated_experts import E, T, gradient, hidden, in_a_row, make_layers, on_device, out_of_range, routings


def test_a_failure_in_forward_shows_in_a_later_call_and_leaves_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    with on_device(monkeypatch, eager=False) as transfers:
        y = layer(hidden(), out_of_range(idx), w)
        transfers.accelerator.run_all()  # type: ignore[attr-defined]
        assert y.isnan().all()
        with pytest.raises(IndexError, match=f"top_k_index holds {E + 4}"):
            layer(hidden(), idx, w)
        layer(hidden(), idx, w)  # once


def test_a_failure_in_forward_shows_in_a_call_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which waits on the host, and so for all that was submitted before."""
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    with on_device(monkeypatch, eager=False):
        layer(hidden(), out_of_range(idx), w)
        with pytest.raises(IndexError, match=f"top_k_index holds {E + 4}"), torch.no_grad():
            layer(hidden(), idx, w)


def test_a_failure_in_forward_shows_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, routed = make_layers(2), routings(2)
    routed[1] = out_of_range(routed[1][0]), routed[1][1]
    with on_device(monkeypatch, eager=False):
        x = hidden()
        y = in_a_row(layers, routed, x)
        with pytest.raises(IndexError, match=f"top_k_index holds {E + 4}"):
            gradient(y, x)


def test_a_failure_in_the_last_pass_shows_at_the_end_of_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, routed = make_layers(2), routings(2)
    with on_device(monkeypatch, eager=False) as transfers:
        x = hidden()
        y = in_a_row(layers, routed, x)
        prepare = autograd._prepare_backward

        def failing(link: autograd.Link, *rest: Any) -> Any:
            monkeypatch.setattr(link.experts.config, "compute", "int8" if link.experts is layers[0] else "bf16")
            return prepare(link, *rest)

        monkeypatch.setattr(autograd, "_prepare_backward", failing)
        with pytest.raises(EngineError, match=f"failed in the backward of {T} tokens: .*no integer products"):
            gradient(y, x)
        assert len(transfers.outstanding) == 0
    assert gradient(in_a_row(layers[1:], routed[1:], x), x).isfinite().all()


def test_settling_goes_on_to_the_end_and_raises_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    with on_device(monkeypatch, eager=False) as transfers:
        for number in (7, 8):
            wrong = idx.clone()
            wrong[0, 0] = number
            layer(hidden(), wrong, w)
        layer(hidden(), idx, w)
        with pytest.raises(IndexError, match="top_k_index holds 7"):
            transfers.outstanding.settle()
        assert len(transfers.outstanding) == 0
        assert transfers.ring.lent <= 2  # of those that failed


def test_a_failure_is_raised_once_with_all_that_followed_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    with on_device(monkeypatch, eager=False):
        for _ in range(_MOST):
            layer(hidden(), out_of_range(idx), w)
        with pytest.raises(IndexError):
            layer(hidden(), idx, w)
        for _ in range(_MOST + 1):
            layer(hidden(), idx, w)


def test_a_failure_lets_a_backward_over_what_it_left_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has caught the error: nothing was kept that could be taken for numbers."""
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    with on_device(monkeypatch, eager=False) as transfers:
        x = hidden()
        y = layer(x, out_of_range(idx), w)
        with pytest.raises(IndexError, match=f"top_k_index holds {E + 4}"):
            transfers.outstanding.settle()
        with pytest.raises(IndexError, match="top_k_index holds -1"):
            gradient(y, x)


def test_a_failure_that_another_thread_has_ended_is_raised_in_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    with on_device(monkeypatch, eager=False) as transfers:
        errors: list[Exception] = []

        def settle() -> None:
            try:
                transfers.outstanding.settle()
            except IndexError as error:
                errors.append(error)

        def hook(_: Tensor) -> None:
            with torch.enable_grad():
                layer(hidden(), out_of_range(idx), w)
            other = threading.Thread(target=settle)
            other.start()
            other.join()

        x = hidden()
        y = layer(x, idx, w)
        y.register_hook(hook)
        with pytest.raises(IndexError, match=f"top_k_index holds {E + 4}") as raised:
            gradient(y, x)
        assert [str(raised.value)] == [str(error) for error in errors]


def test_a_failure_of_a_forward_within_a_backward_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows at the end of its own backward."""
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    with on_device(monkeypatch, eager=False) as transfers:
        made: list[Tensor] = []
        leaf, x = torch.zeros(1, requires_grad=True), hidden()

        def hook(_: Tensor) -> None:
            with torch.enable_grad():
                made.append(layer(x, idx, w))

        product = leaf * 1.0
        product.register_hook(hook)
        product.sum().backward()
        monkeypatch.setattr(layer.config, "compute", "int8")
        with pytest.raises(EngineError, match="no integer products"):
            gradient(made[0], x)
        assert len(transfers.outstanding) == 0


def test_a_failure_that_nobody_was_told_of_is_logged_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    with on_device(monkeypatch, eager=False) as transfers:
        layer(hidden(), out_of_range(idx), w)
        transfers.accelerator.run_all()  # type: ignore[attr-defined]
        with caplog.at_level(logging.ERROR, "kt_sft"):
            transfers.stop()
    assert f"top_k_index holds {E + 4}" in caplog.text
    assert len(transfers.outstanding) == 0


def test_a_failure_that_ctrl_c_comes_before_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,), ((idx, w),) = make_layers(1), routings(1)
    with on_device(monkeypatch, eager=False) as transfers:
        layer(hidden(), out_of_range(idx), w)

        def interrupt(_: Any) -> bool:
            raise KeyboardInterrupt

        oldest = transfers.outstanding._awaited[0]
        with monkeypatch.context() as patch:
            patch.setattr(oldest.ticket, "settle", interrupt)
            with pytest.raises(KeyboardInterrupt):
                transfers.outstanding.settle()
        assert [*transfers.outstanding._awaited] == [oldest]


def test_a_failure_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a pass's nor one of the model's own: autograd calls nobody at the end of a backward that failed."""
    layers, routed = make_layers(2), routings(2)

    class Tokens:
        pass

    def backward(fails: str) -> weakref.ref[Tokens]:
        local = Tokens()
        x = hidden()
        hidden_states = layers[0](x, *routed[0])
        if fails == "model":
            hidden_states.register_hook(lambda _: 1 / 0)
        idx, w = routed[1]
        y = layers[1](hidden_states, out_of_range(idx) if fails == "pass" else idx, w)
        with pytest.raises(IndexError if fails == "pass" else ZeroDivisionError):
            gradient(y, x)
        return weakref.ref(local)

    with on_device(monkeypatch, eager=False) as transfers:
        for fails in ("pass", "model"):
            local = backward(fails)
            gc.collect()
            assert local() is None
            assert not transfers.outstanding._walks
            assert not transfers.outstanding._failures
            transfers.outstanding.settle()

"""Signals that a stream's driver sets; here a thread calls their function, as the driver would, without Python."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kt_sft.offload import host_functions
from kt_sft.offload.accelerator import HostEvent, TorchAccelerator
from kt_sft.offload.host_functions import HostFunctions, Signal, host_functions_of


class Driver:
    """Calls what it is given when it is told to, in order; refuses with `code` where that is not 0."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.given: list[tuple[int, Callable[[], Any]]] = []

    def launch(self, stream: int | None, function: ctypes.c_void_p, argument: ctypes.c_void_p) -> int:
        assert stream is not None
        address, value = function.value, argument.value
        assert address
        self.given.append((stream, lambda: ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(value)))
        return self.code

    def come_there(self) -> None:
        self.given.pop(0)[1]()


def never() -> bool:
    raise AssertionError("the event was looked at")


def test_a_thread_sleeps_until_the_stream_comes_there() -> None:
    driver = Driver()
    functions = HostFunctions(driver.launch)
    first, second = functions.signal(11), functions.signal(12)
    assert first is not None
    assert second is not None
    assert [stream for stream, _ in driver.given] == [11, 12]
    woken: list[str] = []
    threads = [
        threading.Thread(target=lambda name=name, signal=signal: (functions.wait(signal, never), woken.append(name)))
        for name, signal in (("first", first), ("second", second))
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert woken == []
    for thread, expected in zip(threads, (["first"], ["first", "second"]), strict=True):
        driver.come_there()
        thread.join(10)
        assert woken == expected


def test_one_that_is_set_already_does_not_wait() -> None:
    driver = Driver()
    functions = HostFunctions(driver.launch)
    signal = functions.signal(0)
    assert signal is not None
    driver.come_there()
    functions.wait(signal, never)
    assert not signal.wait(0.0)  # once


def test_it_sleeps_without_the_gil() -> None:
    signal, counted = Signal(), 0
    thread = threading.Thread(target=signal.wait, args=(10.0,))
    thread.start()
    for _ in range(1000):
        counted += 1
    assert thread.is_alive()
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(signal.function.value)(signal.argument.value)
    thread.join(5)
    assert not thread.is_alive()
    assert counted == 1000


def test_memory_lives_until_the_driver_is_done_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_functions, "_LOOK", 0.01)
    driver = Driver()
    functions = HostFunctions(driver.launch)
    signal = functions.signal(0)
    assert signal is not None
    functions.wait(signal, lambda: True)  # the event has completed, but the function is late
    assert signal in functions._pending
    del signal
    driver.come_there()


def test_a_device_that_has_failed_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_functions, "_LOOK", 0.01)
    looks = iter([False, False])

    def query() -> bool:
        try:
            return next(looks)
        except StopIteration:
            raise RuntimeError("the device has failed") from None

    functions = HostFunctions(Driver().launch)
    signal = functions.signal(0)
    assert signal is not None
    with pytest.raises(RuntimeError, match="the device has failed"):
        functions.wait(signal, query)


def test_where_the_driver_refuses_events_are_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(code=801)
    functions = HostFunctions(driver.launch)
    with caplog.at_level(logging.INFO, "kt_sft"):
        assert functions.signal(0) is None
        assert functions.signal(0) is None
    assert len(driver.given) == 1  # it is not asked again
    assert caplog.text.count("error 801") == 1


def test_without_the_drivers_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(host_functions.ctypes, "CDLL", missing)
    with caplog.at_level(logging.INFO, "kt_sft"):
        assert host_functions_of(torch.device("cuda", 0)) is None
    assert "events are looked at instead" in caplog.text
    assert host_functions_of(torch.device("xpu", 0)) is None


class Event:
    def __init__(self, completes_after: int = 0) -> None:
        self.looks = completes_after

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


class Stream:
    def record_event(self) -> Event:
        return Event(completes_after=3)


def test_an_accelerator_sleeps_where_it_can_and_looks_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_sft.offload.accelerator.handle_of", lambda stream: 5)
    driver = Driver()
    accelerator = TorchAccelerator(torch.device("meta"))
    event = accelerator.record_for_host(Stream())
    assert isinstance(event, Event)
    accelerator.synchronize(event)
    assert event.looks < 0

    accelerator.host_functions = HostFunctions(driver.launch)
    event = accelerator.record_for_host(Stream())
    assert isinstance(event, HostEvent)
    driver.come_there()
    accelerator.synchronize(event)
    assert event.event.looks == 3  # nobody has looked

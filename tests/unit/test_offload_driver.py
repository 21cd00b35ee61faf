"""What the drivers of CUDA and ROCm are asked for, and what is done where they refuse; here they are made up."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kt_sft.offload import driver as driver_module
from kt_sft.offload.accelerator import TorchAccelerator
from kt_sft.offload.driver import Driver, driver_of


class Refusing:
    """Counts calls, and gives `code`."""

    def __init__(self, code: int) -> None:
        self.code, self.calls = code, 0

    def __call__(self, *_: Any) -> int:
        self.calls += 1
        return self.code


@pytest.mark.parametrize("what", ["functions", "memory"])
def test_what_a_driver_refuses_it_is_not_asked_for_again(what: str, caplog: pytest.LogCaptureFixture) -> None:
    launch, wait = Refusing(801 if what == "functions" else 0), Refusing(801 if what == "memory" else 0)
    driver = Driver(launch, wait)
    with caplog.at_level(logging.INFO, "kt_sft"):
        assert [driver.call(0, 1, 2) for _ in range(2)] == [what == "memory"] * 2
        assert [driver.wait_for_value(0, 64, 2) for _ in range(2)] == [what == "functions"] * 2
    assert (launch.calls, wait.calls) == ((1, 2) if what == "functions" else (2, 1))
    assert caplog.text.count("error 801") == 1
    assert not driver.waits


class Library:
    """A driver's library: functions by name, which note what they are called with.

    Args:
        missing: Of functions that it does not have.
    """

    def __init__(self, *missing: str) -> None:
        self.missing = missing
        self.called: list[tuple[Any, ...]] = []
        self.kept: list[Any] = []

    def __getitem__(self, name: str) -> Any:
        if name in self.missing:
            raise AttributeError(f"undefined symbol: {name}")
        kinds: dict[str, tuple[Any, ...]] = {
            "cuLaunchHostFunc": (ctypes.c_void_p,) * 3,
            "hipLaunchHostFunc": (ctypes.c_void_p,) * 3,
            "cuStreamWaitValue32_v2": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint),
            "cuMemHostGetDevicePointer_v2": (ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint),
        }

        def called(*values: Any) -> int:
            if name == "cuMemHostGetDevicePointer_v2":
                values[0][0] = values[1] + (1 << 40)  # elsewhere for the device
                values = values[1:]
            self.called.append((name, *values))
            return 0

        function = ctypes.CFUNCTYPE(ctypes.c_int, *kinds[name])(called)
        self.kept.append(function)
        return function


@pytest.fixture
def of_library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver | None]:
    def found(library: Library, hip: str | None = None) -> Driver | None:
        monkeypatch.setattr(driver_module.ctypes, "CDLL", lambda name: library)
        monkeypatch.setattr(torch.version, "hip", hip)
        return driver_of(torch.device("cuda", 0))

    return found


def test_cuda_is_asked_for_both(of_library: Callable[..., Driver | None]) -> None:
    library = Library()
    driver = of_library(library)
    assert driver is not None
    assert driver.waits
    assert driver.call(11, 22, 33)
    assert driver.wait_for_value(11, 1 << 33, (1 << 32) - 1)
    assert library.called == [
        ("cuLaunchHostFunc", 11, 22, 33),
        ("cuMemHostGetDevicePointer_v2", 1 << 33, 0),
        ("cuStreamWaitValue32_v2", 11, (1 << 33) + (1 << 40), (1 << 32) - 1, 0),
    ]


def test_an_older_driver_and_rocm_do_not_wait(of_library: Callable[..., Driver | None]) -> None:
    for library, hip in ((Library("cuStreamWaitValue32_v2"), None), (Library(), "7.0")):
        driver = of_library(library, hip)
        assert driver is not None
        assert not driver.waits
        assert driver.call(1, 2, 3)
        assert not driver.wait_for_value(1, 2, 3)
        assert library.called == [(f"{'hip' if hip else 'cu'}LaunchHostFunc", 1, 2, 3)]


def test_without_the_drivers_library(
    of_library: Callable[..., Driver | None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kt_sft"):
        assert of_library(Library("cuLaunchHostFunc")) is None
    assert "events are looked at instead" in caplog.text

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver_module.ctypes, "CDLL", missing)
    assert driver_of(torch.device("cuda", 0)) is None
    assert driver_of(torch.device("xpu", 0)) is None


class Event:
    def __init__(self, completes_after: int) -> None:
        self.looks = completes_after

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_an_accelerator_asks_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_sft.offload.accelerator.handle_of", lambda stream: 5)
    accelerator: Any = TorchAccelerator(torch.device("meta"))
    current: list[str] = []

    @contextlib.contextmanager
    def on(stream: str) -> Iterator[None]:
        current.append(stream)
        yield
        current.clear()

    monkeypatch.setattr(accelerator, "on", on)
    assert not accelerator.call("stream", 1, 2)
    assert not accelerator.wait_for_value("stream", 1, 2)
    given: list[tuple[Any, ...]] = []

    def take(*values: Any) -> int:
        assert current == ["stream"]  # whose device the driver works for
        given.append(values)
        return 0

    accelerator.driver = Driver(take, take)
    assert accelerator.call("stream", 1, 2)
    assert accelerator.wait_for_value("stream", 3, 4)
    assert [given[0][0], given[0][1].value, given[0][2].value, given[1]] == [5, 1, 2, (5, 3, 4)]
    accelerator.driver = Driver(None, lambda *values: 0)
    assert not accelerator.wait_for_value("stream", 3, 4)  # what could not be started must not be waited for there

    event = Event(completes_after=3)
    accelerator.synchronize(event)
    assert event.looks < 0

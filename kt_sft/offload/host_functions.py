"""Lets a stream of CUDA or ROCm wake a thread of the host, which sleeps instead of looking at an event over and over.

The driver calls a function of the host when a stream comes to it. That function is libc's `sem_post`: it runs without
Python, and may not and does not call the driver. Nothing is linked: the driver's library is in the process already.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import os
import time
from collections.abc import Callable

import torch

#: More than sem_t takes on any system that torch runs on.
_SEMAPHORE_BYTES = 64
#: Seconds that a sleeping thread trusts the driver, which calls no functions any more once a device has failed.
_LOOK = 1.0

#: Puts (a stream's handle, a function, its argument) into the stream; 0 where that worked.
Launch = Callable[[int | None, ctypes.c_void_p, ctypes.c_void_p], int]

_logger = logging.getLogger("kt_sft")
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class Signal:
    """Set once, by a function that a stream calls."""

    def __init__(self) -> None:
        self._semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
        _libc.sem_init(self._semaphore, 0, 0)

    @property
    def function(self) -> ctypes.c_void_p:
        """What sets it, called with `argument`."""
        return ctypes.cast(_libc.sem_post, ctypes.c_void_p)

    @property
    def argument(self) -> ctypes.c_void_p:
        """Memory that must be there until the function was called."""
        return ctypes.cast(self._semaphore, ctypes.c_void_p)

    def wait(self, seconds: float) -> bool:
        """Sleeps, without the GIL, until it is set, and no longer than `seconds`; whether it was."""
        fraction, whole = math.modf(time.time() + seconds)
        until = _Timespec(int(whole), int(fraction * 1e9))
        while _libc.sem_timedwait(self._semaphore, ctypes.byref(until)) != 0:
            failure = ctypes.get_errno()
            if failure == errno.ETIMEDOUT:
                return False
            if failure != errno.EINTR:
                raise OSError(failure, os.strerror(failure))
        return True


class HostFunctions:
    """Puts signals into streams.

    Args:
        launch: The driver's function.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch: Launch | None = launch
        # Those that the driver may still set. Those of a device that has failed stay here for ever, for it may be late.
        self._pending: set[Signal] = set()

    def signal(self, stream: int) -> Signal | None:
        """One that is set when all that is in a stream now is done; None where the driver refuses."""
        if self._launch is None:
            return None
        signal = Signal()
        self._pending.add(signal)
        if code := self._launch(stream, signal.function, signal.argument):
            _logger.info("the driver calls no functions of the host (error %d): events are looked at instead", code)
            self._launch = None
            self._pending.discard(signal)
            return None
        return signal

    def wait(self, signal: Signal, look: Callable[[], bool]) -> None:
        """Sleeps until a signal is set.

        Args:
            signal: From `signal`.
            look: Called now and then: whether the stream has come there all the same. Raises where the device has
                failed.
        """
        while not signal.wait(_LOOK):
            if look():
                return  # and the signal stays, as its function is still to be called
        self._pending.discard(signal)


def host_functions_of(device: torch.device) -> HostFunctions | None:
    """Those of a device's driver; None where it has none."""
    if device.type != "cuda":
        return None
    library, name = (
        ("libamdhip64.so", "hipLaunchHostFunc") if torch.version.hip else ("libcuda.so.1", "cuLaunchHostFunc")
    )
    try:
        launch = ctypes.CDLL(library)[name]
    except (OSError, AttributeError) as error:
        _logger.info("%s has no %s (%s): events are looked at instead", library, name, error)
        return None
    launch.argtypes, launch.restype = (ctypes.c_void_p,) * 3, ctypes.c_int
    return HostFunctions(launch)


def handle_of(stream: torch.Stream) -> int:
    """What the driver of CUDA or ROCm calls a stream; 0 is the default one."""
    same = torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
    return int(same.cuda_stream)

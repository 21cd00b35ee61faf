"""What CUDA's and ROCm's drivers offer beyond torch: a stream that calls a C function, and one that waits for memory.

With these the engine is started and awaited in a stream's order, without Python in between: when tokens have arrived,
a thread of the driver calls the function that starts the pass; the stream that takes results to the device waits for a
word in pinned memory, which the engine sets when they are there. Nothing is linked: the driver's library is in the
process already.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable

import torch

#: Puts a call of (function)(argument) into a stream, of (its handle, function, argument); 0 where that worked. The
#: function must not call the driver.
Launch = Callable[[int | None, ctypes.c_void_p, ctypes.c_void_p], int]
#: Lets a stream wait until a word of memory is at least a value, modulo 2^32, of (handle, address, value); likewise.
WaitValue = Callable[[int | None, int, int], int]

#: CU_STREAM_WAIT_VALUE_GEQ.
_AT_LEAST = 0
#: CUDA's and ROCm's code for it: what gave it is not asked for again. Others may pass.
_NOT_SUPPORTED = 801

_logger = logging.getLogger("kt_sft")


class Driver:
    """A device's driver.

    Args:
        launch: None where it has none.
        wait_value: Likewise.
    """

    def __init__(self, launch: Launch | None, wait_value: WaitValue | None) -> None:
        self._launch, self._wait_value = launch, wait_value

    @property
    def waits(self) -> bool:
        """Whether it may be able to let a stream wait for memory."""
        return self._launch is not None and self._wait_value is not None

    def call(self, stream: int, function: int, argument: int) -> bool:
        """Has a C function called when all that is in a stream now is done; False where that is not possible."""
        if self._launch is None:
            return False
        code = self._launch(stream, ctypes.c_void_p(function), ctypes.c_void_p(argument))
        if code == _NOT_SUPPORTED:
            self._launch = None
        return _worked(code, "calls no function of the host: events are looked at instead")

    def wait_for_value(self, stream: int, address: int, value: int) -> bool:
        """Lets a stream wait until the word at `address`, of pinned memory, is `value` or ahead of it.

        Returns:
            False where that is not possible: the host must wait.
        """
        if self._wait_value is None:
            return False
        code = self._wait_value(stream, address, value)
        if code == _NOT_SUPPORTED:
            self._wait_value = None
        return _worked(code, "does not wait for memory: the host waits for the experts")


def _worked(code: int, otherwise: str) -> bool:
    if code:
        level = logging.INFO if code == _NOT_SUPPORTED else logging.WARNING
        _logger.log(level, "the accelerator's driver (error %d) %s", code, otherwise)
    return not code


def driver_of(device: torch.device) -> Driver | None:
    """A device's driver; None where it is none of those."""
    if device.type != "cuda":
        return None
    hip = torch.version.hip is not None
    library = "libamdhip64.so" if hip else "libcuda.so.1"
    try:
        functions = ctypes.CDLL(library)
        launch = functions["hipLaunchHostFunc" if hip else "cuLaunchHostFunc"]
    except (OSError, AttributeError) as error:
        _logger.info("%s does not call functions of the host (%s): events are looked at instead", library, error)
        return None
    launch.argtypes, launch.restype = (ctypes.c_void_p,) * 3, ctypes.c_int
    # ROCm waits for what hipExtMallocWithFlags gives alone, and its interface is not final.
    return Driver(launch, None if hip else _cuda_wait_value(functions))


def _cuda_wait_value(functions: ctypes.CDLL) -> WaitValue | None:
    try:
        wait, device_address = functions["cuStreamWaitValue32_v2"], functions["cuMemHostGetDevicePointer_v2"]
    except AttributeError as error:  # a driver before CUDA 11.7
        _logger.info("the driver does not wait for memory (%s): the host waits for the experts", error)
        return None
    wait.argtypes = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint
    device_address.argtypes = ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint
    wait.restype = device_address.restype = ctypes.c_int

    def wait_value(stream: int | None, address: int, value: int) -> int:
        there = ctypes.c_uint64()
        return device_address(ctypes.byref(there), address, 0) or wait(stream, there, value, _AT_LEAST)

    return wait_value


def handle_of(stream: torch.Stream) -> int:
    """What the driver of CUDA or ROCm calls a stream; 0 is the default one."""
    same = torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
    return int(same.cuda_stream)

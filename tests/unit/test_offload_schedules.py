"""Transfers between an accelerator and the engine in 200 schedules, on a simulated device: results are right.

Each wait that makes an order fails some of them where it is taken out.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kt_sft.engine.crossing import Place
from kt_sft.offload.transfers import DeviceCrossing, Transfers
from tests.simulated_device import SimulatedDevice, poison

CPU = torch.device("cpu")


@dataclasses.dataclass
class Pass:
    """A pass in flight: what it must give, and what it gave."""

    crossing: DeviceCrossing
    ticket: MadeUpTicket
    expected: list[Tensor]
    got: list[Tensor] = dataclasses.field(default_factory=list)


class MadeUpTicket:
    """A `Ticket` of an engine that works when a seed says so, at the latest when somebody waits.

    Args:
        schedule: Whose engine it is.
    """

    is_metered = False

    def __init__(self, schedule: Schedule, crossing: DeviceCrossing) -> None:
        self._schedule, self._crossing = schedule, crossing
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: schedule.started.append(self))
        self._flag: tuple[int, int] | None = None
        self.done = False

    def signal(self, address: int, value: int) -> None:
        self._flag = address, value

    def starter(self) -> tuple[int, int]:
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        assert address is not None
        return address, 0

    def compute(self) -> None:
        """The pass, as the engine does it: results, the word that tells of them, then what is kept."""
        x, idx = self._crossing.sources
        for result, value in zip(self._crossing.results, (x * 2, idx + 0.5), strict=True):
            result.copy_(value)
        if self._flag is not None:
            ctypes.c_uint32.from_address(self._flag[0]).value = self._flag[1]
        self._schedule.device.run_some()
        for to, come_from, nbytes in self._crossing.kept:
            ctypes.memmove(to, come_from, nbytes)
        self.done = True

    def settle(self, look: Callable[[], None]) -> None:
        while not self.done:
            look()
            if not self._schedule.work():
                assert self._schedule.device.run_one(), "nobody is going to start this"

    wait = settle


class Schedule:
    """Passes over made-up numbers, begun, computed and delivered in an order that a seed decides."""

    def __init__(self, seed: int, *, waits: bool) -> None:
        self.device = SimulatedDevice(seed, waits=waits)
        self.streams = [self.device.model_stream, self.device.new_stream()]  # as those of two parts of a model
        self.transfers = Transfers(self.device)
        self.random = self.device.random
        self.numbers = torch.Generator().manual_seed(seed)
        self.started: deque[MadeUpTicket] = deque()
        self.in_flight: list[Pass] = []
        self.delivered: list[Pass] = []

    def work(self) -> bool:
        """The engine computes the oldest pass that was started; False if there is none."""
        if self.started:
            self.started.popleft().compute()
            return True
        return False

    def begin(self) -> None:
        """Tokens that the device has yet to compute are sent, by one of two streams."""
        with self.device.on(self.random.choice(self.streams)):
            self._begin()

    def _begin(self) -> None:
        tokens = self.random.choice([0, 1, 3, 70, 1500])
        x, idx = torch.randn(tokens, 8, generator=self.numbers), torch.randint(9, (tokens, 2), generator=self.numbers)
        x_there, idx_there = torch.empty_like(x), torch.empty_like(idx)
        for there, value in ((x_there, x), (idx_there, idx)):
            poison(there)
            self.device.compute(lambda there=there, value=value: there.copy_(value))
        places = [Place((tokens, 8), torch.float32, CPU), Place((tokens, 2), torch.float32, CPU)]
        sources = [(x_there, x.dtype), (idx_there, idx.dtype)]
        crossing = self.transfers.cross(sources, places, in_stream=self.random.random() < 0.7)
        kept = [crossing.keep(source) for source in crossing.sources]
        ticket = MadeUpTicket(self, crossing)
        crossing.start(ticket)  # type: ignore[arg-type]
        self.in_flight.append(Pass(crossing, ticket, [x * 2, idx + 0.5, x, idx], kept))
        # The model's next operations may write where the tokens are: not before they are on the host.
        self.device.run_some()

    def end(self) -> None:
        """A stream goes on with the results of one pass, which the engine may not have computed yet."""
        with self.device.on(self.random.choice(self.streams)):
            self._end()

    def _end(self) -> None:
        this = self.in_flight.pop(self.random.randrange(len(self.in_flight)))
        results = this.crossing.finish(this.ticket, -1)  # type: ignore[arg-type]
        kept, this.got = this.got, []
        for result in results:
            self.device.compute(lambda result=result: this.got.append(result.clone()))
        self.device.compute(lambda: this.got.extend(kept))  # by then
        self.delivered.append(this)
        this.crossing = None  # type: ignore[assignment]

    def run(self, steps: int, most: int) -> None:
        for _ in range(steps):
            choices = [self.work, self.device.run_some]
            choices += [self.begin] if len(self.in_flight) < most else []
            choices += [self.end] if self.in_flight else []
            self.random.choice(choices)()
        while self.in_flight:
            self.end()
        self.transfers.outstanding.settle()
        self.device.run_all()

    def check(self) -> None:
        assert self.delivered
        for this in self.delivered:
            for got, expected in zip(this.got, this.expected, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("waits", [True, False], ids=["in stream", "on the host"])
@pytest.mark.parametrize("seed", range(100))
def test_every_pass_gets_its_own_results(seed: int, waits: bool) -> None:
    schedule = Schedule(seed, waits=waits)
    schedule.run(steps=160, most=4)
    schedule.check()
    assert (schedule.transfers.flags is not None) == waits
    assert schedule.transfers.ring.lent == 0
    assert schedule.device.lost == 0

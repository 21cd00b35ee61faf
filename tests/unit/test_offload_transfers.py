"""Transfers between an accelerator and the engine, on a simulated device: whatever it does late, results are right.

Each test of an ordering fails where the wait that makes it is taken out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kt_sft
from kt_sft import autograd
from kt_sft.engine.crossing import Place, Submission
from kt_sft.engine.watchdog import EngineError
from kt_sft.offload.transfers import DeviceCrossing, Submitter, Transfers
from tests.simulated_device import LateSubmitter, SimulatedDevice, poison

CPU = torch.device("cpu")


@dataclasses.dataclass
class Pass:
    """A pass in flight: what it must give, and what it gave."""

    crossing: DeviceCrossing
    submission: Submission
    expected: list[Tensor]
    got: list[Tensor] = dataclasses.field(default_factory=list)


class Schedule:
    """Passes over made-up numbers, begun, computed and delivered in an order that a seed decides."""

    def __init__(self, seed: int) -> None:
        self.device = SimulatedDevice(seed)
        self.submitter = LateSubmitter(self.device)
        self.transfers = Transfers(self.device, self.submitter)  # type: ignore[arg-type]
        self.random = self.device.random
        self.numbers = torch.Generator().manual_seed(seed)
        self.in_flight: list[Pass] = []
        self.delivered: list[Pass] = []

    def begin(self, tokens: int | None = None) -> None:
        """Tokens that the device has yet to compute are sent."""
        tokens = self.random.choice([1, 3, 70, 1500]) if tokens is None else tokens
        x, idx = torch.randn(tokens, 8, generator=self.numbers), torch.randint(9, (tokens, 2), generator=self.numbers)
        x_there, idx_there = torch.empty_like(x), torch.empty_like(idx)
        for there, value in ((x_there, x), (idx_there, idx)):
            poison(there)
            self.device.compute(lambda there=there, value=value: there.copy_(value))
        places = [Place((tokens, 8), torch.float32, CPU), Place((tokens, 2), torch.float32, CPU)]
        crossing = self.transfers.cross([(x_there, x.dtype), (idx_there, idx.dtype)], places)
        submission = crossing.submit(lambda: (crossing.sources[0] * 2, crossing.sources[1] + 0.5))
        self.in_flight.append(Pass(crossing, submission, [x * 2, idx + 0.5]))
        # The model's next operations may write where the tokens are: not before they are on the host.
        self.device.run_some()

    def end(self) -> None:
        """The engine has computed one pass; its results are sent, and the device goes on with them."""
        this = self.in_flight.pop(self.random.randrange(len(self.in_flight)))
        for result, value in zip(this.crossing.results, this.submission.ticket(), strict=True):
            result.copy_(value)
        self.device.run_some()
        results = this.crossing.deliver(this.crossing.results)
        for result in results:
            self.device.compute(lambda result=result: this.got.append(result.clone()))
        self.delivered.append(this)
        this.crossing = None  # type: ignore[assignment]

    def run(self, steps: int, most: int) -> None:
        for _ in range(steps):
            choices = [self.submitter.run_next, self.device.run_some]
            choices += [self.begin] if len(self.in_flight) < most else []
            choices += [self.end] if self.in_flight else []
            self.random.choice(choices)()
        while self.in_flight:
            self.end()
        self.device.run_all()

    def check(self) -> None:
        assert self.delivered
        for this in self.delivered:
            for got, expected in zip(this.got, this.expected, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("seed", range(40))
def test_every_pass_gets_its_own_results(seed: int) -> None:
    schedule = Schedule(seed)
    schedule.run(steps=120, most=4)
    schedule.check()

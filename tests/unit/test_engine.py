"""The engine's face: tier choice, threads, forks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import kt_sft
from kt_sft.config import TIERS, ConfigError
from kt_sft.engine import _native
from kt_sft.engine.engine import available_tiers, get_engine
from tests.forked import forked_ranks


@pytest.mark.parametrize("tier", available_tiers())
def test_isa_lowers_the_tier(monkeypatch, tier):
    monkeypatch.setenv("KT_SFT_ISA", tier)
    assert get_engine().tier == tier
    assert kt_sft.system_info()["tier"] == tier


def test_a_tier_above_the_cpu_is_lowered_with_a_warning(monkeypatch, caplog):
    best = available_tiers()[-1]
    above = TIERS[TIERS.index(best) + 1 :]
    if not above:
        pytest.skip("this CPU has the highest tier")
    monkeypatch.setenv("KT_SFT_ISA", above[-1])
    with caplog.at_level(logging.WARNING):
        engine = get_engine(num_threads=3)
    assert engine.tier == best
    assert f"using {best}" in caplog.text


def test_without_a_request_every_engine_has_the_same_tier(monkeypatch):
    monkeypatch.delenv("KT_SFT_ISA", raising=False)
    assert get_engine(1).tier in available_tiers()
    assert get_engine(3).tier == get_engine(1).tier


def test_processes_of_one_job_use_what_one_of_them_measured(monkeypatch, tmp_path):
    monkeypatch.delenv("KT_SFT_ISA", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tiers")

    def rank(measured):
        def run(pipe):
            monkeypatch.setattr(_native, "fastest_tiers", lambda: (measured, measured))
            pipe.send(get_engine(1).tier)
            pipe.recv()

        return run

    lowest, highest = available_tiers()[0], available_tiers()[-1]
    with forked_ranks(port=str(tmp_path)) as start:
        assert start(rank(lowest)).hears() == lowest
        assert start(rank(highest)).hears() == lowest
        assert start(rank(highest), MASTER_PORT="another job").hears() == highest


def test_an_unknown_tier_is_an_error(monkeypatch):
    monkeypatch.setenv("KT_SFT_ISA", "avx1024")
    with pytest.raises(ConfigError, match="avx1024"):
        get_engine()


def test_there_is_one_engine_for_a_number_of_threads():
    assert get_engine(2) is get_engine(2)
    assert get_engine(2) is not get_engine(3)
    assert get_engine(3).threads == 3
    with pytest.raises(ConfigError, match="at most 1024"):
        get_engine(5000)
    assert get_engine(None) is get_engine(get_engine(None).threads)


def test_a_forked_child_starts_its_own_engine():
    layer = kt_sft.CpuExperts.from_weights(torch.randn(2, 8, 6), torch.randn(2, 6, 4))
    args = (torch.randn(3, 6), torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    expected = layer(*args)
    child = os.fork()
    if child == 0:  # the parent's threads do not exist here: a call to its engine would wait for ever
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(layer(*args), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_engine_that_stands_still_is_an_error_in_forward_and_in_backward():
    """Its thread is stopped in the middle, by a signal whose handler waits for another signal."""
    program = """
import ctypes, gc, os, signal, torch, kt_sft
from kt_sft import experts
from kt_sft.engine.engine import get_engine

libc = ctypes.CDLL(None)
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
for number, handler in ((signal.SIGUSR1, libc.pause), (signal.SIGUSR2, libc.getpid)):
    libc.signal(number, ctypes.cast(handler, ctypes.c_void_p))
started = 0
others = set(os.listdir("/proc/self/task"))
engine = get_engine(1)
(thread,) = map(int, set(os.listdir("/proc/self/task")) - others)

def send(number):
    assert libc.tgkill(os.getpid(), thread, number) == 0

class Noted:
    def __init__(self, ticket):
        self.ticket = ticket
    def start(self):
        global started
        self.ticket.start()
        started += 1
    def __getattr__(self, name):
        return getattr(self.ticket, name)

class Engine:
    def prepare_forward(self, **call):
        return Noted(engine.prepare_forward(**call))
    def prepare_backward(self, **call):
        return Noted(engine.prepare_backward(**call))
    def __getattr__(self, name):
        return getattr(engine, name)

experts.get_engine = lambda threads: Engine()
layer = kt_sft.CpuExperts.from_weights(torch.randn(2, 8, 6), torch.randn(2, 6, 4))
idx, w = torch.tensor([[0], [1], [0]]), torch.ones(3, 1)

def said(function):
    try:
        function()
    except RuntimeError as error:
        return str(error)

expected = layer(torch.ones(3, 6), idx, w)
x = torch.ones(3, 6, requires_grad=True)
y = layer(x, idx, w)
for direction, function in (
    ("forward", lambda: layer(torch.ones(3, 6), idx, w)), ("backward", lambda: y.sum().backward())
):
    send(signal.SIGUSR1)
    engine.set_patience(0.01, 3)
    print(said(function))
    started = 0
    print(said(function if direction == "forward" else lambda: layer(x, idx, w)), started)  # at once
    gc.collect()
    engine.set_patience(0.01, 6000)
    while said(lambda: layer(torch.ones(3, 6), idx, w)) is not None:  # until it is awake
        send(signal.SIGUSR2)
    print(torch.equal(layer(torch.ones(3, 6), idx, w), expected))
"""
    run = subprocess.run([sys.executable, "-c", program], timeout=120, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = iter(run.stdout.splitlines())
    for direction in ("forward", "backward"):
        failed = "kt_sft: the expert engine failed in the {} of 3 tokens: the expert engine stands still: "
        assert next(lines).startswith(failed.format(direction))
        again = next(lines)
        assert again.startswith(failed.format("forward"))
        assert again.endswith(" 0")  # was handed to the engine
        assert next(lines) == "True"
    assert next(lines, None) is None


def test_a_forked_child_cannot_wait_for_its_parents_work():
    """The threads that would do it are not there: an error instead of a wait for ever."""
    layer = kt_sft.CpuExperts.from_weights(torch.randn(2, 8, 6), torch.randn(2, 6, 4))
    forked = []
    layer.beside = lambda _: forked.append(os.fork())
    said = ""
    try:
        layer(torch.randn(3, 6), torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    except RuntimeError as error:
        said = str(error)
    if forked == [0]:
        os._exit(0 if "a forked child has none of the threads" in said else 1)
    assert said == ""
    assert os.waitstatus_to_exitcode(os.waitpid(forked[0], 0)[1]) == 0


def test_a_forked_child_exits_in_order():
    """Tearing the interpreter down must not wait for threads that only the parent has."""
    program = """
import os, sys, torch, kt_sft
layer = kt_sft.CpuExperts.from_weights(torch.randn(2, 8, 6), torch.randn(2, 6, 4))
layer(torch.randn(3, 6), torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0


def test_threads_that_cannot_be_started_are_an_error():
    program = """
import resource, torch
from kt_sft.config import ConfigError
from kt_sft.engine.engine import get_engine
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))  # each thread wants 8 MiB of stack
try:
    get_engine(500)
except ConfigError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], timeout=120, check=True, capture_output=True, text=True)
    assert "cannot start 500 engine threads" in run.stdout

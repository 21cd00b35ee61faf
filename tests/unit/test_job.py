"""What the processes of one job on one machine have in common: made once, whoever dies."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from kt_sft.engine import job
from kt_sft.engine.job import Following, LostPeerError, Offer, agree, join
from tests.forked import Rank, forked_ranks

Start = Callable[..., Rank]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with forked_ranks(port=str(tmp_path)) as start:
        yield start


def maker(pipe: Connection, subject: str = "it") -> None:
    """Says what it got on asking; then makes a memory that holds "one", and after a signal ends what it has to say."""
    offer = join(subject)
    pipe.send(type(offer).__name__)
    if not isinstance(offer, Offer):
        return
    memory = os.memfd_create("it")
    os.write(memory, b"one")
    offer.send("first", [memory])
    os.close(memory)
    pipe.recv()
    offer.send("last")
    pipe.recv()


def taker(pipe: Connection) -> None:
    """Passes on what it gets."""
    following = join("it")
    pipe.send(type(following).__name__)
    assert isinstance(following, Following)
    try:
        message, (descriptor,) = following.receive()
        pipe.send((message, os.pread(descriptor, 3, 0)))
        pipe.send(following.receive()[0])
    except LostPeerError:
        pipe.send("lost")


def test_the_first_makes_it_and_the_others_get_all_of_it(start: Start) -> None:
    first = start(maker)
    assert first.hears() == "Offer"
    early = start(taker)
    assert early.hears() == "Following"
    assert early.hears() == ("first", b"one")
    first.go_on()
    assert early.hears() == "last"
    late = start(taker)
    assert [late.hears(), late.hears(), late.hears()] == ["Following", ("first", b"one"), "last"]


def starved_maker(pipe: Connection) -> None:
    """Runs out of descriptors as the first of the others asks."""
    accept = socket.socket.accept
    asked: list[None] = []

    def once_without(listener: socket.socket) -> Any:
        if not asked:
            asked.append(None)
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "accept", once_without)
        maker(pipe)


def test_the_others_wait_for_one_that_is_out_of_descriptors(start: Start) -> None:
    first = start(starved_maker)
    assert first.hears() == "Offer"
    other = start(taker)
    assert [other.hears(), other.hears()] == ["Following", ("first", b"one")]


def test_a_death_is_noticed_and_leaves_nothing_behind(start: Start) -> None:
    first = start(maker)
    assert first.hears() == "Offer"
    waiting = start(taker)
    assert [waiting.hears(), waiting.hears()] == ["Following", ("first", b"one")]
    first.kill()
    assert waiting.hears() == "lost"
    assert start(maker).hears() == "Offer"


def test_a_child_does_not_keep_a_dead_process_alive(start: Start) -> None:
    """DataLoader's workers are forked, and outlive a killed parent for a while."""

    def parent(pipe: Connection) -> None:
        offer = join("it")
        pipe.send(type(offer).__name__)
        assert isinstance(offer, Offer)
        offer.send("first", [0])
        pipe.recv()  # until one waits
        child = os.fork()
        if child:
            pipe.send(child)
        signal.pause()

    first = start(parent)
    assert first.hears() == "Offer"
    waiting = start(taker)
    assert waiting.hears() == "Following"
    assert waiting.hears()[0] == "first"
    first.go_on()
    child = first.hears()
    try:
        first.kill()
        assert waiting.hears() == "lost"
        assert start(maker).hears() == "Offer"
        os.kill(child, 0)  # raises if it is gone
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_keeps_no_memory_that_its_parent_offers(start: Start) -> None:
    """Nor does it wait for what a thread of its parent held as it was forked."""

    def parent(pipe: Connection) -> None:
        offer = join("it")
        assert isinstance(offer, Offer)
        memory = os.memfd_create("offered")
        offer.send("first", [memory])
        os.close(memory)
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with offer._changed:
                held.set()
                done.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        if os.fork() == 0:
            offer.send("no more", [0])
            offer.close()
            pipe.send([name for name in open_files() if "offered" in name])
            os._exit(0)
        os.wait()
        done.set()
        holder.join()
        pipe.send(len([name for name in open_files() if "offered" in name]))
        offer.close()
        pipe.send([name for name in open_files() if "offered" in name])

    first = start(parent)
    assert [first.hears(), first.hears(), first.hears()] == [[], 1, []]


def open_files() -> list[str]:
    """What the open descriptors of this process are of."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the folder itself
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return names


@pytest.mark.parametrize(
    "name", ["MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
)
def test_jobs_and_their_restarts_are_apart(name: str, start: Start) -> None:
    assert start(maker).hears() == "Offer"
    assert start(maker).hears() == "Following"
    assert start(maker, **{name: "7"}).hears() == "Offer"


def test_subjects_are_apart(start: Start) -> None:
    assert start(maker).hears() == "Offer"
    assert start(lambda pipe: maker(pipe, "another")).hears() == "Offer"


def test_who_cannot_find_others_makes_it_alone(start: Start) -> None:
    assert start(maker).hears() == "Offer"
    assert start(maker, MASTER_PORT="").hears() == "NoneType"
    assert start(maker, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1").hears() == "NoneType"


def test_what_was_withdrawn_is_made_anew(start: Start) -> None:
    def withdraws(pipe: Connection) -> None:
        offer = join("it")
        pipe.send(type(offer).__name__)
        assert isinstance(offer, Offer)
        offer.send("first", [0])
        pipe.recv()
        offer.close()
        pipe.send(type(join("it")).__name__)
        pipe.recv()

    first = start(withdraws)
    assert first.hears() == "Offer"
    waiting = start(taker)
    assert waiting.hears() == "Following"
    assert waiting.hears()[0] == "first"
    first.go_on()
    assert first.hears() == "Offer"
    assert waiting.hears() == "lost"


def deciding(decision: str, again: str = "anew") -> Callable[[Connection], None]:
    def decide(pipe: Connection) -> None:
        pipe.send(agree("tiers", lambda: [decision, decision]))
        pipe.recv()
        pipe.send(agree("tiers", lambda: again))
        pipe.recv()

    return decide


def test_all_agree_on_what_the_first_decides(start: Start) -> None:
    first = start(deciding("a"))
    assert first.hears() == ["a", "a"]
    second = start(deciding("b"))
    assert second.hears() == ["a", "a"]
    for rank in (first, second):
        rank.go_on()
        assert rank.hears() == ["a", "a"]


def test_what_was_agreed_outlives_the_one_who_decided(start: Start) -> None:
    first = start(deciding("a"))
    assert first.hears() == ["a", "a"]
    second = start(deciding("b"))
    assert second.hears() == ["a", "a"]
    first.kill()
    second.go_on()
    assert second.hears() == ["a", "a"]


def test_who_cannot_decide_leaves_it_to_another(start: Start) -> None:
    def fails(pipe: Connection) -> None:
        def decide() -> Any:
            pipe.send("asked")
            pipe.recv()
            raise KeyError

        with pytest.raises(KeyError):
            agree("tiers", decide)
        pipe.send("failed")
        pipe.recv()

    first = start(fails)
    assert first.hears() == "asked"
    second = start(deciding("b"))
    first.go_on()
    assert first.hears() == "failed"
    assert second.hears() == ["b", "b"]


def test_one_that_does_not_answer_is_an_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = start(maker)
    assert stopped.hears() == "Offer"
    os.kill(stopped.process.pid, signal.SIGSTOP)

    def asks(pipe: Connection) -> None:
        monkeypatch.setattr(job, "PATIENCE", 0.05)
        with pytest.raises(RuntimeError, match="took over 'it' for all of this machine and does not answer"):
            join("it")
        pipe.send("as it should be")

    assert start(asks).hears() == "as it should be"


def test_alone_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_socket", lambda: pytest.fail("a process alone opened a socket"))
    assert join("it") is None
    assert agree("it", lambda: 3) == 3

"""How the processes of one job on one machine come to have something in common, once.

Whichever asks first makes it, the others get it from there: a socket's name can be taken by one process alone. It is a
name of Linux's abstract namespace, which is no file: it goes with the process that took it, however that ends. Nobody
has to wait for all the others to ask, so it does not matter which of them need the thing, or when.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from kt_sft.config import local_job

#: Seconds in which a process of this machine answers, if it runs at all.
PATIENCE = 300.0
_RETRY = 0.01
#: What a process runs out of for a while; the others go on waiting for it.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
#: The kernel passes 253 descriptors with a message; and a message should fit a socket's buffer.
_MOST_DESCRIPTORS = 64
_MOST_BYTES = 1 << 16
_GREETING = "kt_sft"

# Of this process, for a forked child to close: a socket that a child keeps open looks alive when its owner is dead, and
# memory that it keeps open stays when its owner has let go of it.
_inherited: weakref.WeakSet[socket.socket | _Files] = weakref.WeakSet()
_offers: weakref.WeakSet[Offer] = weakref.WeakSet()
_agreements: dict[str, tuple[Offer | None, Any]] = {}
_lock = threading.Lock()


class LostPeerError(RuntimeError):
    """The process that makes what this one waits for has ended."""


class _Files:
    """Duplicates of open files; they are closed when nobody has this any more."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.descriptors: list[int] = []
        self.close = weakref.finalize(self, _close, self.descriptors)
        self.close.atexit = False
        _inherited.add(self)
        for descriptor in descriptors:
            self.descriptors.append(os.dup(descriptor))


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


class Offer:
    """What this process makes for the others: messages, which each of them gets all of, in order, whenever it asks."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._messages: list[tuple[bytes, _Files]] = []
        self._sent: dict[socket.socket, int] = {}  # to each of the others
        self._changed = threading.Condition()
        self._closed = False
        _offers.add(self)
        self.send(_GREETING)
        threading.Thread(target=self._accept, name="kt_sft-offer", daemon=True).start()

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Adds a message.

        Args:
            message: Anything JSON can say in 64 KiB.
            descriptors: Open files to go with it, at most 64; they are duplicated and stay the caller's.
        """
        data = json.dumps(message).encode()
        assert len(data) <= _MOST_BYTES
        assert len(descriptors) <= _MOST_DESCRIPTORS
        with self._changed:
            if not self._closed:
                self._messages.append((data, _Files(descriptors)))
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Waits until all who have asked got all messages, but no longer than that: one of them may be stopped."""
        with self._changed:
            self._changed.wait_for(
                lambda: all(sent == len(self._messages) for sent in self._sent.values()), timeout=seconds
            )

    def close(self) -> None:
        """Withdraws it: who asks now makes it anew. What others have got stays theirs."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which closing would not
            self._listener.close()
            self._messages.clear()

    def forget(self) -> None:
        """In a forked child, where it is nobody's; the lock may be held by a thread that did not come along."""
        self._changed = threading.Condition()
        self._closed = True
        self._messages, self._sent = [], {}

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError as error:
                if error.errno not in _PASSING:  # closed
                    return
                time.sleep(_RETRY)
                continue
            _inherited.add(peer)
            with self._changed:
                self._sent[peer] = 0
            threading.Thread(target=self._serve, args=(peer,), name="kt_sft-offer", daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):  # it may go at any time
            while _owner(peer) == os.geteuid() and self._send_next(peer):
                with self._changed:
                    self._sent[peer] += 1
                    self._changed.notify_all()
        with self._changed:
            del self._sent[peer]
            self._changed.notify_all()

    def _send_next(self, peer: socket.socket) -> bool:
        """Sends the message that `peer` has not got yet, once there is one; False when all is withdrawn."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._messages) > self._sent[peer])
            if self._closed:
                return False
            data, files = self._messages[self._sent[peer]]
        socket.send_fds(peer, [data], files.descriptors)  # outside of the lock, as it may take its time
        return True


class Following:
    """What another process of the job makes; to be closed when there is nothing more to get."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer

    def receive(self) -> tuple[Any, list[int]]:
        """The next message and its descriptors, which are the caller's to close; waits for it.

        Raises:
            LostPeerError: There will be none: the other process has ended, or withdrew what it made.
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._peer, _MOST_BYTES, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            data, descriptors = b"", []
        if not data:
            raise LostPeerError("the process of this job that was making it for all has ended")
        return json.loads(data), descriptors

    def close(self) -> None:
        """Takes no more messages."""
        self._peer.close()


def join(subject: str) -> Offer | Following | None:
    """Decides whether this process makes `subject` for all processes of its job on this machine.

    Returns:
        An Offer: it does, and sends it there. A Following: another one does. None: there are no others, or no way to
        find them.

    Raises:
        RuntimeError: The process that has it does not answer, or belongs to another user.
    """
    job = local_job()
    if job is None:
        return None
    name = hashlib.sha256(json.dumps([os.geteuid(), job, subject]).encode()).hexdigest()
    address = f"\0kt_sft-{name[:40]}"
    deadline = time.monotonic() + PATIENCE
    while True:
        joined = _bind(address) or _connect(address, deadline)
        if joined is not None:
            return joined
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"kt_sft: another process of this job took over {subject!r} for all of this machine and does not "
                "answer; see whether it is stopped, and start the job anew"
            )
        time.sleep(_RETRY)


def agree(subject: str, decide: Callable[[], Any]) -> Any:
    """What `decide` gives in one process of the job on this machine: the first to ask; the same in all of them.

    Args:
        subject: What it is about.
        decide: Gives anything JSON can say.
    """
    with _lock:
        if subject in _agreements:
            return _agreements[subject][1]
        while True:
            joined = join(subject)
            if joined is None:
                return decide()
            if isinstance(joined, Offer):
                try:
                    decision = decide()
                except BaseException:
                    joined.close()
                    raise
                joined.send(decision)
                _agreements[subject] = (joined, decision)
                return decision
            try:
                decision = joined.receive()[0]
            except LostPeerError:
                continue  # without having decided
            finally:
                joined.close()
            _agreements[subject] = (None, decision)  # the other may have ended when this is asked for again
            return decision


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _inherited.add(made)
    return made


def _bind(address: str) -> Offer | None:
    listener = _socket()
    try:
        listener.bind(address)
    except OSError:  # somebody has it
        listener.close()
        return None
    listener.listen(128)
    return Offer(listener)


def _connect(address: str, deadline: float) -> Following | None:
    """None where the process that has the name does not listen yet, or no longer."""
    peer = _socket()
    try:
        peer.settimeout(max(0.1, deadline - time.monotonic()))
        peer.connect(address)
        if _owner(peer) != os.geteuid():
            raise RuntimeError("kt_sft: a process of another user answers instead of one of this job")
        greeted = peer.recv(_MOST_BYTES) == json.dumps(_GREETING).encode()
        peer.settimeout(None)
    except OSError:
        greeted = False
    except BaseException:
        peer.close()
        raise
    if greeted:
        return Following(peer)
    peer.close()
    return None


def _owner(peer: socket.socket) -> int:
    """The user of the process at the other end."""
    credentials = struct.Struct("3i")  # process, user, group
    return credentials.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))[1]


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _agreements.clear()
    for offer in [*_offers]:
        offer.forget()
    for held in [*_inherited]:
        held.close()
    _inherited.clear()


os.register_at_fork(after_in_child=_forget)

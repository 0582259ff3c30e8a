"""Pairs that one worker hands to another: what goes wrong over one costs that one alone."""

from __future__ import annotations

import errno
import os
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.channel import Channel
from pyforwarder.worker.moving import Giving, Taking
from tests.helpers.stream_play import Play, Servers, StartPlay, to

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client


class Datagrams:
    """A worker's UDP sessions: those that were let go of, and how others have ended."""

    def __init__(self, *sessions: Any) -> None:
        self.handover = SimpleNamespace(settle=lambda **_: None)
        self.adoption = SimpleNamespace(take_in=len)
        self.waits_for_sessions = False
        self._sessions = list(sessions)
        self.let_go_of: list[Any] = []
        self.ended: list[tuple[Any, CloseReason]] = []

    def sessions(self) -> list[Any]:
        return list(self._sessions)

    def let_go(self, session: Any) -> None:
        self._sessions.remove(session)
        self.let_go_of.append(session)

    def end(self, session: Any, reason: CloseReason) -> None:
        self._sessions.remove(session)
        self.ended.append((session, reason))

    def sessions_have_come(self) -> None:
        self.waits_for_sessions = False


def move(old: Play, new: Play) -> Taking:
    """Both workers' parts; their loops have to run."""
    theirs, ours = Channel.pair()
    old._stack.callback(theirs.close)
    new._stack.callback(ours.close)
    taken_in: Any = Datagrams()
    taking = Taking(ours, new.server, taken_in, None)
    given: Any = Datagrams()
    Giving(theirs, old.server, given, None, None)
    return taking


def run_both(old: Play, new: Play, look: Any, what: str) -> None:
    def run() -> bool:
        old.loop.run_once(0)
        return bool(look())

    new.run_until(run, what)


def pair_of(play: Play, listening: socket.socket) -> tuple[socket.socket, socket.socket, Client]:
    """A pair that is copied: its client's end, its server's, and what the worker has of it."""
    before = set(play.server.clients.values())
    client = play.dial()
    client.sendall(b"hello")
    server = play.accept(listening)
    assert play.read(server, 5) == b"hello"
    (made,) = set(play.server.clients.values()) - before
    return client, server, made


@pytest.mark.parametrize("error", [ValueError("made up"), OSError(errno.EMSGSIZE, "made up")])
def test_a_fault_over_one_pair_costs_it_alone(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    listening, address = servers()
    old, new = start(to(address)), start(to(address))
    faulty = pair_of(old, listening)
    others = [pair_of(old, listening) for _ in range(3)]
    is_portable = Giving._is_portable

    def fail_once(giving: Giving, client: Client) -> bool:
        if client is faulty[2]:
            raise error
        return is_portable(giving, client)

    monkeypatch.setattr(Giving, "_is_portable", fail_once)
    move(old, new)
    run_both(old, new, lambda: len(new.server.clients) == len(others), "other pairs")
    run_both(old, new, lambda: not old.server.clients, "end of the faulty one")
    assert old.closed(CloseReason.INTERNAL) == 1
    assert old.read_end(faulty[0]) == (b"", "reset")
    for client, server, _ in others:
        server.sendall(b"answer")
        assert new.read(client, 6) == b"answer"


def test_a_fault_over_all_pairs_does_not_end_the_giving(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, address = servers()
    old, new = start(to(address)), start(to(address))
    pair_of(old, listening)
    turn_of = Giving._turn_of
    faults: list[int] = []

    def fail_once(giving: Giving, client: Client) -> int:
        if not faults:
            faults.append(1)
            raise KeyError("made up")
        return turn_of(giving, client)

    monkeypatch.setattr(Giving, "_turn_of", fail_once)
    move(old, new)
    run_both(old, new, lambda: new.server.clients, "pair")
    assert faults


def test_sessions_of_the_kernel_are_free_to_be_adopted_once_the_other_is_gone(
    start: StartPlay, servers: Servers
) -> None:
    """As long as their old sockets are there nobody can make such as they were."""
    listening, address = servers()
    old = start(to(address))
    copied, spliced = SimpleNamespace(place=None), SimpleNamespace(place=object())
    datagrams: Any = Datagrams(copied, spliced)
    theirs, ours = Channel.pair()
    ours.close()
    giving = Giving(theirs, old.server, datagrams, None, None)
    giving._sessions_told = True
    pair_of(old, listening)
    old.run_until(lambda: datagrams.let_go_of, "end of the giving")
    assert datagrams.let_go_of == [spliced]
    assert datagrams.sessions() == [copied]


def watched(play: Play) -> set[int]:
    """The descriptors that the kernel watches for its loop."""
    with open(f"/proc/self/fdinfo/{play.loop.fileno()}", encoding="ascii") as file:
        return {int(line.split()[1]) for line in file if line.startswith("tfd:")}


def test_a_pair_that_ends_while_the_old_worker_has_its_sockets_is_watched_no_more(
    start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    old, new = start(to(address)), start(to(address))
    _, _, made = pair_of(old, listening)
    kept = [os.dup(made.client_fd), os.dup(made.server_fd)]
    move(old, new)
    run_both(old, new, lambda: new.server.clients, "pair")
    client = new.only_client()
    numbers = {client.client_fd, client.server_fd}
    assert numbers <= watched(new)
    new.server.broken(client, CloseReason.FLUSHED)
    new.loop.run_once(0)
    assert not numbers & watched(new)
    for fd in kept:
        os.close(fd)


def test_pairs_take_no_descriptors_that_the_worker_needs(
    start: StartPlay, servers: Servers
) -> None:
    """A worker that was taken over may send sockets without end."""
    listening, address = servers()
    old, new = start(to(address)), start(to(address))
    client, server, _ = pair_of(old, listening)
    taking = move(old, new)
    taking._most_fds = 3
    run_both(old, new, lambda: not old.server.clients, "pair given away")
    assert new.read_end(client) == (b"", "reset")
    assert new.read_end(server) == (b"", "reset")
    assert not new.server.clients

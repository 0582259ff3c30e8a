"""Pairs that one worker hands to another: what goes wrong over one costs that one alone."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pyforwarder.core.first_packet.naming import SOURCES
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.channel import Channel
from pyforwarder.runtime.loop import EPOLLIN, MOST_EVENTS
from pyforwarder.worker.log import AUDIT_FIELDS, ConnectionLog, Log
from pyforwarder.worker.moving_facts import audit_message, facts_of
from pyforwarder.worker.pair_receiver import _EVENTS_MEANWHILE, PairReceiver
from pyforwarder.worker.pair_sender import PairSender
from tests.helpers.stream_play import Play, Servers, StartPlay, to

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client


class Datagrams:
    """A worker's UDP sessions: those that were released, and how others have ended."""

    def __init__(self, *sessions: Any) -> None:
        self.handover = SimpleNamespace(settle=lambda **_: None)
        self.adoption = SimpleNamespace(all_are_known=lambda _: None)
        self.waits_for_sessions = False
        self._sessions = list(sessions)
        self.released: list[Any] = []
        self.ended: list[tuple[Any, CloseReason]] = []

    def sessions(self) -> list[Any]:
        return list(self._sessions)

    @property
    def by_id(self) -> dict[int, Any]:
        return dict(enumerate(self._sessions))

    def release(self, session: Any) -> None:
        self._sessions.remove(session)
        self.released.append(session)

    def end(self, session: Any, reason: CloseReason) -> None:
        self._sessions.remove(session)
        self.ended.append((session, reason))

    def sessions_have_come(self) -> None:
        self.waits_for_sessions = False


def move(old: Play, new: Play) -> PairReceiver:
    """Both workers' parts; their loops have to run."""
    theirs, ours = Channel.pair()
    old._stack.callback(theirs.close)
    new._stack.callback(ours.close)
    taken_in: Any = Datagrams()
    receiver = PairReceiver(ours, new.server, taken_in, None)
    given: Any = Datagrams()
    PairSender(theirs, old.server, given, None, None)
    return receiver


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
    is_portable = PairSender._is_portable

    def fail_once(sender: PairSender, client: Client) -> bool:
        if client is faulty[2]:
            raise error
        return is_portable(sender, client)

    monkeypatch.setattr(PairSender, "_is_portable", fail_once)
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
    order_of = PairSender._order_of
    faults: list[int] = []

    def fail_once(sender: PairSender, client: Client) -> int:
        if not faults:
            faults.append(1)
            raise KeyError("made up")
        return order_of(sender, client)

    monkeypatch.setattr(PairSender, "_order_of", fail_once)
    move(old, new)
    run_both(old, new, lambda: new.server.clients, "pair")
    assert faults


def test_sessions_of_the_kernel_are_free_to_be_adopted_once_the_other_is_gone(
    start: StartPlay, servers: Servers
) -> None:
    """As long as their old sockets are there nobody can make such as they were."""
    listening, address = servers()
    old = start(to(address))
    copied, spliced = SimpleNamespace(in_kernel=None), SimpleNamespace(in_kernel=object())
    datagrams: Any = Datagrams(copied, spliced)
    theirs, ours = Channel.pair()
    ours.close()
    sender = PairSender(theirs, old.server, datagrams, None, None)
    sender._sessions_told = True
    pair_of(old, listening)
    old.run_until(lambda: datagrams.released, "end of the sender")
    assert datagrams.released == [spliced]
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
    receiver = move(old, new)
    receiver._most_fds = 3
    run_both(old, new, lambda: not old.server.clients, "pair given away")
    assert new.read_end(client) == (b"", "reset")
    assert new.read_end(server) == (b"", "reset")
    assert not new.server.clients


def test_a_pair_that_is_under_way_waits_for_no_other_however_many_are_ready(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One turn of the worker that gets it, in which few others are served; and few are under way.

    What is counted are turns, in each of which all sockets are ready; they take 5 ms each.
    """
    listening, address = servers()
    old, new = start(to(address)), start(to(address))
    pairs = {made.id for _, _, made in [pair_of(old, listening) for _ in range(40)]}
    served, now_s = 0, time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)

    def serve(_owner: object, _fd: int, _mask: int) -> None:
        nonlocal served
        served += 1

    for _ in range(3 * MOST_EVENTS):
        fd = os.eventfd(1)
        new._stack.callback(os.close, fd)
        new.loop.watch(fd, EPOLLIN, serve, None)
    move(old, new)
    waited: dict[int, int] = dict.fromkeys(pairs, 0)
    most = 0

    def ids(play: Play) -> set[int]:
        return {client.id for client in play.server.clients.values()}

    def turn() -> bool:
        nonlocal served, most, now_s
        now_s += 0.005
        old.loop.run_once(0)
        under_way = pairs - ids(old) - ids(new)
        most = max(most, len(under_way))
        served = 0
        new.loop.run_once(0)
        for number in under_way - ids(new):
            waited[number] += 1
        assert not ids(old) or served <= MOST_EVENTS
        return ids(new) == pairs

    old.run_until(turn, "all pairs")
    # The first ones are told of by epoll, in whose queue all others are.
    first = sorted(waited.values(), reverse=True)[:most]
    assert max(first) <= 3 * MOST_EVENTS // _EVENTS_MEANWHILE
    others = sorted(waited.values(), reverse=True)[most:]
    assert max(others) <= 1, waited
    assert 0 < most <= 16
    assert new.loop.most_events < MOST_EVENTS

    def is_as_before() -> bool:
        nonlocal now_s
        now_s += 0.005
        return new.loop.most_events == MOST_EVENTS

    new.run_until(is_as_before, "turns are as long as they were")


def told_line(play: Play) -> dict[str, Any]:
    """The line of the only pair's end."""
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb") as lines, os.fdopen(write_fd, "wb"):
        log = ConnectionLog(Log(level="info", form="json", fd=write_fd))
        client = play.only_client()
        client.reason = CloseReason.FLUSHED
        log.closed(client, (0, 0), (0, 0))
        client.reason = None
        line: dict[str, Any] = json.loads(lines.readline())
    return line


def test_the_line_of_a_pair_that_was_taken_over_says_what_it_was_decided_on(
    start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    old, new = start(to(address)), start(to(address))
    _, _, made = pair_of(old, listening)
    facts = {"sni": "a.test", "host": "b.test", "key": "k", "asked": "c.test:1", "upstream": "u"}
    made.facts = tuple(facts.items())
    move(old, new)
    run_both(old, new, lambda: new.server.clients, "pair")
    line = told_line(new)
    assert {name: line[name] for name in facts} == facts


def test_what_another_worker_says_of_a_decision_is_no_other_field_of_the_line() -> None:
    said = {"reason": "finished", "id": "5", "sni": "a" * 4000, "new": "x"}
    assert facts_of(said) == (("sni", "a" * 512),)


def test_names_that_are_no_text_go_along_as_text(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    play = start(to(address))
    _, _, made = pair_of(play, listening)
    made.facts = (("user", "a\udc80"), ("host", "\u00e4"), ("reason", "x"))
    assert audit_message(made) == {"user": "a?", "host": "\u00e4"}


def test_every_name_that_a_rule_may_go_by_is_a_field_that_goes_along() -> None:
    assert set(SOURCES) < AUDIT_FIELDS


def test_the_log_says_soon_how_many_have_come(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old worker may live for a while longer, for those that cannot go."""
    listening, address = servers()
    old, new = start(to(address)), start(to(address))
    for _ in range(3):
        pair_of(old, listening)
    lines: list[tuple[str, str, dict[str, object]]] = []
    monkeypatch.setattr(
        new.server.log.log,
        "write",
        lambda level, event, **fields: lines.append((level, event, fields)),
    )
    move(old, new)
    run_both(old, new, lambda: len(new.server.clients) == 3, "pairs")
    assert not lines
    new.pass_time(1.0)
    assert lines == [("info", "taken_over", {"pairs": 3})]
    new.pass_time(5.0)
    assert len(lines) == 1

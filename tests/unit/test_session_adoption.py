"""UDP sessions that a worker takes over from one that has died: as its configuration says now."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.ebpf.abi import PairRecord
from pyforwarder.datapath.splice.sessions import (
    Carried,
    KernelSession,
    SessionOrphan,
    SpliceSessions,
)
from pyforwarder.runtime.counters import Counter, ListenerCounter, ServerCounter
from pyforwarder.worker.moving_facts import SessionFacts
from pyforwarder.worker.udp.eviction import Assurance
from pyforwarder.worker.udp.handover import SessionHandover
from tests.helpers.datagram_play import DatagramPlay
from tests.helpers.fake_kernel import FakeKernel


class Keeping(FakeKernel):
    """Which sessions have been taken over, and which are over."""

    def __init__(self, defer: Callable[[Callable[[Any], None], Any], None]) -> None:
        super().__init__(defer)
        self.taken: list[int] = []
        self.closed_sessions: list[int] = []
        self.lose: Callable[[], None] = lambda: None
        self.carried_in_the_end: Carried = (0, 0), (0, 0)

    def resume(
        self, orphan: SessionOrphan, slot: int, idle_s: float, lost: Callable[[], None]
    ) -> KernelSession:
        assert idle_s == 120.0
        self.taken.append(orphan.index)
        self.lose = lost
        return KernelSession(orphan.index, orphan.id, slot)

    def close(
        self, sessions: Sequence[KernelSession], then: Callable[[list[Carried]], None]
    ) -> None:
        self.closed_sessions += [session.index for session in sessions]
        then([self.carried_in_the_end for _ in sessions])

    def forget(self, index: int, session_id: int) -> None:
        assert session_id == 100 + index
        self.closed_sessions.append(index)


class Adopting:
    """A worker that has just begun, and the sessions of one that died."""

    def __init__(self, rules: str = "{name: r, match: any, to: web}", more: str = "") -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.to = "{}:{}".format(*self.sock.getsockname())
        self.play = DatagramPlay(
            "listeners: [{name: main, bind: '127.0.0.1:0', protocol: udp, "
            f"rules: [{rules.replace('SERVER', self.to)}]}}]\n"
            f"upstreams: {{web: {{servers: ['{self.to}']}}}}\n{more}"
        )
        self.kernel = Keeping(self.play.loop.defer)
        self.play.server.handover = SessionHandover(
            self.play.server, cast("SpliceSessions", self.kernel)
        )

    def orphan(
        self,
        client: socket.socket,
        number: int = 1,
        rule: bytes = b"r",
        server: tuple[str, int] | None = None,
    ) -> SessionOrphan:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.connect(server or self.sock.getsockname())
        record = PairRecord(id=100 + number, rule=rule, started_ns=1)
        return SessionOrphan(
            number, 100 + number, sock, client.getsockname(), self.play.address, record
        )

    def close(self) -> None:
        self.play.close()
        self.sock.close()


@pytest.fixture
def adopting() -> Iterator[Adopting]:
    made = Adopting()
    yield made
    made.close()


def test_a_session_of_an_upstream_is_counted_for_its_server_until_it_ends(
    adopting: Adopting,
) -> None:
    play = adopting.play
    (server,) = play.generation.balancers["web"].servers
    assert play.server.adoption.take_in([adopting.orphan(play.client())]) == 1
    at = server.counter + ServerCounter.PAIRS
    assert (server.pairs, server.held.total(), play.counters[at]) == (1, 1, 1)
    assert play.server.flush_ids(None) == [101]
    assert (server.pairs, server.held.total(), play.counters[at]) == (0, 0, 0)
    assert adopting.kernel.closed_sessions == [1]


def test_a_session_that_the_keeper_does_not_know_any_more_ends(adopting: Adopting) -> None:
    play = adopting.play
    assert play.server.adoption.take_in([adopting.orphan(play.client())]) == 1
    adopting.kernel.lose()
    assert play.closed(CloseReason.INTERNAL) == 1
    assert adopting.kernel.closed_sessions == [1]


def test_datagrams_that_wait_are_looked_at_once_every_session_is_taken_in(
    adopting: Adopting,
) -> None:
    play = adopting.play
    clients = [play.client() for _ in range(3)]
    for number, client in enumerate(clients):
        client.send(b"from %d" % number)
    orphans = [adopting.orphan(client, number) for number, client in enumerate(clients, 1)]
    assert play.server.adoption.take_in(orphans) == 3
    ports = {orphan.server.getsockname()[1]: n for n, orphan in enumerate(orphans)}
    for _ in clients:
        data, source = play.receive(adopting.sock)
        assert data == b"from %d" % ports[source[1]]
    assert sorted(play.server.flush_ids(None)) == [101, 102, 103]


@pytest.mark.parametrize("again", ["client", "id"])
def test_a_session_that_is_there_already_is_not_taken_in_again(
    adopting: Adopting, again: str
) -> None:
    play = adopting.play
    client = play.client()
    other = client if again == "client" else play.client()
    orphans = [adopting.orphan(client, 1), adopting.orphan(other, 2 if again == "client" else 1)]
    assert play.server.adoption.take_in(orphans) == 1
    assert adopting.kernel.taken == [1]
    assert len(adopting.kernel.closed_sessions) == 1
    assert play.server.flush_ids(None) == [101]


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("{name: other, match: any, to: web}", CloseReason.NO_MATCH),
        ("{name: r, match: any, reject: close}", CloseReason.REJECTED),
        ("{name: r, match: any, to: 127.0.0.1:1}", CloseReason.UNREACHABLE),
        ("{name: r, match: any, to: 'name.test:1'}", CloseReason.UNREACHABLE),
    ],
)
def test_a_session_that_its_rule_would_not_lead_there_any_more_ends(
    rules: str, reason: CloseReason
) -> None:
    adopting = Adopting(rules)
    play = adopting.play
    assert play.server.adoption.take_in([adopting.orphan(play.client())]) == 0
    assert (adopting.kernel.taken, adopting.kernel.closed_sessions) == ([], [1])
    assert play.closed(reason) == 1
    (line,) = play.said()
    assert (line["id"], line["reason"]) == (101, reason.value)
    adopting.close()


@pytest.mark.parametrize("rules", ["{name: r, match: any, to: 'SERVER'}"])
def test_a_session_that_its_rule_still_leads_there_goes_on(rules: str) -> None:
    adopting = Adopting(rules)
    assert adopting.play.server.adoption.take_in([adopting.orphan(adopting.play.client())]) == 1
    assert adopting.kernel.taken == [1]
    adopting.close()


def test_a_session_whose_server_has_left_its_upstream_ends(adopting: Adopting) -> None:
    play = adopting.play
    orphan = adopting.orphan(play.client(), server=("127.0.0.1", 9))
    assert play.server.adoption.take_in([orphan]) == 0
    assert play.closed(CloseReason.UNREACHABLE) == 1
    assert adopting.kernel.closed_sessions == [1]


def test_a_session_that_nobody_goes_on_with_is_counted_and_logged_without_a_listener(
    adopting: Adopting,
) -> None:
    """As in a drain, in which none is open any more."""
    play = adopting.play
    orphan = adopting.orphan(play.client())
    assert orphan.record is not None
    orphan.record.listener_name = b"main"
    for flow, carried in zip(orphan.record.worker, ((7, 1), (30, 2)), strict=True):
        flow.carried_bytes, flow.carried_packets = carried
    adopting.kernel.carried_in_the_end = ((100, 3), (1000, 4))
    play.server.listen_only_at(())
    play.server.adoption.end([orphan], play.generation, CloseReason.SHUTDOWN)
    assert (adopting.kernel.taken, adopting.kernel.closed_sessions) == ([], [1])
    assert orphan.server.fileno() == -1
    assert play.closed(CloseReason.SHUTDOWN) == 1
    assert play.counters[Counter.OPEN] == 0
    assert (play.counters[Counter.UP_BYTES], play.counters[Counter.DOWN_BYTES]) == (107, 1030)
    state = play.generation.addresses["main"][0]
    of_listener = [
        play.counters[state.counter + index]
        for index in (ListenerCounter.UP_BYTES, ListenerCounter.DOWN_BYTES)
    ]
    assert of_listener == [107, 1030]
    (line,) = play.said()
    names = ("id", "reason", "listener", "rule", "up_bytes", "up_packets", "down_packets")
    assert [line[name] for name in names] == [101, "shutdown", "main", "r", 107, 4, 6]


def test_a_session_to_this_forwarder_itself_ends() -> None:
    """A worker that was taken over may have opened any."""
    adopting = Adopting("{name: r, match: any, to: 'SERVER'}")
    play = adopting.play
    host, port = play.address
    play.reload(
        "listeners: [{name: main, bind: '127.0.0.1:0', protocol: udp,"
        f" rules: [{{name: r, match: any, to: '{host}:{port}'}}]}}]"
    )
    assert play.server.adoption.take_in([adopting.orphan(play.client(), server=(host, port))]) == 0
    assert play.closed(CloseReason.DENIED) == 1
    assert play.counters[Counter.OPEN] == 0
    adopting.close()


def test_what_is_told_of_a_session_of_the_kernel_is_known_when_the_keeper_gives_it() -> None:
    adopting = Adopting()
    adoption = adopting.play.server.adoption
    orphans = [adopting.orphan(adopting.play.client(), number) for number in (1, 2)]
    adoption.remember(SessionFacts(id=101, standing=2, audit={"sni": "a.test"}))
    assert adoption.take_in(orphans) == 2
    known, unknown = adopting.play.server.sessions()
    assert (known.assurance, known.facts) == (Assurance.STEADY, (("sni", "a.test"),))
    # It is old, but nobody says that its client has gone on speaking.
    assert (unknown.assurance, unknown.facts) == (Assurance.BRIEF, ())
    assert not adoption._told
    adopting.close()


def test_what_is_told_of_sessions_that_do_not_come_is_bounded_and_forgotten() -> None:
    adopting = Adopting()
    play = adopting.play
    for number in range(play.server.most_sessions + 9):
        play.server.adoption.remember(SessionFacts(id=number + 1))
    assert len(play.server.adoption._told) == play.server.most_sessions
    play.pass_time(61.0)
    assert not play.server.adoption._told
    adopting.close()

"""What goes along when a session changes its daemon: what its ends have sent, what was decided."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.session import CarriageEvent
from pyforwarder.datapath.ebpf.abi import ABI_VERSION
from pyforwarder.datapath.splice.sessions import KernelSession
from pyforwarder.runtime.channel import Channel
from pyforwarder.runtime.counters import Counter
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.moving_facts import session_facts
from pyforwarder.worker.pair_receiver import _SESSIONS_S, _TAKEN_AT_ONCE, PairReceiver
from pyforwarder.worker.pair_sender import PairSender
from pyforwarder.worker.udp.eviction import Assurance
from pyforwarder.worker.udp.handover import SessionHandover
from tests.helpers.datagram_play import DatagramPlay
from tests.helpers.fake_kernel import FakeKernel

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.sessions import SpliceSessions
    from pyforwarder.worker.udp.session import Session

CONFIG: Final = (
    "listeners: [{{name: main, bind: '127.0.0.1:0', protocol: udp, amplification: 3, "
    "rules: [{{name: r, match: any, to: web}}]}}]\n"
    "upstreams: {{web: {{servers: ['{}']}}}}\nhandover: {{after_round_trips: 1}}\n"
)


class Succession:
    """A worker's UDP sessions, and the worker that gets them."""

    def __init__(self) -> None:
        self.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.server.bind(("127.0.0.1", 0))
        self.server.setblocking(False)
        config = CONFIG.format("{}:{}".format(*self.server.getsockname()))
        self.old = DatagramPlay(config)
        self.new = DatagramPlay(config)

    def move(
        self,
        before_all: Callable[[], object] = lambda: None,
        before_each: Callable[[], object] = lambda: None,
        **but: Any,
    ) -> None:
        """All sessions go; `but`: fields of their messages that are others. None: not said.

        `before_each` is called before one is sent, `before_all` when each was, and the word that
        these are all was not.
        """
        theirs, ours = Channel.pair()

        def send(message: dict[str, Any], fds: Any = (), **_: Any) -> None:
            if "sessions" in message:
                before_all()
            if "session" in message:
                before_each()
                # The same client speaks to the new worker's port, which is another one here.
                said = {**message["session"], "local_port": self.new.address[1], **but}
                message = {"session": {k: v for k, v in said.items() if v is not None}}
            theirs.send(message, fds)

        to_successor: Any = SimpleNamespace(send=send)
        worker: Any = SimpleNamespace(
            handover=SimpleNamespace(stop=lambda: None),
            loop=SimpleNamespace(defer=lambda *_: None, after=lambda *_: 0),
            clients={},
        )
        sender = PairSender(to_successor, worker, self.old.server, None, None)
        gets: Any = SimpleNamespace(loop=self.new.loop, log=self.new.server.log)
        PairReceiver(ours, gets, self.new.server, None)
        for port in self.new.server.ports.values():  # as those that begin to listen from here on
            self.new.loop.change(port.sock.fileno(), 0)
        sender._send_some()
        sender._send_some()
        self.new.run_until(lambda: not self.new.server.waits_for_sessions, "sessions")
        theirs.close()
        self.new.run_until(lambda: ours.fileno() < 0, "end of the channel")

    def client(self, said: bytes = b"0123456789", times: int = 1) -> socket.socket:
        client = self.old.client()
        for _ in range(times):
            client.send(said)
            assert self.old.receive(self.server)[0] == said
        return client

    def pass_time(self, seconds: float) -> None:
        """The clock of both is the one of the last play."""
        self.new.pass_time(seconds)
        self.old.settle()

    def close(self) -> None:
        self.old.close()
        self.new.close()
        self.server.close()


@pytest.fixture
def succession() -> Iterator[Succession]:
    made = Succession()
    yield made
    made.close()


# The same of a version that says nothing of assurance: what was carried tells them apart.
EARLIER: Final = {"standing": None, "heard_bytes": None, "told_bytes": None, "active_s": None}


@pytest.mark.parametrize("but", [{}, EARLIER], ids=["said", "by_records"])
def test_a_client_that_was_heard_once_is_a_new_one_at_the_next_daemon(
    succession: Succession, but: dict[str, Any]
) -> None:
    succession.client()
    succession.client(times=2)
    succession.pass_time(4.0)  # older than it takes to be known
    succession.move(**but)
    new = succession.new
    once, twice = new.server.sessions()
    assert (once.assurance, twice.assurance) == (Assurance.NEW, Assurance.BRIEF)
    assert new.server.eviction.first(None) is once
    new.pass_time(5.0)
    assert new.closed(CloseReason.IDLE) == 0
    for _ in range(8):
        new.pass_time(1.3)
    assert new.closed(CloseReason.IDLE) == 1
    assert new.server.sessions() == [twice]


def test_silence_before_an_upgrade_counts(succession: Succession) -> None:
    succession.client()
    succession.pass_time(8.0)
    succession.move()
    for _ in range(3):
        succession.new.pass_time(1.3)
    assert succession.new.closed(CloseReason.IDLE) == 1


@pytest.mark.parametrize("but", [{}, EARLIER], ids=["said", "by_records"])
def test_answers_to_a_client_heard_once_stay_bounded(
    succession: Succession, but: dict[str, Any]
) -> None:
    """Three times ten bytes in all, of which twenty were before."""
    old, new, server = succession.old, succession.new, succession.server
    succession.client()
    (session,) = old.server.sessions()
    assert session.source is not None
    source = (session.source.host, session.source.port)
    server.sendto(bytes(20), source)
    old.settle()
    succession.move(**but)
    for size in (11, 10):
        server.sendto(bytes(size), source)
    new.settle()
    assert new.counters[Counter.DATAGRAMS_HELD_BACK] == 1
    (session,) = new.server.sessions()
    assert session.told_bytes == 30


def test_a_client_that_has_gone_on_speaking_is_known_to_the_next_daemon(
    succession: Succession,
) -> None:
    client = succession.client()
    succession.pass_time(2.5)
    client.send(b"still here")
    succession.old.receive(succession.server)
    succession.move()
    (session,) = succession.new.server.sessions()
    assert session.assurance is Assurance.STEADY
    assert succession.new.server.eviction.first(None) is None


def test_the_line_of_a_session_that_was_taken_over_says_its_upstream(
    succession: Succession,
) -> None:
    succession.client()
    (session,) = succession.old.server.sessions()
    session.facts = (("sni", "a.test"), ("asked", "b.test:1"))
    succession.move()
    succession.new.server.flush_ids(None)
    (line,) = (line for line in succession.new.said() if line["event"] == "closed")
    assert (line["sni"], line["asked"], line["upstream"]) == ("a.test", "b.test:1", "web")


def give_to_kernel(session: Session, in_kernel: Any) -> None:
    session.carry(CarriageEvent.LEFT)  # whatever it is on the way to
    session.carry(CarriageEvent.RESUMED)
    session.in_kernel = in_kernel


def test_a_session_of_the_kernel_is_told_of_before_it_is_let_go(succession: Succession) -> None:
    succession.client(times=2)
    (session,) = succession.old.server.sessions()
    give_to_kernel(session, object())
    wanted = session_facts(session)
    sent: list[dict[str, Any]] = []
    to_successor: Any = SimpleNamespace(send=lambda message, *_, **__: sent.append(message))
    worker: Any = SimpleNamespace(
        handover=SimpleNamespace(stop=lambda: None),
        loop=SimpleNamespace(defer=lambda *_: None, after=lambda *_: 0),
        clients={},
    )
    PairSender(to_successor, worker, succession.old.server, None, None)._send_some()
    assert sent == [{"known": [wanted]}, {"sessions": "all"}]
    assert not succession.old.server.sessions()
    # Its record stays for the other daemon.
    succession.old.window.release(0)


def test_a_session_leaves_the_kernel_where_its_records_cannot_be_read(
    succession: Succession,
) -> None:
    """It is sent once it is known what the kernel has carried, as one that was copied."""
    old = succession.old
    kernel = FakeKernel(old.loop.defer)
    kernel.is_slow = True
    kernel.sent_on = [(30, 3), (200, 2)]
    old.server.handover = SessionHandover(old.server, cast("SpliceSessions", kernel))
    succession.client(times=2)
    (session,) = old.server.sessions()
    give_to_kernel(session, KernelSession(0, session.id, session.slot))
    kernel.last = [old.loop.now_s + 1.0, 0.0]
    sent: list[dict[str, Any]] = []
    to_successor: Any = SimpleNamespace(send=lambda message, *_, **__: sent.append(message))
    worker: Any = SimpleNamespace(
        handover=SimpleNamespace(stop=lambda: None),
        loop=SimpleNamespace(defer=lambda *_: None, after=lambda *_: 0),
        clients={},
    )
    sender = PairSender(to_successor, worker, old.server, None, None, keeps_spliced=True)
    for _ in range(3):
        assert sender._send_some()
    assert sent == []
    assert kernel.closed == [1]
    assert sender.spliced_left() == 1
    (said,) = kernel.uncounted
    said()
    for _ in range(2):
        sender._send_some()
    (one, last) = sent
    assert one["session"]["shown"]["carried"] == [[20 + 30, 2 + 3], [200, 2]]
    assert one["session"]["active_s"] == kernel.last[0]
    assert last == {"sessions": "all"}
    assert sender.spliced_left() == 0
    assert not old.server.sessions()


@pytest.mark.parametrize("layout", [ABI_VERSION, ABI_VERSION + 1])
def test_what_was_shown_of_a_session_comes_from_any_layout(
    succession: Succession, layout: int
) -> None:
    succession.client(times=3)
    other: Any = {} if layout == ABI_VERSION else {"layout": layout, "record": "ff" * 600}
    succession.move(**other)
    (session,) = succession.new.server.sessions()
    assert (session.up_bytes, session.up_packets) == (30, 3)
    assert session.route.rule.name == "r"
    assert not succession.new.said()


def test_many_sessions_of_the_kernel_come_in_few_messages(succession: Succession) -> None:
    theirs, ours = Channel.pair()
    new = succession.new
    gets: Any = SimpleNamespace(loop=new.loop, log=new.server.log)
    PairReceiver(ours, gets, new.server, None)
    theirs.send({"known": [{"id": number, "standing": 1} for number in range(1, 33)]})
    theirs.send({"known": [{"id": number, "standing": 1} for number in range(40, 80)]})  # too many
    theirs.close()
    new.run_until(lambda: ours.fileno() < 0, "end of the channel")
    assert list(new.server.adoption._told) == list(range(1, 33))
    assert new.said()[0]["event"] == "internal_error"


def test_what_servers_say_goes_on_before_all_sessions_have_come(succession: Succession) -> None:
    """And more come in one turn than pairs would: clients that speak then wait for the last."""
    old, new = succession.old, succession.new
    clients = []
    for _ in range(2 * _TAKEN_AT_ONCE):
        client = old.client()
        client.send(b"question")
        _, source = old.receive(succession.server)
        clients.append((client, source))

    def before_all() -> None:
        turns = 0
        while len(new.server.sessions()) < len(clients):
            new.loop.run_once(0)
            turns += 1
        assert turns < len(clients) / _TAKEN_AT_ONCE + 1
        for client, source in clients:
            client.connect(new.address)
            succession.server.sendto(b"answer", source)
            assert new.receive(client)[0] == b"answer"
        assert new.server.waits_for_sessions

    succession.move(before_all)


def test_a_session_that_earns_the_kernel_early_has_no_other_client_heard(
    succession: Succession,
) -> None:
    """Whose session is still to come, and would have two."""
    old, new, server = succession.old, succession.new, succession.server
    kernel = FakeKernel(new.loop.defer)
    new.server.handover = SessionHandover(new.server, cast("SpliceSessions", kernel))
    new.server.handover.settle(splice=True)
    sources = []
    for _ in range(2):
        client = old.client()
        for _ in range(2):
            client.send(b"question")
            _, source = old.receive(server)
            server.sendto(b"answer", source)
            assert old.receive(client)[0] == b"answer"
        sources.append(source)
        client.connect(new.address)
        client.send(b"waits")
    moved = 0

    def before_each() -> None:
        nonlocal moved
        if moved:
            new.run_until(lambda: len(new.server.sessions()) == moved, "the first")
            for _ in range(5):
                server.sendto(b"more", sources[0])
                new.settle()
            assert len(new.server.sessions()) == moved
        moved += 1

    succession.move(before_each=before_each)
    assert moved == 2
    assert not old.said()
    heard = [new.receive(server) for _ in range(2)]
    assert [(data, source) for data, source in heard] == [(b"waits", one) for one in sources]
    assert len(new.server.sessions()) == 2
    server.sendto(b"more", sources[0])
    new.run_until(lambda: kernel.opened, "handed over")


def test_clients_are_heard_at_last_although_the_last_session_does_not_come(
    succession: Succession,
) -> None:
    new = succession.new
    succession.client()
    waited = []

    def before_all() -> None:
        new.settle()
        waited.append(new.server.waits_for_sessions)
        new.pass_time(scaled_s(_SESSIONS_S) + 1)
        waited.append(new.server.waits_for_sessions)

    succession.move(before_all)
    assert waited == [True, False]


def test_a_session_that_comes_after_that_goes_on_all_the_same(succession: Succession) -> None:
    old, new, server = succession.old, succession.new, succession.server
    client = old.client()
    client.send(b"question")
    _, source = old.receive(server)
    succession.move(before_each=lambda: new.pass_time(scaled_s(_SESSIONS_S) + 1))
    assert len(new.server.sessions()) == 1
    client.connect(new.address)
    client.send(b"more")
    assert new.receive(server) == (b"more", source)
    server.sendto(b"answer", source)
    assert new.receive(client)[0] == b"answer"

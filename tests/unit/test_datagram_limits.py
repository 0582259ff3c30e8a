"""What UDP clients may use of the host: rooms, bytes, seconds, and answers to others' addresses."""

from __future__ import annotations

import mmap
import socket
import threading
from collections.abc import Iterator

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime import askers, resolver
from pyforwarder.runtime.counters import LIMITED_INDEX, Counter, ListenerCounter
from pyforwarder.runtime.fleet_counts import OtherMachines
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.limits_memory import OTHERS_BYTES
from pyforwarder.worker.udp import copying
from tests.helpers.datagram_play import DatagramPlay
from tests.helpers.instruction import instruction

CONFIG = """
listeners: [{{name: main, bind: "127.0.0.1:0", protocol: udp, {listener}
             rules: [{{name: r, match: any, to: "{to}"}}]}}]
{more}
"""


class Scene:
    """A play with one server that answers nothing by itself."""

    def __init__(self, listener: str = "", more: str = "", *, most_sessions: int = 1000) -> None:
        self.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.server.bind(("127.0.0.1", 0))
        self.server.setblocking(False)
        to = "{}:{}".format(*self.server.getsockname())
        config = CONFIG.format(listener=listener, to=to, more=more)
        self.play = DatagramPlay(config, most_sessions=most_sessions)

    def hear(self, client: socket.socket, said: bytes = b"x") -> tuple[str, int]:
        """One datagram of a client as the server gets it; where from."""
        client.send(said)
        data, source = self.play.receive(self.server)
        assert data == said
        return source

    def steady(self) -> socket.socket:
        """A client that has gone on speaking."""
        client = self.play.client()
        self.hear(client)
        self.play.pass_time(2.5)
        self.hear(client, b"still here")
        return client


@pytest.fixture
def scenes() -> Iterator[list[Scene]]:
    made: list[Scene] = []
    yield made
    for scene in made:
        scene.play.close()
        scene.server.close()


def limited(play: DatagramPlay, limit: Limit) -> int:
    return int(play.counters[LIMITED_INDEX[limit]])


# Room


@pytest.mark.parametrize(
    ("listener", "more"),
    [
        ("", "limits: {sessions: 5}"),
        ("", "limits: {pairs: 5}"),
        ("limits: {sessions: 5},", ""),
        ("limits: {pairs: 5},", ""),
        ("", "limits: {sessions_per_client: 5}"),
        ("", "limits: {pairs_per_client: 5}"),
        ("limits: {pairs_per_client: 5},", ""),
    ],
)
def test_clients_heard_once_make_room_and_known_ones_do_not(
    scenes: list[Scene], listener: str, more: str
) -> None:
    scene = Scene(listener, more)
    scenes.append(scene)
    play = scene.play
    known = [scene.steady() for _ in range(3)]
    for _ in range(40):  # each from an address of its own, as made-up ones are
        scene.hear(play.client())
    assert play.closed(CloseReason.EVICTED) == 40 - 2
    assert play.closed(CloseReason.BUSY) == 0
    assert play.limits.sessions == 5
    for client in known:
        scene.hear(client, b"as before")
    assert play.count(ListenerCounter.ACCEPTED) == 43


def test_client_with_two_quick_datagrams_goes_after_those_with_one(scenes: list[Scene]) -> None:
    scene = Scene(more="limits: {sessions: 3}")
    scenes.append(scene)
    play = scene.play
    brief = play.client()
    scene.hear(brief)
    source = scene.hear(brief, b"y")
    once = [play.client() for _ in range(2)]
    sources = [scene.hear(client) for client in once]
    scene.hear(play.client())
    assert scene.hear(brief, b"z") == source  # the same session
    assert scene.hear(once[1], b"z") == sources[1]
    assert play.closed(CloseReason.EVICTED) == 1
    assert scene.hear(once[0]) != sources[0]  # the oldest of the rest was another's room


def test_where_all_are_known_the_next_is_refused_and_counted(scenes: list[Scene]) -> None:
    scene = Scene(more="limits: {sessions: 2}")
    scenes.append(scene)
    play = scene.play
    for _ in range(2):
        scene.steady()
    play.client().send(b"x")
    play.run_until(lambda: play.closed(CloseReason.BUSY), "refusal")
    assert limited(play, Limit.SESSIONS) == 1
    assert play.closed(CloseReason.EVICTED) == 0


def test_descriptors_are_a_limit_of_their_own(scenes: list[Scene]) -> None:
    scene = Scene(most_sessions=2)
    scenes.append(scene)
    play = scene.play
    for _ in range(2):
        scene.steady()
    play.client().send(b"x")
    play.run_until(lambda: play.closed(CloseReason.BUSY), "refusal")
    assert limited(play, Limit.DESCRIPTORS) == 1


class TwoListeners(Scene):
    """`main` and `here`, to one server; at `here` a client may have one session."""

    def __init__(self, of_all: int) -> None:
        super().__init__()
        self.play.close()
        to = "{}:{}".format(*self.server.getsockname())
        rules = f"rules: [{{name: r, match: any, to: '{to}'}}]"
        self.play = DatagramPlay(
            f"limits: {{sessions_per_client: {of_all}}}\n"
            "listeners:\n"
            f"- {{name: main, bind: '127.0.0.1:0', protocol: udp, {rules}}}\n"
            "- {name: here, bind: '127.0.0.1:0', protocol: udp,"
            f" limits: {{sessions_per_client: 1}}, {rules}}}\n"
        )
        self.here = self.play.listen("here")


@pytest.mark.parametrize("of_all", [2, 4])
def test_session_makes_room_where_its_client_has_too_many(scenes: list[Scene], of_all: int) -> None:
    scene = TwoListeners(of_all)
    scenes.append(scene)
    play = scene.play
    elsewhere = play.client()
    source = scene.hear(elsewhere)
    scene.hear(play.client(to=scene.here))
    scene.hear(play.client(to=scene.here))
    assert play.closed(CloseReason.EVICTED) == 1
    assert scene.hear(elsewhere) == source  # the older one, at a listener with room, goes on
    assert play.closed(CloseReason.BUSY) == 0


def test_no_session_ends_for_one_that_is_refused_all_the_same(scenes: list[Scene]) -> None:
    scene = TwoListeners(2)
    scenes.append(scene)
    play = scene.play
    known = play.client(to=scene.here)
    scene.hear(known)
    play.pass_time(2.5)
    scene.hear(known)
    scene.hear(play.client())
    play.client(to=scene.here).send(b"x")
    play.run_until(lambda: play.closed(CloseReason.BUSY), "refusal")
    assert play.closed(CloseReason.EVICTED) == 0
    assert play.limits.sessions == 2


@pytest.mark.parametrize(("others", "refused"), [(2, False), (3, True)])
def test_no_session_ends_for_one_that_the_fleet_has_no_room_for(
    scenes: list[Scene], *, others: int, refused: bool
) -> None:
    more = (
        "fleet: {endpoints: ['http://127.0.0.1:1'], name: edge, limits: {scope: fleet}}\n"
        "limits: {sessions_per_client: 4}"
    )
    scene = Scene(more=more)
    scenes.append(scene)
    play = scene.play
    play.loop.now_s = 1000.0
    (bounds,) = play.state.scopes
    memory = mmap.mmap(-1, OTHERS_BYTES)
    play.limits._others_memory = memoryview(memory).cast("Q")

    def opens(port: int) -> None:
        key = ("192.0.2.1", port, b"", 0)
        play.server.deciding.open(play.server.ports["main"], key, b"x")

    for port in (1, 2):
        opens(port)
    shown = OtherMachines(memory)
    shown.write({play.limits.key("192.0.2.1", bounds): others}, 2)
    shown.hold_until(1005.0)
    opens(3)
    assert play.closed(CloseReason.EVICTED) == (not refused)
    assert play.closed(CloseReason.BUSY) == refused
    assert limited(play, Limit.SESSIONS_PER_CLIENT) == refused
    assert play.limits.sessions == 2


def test_session_that_others_made_room_for_uses_the_rate_up_once(scenes: list[Scene]) -> None:
    limits = "limits: {sessions_per_client: 1},"
    scene = Scene(limits, "limits: {new_per_second_per_client: 3}")
    scenes.append(scene)
    play = scene.play
    play.loop.now_s = 1000.0
    for port in (1, 2, 3):
        key = ("192.0.2.1", port, b"", 0)
        play.server.deciding.open(play.server.ports["main"], key, b"x")
    assert play.closed(CloseReason.EVICTED) == 2
    assert play.closed(CloseReason.BUSY) == 0
    play.server.deciding.open(play.server.ports["main"], ("192.0.2.1", 4, b"", 0), b"x")
    assert limited(play, Limit.NEW_PER_SECOND_PER_CLIENT) == 1


def test_sessions_are_not_counted_as_pairs_and_use_up_no_rate_of_tcp(scenes: list[Scene]) -> None:
    scene = Scene(more="limits: {pairs: 1, new_per_second: 1, pairs_per_client: 1}")
    scenes.append(scene)
    play = scene.play
    scene.hear(play.client())
    now_s = play.loop.now_s
    assert play.limits.pairs == 0
    assert play.limits.admit_this_second(1, now_s)
    bounds = play.generation.listeners["main"].scopes
    assert all(scope.is_udp for scope in bounds)


def test_place_in_the_table_is_kept_for_tcp(scenes: list[Scene]) -> None:
    scene = Scene()
    scenes.append(scene)
    play = scene.play
    play.server.records._most_shown = 3
    clients = [play.client() for _ in range(5)]
    for client in clients:
        scene.hear(client)
    assert len(play.window._free) == 64 - 3
    play.server.flush_ids([1])
    scene.hear(clients[4])  # shown once there is room
    assert len(play.window._free) == 64 - 3


# Seconds


def test_session_of_a_client_heard_once_lives_seconds(scenes: list[Scene]) -> None:
    scene = Scene()
    scenes.append(scene)
    play = scene.play
    scene.hear(play.client())
    play.pass_time(9)
    assert play.closed(CloseReason.IDLE) == 0
    play.pass_time(2)
    assert play.closed(CloseReason.IDLE) == 1


def test_session_of_a_client_heard_twice_lives_two_minutes(scenes: list[Scene]) -> None:
    scene = Scene()
    scenes.append(scene)
    play = scene.play
    client = play.client()
    scene.hear(client)
    scene.hear(client)
    play.pass_time(100)
    assert play.closed(CloseReason.IDLE) == 0
    play.pass_time(50)
    assert play.closed(CloseReason.IDLE) == 1


# Bytes


@pytest.fixture
def no_answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Names take until the event."""
    go = threading.Event()
    monkeypatch.setattr(askers, "lookup", lambda _name: ["127.0.0.1"] if go.wait(20) else [])
    monkeypatch.setattr(resolver, "cares_knows_all_sources", lambda: False)
    yield go
    go.set()


def named(scenes: list[Scene]) -> DatagramPlay:
    scene = Scene()
    scene.play.close()
    scene.play = DatagramPlay(
        "listeners: [{name: main, bind: '127.0.0.1:0', protocol: udp,"
        " rules: [{name: r, match: instruction, allow: [loopback]}]}]"
    )
    scenes.append(scene)
    return scene.play


def test_bytes_that_wait_for_a_name_are_bounded_by_session(
    scenes: list[Scene], no_answer: threading.Event
) -> None:
    play = named(scenes)
    client = play.client()
    client.send(instruction("slow.test:80"))
    for _ in range(15):
        client.send(bytes(30_000))
        play.settle()
    assert play.server.copying._waiting_bytes == 60_000
    assert play.counters[Counter.DATAGRAMS_LOST] == 13
    no_answer.set()


def test_bytes_that_wait_for_names_are_bounded_in_all(
    scenes: list[Scene], no_answer: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "MOST_WAITING_BYTES_OF_ALL", 200_000)
    play = named(scenes)
    for _ in range(8):
        client = play.client()
        client.send(instruction("slow.test:80"))
        play.settle()
        client.send(bytes(50_000))
        play.settle()
    assert play.server.copying._waiting_bytes == 200_000
    assert play.counters[Counter.DATAGRAMS_LOST] == 4
    # A first datagram of an ordinary size has its place all the same.
    play.client().send(instruction("slow.test:80") + bytes(1000))
    play.settle()
    assert play.server.copying._waiting_bytes == 201_000
    play.server.flush_ids(None)
    assert play.server.copying._waiting_bytes == 0
    no_answer.set()


# Answers


def test_answers_to_a_client_heard_once_are_bounded(scenes: list[Scene]) -> None:
    scene = Scene("amplification: 3,")
    scenes.append(scene)
    play = scene.play
    client = play.client()
    source = scene.hear(client, b"0123456789")
    for size in (20, 11, 10):
        scene.server.sendto(bytes(size), source)
    play.settle()
    assert [len(play.receive(client)[0]) for _ in range(2)] == [20, 10]
    assert play.counters[Counter.DATAGRAMS_HELD_BACK] == 1
    assert scene.hear(client, b"") == source  # the client that speaks again is there
    scene.server.sendto(bytes(1000), source)
    assert len(play.receive(client)[0]) == 1000


def test_empty_datagram_gets_no_bytes(scenes: list[Scene]) -> None:
    scene = Scene("amplification: 3,")
    scenes.append(scene)
    play = scene.play
    client = play.client()
    source = scene.hear(client, b"")
    scene.server.sendto(b"x", source)
    play.settle()
    assert play.counters[Counter.DATAGRAMS_HELD_BACK] == 1
    scene.server.sendto(b"", source)
    assert play.receive(client)[0] == b""


def test_answers_are_not_bounded_unless_asked_for(scenes: list[Scene]) -> None:
    scene = Scene()
    scenes.append(scene)
    client = scene.play.client()
    source = scene.hear(client)
    scene.server.sendto(bytes(1200), source)
    assert len(scene.play.receive(client)[0]) == 1200

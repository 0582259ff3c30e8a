"""`proxy_protocol: {accept: optional}`: the trusted may send a header, others have none."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import CLOSED_INDEX
from tests.helpers.stream_play import Play

CLIENT = Address("192.0.2.7", 4711)
SERVICE = Address("198.51.100.9", 443)
HEADERS = {
    "v1": proxy_protocol.build_v1(CLIENT, SERVICE),
    "v2": proxy_protocol.build_v2(CLIENT, SERVICE, []),
}


class Scene:
    """A play whose rules connect everybody to one server."""

    def __init__(self, trusted: str, rules: str, first_packet: str) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        to = "{}:{}".format(*self.server.getsockname())
        self.play = Play(
            'listeners:\n- {name: main, bind: "127.0.0.1:0", '
            f"proxy_protocol: {{accept: optional, trusted: [{trusted}]}}, "
            f"first_packet: {first_packet}, rules: [{rules.replace('SERVER', to)}]}}\n"
        )

    def peer(self) -> Address | None:
        """The address of the one client."""
        (client,) = self.play.server.clients.values()
        return client.peer


MakeScene = Callable[..., Scene]
SAYS_SOMETHING = '{match: {regex: "(?s)^.{8}"}, to: "SERVER"}'


@pytest.fixture
def scene() -> Iterator[MakeScene]:
    made: list[Scene] = []

    def make(
        trusted: str = "127.0.0.1", rules: str = SAYS_SOMETHING, first_packet: str = "{timeout: 5s}"
    ) -> Scene:
        made.append(Scene(trusted, rules, first_packet))
        return made[-1]

    yield make
    for each in made:
        each.play.close()
        each.server.close()


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("cut", [0, 1, 5, 11, 14])
def test_trusted_proxy_may_send_a_header(scene: MakeScene, header: bytes, cut: int) -> None:
    here = scene()
    client = here.play.dial()
    sent = header + b"its bytes"
    for piece in filter(None, (sent[:cut], sent[cut:])):
        client.sendall(piece)
        here.play.run_until(
            lambda: sum(c.up.read_bytes for c in here.play.server.clients.values()) >= cut, "read"
        )
    server = here.play.accept(here.server)
    assert here.play.read(server, 9) == b"its bytes"
    assert here.peer() == CLIENT


@pytest.mark.parametrize("data", [b"plain words", b"PROXIES are not meant", b"\r\n\r\nwithout"])
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_trusted_peer_may_come_without_one(scene: MakeScene, data: bytes, cut: int) -> None:
    here = scene()
    client = here.play.dial()
    client.sendall(data[:cut])
    here.play.run_until(lambda: here.play.server.clients, "client")
    client.sendall(data[cut:])
    server = here.play.accept(here.server)
    assert here.play.read(server, len(data)) == data
    assert here.peer() == Address(*client.getsockname())


def test_what_could_have_become_a_header_reaches_the_server_at_the_end(scene: MakeScene) -> None:
    here = scene(rules='{match: {regex: "^P"}, to: "SERVER"}')
    client = here.play.dial()
    client.sendall(b"PROX")
    client.shutdown(socket.SHUT_WR)
    server = here.play.accept(here.server)
    assert here.play.read_end(server) == (b"PROX", "eof")


@pytest.mark.parametrize("said", [b"", b"PROX"])
def test_silence_is_no_missing_header(scene: MakeScene, said: bytes) -> None:
    rule = '{match: {regex: "^P"}, to: "SERVER"}' if said else '{match: silence, to: "SERVER"}'
    here = scene(rules=rule, first_packet="{timeout: 50ms}")
    client = here.play.dial()
    client.sendall(said)
    server = here.play.accept(here.server)
    if said:
        assert here.play.read(server, len(said)) == said


def test_header_that_breaks_is_refused(scene: MakeScene) -> None:
    here = scene()
    client = here.play.dial()
    client.sendall(b"PROXY nonsense\r\n")
    assert here.play.read_end(client) == (b"", "reset")
    assert here.play.counters[CLOSED_INDEX[CloseReason.MALFORMED]] == 1


def test_header_that_has_begun_must_end_in_time(scene: MakeScene) -> None:
    here = scene(first_packet="{timeout: 50ms}")
    client = here.play.dial()
    client.sendall(b"PROXY TCP4 192.0.2.7")
    assert here.play.read_end(client) == (b"", "reset")
    assert here.play.counters[CLOSED_INDEX[CloseReason.TIMEOUT]] == 1


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_header_of_a_stranger_is_no_header(scene: MakeScene, header: bytes) -> None:
    here = scene(trusted="10.0.0.1")
    client = here.play.dial()
    client.sendall(header)
    server = here.play.accept(here.server)
    assert here.play.read(server, len(header)) == header
    assert here.peer() == Address(*client.getsockname())


def test_stranger_need_not_speak_first(scene: MakeScene) -> None:
    here = scene(trusted="10.0.0.1", rules='{match: any, to: "SERVER"}')
    client = here.play.dial()
    here.play.accept(here.server).sendall(b"hello")
    assert here.play.read(client, 5) == b"hello"


def test_first_packet_has_room_for_what_was_no_header(scene: MakeScene) -> None:
    here = scene(rules='{match: {regex: "^PRO"}, to: "SERVER"}', first_packet="{max_bytes: 3}")
    client = here.play.dial()
    client.sendall(b"PROX")
    here.play.run_until(lambda: here.play.server.clients, "client")
    client.sendall(b"imity")
    server = here.play.accept(here.server)
    assert here.play.read(server, 9) == b"PROXimity"


def test_end_that_decides_reaches_the_server(scene: MakeScene) -> None:
    here = scene(
        trusted="10.0.0.1", rules='{match: tls, to: "10.0.0.1:1"}, {match: any, to: "SERVER"}'
    )
    client = here.play.dial()
    client.sendall(b"\x16")
    here.play.run_until(lambda: here.play.server.clients, "client")
    client.shutdown(socket.SHUT_WR)
    assert here.play.read_end(here.play.accept(here.server)) == (b"\x16", "eof")

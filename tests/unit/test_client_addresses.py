"""UDP sessions from their client's own address: what the supervisor is asked, and how often."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.worker.udp import client_addresses
from pyforwarder.worker.udp.client_addresses import FIRST_NUMBER, ClientAddresses
from tests.helpers.datagram_play import DatagramPlay

CLIENT = "127.0.0.5"


class Played:
    """A client with an address of its own, and a server."""

    def __init__(self, *, to: str = "") -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)
        at = to or "{}:{}".format(*self.sock.getsockname())
        self.play = DatagramPlay(
            "listeners: [{name: main, bind: '127.0.0.1:0', protocol: udp,"
            " rules: [{match: any, to: web}]}]\n"
            f"upstreams: {{web: {{servers: ['{at}'], transparent: true, connect_timeout: 3s}}}}\n"
        )
        self.client = self.play.client(CLIENT)

    def say(self, data: bytes) -> None:
        self.client.send(data)
        self.play.settle()

    def answer(self, *, done: bool) -> None:
        """What was asked first is answered."""
        what, fds, number = self.play.asked.pop(0)
        assert (what, len(fds)) == ("transparent", 1)
        self.play.server.granted(number, done=done)
        self.play.settle()


@pytest.fixture
def played() -> Iterator[Played]:
    made = Played()
    yield made
    made.play.close()
    made.sock.close()


def test_what_a_client_sends_meanwhile_waits_and_goes_on_in_its_order(played: Played) -> None:
    for data in (b"1", b"2", b""):
        played.say(data)
    assert len(played.play.asked) == 1
    played.answer(done=True)
    said = [played.play.receive(played.sock) for _ in range(3)]
    assert [data for data, _ in said] == [b"1", b"2", b""]
    assert {source[0] for _, source in said} == {CLIENT}
    played.sock.sendto(b"down", said[0][1])
    assert played.play.receive(played.client)[0] == b"down"
    played.say(b"3")
    assert played.play.receive(played.sock) == (b"3", said[0][1])
    assert played.play.asked == []


def test_a_client_whose_address_nobody_may_have_gets_no_session(played: Played) -> None:
    played.say(b"1")
    played.answer(done=False)
    assert played.play.closed(CloseReason.UNREACHABLE) == 1
    played.say(b"2")
    assert len(played.play.asked) == 1  # the next datagram asks again
    played.answer(done=True)
    assert played.play.receive(played.sock)[0] == b"2"


def test_an_answer_that_comes_too_late_does_nothing(played: Played) -> None:
    played.say(b"1")
    played.play.pass_time(4.0)
    assert played.play.closed(CloseReason.TIMEOUT) == 1
    played.answer(done=True)
    played.say(b"2")
    played.answer(done=True)
    assert played.play.receive(played.sock)[0] == b"2"


def test_an_answer_for_a_session_that_ends_before_its_turn_does_nothing(played: Played) -> None:
    played.say(b"1")
    _, _, number = played.play.asked.pop()
    played.play.server.granted(number, done=True)
    played.play.server.flush_ids(None)
    played.play.settle()
    assert played.play.closed(CloseReason.FLUSHED) == 1
    with pytest.raises(BlockingIOError):
        played.sock.recv(10)


def test_no_server_is_blamed_for_an_address_that_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    played = Played(to="192.0.2.1:9")  # not from an address of loopback
    (balancer,) = played.play.generation.balancers.values()
    monkeypatch.setattr(balancer, "failed", lambda *_: pytest.fail("blamed"))
    played.say(b"1")
    played.answer(done=True)
    assert played.play.server.sessions() == []
    played.play.close()
    played.sock.close()


def granted(sock: socket.socket, _done: bool) -> None:
    sock.close()


def ask(addresses: ClientAddresses, now_s: float) -> int:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    number = addresses.ask_for(sock, granted, now_s=now_s)
    if not number:
        sock.close()
    return number


def test_made_up_addresses_have_the_supervisor_asked_so_often_and_not_more() -> None:
    asked: list[int] = []
    addresses = ClientAddresses(lambda _what, _fds, number: asked.append(number))
    most = client_addresses._MOST_UNANSWERED
    for number in [ask(addresses, 1.0) for _ in range(most)]:
        addresses.give_up(number)  # their sessions make room for others
    assert len(asked) == most
    assert ask(addresses, 2.0) == 0  # the supervisor has answered none
    for number in asked:
        addresses.answered(number, done=True)
    assert ask(addresses, 1.0) == 0  # enough for this moment
    assert ask(addresses, 2.0) > FIRST_NUMBER
    addresses.answered(asked[-1], done=True)


def test_an_answer_to_what_nobody_has_asked_does_nothing() -> None:
    addresses = ClientAddresses(lambda *_: None)
    addresses.answered(FIRST_NUMBER + 1, done=True)
    addresses.give_up(0)

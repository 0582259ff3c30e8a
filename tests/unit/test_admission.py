"""Limits of a listener and of clients, as connections meet them."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable, Iterator

import pytest

from pyforwarder.config import parse_config
from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import Address
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import LIMITED_INDEX, ListenerCounter
from pyforwarder.runtime.limits import Limit
from pyforwarder.worker.room import express_slots, places_for, room_for, slots_of
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.stream_play import Play

LISTENER = """
listeners:
  - {{name: main, bind: "127.0.0.1:0", {listener}
     rules: [{{name: r, match: instruction, allow: [loopback]}}]}}
{more}
"""
PROXY = "proxy_protocol: {accept: true, trusted: [127.0.0.1]},"


class Scene:
    """A play and a server for it."""

    def __init__(self, listener: str = "", more: str = "") -> None:
        self.server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.server.setblocking(False)
        self.text = "{}:{}".format(*self.server.getsockname())
        self.play = Play(LISTENER.format(listener=listener, more=more))

    def comes(self, source: str | None = None) -> socket.socket:
        """A client that asks for the server; from there, says a proxy."""
        client = self.play.dial()
        if source is not None:
            to = Address("2001:db8::ffff" if ":" in source else "192.0.2.255", 443)
            client.sendall(proxy_protocol.build_v2(Address(source, 4000), to, []))
        client.sendall(instruction(self.text))
        return client

    def is_served(self, source: str | None = None) -> bool:
        client = self.comes(source)
        start = self.play.read(client, 2)
        if start == ACK[:2]:
            assert self.play.read(client, len(ACK) - 2) == ACK[2:]
            self.play.accept(self.server)
            return True
        assert start + self.play.read_end(client)[0] == refusal("busy")
        return False

    def limited(self) -> dict[str, int]:
        counts = {limit.value: int(self.play.counters[at]) for limit, at in LIMITED_INDEX.items()}
        return {name: count for name, count in counts.items() if count}


MakeScene = Callable[..., Scene]


@pytest.fixture
def scene() -> Iterator[MakeScene]:
    made: list[Scene] = []

    def make(listener: str = "", more: str = "") -> Scene:
        made.append(Scene(listener, more))
        return made[-1]

    yield make
    for each in made:
        each.play.close()
        each.server.close()


def test_listener_has_as_many_pairs_as_it_may(scene: MakeScene) -> None:
    here = scene("limits: {pairs: 2},")
    assert [here.is_served() for _ in range(3)] == [True, True, False]
    assert here.limited() == {"pairs": 1}
    assert here.play.counters[here.play.state.counter + ListenerCounter.REFUSED] == 1
    here.play.server.flush_ids([1])
    assert here.is_served()


def test_limits_of_all_and_of_the_listener_both_hold(scene: MakeScene) -> None:
    wide = scene("limits: {pairs: 5, pairs_per_client: 5},", "limits: {pairs_per_client: 1}")
    assert [wide.is_served() for _ in range(2)] == [True, False]
    narrow = scene("limits: {pairs_per_client: 1},", "limits: {pairs_per_client: 5}")
    assert [narrow.is_served() for _ in range(2)] == [True, False]
    for each in (wide, narrow):
        assert each.limited() == {"pairs_per_client": 1}


def test_network_of_an_ipv6_client_counts_as_one_behind_a_proxy_too(scene: MakeScene) -> None:
    here = scene(PROXY, "limits: {pairs_per_client: 2}")
    assert [here.is_served(f"2001:db8:0:1:{n}::1") for n in range(1, 4)] == [True, True, False]
    assert here.is_served("2001:db8:0:2::1")
    assert [here.is_served(f"192.0.2.{n}") for n in range(1, 5)] == [True] * 4
    assert here.limited() == {"pairs_per_client": 1}


def test_prefix_of_the_listener_goes_before_that_of_all(scene: MakeScene) -> None:
    here = scene(
        f"{PROXY} limits: {{pairs_per_client: 1, client_prefix: {{ipv4: 24}}}},",
        "limits: {client_prefix: {ipv4: 32}}",
    )
    assert [here.is_served(f"192.0.2.{n}") for n in (1, 2)] == [True, False]
    assert here.is_served("192.0.3.1")


def test_client_that_comes_too_often_uses_up_nothing_of_others(scene: MakeScene) -> None:
    here = scene(PROXY, "limits: {new_per_second_per_client: 2}")
    assert [here.is_served("192.0.2.1") for _ in range(4)] == [True, True, False, False]
    assert here.is_served("192.0.2.2")
    assert here.limited() == {"new_per_second_per_client": 2}


def test_everything_is_given_back(scene: MakeScene) -> None:
    here = scene("limits: {pairs: 3, pairs_per_client: 3},", "limits: {pairs_per_client: 3}")
    for _ in range(4):
        assert [here.is_served() for _ in range(4)] == [True, True, True, False]
        here.play.server.reset_all(CloseReason.SHUTDOWN)
        here.play.run_until(lambda: not here.play.server.clients, "end")


def test_no_descriptor_left_is_a_limit_that_is_counted(scene: MakeScene) -> None:
    here = scene()
    here.play.server.most_clients = 1
    assert here.is_served()
    assert here.play.read_end(here.comes()) == (b"", "reset")
    assert here.limited() == {Limit.DESCRIPTORS.value: 1}


# Descriptors


UDP = "listeners: [{bind: '127.0.0.1:1', protocol: udp, rules: [{match: any, to: '127.0.0.1:2'}]}]"


@pytest.mark.parametrize("files", [256, 1024, 20_000, 1_000_000])
@pytest.mark.parametrize("text", ["", UDP])
def test_tcp_and_udp_have_descriptors_of_their_own(
    monkeypatch: pytest.MonkeyPatch, files: int, text: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (files, files))
    config = parse_config(text, source="x")
    room = room_for(config, 0)
    assert 2 * room.clients + room.sessions < files
    assert room.clients >= 1
    assert bool(room.sessions) == bool(text)
    if files == 1_000_000:
        assert room.clients > config.limits.pairs
        assert room.sessions == (config.limits.most_sessions if text else 0)
    assert slots_of(config, 4) >= room.clients


EXPRESS = """
datapath: express
express: {ports: 16384}
listeners: [{bind: '127.0.0.1:1', rules: [{match: any, to: '127.0.0.1:2'}]}]
"""


@pytest.mark.parametrize("files", [256, 1024, 20_000, 1_000_000])
@pytest.mark.parametrize("workers", [1, 2, 7])
def test_pairs_that_the_kernel_has_opened_have_descriptors_too(
    monkeypatch: pytest.MonkeyPatch, files: int, workers: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (files, files))
    config = parse_config(EXPRESS, source="x")
    places = places_for(config, workers)
    share = express_slots(places, workers)
    room = room_for(config, share)
    if files > 256:  # too few even without
        assert places > 0
        assert 2 * (room.clients + share) + room.sessions <= files
    else:
        assert places == 0
    assert places <= files // 2
    assert (places == 16384) is (files == 1_000_000)
    assert slots_of(config, workers) >= room.clients + share
    assert places_for(parse_config("", source="x"), workers) == 0

"""Sessions whose first datagram does not decide: what is held, for how long, and what follows."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from pyforwarder.core.first_packet.datagrams import MOST_DATAGRAMS
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import Counter, ListenerCounter
from pyforwarder.worker.udp import undecided
from tests.helpers.datagram_play import DatagramPlay
from tests.helpers.quic import crypto, hello, initial, scrambled, split_hello, zero_rtt

FIRST, SECOND = split_hello(hello(size=1800), 1000)


def config(*rules: str, more: str = "") -> str:
    return (
        "listeners: [{name: main, bind: '127.0.0.1:0', protocol: udp,"
        f" rules: [{', '.join(rules)}]{more}}}]\n"
    )


class Scene:
    """A rule for names below example.com, and perhaps one for all the rest; a server each."""

    def __init__(self, *, rest: bool = True, more: str = "") -> None:
        self._rest = rest
        self.play = DatagramPlay(config("{match: any, reject: close}"))
        self.named, self.named_text = self.play.upstream()
        self.other, self.other_text = self.play.upstream()
        self.play.reload(self.rules(more=more))

    def rules(self, *, more: str = "") -> str:
        written = [
            f"{{name: q, match: {{quic: {{sni: '*.example.com'}}}}, to: '{self.named_text}'}}"
        ]
        if self._rest:
            written.append(f"{{name: rest, match: any, to: '{self.other_text}'}}")
        return config(*written, more=more)

    @property
    def held(self) -> int:
        return len(self.play.server.deciding._undecided._clients)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.play.close()


def test_held_datagrams_go_to_the_server_in_their_order(scene: Scene) -> None:
    play, client = scene.play, scene.play.client()
    client.send(SECOND)
    play.settle()
    assert (scene.held, play.count(ListenerCounter.ACCEPTED)) == (1, 0)
    client.send(FIRST)
    client.send(b"third")
    got = [play.receive(scene.named) for _ in range(3)]
    assert [data for data, _ in got] == [SECOND, FIRST, b"third"]
    assert len({source for _, source in got}) == 1
    assert scene.held == 0
    scene.named.sendto(b"answer", got[0][1])
    assert play.receive(client)[0] == b"answer"
    play.server.flush_ids(None)
    (line,) = play.said()
    assert (line["rule"], line["sni"], line["up_packets"]) == ("q", "a.example.com", 3)
    assert line["up_bytes"] == len(FIRST) + len(SECOND) + len(b"third")


def test_clients_do_not_mix(scene: Scene) -> None:
    play = scene.play
    clients = [play.client() for _ in range(3)]
    for client in clients:
        client.send(FIRST)
    play.settle()
    assert scene.held == 3
    clients[1].send(SECOND)
    sources = {play.receive(scene.named)[1] for _ in range(2)}
    assert (len(sources), scene.held) == (1, 2)


def test_early_data_goes_to_the_server_with_the_hello(scene: Scene) -> None:
    client = scene.play.client()
    datagrams = [zero_rtt(), initial(crypto(0, hello()))]
    for datagram in datagrams:
        client.send(datagram)
    assert [scene.play.receive(scene.named)[0] for _ in datagrams] == datagrams


def test_hello_that_never_ends_goes_to_the_next_rule_after_the_timeout(scene: Scene) -> None:
    play, client = scene.play, scene.play.client()
    client.send(FIRST)
    play.settle()
    play.pass_time(4.9)
    assert scene.held == 1
    play.pass_time(0.2)
    assert play.receive(scene.other)[0] == FIRST
    client.send(b"more")
    assert play.receive(scene.other)[0] == b"more"
    assert scene.held == 0


def test_hello_that_never_ends_is_refused_where_no_rule_is_left() -> None:
    scene = Scene(rest=False, more=", first_packet: {timeout: 1s}")
    scene.play.client().send(FIRST)
    scene.play.settle()
    scene.play.pass_time(1.1)
    (line,) = scene.play.said()
    assert (line["reason"], line["refusal"]) == ("timeout", "first_packet.timeout is over")
    assert scene.held == 0
    scene.play.close()


def test_datagrams_of_one_client_are_bounded(scene: Scene) -> None:
    play, client = scene.play, scene.play.client()
    for _ in range(MOST_DATAGRAMS):
        play.settle()
        assert scene.held <= 1
        client.send(FIRST)
    assert [play.receive(scene.other)[0] for _ in range(MOST_DATAGRAMS)] == [FIRST] * MOST_DATAGRAMS
    assert scene.held == 0


def test_bytes_of_one_client_are_bounded_by_the_listener() -> None:
    scene = Scene(more=", first_packet: {max_bytes: 2KiB}")
    client = scene.play.client()
    client.send(FIRST)
    scene.play.settle()
    assert scene.held == 1
    client.send(FIRST)
    assert [scene.play.receive(scene.other)[0] for _ in range(2)] == [FIRST] * 2
    scene.play.close()


@pytest.mark.parametrize(("name", "most"), [("MOST_UNDECIDED", 2), ("MOST_BYTES", 2500)])
def test_the_client_that_has_waited_longest_makes_room(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    monkeypatch.setattr(undecided, name, most)
    play = scene.play
    clients = [play.client() for _ in range(3)]
    for client in clients:
        client.send(FIRST)
        play.settle()
    assert scene.held == 2
    assert play.receive(scene.other)[0] == FIRST
    clients[2].send(SECOND)
    assert [play.receive(scene.named)[0] for _ in range(2)] == [FIRST, SECOND]


def test_reload_decides_by_the_new_rules(scene: Scene) -> None:
    play, client = scene.play, scene.play.client()
    client.send(FIRST)
    play.settle()
    play.reload(config(f"{{name: all, match: any, to: '{scene.other_text}'}}"))
    client.send(SECOND)
    assert [play.receive(scene.other)[0] for _ in range(2)] == [FIRST, SECOND]
    assert scene.held == 0


def test_listener_that_goes_away_leaves_nothing_behind(scene: Scene) -> None:
    play = scene.play
    play.client().send(FIRST)
    play.settle()
    play.server.listen_only_at(())
    assert scene.held == 0
    assert play.counters[Counter.DATAGRAMS_LOST] == 1
    play.pass_time(10)


def test_fault_while_deciding_late_costs_nobody_else(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    play, client = scene.play, scene.play.client()
    client.send(FIRST)
    play.settle()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(play.state.ruleset, "decide", broken)
        play.pass_time(6)
    assert scene.held == 0
    client.send(FIRST)
    client.send(SECOND)
    assert [play.receive(scene.named)[0] for _ in range(2)] == [FIRST, SECOND]


def test_amplification_counts_all_that_was_held() -> None:
    scene = Scene(more=", amplification: 1")
    client = scene.play.client()
    client.send(FIRST)
    client.send(SECOND)
    _, source = scene.play.receive(scene.named)
    scene.named.sendto(bytes(len(FIRST) + len(SECOND)), source)
    assert len(scene.play.receive(client)[0]) == len(FIRST) + len(SECOND)
    scene.named.sendto(b"x", source)
    scene.play.run_until(lambda: scene.play.counters[Counter.DATAGRAMS_HELD_BACK], "held back")
    scene.play.close()


def test_scrambled_hellos_of_many_clients_all_arrive(scene: Scene) -> None:
    chance = random.Random(7)
    for _ in range(20):
        client = scene.play.client()
        datagrams = scrambled(hello(size=2400), chance, count=3)
        chance.shuffle(datagrams)
        for datagram in datagrams:
            client.send(datagram)
        assert [scene.play.receive(scene.named)[0] for _ in datagrams] == datagrams
    assert scene.play.closed(CloseReason.NO_MATCH) == 0

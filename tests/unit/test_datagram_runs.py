"""Datagrams that come together go on together: their boundaries, order and counts stay."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable, Iterator

import pytest

from pyforwarder.runtime.counters import Counter
from pyforwarder.worker.udp import copying
from pyforwarder.worker.udp.runs import MOST_SEGMENTS, Run, send_segments
from tests.helpers.datagram_play import DatagramPlay

CONFIG = "listeners: [{{name: main, bind: '127.0.0.1:0', protocol: udp, rules: [{}]}}]\n"


class Sent:
    """How many datagrams each call has sent on; `fails` makes a call fail."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.fails: Callable[[Run], int] = lambda _: 0

    def send(self, sock: socket.socket, run: Run, *more: object) -> None:
        code = self.fails(run)
        if code:
            raise OSError(code, "refused")
        self.counts.append(run.count)
        send_segments(sock, run, *more)  # type: ignore[arg-type]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    made = Sent()
    monkeypatch.setattr(copying, "send_segments", made.send)
    return made


class Scene:
    """One client with a session, and its server."""

    def __init__(self, *, bind: str = "") -> None:
        self.play = DatagramPlay(CONFIG.format("{match: any, reject: close}"))
        self.server, text = self.play.upstream()
        port = self.play.address[1]
        self.play.reload(
            CONFIG.format(f"{{match: any, to: '{text}'}}"), bind=bind.format(port=port)
        )
        for sock in (self.server, self.play.server.ports["main"].sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.client = self.play.client()
        self.source = ("", 0)
        for data in (b"first", b"second"):  # a second one, so that answers may be many
            self.client.send(data)
            self.source = self.play.receive(self.server)[1]

    def up(self, sizes: list[int]) -> None:
        """Send so many at once; the server must get the same."""
        wanted = [bytes([number % 256]) * size for number, size in enumerate(sizes)]
        for data in wanted:
            self.client.send(data)
        assert [self.play.receive(self.server)[0] for _ in wanted] == wanted

    def down(self, sizes: list[int]) -> None:
        """The same for answers."""
        wanted = [bytes([number % 256]) * size for number, size in enumerate(sizes)]
        for data in wanted:
            self.server.sendto(data, self.source)
        assert [self.play.receive(self.client)[0] for _ in wanted] == wanted


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.play.close()


def test_datagrams_of_one_size_take_one_call(scene: Scene, sent: Sent) -> None:
    scene.up([1200] * 10)
    scene.down([1000] * 7 + [3])
    assert sent.counts == [10, 8]
    scene.play.server.flush_ids(None)
    (line,) = scene.play.said()
    assert (line["up_packets"], line["up_bytes"]) == (12, 12_000 + len(b"firstsecond"))
    assert (line["down_packets"], line["down_bytes"]) == (8, 7_003)


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ([100, 100, 50, 50, 100], [3]),  # what is shorter ends a run
        ([100, 200, 200, 0, 200, 200], [2, 2]),
        ([0, 0, 0], []),
        ([1], []),
        ([1] * (MOST_SEGMENTS + 2), [MOST_SEGMENTS, 2]),
        ([30_000] * 5, [2, 2]),
        ([65_000, 65_000, 65_507], []),
    ],
)
def test_runs_keep_order_and_boundaries(
    scene: Scene, sent: Sent, sizes: list[int], counts: list[int]
) -> None:
    scene.up(sizes)
    assert sent.counts == counts
    sent.counts.clear()
    scene.down(sizes)
    assert sent.counts == counts


def test_any_sizes_in_any_order(scene: Scene, sent: Sent) -> None:
    chance = random.Random(5)
    for _ in range(20):
        sizes = [chance.choice((0, 1, 100, 100, 100, 1200, 9000)) for _ in range(40)]
        scene.up(sizes)
        scene.down(sizes)
    assert sent.counts


def test_clients_that_take_turns_are_not_mixed(scene: Scene, sent: Sent) -> None:
    play = scene.play
    others = [scene.client, *(play.client() for _ in range(2))]
    sources = {}
    for number, client in enumerate(others):
        client.send(b"%d" % number)
        sources[number] = play.receive(scene.server)[1]
    turns = [0, 0, 1, 2, 2, 2, 1, 0]
    for turn in turns:
        others[turn].send(b"x%d" % turn)
    got = [play.receive(scene.server) for _ in turns]
    assert got == [(b"x%d" % turn, sources[turn]) for turn in turns]
    assert sent.counts == [2, 3]


def test_new_client_between_others_comes_in_its_turn(scene: Scene) -> None:
    play = scene.play
    new = play.client()
    scene.client.send(b"aa")
    scene.client.send(b"bb")
    new.send(b"cc")
    scene.client.send(b"dd")
    assert [play.receive(scene.server)[0] for _ in range(4)] == [b"aa", b"bb", b"cc", b"dd"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EMSGSIZE, errno.EIO])
def test_what_cannot_be_sent_together_is_sent_one_by_one(
    scene: Scene, sent: Sent, code: int
) -> None:
    sent.fails = lambda run: code if run.size > 1000 else 0
    scene.up([1200] * 5)
    scene.down([1100] * 5)
    assert not sent.counts
    sent.fails = lambda _: 0
    scene.up([1100] * 3)  # as large as what has not fitted: not tried again
    assert not sent.counts
    scene.up([1000] * 3)
    assert sent.counts == [3]
    assert scene.play.counters[Counter.DATAGRAMS_LOST] == 0


def test_full_queue_loses_the_datagrams_of_a_run_and_counts_them(scene: Scene, sent: Sent) -> None:
    sent.fails = lambda _: errno.EAGAIN
    for _ in range(4):
        scene.client.send(b"up")
    scene.play.settle()
    assert scene.play.counters[Counter.DATAGRAMS_LOST] == 4
    for _ in range(3):
        scene.server.sendto(b"down", scene.source)
    scene.play.settle()
    assert scene.play.counters[Counter.DATAGRAMS_LOST] == 7
    sent.fails = lambda _: 0
    scene.up([5, 5])


def test_answers_to_one_datagram_are_looked_at_one_by_one(sent: Sent) -> None:
    """They may be bounded by `amplification`."""
    play = DatagramPlay(CONFIG.format("{match: any, reject: close}"))
    server, text = play.upstream()
    play.reload(
        CONFIG.format(f"{{match: any, to: '{text}'}}").replace("udp,", "udp, amplification: 2,")
    )
    client = play.client()
    client.send(b"1234")
    source = play.receive(server)[1]
    for _ in range(4):
        server.sendto(b"abcd", source)
    play.run_until(lambda: play.counters[Counter.DATAGRAMS_HELD_BACK] == 2, "what is held back")
    assert [play.receive(client)[0] for _ in range(2)] == [b"abcd"] * 2
    assert not sent.counts
    play.close()


def test_wildcard_listener_answers_from_the_address_that_was_asked(sent: Sent) -> None:
    scene = Scene(bind="0.0.0.0:{port}")
    other = scene.play.client(to=("127.0.0.2", scene.play.address[1]))
    for _ in range(3):
        other.send(b"xx")
    source, *_ = [scene.play.receive(scene.server)[1] for _ in range(3)]
    for _ in range(3):
        scene.server.sendto(b"yy", source)
    assert [scene.play.receive(other) for _ in range(3)] == [
        (b"yy", ("127.0.0.2", scene.play.address[1]))
    ] * 3
    assert sent.counts[-1] == 3
    scene.play.close()

"""Datagrams that come together go on together: their boundaries, order and counts stay."""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.runtime.counters import Counter
from pyforwarder.worker.udp import copying
from pyforwarder.worker.udp.runs import (
    MOST_SEGMENTS,
    cut,
    end_of_run,
    send_segments,
    size_of_run,
)
from tests.helpers.datagram_play import DatagramPlay

if TYPE_CHECKING:
    from pyforwarder.worker.udp.session import Session

UDP_SEGMENT, UDP_GRO = 103, 104  # linux/udp.h
CONFIG = "listeners: [{{name: main, bind: '127.0.0.1:0', protocol: udp, rules: [{}]}}]\n"


class Sent:
    """How many datagrams each call has sent on; `fails` makes a call fail."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.fails: Callable[[int], int] = lambda _: 0  # of the size of the first

    def send(self, sock: socket.socket, run: Sequence[memoryview], *more: object) -> None:
        code = self.fails(len(run[0]))
        if code:
            raise OSError(code, "refused")
        self.counts.append(len(run))
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
    scene.down([1])  # of a server that has answered as many are received as there are
    scene.down([1000] * 7 + [3])
    assert sent.counts == [10, 8]
    scene.play.server.flush_ids(None)
    (line,) = scene.play.said()
    assert (line["up_packets"], line["up_bytes"]) == (12, 12_000 + len(b"firstsecond"))
    assert (line["down_packets"], line["down_bytes"]) == (9, 7_004)


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
    scene.down([1])
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
    for number, turn in enumerate(turns):
        others[turn].send(b"%d of %d" % (number, turn))
    got = [play.receive(scene.server) for _ in turns]
    for turn in range(3):  # of each in its order
        assert [data for data, source in got if source == sources[turn]] == [
            b"%d of %d" % (number, turn) for number in range(len(turns)) if turns[number] == turn
        ]
    assert sent.counts == [3, 2, 3]


@given(
    st.lists(st.sampled_from([0, 1, 2, 900, 1200, 30_000, 65_507]), min_size=1, max_size=140),
    st.sampled_from([0, 1000, 65_535]),
)
def test_runs_are_what_one_call_can_send(sizes: list[int], most_segment: int) -> None:
    datagrams = [memoryview(bytes(size)) for size in sizes]
    at = 0
    while at < len(datagrams):
        end = end_of_run(datagrams, at, most_segment)
        run = sizes[at:end]
        assert run
        if len(run) > 1:
            assert len(run) <= MOST_SEGMENTS
            assert 0 < run[0] <= most_segment
            assert set(run[:-1]) == {run[0]}
            assert 0 < run[-1] <= run[0]
            assert size_of_run(datagrams[at:end]) == sum(run) <= 65_000
        at = end
    assert at == len(datagrams)


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
    sent.fails = lambda size: code if size > 1000 else 0
    scene.up([1200] * 5)
    scene.down([1100] * 5)
    assert not sent.counts
    sent.fails = lambda _: 0
    scene.up([1100] * 3)  # as large as what has not fitted: not tried again
    assert not sent.counts
    scene.up([1000] * 3)
    assert sent.counts == [3]
    assert scene.play.counters[Counter.DATAGRAMS_LOST] == 0


def test_what_comes_behind_the_end_of_a_session_opens_another(
    scene: Scene, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses one of those that were read at once: the rest are not its, nor lost."""
    play, copying_ = scene.play, scene.play.server.copying
    real = copying_.send_up
    refused: list[Session] = []

    def send_up(session: Session, datagram: memoryview) -> None:
        if bytes(datagram) == b"bb" and not refused:
            refused.append(session)
            play.server.losses.lose(session, errno.ECONNREFUSED, is_sure=False)
        else:
            real(session, datagram)

    monkeypatch.setattr(copying_, "send_up", send_up)
    for data in (b"a", b"bb", b"ccc", b"dddd"):
        scene.client.send(data)
    got = [play.receive(scene.server) for _ in range(3)]
    assert [data for data, _ in got] == [b"a", b"ccc", b"dddd"]
    assert got[0][1] == scene.source != got[1][1] == got[2][1]
    assert len(play.server.by_id) == 1


def test_client_is_known_again_after_its_session_has_ended(scene: Scene) -> None:
    port = scene.play.server.ports["main"]
    assert list(port.by_name.values()) == list(port.sessions.values())
    scene.play.server.flush_ids(None)
    assert not port.by_name
    scene.up([5, 5])
    assert len(port.by_name) == len(port.sessions) == 1


def test_full_queue_loses_the_datagrams_of_a_run_and_counts_them(scene: Scene, sent: Sent) -> None:
    scene.down([1])
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
    scene.server.sendto(b"y", source)
    assert scene.play.receive(other)[0] == b"y"
    for _ in range(3):
        scene.server.sendto(b"yy", source)
    assert [scene.play.receive(other) for _ in range(3)] == [
        (b"yy", ("127.0.0.2", scene.play.address[1]))
    ] * 3
    assert sent.counts[-1] == 3
    scene.play.close()


# Servers that send runs


def send_run(server: socket.socket, source: tuple[str, int], data: bytes, size: int) -> None:
    """As a server of QUIC does."""
    segment = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))
    server.sendmsg([data], [segment], 0, source)


@pytest.mark.parametrize(
    ("size", "each"), [(12_000, 1200), (12_003, 1200), (1201, 1200), (64, 1), (65_000, 1300)]
)
def test_what_a_server_sends_together_is_received_and_sent_together(
    scene: Scene, sent: Sent, monkeypatch: pytest.MonkeyPatch, size: int, each: int
) -> None:
    received = []

    def counted(data: Sequence[memoryview], controls: Sequence[bytes]) -> list[memoryview]:
        received.append(len(data))
        return cut(data, controls)

    monkeypatch.setattr(copying, "cut", counted)
    data = random.Random(size).randbytes(size)
    send_run(scene.server, scene.source, data, each)
    wanted = [data[at : at + each] for at in range(0, size, each)]
    assert [scene.play.receive(scene.client)[0] for _ in wanted] == wanted
    assert received == [1]
    assert sent.counts == [len(wanted)]
    scene.play.server.flush_ids(None)
    (line,) = scene.play.said()
    assert (line["down_packets"], line["down_bytes"]) == (len(wanted), size)


@pytest.mark.parametrize("kind", ["first", "one_by_one", "steady"])
def test_a_server_that_sends_runs_has_no_more_of_a_turn_than_another(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A worker that one session keeps for too long is killed, with all that others have there."""
    copying_, (session,) = scene.play.server.copying, scene.play.server.by_id.values()
    if kind != "first":
        scene.down([1] * 3)
        assert session.most_of_message == 1
    if kind == "one_by_one":
        monkeypatch.setattr(copying_, "_may_run", lambda _: False)
    elif kind == "steady":  # it has sent runs before
        send_run(scene.server, scene.source, bytes(MOST_SEGMENTS), 1)
        assert [scene.play.receive(scene.client)[0] for _ in range(MOST_SEGMENTS)]
    for _ in range(300):
        send_run(scene.server, scene.source, bytes(MOST_SEGMENTS), 1)
    told = 0

    def tell(_session: Session, datagrams: Sequence[memoryview]) -> None:
        nonlocal told
        told += len(datagrams)

    monkeypatch.setattr(copying_, "_send_all_to_client", tell)
    copying_.answered(session, -1, 0)
    assert copying.BATCH <= told <= 2 * copying.BATCH
    turns = [told]  # the rest in turns that are no longer; the queue had no room for all
    while turns[-1]:
        before = told
        copying_.answered(session, -1, 0)
        turns.append(told - before)
    assert told > 100 * MOST_SEGMENTS
    assert max(turns) <= 2 * copying.BATCH


def test_runs_of_a_server_and_single_datagrams_keep_their_order(scene: Scene) -> None:
    chance = random.Random(7)
    for _ in range(30):
        wanted = []
        for number in range(chance.randrange(1, 8)):
            each = chance.choice((1, 7, 1200, 1400))
            data = bytes([number]) * chance.randrange(each + 1, 20 * each + 1)
            if chance.random() < 0.5:
                send_run(scene.server, scene.source, data, each)
                wanted += [data[at : at + each] for at in range(0, len(data), each)]
            else:
                scene.server.sendto(data[:each], scene.source)
                wanted.append(data[:each])
        assert [scene.play.receive(scene.client)[0] for _ in wanted] == wanted


def test_run_of_a_server_that_does_not_fit_the_path_goes_one_by_one(
    scene: Scene, sent: Sent
) -> None:
    sent.fails = lambda size: errno.EMSGSIZE if size > 1000 else 0
    send_run(scene.server, scene.source, bytes(12_000), 1200)
    assert [len(scene.play.receive(scene.client)[0]) for _ in range(10)] == [1200] * 10
    assert scene.play.counters[Counter.DATAGRAMS_LOST] == 0


def test_of_a_run_to_a_client_heard_once_each_datagram_is_bounded(sent: Sent) -> None:
    play = DatagramPlay(CONFIG.format("{match: any, reject: close}"))
    server, text = play.upstream()
    play.reload(
        CONFIG.format(f"{{match: any, to: '{text}'}}").replace("udp,", "udp, amplification: 2,")
    )
    client = play.client()
    client.send(b"1234")
    source = play.receive(server)[1]
    send_run(server, source, b"abcdefghijklmnop", 4)
    play.run_until(lambda: play.counters[Counter.DATAGRAMS_HELD_BACK] == 2, "what is held back")
    assert [play.receive(client)[0] for _ in range(2)] == [b"abcd", b"efgh"]
    assert not sent.counts
    play.close()


@pytest.mark.parametrize(
    "control",
    [
        b"",
        struct.pack("@Nii", 16, socket.IPPROTO_UDP, UDP_GRO),
        struct.pack("@Niii", 20, socket.IPPROTO_IP, UDP_GRO, 4),
        struct.pack("@Niii", 20, socket.IPPROTO_UDP, UDP_GRO, 0),
        struct.pack("@Niii", 20, socket.IPPROTO_UDP, UDP_GRO, -4),
        struct.pack("@Niii", 20, socket.IPPROTO_UDP, UDP_GRO, 12),
    ],
)
def test_what_says_no_size_is_one_datagram(control: bytes) -> None:
    assert cut([memoryview(b"eight by"), memoryview(b"")], [control, control]) == [b"eight by", b""]

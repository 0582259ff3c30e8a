"""Pairs leave the sockmap while their connections go on: at every moment, and often."""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

from pyforwarder.core.connection import Phase
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction
from pyforwarder.datapath.proof.rig import Peer, Reader, Rig, RigPair
from pyforwarder.datapath.proof.scenarios import bytes_of, flood_bytes, push_until_blocked
from pyforwarder.datapath.sockmap import exit as sockmap_exit
from pyforwarder.datapath.sockmap.exit import ExitError, _LostError
from pyforwarder.datapath.tcp_info import TCP_CLOSE, TCP_ESTABLISHED, received
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.stage import keys_in, sockmap_of, stage
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from pyforwarder.datapath.base import Pair
    from pyforwarder.datapath.sockmap.directions import Half
    from pyforwarder.datapath.sockmap.exit import SockmapExit
    from pyforwarder.datapath.sockmap.maps import KernelMaps


@pytest.fixture
def rig(maps: KernelMaps) -> Iterator[Rig]:
    with stage("sockmap", maps) as rig:
        yield rig


@pytest.fixture
def leaving(rig: Rig) -> Iterator[SockmapExit]:
    found = sockmap_of(rig).exit()
    yield found
    found.close()


def take_out(rig: Rig, leaving: SockmapExit, pair: RigPair) -> None:
    """The pair is copied from here on."""

    def is_out() -> bool:
        return pair.ended or leaving.take_out(pair)

    rig.run_until(is_out, "exit")
    assert not pair.ended, pair.reason
    assert pair.datapath_record is None
    rig.copying.take_back(pair)


def go_on(rig: Rig, client: socket.socket, pair: RigPair, server: socket.socket) -> None:
    """Both ends say something and close."""
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    client.sendall(b"request")
    server.sendall(b"answer")
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader_c, reader_s)
    assert (bytes(reader_s.data), bytes(reader_c.data)) == (b"request", b"answer")


def send_to_the_end(
    name: str,
    sock: socket.socket,
    data: bytes,
    pause_s: float,
    gates: Sequence[threading.Event] = (),
) -> Peer:
    """Send all in pieces of any size, and close that direction.

    At each of the gates, which divide the data evenly, it waits.
    """
    rng = random.Random(name)

    def send() -> None:
        at = passed = 0
        while at < len(data):
            if passed < len(gates) and at * (len(gates) + 1) >= len(data) * (passed + 1):
                assert gates[passed].wait(DEADLINE_S), f"gate {passed}"
                passed += 1
            size = rng.choice((1, 7, 1460, 20_011, 70_001))
            sock.sendall(data[at : at + size])
            at += size
            if pause_s:
                time.sleep(pause_s * rng.random())
        sock.shutdown(socket.SHUT_WR)

    return Peer(name, send)


def test_quiet_pair_leaves_and_is_copied(rig: Rig, leaving: SockmapExit, maps: KernelMaps) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    for sender, receiver in ((client, server), (server, client)):
        sender.sendall(b"by the kernel")
        assert receiver.recv(100) == b"by the kernel"
    take_out(rig, leaving, pair)
    assert pair.kind is DatapathKind.COPY
    # The sockets of the two bypasses stay.
    assert (keys_in(maps.of[0].sockets_fd), keys_in(maps.of[0].owners_fd)) == (2, 0)
    assert [flow.read_bytes for flow in (pair.up, pair.down)] == [13, 13]
    assert [flow.written_bytes for flow in (pair.up, pair.down)] == [13, 13]
    assert [flow.carried_bytes for flow in (pair.up, pair.down)] == [13, 13]
    go_on(rig, client, pair, server)


@pytest.mark.parametrize("pause_s", [0.0, 0.0005])
def test_pair_leaves_and_enters_again_and_again_under_traffic(
    rig: Rig, leaving: SockmapExit, pause_s: float
) -> None:
    client, pair, server = rig.connect()
    up = bytes_of(24_000_003, 1) if not pause_s else bytes_of(9_000_001, 1)
    down = bytes_of(16_000_007, 2) if not pause_s else bytes_of(8_000_001, 2)
    rig.join(pair)
    reader_s, reader_c = Reader("server", server), Reader("client", client)
    # At full speed there is seldom a moment at which it could enter again. On a busy machine it may
    # not even leave before all has come: so both ends wait for it.
    gates = [threading.Event() for _ in range(4 if pause_s else 1)]
    writers = [
        send_to_the_end("client writes", client, up, pause_s, gates),
        send_to_the_end("server writes", server, down, pause_s, gates),
    ]
    times = 0
    redirected = 0
    deadline_s = time.monotonic() + scaled_s(60.0)
    while not pair.ended and time.monotonic() < deadline_s:
        if pair.datapath is rig.datapath:
            redirected += sum(
                sockmap_of(rig).carried(pair, flow)[0] for flow in (pair.up, pair.down)
            )
            if leaving.take_out(pair):
                rig.copying.take_back(pair)
                if times < len(gates):
                    gates[times].set()
                times += 1
        elif pair.up.phase is Phase.OPEN and pair.down.phase is Phase.OPEN:
            rig.datapath.join(pair)
        rig.loop.run_once(0.001)
    rig.finish(pair, reader_s, reader_c, *writers)
    assert pair.reason is None
    assert bytes(reader_s.data) == up
    assert bytes(reader_c.data) == down
    assert times >= len(gates)
    assert redirected > 0


def _diverted(rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes came by a bypass, each time."""
    del rig, leaving
    read = sockmap_exit._Bypass.read
    counts: list[int] = []

    def noted(self: sockmap_exit._Bypass, count: int) -> bytes:
        counts.append(count)
        return read(self, count)

    monkeypatch.setattr(sockmap_exit._Bypass, "read", noted)
    return counts


@pytest.mark.parametrize("direction", list(Direction))
def test_bytes_that_come_at_the_last_moment_are_not_lost(
    rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch, direction: Direction
) -> None:
    """Between the last look and the removal, and a FIN with them; and before the last look."""
    counts = _diverted(rig, leaving, monkeypatch)
    client, pair, server = rig.connect()
    rig.join(pair)
    sender, receiver = (client, server) if direction is Direction.UP else (server, client)
    sockets = leaving._sockets
    remove, divert = sockets.delete, leaving.divert

    def come(data: bytes, *, ends: bool = False) -> None:
        half = sockmap_of(rig).halves_of(pair)[direction]
        before = leaving.redirected(half) + leaving.passed(half)
        sender.sendall(data)
        if ends:
            sender.shutdown(socket.SHUT_WR)
        wait_for(
            lambda: leaving.redirected(half) + leaving.passed(half) == before + len(data), "bytes"
        )

    source = sockmap_of(rig).halves_of(pair)[direction].cookie

    def delete_late(key: bytes) -> None:
        if key == source and not counts_before:
            counts_before.append(1)
            come(b"3 last ones.", ends=True)
        remove(key)

    def divert_late(half: object, cookie: int) -> None:
        come(b"1 passed, ")
        divert(half, cookie)  # type: ignore[arg-type]
        come(b"2 behind, ")

    counts_before: list[int] = []
    monkeypatch.setattr(sockets, "delete", delete_late)
    monkeypatch.setattr(leaving, "divert", divert_late)
    take_out(rig, leaving, pair)
    assert sum(counts) >= len(b"3 last ones.")
    # Each of both directions was diverted.
    wanted = b"1 passed, 2 behind, 1 passed, 2 behind, 3 last ones."
    reader = Reader("receiver", receiver)
    other = Reader("sender", sender)
    receiver.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader, other)
    assert bytes(reader.data) == wanted
    assert (reader.ended, other.ended) == ("eof", "eof")


@pytest.mark.parametrize("direction", list(Direction))
def test_what_comes_at_the_last_moment_waits_where_it_is(
    rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch, direction: Direction
) -> None:
    """The kernel drops what is with the program while its socket is taken out of the map."""
    client, pair, server = rig.connect()
    rig.join(pair)
    sender, receiver = (client, server) if direction is Direction.UP else (server, client)
    source = pair.client if direction is Direction.UP else pair.server
    assert source is not None
    half = sockmap_of(rig).halves_of(pair)[direction]
    remove = leaving._sockets.delete
    seen: list[int] = []

    def delete_late(key: bytes) -> None:
        if key == half.cookie:
            before = received(source).bytes_received
            sender.sendall(b"late")
            wait_for(lambda: received(source).bytes_received == before + 4, "bytes")
            seen.append(leaving.redirected(half) + leaving.passed(half))
        remove(key)

    monkeypatch.setattr(leaving._sockets, "delete", delete_late)
    take_out(rig, leaving, pair)
    assert seen == [0]
    assert source.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    receiver.setblocking(False)
    said = bytearray()

    def has_come(data: bytes) -> bool:
        with contextlib.suppress(BlockingIOError):
            said.extend(receiver.recv(100))
        return said == data

    rig.run_until(lambda: has_come(b"late"), "the last bytes")
    sender.sendall(b"r")  # fewer than any mark
    rig.run_until(lambda: has_come(b"later"), "another byte")
    receiver.setblocking(True)
    go_on(rig, client, pair, server)


def test_pair_stays_until_its_bypasses_have_their_room(
    rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor enlarges their send buffers, and may be late."""
    asked: list[Callable[[], None]] = []
    enlarge = rig.enlarge

    def enlarge_later(pair: Pair | None, sock: socket.socket, by_bytes: int) -> None:
        asked.append(lambda: enlarge(pair, sock, by_bytes))

    monkeypatch.setattr(rig, "enlarge", enlarge_later)
    monkeypatch.setattr(sockmap_exit, "_ENLARGE_S", 3600.0)
    client, pair, server = rig.connect()
    rig.join(pair)
    for how_many in (2, 1):
        assert not leaving.take_out(pair)
        assert len(asked) == how_many
        client.sendall(b"by the kernel")
        assert server.recv(100) == b"by the kernel"
        asked.pop()()
    assert [sockmap_of(rig).carried(pair, flow)[0] for flow in (pair.up, pair.down)] == [26, 0]
    take_out(rig, leaving, pair)
    go_on(rig, client, pair, server)


def test_pair_leaves_where_nobody_enlarges_a_send_buffer(
    rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig, "enlarge", lambda pair, sock, by_bytes: None)
    monkeypatch.setattr(sockmap_exit, "_ENLARGE_S", 3600.0)
    client, pair, server = rig.connect()
    rig.join(pair)
    assert not leaving.take_out(pair)
    monkeypatch.setattr(sockmap_exit, "_ENLARGE_S", 0.0)
    take_out(rig, leaving, pair)
    go_on(rig, client, pair, server)


def test_what_has_stood_still_with_this_process_is_looked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole machine may: the deadline has passed, and nobody has run meanwhile."""
    ours, theirs = socket.socketpair()
    hours_s = iter(range(0, 1_000_000, 3600))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(hours_s)))
    poll = select.poll

    def arrived() -> select.poll:
        theirs.send(b"late")
        return poll()

    with ours, theirs:
        ours.setblocking(False)
        with monkeypatch.context() as patch:
            patch.setattr(select, "poll", arrived)
            assert sockmap_exit._read_exactly(ours.fileno(), 4) == b"late"
        with pytest.raises(_LostError):
            sockmap_exit._read_exactly(ours.fileno(), 4)


@pytest.mark.parametrize("direction", list(Direction))
def test_half_closed_pair_leaves(rig: Rig, leaving: SockmapExit, direction: Direction) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    ends, stays = (client, server) if direction is Direction.UP else (server, client)
    flow = pair.up if direction is Direction.UP else pair.down
    ends.sendall(b"all I say")
    ends.shutdown(socket.SHUT_WR)
    rig.run_until(lambda: flow.phase is Phase.CLOSED, "half a close")
    stays.sendall(b"by the kernel, ")
    wait_for(lambda: ends.recv(100, socket.MSG_PEEK) == b"by the kernel, ", "bytes")
    take_out(rig, leaving, pair)
    assert flow.phase is Phase.CLOSED
    stays.sendall(b"and copied")
    stays.shutdown(socket.SHUT_WR)
    reader, other = Reader("ends", ends), Reader("stays", stays)
    rig.finish(pair, reader, other)
    assert bytes(reader.data) == b"by the kernel, and copied"
    assert bytes(other.data) == b"all I say"
    assert pair.reason is None


def test_pair_of_a_reader_that_stands_still_leaves(rig: Rig, leaving: SockmapExit) -> None:
    """Both ways: neither end reads, and both have sent until they were stopped."""
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    sent_up = push_until_blocked(rig, client, flood_bytes(1))
    sent_down = push_until_blocked(rig, server, flood_bytes(2))
    take_out(rig, leaving, pair)
    for sock in (client, server):
        sock.setblocking(True)
    reader_s, reader_c = Reader("server", server), Reader("client", client)
    writers = [
        send_to_the_end("client", client, flood_bytes(1)[sent_up:], 0.0),
        send_to_the_end("server", server, flood_bytes(2)[sent_down:], 0.0),
    ]
    rig.finish(pair, reader_s, reader_c, *writers)
    assert bytes(reader_s.data) == flood_bytes(1)
    assert bytes(reader_c.data) == flood_bytes(2)


def test_pair_of_which_only_the_server_is_in_the_map_leaves(
    rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, pair, server = rig.connect()
    rig.copy(pair)
    sockets = sockmap_of(rig)._sockets
    insert = sockets.update
    calls: list[bytes] = []

    def close_before_the_second(key: bytes, value: bytes) -> None:
        calls.append(key)
        if len(calls) == 2:
            client.sendall(b"last words")
            client.shutdown(socket.SHUT_WR)
            wait_for(lambda: received(pair.client).state != TCP_ESTABLISHED, "FIN")
        insert(key, value)

    monkeypatch.setattr(sockets, "update", close_before_the_second)
    assert rig.hand_over(pair) is None
    server.sendall(b"answer, ")
    take_out(rig, leaving, pair)
    server.sendall(b"rest")
    server.shutdown(socket.SHUT_WR)
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    rig.finish(pair, reader_c, reader_s)
    assert bytes(reader_c.data) == b"answer, rest"
    assert bytes(reader_s.data) == b"last words"


def test_count_that_does_not_fit_resets_the_pair(
    rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    client.sendall(b"hello")
    assert server.recv(100) == b"hello"
    count: Callable[..., int] = sockmap_exit._unread_bytes
    monkeypatch.setattr(sockmap_exit, "_unread_bytes", lambda sock: count(sock) + 1)
    assert not leaving.take_out(pair)
    assert pair.ended
    assert pair.reason is CloseReason.INTERNAL
    rig.loop.run_once(0)
    for sock in (client, server):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def closed_by_both(rig: Rig) -> tuple[socket.socket, RigPair]:
    """A pair in TCP_CLOSE, where the second FIN of a socket leads; b"the rest" is still inside."""
    client, pair, server = rig.connect()
    rig.join(pair)
    client.shutdown(socket.SHUT_WR)
    rig.run_until(lambda: pair.up.phase is Phase.CLOSED, "half a close")
    server.sendall(b"the rest")
    server.shutdown(socket.SHUT_WR)
    sock = pair.server
    assert sock is not None
    wait_for(lambda: received(sock).state == TCP_CLOSE, "both FINs")
    return client, pair


def test_count_is_compared_after_both_ends_have_closed(
    rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In TCP_CLOSE too, where the second FIN of a socket leads (tcp_fin)."""
    _client, pair = closed_by_both(rig)
    count: Callable[..., int] = sockmap_exit._unread_bytes
    monkeypatch.setattr(sockmap_exit, "_unread_bytes", lambda sock: count(sock) + 1)
    # Its events are not looked at: it leaves before its end is known.
    wait_for(lambda: leaving.take_out(pair) or pair.ended, "exit")
    assert pair.ended
    assert pair.reason is CloseReason.INTERNAL


def test_pair_leaves_after_both_ends_have_closed(rig: Rig, leaving: SockmapExit) -> None:
    client, pair = closed_by_both(rig)
    wait_for(lambda: leaving.take_out(pair) or pair.ended, "exit")
    assert not pair.ended
    rig.copying.take_back(pair)
    reader = Reader("client", client)
    rig.finish(pair, reader)
    assert bytes(reader.data) == b"the rest"
    assert (reader.ended, pair.reason) == ("eof", None)


@pytest.mark.parametrize("error", [_LostError(), OSError(errno.EIO, "made up")])
def test_bytes_of_a_pair_whose_exit_fails_come_out_in_no_other(
    rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """They are in its bypasses by then, and nobody reads them."""
    divert, read_passed = leaving.divert, sockmap_exit._LeavingDirection.read_passed
    said = {Direction.UP: b"", Direction.DOWN: b""}
    ends: dict[Direction, socket.socket] = {}

    def divert_late(half: Half, cookie: int) -> None:
        divert(half, cookie)
        direction = half.flow.direction
        before = leaving.redirected(half)
        ends[direction].sendall(said[direction])
        wait_for(lambda: leaving.redirected(half) == before + len(said[direction]), "bytes")

    def fail(way: sockmap_exit._LeavingDirection, pair: Pair) -> None:
        del way, pair
        raise error

    monkeypatch.setattr(leaving, "divert", divert_late)
    client, pair, server = rig.connect()
    rig.join(pair)
    ends.update({Direction.UP: client, Direction.DOWN: server})
    said.update({Direction.UP: b"first pair up", Direction.DOWN: b"first pair down"})
    monkeypatch.setattr(sockmap_exit._LeavingDirection, "read_passed", fail)
    rig.run_until(lambda: leaving.take_out(pair) or pair.ended, "end of the first")
    assert pair.reason is CloseReason.INTERNAL
    monkeypatch.setattr(sockmap_exit._LeavingDirection, "read_passed", read_passed)
    client, pair, server = rig.connect()
    rig.join(pair)
    ends.update({Direction.UP: client, Direction.DOWN: server})
    said.update({Direction.UP: b"SECOND UP", Direction.DOWN: b"SECOND DOWN"})
    take_out(rig, leaving, pair)
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader_c, reader_s)
    assert bytes(reader_s.data) == b"SECOND UP"
    assert bytes(reader_c.data) == b"SECOND DOWN"


def test_where_there_is_no_way_out_a_pair_stays(
    rig: Rig, leaving: SockmapExit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(errno.ENETUNREACH, "no loopback interface")

    client, pair, server = rig.connect()
    rig.join(pair)
    monkeypatch.setattr(sockmap_exit, "_connected_to_ourselves", refuse)
    with pytest.raises(ExitError, match="no loopback interface"):
        leaving.take_out(pair)
    assert pair.datapath is rig.datapath
    go_on(rig, client, pair, server)


def test_reset_is_heard_of_by_a_pair_that_leaves(rig: Rig, leaving: SockmapExit) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    # Whether it is out already or not, its error is told of.
    if leaving.take_out(pair):
        rig.copying.take_back(pair)
    rig.run_until(lambda: pair.ended, "end of the pair")
    assert pair.reason is CloseReason.CLIENT_RESET
    rig.loop.run_once(0)
    with pytest.raises(ConnectionResetError):
        server.recv(1)


def test_what_another_connects_to_is_no_bypass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else of this host is quicker: what is redirected would come to him."""
    strangers: list[socket.socket] = []
    connect = socket.socket.connect

    def second(sock: socket.socket, address: tuple[str, int]) -> None:
        stranger = socket.socket()
        connect(stranger, address)
        strangers.append(stranger)
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", second)
    ours, theirs = sockmap_exit._connected_to_ourselves()
    assert theirs.getpeername() == ours.getsockname()
    for sock in (ours, theirs, *strangers):
        sock.close()

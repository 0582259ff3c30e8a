"""The sockmap datapath where it is special: entering at the wrong moment, limits, native mode."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.core.connection import Phase
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import Pair, PairReason
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction
from pyforwarder.datapath.proof.rig import Peer, Reader, Rig, RigPair, loopback_pair
from pyforwarder.datapath.proof.scenarios import (
    SLOW_LIMIT_BYTES,
    bytes_of,
    flood_bytes,
    push_until_blocked,
    send_rest,
)
from pyforwarder.datapath.sockmap import directions as sockmap_directions
from pyforwarder.datapath.tcp_info import TCP_ESTABLISHED, Received, queued_for, received
from pyforwarder.runtime.socket_options import SO_COOKIE
from tests.helpers.netns import private_network
from tests.helpers.peers import ends_with_reset
from tests.helpers.plays import ALL
from tests.helpers.stage import SLOTS, keys_in, sockmap_of, stage
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from pyforwarder.datapath.sockmap.directions import Half
    from pyforwarder.datapath.sockmap.maps import KernelMaps

SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h; Python has no name for it
# One packet more than the limit may be on its way when the fuse trips; loopback's are up to 64 KiB
# (and a GSO packet may be larger where BIG TCP is on).
LARGEST_PACKET_BYTES: Final = 1 << 17


@pytest.fixture
def rig(maps: KernelMaps) -> Iterator[Rig]:
    with stage("sockmap", maps) as rig:
        yield rig


def word(rig: Rig, pair: RigPair, place: list[int], direction: Direction) -> int:
    """One of the 64-bit numbers of the pair's record."""
    return int(rig.window.words64[pair.slot * rig.window.WORDS64 + place[direction]])


def half(rig: Rig, pair: RigPair, place: list[int], direction: Direction) -> int:
    """One of the 32-bit numbers."""
    return int(rig.window.words32[pair.slot * rig.window.WORDS32 + place[direction]])


def talk_to_the_end(rig: Rig, client: socket.socket, pair: RigPair, server: socket.socket) -> None:
    """Something each way, then both close; every byte must have arrived."""
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    client.sendall(b"request")
    server.sendall(b"answer")
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader_c, reader_s)
    assert (bytes(reader_s.data), bytes(reader_c.data)) == (b"request", b"answer")
    assert (reader_c.ended, reader_s.ended) == ("eof", "eof")


def update_that(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]
) -> list[int]:
    """Call `before(n)` before the n-th insertion into the sockhash; the list counts them."""
    sockets = sockmap_of(rig)._sockets
    insert = sockets.update
    calls: list[int] = []

    def update(key: bytes, value: bytes) -> None:
        calls.append(len(calls) + 1)
        before(len(calls))
        insert(key, value)

    monkeypatch.setattr(sockets, "update", update)
    return calls


# Joined: the kernel moves the bytes


def test_joined_pair_moves_its_bytes_without_userspace(rig: Rig) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    upload, download = bytes_of(100_003, 1), bytes_of(50_021, 2)
    read = {"up": b"", "down": b""}
    for name, sender, receiver, data in (
        ("up", client, server, upload),
        ("down", server, client, download),
    ):
        for at in range(0, len(data), 1000):
            sender.sendall(data[at : at + 1000])
            while len(read[name]) < min(at + 1000, len(data)):
                read[name] += receiver.recv(1 << 16)
    assert read == {"up": upload, "down": download}
    # The loop has not run once, and yet:
    assert word(rig, pair, table.REDIRECTED, Direction.UP) == 100_003
    assert word(rig, pair, table.REDIRECTED, Direction.DOWN) == 50_021
    assert word(rig, pair, table.REDIRECTED_PACKETS, Direction.UP) == 101
    assert word(rig, pair, table.PASSED, Direction.UP) == 0
    assert pair.up.carried_bytes == 0
    talk_to_the_end(rig, client, pair, server)


def test_carried_counts_both_hands_exactly(rig: Rig) -> None:
    client, pair, server = rig.connect()
    client.sendall(b"x" * 1023)
    rig.copy(pair)
    rig.run_until(lambda: pair.up.carried_bytes == 1023, "first bytes")
    assert rig.hand_over(pair) is None
    client.sendall(b"y" * 777)
    rig.run_until(
        lambda: sockmap_of(rig).carried(pair, pair.up)[0] == 1023 + 777, "bytes of both hands"
    )
    assert sockmap_of(rig).carried(pair, pair.up)[1] == 2
    got = b""
    while len(got) < 1800:
        got += server.recv(4096)
    assert sockmap_of(rig).carried(pair, pair.up) == (1800, 2, 0)
    assert sockmap_of(rig).carried(pair, pair.down) == (0, 0, 0)
    talk_to_the_end(rig, client, pair, server)


def test_quiet_joined_pair_asks_epoll_for_its_end_only(rig: Rig) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    woken: list[int] = []
    ready = sockmap_of(rig).ready

    def wake(pair: Pair, fd: int, mask: int) -> None:
        woken.append(mask)
        ready(pair, fd, mask)

    for fd in (pair.client_fd, pair.server_fd):
        rig.loop.redirect(fd, wake)
    rig.loop.run_once(0)
    woken.clear()
    for number in range(23):
        client.sendall(b"message")
        assert server.recv(100) == b"message", number
        rig.loop.run_once(0)
    assert woken == []
    talk_to_the_end(rig, client, pair, server)
    assert woken != []


# Limits


def test_backlog_stays_within_the_limit_and_one_packet(rig: Rig) -> None:
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    sent = push_until_blocked(rig, client, flood_bytes(1))
    assert half(rig, pair, table.TRIPS, Direction.UP) >= 1
    _, _, backlog = sockmap_of(rig).carried(pair, pair.up)
    assert backlog <= SLOW_LIMIT_BYTES + LARGEST_PACKET_BYTES
    reader = Reader("server", server)
    writer = send_rest("client", client, flood_bytes(1), sent)
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader, writer)
    assert bytes(reader.data) == flood_bytes(1)


def test_tiny_packets_are_charged_for_the_memory_that_they_take(rig: Rig) -> None:
    # A queued packet costs the kernel about a kilobyte, however few bytes it carries: a limit that
    # counts bytes alone let a client take 1.2 GB with a backlog of 1 MiB of single bytes.
    client, pair, server = rig.connect()
    assert pair.server is not None
    for sock, option in ((server, socket.SO_RCVBUF), (pair.server, socket.SO_SNDBUF)):
        sock.setsockopt(socket.SOL_SOCKET, option, 4096)
    sockmap = sockmap_of(rig)
    sockmap.limit_bytes = limit = 64 << 10
    rig.join(pair)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setblocking(False)
    most_waiting = sent = quiet = 0
    # Until the limit has been met, and nothing moves any more.
    while quiet < 10 and sent < 2 * limit:
        try:
            for _ in range(64):
                sent += client.send(b"x")
            quiet = 0
        except BlockingIOError:
            quiet += 1
        if half(rig, pair, table.TRIPS, Direction.UP):
            quiet += 1
        rig.loop.run_once(0)
        most_waiting = max(most_waiting, sockmap.carried(pair, pair.up)[2])
    assert half(rig, pair, table.TRIPS, Direction.UP) >= 1
    # Every byte that waits is a packet. The two numbers that it is the difference of are read one
    # after the other, and a packet may pass in between.
    assert most_waiting <= limit // 64 + 1
    reader = Reader("server", server)
    client.setblocking(True)
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader)
    assert bytes(reader.data) == b"x" * sent


@pytest.mark.parametrize(("limit", "size"), [(1, 1460), (1023, 1)])
def test_packet_beyond_the_limit_goes_through_userspace(rig: Rig, limit: int, size: int) -> None:
    # The target has all the room it could want; what is on its way to it is over the limit, for
    # single bytes a thousand times sooner.
    client, pair, server = rig.connect()
    assert pair.server is not None
    pair.server.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
    sockmap_of(rig).limit_bytes = limit
    rig.join(pair)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader = Reader("server", server)
    sent = 0
    # A packet that finds the one before it still on its way: soon, but when is the kernel's choice.
    while not half(rig, pair, table.TRIPS, Direction.UP) and sent < 100_000 * size:
        for _ in range(100):
            client.sendall(bytes(size))
        sent += 100 * size
        rig.loop.run_once(0)
    assert half(rig, pair, table.TRIPS, Direction.UP) >= 1
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader)
    assert len(reader.data) == sent


@pytest.mark.parametrize("limit_bytes", [20_000, 4 << 20])
def test_counts_are_exact_where_the_hosts_own_queue_drops_packets(
    rig: Rig, limit_bytes: int
) -> None:
    # As a full tbf or htb does. What was dropped so counts as sent, and again when it is sent
    # (tcp_write_xmit): a count of sent bytes is too high from then on, and a pair whose bytes do
    # not add up never ends, or ends before they are delivered.
    with private_network() as network:
        network.run("ip", "link", "set", "lo", "mtu", "1500")
        # fmt: off
        network.run("tc", "qdisc", "add", "dev", "lo", "root",
                    "tbf", "rate", "100mbit", "burst", "3000", "limit", "20000")
        # fmt: on
        client, pair, server = rig.connect()
        sockmap_of(rig).limit_bytes = limit_bytes
        rig.join(pair)
        data = bytes_of(2_000_000, 7)
        reader = Reader("server", server)
        writer = Peer("client", lambda: client.sendall(data))
        rig.run_until(lambda: not writer.is_alive(), "last of the client's bytes")
        rig.run_until(lambda: len(reader.data) == len(data), "last of the server's bytes")
        carried, _, backlog = sockmap_of(rig).carried(pair, pair.up)
        client.shutdown(socket.SHUT_WR)
        server.shutdown(socket.SHUT_WR)
        rig.finish(pair, reader, writer)
        assert pair.server is not None
        dropped = re.search(r"dropped (\d+)", network.run("tc", "-s", "qdisc", "show", "dev", "lo"))
    assert dropped is not None
    assert int(dropped[1]) > 0
    assert (carried, backlog) == (len(data), 0)
    assert bytes(reader.data) == data
    assert pair.reason is None


def test_passed_bytes_wait_for_the_redirected_ones_before_them(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    client.sendall(b"redirected, ")
    assert server.recv(100) == b"redirected, "
    # As if the kernel's worker had not run yet.
    monkeypatch.setattr(sockmap_directions, "queued_for", lambda *one: queued_for(*one) - 1)
    rig.window.words32[pair.slot * rig.window.WORDS32 + table.ARMED[Direction.UP]] = 0
    client.sendall(b"passed")
    rig.run_until(lambda: word(rig, pair, table.PASSED, Direction.UP) == 6, "passed bytes")
    for _ in range(5):
        rig.loop.run_once(0.01)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(100)
    server.setblocking(True)
    monkeypatch.undo()
    reader = Reader("server", server)
    rig.run_until(lambda: bytes(reader.data) == b"passed", "passed bytes at the server")
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader)


# Entering at the wrong moment


def test_unix_socket_stays_with_copy(rig: Rig) -> None:
    client, accepted = socket.socketpair()
    outgoing, server = loopback_pair()
    pair = rig.between(client, accepted, outgoing, server)
    rig.copy(pair)
    assert rig.hand_over(pair) is PairReason.UNIX_SOCKET
    assert pair.kind is DatapathKind.COPY
    talk_to_the_end(rig, client, pair, server)


def test_mptcp_client_is_read_as_always(rig: Rig, maps: KernelMaps) -> None:
    # The worker does not even try (`is_plain_tcp`); were it to, the kernel refuses the socket.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
    outgoing, server = loopback_pair()
    pair = rig.between(client, accepted, outgoing, server)
    rig.join(pair)
    assert keys_in(maps.of[0].sockets_fd) == 1
    talk_to_the_end(rig, client, pair, server)


def test_pair_without_a_slot_stays_with_copy(rig: Rig) -> None:
    client, pair, server = rig.connect()
    slot, pair.slot = pair.slot, -1
    rig.copy(pair)
    assert rig.hand_over(pair) is PairReason.MAP_FULL
    pair.slot = slot
    talk_to_the_end(rig, client, pair, server)


def test_full_map_of_ends_leaves_the_pair_with_copy(rig: Rig, maps: KernelMaps) -> None:
    ends = bpf.Map(maps.of[0].owners_fd, key_bytes=8, value_bytes=8)
    fillers = [n.to_bytes(8, "little") for n in range(1 << 60, (1 << 60) + 2 * SLOTS)]
    # One place is left: the second end of the pair does not fit.
    for filler in fillers[1:]:
        ends.update(filler, bytes(8))
    client, pair, server = rig.connect()
    rig.copy(pair)
    assert rig.hand_over(pair) is PairReason.MAP_FULL
    assert keys_in(maps.of[0].owners_fd) == len(fillers) - 1
    ends.update(fillers[0], bytes(8))
    assert rig.hand_over(pair) is PairReason.MAP_FULL
    for filler in fillers:
        ends.delete(filler)
    talk_to_the_end(rig, client, pair, server)


@pytest.mark.parametrize("places", [0, 1])
def test_full_sockhash_loses_no_byte(rig: Rig, maps: KernelMaps, places: int) -> None:
    sockets = bpf.Map(maps.of[0].sockets_fd, key_bytes=8, value_bytes=8)
    fillers = [sock for _ in range(SLOTS) for sock in loopback_pair()]
    try:
        for sock in fillers[places:]:
            cookie = sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
            sockets.update(cookie, sock.fileno().to_bytes(8, "little"))
        client, pair, server = rig.connect()
        rig.copy(pair)
        # With one place the server's socket is in already: it stays, and the pair is native.
        expected = None if places else PairReason.MAP_FULL
        assert rig.hand_over(pair) is expected
        talk_to_the_end(rig, client, pair, server)
    finally:
        for sock in fillers:
            sock.close()


def test_half_closed_pair_is_not_taken(rig: Rig) -> None:
    client, pair, server = rig.connect()
    rig.copy(pair)
    client.shutdown(socket.SHUT_WR)
    rig.run_until(lambda: pair.up.phase is Phase.CLOSED, "FIN carried on")
    assert rig.hand_over(pair) is PairReason.HALF_CLOSED
    server.sendall(b"answer")
    server.shutdown(socket.SHUT_WR)
    reader = Reader("client", client)
    rig.finish(pair, reader)
    assert bytes(reader.data) == b"answer"


def test_fin_that_nobody_has_heard_of_yet_is_seen_at_the_join(rig: Rig) -> None:
    client, pair, server = rig.connect()
    rig.copy(pair)
    client.shutdown(socket.SHUT_WR)
    wait_for(lambda: received(pair.client).state != TCP_ESTABLISHED, "FIN")
    assert sockmap_of(rig).join(pair) is PairReason.HALF_CLOSED
    talk_from_server(rig, client, pair, server)


def talk_from_server(
    rig: Rig,
    client: socket.socket,
    pair: RigPair,
    server: socket.socket,
    *,
    heard: bytes = b"",
) -> None:
    """The client's side is closed: the server's bytes and its end still arrive."""
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    server.sendall(b"answer")
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader_c, reader_s)
    assert (bytes(reader_c.data), bytes(reader_s.data)) == (b"answer", heard)
    assert (reader_c.ended, reader_s.ended) == ("eof", "eof")


def test_unread_bytes_are_read_before_the_join(rig: Rig) -> None:
    client, pair, server = rig.connect()
    rig.copy(pair)
    client.sendall(b"not read yet")
    wait_for(lambda: received(pair.client).bytes_received == 12, "bytes")
    assert sockmap_of(rig).join(pair) is PairReason.UNREAD_BYTES
    assert pair.kind is DatapathKind.COPY
    assert rig.hand_over(pair) is None
    assert server.recv(100) == b"not read yet"
    talk_to_the_end(rig, client, pair, server)


def test_server_that_closes_before_its_insertion_leaves_the_pair_with_copy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, maps: KernelMaps
) -> None:
    client, pair, server = rig.connect()
    rig.copy(pair)
    assert pair.server is not None
    inside = pair.server

    def close_first(number: int) -> None:
        if number == 1:
            server.sendall(b"last words")
            server.shutdown(socket.SHUT_WR)
            wait_for(lambda: received(inside).state != TCP_ESTABLISHED, "FIN")

    update_that(rig, monkeypatch, close_first)
    assert sockmap_of(rig).join(pair) is PairReason.REFUSED_BY_KERNEL
    assert keys_in(maps.of[0].owners_fd) == 0
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader_c, reader_s)
    assert (bytes(reader_c.data), bytes(reader_s.data)) == (b"last words", b"request")


@pytest.mark.parametrize("words", [b"", b"last words"])
def test_client_that_closes_between_the_insertions_is_served_to_its_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    client, pair, server = rig.connect()
    rig.copy(pair)

    def close_between(number: int) -> None:
        if number == 2:
            client.sendall(words)
            client.shutdown(socket.SHUT_WR)
            server.sendall(b"banner")
            wait_for(lambda: received(pair.client).state != TCP_ESTABLISHED, "FIN")

    calls = update_that(rig, monkeypatch, close_between)
    assert sockmap_of(rig).join(pair) is None
    assert calls == [1, 2]
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    rig.run_until(lambda: reader_s.ended == "eof", "FIN at the server")
    server.sendall(b", answer")
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader_c, reader_s)
    assert (bytes(reader_s.data), bytes(reader_c.data)) == (words, b"banner, answer")


# Native mode: only the server's socket is in the map


NATIVE: Final = [
    "both ways in pieces",
    "slow server",
    "slow client",
    "both stalled",
    "half-close by the client",
    "half-close by the server",
    "fin behind a backlog",
    "lone fin beside a backlog",
    "lone fin of the server beside a backlog",
    "reset by the client",
    "reset by the server",
    "reset by a stalled reader",
    "queued before the join",
    "round trips",
    "both close at once",
]


@pytest.mark.parametrize("name", NATIVE)
def test_pair_whose_client_the_kernel_refused_does_the_same(
    name: str, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_the_client(number: int) -> None:
        if number == 2:
            raise OSError(errno.EOPNOTSUPP, "in CLOSE_WAIT, for all we know")

    calls = update_that(rig, monkeypatch, refuse_the_client)
    ALL[name](rig)
    assert calls == [1, 2]


def test_bytes_passed_just_before_it_sleeps_wake_the_worker(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody rings for them, because nobody sleeps yet: going to sleep has to look once more.
    def refuse_the_client(number: int) -> None:
        if number == 2:
            raise OSError(errno.EOPNOTSUPP, "")

    client, pair, server = rig.connect()
    rig.copy(pair)
    sockmap = sockmap_of(rig)
    update_that(rig, monkeypatch, refuse_the_client)
    fall_asleep = sockmap._sleep
    sent: list[bytes] = []

    def sleep_late(_pair: Pair, half: Half) -> bool:
        if not sent:
            sent.append(b"just now")
            server.sendall(sent[0])
            wait_for(lambda: word(rig, pair, table.PASSED, Direction.DOWN) == 8, "passed bytes")
        return fall_asleep(pair, half)

    monkeypatch.setattr(sockmap, "_sleep", sleep_late)
    assert sockmap.join(pair) is None
    reader = Reader("client", client)
    rig.run_until(lambda: bytes(reader.data) == b"just now", "the bytes")
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader)


def test_fin_is_not_carried_on_before_the_program_has_seen_the_last_byte(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tcp_fin() wakes epoll before the program runs for the packet that carried the FIN: TCP has
    # counted bytes then that are in nobody's count yet.
    client, pair, server = rig.connect()
    rig.join(pair)
    looks: list[Phase] = []

    def received_but_not_seen(sock: socket.socket) -> Received:
        looks.append(pair.up.phase)
        state, count = received(sock)
        return Received(state, count + (5 if len(looks) <= 2 else 0))

    monkeypatch.setattr(sockmap_directions, "received", received_but_not_seen)
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    rig.run_until(lambda: pair.up.phase is Phase.CLOSED, "FIN carried on")
    assert len(looks) >= 3
    assert set(looks) == {Phase.FIN_SEEN}
    monkeypatch.undo()
    talk_from_server(rig, client, pair, server, heard=b"last words")


def test_pair_whose_bytes_the_program_had_to_drop_is_reset(rig: Rig) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    # What trim() in redirect.c leaves behind: `lost` set beside `latched`, the bytes counted.
    rig.window.words32[pair.slot * rig.window.WORDS32 + table.LATCHED[Direction.UP]] = 1 << 16
    rig.window.words64[pair.slot * rig.window.WORDS64 + table.PASSED[Direction.UP]] += 5
    client.shutdown(socket.SHUT_WR)
    reader = Reader("server", server)
    rig.finish(pair, reader)
    assert (pair.reason, reader.ended) == (CloseReason.INTERNAL, "ConnectionResetError")


# Wakeups


def test_sockets_that_another_process_has_leave_the_sockhash(rig: Rig, maps: KernelMaps) -> None:
    """Closing ours would not take them out."""
    client, pair, server = rig.connect()
    rig.join(pair)
    pair.is_shared = True
    with contextlib.ExitStack() as stack:
        for fd in (pair.client_fd, pair.server_fd):
            stack.callback(os.close, os.dup(fd))
        rig.broken(pair, CloseReason.FLUSHED)
        assert keys_in(maps.of[0].sockets_fd) == 0
        rig.loop.run_once(0)  # which closes them
    assert ends_with_reset(client) == ends_with_reset(server) == b""


def test_wakeup_of_a_pair_that_has_ended_wakes_nobody(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    sockmap = sockmap_of(rig)
    advanced: list[object] = []
    advance = sockmap.advance

    def note(pair: Pair, half: Half) -> None:
        advanced.append(pair)
        advance(pair, half)

    monkeypatch.setattr(sockmap, "advance", note)
    slot = pair.slot
    records = [
        slot.to_bytes(4, "little") + bytes(4) + (pair.id - 1).to_bytes(8, "little"),
        (slot + 1).to_bytes(4, "little") + bytes(4) + pair.id.to_bytes(8, "little"),
    ]
    monkeypatch.setattr(sockmap._ring, "records", lambda: iter(records))
    sockmap._rung(None, sockmap._ring.fd, 1)
    assert advanced == []
    records[:] = [slot.to_bytes(4, "little") + bytes(4) + pair.id.to_bytes(8, "little")]
    sockmap._rung(None, sockmap._ring.fd, 1)
    assert advanced == [pair]
    monkeypatch.undo()
    talk_to_the_end(rig, client, pair, server)


def test_error_of_a_socket_is_its_sides_reset(rig: Rig) -> None:
    for sock_index, reason in ((0, CloseReason.CLIENT_RESET), (1, CloseReason.SERVER_RESET)):
        ends = rig.connect()
        client, pair, server = ends
        rig.join(pair)
        resetting = (client, server)[sock_index]
        resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        resetting.close()
        rig.run_until(lambda: pair.ended, "end of the pair")  # noqa: B023 - run now
        assert pair.reason is reason

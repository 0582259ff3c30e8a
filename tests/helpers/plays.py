"""Plays that every datapath must pass, beside those of the self-test, which has no time for them.

Each takes a rig and raises RigError when a byte or an ending is not as it would be without us.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Mapping
from typing import Final

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.proof.rig import Peer, Reader, Rig, RigPair, send_all
from pyforwarder.datapath.proof.scenarios import (
    SELF_TEST,
    Scenario,
    both_ways_in_pieces,
    bytes_of,
    expect,
    expect_bytes,
    flood_bytes,
    push_until_blocked,
    reset,
    send_rest,
    slow_reader,
    wait_readable,
)
from pyforwarder.datapath.tcp_info import received


def server_closes_first(rig: Rig) -> None:
    """`both_ways_in_pieces`, with the server's side ending long before the client's."""
    both_ways_in_pieces(rig, client_first=False)


def fin_with_data(rig: Rig) -> None:
    """A FIN right behind the bytes takes none of them along."""
    client, pair, server = rig.connect()
    rig.join(pair)
    upload = bytes_of(777_777, 5)
    reader = Reader("server", server)
    writer = Peer("client writes", lambda: send_all(client, upload, seed=6, then_close=True))
    rig.run_until(lambda: reader.ended != "" and not writer.is_alive(), "end of the upload")
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader)
    expect_bytes(reader.data, upload, "server")


def slow_client(rig: Rig) -> None:
    """`slow_reader`, for the download."""
    slow_reader(rig, upload=False)


def upload_past_a_flood(rig: Rig) -> None:
    """A client that does not read yet while it uploads to a server that floods it.

    In a direct connection the upload goes through: the server reads. What waits for the client
    must not stand in its way.
    """
    client, pair, server = rig.connect()
    rig.join(pair)
    upload, download = bytes_of(1 << 20, 10) * 24, bytes_of(1 << 20, 11) * 16
    flood = Peer("server floods", lambda: send_all(server, download, seed=12, then_close=True))
    # The flood first, until it blocks somewhere: then the upload has to get past it.
    quiet, before = 0, -1
    while quiet < 10:
        rig.loop.run_once(0.005)
        after = received(pair.server).bytes_received if pair.server is not None else 0
        quiet = quiet + 1 if after == before else 0
        before = after
    got = bytearray()
    enough = threading.Event()

    def read_slowly() -> None:
        # In bursts, so that the upload meets its limit again and again.
        while len(got) < len(upload):
            chunk = server.recv(1 << 18)
            expect(bool(chunk), f"upload ended after {len(got)} bytes")
            got.extend(chunk)
            enough.wait(0.001)

    sink = Peer("server reads", read_slowly)
    source = Peer("client uploads", lambda: send_all(client, upload, seed=13, then_close=True))
    rig.run_until(lambda: not sink.is_alive() and not source.is_alive(), "end of the upload")
    reader = Reader("client", client)
    rig.finish(pair, sink, source, flood, reader)
    expect_bytes(got, upload, "server")
    expect_bytes(reader.data, download, "client")


def both_stalled(rig: Rig) -> None:
    """Neither side reads while both send; when they do read, every byte arrives."""
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    upload, download = flood_bytes(21), flood_bytes(22)
    sent_up = push_until_blocked(rig, client, upload)
    sent_down = push_until_blocked(rig, server, download)
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    rig.finish(
        pair,
        *(reader_c, reader_s),
        send_rest("client writes", client, upload, sent_up),
        send_rest("server writes", server, download, sent_down),
    )
    expect_bytes(reader_s.data, upload, "server")
    expect_bytes(reader_c.data, download, "client")
    expect((reader_c.ended, reader_s.ended) == ("eof", "eof"), "an end was not orderly")


def _one_side_reads_first(
    rig: Rig,
    pair: RigPair,
    first: tuple[socket.socket, bytes, Peer],
    then: tuple[socket.socket, bytes, int],
) -> None:
    """`first` reads what `Peer` sends it to the end; only then the other side what is stalled.

    Of that `int` bytes have been sent so far.
    """
    busy, flowing, writer = first
    lazy, stalled, sent = then
    reader = Reader("busy side", busy)
    rig.run_until(lambda: reader.ended != "", "end of the direction that flows")
    expect_bytes(reader.data, flowing, "busy side")
    late = Reader("lazy side at last", lazy)
    rig.finish(pair, reader, writer, late, send_rest("busy side", busy, stalled, sent))
    expect_bytes(late.data, stalled, "lazy side")
    expect((reader.ended, late.ended) == ("eof", "eof"), "an end was not orderly")


def other_direction_goes_on(rig: Rig, *, stalled_download: bool = True) -> None:
    """While one direction stands still, the other carries all it is given, and its FIN."""
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    # `lazy` sends and never reads, until its own upload is through; `busy` reads all the time.
    lazy, busy = (client, server) if stalled_download else (server, client)
    stalled, flowing = flood_bytes(23), flood_bytes(24)[: 8 << 20]
    sent = push_until_blocked(rig, busy, stalled)
    writer = Peer("lazy side", lambda: send_all(lazy, flowing, seed=25, then_close=True))
    _one_side_reads_first(rig, pair, (busy, flowing, writer), (lazy, stalled, sent))


def upload_stalled_download_goes_on(rig: Rig) -> None:
    """The same with the other direction standing still."""
    other_direction_goes_on(rig, stalled_download=False)


def one_of_two_stalled_recovers(rig: Rig, *, upload: bool = True) -> None:
    """Both directions stand still; one reader wakes, and gets all while the other sleeps."""
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    lazy, busy = (client, server) if upload else (server, client)
    stalled, flowing = flood_bytes(30), flood_bytes(31)
    sent = push_until_blocked(rig, busy, stalled)
    moved = push_until_blocked(rig, lazy, flowing)
    writer = send_rest("lazy side", lazy, flowing, moved)
    _one_side_reads_first(rig, pair, (busy, flowing, writer), (lazy, stalled, sent))


def download_of_two_stalled_recovers(rig: Rig) -> None:
    """The same with the client waking up."""
    one_of_two_stalled_recovers(rig, upload=False)


def fin_behind_a_backlog(rig: Rig, *, upload: bool = True) -> None:
    """A sender that closes while its reader is stalled has sent all its bytes, and then the FIN."""
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    sender, receiver = (client, server) if upload else (server, client)
    data = flood_bytes(26)
    sent = push_until_blocked(rig, sender, data, gently=True)
    sender.shutdown(socket.SHUT_WR)
    for _ in range(3):
        rig.loop.run_once(0.01)
    reader = Reader("receiver", receiver)
    rig.run_until(lambda: reader.ended != "", "end of the flood")
    expect_bytes(reader.data, data[:sent], "receiver")
    expect(reader.ended == "eof", f"ended as {reader.ended}")
    receiver.sendall(b"thanks")
    receiver.shutdown(socket.SHUT_WR)
    answer = Reader("sender", sender)
    rig.finish(pair, reader, answer)
    expect_bytes(answer.data, b"thanks", "sender")


def lone_fin_beside_a_backlog(rig: Rig, *, by_client: bool = True) -> None:
    """A FIN without bytes arrives at a socket whose outgoing bytes are stalled, and harms none."""
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    closing, flooding = (client, server) if by_client else (server, client)
    data = flood_bytes(27)
    sent = push_until_blocked(rig, flooding, data, gently=True)
    closing.shutdown(socket.SHUT_WR)
    hears = Reader("flooding side", flooding)
    rig.run_until(lambda: hears.ended != "", "FIN at the flooding side")
    expect(hears.ended == "eof", f"the flooding side saw {hears.ended}")
    reader = Reader("closing side", closing)
    rig.finish(pair, hears, reader, send_rest("flooding side", flooding, data, sent))
    expect_bytes(reader.data, data, "closing side")
    expect(reader.ended == "eof", f"ended as {reader.ended}")


def lone_fin_of_the_server_beside_a_backlog(rig: Rig) -> None:
    """The same with the server closing."""
    lone_fin_beside_a_backlog(rig, by_client=False)


def reset_with_a_backlog(rig: Rig, *, by_client: bool = True) -> None:
    """A sender that resets while its reader is stalled: a reset behind a part of the bytes."""
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    sender, receiver = (client, server) if by_client else (server, client)
    data = flood_bytes(28)
    sent = push_until_blocked(rig, sender, data, gently=True)
    reset(sender)
    rig.run_until(lambda: pair.ended, "end of the pair")
    reader = Reader("receiver", receiver)
    rig.finish(pair, reader)
    expect(reader.ended == "ConnectionResetError", f"the receiver saw {reader.ended}")
    expect(len(reader.data) <= sent, "more bytes than were sent")
    expect_bytes(reader.data, data[: len(reader.data)], "receiver")


def reset_by_the_server_with_a_backlog(rig: Rig) -> None:
    """The same from the other side."""
    reset_with_a_backlog(rig, by_client=False)


def reset_by_a_stalled_reader(rig: Rig) -> None:
    """A reader that resets instead of reading: the sender sees it."""
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    push_until_blocked(rig, client, flood_bytes(29))
    reset(server)
    reader = Reader("client", client)
    rig.finish(pair, reader)
    expect(reader.ended == "ConnectionResetError", f"the client saw {reader.ended}")


def urgent_data(rig: Rig) -> None:
    """A byte sent as urgent stays where it stands in the stream, in both directions."""
    client, pair, server = rig.connect()
    rig.join(pair)
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    for sender, reader in ((client, reader_s), (server, reader_c)):
        sender.sendall(b"abc")
        sender.send(b"!", socket.MSG_OOB)
        sender.sendall(b"def")
        rig.run_until(lambda: len(reader.data) >= 7, "urgent byte and all")  # noqa: B023 - run now
        sender.send(b"?", socket.MSG_OOB)
        sender.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader_c, reader_s)
    expect_bytes(reader_s.data, b"abc!def?", "server")
    expect_bytes(reader_c.data, b"abc!def?", "client")


def nothing_at_all(rig: Rig) -> None:
    """Two FINs without a byte before them."""
    client, pair, server = rig.connect()
    rig.join(pair)
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    server.shutdown(socket.SHUT_WR)
    rig.run_until(lambda: reader_c.ended != "", "FIN at the client")
    client.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader_c, reader_s)
    expect((reader_c.ended, reader_s.ended) == ("eof", "eof"), "an end was not orderly")
    expect(not reader_c.data and not reader_s.data, "bytes out of nothing")


def both_close_at_once(rig: Rig) -> None:
    """Bytes and FINs cross each other."""
    client, pair, server = rig.connect()
    rig.join(pair)
    client.sendall(b"goodbye")
    server.sendall(b"farewell")
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    rig.finish(pair, reader_c, reader_s)
    expect_bytes(reader_s.data, b"goodbye", "server")
    expect_bytes(reader_c.data, b"farewell", "client")


def client_has_sent_fin_before_the_join(rig: Rig) -> None:
    """The kernel takes no socket in CLOSE_WAIT: the datapath says so, and all arrives."""
    client, pair, server = rig.connect()
    client.sendall(b"the whole request")
    client.shutdown(socket.SHUT_WR)
    wait_readable(pair, client_only=True)
    rig.copy(pair)
    reason = rig.hand_over(pair)
    expect(reason in (None, PairReason.HALF_CLOSED), f"refused the pair: {reason}")
    reader_s = Reader("server", server)
    rig.run_until(lambda: reader_s.ended != "", "FIN at the server")
    server.sendall(b"the whole answer")
    server.shutdown(socket.SHUT_WR)
    reader_c = Reader("client", client)
    rig.finish(pair, reader_c, reader_s)
    expect_bytes(reader_s.data, b"the whole request", "server")
    expect_bytes(reader_c.data, b"the whole answer", "client")


def at_random(rig: Rig, *, seed: int) -> None:
    """Sizes, pauses, the moment of the handover and who closes first, all from one seed."""
    source = random.Random(seed)
    client, pair, server = rig.connect()
    sizes = [source.choice((0, 1, 1000, 100_000, 2_000_000)) for _ in range(2)]
    upload, download = bytes_of(sizes[0], seed + 1), bytes_of(sizes[1], seed + 2)
    rig.copy(pair)
    reads_late = source.random() < 0.3
    readers = [] if reads_late else [Reader("client", client), Reader("server", server)]
    writers = (
        Peer("client writes", lambda: send_all(client, upload, seed=seed, then_close=True)),
        Peer("server writes", lambda: send_all(server, download, seed=seed + 3, then_close=True)),
    )
    for _ in range(source.randrange(6)):
        rig.loop.run_once(0.002)
    reason = None if pair.ended else rig.hand_over(pair)
    # Both peers close when they are done: the kernel refuses a socket whose FIN has come since the
    # datapath looked. The pair then stays with copy, and all of it has to arrive all the same.
    closing = (PairReason.HALF_CLOSED, PairReason.UNREAD_BYTES, PairReason.REFUSED_BY_KERNEL)
    expect(reason is None or reason in closing, f"refused the pair: {reason}")
    for _ in range(source.randrange(6)):
        rig.loop.run_once(0.002)
    if reads_late:
        readers = [Reader("client", client), Reader("server", server)]
    rig.finish(pair, *readers, *writers)
    expect_bytes(readers[1].data, upload, "server")
    expect_bytes(readers[0].data, download, "client")
    expect({reader.ended for reader in readers} == {"eof"}, "an end was not orderly")


def round_trips(rig: Rig, *, count: int = 200) -> None:
    """Small messages there and back, one at a time."""
    client, pair, server = rig.connect()
    rig.join(pair)

    def answer() -> None:
        while chunk := server.recv(64):
            server.sendall(chunk)
        server.shutdown(socket.SHUT_WR)

    def ask() -> None:
        for number in range(count):
            message = b"%064d" % number
            client.sendall(message)
            got = b""
            while len(got) < 64:
                chunk = client.recv(64 - len(got))
                expect(bool(chunk), "connection ended early")
                got += chunk
            expect_bytes(got, message, "client")
        client.shutdown(socket.SHUT_WR)
        expect(client.recv(1) == b"", "bytes after the end")

    rig.finish(pair, Peer("server", answer), Peer("client", ask))


# What the conformance suite runs for every datapath.
ALL: Final[Mapping[str, Scenario]] = {
    **SELF_TEST,
    "server closes first": server_closes_first,
    "fin with data": fin_with_data,
    "slow client": slow_client,
    "round trips": round_trips,
    "upload past a flood": upload_past_a_flood,
    "both stalled": both_stalled,
    "upload goes on beside a stalled download": other_direction_goes_on,
    "download goes on beside a stalled upload": upload_stalled_download_goes_on,
    "upload of two stalled recovers": one_of_two_stalled_recovers,
    "download of two stalled recovers": download_of_two_stalled_recovers,
    "fin behind a backlog": fin_behind_a_backlog,
    "lone fin beside a backlog": lone_fin_beside_a_backlog,
    "lone fin of the server beside a backlog": lone_fin_of_the_server_beside_a_backlog,
    "reset by the client with a backlog": reset_with_a_backlog,
    "reset by the server with a backlog": reset_by_the_server_with_a_backlog,
    "reset by a stalled reader": reset_by_a_stalled_reader,
    "urgent data": urgent_data,
    "nothing at all": nothing_at_all,
    "both close at once": both_close_at_once,
    "client has sent fin before the join": client_has_sent_fin_before_the_join,
}

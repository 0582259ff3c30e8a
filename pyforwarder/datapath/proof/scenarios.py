"""What a datapath must do before it is used, as short plays with real sockets: its self-test.

Each takes a rig and raises RigError when a byte or an ending is not as it would be without us.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Final

from pyforwarder.datapath.proof.rig import Peer, Reader, Rig, RigError, RigPair, send_all

# More than four sockets with small buffers and the datapath hold, so that a sender must block.
FLOOD_BYTES: Final = 12 << 20
SLOW_LIMIT_BYTES: Final = 256 << 10


def expect(condition: bool, message: str) -> None:
    """Raise RigError unless the condition holds."""
    if not condition:
        raise RigError(message)


def expect_bytes(got: bytes | bytearray, sent: bytes, who: str) -> None:
    """Raise RigError unless both are the same; says where they part."""
    if got == sent:
        return
    same = next(
        (n for n, (a, b) in enumerate(zip(got, sent, strict=False)) if a != b),
        min(len(got), len(sent)),
    )
    raise RigError(f"{who} got {len(got)} of {len(sent)} bytes, the first {same} right")


def bytes_of(size: int, seed: int) -> bytes:
    """Bytes that repeat nowhere nearby, so that a doubled or moved piece shows."""
    return random.Random(seed).randbytes(size)


def queued_before_the_join(rig: Rig) -> None:
    """What both peers sent before anybody read is delivered once, and first."""
    client, pair, server = rig.connect()
    client.sendall(b"request")
    server.sendall(b"banner")
    wait_readable(pair)
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    rig.join(pair)
    client.sendall(b" and more")
    client.shutdown(socket.SHUT_WR)
    server.sendall(b" and more")
    server.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader_c, reader_s)
    expect_bytes(reader_s.data, b"request and more", "server")
    expect_bytes(reader_c.data, b"banner and more", "client")


def both_ways_in_pieces(rig: Rig, *, client_first: bool = True, size: int = 3 << 20) -> None:
    """Random pieces in both directions at once; each side half-closes when it has sent all."""
    client, pair, server = rig.connect()
    upload, download = bytes_of(size, 1), bytes_of(size // 2 if client_first else size * 2, 2)
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    rig.join(pair)
    writers = (
        Peer("client writes", lambda: send_all(client, upload, seed=3, then_close=True)),
        Peer("server writes", lambda: send_all(server, download, seed=4, then_close=True)),
    )
    rig.finish(pair, reader_c, reader_s, *writers)
    expect_bytes(reader_s.data, upload, "server")
    expect_bytes(reader_c.data, download, "client")
    expect((reader_c.ended, reader_s.ended) == ("eof", "eof"), "an end was not orderly")
    expect(pair.reason is None, f"ended as {pair.reason}")


def joined_in_mid_stream(rig: Rig) -> None:
    """The handover happens while both sides send as fast as they can."""
    client, pair, server = rig.connect()
    reader_c, reader_s = Reader("client", client), Reader("server", server)
    rig.copy(pair)
    handed_over = threading.Event()
    sent: dict[str, bytearray] = {"up": bytearray(), "down": bytearray()}

    def send(sock: socket.socket, name: str, seed: int) -> None:
        source = random.Random(seed)
        after = 0
        while after < 20:
            chunk = source.randbytes(source.choice((1, 100, 1461, 20_000)))
            sent[name] += chunk
            sock.sendall(chunk)
            after += handed_over.is_set()
        sock.shutdown(socket.SHUT_WR)

    writers = (
        Peer("client writes", lambda: send(client, "up", 8)),
        Peer("server writes", lambda: send(server, "down", 9)),
    )
    rig.run_until(lambda: len(reader_c.data) > 200_000 < len(reader_s.data), "bytes both ways")
    reason = rig.hand_over(pair)
    handed_over.set()
    expect(reason is None, f"refused the pair: {reason.text if reason else ''}")
    rig.finish(pair, reader_c, reader_s, *writers)
    expect_bytes(reader_s.data, bytes(sent["up"]), "server")
    expect_bytes(reader_c.data, bytes(sent["down"]), "client")
    expect(pair.reason is None, f"ended as {pair.reason}")


def half_closed_goes_on(rig: Rig, *, client_closes: bool = True) -> None:
    """After a FIN in one direction the other still works, message by message."""
    client, pair, server = rig.connect()
    rig.join(pair)
    closing, talking = (client, server) if client_closes else (server, client)
    closing.sendall(b"last words")
    closing.shutdown(socket.SHUT_WR)
    heard = Reader("talking side", talking)
    listener = Reader("closing side", closing)
    rig.run_until(lambda: heard.ended == "eof", "FIN at the other side")
    expect_bytes(heard.data, b"last words", "talking side")
    sent = b""
    for number in range(5):
        message = b"message %d;" % number
        sent += message
        talking.sendall(message)
        rig.run_until(lambda: len(listener.data) >= len(sent), "message")  # noqa: B023 - run now
    talking.shutdown(socket.SHUT_WR)
    rig.finish(pair, heard, listener)
    expect_bytes(listener.data, sent, "closing side")
    expect(listener.ended == "eof", f"ended as {listener.ended}")


def half_closed_by_the_server(rig: Rig) -> None:
    """The same with the server closing its side first."""
    half_closed_goes_on(rig, client_closes=False)


def flood_bytes(seed: int) -> bytes:
    """Enough that no pair of stalled sockets takes it all."""
    return random.Random(seed).randbytes(FLOOD_BYTES)


def push_until_blocked(
    rig: Rig, sender: socket.socket, data: bytes, *, gently: bool = False
) -> int:
    """Send for a reader that does not read, until nothing is taken any more; how many were taken.

    As fast as possible, a direction soon holds more than its limit. Gently, in pieces that the
    target's TCP can take while it has room, what no longer fits stays with the datapath.

    Raises:
        RigError: all of them were.
    """
    sent = 0
    sender.setblocking(False)
    quiet = 0
    piece = 1 << 15 if gently else 1 << 18
    # Blocked means: nothing was taken for 20 looks of 5 ms in which the loop could run.
    while quiet < 20 and sent < len(data):
        try:
            sent += sender.send(memoryview(data)[sent : sent + piece])
            quiet = 0
        except BlockingIOError:
            quiet += 1
        rig.loop.run_once(0.005 if quiet else 0.0005 if gently else 0)
    expect(sent < len(data), f"took all {len(data)} bytes for a reader that never read")
    sender.setblocking(True)
    return sent


def send_rest(name: str, sender: socket.socket, data: bytes, sent: int) -> Peer:
    """In a thread: what was not taken yet, and a FIN."""
    rest = memoryview(data)[sent:]

    def act() -> None:
        sender.sendall(rest)
        sender.shutdown(socket.SHUT_WR)

    return Peer(name, act)


def slow_reader(rig: Rig, *, upload: bool = True) -> None:
    """A reader that does not read blocks the sender after a bounded amount, and loses nothing."""
    client, pair, server = rig.connect(small_buffers=True)
    rig.join(pair)
    sender, receiver = (client, server) if upload else (server, client)
    data = flood_bytes(7)
    sent = push_until_blocked(rig, sender, data)
    reader = Reader("receiver", receiver)
    writer = send_rest("sender", sender, data, sent)
    rig.run_until(lambda: reader.ended != "" and not writer.is_alive(), "end of the flood")
    receiver.shutdown(socket.SHUT_WR)
    rig.finish(pair, reader, writer)
    expect_bytes(reader.data, data, "receiver")
    expect(reader.ended == "eof", f"ended as {reader.ended}")


def reset(sock: socket.socket) -> None:
    """Close with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def reset_by_a_peer(rig: Rig, *, by_client: bool = True) -> None:
    """A reset on one side is a reset on the other, never an EOF."""
    client, pair, server = rig.connect()
    rig.join(pair)
    resetting, other = (client, server) if by_client else (server, client)
    resetting.sendall(b"some bytes")
    reader = Reader("other side", other)
    rig.run_until(lambda: len(reader.data) == 10, "bytes before the reset")
    reset(resetting)
    rig.finish(pair, reader)
    expect(reader.ended == "ConnectionResetError", f"the other side saw {reader.ended}")


def reset_by_the_server(rig: Rig) -> None:
    """The same from the other side."""
    reset_by_a_peer(rig, by_client=False)


def wait_readable(pair: RigPair, *, client_only: bool = False) -> None:
    for fd in (pair.client_fd,) if client_only else (pair.client_fd, pair.server_fd):
        poll = select.poll()  # select(2) knows no descriptor above 1023
        poll.register(fd, select.POLLIN)
        if not poll.poll(5000):
            raise RigError("loopback did not deliver")


Scenario = Callable[[Rig], None]

# What `up` and `doctor` run before they trust a datapath: a fraction of a second.
SELF_TEST: Final[Mapping[str, Scenario]] = {
    "queued before the join": queued_before_the_join,
    "both ways in pieces": both_ways_in_pieces,
    "joined in mid-stream": joined_in_mid_stream,
    "slow server": slow_reader,
    "half-close by the client": half_closed_goes_on,
    "half-close by the server": half_closed_by_the_server,
    "reset by the client": reset_by_a_peer,
    "reset by the server": reset_by_the_server,
}

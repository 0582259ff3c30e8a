"""A retransmission that begins with bytes already received must not double them.

TCP queues such a packet whole (net/ipv4/tcp_input.c, tcp_data_queue(), "Partial packet"); recv()
skips the old bytes, the sockmap's tcp_read_skb() does not. Seen in heavy uploads as one doubled
segment in every some gigabytes; here the packet is made by hand, so it happens every time.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from pyforwarder.datapath import table
from pyforwarder.datapath.kernel import KernelMaps, PairTable
from pyforwarder.datapath.rig import Reader, Rig

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_TIMESTAMP = 19, 20, 21, 24
RECV_QUEUE, SEND_QUEUE = 1, 2
REPAIR_OFF_NO_WINDOW_PROBE = -1
SLOTS = 16


def _sequence_numbers(sock: socket.socket) -> tuple[int, int]:
    """The next sequence numbers to send and to receive (tcp(7) has nothing; net/ipv4/tcp.c)."""
    numbers = []
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    for queue in (SEND_QUEUE, RECV_QUEUE):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        numbers.append(sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WINDOW_PROBE)
    return numbers[0], numbers[1]


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2]))
    if len(data) % 2:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def send_again(sock: socket.socket, old: bytes, new: bytes, *, fin: bool = False) -> None:
    """One segment as if from `sock`: its last bytes once more, then new ones, or a FIN."""
    next_send, next_receive = _sequence_numbers(sock)
    (source, sport), (target, dport) = sock.getsockname(), sock.getpeername()
    now = sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & 0xFFFFFFFF
    options = b"\1\1\x08\x0a" + struct.pack("!II", now, 0)
    flags = (5 + len(options) // 4) << 12 | 0x018 | fin  # ACK and PSH
    seq = (next_send - len(old)) & 0xFFFFFFFF
    head = struct.pack("!HHIIHHHH", sport, dport, seq, next_receive, flags, 512, 0, 0) + options
    payload = old + new
    pseudo = socket.inet_aton(source) + socket.inet_aton(target)
    pseudo += struct.pack("!HH", socket.IPPROTO_TCP, len(head) + len(payload))
    head = head[:16] + struct.pack("!H", _checksum(pseudo + head + payload)) + head[18:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(head + payload, (target, 0))


@pytest.fixture
def maps() -> Iterator[KernelMaps]:
    loaded = KernelMaps.load(workers=1, slots=SLOTS)
    yield loaded
    loaded.close()


@pytest.fixture
def rig(maps: KernelMaps) -> Iterator[Rig]:
    table = PairTable(workers=1, slots=SLOTS, fd=maps.pairs_fd)
    made = Rig(table.take_window(0))
    made.datapath = maps.datapath(made, made.window, 0)
    yield made
    made.close()


@pytest.mark.parametrize("size", [10, 4095, 4096, 60_000])
@pytest.mark.parametrize("armed", [True, False], ids=["redirected", "passed"])
def test_bytes_that_come_again_are_delivered_once(rig: Rig, size: int, armed: bool) -> None:
    client, pair, server = rig.connect()
    rig.join(pair)
    if not armed:
        rig.window.halves[pair.slot * rig.window.HALVES + table.ARMED[0]] = 0
    reader = Reader("server", server)
    first, old, new = os.urandom(500), os.urandom(size), os.urandom(100)
    client.sendall(first + old)
    rig.run_until(lambda: len(reader.data) == len(first + old), "first bytes")
    send_again(client, old[-min(size, 60_000) :], new)
    rig.run_until(lambda: len(reader.data) >= len(first + old + new), "new bytes")
    assert bytes(reader.data) == first + old + new


@pytest.mark.parametrize("size", [1, 10, 5000])
@pytest.mark.parametrize("armed", [True, False], ids=["redirected", "passed"])
def test_bytes_that_come_again_with_a_fin_end_the_direction(
    rig: Rig, size: int, armed: bool
) -> None:
    """TCP joins a lost FIN and what was not acknowledged before it (tcp_retrans_try_collapse)."""
    client, pair, server = rig.connect()
    rig.join(pair)
    if not armed:
        rig.window.halves[pair.slot * rig.window.HALVES + table.ARMED[0]] = 0
    reader = Reader("server", server)
    first, old = os.urandom(500), os.urandom(size)
    client.sendall(first + old)
    rig.run_until(lambda: len(reader.data) == len(first + old), "first bytes")
    send_again(client, old, b"", fin=True)
    rig.run_until(lambda: bool(reader.ended), "the end")
    assert (bytes(reader.data), reader.ended) == (first + old, "eof")
    assert pair.reason is None

"""TCP segments made by hand, as if a socket had sent them."""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Final

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_TIMESTAMP = 19, 20, 21, 24
_RECV_QUEUE, _SEND_QUEUE = 1, 2
_REPAIR_OFF_NO_WINDOW_PROBE: Final = -1
_SIOCGIFHWADDR: Final = 0x8927  # linux/sockios.h
FIN, PSH, ACK = 0x01, 0x08, 0x10


def sequence_numbers(sock: socket.socket) -> tuple[int, int]:
    """The next sequence numbers to send and to receive (tcp(7) has nothing; net/ipv4/tcp.c)."""
    numbers = []
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    for queue in (_SEND_QUEUE, _RECV_QUEUE):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        numbers.append(sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, _REPAIR_OFF_NO_WINDOW_PROBE)
    return numbers[0], numbers[1]


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2]))
    if len(data) % 2:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def segment(
    sock: socket.socket, *, again: bytes = b"", new: bytes = b"", flags: int = ACK
) -> bytes:
    """One of IPv4: the last bytes that `sock` has sent once more, then new ones.

    It acknowledges all that `sock` has got, and has timestamps.
    """
    next_send, next_receive = sequence_numbers(sock)
    (source, sport), (target, dport) = sock.getsockname(), sock.getpeername()
    now = sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & 0xFFFFFFFF
    options = b"\1\1\x08\x0a" + struct.pack("!II", now, 0)
    word = (5 + len(options) // 4) << 12 | flags
    seq = (next_send - len(again)) & 0xFFFFFFFF
    head = struct.pack("!HHIIHHHH", sport, dport, seq, next_receive, word, 512, 0, 0) + options
    payload = again + new
    pseudo = socket.inet_aton(source) + socket.inet_aton(target)
    pseudo += struct.pack("!HH", socket.IPPROTO_TCP, len(head) + len(payload))
    return head[:16] + struct.pack("!H", _checksum(pseudo + head + payload)) + head[18:] + payload


def send_by_interface(sock: socket.socket, data: bytes, *, out: str, into: str) -> None:
    """A segment of `sock` comes in at interface `into`, whose wire's other end is `out`.

    Both are of the namespace that we are in, which need not be that of `sock`.
    """
    source, target = (
        socket.inet_aton(name[0]) for name in (sock.getsockname(), sock.getpeername())
    )
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 0, 0, 64, socket.IPPROTO_TCP, 0)
    head += source + target
    head = head[:10] + struct.pack("!H", _checksum(head)) + head[12:]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        request = struct.pack("=16s24x", into.encode())
        hardware = fcntl.ioctl(raw.fileno(), _SIOCGIFHWADDR, request)[18:24]
        raw.bind((out, 0))
        raw.send(hardware + bytes(6) + struct.pack("!H", 0x0800) + head + data)

"""Datagrams of one session that come one behind the other, sent on by one system call.

A run has datagrams of one size, of which the last may be shorter: the kernel cuts it up again,
below everything that a single datagram has to pass (UDP_SEGMENT: udp(7), linux/udp.h). It is of
what is read of a socket at once, so nothing waits for more to come.

A server that sends so, as those of QUIC do, is received so: what came as one comes as one, with the
size of its datagrams beside it (UDP_GRO). Where they came one by one they are received one by one.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Final

MOST_DATAGRAM_BYTES: Final = 65535
# UDP_MAX_SEGMENTS of older kernels; what fits into one IP packet with its headers.
MOST_SEGMENTS: Final = 64
_MOST_BYTES: Final = 65_000
# What says that these datagrams have to be sent one by one: larger than the path takes, or a device
# that cannot (udp_send_skb of net/ipv4/udp.c).
UNSEGMENTED: Final = frozenset({errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP})

_UDP_SEGMENT: Final = 103  # linux/udp.h
_UDP_GRO: Final = 104
_SEGMENT: Final = struct.Struct("=H")
_GRO: Final = struct.Struct("@Niii")  # struct cmsghdr, and the size of each
GRO_BYTES: Final = socket.CMSG_SPACE(4)

Ancillary = tuple[int, int, bytes]


def end_of_run(datagrams: Sequence[memoryview], first: int, most_segment: int) -> int:
    """Where the run that begins with the first ends; datagrams longer than that go alone."""
    size = len(datagrams[first])
    if not 0 < size <= most_segment:
        return first + 1
    most = min(MOST_SEGMENTS, _MOST_BYTES // size)
    for at in range(first + 1, min(first + most, len(datagrams))):
        other = len(datagrams[at])
        if other != size:
            return at + 1 if 0 < other < size else at
    return min(first + max(most, 1), len(datagrams))


def size_of_run(datagrams: Sequence[memoryview]) -> int:
    """How many bytes a run has."""
    return len(datagrams[0]) * (len(datagrams) - 1) + len(datagrams[-1])


def send_segments(
    sock: socket.socket,
    datagrams: Sequence[memoryview],
    ancillary: Sequence[Ancillary] = (),
    name: tuple[str, int] | tuple[str, int, int, int] | None = None,
) -> None:
    """Send a run.

    Raises:
        OSError: none of them was sent; `UNSEGMENTED` has the errors of what may go one by one.
    """
    segment = (socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT.pack(len(datagrams[0])))
    if name is None:
        sock.sendmsg(datagrams, [*ancillary, segment])
    else:
        sock.sendmsg(datagrams, [*ancillary, segment], 0, name)


def want_runs(sock: socket.socket) -> None:
    """Have datagrams that come together received together: the reader must ask `cut`."""
    sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)


def cut(received: Sequence[memoryview], controls: Sequence[bytes]) -> list[memoryview]:
    """The datagrams of what was received, by the control messages that came with it."""
    datagrams = []
    for data, control in zip(received, controls, strict=True):
        size = 0
        if len(control) >= _GRO.size:
            _, level, kind, size = _GRO.unpack_from(control)
            if (level, kind) != (socket.IPPROTO_UDP, _UDP_GRO):
                size = 0
        if 0 < size < len(data):
            datagrams += [data[at : at + size] for at in range(0, len(data), size)]
        else:
            datagrams.append(data)
    return datagrams

"""Datagrams of one session that come one behind the other, sent on by one system call.

A run has datagrams of one size, of which the last may be shorter: the kernel cuts it up again,
below everything that a single datagram has to pass (UDP_SEGMENT: udp(7), linux/udp.h). It holds
what is read of a socket at once, so nothing waits for more to come.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyforwarder.worker.udp.session import Session

MOST_DATAGRAM_BYTES: Final = 65535
# UDP_MAX_SEGMENTS of older kernels; what fits into one IP packet with its headers.
MOST_SEGMENTS: Final = 64
_MOST_BYTES: Final = 65_000
# What says that these datagrams have to be sent one by one: larger than the path takes, or a device
# that cannot (udp_send_skb of net/ipv4/udp.c).
UNSEGMENTED: Final = frozenset({errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP})

_UDP_SEGMENT: Final = 103  # linux/udp.h
_SEGMENT: Final = struct.Struct("=H")

Ancillary = tuple[int, int, bytes]


class Run:
    """What has been received and not been sent on yet."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_MOST_BYTES + MOST_DATAGRAM_BYTES))
        self.session: Session | None = None
        self.size = 0  # of each datagram but the last
        self.count = 0
        self._end = 0
        self._received_at = 0
        self._is_closed = False  # the last is shorter

    @property
    def room(self) -> memoryview:
        """Where the next datagram is received to."""
        return self._buffer[self._end :]

    def received(self, size: int) -> memoryview:
        """The datagram that has been received there; it stays until the next is received."""
        self._received_at = self._end
        return self._buffer[self._end : self._end + size]

    @property
    def data(self) -> memoryview:
        """All datagrams of the run."""
        return self._buffer[: self._end]

    def datagrams(self) -> list[memoryview]:
        """One by one."""
        return [self.data[at : at + self.size] for at in range(0, self._end, self.size)]

    def goes_on(self, session: Session, size: int) -> bool:
        """Whether what has been received goes on with the run; it is part of it then."""
        if (
            session is not self.session
            or not 0 < size <= self.size
            or self._is_closed
            or self.count == MOST_SEGMENTS
            or self._end + size > _MOST_BYTES
        ):
            return False
        self.count += 1
        self._end += size
        self._is_closed = size < self.size
        return True

    def begin(self, session: Session, size: int) -> None:
        """What has been received begins a run; the one before has been sent."""
        at = self._received_at
        if at:
            self._buffer[:size] = self._buffer[at : at + size]
        self.session, self.size, self.count, self._end = session, size, 1, size
        self._is_closed = False

    def clear(self) -> None:
        """It has been sent."""
        self.session = None
        self.count = self._end = 0


def send_segments(
    sock: socket.socket,
    run: Run,
    ancillary: Sequence[Ancillary] = (),
    name: tuple[str, int] | tuple[str, int, int, int] | None = None,
) -> None:
    """Send all datagrams of a run.

    Raises:
        OSError: none of them was sent; `UNSEGMENTED` has the errors of what may go one by one.
    """
    segment = (socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT.pack(run.size))
    if name is None:
        sock.sendmsg([run.data], [*ancillary, segment])
    else:
        sock.sendmsg([run.data], [*ancillary, segment], 0, name)

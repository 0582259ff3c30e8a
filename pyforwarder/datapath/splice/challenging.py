"""Reset the peers of connections that a failed machine had, and that no machine can continue.

Their sequence numbers are not known, so no valid RST can be sent to them. But a peer answers a SYN
for an established connection with a challenge acknowledgement that has the expected number (RFC
5961, 4). That arrives at this host, where no such connection exists, and the kernel resets it with
the right number. A peer that has sent a segment in the meantime got the same RST.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.splice.keepalive import checksum, raw_sockets

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.stays import Connection

# Pauses between the tries, which are 0, 0.25, 1, 3, 9 and 27 s after the addresses have come. A
# challenge may have been spent on another packet half a second ago; neighbours, or a switch, may
# learn late where the addresses are; duplicate address detection (DAD) may still run for an IPv6
# address; and Linux before 6.0 sends a thousand challenges per second. It cannot be seen from here
# whether a peer is gone; a peer that is, or has another connection by now, is not harmed.
_PAUSES_S: Final = (0.0, 0.25, 0.75, 2.0, 6.0, 18.0)
_AT_ONCE: Final = 64
# The most connections that wait, for all tries together; a record is some 200 bytes.
_MOST: Final = 1 << 18
_SYN, _ACK = 0x02, 0x10
_HOPS: Final = 64


class _Due(NamedTuple):
    when_s: float
    connection: Connection


class Challenges:
    """The challenges of one keeper."""

    def __init__(
        self,
        is_ours: Callable[[Connection], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        send: Callable[[Connection], None] | None = None,
    ) -> None:
        """`is_ours` says whether a connection continues on this machine after all."""
        self._is_ours = is_ours
        self._clock = clock
        self._raw: dict[int, socket.socket] | None = None
        self._send = send or self._send_syn
        # One queue per try, each ordered by time.
        self._due: tuple[deque[_Due], ...] = tuple(deque() for _ in _PAUSES_S)

    def begin(self, connections: Iterable[Connection]) -> None:
        """Start resetting the peers of these connections."""
        now_s = self._clock()
        room = _MOST - sum(map(len, self._due))
        self._due[0].extend(_Due(now_s, one) for one in islice(connections, max(0, room)))

    def wait_s(self, most_s: float) -> float:
        """Seconds until `run_due` is due."""
        first_s = min((queue[0].when_s for queue in self._due if queue), default=None)
        return most_s if first_s is None else min(most_s, max(0.0, first_s - self._clock()))

    def run_due(self) -> None:
        """Do some of what is due."""
        now_s = self._clock()
        left = _AT_ONCE
        for number, queue in enumerate(self._due):
            while left and queue and queue[0].when_s <= now_s:
                left -= 1
                _, one = queue.popleft()
                if self._is_ours(one):
                    continue
                self._send(one)
                if number + 1 < len(self._due):
                    self._due[number + 1].append(_Due(now_s + _PAUSES_S[number + 1], one))

    def _send_syn(self, one: Connection) -> None:
        """Never raises: what cannot be sent is tried again."""
        if self._raw is None:
            self._raw = raw_sockets()
        raw = self._raw.get(4 if len(one.own.ip) == 4 else 6)
        if raw is None:
            return
        try:
            target = socket.inet_ntop(
                socket.AF_INET if len(one.peer.ip) == 4 else socket.AF_INET6, one.peer.ip
            )
            raw.sendto(packet(one, secrets.randbits(32)), socket.MSG_DONTWAIT, (target, 0))
        except OSError:
            pass  # no route, or this host's firewall


def packet(one: Connection, seq: int) -> bytes:
    """A SYN to a server, or a SYN-ACK to a client, with its IP header.

    Conntrack on its path takes that for a retransmission: a SYN from the end that was connected to
    would be invalid.
    """
    flags = _SYN | _ACK if one.peer_connected else _SYN
    segment = struct.pack(
        "!HHIIBBHHH", one.own.port, one.peer.port, seq, 0, 5 << 4, flags, 1024, 0, 0
    )
    own, peer = one.own.ip, one.peer.ip
    pseudo = own + peer + struct.pack("!II", len(segment), socket.IPPROTO_TCP)
    segment = segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]
    if len(own) == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, _HOPS, socket.IPPROTO_TCP, 0)
    else:
        head = struct.pack("!IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, _HOPS)
    return head + own + peer + segment

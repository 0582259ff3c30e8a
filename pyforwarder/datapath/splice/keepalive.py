"""Keepalives to silent peers of spliced pairs: the keeper's part.

A mute socket sends no keepalives of its own, and would not receive the answers. So the programs
record when the last packet of each peer came (`last_received_s`), and the keeper probes in our
socket's name: with an empty segment at an old sequence number (RFC 9293, 3.8.4), which any TCP
answers. `egress` writes its numbers. Keepalives of the two ends pass from one to the other; where
they are frequent enough, no peer is probed.

If a peer does not answer, the pair is reset, so that the other end learns of it.
"""

from __future__ import annotations

import ctypes
import heapq
import mmap
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Final

from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice.abi import (
    PROBE,
    SPLICE_BYTES,
    ResetBy,
    Splice,
    SpliceDirection,
    SpliceState,
)
from pyforwarder.runtime.one_store import store32

_PAIRS_AT_ONCE: Final = 64
_GIVEN_UP: Final = {Direction.UP: ResetBy.CLIENT_TIMEOUT, Direction.DOWN: ResetBy.SERVER_TIMEOUT}
_DIRECTION_BYTES: Final = ctypes.sizeof(SpliceDirection)
_WORD: Final = struct.Struct("=I")
_ACK: Final = 0x10
_TIMESTAMP: Final = 0x0101080A  # no-op, no-op, kind 8, 10 bytes
_HOPS: Final = 64
_IP_PKTINFO: Final = 8  # linux/in.h
_IPV6_PKTINFO: Final = 50  # linux/in6.h


class Keepalives:
    """The keepalives of all pairs of one keeper."""

    def __init__(self, memory: mmap.mmap, end: Callable[[int, ResetBy], None]) -> None:
        """`memory` has the records; `end` resets a pair."""
        self._memory = memory
        self._end = end
        self._due: list[tuple[float, int, int]] = []  # a heap: when, record, pair
        # (record, direction) -> (`last_received_s`, probes since then).
        self._asked: dict[tuple[int, Direction], tuple[int, int]] = {}
        self._raw = raw_sockets()

    def watch(self, indexes: Iterable[int]) -> None:
        """Start keepalives to the peers of these records, if they are configured."""
        for index in indexes:
            record = self._record(index)
            if record.keep_idle_s and self._raw:
                # The number of probes by an earlier keeper is not known.
                heapq.heappush(self._due, (time.monotonic() + 1.0, index, record.id))

    def run_due(self) -> None:
        """Probe the peers that are due. Never raises."""
        now_s = time.monotonic()
        for _ in range(_PAIRS_AT_ONCE):
            if not self._due or self._due[0][0] > now_s:
                return
            _, index, pair_id = heapq.heappop(self._due)
            next_s = self._check(index, pair_id, now_s)
            if next_s is not None:
                heapq.heappush(self._due, (next_s, index, pair_id))

    def wait_s(self, most_s: float) -> float:
        """Seconds until `run_due` is due."""
        if not self._due:
            return most_s
        return min(most_s, max(0.0, self._due[0][0] - time.monotonic()))

    def _check(self, index: int, pair_id: int, now_s: float) -> float | None:
        """When to check a pair again; None: it is gone."""
        record = self._record(index)
        if record.state != SpliceState.ACTIVE or record.id != pair_id or record.reset:
            for direction in Direction:
                self._asked.pop((index, direction), None)
            return None
        next_s: float = now_s + int(record.keep_idle_s)
        for direction in Direction:
            from_peer = record.direction[direction]
            if from_peer.tail_open:
                continue  # our own socket still sends to it, and times out by itself
            # The packet came at some time in that second.
            due_s: float = int(from_peer.last_received_s) + 1 + int(record.keep_idle_s)
            if now_s >= due_s:
                received_s, times = self._asked.get(
                    (index, direction), (from_peer.last_received_s, 0)
                )
                if received_s != from_peer.last_received_s:
                    times = 0
                # Probes are counted, not computed from the time: a host that was suspended has sent
                # none.
                if times >= record.keep_count:
                    self._end(index, _GIVEN_UP[direction])
                    return None
                # A probe that could not be sent does not count.
                times += self._ask(index, record, direction)
                self._asked[index, direction] = from_peer.last_received_s, times
                due_s = now_s + int(record.keep_interval_s)
            next_s = min(next_s, due_s)
        return next_s

    def ask(self, index: int, record: Splice, direction: Direction) -> bool:
        """Probe a peer now; False if the probe cannot be sent."""
        return record.family in self._raw and self._ask(index, record, direction)

    def _ask(self, index: int, record: Splice, direction: Direction) -> bool:
        """Send a probe; returns whether it was sent."""
        at = index * SPLICE_BYTES + Splice.direction.offset + direction * _DIRECTION_BYTES
        at += SpliceDirection.answer.offset
        store32(self._memory, at, PROBE)
        try:
            self._send(record, direction)
        except OSError:
            return False  # no route, which `rerouting.py` handles; or this host's firewall
        finally:
            # If it has not reached the programs, no other packet may pass in its place.
            store32(self._memory, at, 0)
        return True

    def _send(self, record: Splice, direction: Direction) -> None:
        from_peer, interface = record.direction[direction], record.out[direction]
        own, peer = bytes(from_peer.from_.target), bytes(from_peer.from_.source)
        # `egress` writes the current numbers; these are our socket's own, as a firewall has seen
        # them.
        options = (
            struct.pack("!III", _TIMESTAMP, 0, from_peer.ts_recent) if from_peer.ts_recent else b""
        )
        segment = struct.pack("=HH", from_peer.from_.dport, from_peer.from_.sport) + struct.pack(
            "!IIBBHHH",
            (from_peer.tail_end - 1) & 0xFFFFFFFF,
            from_peer.socket_expected_seq,
            (20 + len(options)) // 4 << 4,
            _ACK,
            0,
            0,
            0,
        )
        segment += options
        if record.family == 4:
            own, peer = own[12:], peer[12:]
        pseudo = own + peer + struct.pack("!II", len(segment), socket.IPPROTO_TCP)
        segment = segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]
        controls: list[tuple[int, int, bytes]] = []
        if record.family == 4:
            head = struct.pack(
                "!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0x4000, _HOPS, socket.IPPROTO_TCP, 0
            )
            target = socket.inet_ntop(socket.AF_INET, peer)
            info = struct.pack("=I4s4x", interface, own)
            controls.append((socket.IPPROTO_IP, _IP_PKTINFO, info))
        else:
            head = struct.pack("!IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, _HOPS)
            target = socket.inet_ntop(socket.AF_INET6, peer)
            info = struct.pack("=16sI", bytes(16), interface)
            controls.append((socket.IPPROTO_IPV6, _IPV6_PKTINFO, info))
        if from_peer.mark:
            controls.append((socket.SOL_SOCKET, socket.SO_MARK, _WORD.pack(from_peer.mark)))
        self._raw[record.family].sendmsg([head + own + peer + segment], controls, 0, (target, 0))

    def _record(self, index: int) -> Splice:
        return Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)


def raw_sockets() -> dict[int, socket.socket]:
    """Raw sockets by family; empty without CAP_NET_RAW: then no peer is probed."""
    found = {}
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        try:
            sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        except PermissionError:  # CAP_NET_RAW
            return {}
        except OSError:  # no IPv6 on this host, so no pair of it
            continue
        sock.setblocking(False)
        found[version] = sock
    return found


def checksum(data: bytes) -> int:
    """The Internet checksum of an even number of bytes (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

"""Records of spliced pairs of other machines: written into our map.

What another machine reports is a moment old. Its constants (deltas, scales) are exact, but packets
have passed since, which its numbers do not include. So a record that is made here accepts a wider
range of numbers, and `narrow` reduces it to that of any other pair, once packets of both peers have
come.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import time
from typing import Final, NamedTuple

from pyforwarder.datapath.ebpf.abi import (
    MAPPED,
    DatapathKind,
    Direction,
    PairRecord,
    PairState,
)
from pyforwarder.datapath.splice.abi import (
    HELD,
    NO_SLOT,
    SPLICE_BYTES,
    Routing,
    Splice,
    SpliceDirection,
    SpliceState,
)
from pyforwarder.datapath.splice.interfaces import LOOPBACK
from pyforwarder.datapath.splice.sockets import difference, pseudo_sum
from pyforwarder.fleet.failover.record import (
    Fin,
    Pair,
)
from pyforwarder.runtime.one_store import store32, store64

# bpf/splice_valid.h: the least that is assumed as a peer's largest window.
_LEAST_REACH: Final = 65536
# Bytes that may have passed since another machine's report, at least. At 10 Gbit/s that may be a
# gigabyte; two can be compared.
_LEAST_SLACK: Final = 1 << 28
_MOST_SLACK: Final = 1 << 30
_TIMES_MOVED: Final = 8
# Room for a window that was advertised while `narrow` was reading.
_MARGIN: Final = 1 << 22

_MASK: Final = 0xFFFFFFFF
_OWN_ROUTING: Final = int(Routing.BOUND | Routing.FOREIGN)
_DIRECTION_BYTES: Final = ctypes.sizeof(SpliceDirection)


class Interfaces(NamedTuple):
    """The interfaces by which our sockets reach the client and the server."""

    client: int
    server: int


def boot_unix_s() -> float:
    """When the monotonic clock was 0, in seconds since 1970: monotonic clocks of two hosts are
    comparable only by that.
    """
    return time.clock_gettime(time.CLOCK_REALTIME) - time.monotonic()


def is_replicable(record: Splice) -> bool:
    """Whether another machine could continue a pair.

    Not one with an open tail, which only our sockets can retransmit; nor one that is bound to an
    interface or uses a foreign address; nor one on `lo`.
    """
    if record.state != SpliceState.ACTIVE or not record.id or record.reset:
        return False
    if LOOPBACK in tuple(record.out):
        return False
    up, down = record.direction
    return not (up.tail_open or down.tail_open or (up.routing | down.routing) & _OWN_ROUTING)


def splice_of(
    pair: Pair, pair_id: int, interfaces: Interfaces, *, claim: int, slack: int
) -> Splice:
    """The record for a pair that another machine forwards.

    `claim` is the number under which this machine takes it over, `slack` how many bytes may have
    passed in each direction since the report.
    """
    record = Splice()
    record.id, record.state, record.worker = pair_id, SpliceState.ACTIVE, HELD
    record.slot = record.last_slot = NO_SLOT
    record.family = pair.family
    record.keep_idle_s, record.keep_interval_s, record.keep_count = pair.keepalive
    record.out[:] = interfaces
    client, listener, source, server = (_packed(end.ip) for end in pair.ends)
    ports = [socket.htons(end.port) for end in pair.ends]
    up, down = record.direction
    _address(
        up,
        pair.family,
        (client, listener, ports[0], ports[1]),
        (source, server, ports[2], ports[3]),
    )
    back = (server, source, ports[3], ports[2])
    _address(down, pair.family, back, (listener, client, ports[1], ports[0]))
    up.interface, down.interface = interfaces.server, interfaces.client
    up.seq_delta, down.seq_delta = pair.deltas.up_seq, pair.deltas.down_seq
    up.ack_delta, down.ack_delta = -pair.deltas.down_seq & _MASK, -pair.deltas.up_seq & _MASK
    up.tsval_delta, down.tsval_delta = pair.deltas.up_time, pair.deltas.down_time
    up.tsecr_delta, down.tsecr_delta = -pair.deltas.down_time & _MASK, -pair.deltas.up_time & _MASK
    up.peer_scale, up.other_scale, down.peer_scale, down.other_scale = pair.scales
    for n, (direction, half, other, other_delta) in enumerate(
        ((up, pair.up, pair.down, down.ack_delta), (down, pair.down, pair.up, up.ack_delta))
    ):
        direction.claim = claim
        direction.no_ecn, direction.mark = pair.no_ecn, pair.marks[n]
        if not pair.any_interface:
            direction.from_interfaces[:] = interfaces[n], interfaces[n]
        direction.last_ack, direction.last_end = half.last_ack, half.last_end
        direction.socket_expected_seq = half.last_end
        # What the other end has acknowledged was received.
        direction.contiguous_end = direction.begin_seq = (
            other.last_ack + other_delta - bool(half.fin & Fin.ACKED)
        ) & _MASK
        direction.fin_seq = half.fin_seq
        direction.fin_due = int(bool(half.fin & Fin.DUE))
        direction.fin = int(bool(half.fin & Fin.SEEN))
        direction.fin_acked = int(bool(half.fin & Fin.ACKED))
        direction.ts_recent, direction.ts_recent_s = half.recent, int(time.monotonic())
        # The same right edge of the window, in the numbers of the other end.
        direction.window_edge = (other.limit - direction.ack_delta) & _MASK
        direction.max_edge = (half.limit + slack) & _MASK
        direction.max_window = slack
        # As long as it is before the tail's end, this is the highest number that this peer may
        # acknowledge.
        sent = other.last_end + (down if direction is up else up).seq_delta + slack
        direction.socket_sent_end = sent & _MASK
        direction.tail_end = (sent + 1) & _MASK
    return record


def _packed(ip: bytes) -> bytes:
    return ip if len(ip) == 16 else MAPPED + ip


def _address(
    direction: SpliceDirection,
    family: int,
    old: tuple[bytes, bytes, int, int],
    new: tuple[bytes, bytes, int, int],
) -> None:
    """Packets with the first addresses and ports get the second ones."""
    direction.from_.source[:], direction.from_.target[:] = _words(old[0]), _words(old[1])
    direction.from_.sport, direction.from_.dport = old[2], old[3]
    direction.source[:], direction.target[:] = _words(new[0]), _words(new[1])
    direction.sport, direction.dport = new[2], new[3]
    direction.address_sum = difference(old[0] + old[1], new[0] + new[1])
    direction.pseudo_sum = pseudo_sum(old[0] + old[1], family, socket.IPPROTO_TCP)


def _words(address: bytes) -> tuple[int, ...]:
    return struct.unpack("=4I", address)


def shown(pair: Pair, record: Splice, *, boot_unix_s: float) -> bytes:
    """What `show` prints for it: a struct pair."""
    shown = PairRecord()
    shown.id = record.id
    now_ns = time.monotonic_ns()
    shown.started_ns = min(now_ns, max(0, int((pair.started_s - boot_unix_s) * 1e9)))
    shown.last_ns = now_ns
    shown.state, shown.datapath = PairState.JOINED, DatapathKind.SPLICE
    for name, end in zip(("client", "listener", "source", "server"), pair.ends, strict=True):
        endpoint = getattr(shown, name)
        endpoint.ip[:] = _packed(end.ip)
        endpoint.port, endpoint.family = end.port, pair.family
    shown.rule, shown.listener_name = pair.rule, pair.listener_name
    for direction, half in zip(Direction, (pair.up, pair.down), strict=True):
        shown.worker[direction].carried_bytes = half.carried_bytes
    return bytes(shown)


def slack_for(before: Pair | None, now: Pair) -> int:
    """How many bytes may have passed since the report `now`, estimated from the bytes between both
    reports.
    """
    moved = 0
    if before is not None:
        for was, half in ((before.up, now.up), (before.down, now.down)):
            moved = max(moved, (half.last_end - was.last_end) & _MASK)
    return min(_MOST_SLACK, max(_LEAST_SLACK, _TIMES_MOVED * moved))


def is_wide(record: Splice) -> bool:
    """Whether the record still accepts a wider range of numbers than that of any other pair."""
    return any(
        not direction.tail_open
        and (int(direction.socket_sent_end) + 1) & _MASK == direction.tail_end
        for direction in record.direction
    )


def heard(record: Splice) -> bool:
    """Whether packets of both peers have come since the record was made."""
    return all(direction.last_received_s for direction in record.direction)


def narrow(memory: object, index: int) -> None:
    """Reduce the range of accepted numbers to what the peers have sent since.

    The programs may advance the same numbers at the same time: so there is a margin.
    """
    record = Splice.from_buffer_copy(memory, index * SPLICE_BYTES)  # type: ignore[arg-type]
    for direction in Direction:
        from_peer, back = record.direction[direction], record.direction[1 - direction]
        at = index * SPLICE_BYTES + Splice.direction.offset + direction * _DIRECTION_BYTES
        edge = (back.window_edge + back.ack_delta) & _MASK
        window = (back.window_edge - int(back.last_ack)) & _MASK
        reach = max(_LEAST_REACH, min(2 * window, _MOST_SLACK))
        limit = (edge + _MARGIN) & _MASK
        if (limit - int(from_peer.max_edge)) & _MASK >= 1 << 31:  # before it
            store64(memory, at + SpliceDirection.max_edge.offset, limit)
        store32(memory, at + SpliceDirection.max_window.offset, reach)
        store32(
            memory, at + SpliceDirection.tail_end.offset, int(from_peer.socket_sent_end) & _MASK
        )

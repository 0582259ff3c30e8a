"""Records of spliced pairs, as another machine knows them: out of our map, and into it.

What another machine says is of a moment ago. Its constants are exact, but packets have passed since
that the numbers do not know of. So a record that is made here believes what lies around them, and
`narrow` brings it back to what the programs take for a pair of our own, once both peers were heard.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import struct
import time
from typing import Final, NamedTuple

from pyforwarder.datapath.ebpf.abi import (
    PAIR_BYTES,
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
from pyforwarder.datapath.splice.records import id_of
from pyforwarder.datapath.splice.sockets import difference, pseudo_sum
from pyforwarder.fleet.failover.record import (
    MOST_NAME_BYTES,
    Deltas,
    Endpoint,
    Ends,
    Fin,
    Half,
    Pair,
)
from pyforwarder.runtime.one_store import store32, store64

# bpf/splice_valid.h: no window is thought to have been smaller.
_LEAST_REACH: Final = 65536
# What may have passed since another machine has said how far a pair was. Ten gigabits a second are
# a gigabyte in that time, and what can be compared is two.
_LEAST_SLACK: Final = 1 << 28
_MOST_SLACK: Final = 1 << 30
_TIMES_MOVED: Final = 8
# A window that was told while `narrow` looked.
_MARGIN: Final = 1 << 22

_MASK: Final = 0xFFFFFFFF
_MAPPED: Final = b"\0" * 10 + b"\xff\xff"
_WAY_BYTES: Final = ctypes.sizeof(SpliceDirection)


class Ways(NamedTuple):
    """By which interfaces our sockets reach the client and the server."""

    client: int
    server: int


def boot_unix_s() -> float:
    """What the monotonic clock counts from, since 1970: of two hosts' clocks only that compares."""
    return time.clock_gettime(time.CLOCK_REALTIME) - time.monotonic()


def is_replicable(record: Splice) -> bool:
    """Whether another machine could go on with it.

    Not what still has a tail, which our sockets alone could send again; nor what is bound to an
    interface or has another's address; nor what goes by `lo`.
    """
    if record.state != SpliceState.ACTIVE or not record.id or record.reset:
        return False
    if LOOPBACK in tuple(record.out):
        return False
    return not any(
        way.tail_open or way.routing & (Routing.BOUND | Routing.FOREIGN) for way in record.way
    )


def pair_of(record: Splice, said: PairRecord | None, *, boot_unix_s: float) -> Pair:
    """What another machine must know; `said` is what `show` has of it.

    `boot_unix_s` is what the monotonic clock counts from.
    """
    up, down = record.way
    rule = listener = b""
    started_s = time.monotonic()
    carried = [int(way.bytes) for way in record.way]
    if said is not None:
        rule, listener = (_name(name) for name in (said.rule, said.listener_name))
        started_s = said.started_ns / 1e9
        carried = [
            int(said.worker[n].carried_bytes) + int(said.verdict[n].redirected_bytes)
            for n in Direction
        ]
    return Pair(
        Ends(
            _endpoint(up.from_.source, up.from_.sport, record.family),
            _endpoint(up.from_.target, up.from_.dport, record.family),
            _endpoint(up.source, up.sport, record.family),
            _endpoint(up.target, up.dport, record.family),
        ),
        Deltas(up.seq_delta, down.seq_delta, up.tsval_delta, down.tsval_delta),
        scales=(up.shift_left, up.shift_right, down.shift_left, down.shift_right),
        no_ecn=bool(up.no_ecn),
        any_interface=not any(up.by),
        marks=(up.mark, down.mark),
        keepalive=(record.keep_idle_s, record.keep_interval_s, record.keep_count),
        started_s=max(0, int(boot_unix_s + started_s)) & _MASK,
        rule=rule,
        listener_name=listener,
        up=_half(up, carried[Direction.UP]),
        down=_half(down, carried[Direction.DOWN]),
    )


def said_of(record: Splice, table: mmap.mmap, slots: int) -> PairRecord | None:
    """What `show` says of a pair, if anything."""
    at = record.slot * PAIR_BYTES
    if record.slot >= slots or id_of(table, at) != record.id:
        return None
    return PairRecord.from_buffer_copy(table, at)


def _name(name: bytes) -> bytes:
    text = name.decode(errors="ignore")
    clean = "".join(c for c in text if c.isprintable()).encode()[:MOST_NAME_BYTES]
    return clean.decode(errors="ignore").encode()


def _endpoint(ip: ctypes.Array[ctypes.c_uint32], port_be: int, family: int) -> Endpoint:
    packed = bytes(ip)
    return Endpoint(packed if family == 6 else packed[12:], socket.ntohs(port_be))


def _half(way: SpliceDirection, carried_bytes: int) -> Half:
    fin = Fin.DUE * bool(way.fin_due) | Fin.SEEN * bool(way.fin) | Fin.ACKED * bool(way.fin_acked)
    if not fin & Fin.DUE:
        fin = Fin(0)
    elif not fin & Fin.SEEN:
        fin = Fin.DUE
    return Half(
        int(way.last_ack) & _MASK,
        int(way.last_end) & _MASK,
        int(way.limit) & _MASK,
        way.recent,
        way.fin_seq if fin else 0,
        Fin(fin),
        min(carried_bytes, 1 << 62),
    )


def splice_of(pair: Pair, pair_id: int, ways: Ways, *, claim: int, slack: int) -> Splice:
    """The record, in the state in which it is for a pair of another machine.

    `claim` is with which this machine goes on with it, `slack` how many bytes may have passed in
    each direction since.
    """
    record = Splice()
    record.id, record.state, record.worker = pair_id, SpliceState.ACTIVE, HELD
    record.slot = record.last_slot = NO_SLOT
    record.family = pair.family
    record.keep_idle_s, record.keep_interval_s, record.keep_count = pair.keepalive
    record.out[:] = ways
    client, listener, source, server = (_packed(end.ip) for end in pair.ends)
    ports = [socket.htons(end.port) for end in pair.ends]
    up, down = record.way
    _address(
        up,
        pair.family,
        (client, listener, ports[0], ports[1]),
        (source, server, ports[2], ports[3]),
    )
    back = (server, source, ports[3], ports[2])
    _address(down, pair.family, back, (listener, client, ports[1], ports[0]))
    up.interface, down.interface = ways.server, ways.client
    up.seq_delta, down.seq_delta = pair.deltas.up_seq, pair.deltas.down_seq
    up.ack_delta, down.ack_delta = -pair.deltas.down_seq & _MASK, -pair.deltas.up_seq & _MASK
    up.tsval_delta, down.tsval_delta = pair.deltas.up_time, pair.deltas.down_time
    up.tsecr_delta, down.tsecr_delta = -pair.deltas.down_time & _MASK, -pair.deltas.up_time & _MASK
    up.shift_left, up.shift_right, down.shift_left, down.shift_right = pair.scales
    for n, (way, half, other, other_delta) in enumerate(
        ((up, pair.up, pair.down, down.ack_delta), (down, pair.down, pair.up, up.ack_delta))
    ):
        way.claim = claim
        way.no_ecn, way.mark = pair.no_ecn, pair.marks[n]
        if not pair.any_interface:
            way.by[:] = ways[n], ways[n]
        way.last_ack, way.last_end = half.last_ack, half.last_end
        way.ours = half.last_end
        # What the other end has acknowledged has come.
        way.next = way.begin = (other.last_ack + other_delta - bool(half.fin & Fin.ACKED)) & _MASK
        way.fin_seq = half.fin_seq
        way.fin_due = int(bool(half.fin & Fin.DUE))
        way.fin = int(bool(half.fin & Fin.SEEN))
        way.fin_acked = int(bool(half.fin & Fin.ACKED))
        way.recent, way.recent_s = half.recent, int(time.monotonic())
        # The same right edge, as the other end has said it.
        way.edge = (other.limit - way.ack_delta) & _MASK
        way.limit = (half.limit + slack) & _MASK
        way.reach = slack
        # As long as `sent` is in front of `tail`, it is how far this peer may acknowledge.
        sent = other.last_end + (down if way is up else up).seq_delta + slack
        way.sent = sent & _MASK
        way.tail = (sent + 1) & _MASK
    return record


def _packed(ip: bytes) -> bytes:
    return ip if len(ip) == 16 else _MAPPED + ip


def _address(
    way: SpliceDirection,
    family: int,
    old: tuple[bytes, bytes, int, int],
    new: tuple[bytes, bytes, int, int],
) -> None:
    """Packets from the first addresses and ports get the second ones."""
    way.from_.source[:], way.from_.target[:] = _words(old[0]), _words(old[1])
    way.from_.sport, way.from_.dport = old[2], old[3]
    way.source[:], way.target[:] = _words(new[0]), _words(new[1])
    way.sport, way.dport = new[2], new[3]
    way.address_sum = difference(old[0] + old[1], new[0] + new[1])
    way.pseudo_sum = pseudo_sum(old[0] + old[1], family, socket.IPPROTO_TCP)


def _words(address: bytes) -> tuple[int, ...]:
    return struct.unpack("=4I", address)


def shown(pair: Pair, record: Splice, *, boot_unix_s: float) -> bytes:
    """What `show` is to say of it: a struct pair."""
    said = PairRecord()
    said.id = record.id
    now_ns = time.monotonic_ns()
    said.started_ns = min(now_ns, max(0, int((pair.started_s - boot_unix_s) * 1e9)))
    said.last_ns = now_ns
    said.state, said.datapath = PairState.JOINED, DatapathKind.SPLICE
    for name, end in zip(("client", "listener", "source", "server"), pair.ends, strict=True):
        endpoint = getattr(said, name)
        endpoint.ip[:] = _packed(end.ip)
        endpoint.port, endpoint.family = end.port, pair.family
    said.rule, said.listener_name = pair.rule, pair.listener_name
    for direction, half in zip(Direction, (pair.up, pair.down), strict=True):
        said.worker[direction].carried_bytes = half.carried_bytes
    return bytes(said)


def slack_for(before: Pair | None, now: Pair) -> int:
    """How many bytes may have passed since `now` was said, by what passed between the two."""
    moved = 0
    if before is not None:
        for was, half in ((before.up, now.up), (before.down, now.down)):
            moved = max(moved, (half.last_end - was.last_end) & _MASK)
    return min(_MOST_SLACK, max(_LEAST_SLACK, _TIMES_MOVED * moved))


def is_wide(record: Splice) -> bool:
    """Whether it still believes more than the programs do of a pair of our own."""
    return any(not way.tail_open and (int(way.sent) + 1) & _MASK == way.tail for way in record.way)


def heard(record: Splice) -> bool:
    """Whether both peers were, since the record was made."""
    return all(way.heard_s for way in record.way)


def narrow(memory: object, index: int) -> None:
    """Believe what its peers have said since, and no more.

    Stored beside the programs, which may move the same numbers forward: so there is a margin.
    """
    record = Splice.from_buffer_copy(memory, index * SPLICE_BYTES)  # type: ignore[arg-type]
    for direction in Direction:
        way, back = record.way[direction], record.way[1 - direction]
        at = index * SPLICE_BYTES + Splice.way.offset + direction * _WAY_BYTES
        edge = (back.edge + back.ack_delta) & _MASK
        window = (back.edge - int(back.last_ack)) & _MASK
        reach = max(_LEAST_REACH, min(2 * window, _MOST_SLACK))
        limit = (edge + _MARGIN) & _MASK
        if (limit - int(way.limit)) & _MASK >= 1 << 31:  # in front of it
            store64(memory, at + SpliceDirection.limit.offset, limit)
        store32(memory, at + SpliceDirection.reach.offset, reach)
        store32(memory, at + SpliceDirection.tail.offset, int(way.sent) & _MASK)

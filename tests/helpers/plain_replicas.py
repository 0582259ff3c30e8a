"""The report of a pair as it is read field by field: what the quick way has to say as well."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf.abi import Direction, PairRecord
from pyforwarder.fleet.failover.record import (
    MOST_NAME_BYTES,
    Deltas,
    Endpoint,
    Ends,
    Fin,
    Half,
    Pair,
)

if TYPE_CHECKING:
    import ctypes

    from pyforwarder.datapath.splice.abi import Splice, SpliceDirection

_MASK: Final = 0xFFFFFFFF
_NOT_ENDED: Final = Fin(0)


def pair_of(record: Splice, shown: PairRecord | None, *, boot_unix_s: float) -> Pair:
    """The report of a pair for other machines; `shown` is its record in the pair table.

    `boot_unix_s` is when the monotonic clock was 0.
    """
    up, down = record.direction
    rule = listener = b""
    started_s = time.monotonic()
    carried = [int(direction.bytes) for direction in record.direction]
    if shown is not None:
        rule, listener = (_name(name) for name in (shown.rule, shown.listener_name))
        started_s = shown.started_ns / 1e9
        carried = [
            int(shown.worker[n].carried_bytes) + int(shown.kernel[n].redirected_bytes)
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
        scales=(up.peer_scale, up.other_scale, down.peer_scale, down.other_scale),
        no_ecn=bool(up.no_ecn),
        any_interface=not any(up.from_interfaces),
        marks=(up.mark, down.mark),
        keepalive=(record.keep_idle_s, record.keep_interval_s, record.keep_count),
        started_s=max(0, int(boot_unix_s + started_s)) & _MASK,
        rule=rule,
        listener_name=listener,
        up=_half(up, carried[Direction.UP]),
        down=_half(down, carried[Direction.DOWN]),
    )


def _name(name: bytes) -> bytes:
    text = name.decode(errors="ignore")
    clean = "".join(c for c in text if c.isprintable()).encode()[:MOST_NAME_BYTES]
    return clean.decode(errors="ignore").encode()


def _endpoint(ip: ctypes.Array[ctypes.c_uint32], port_be: int, family: int) -> Endpoint:
    packed = bytes(ip)
    return Endpoint(packed if family == 6 else packed[12:], socket.ntohs(port_be))


def _half(direction: SpliceDirection, carried_bytes: int) -> Half:
    fin = _NOT_ENDED
    if direction.fin_due:
        fin = Fin.DUE
        if direction.fin:
            fin = Fin.DUE | Fin.SEEN | (Fin.ACKED if direction.fin_acked else _NOT_ENDED)
    return Half(
        int(direction.last_ack) & _MASK,
        int(direction.last_end) & _MASK,
        int(direction.max_edge) & _MASK,
        direction.ts_recent,
        direction.fin_seq if fin is not _NOT_ENDED else 0,
        fin,
        min(carried_bytes, 1 << 62),
    )

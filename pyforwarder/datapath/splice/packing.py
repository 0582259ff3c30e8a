"""What other machines must know of a pair, out of its record and the one in the pair table.

That is done a thousand times in a second, so each record is read by one format, and written by
another one. What stands in them is `Pair` of fleet/failover/record.py.
"""

from __future__ import annotations

import functools
import struct
import sys
import time
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf.abi import (
    PAIR_BYTES,
    Direction,
    KernelDirection,
    PairRecord,
    WorkerDirection,
)
from pyforwarder.datapath.splice.abi import (
    SPLICE_BYTES,
    Routing,
    Splice,
    SpliceDirection,
    SpliceState,
)
from pyforwarder.datapath.splice.interfaces import LOOPBACK
from pyforwarder.fleet.failover.record import (
    ANY_INTERFACE,
    IPV6,
    MOST_NAME_BYTES,
    NO_ECN,
    PACKED,
    Fin,
)

if TYPE_CHECKING:
    import ctypes

_MASK: Final = 0xFFFFFFFF
# The lower half of a number of 64 bits.
_LOWER: Final = "I4x" if sys.byteorder == "little" else "4xI"
_MOST_BYTES: Final = 1 << 62
_OWN_ROUTING: Final = int(Routing.BOUND | Routing.FOREIGN)
_NO_INTERFACES: Final = bytes(8)
# How far the end of a direction has come whose FIN is due, by `fin` and `fin_acked`.
_FINS: Final = {
    (seen, acked): int(Fin.DUE | Fin.SEEN * seen | Fin.ACKED * (seen and acked))
    for seen in (False, True)
    for acked in (False, True)
}
_ACTIVE: Final = int(SpliceState.ACTIVE)


def _form(size: int, codes: Mapping[int, str]) -> struct.Struct:
    """The format of these fields, by their offsets in a record of so many bytes."""
    words, at = ["="], 0
    for offset, code in sorted(codes.items()):
        words += [f"{offset - at}x", code]
        at = offset + struct.calcsize(f"={code}")
    return struct.Struct("".join([*words, f"{size - at}x"]))


def _direction(number: int) -> dict[int, str]:
    codes = {
        "from_": "16s16s2s2s",  # source, target, sport, dport, in wire order
        "source": "16s",
        "target": "16s",
        "sport": "2s",
        "dport": "2s",
        "from_interfaces": "8s",
        "seq_delta": "I",
        "tsval_delta": "I",
        "last_ack": _LOWER,  # the sequence number
        "last_end": _LOWER,
        "max_edge": _LOWER,
        "fin_seq": "I",
        "fin_due": "I",
        "fin": "I",
        "fin_acked": "I",
        "ts_recent": "I",
        "tail_open": "I",
        "peer_scale": "B",
        "other_scale": "B",
        "no_ecn": "B",
        "routing": "B",
        "mark": "I",
        "claim": "I",
        "bytes": "Q",
    }
    if number == Direction.DOWN:  # it has the same addresses, and is taken over with the other
        for name in ("from_", "source", "target", "sport", "dport", "from_interfaces"):
            del codes[name]
        del codes["no_ecn"], codes["claim"]
    first = Splice.direction.offset + number * (Splice.direction.size // 2)
    return {first + _at(SpliceDirection, name): code for name, code in codes.items()}


def _at(structure: type[ctypes.Structure], name: str) -> int:
    return int(getattr(structure, name).offset)


_RECORD: Final = _form(
    SPLICE_BYTES,
    _direction(Direction.UP)
    | _direction(Direction.DOWN)
    | {
        Splice.id.offset: "Q",
        Splice.state.offset: "I",
        Splice.reset.offset: "I",
        Splice.family.offset: "I",
        Splice.out.offset: "2I",
        Splice.keep_idle_s.offset: "3I",
    },
)
assert Splice.keep_count.offset == Splice.keep_idle_s.offset + 8
_SHOWN: Final = _form(
    PAIR_BYTES,
    {
        _at(PairRecord, name) + n * size + _at(structure, field): "Q"
        for name, structure, size, field in (
            ("kernel", KernelDirection, PairRecord.kernel.size // 2, "redirected_bytes"),
            ("worker", WorkerDirection, PairRecord.worker.size // 2, "carried_bytes"),
        )
        for n in Direction
    }
    | {
        PairRecord.id.offset: "Q",
        PairRecord.started_ns.offset: "Q",
        PairRecord.rule.offset: f"{PairRecord.rule.size}s",
        PairRecord.listener_name.offset: f"{PairRecord.listener_name.size}s",
    },
)


def pack(
    raw: bytes, pair_id: int, shown: bytes, addresses: Set[bytes], *, boot_unix_s: float
) -> tuple[int, bytes, tuple[bytes, ...]] | None:
    """The report of a pair for other machines; None: these could not continue it.

    `raw` is the record of the pair with this id; `shown` is the one in its slot of the pair table,
    if it has a slot: it may be another pair's. Our own ends are to be two of `addresses`.
    `boot_unix_s` is when the monotonic clock was 0.

    Returns the claim, what `Pair.pack` writes, and what `record.key_of` makes its key of.
    """
    # fmt: off
    (
        client, listener, client_port, listener_port,
        source, server, source_port, server_port,
        interfaces, up_seq, up_time, up_ack, up_end, up_edge,
        up_fin_seq, up_due, up_fin, up_acked, up_recent, up_tail,
        up_peer_scale, up_other_scale, no_ecn, up_routing, up_mark, claim, up_bytes,
        down_seq, down_time, down_ack, down_end, down_edge,
        down_fin_seq, down_due, down_fin, down_acked, down_recent, down_tail,
        down_peer_scale, down_other_scale, down_routing, down_mark, down_bytes,
        record_id, state, reset, family, out, out_back, idle_s, interval_s, probes,
    ) = _RECORD.unpack(raw)
    # fmt: on
    if (
        record_id != pair_id
        or state != _ACTIVE
        or reset
        or out == LOOPBACK
        or out_back == LOOPBACK
        or up_tail
        or down_tail
        or (up_routing | down_routing) & _OWN_ROUTING
    ):
        return None
    bits, form = IPV6, PACKED[6]
    if family != 6:
        bits, form = 0, PACKED[4]
        client, listener, source, server = client[12:], listener[12:], source[12:], server[12:]
    if listener not in addresses or source not in addresses:
        return None
    if no_ecn:
        bits |= NO_ECN
    if interfaces == _NO_INTERFACES:
        bits |= ANY_INTERFACE
    rule = name = b""
    shown_id = 0
    if shown:
        # fmt: off
        (
            up_redirected, down_redirected, up_carried, down_carried,
            shown_id, started_ns, shown_rule, shown_name,
        ) = _SHOWN.unpack(shown)
        # fmt: on
    if shown_id == pair_id:
        rule, name = _name(shown_rule), _name(shown_name)
        up_bytes, down_bytes = up_carried + up_redirected, down_carried + down_redirected
        started_s = started_ns / 1e9
    else:
        started_s = time.monotonic()
    if up_bytes > _MOST_BYTES or down_bytes > _MOST_BYTES:
        up_bytes, down_bytes = min(up_bytes, _MOST_BYTES), min(down_bytes, _MOST_BYTES)
    up_fins = down_fins = 0
    if up_due:
        up_fins = _FINS[up_fin != 0, up_acked != 0]
    if down_due:
        down_fins = _FINS[down_fin != 0, down_acked != 0]
    # fmt: off
    data = form.pack(
        bits, up_peer_scale, up_other_scale, down_peer_scale, down_other_scale, len(rule),
        client_port, listener_port, source_port, server_port,
        up_seq, down_seq, up_time, down_time, up_mark, down_mark, idle_s, interval_s, probes,
        max(0, int(boot_unix_s + started_s)) & _MASK,
        up_ack, up_end, up_edge, up_recent,
        up_fin_seq if up_fins else 0, up_fins, up_bytes,
        down_ack, down_end, down_edge, down_recent,
        down_fin_seq if down_fins else 0, down_fins, down_bytes,
        client, listener, source, server,
    )
    ends = (
        client, client_port, listener, listener_port, source, source_port, server, server_port,
    )
    # fmt: on
    return claim, data + rule + name, ends


@functools.lru_cache(maxsize=1024)
def _name(padded: bytes) -> bytes:
    """As much of a name as is told; it ends at the first 0."""
    text = padded.partition(b"\0")[0].decode(errors="ignore")
    clean = "".join(c for c in text if c.isprintable()).encode()[:MOST_NAME_BYTES]
    return clean.decode(errors="ignore").encode()

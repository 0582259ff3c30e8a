"""Creation of the maps of splice: how many entries each has, and what they hold.

Each function returns a descriptor, which the caller closes.

Raises:
    OSError: the kernel refuses.
"""

from __future__ import annotations

import os
from typing import Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.splice.abi import SPLICE_BYTES
from pyforwarder.datapath.splice.records import FLOW, KEY_BYTES
from pyforwarder.runtime.counters import BLOCK_WORDS

_LEAST_RING_BYTES: Final = 1 << 18
# A pair has up to eight events: the ends of two tails, two FINs and their acknowledgements, a
# reset, a too long packet. A record has a header of eight bytes (struct bpf_ringbuf_hdr).
_RINGS_OF_A_PAIR: Final = 8
_RING_RECORD_BYTES: Final = 8 + 24
SUM_BYTES: Final = 512  # of a packet that the programs checksum at once


def make_flows(entries: int) -> int:
    """The map of flows: the pair of a packet by its addresses, two entries per record."""
    return bpf.create_map(
        bpf.MapType.HASH,
        key_bytes=KEY_BYTES,
        value_bytes=FLOW.size,
        entries=2 * entries,
        flags=bpf.F_NO_PREALLOC,
        name="pf_flows",
    )


def make_splices(entries: int) -> int:
    """The map of the pairs' records, which the keeper and the workers map into memory."""
    return bpf.create_map(
        bpf.MapType.ARRAY,
        key_bytes=4,
        value_bytes=SPLICE_BYTES,
        entries=entries,
        flags=bpf.F_MMAPABLE,
        name="pf_splices",
    )


def make_counters(workers: int) -> int:
    """A map of counters of invalid packets, for a caller that does not read them."""
    return bpf.create_map(
        bpf.MapType.ARRAY,
        key_bytes=4,
        value_bytes=8,
        entries=workers * BLOCK_WORDS,
        name="pf_counters",
    )


def make_scratch() -> int:
    """The scratch map, in which each processor sums up a packet."""
    return bpf.create_map(
        bpf.MapType.PERCPU_ARRAY,
        key_bytes=4,
        value_bytes=SUM_BYTES,
        entries=1,
        name="pf_scratch",
    )


def make_no_programs() -> int:
    """An empty map of programs to tail-call, for programs that never do."""
    return bpf.create_map(
        bpf.MapType.PROG_ARRAY, key_bytes=4, value_bytes=4, entries=1, name="pf_no_programs"
    )


def ring_bytes(slots: int) -> int:
    """Bytes of the ring of a worker with `slots` slots: all its pairs may end at once."""
    size = _LEAST_RING_BYTES
    while size < slots * _RINGS_OF_A_PAIR * _RING_RECORD_BYTES:
        size *= 2
    return size


def make_ring(slots: int) -> int:
    """The ring buffer for events to one worker with `slots` slots."""
    return bpf.create_map(
        bpf.MapType.RINGBUF,
        key_bytes=0,
        value_bytes=0,
        entries=ring_bytes(slots),
        name="pf_splice_ring",
    )


def make_rings(ring_fds: tuple[int, ...]) -> int:
    """The map of the workers' rings, by worker number."""
    rings = bpf.create_map(
        bpf.MapType.ARRAY_OF_MAPS,
        key_bytes=4,
        value_bytes=4,
        entries=len(ring_fds),
        inner_map_fd=ring_fds[0],
        name="pf_splice_rings",
    )
    try:
        table = bpf.Map(rings, key_bytes=4, value_bytes=4)
        for worker, ring in enumerate(ring_fds):
            table.update(worker.to_bytes(4, "little"), ring.to_bytes(4, "little"))
    except OSError:
        os.close(rings)
        raise
    return rings

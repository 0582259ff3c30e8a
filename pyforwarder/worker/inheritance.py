"""What a worker has from its supervisor by fork."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.ebpf.pair_table import PairTable
    from pyforwarder.datapath.sockmap.maps import KernelMaps
    from pyforwarder.datapath.splice.splicing import Splicing
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.pulse import Pulse
    from pyforwarder.worker.log import Log


class WorkerMemory(NamedTuple):
    """Memory that this worker shares: a block of each worker, of which its own is writable.

    Each worker writes one of several token tables (used_tokens.py); `own_used_tokens` is its
    number.
    """

    counters: Sequence[mmap.mmap]
    limits: Sequence[mmap.mmap]
    other_machines: mmap.mmap  # what they have of clients; no worker writes it
    used_tokens: Sequence[mmap.mmap]
    own_used_tokens: int
    connection_ids: Sequence[mmap.mmap]


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a worker has from its supervisor at its start; the listeners come later, as messages."""

    worker: int
    workers: int
    channel: Channel
    take_memory: Callable[[], WorkerMemory]  # in the worker; what else it shares it gives up
    limits_secret: bytes
    table: PairTable
    maps: KernelMaps | None
    user: str | None  # None: stay who we are
    log: Log
    splicing: Splicing | None = None
    pulse: Pulse | None = None  # where it shows that it works
    last_id: int = 0  # the highest of the pairs that go on from an earlier daemon
    from_predecessor: Channel | None = None  # where a worker of the daemon before sends its pairs

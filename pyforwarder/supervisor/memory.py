"""What the processes of an instance share; made before the first of them is forked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import OUTLIVING_KINDS
from pyforwarder.datapath.ebpf.arrays import Arrays
from pyforwarder.datapath.ebpf.pair_table import PairTable, empty_window, read_records
from pyforwarder.errors import LoadError
from pyforwarder.runtime.counters import (
    BLOCK_BYTES,
    CLOSED_INDEX,
    Counter,
    Counters,
    Directory,
    ServerCounter,
    ServerFailure,
    change,
)
from pyforwarder.runtime.limits import new_secret
from pyforwarder.runtime.limits_memory import COLUMN_BYTES, OTHERS_BYTES
from pyforwarder.runtime.shared_memory import SharedBlocks, keep_memory
from pyforwarder.worker.inheritance import WorkerMemory
from pyforwarder.worker.udp.connection_ids import PART_BYTES
from pyforwarder.worker.used_tokens import SHARES, TABLE_BYTES

if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence


class SharedMemory:
    """The counters, the pair table, and what limits clients and remembers their tokens.

    Counters and table are BPF arrays for the kernel to read, or anonymous where it may not.
    """

    def __init__(
        self, *, workers: int, slots: int, used_tokens: SharedBlocks | None = None, share: int = 0
    ) -> None:
        """Make the memory for that many workers, each with that many slots for pairs.

        `used_tokens` are those of a daemon before us with as many workers, ours from here on, and
        `share` is the part of them that our workers write.
        """
        self.workers = workers
        self.slots = slots
        self.limits = SharedBlocks.make("limits", workers, COLUMN_BYTES)
        self.limits_secret = new_secret()
        self.other_machines = SharedBlocks.make("others", 1, OTHERS_BYTES)
        if used_tokens is None:
            used_tokens = SharedBlocks.make("tokens", workers * SHARES, TABLE_BYTES)
        self.used_tokens = used_tokens
        self.share = share
        self.connection_ids = SharedBlocks.make("ids", workers, PART_BYTES)
        self._arrays: Arrays | LoadError  # the latter: why there are none
        try:
            self._arrays = arrays = Arrays.create(workers=workers, slots=slots)
        except LoadError as error:
            self._arrays = error
            self.counter_blocks = SharedBlocks.make("counters", workers, BLOCK_BYTES)
            self.table = PairTable(workers=workers, slots=slots)
        else:
            self.counter_blocks = arrays.counters_memory(workers)
            self.table = PairTable(workers=workers, slots=slots, fd=arrays.pairs_fd)
        self.counters = Counters(self.counter_blocks.map_all())
        self.directory = Directory()

    def arrays(self) -> Arrays:
        """The BPF arrays.

        Raises:
            LoadError: the kernel does not let us have any.
        """
        if isinstance(self._arrays, LoadError):
            raise self._arrays
        return self._arrays

    def count_reset(self, worker: int) -> int:
        """A worker died: how many connections it took along; they are counted as `internal`.

        Call it before what it has left is forgotten. Spliced pairs go on without it.
        """
        block = self.counters.block(worker)
        outliving = sum(
            record.datapath in OUTLIVING_KINDS
            for record in read_records(self.table.windows[worker])
        )
        # The worker may have been taken over, and have written anything.
        reset = int(min(max(0, block[Counter.OPEN] - outliving), 2 * self.slots))
        index = CLOSED_INDEX[CloseReason.INTERNAL]
        block[index] = (block[index] + reset) % (1 << 64)
        return reset

    def count_failed_in_kernel(self, upstream: str, server: str, times: int) -> None:
        """The kernel could not connect to a server, so often. Only the supervisor counts those."""
        index = self.directory.server_index(upstream, server)
        if index is not None:
            word = index + ServerCounter.FAILURES + ServerFailure.EXPRESS
            change(self.counters.block(0), word, times)

    def forget_gauges(self, worker: int) -> None:
        """A worker died with its connections: what counted them as open is 0 again."""
        self.counters.forget_gauges(worker, self.directory)

    def clear_window(self, worker: int) -> None:
        """A dead worker's part of the pair table has no pairs any more.

        What `show` printed for its pairs stays there until another pair has the slot: of spliced
        ones, which go on, a keeper that begins now knows nothing else.
        """
        empty_window(self.table.windows[worker])

    def give_up_writing(self) -> tuple[Counters, Sequence[mmap.mmap]]:
        """Return counters and table in memory that this process cannot write; for a process that
        only reads.

        The caller keeps none of what it has inherited (`keep_memory`).
        """
        return Counters(self.counter_blocks.map(writable=())), self.table.read_only()

    def share_limits(self) -> tuple[Sequence[mmap.mmap], mmap.mmap]:
        """Return the columns of the workers' limits, which the calling process cannot write, and
        what workers read of other machines, which it can.

        For the process that shares limits with a fleet; it keeps the latter (`keep_memory`).
        """
        return self.limits.map(writable=()), self.other_machines.map_all()[0]

    def of_worker(self, worker: int, *also: mmap.mmap) -> WorkerMemory:
        """Return what a worker shares with others, with its own part of each for writing; called in
        the worker.

        It keeps `also` what it shares with its supervisor alone. All other memory that it has
        inherited becomes its own, and zero; the descriptors are closed.
        """
        table = self.share * self.workers + worker
        own = WorkerMemory(
            counters=self.counter_blocks.map(writable=[worker]),
            limits=self.limits.map(writable=[worker]),
            other_machines=self.other_machines.map(writable=())[0],
            used_tokens=self.used_tokens.map(writable=[table]),
            own_used_tokens=table,
            connection_ids=self.connection_ids.map(writable=[worker]),
        )
        by_worker = (own.counters, own.limits, own.connection_ids, self.table.windows)
        kept = [*also, own.used_tokens[table], *(blocks[worker] for blocks in by_worker)]
        keep_memory(kept)
        self._close_blocks()
        return own

    def close(self) -> None:
        """Close the arrays' descriptors; a pinned view keeps them alive."""
        self._close_blocks()
        self.table.close()
        if not isinstance(self._arrays, LoadError):
            self._arrays.close()

    def _close_blocks(self) -> None:
        for shared in (
            self.counter_blocks,
            self.limits,
            self.other_machines,
            self.used_tokens,
            self.connection_ids,
        ):
            shared.close()

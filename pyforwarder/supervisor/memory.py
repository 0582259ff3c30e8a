"""What the processes of an instance share; made before the first of them is forked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.counters import Counters, Directory
from pyforwarder.datapath import bpf
from pyforwarder.datapath.abi import PAIR_BYTES
from pyforwarder.datapath.arrays import Arrays
from pyforwarder.datapath.kernel import PairTable
from pyforwarder.errors import LoadError
from pyforwarder.limits import new_secret, shared_memory
from pyforwarder.worker.used_tokens import SharedUsedTokens

if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence


class SharedMemory:
    """The counters, the pair table, and what limits clients and remembers their tokens.

    Counters and table are BPF arrays for the kernel to read, or anonymous where it may not.
    """

    def __init__(self, *, workers: int, slots: int) -> None:
        """For that many workers, each with that many slots for pairs."""
        self.workers = workers
        self.slots = slots
        self.limits = shared_memory(workers)
        self.limits_secret = new_secret()
        self.used_tokens = SharedUsedTokens()
        self._arrays: Arrays | LoadError  # the latter: why there are none
        try:
            self._arrays = arrays = Arrays.create(workers=workers, slots=slots)
        except LoadError as error:
            self._arrays = error
            self.counters_memory = Counters.memory(workers)
            self.table = PairTable(workers=workers, slots=slots)
        else:
            self.counters_memory = arrays.counters_memory(workers)
            self.table = PairTable(workers=workers, slots=slots, fd=arrays.pairs_fd)
        self.counters = Counters(self.counters_memory, workers)
        self.directory = Directory()

    def arrays(self) -> Arrays:
        """The BPF arrays.

        Raises:
            LoadError: the kernel does not let us have any.
        """
        if isinstance(self._arrays, LoadError):
            raise self._arrays
        return self._arrays

    def forget_gauges(self, worker: int) -> None:
        """A worker died with its connections: what counted them as open is 0 again."""
        self.counters.forget_gauges(worker, self.directory)

    def clear_window(self, worker: int) -> None:
        """Empty a dead worker's part of the pair table."""
        window = self.table.windows[worker]
        window[:] = bytes(len(window))

    def give_up_writing(self) -> tuple[Counters, Sequence[mmap.mmap]]:
        """In a process that only reads: counters and table, in memory that it cannot write.

        Everything else is unmapped. Where there are no arrays nothing changes.
        """
        if isinstance(self._arrays, LoadError):
            return self.counters, self.table.windows
        length = self.slots * PAIR_BYTES
        windows = [
            bpf.map_memory(self._arrays.pairs_fd, length, offset_bytes=worker * length, write=False)
            for worker in range(self.workers)
        ]
        for window in self.table.windows:
            window.close()
        self.counters.close()
        self.counters_memory.close()
        self.limits.close()
        self.used_tokens.close()
        counters_memory = self._arrays.counters_memory(self.workers, write=False)
        return Counters(counters_memory, self.workers), windows

    def close(self) -> None:
        """Close the arrays' descriptors; a pinned view keeps them alive."""
        if not isinstance(self._arrays, LoadError):
            self._arrays.close()

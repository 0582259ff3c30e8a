"""The keeper's pairs: their records, the worker of each, and which records are free."""

from __future__ import annotations

import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, ResetBy, Splice, SpliceState
from pyforwarder.datapath.splice.our_ports import OurPorts
from pyforwarder.datapath.splice.records import (
    FLOW,
    KEY_BYTES,
    forget_flows,
    set_state,
    store,
    used_indexes,
)
from pyforwarder.runtime.socket_options import cookie_of

if TYPE_CHECKING:
    import mmap
    import socket
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.splice.maps import SpliceMaps

# As long as TIME_WAIT, in which TCP keeps the ports of a closed connection: a FIN may be repeated.
_LINGER_S: Final = 60.0
_RESET_LINGER_S: Final = 2.0
COOKIES: Final = struct.Struct("=QQ")  # of the client's socket and the server's
# The packet that the program `probe` reads: the pair, and whether its worker is notified.
_INDEX: Final = struct.Struct("=14xII42x")
_RESET_AT: Final = Splice.reset.offset


class _Lingering(NamedTuple):
    forgotten_s: float  # when its ports are forgotten, by CLOCK_MONOTONIC
    record: int  # its index
    word: int  # the word of a place


class KeeperPairs:
    """The pairs of one keeper. A record is free, belongs to a pair with an owner, or lingers."""

    def __init__(self, maps: SpliceMaps, cookies: mmap.mmap, *, first_place: int) -> None:
        """`cookies` are those of every pair's sockets, for the next keeper.

        Records from `first_place` on are those of express: they are not allocated for joined pairs.
        """
        self._probe_fd = maps.probe_fd
        self._cookies = cookies
        self._first_place = first_place
        self.flows = bpf.Map(maps.flows_fd, key_bytes=KEY_BYTES, value_bytes=FLOW.size)
        self.memory = bpf.map_memory(maps.splices_fd, maps.entries * SPLICE_BYTES, write=True)
        self.ports = OurPorts(maps.our_ports_fd, self.memory)
        self.owners: dict[int, int] = {}  # index -> the worker that has the pair, or will adopt it
        # Called with the index of a record that is forgotten.
        self.when_forgotten: list[Callable[[int], None]] = [self.ports.forgotten]
        self.free_place: Callable[[int], None] = lambda _index: None
        # The word of a place, which identifies its pair: places are freed by themselves.
        self.word_of_place: Callable[[int], int] = lambda _index: 0
        # Ended pairs, oldest first.
        self._lingering: deque[_Lingering] = deque()
        self._lingering_places: deque[_Lingering] = deque()
        self._resetting: deque[_Lingering] = deque()
        # The records that were not free at the start: an earlier keeper's, or those of places.
        self.found = frozenset(used_indexes(self.memory))
        self._free = deque(index for index in range(first_place) if index not in self.found)

    # Records

    def record(self, index: int) -> Splice:
        """A copy of a record."""
        return Splice.from_buffer_copy(self.memory, index * SPLICE_BYTES)

    def write(self, index: int, record: Splice) -> None:
        """Overwrite a whole record."""
        base = index * SPLICE_BYTES
        self.memory[base : base + SPLICE_BYTES] = bytes(record)

    def store(self, index: int, at: int, number: int) -> None:
        """Write a 32-bit field, `at` bytes into a record."""
        store(self.memory, index, at, number)

    def probe(self, index: int, *, look: bool = False) -> None:
        """Run `probe`, which reads the sockets into the record; `look`: the worker is notified,
        too.
        """
        bpf.run_program(self._probe_fd, _INDEX.pack(index, int(look)))

    # Owners

    def of(self, worker: int) -> list[int]:
        """The indexes of a worker's pairs."""
        return [index for index, owner in self.owners.items() if owner == worker]

    def owned(self) -> list[int]:
        """The indexes of all pairs."""
        return list(self.owners)

    def remember_joined(self, index: int, sockets: Sequence[socket.socket]) -> None:
        """Record that these sockets belong to the pair, client's and server's."""
        cookies = [cookie_of(sock) for sock in sockets]
        COOKIES.pack_into(self._cookies, index * COOKIES.size, *cookies)

    def are_joined(self, index: int, sockets: Sequence[socket.socket]) -> bool:
        """Whether these are the sockets of the pair, client's and server's."""
        joined = COOKIES.unpack_from(self._cookies, index * COOKIES.size)
        return joined == tuple(map(cookie_of, sockets))

    # From free to free

    def allocate(self) -> int:
        """Allocate a record: its index, or -1 if none is free."""
        while not self._free and self._lingering:
            self.forget(self._lingering.popleft().record)
        return self._free.popleft() if self._free else -1

    def give_back(self, index: int) -> None:
        """Free a record that was allocated and never used for a pair."""
        self._free.append(index)

    def end(self, index: int, why: ResetBy) -> None:
        """Have the pair's worker, or the one that adopts it, reset the pair."""
        self.store(index, _RESET_AT, why)
        self.probe(index, look=True)

    def linger(self, index: int) -> None:
        """A pair has ended. Its record may be reused if others need it; not that of a place."""
        queue = self._lingering if index < self._first_place else self._lingering_places
        queue.append(self._until(time.monotonic() + _LINGER_S, index))

    def linger_reset(self, index: int) -> None:
        """The same for a pair that was reset: its peers get a RST soon."""
        self._resetting.append(self._until(time.monotonic() + _RESET_LINGER_S, index))

    def _until(self, forgotten_s: float, index: int) -> _Lingering:
        return _Lingering(forgotten_s, index, self._word_of(index))

    def _word_of(self, index: int) -> int:
        return 0 if index < self._first_place else self.word_of_place(index)

    def show(self, index: int, record: Splice) -> None:
        """Make the flows of a record, by which the programs find it.

        Raises:
            OSError: there is no room.
        """
        self.ports.mark(record)
        for direction in Direction:
            self.flows.update(bytes(record.direction[direction].from_), FLOW.pack(index, direction))

    def show_held(self, index: int, record: Splice) -> None:
        """The same for a pair of another machine: a connection of this machine keeps its flows.

        The programs may be opening one from the same port at this moment (express).

        Raises:
            OSError: there is no room, or such a connection; the caller calls `forget`.
        """
        self.ports.mark(record)
        for direction in Direction:
            self.flows.insert(bytes(record.direction[direction].from_), FLOW.pack(index, direction))

    def forget(self, index: int) -> None:
        """Delete the flows of a record; later packets of its peers are answered with a RST."""
        forget_flows(self.flows, index, self.record(index))
        set_state(self.memory, index, SpliceState.FREE)
        for told in self.when_forgotten:
            told(index)
        self.owners.pop(index, None)
        if index < self._first_place:
            self._free.append(index)
        else:
            self.free_place(index)

    def forget_due(self, now_s: float) -> None:
        """Forget the records that have lingered for long enough."""
        for queue in (self._lingering, self._lingering_places, self._resetting):
            while queue and queue[0].forgotten_s <= now_s:
                one = queue.popleft()
                # Otherwise the place was freed, and may have another connection.
                if self._word_of(one.record) == one.word:
                    self.forget(one.record)

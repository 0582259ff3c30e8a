"""The keeper's part of express with a kernel that is made up: places, a queue, and records."""

from __future__ import annotations

import mmap
import socket
import time
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.connection_maps import (
    LEAST_REST_HERE_S,
    LEAST_REST_S,
    REST_S,
    Gone,
)
from pyforwarder.datapath.express.grace import Grace
from pyforwarder.datapath.express.keeping import ExpressKeeper
from pyforwarder.datapath.express.sharing import Label
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice, SpliceState

if TYPE_CHECKING:
    from pyforwarder.datapath.express.numbering import Server

FIRST_SPLICE = 8
FIRST_PORT = 40000
LABEL = Label("main", ("rest",), (0, 0, 0))
NO_LABEL = Label("-", (), (0, 0, 0))


class AtOnce(Grace):
    """Waits in the keeper's own thread, so that the next round knows it."""

    def want(self, now_ns: int) -> None:
        self.pass_by(now_ns)


class ConnectionMaps:
    """As `connections.ConnectionMaps`, in memory."""

    def __init__(self, places: int) -> None:
        self.places, self.first_splice, self.first_port = places, FIRST_SPLICE, FIRST_PORT
        self.asks = [abi.Ask() for _ in range(places)]
        self.queue: deque[int] = deque()
        self.memory = mmap.mmap(-1, (FIRST_SPLICE + places) * SPLICE_BYTES)
        self.ended_connections = 0
        self.begun = 0
        self.targets: dict[int, abi.Target] = {}
        self.sums: dict[bytes, abi.Ends] = {}

    def words(self) -> list[int]:
        return [int(ask.word) for ask in self.asks]

    def word(self, place: int) -> int:
        return int(self.asks[place].word)

    def ask(self, place: int) -> abi.Ask:
        return abi.Ask.from_buffer_copy(self.asks[place])

    def offer(self, place: int) -> None:
        assert place not in self.queue, "it would be two connections'"
        self.queue.append(place)

    def take_free_places(self) -> Iterator[int]:
        while self.queue:
            yield self.queue.popleft()

    def end_connection(self, place: int, word: int, *, not_before_ns: int = 0) -> bool:
        del not_before_ns
        self.ended_connections += 1
        if self.word(place) != word:
            return False
        self.leave(place, time.monotonic())
        return True

    def rest(self, place: int, word: int, now_s: float) -> None:
        ask = self.asks[place]
        assert ask.word == word
        ask.resting_since_ns = int(now_s * 1e9)
        ask.word = word & ~abi.STATE_MASK | abi.AskState.RESTING

    def set_port_lost(self, place: int, *, is_lost: bool) -> None:
        self.asks[place].port_lost = is_lost

    def taken(self) -> int:
        return self.begun

    def wait_for_programs(self) -> None:
        """None runs."""

    def go_round(self, now_s: float, *, is_short: bool, passed_ns: int = 0) -> Gone:
        """As the program of that name does it."""
        counted = freed = 0
        for place, ask in enumerate(self.asks):
            state = ask.word & abi.STATE_MASK
            if state == abi.AskState.RESTING:
                self._leave_rested(place, now_s, is_short=is_short)
            elif state == abi.AskState.LEAVING:
                if not ask.port_lost and ask.resting_since_ns <= passed_ns:
                    self.end(place)
                    freed += 1
            elif state == abi.AskState.JOINED and self._is_counted(place):
                self.store(place, id=0)
                self.rest(place, int(ask.word), now_s)
                counted += 1
        states = [int(ask.word) & abi.STATE_MASK for ask in self.asks]
        unused, leaving = map(states.count, (abi.AskState.FREE, abi.AskState.LEAVING))
        return Gone(counted, freed, unused, is_whole=True, leaving=leaving)

    def _leave_rested(self, place: int, now_s: float, *, is_short: bool) -> None:
        ask, record = self.asks[place], self.record(place)
        rested_s = now_s - ask.resting_since_ns / 1e9
        age_ns = now_s * 1e9 - ask.begun_ns
        ahead_ms = (record.direction[0].ts_recent - ask.first_client_tsval) & 0xFFFFFFFF
        was_slow = ahead_ms * 1e6 <= age_ns and record.direction[0].bytes < age_ns // 65
        is_soon = is_short or record.state == SpliceState.FREE
        is_here = not any(direction.interface for direction in record.direction)
        least_s = LEAST_REST_HERE_S if is_here else LEAST_REST_S
        if not was_slow:
            least_s = REST_S
        if ask.port_lost or rested_s < (least_s if is_soon else REST_S):
            return
        self.leave(place, now_s)

    def leave(self, place: int, now_s: float) -> None:
        """As the programs do it."""
        ask = self.asks[place]
        self.store(place, state=SpliceState.FREE)
        ask.resting_since_ns = int(now_s * 1e9)
        ask.word = ask.word & ~abi.STATE_MASK | abi.AskState.LEAVING

    def _is_counted(self, place: int) -> bool:
        ask, record = self.asks[place], self.record(place)
        has_ended = (
            all(from_peer.fin_acked for from_peer in record.direction)
            and record.state == SpliceState.ACTIVE
        )
        key = abi.EndKey(ask.listener_table, ask.rule, ask.target, record.direction[0].from_.dport)
        ends = self.sums.get(bytes(key))
        if not has_ended or record.worker != abi.NO_WORKER or not record.id or ends is None:
            return False
        if self.is_counted(ask):
            return False
        if ask.begun_ns < ends.since_ns:
            return False
        ends.pairs += 1
        for direction, from_peer in enumerate(record.direction):
            ends.bytes[direction] += from_peer.bytes
        return True

    def end_keys(self) -> list[bytes]:
        return list(self.sums)

    def ends(self, key: bytes) -> abi.Ends:
        return abi.Ends.from_buffer_copy(self.sums[key])

    def write_ends(self, key: bytes, ends: abi.Ends) -> None:
        self.sums[key] = abi.Ends.from_buffer_copy(ends)

    def delete_ends(self, key: bytes) -> None:
        del self.sums[key]

    def end(self, place: int) -> None:
        """As the program does it (`free_place`)."""
        self.store(place, state=SpliceState.FREE)
        self.asks[place].word &= ~abi.STATE_MASK
        self.offer(place)

    def write_target(self, number: int, target: abi.Target) -> None:
        self.targets[number] = abi.Target.from_buffer_copy(target)

    def target(self, number: int) -> abi.Target:
        return self.targets.get(number, abi.Target())

    def counts(self) -> dict[abi.Count, int]:
        return dict.fromkeys(abi.Count, 0)

    def mark_counted(self, place: int) -> None:
        self.asks[place].counted_number = self.asks[place].word >> abi.STATE_BITS

    def is_counted(self, ask: abi.Ask) -> bool:
        return bool(ask.counted_number == ask.word >> abi.STATE_BITS)

    # What becomes of a connection

    def record(self, place: int) -> Splice:
        return Splice.from_buffer(self.memory, (FIRST_SPLICE + place) * SPLICE_BYTES)

    def store(self, place: int, **fields: object) -> None:
        record = self.record(place)
        for name, value in fields.items():
            setattr(record, name, value)
        del record

    def join(self, place: int, *, age_s: float = 0.0, has_ended: bool = False) -> int:
        """A connection begins there; its word."""
        if place in self.queue:
            self.queue.remove(place)
        self.begun += 1
        ask = self.asks[place]
        ask.word = (ask.word & ~abi.STATE_MASK) + 8 | abi.AskState.JOINED
        ask.begun_ns = time.monotonic_ns() - int(age_s * 1e9)
        self.store(
            place, state=SpliceState.ACTIVE, id=1 << 52 | place, worker=abi.NO_WORKER, reset=0
        )
        for direction in self.record(place).direction:
            direction.fin_acked = int(has_ended)
            direction.interface = 2
        return int(ask.word)

    def begin_asking(self, place: int, *, age_s: float = 0.0) -> int:
        """A server is asked for there; its word."""
        word = self.join(place, age_s=age_s)
        self.asks[place].word = word & ~abi.STATE_MASK | abi.AskState.ASKED
        return int(self.asks[place].word)


class Express:
    """As `sharing.Express`, of one process."""

    def __init__(self, connections: ConnectionMaps, workers: int) -> None:
        self.connections = connections
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        self.keepers = [one for one, _ in pairs]
        self.workers = [other for _, other in pairs]
        for end in (*self.keepers, *self.workers):
            end.setblocking(False)
        self.closed: set[int] = set()
        self.offered = [False] * connections.places
        self.is_to_stop = self.has_stopped = False
        self.back: list[int] = []  # numbers of servers that no listener has
        self.tables = {0}  # that listeners have
        self.said = LABEL
        self.since_ns = 0  # of the label

    def send(self, worker: int, message: str) -> bool:
        try:
            self.keepers[worker].send(message.encode())
        except OSError:
            return False
        return True

    def is_offered(self, place: int) -> bool:
        return self.offered[place]

    def set_offered(self, place: int, *, offered: bool) -> None:
        self.offered[place] = offered

    def label(self, table: int, begun_ns: int) -> Label:
        del table
        return self.said if begun_ns >= self.since_ns else NO_LABEL

    def label_since_ns(self, table: int) -> int:
        del table
        return self.since_ns

    def is_in_use(self, table: int) -> bool:
        return table in self.tables

    def number_of(self, server: Server) -> int:
        return next(
            (
                number
                for number, target in self.connections.targets.items()
                if (bytes(target.server), target.port) == (server.address, server.port_be)
                and number not in self.back
            ),
            0,
        )

    def targets(self) -> int:
        return len(self.connections.targets)

    def given_back(self) -> list[int]:
        return list(self.back)

    def mark_forgotten(self, number: int) -> None:
        self.back.remove(number)

    def store_counts(self, counts: object, *, ports: int, used: int) -> None:
        del counts
        assert 0 <= used <= self.connections.places
        assert 0 <= ports <= self.connections.places

    def mark_stopped(self) -> None:
        self.has_stopped = True

    def close(self) -> None:
        for end in (*self.keepers, *self.workers):
            end.close()


class Stage:
    """One keeper after the other, and what they have the rest of the keeper do."""

    def __init__(self, places: int = 8, workers: int = 2) -> None:
        self.connections = ConnectionMaps(places)
        self.express = Express(self.connections, workers)
        self.workers = workers
        self.taken: list[tuple[int, int, bytes]] = []  # place, worker, what `show` says
        self.keeper: ExpressKeeper

    def start(self) -> ExpressKeeper:
        """A keeper begins, as `Keeper` has it begin."""
        express: Any = self.express
        self.keeper = ExpressKeeper(
            express,
            self.connections.memory,
            SimpleNamespace(take_in=self._take_in, keep_alive=lambda _index: None),
            self.workers,
        )
        self.keeper._places._grace = AtOnce(self.connections.wait_for_programs)
        self.keeper.begin(lambda index: bool(self.connections.record(index - FIRST_SPLICE).state))
        return self.keeper

    def _take_in(self, index: int, said: bytes, worker: int | None = None) -> int:
        assert worker is not None
        place = index - FIRST_SPLICE
        self.connections.store(place, worker=worker)
        self.taken.append((place, worker, said))
        return worker

    def close(self) -> None:
        self.express.close()

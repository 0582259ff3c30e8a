"""Memory and sockets of express that the processes of one daemon share.

The supervisor says which listeners the kernel decides, by which tables, and which servers they have
(`put`). The keeper alone knows how a server is reached. It reports to each worker, by a socket, the
connections that are the worker's from now on, and those that have ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address
from pyforwarder.core.express.choosing import Target, targets_of
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.connection_maps import MOST_LISTENERS, ConnectionMaps
from pyforwarder.datapath.express.numbering import NUMBERS_BYTES, Numbers, Server, packed
from pyforwarder.datapath.express.places import ANSWER_TIMEOUT_S
from pyforwarder.runtime.counters import (
    EXPRESS_CONNECT_FAILED,
    EXPRESS_FIRST,
    EXPRESS_PORTS,
    EXPRESS_PORTS_MOST,
    EXPRESS_PORTS_USED,
)
from pyforwarder.runtime.one_store import store32, store64

if TYPE_CHECKING:
    from pyforwarder.core.express.choosing import Choice
    from pyforwarder.core.express.table import Table
    from pyforwarder.datapath.express.choice_abi import Outcome

# Tables of listeners' rules, old and new ones: a number is reused once no connection refers to it.
TABLES: Final = 128
_REST_S: Final = 10.0
_LABEL_BYTES: Final = 1 << 14
_SEND_BYTES: Final = 4 << 20
_MOST_MESSAGE_BYTES: Final = 1 << 16

_FLAGS: Final = struct.Struct("=II")  # whether express must stop, and has stopped
_HAS_STOPPED_AT: Final = 4
# Failed connections to servers whose numbers have passed to others.
_FAILED_BEFORE: Final = struct.Struct("=Q")
_FAILED_BEFORE_AT: Final = _FLAGS.size
# In front of a label: its length, and since when the number has it (CLOCK_MONOTONIC).
_LABEL: Final = struct.Struct("=IQ")
_IN_USE_AT: Final = 1024  # a byte for each table: whether a listener uses it
_NUMBERS_AT: Final = 4096
_LABELS_AT: Final = _NUMBERS_AT + NUMBERS_BYTES
_OFFERED_AT: Final = _LABELS_AT + TABLES * _LABEL_BYTES  # a byte for each place


@dataclass(frozen=True, slots=True)
class Label:
    """What log and `show` say of connections that a table has decided."""

    listener: str
    rules: Sequence[str]
    keepalive: Sequence[int]  # as a worker requests it
    # Of `rules`, those for which the log says what was read of the first packet.
    told: Sequence[int] = ()
    is_logged: bool = True  # whether ended connections have log lines


_NO_LABEL: Final = Label("-", (), (0, 0, 0))


@dataclass(frozen=True, slots=True)
class Decided:
    """A listener whose connections to these addresses the kernel decides."""

    label: Label
    table: Table
    # By rule; None: the rule's server gets no new pairs now.
    servers: Mapping[int, Choice | Address | None]
    addresses: Mapping[Address, int]  # where it listens; and the largest MSS that clients get there
    owner: int  # uid of the sockets
    connect_timeouts_s: Mapping[int, float] = field(default_factory=dict)  # by rule


@dataclass(slots=True)
class _Written:
    """The tables in the kernel, by number."""

    numbers: dict[int, tuple[Label, Table]] = field(default_factory=dict)
    resting: dict[int, float] = field(default_factory=dict)  # until when
    # Those that rest, and are still in the maps: a program may be reading them.
    left: set[int] = field(default_factory=set)


class Express:
    """Created before the processes are forked; closed by `close`."""

    def __init__(
        self, connections: ConnectionMaps, *, workers: int, counters: mmap.mmap | None = None
    ) -> None:
        """`close` closes the maps of `connections`, and the memory.

        `counters` is a block of `runtime.counters` in which the keeper stores the programs'
        counters.
        """
        self.connections = connections
        self._counters = counters
        self.has_begun = False
        self._memory = mmap.mmap(-1, _OFFERED_AT + connections.places)
        pairs = [_connected() for _ in range(workers)]
        # Kept for the next keeper, if one dies; see `renew` for workers.
        self.keepers = [keepers for keepers, _ in pairs]
        self.workers = [workers for _, workers in pairs]
        self.closed: set[int] = set()  # workers that have closed their sockets
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._numbers = Numbers(self._memory, _NUMBERS_AT, self._forget_outcome)
        self._written = _Written()
        self.has_room_at_s = math.inf  # when room for a refused rule may be free (CLOCK_MONOTONIC)
        self._listening: dict[bytes, bytes] = {}
        self._labels: dict[int, tuple[bytes, Label]] = {}  # of tables, as last read

    # The supervisor

    def put(
        self, listeners: Sequence[Decided], known: Iterable[Target] = ()
    ) -> list[dict[int, str]]:
        """From here on the kernel decides the connections to these listeners, and no others.

        `known` are targets that keep their numbers, and so their outcomes, even while no rule leads
        to them.

        Returns for each listener the rules for which there is no room, and why: workers decide
        these. `has_room_at_s` says when to try again.

        Raises:
            OSError: the kernel refuses. Its maps may be out of date then: `put(())` empties them.
        """
        now_s = time.monotonic()
        self._forget_rested(now_s)
        wanted: dict[bytes, bytes] = {}
        used = set()
        choices = set()
        targets = set(known)
        refusals: list[dict[int, str]] = []
        for one in listeners:
            if len(wanted) + len(one.addresses) > MOST_LISTENERS:
                why = f"the kernel has room for {MOST_LISTENERS} addresses of listeners"
                refusals.append(dict.fromkeys(one.servers, why))
                continue
            number = self._number_of(one, now_s)
            if number is None:
                why = "the kernel has no room for another table of rules"
                refusals.append(dict.fromkeys(one.servers, why))
                continue
            left: dict[int, str] = {}
            refusals.append(left)
            used.add(number)
            told = abi.Listener(table=number, owner=one.owner)
            for rule, to in one.servers.items():
                within_s = min(one.connect_timeouts_s.get(rule, ANSWER_TIMEOUT_S), ANSWER_TIMEOUT_S)
                told.answer_ms[rule] = max(1, int(within_s * 1000))
                if to is None:
                    told.target[rule] = 0
                    continue
                targets.update(targets_of(to))
                if not all(map(self._target_of, targets_of(to))):
                    left[rule] = "the kernel has no number for another server"
                elif isinstance(to, Address):
                    told.target[rule] = self._target_of(Target(to))
                else:
                    chosen = self.connections.choices.number_of(to, self._target_of, now_s)
                    if chosen is None:
                        left[rule] = "the kernel has no room for another choice of servers"
                    else:
                        choices.add(to)
                        told.target[rule] = chosen
            for address, mss in one.addresses.items():
                told.advertised_mss = mss
                wanted[bytes(_key_of(address))] = bytes(told)
        # Key by key: so the keys in the kernel are known here even if it refuses the next one.
        for key in self._listening.keys() - wanted.keys():
            self.connections.remove_listener(abi.ListenerKey.from_buffer_copy(key))
            del self._listening[key]
        for key, told_bytes in wanted.items():
            if self._listening.get(key) != told_bytes:
                self.connections.add_listener(
                    abi.ListenerKey.from_buffer_copy(key),
                    abi.Listener.from_buffer_copy(told_bytes),
                )
                self._listening[key] = told_bytes
        self.connections.choices.keep(choices, now_s)
        self._numbers.keep((Server.of(*target) for target in targets), now_s)
        for number in self._written.numbers.keys() - used:
            del self._written.numbers[number]
            self._written.resting[number] = now_s + _REST_S
            self._memory[_IN_USE_AT + number] = 0
            self._written.left.add(number)
        self.has_room_at_s = self._rests_until_s(now_s) if any(refusals) else math.inf
        return refusals

    def _forget_rested(self, now_s: float) -> None:
        """Delete tables that no program reads any more: others need the room."""
        written = self._written
        for number in [one for one in written.left if written.resting[one] <= now_s]:
            self.connections.tables.forget(number)
            written.left.discard(number)

    def _rests_until_s(self, now_s: float) -> float:
        """When the next number may be reused; infinity if none is waiting for that."""
        tables = (until_s for until_s in self._written.resting.values() if until_s > now_s)
        choices = self.connections.choices.rests_until_s(now_s)
        return min(*tables, choices, self._numbers.rests_until_s(now_s))

    def _number_of(self, one: Decided, now_s: float) -> int | None:
        """The number of a listener's table, which is written if new; None: there is no room."""
        for number, written in self._written.numbers.items():
            if written == (one.label, one.table):
                return number
        label = json.dumps(
            [
                one.label.listener,
                list(one.label.rules),
                list(one.label.keepalive),
                list(one.label.told),
                one.label.is_logged,
            ],
            ensure_ascii=False,
        ).encode()
        resting = self._written.resting
        free = (
            number
            for number in range(1, TABLES)
            if number not in self._written.numbers and resting.get(number, 0.0) <= now_s
        )
        # The one that has rested for longest: a lasting connection may still refer to a number.
        chosen = min(free, key=lambda number: resting.get(number, 0.0), default=None)
        if chosen is None or len(label) > _LABEL_BYTES - _LABEL.size:
            return None
        at = _LABELS_AT + chosen * _LABEL_BYTES
        try:
            self.connections.tables.write(chosen, one.table)
        except OSError:  # no room for all its names
            self.connections.tables.forget(chosen)  # no listener has used it
            return None
        # After the table: if there was no room for it, lasting connections keep their old label.
        head = _LABEL.pack(len(label), time.monotonic_ns())
        self._memory[at : at + len(head) + len(label)] = head + label
        self._memory[_IN_USE_AT + chosen] = 1
        resting.pop(chosen, None)
        self._written.numbers[chosen] = one.label, one.table
        return chosen

    def _target_of(self, target: Target) -> int:
        """The number of a target; 0: none is left."""
        return self._numbers.give(Server.of(*target))

    def _forget_outcome(self, number: int) -> None:
        choices = self.connections.choices
        failed = int(choices.outcome(number).failed)
        choices.forget_outcome(number)
        # After that, so that no reader gets more than there were: see `store_counts`.
        (before,) = _FAILED_BEFORE.unpack_from(self._memory, _FAILED_BEFORE_AT)
        store64(self._memory, _FAILED_BEFORE_AT, before + failed)

    def outcome(self, target: Target) -> Outcome:
        """The outcomes of the connections to a target so far."""
        return self.connections.choices.outcome(self._numbers.given(Server.of(*target)))

    def renew(self, worker: int) -> socket.socket:
        """Create another socket for a worker's successor, with all messages that the worker has not
        read.

        A process that has got the old socket from the dead worker does not receive the successor's
        messages, and a shutdown of the old one has no effect on it. Returns the keeper's end, for
        `renewed`.

        Raises:
            OSError: there are no descriptors left; nothing has changed.
        """
        keeper, ours = _connected()
        old_keeper, old = self.keepers[worker], self.workers[worker]
        with contextlib.suppress(OSError):
            old_keeper.shutdown(socket.SHUT_RDWR)  # the keeper keeps what it cannot send
        with contextlib.suppress(OSError):
            while data := old.recv(_MOST_MESSAGE_BYTES):
                keeper.send(data)  # what has room there
        self.keepers[worker], self.workers[worker] = keeper, ours
        old_keeper.close()
        old.close()
        return keeper

    @property
    def is_listening(self) -> bool:
        """Whether the kernel decides connections of any listener."""
        return bool(self._listening)

    def stop(self) -> None:
        """Open no more connections, and give all open ones to workers; `has_stopped` says when that
        is done.

        The keeper reports them to the workers as soon as it has read this.
        """
        self.put(())
        store32(self._memory, _HAS_STOPPED_AT, 0)
        store32(self._memory, 0, 1)
        self.wake()

    @property
    def has_stopped(self) -> bool:
        """Whether every connection was reported to a worker."""
        return bool(_FLAGS.unpack_from(self._memory)[1])

    def wake(self) -> None:
        """Have the keeper look at all places now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.wake_fd, 1)

    # The keeper

    def renewed(self, worker: int, keeper: socket.socket) -> None:
        """Use another socket for a worker's successor: the keeper's end of it, which `close`
        closes.
        """
        self.keepers[worker].close()
        keeper.setblocking(False)
        self.keepers[worker] = keeper
        self.closed.discard(worker)

    def send(self, worker: int, message: str) -> bool:
        """Send a message to a worker; False: it is busy, or one of `closed`."""
        try:
            self.keepers[worker].send(message.encode())
        except ConnectionError:
            self.closed.add(worker)  # or it is dead: its successor has another socket
            return False
        except OSError:
            return False
        return True

    @property
    def is_to_stop(self) -> bool:
        """Whether `stop` was called."""
        return bool(_FLAGS.unpack_from(self._memory)[0])

    def mark_stopped(self) -> None:
        """All connections were given to workers."""
        store32(self._memory, _HAS_STOPPED_AT, 1)

    def store_counts(self, counts: Mapping[abi.Count, int], *, ports: int, used: int) -> None:
        """Store the counters for other processes, with the numbers of ports and of used ports."""
        if self._counters is None:
            return
        with memoryview(self._counters) as block, block.cast("Q") as words:
            for kind, number in counts.items():
                words[EXPRESS_FIRST + kind] = number
            words[EXPRESS_PORTS], words[EXPRESS_PORTS_USED] = ports, used
            words[EXPRESS_PORTS_MOST] = max(words[EXPRESS_PORTS_MOST], used)
            # It never decreases, although a number may be passing to another server at this moment.
            (before,) = _FAILED_BEFORE.unpack_from(self._memory, _FAILED_BEFORE_AT)
            failed = before + self.connections.choices.failures(self._numbers.most())
            words[EXPRESS_CONNECT_FAILED] = max(words[EXPRESS_CONNECT_FAILED], failed)

    def label(self, table: int, begun_ns: int) -> Label:
        """The label of a connection that a table has decided, and that began at `begun_ns`.

        An empty one if another table has got the number since.
        """
        at = _LABELS_AT + table % TABLES * _LABEL_BYTES
        length, since_ns = _LABEL.unpack_from(self._memory, at)
        if begun_ns < since_ns:
            return _NO_LABEL
        at += _LABEL.size
        written = self._memory[at : at + min(length, _LABEL_BYTES - _LABEL.size)]
        known = self._labels.get(table)
        if known is None or known[0] != written:
            try:
                known = written, Label(*json.loads(written))
            except (ValueError, TypeError):
                # Another label is being written: the one before is lost.
                return _NO_LABEL
            self._labels[table] = known
        return known[1]

    def label_since_ns(self, table: int) -> int:
        """Since when a table has its number (CLOCK_MONOTONIC)."""
        at = _LABELS_AT + table % TABLES * _LABEL_BYTES
        return int(_LABEL.unpack_from(self._memory, at)[1])

    def is_in_use(self, table: int) -> bool:
        """Whether a listener uses a table: the number passes to another table ten seconds later at
        the earliest.
        """
        return bool(self._memory[_IN_USE_AT + table % TABLES])

    def is_offered(self, place: int) -> bool:
        """Whether a place is in the programs' queue, or was taken from it."""
        return bool(self._memory[_OFFERED_AT + place])

    def set_offered(self, place: int, *, offered: bool) -> None:
        """Note that a place is offered to the programs, or is not."""
        self._memory[_OFFERED_AT + place] = offered

    def targets(self) -> int:
        """The highest number that a server has or had; numbers begin with 1."""
        return self._numbers.most()

    def number_of(self, server: Server) -> int:
        """The number of a server that a listener has or had; 0: no listener."""
        return self._numbers.find(server)

    def given_back(self) -> list[int]:
        """Numbers of servers that no listener has any more: the keeper must forget them."""
        return self._numbers.given_back()

    def mark_forgotten(self, number: int) -> None:
        """From here on the number may pass to another server."""
        self._numbers.mark_forgotten(number)

    # All

    def keep_only(self, worker: int) -> None:
        """In a worker: close what belongs to the keeper and to other workers."""
        for n, end in enumerate(self.workers):
            if n != worker:
                end.close()
        for end in self.keepers:
            end.close()
        os.close(self.wake_fd)
        self._memory.close()
        if self._counters is not None:
            self._counters.close()
        self.connections.close()

    def close(self) -> None:
        """Close the maps and sockets."""
        for end in (*self.workers, *self.keepers):
            end.close()
        os.close(self.wake_fd)
        self._memory.close()
        if self._counters is not None:
            self._counters.close()
        self.connections.close()


def _connected() -> tuple[socket.socket, socket.socket]:
    """The keeper's end and a worker's end of a new socket pair.

    Raises:
        OSError: there are no descriptors left.
    """
    keeper, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (keeper, worker):
        end.setblocking(False)
    with contextlib.suppress(OSError):
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
    return keeper, worker


def _key_of(address: Address) -> abi.ListenerKey:
    key = abi.ListenerKey(port=socket.htons(address.port))
    ctypes.memmove(key.address, packed(address.host), 16)
    return key

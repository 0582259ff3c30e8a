"""What the supervisor, the keeper and the workers of one daemon share of express.

The supervisor says which listeners are decided in the kernel, by which tables, and which servers
they have (`put`); of a server only the keeper knows how it is reached. The keeper tells each worker
of the connections that are its own from now on, or that have ended, by a socket.
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
from pyforwarder.core.express.choosing import InTurn
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.connecting import MOST_LISTENERS, Connecting
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

# Of listeners' rules, old and new ones: a number is used again once no connection refers to it.
TABLES: Final = 128
_REST_S: Final = 10.0
_LABEL_BYTES: Final = 1 << 14
_SEND_BYTES: Final = 4 << 20
_MOST_MESSAGE_BYTES: Final = 1 << 16

_FLAGS: Final = struct.Struct("=II")  # whether it is to stop, and has
_HAS_STOPPED_AT: Final = 4
# Connections that failed to servers whose numbers are others' by now.
_FAILED_BEFORE: Final = struct.Struct("=Q")
_FAILED_BEFORE_AT: Final = _FLAGS.size
# In front of a label: how long it is, and since when the number has it (CLOCK_MONOTONIC).
_LABEL: Final = struct.Struct("=IQ")
_IN_USE_AT: Final = 1024  # a byte for each table: whether a listener has it
_NUMBERS_AT: Final = 4096
_LABELS_AT: Final = _NUMBERS_AT + NUMBERS_BYTES
_OFFERED_AT: Final = _LABELS_AT + TABLES * _LABEL_BYTES  # a byte for each place


@dataclass(frozen=True, slots=True)
class Label:
    """What is said of connections that a table has decided."""

    listener: str
    rules: Sequence[str]
    keepalive: Sequence[int]  # as a worker asks for it
    # Of `rules`, those of which the log says what they have read in the first packet.
    told: Sequence[int] = ()
    is_logged: bool = True  # whether connections that have ended have lines


_NO_LABEL: Final = Label("-", (), (0, 0, 0))


@dataclass(frozen=True, slots=True)
class Decided:
    """A listener whose connections to these addresses the kernel decides."""

    label: Label
    table: Table
    servers: Mapping[int, Choice | Address | None]  # of rules; None: it gets no new pairs now
    addresses: Mapping[Address, int]  # where it listens: what clients there are told of MSS at most
    owner: int  # the user whose connections they are
    connect_timeouts_s: Mapping[int, float] = field(default_factory=dict)  # of rules


@dataclass(slots=True)
class _Written:
    """Tables in the kernel, by number."""

    numbers: dict[int, tuple[Label, Table]] = field(default_factory=dict)
    resting: dict[int, float] = field(default_factory=dict)  # until when
    # Of those that rest, what is in the maps still: a program may be reading it.
    left: set[int] = field(default_factory=set)


class Express:
    """Made before anybody is forked; closed by `close`."""

    def __init__(
        self, connecting: Connecting, *, workers: int, counters: mmap.mmap | None = None
    ) -> None:
        """The maps are ours to close from here on, and so is the memory.

        `counters` is a block of `runtime.counters` in which the keeper says what has been counted.
        """
        self.connecting = connecting
        self._counters = counters
        self.has_begun = False
        self._memory = mmap.mmap(-1, _OFFERED_AT + connecting.places)
        pairs = [_connected() for _ in range(workers)]
        # Kept for the keeper that comes after one that has died; see `renew` for workers.
        self.keepers = [keepers for keepers, _ in pairs]
        self.workers = [workers for _, workers in pairs]
        self.closed: set[int] = set()  # workers that were found to have closed theirs
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._numbers = Numbers(self._memory, _NUMBERS_AT, self._forget_outcome)
        self._written = _Written()
        self.has_room_at_s = math.inf  # for what there was none (CLOCK_MONOTONIC), at the earliest
        self._listening: dict[bytes, bytes] = {}
        self._labels: dict[int, tuple[bytes, Label]] = {}  # of tables, as they were read last

    # The supervisor

    def put(
        self, listeners: Sequence[Decided], known: Iterable[Address] = ()
    ) -> list[dict[int, str]]:
        """Decide the connections to these from here on, and no others.

        `known` are servers that keep their numbers, and so what became of their connections, also
        while no rule leads to them.

        Of each it is said which of its rules there is no room for, so that they are a worker's, and
        why; `has_room_at_s` says when to try again.

        Raises:
            OSError: the kernel refuses. What it decides by then is old: `put(())` ends it.
        """
        now_s = time.monotonic()
        self._forget_rested(now_s)
        wanted: dict[bytes, bytes] = {}
        used = set()
        choices = set()
        servers = set(known)
        said: list[dict[int, str]] = []
        for one in listeners:
            if len(wanted) + len(one.addresses) > MOST_LISTENERS:
                why = f"the kernel has room for {MOST_LISTENERS} addresses of listeners"
                said.append(dict.fromkeys(one.servers, why))
                continue
            number = self._number_of(one, now_s)
            if number is None:
                why = "the kernel has no room for another table of rules"
                said.append(dict.fromkeys(one.servers, why))
                continue
            left: dict[int, str] = {}
            said.append(left)
            used.add(number)
            told = abi.Listener(table=number, owner=one.owner)
            for rule, to in one.servers.items():
                within_s = min(one.connect_timeouts_s.get(rule, ANSWER_TIMEOUT_S), ANSWER_TIMEOUT_S)
                told.answer_ms[rule] = max(1, int(within_s * 1000))
                if to is None:
                    told.target[rule] = 0
                    continue
                servers.update(_servers_of(to))
                if not all(map(self._target_of, _servers_of(to))):
                    left[rule] = "the kernel has no number for another server"
                elif isinstance(to, Address):
                    told.target[rule] = self._target_of(to)
                else:
                    chosen = self.connecting.choices.number_of(to, self._target_of, now_s)
                    if chosen is None:
                        left[rule] = "the kernel has no room for another choice of servers"
                    else:
                        choices.add(to)
                        told.target[rule] = chosen
            for address, mss in one.addresses.items():
                told.told_mss = mss
                wanted[bytes(_key_of(address))] = bytes(told)
        # Key by key: each that is in the kernel is known here, also if it refuses the next one.
        for key in self._listening.keys() - wanted.keys():
            self.connecting.listen_no_more(abi.ListenerKey.from_buffer_copy(key))
            del self._listening[key]
        for key, told_bytes in wanted.items():
            if self._listening.get(key) != told_bytes:
                self.connecting.listen(
                    abi.ListenerKey.from_buffer_copy(key),
                    abi.Listener.from_buffer_copy(told_bytes),
                )
                self._listening[key] = told_bytes
        self.connecting.choices.keep(choices, now_s)
        self._numbers.keep(map(Server.of, servers), now_s)
        for number in self._written.numbers.keys() - used:
            del self._written.numbers[number]
            self._written.resting[number] = now_s + _REST_S
            self._memory[_IN_USE_AT + number] = 0
            self._written.left.add(number)
        self.has_room_at_s = self._rests_until_s(now_s) if any(said) else math.inf
        return said

    def _forget_rested(self, now_s: float) -> None:
        """Take tables out of the maps that no program reads any more: others need the room."""
        written = self._written
        for number in [one for one in written.left if written.resting[one] <= now_s]:
            self.connecting.tables.forget(number)
            written.left.discard(number)

    def _rests_until_s(self, now_s: float) -> float:
        """When the next number has rested; infinity if none rests."""
        tables = (until_s for until_s in self._written.resting.values() if until_s > now_s)
        choices = self.connecting.choices.rests_until_s(now_s)
        return min(*tables, choices, self._numbers.rests_until_s(now_s))

    def _number_of(self, one: Decided, now_s: float) -> int | None:
        """The number of its table, which is written if it is new; None: there is no room."""
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
        # That which has rested longest: a connection that lasts may refer to it still.
        chosen = min(free, key=lambda number: resting.get(number, 0.0), default=None)
        if chosen is None or len(label) > _LABEL_BYTES - _LABEL.size:
            return None
        at = _LABELS_AT + chosen * _LABEL_BYTES
        try:
            self.connecting.tables.write(chosen, one.table)
        except OSError:  # no room for all its names
            self.connecting.tables.forget(chosen)  # no listener has had it
            return None
        # Behind that: while there is no room, what lasts keeps what is said of it.
        head = _LABEL.pack(len(label), time.monotonic_ns())
        self._memory[at : at + len(head) + len(label)] = head + label
        self._memory[_IN_USE_AT + chosen] = 1
        resting.pop(chosen, None)
        self._written.numbers[chosen] = one.label, one.table
        return chosen

    def _target_of(self, address: Address) -> int:
        """The number of a server; 0: there is none left."""
        return self._numbers.give(Server.of(address))

    def _forget_outcome(self, number: int) -> None:
        choices = self.connecting.choices
        failed = int(choices.outcome(number).failed)
        choices.forget_outcome(number)
        # Behind that, as nobody may read more than there were: see `store_counts`.
        (before,) = _FAILED_BEFORE.unpack_from(self._memory, _FAILED_BEFORE_AT)
        store64(self._memory, _FAILED_BEFORE_AT, before + failed)

    def outcome(self, address: Address) -> Outcome:
        """What became of the connections to a server so far."""
        return self.connecting.choices.outcome(self._numbers.given(Server.of(address)))

    def renew(self, worker: int) -> socket.socket:
        """A worker is gone: make another socket for its successor, with all that it has not read.

        Who has got the old one from it does not read what the successor is told; and if that one
        was shut down, the successor's is not. The keeper's end, which that is to be given
        (`renewed`).

        Raises:
            OSError: there are no descriptors left; nothing has changed.
        """
        keeper, ours = _connected()
        old_keeper, old = self.keepers[worker], self.workers[worker]
        with contextlib.suppress(OSError):
            old_keeper.shutdown(socket.SHUT_RDWR)  # the keeper keeps what it cannot say
        with contextlib.suppress(OSError):
            while data := old.recv(_MOST_MESSAGE_BYTES):
                keeper.send(data)  # as much as had room there
        self.keepers[worker], self.workers[worker] = keeper, ours
        old_keeper.close()
        old.close()
        return keeper

    @property
    def is_listening(self) -> bool:
        """Whether the kernel decides any connection."""
        return bool(self._listening)

    def stop(self) -> None:
        """Begin nothing more, and have the workers get all that goes on; `has_stopped` says when.

        They are told by the keeper as soon as it has read this.
        """
        self.put(())
        store32(self._memory, _HAS_STOPPED_AT, 0)
        store32(self._memory, 0, 1)
        self.wake()

    @property
    def has_stopped(self) -> bool:
        """Whether no connection is without a worker that has been told of it."""
        return bool(_FLAGS.unpack_from(self._memory)[1])

    def wake(self) -> None:
        """Have the keeper look now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.wake_fd, 1)

    # The keeper

    def renewed(self, worker: int, keeper: socket.socket) -> None:
        """A worker's successor has another socket: this is our end of it, and ours to close."""
        self.keepers[worker].close()
        keeper.setblocking(False)
        self.keepers[worker] = keeper
        self.closed.discard(worker)

    def send(self, worker: int, message: str) -> bool:
        """Whether a worker was told this; False: it is busy, or one of `closed`."""
        try:
            self.keepers[worker].send(message.encode())
        except ConnectionError:
            self.closed.add(worker)  # or it is dead: the next one has another
            return False
        except OSError:
            return False
        return True

    @property
    def is_to_stop(self) -> bool:
        """Whether `stop` was called."""
        return bool(_FLAGS.unpack_from(self._memory)[0])

    def mark_stopped(self) -> None:
        """All that goes on is the workers'."""
        store32(self._memory, _HAS_STOPPED_AT, 1)

    def store_counts(self, counts: Mapping[abi.Count, int], *, ports: int, used: int) -> None:
        """Let others read them, how many ports there are, and how many of these are used now."""
        if self._counters is None:
            return
        with memoryview(self._counters) as block, block.cast("Q") as words:
            for kind, number in counts.items():
                words[EXPRESS_FIRST + kind] = number
            words[EXPRESS_PORTS], words[EXPRESS_PORTS_USED] = ports, used
            words[EXPRESS_PORTS_MOST] = max(words[EXPRESS_PORTS_MOST], used)
            # It never falls, although a number may be another server's in this very moment.
            (before,) = _FAILED_BEFORE.unpack_from(self._memory, _FAILED_BEFORE_AT)
            failed = before + self.connecting.choices.failures(self._numbers.most())
            words[EXPRESS_CONNECT_FAILED] = max(words[EXPRESS_CONNECT_FAILED], failed)

    def label(self, table: int, begun_ns: int) -> Label:
        """What is said of a connection that a table has decided, and that began then.

        Nothing, if another table has that number since.
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
                # Another one is being written: nothing is known of the one before any more.
                return _NO_LABEL
            self._labels[table] = known
        return known[1]

    def label_since_ns(self, table: int) -> int:
        """Since when a table has its number (CLOCK_MONOTONIC)."""
        at = _LABELS_AT + table % TABLES * _LABEL_BYTES
        return int(_LABEL.unpack_from(self._memory, at)[1])

    def is_in_use(self, table: int) -> bool:
        """Whether a listener has it: its number is another's no sooner than ten seconds later."""
        return bool(self._memory[_IN_USE_AT + table % TABLES])

    def is_offered(self, place: int) -> bool:
        """Whether the programs have a place, or had it."""
        return bool(self._memory[_OFFERED_AT + place])

    def set_offered(self, place: int, *, offered: bool) -> None:
        """They have it from here on, or have not."""
        self._memory[_OFFERED_AT + place] = offered

    def targets(self) -> int:
        """The highest number that a server has or had: they begin with 1."""
        return self._numbers.most()

    def number_of(self, server: Server) -> int:
        """The number of a server that a listener has or had; 0: none has."""
        return self._numbers.find(server)

    def given_back(self) -> list[int]:
        """Numbers of servers that no listener has any more: they are to be forgotten."""
        return self._numbers.given_back()

    def mark_forgotten(self, number: int) -> None:
        """It may be another server's from here on."""
        self._numbers.mark_forgotten(number)

    # All

    def keep_only(self, worker: int) -> None:
        """In a worker: close what is the keeper's and others'."""
        for n, end in enumerate(self.workers):
            if n != worker:
                end.close()
        for end in self.keepers:
            end.close()
        os.close(self.wake_fd)
        self._memory.close()
        if self._counters is not None:
            self._counters.close()
        self.connecting.close()

    def close(self) -> None:
        """Close the maps and sockets."""
        for end in (*self.workers, *self.keepers):
            end.close()
        os.close(self.wake_fd)
        self._memory.close()
        if self._counters is not None:
            self._counters.close()
        self.connecting.close()


def _connected() -> tuple[socket.socket, socket.socket]:
    """The keeper's end and a worker's.

    Raises:
        OSError: there are no descriptors left.
    """
    keeper, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (keeper, worker):
        end.setblocking(False)
    with contextlib.suppress(OSError):
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
    return keeper, worker


def _servers_of(to: Choice | Address) -> Iterable[Address]:
    """Each of them once."""
    if isinstance(to, Address):
        return (to,)
    if isinstance(to, InTurn):
        return dict.fromkeys(to.servers)
    return [one.server for one in to.servers]


def _key_of(address: Address) -> abi.ListenerKey:
    key = abi.ListenerKey(port=socket.htons(address.port))
    ctypes.memmove(key.address, packed(address.host), 16)
    return key

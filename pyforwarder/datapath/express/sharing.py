"""What the supervisor, the keeper and the workers of one daemon share of express.

The supervisor says which listeners are decided in the kernel, by which tables, and which servers
they have (`put`); of a server only the keeper knows how it is reached. The keeper tells each worker
of the connections that are its own from now on, or that have ended, by a socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import mmap
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.connecting import MOST_LISTENERS, MOST_TARGETS, Connecting

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.express.table import Table

# Of listeners' rules, old and new ones: a number is used again once no connection refers to it.
TABLES: Final = 128
_REST_S: Final = 10.0
_LABEL_BYTES: Final = 1 << 14
_MAPPED: Final = b"\0" * 10 + b"\xff\xff"

_FLAGS: Final = struct.Struct("=II")  # whether it is to stop, and has
_COUNTS: Final = struct.Struct(f"={len(abi.Count)}Q")
_COUNTS_AT: Final = 64
_WANTED: Final = struct.Struct("=16sHH")  # address, port in wire order, IP version; 0: none
_WANTED_AT: Final = 4096
_LABELS_AT: Final = _WANTED_AT + MOST_TARGETS * 32
_OFFERED_AT: Final = _LABELS_AT + TABLES * _LABEL_BYTES  # a byte for each place


class Server(NamedTuple):
    """An address as the maps have it."""

    address: bytes  # 16 bytes in wire order
    port_be: int
    version: int

    @classmethod
    def of(cls, address: Address) -> Server:
        """The same; `address` has an IP address without a scope."""
        return cls(packed(address.host), socket.htons(address.port), 6 if address.is_ipv6 else 4)


def packed(host: str) -> bytes:
    """16 bytes in wire order, of IPv4 as ::ffff:a.b.c.d."""
    found = ipaddress.ip_address(host).packed
    return found if len(found) == 16 else _MAPPED + found


@dataclass(frozen=True, slots=True)
class Label:
    """What is said of connections that a table has decided."""

    listener: str
    rules: Sequence[str]
    keepalive: Sequence[int]  # as a worker asks for it


@dataclass(frozen=True, slots=True)
class Decided:
    """A listener whose connections to these addresses the kernel decides."""

    label: Label
    table: Table
    servers: Mapping[int, Address | None]  # of rules; None: it gets no new pairs now
    addresses: Mapping[Address, int]  # where it listens: what clients there are told of MSS at most
    owner: int  # the user whose connections they are


@dataclass(slots=True)
class _Written:
    """Tables in the kernel, by number."""

    numbers: dict[int, tuple[Label, Table]] = field(default_factory=dict)
    resting: dict[int, float] = field(default_factory=dict)  # until when


class Express:
    """Made before anybody is forked; closed by `close`."""

    def __init__(self, connecting: Connecting, *, workers: int) -> None:
        """The maps are ours to close from here on."""
        self.connecting = connecting
        self.has_begun = False
        self._memory = mmap.mmap(-1, _OFFERED_AT + connecting.places)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        # Kept for the keeper or worker that comes after one that has died.
        self.keepers = [keepers for keepers, _ in pairs]
        self.workers = [workers for _, workers in pairs]
        for end in (*self.keepers, *self.workers):
            end.setblocking(False)
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._numbers: dict[Server, int] = {}
        self._written = _Written()
        self._listening: dict[bytes, bytes] = {}

    # The supervisor

    def put(self, listeners: Sequence[Decided]) -> None:
        """Decide the connections to these from here on, and no others.

        What there is no room for is a worker's.
        """
        now_s = time.monotonic()
        wanted: dict[bytes, bytes] = {}
        used = set()
        for one in listeners:
            number = self._number_of(one, now_s)
            if number is None:
                continue
            used.add(number)
            told = abi.Listener(table=number, owner=one.owner)
            for rule, server in one.servers.items():
                told.target[rule] = self._target_of(server) if server is not None else 0
            for address, mss in one.addresses.items():
                if len(wanted) < MOST_LISTENERS:
                    told.told_mss = mss
                    wanted[bytes(_key_of(address))] = bytes(told)
        for key in self._listening.keys() - wanted.keys():
            self.connecting.listen_no_more(abi.ListenerKey.from_buffer_copy(key))
        for key, told_bytes in wanted.items():
            if self._listening.get(key) != told_bytes:
                self.connecting.listen(
                    abi.ListenerKey.from_buffer_copy(key),
                    abi.Listener.from_buffer_copy(told_bytes),
                )
        self._listening = wanted
        for number in self._written.numbers.keys() - used:
            del self._written.numbers[number]
            self._written.resting[number] = now_s + _REST_S

    def _number_of(self, one: Decided, now_s: float) -> int | None:
        """The number of its table, which is written if it is new; None: there is no room."""
        for number, written in self._written.numbers.items():
            if written == (one.label, one.table):
                return number
        label = json.dumps(
            [one.label.listener, list(one.label.rules), list(one.label.keepalive)],
            ensure_ascii=False,
        ).encode()
        resting = self._written.resting
        free = (
            number
            for number in range(1, TABLES)
            if number not in self._written.numbers and resting.get(number, 0.0) <= now_s
        )
        chosen = next(free, None)
        if chosen is None or len(label) > _LABEL_BYTES - 4:
            return None
        at = _LABELS_AT + chosen * _LABEL_BYTES
        self._memory[at : at + 4 + len(label)] = len(label).to_bytes(4, "little") + label
        try:
            self.connecting.tables.write(chosen, one.table)
        except OSError:  # no room for all its names
            self.connecting.tables.forget(chosen)
            return None
        resting.pop(chosen, None)
        self._written.numbers[chosen] = one.label, one.table
        return chosen

    def _target_of(self, address: Address) -> int:
        """The number of a server, always the same one; 0: there is none left."""
        server = Server.of(address)
        number = self._numbers.get(server)
        if number is None:
            number = len(self._numbers) + 1
            if number >= MOST_TARGETS:
                return 0
            self._numbers[server] = number
            _WANTED.pack_into(self._memory, _WANTED_AT + number * 32, *server)
        return number

    @property
    def is_listening(self) -> bool:
        """Whether the kernel decides any connection."""
        return bool(self._listening)

    def stop(self) -> None:
        """Begin nothing more, and have the workers get all that goes on; `has_stopped` says when.

        They are told by the keeper as soon as it has read this.
        """
        self.put(())
        _FLAGS.pack_into(self._memory, 0, 1, 0)
        self.wake()

    @property
    def has_stopped(self) -> bool:
        """Whether no connection is without a worker that has been told of it."""
        return bool(_FLAGS.unpack_from(self._memory)[1])

    def wake(self) -> None:
        """Have the keeper look now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.wake_fd, 1)

    def counts(self) -> dict[abi.Count, int]:
        """What the programs have counted, as the keeper has seen it last."""
        return dict(zip(abi.Count, _COUNTS.unpack_from(self._memory, _COUNTS_AT), strict=True))

    # The keeper

    @property
    def is_to_stop(self) -> bool:
        """Whether `stop` was called."""
        return bool(_FLAGS.unpack_from(self._memory)[0])

    def say_stopped(self) -> None:
        """All that goes on is the workers'."""
        _FLAGS.pack_into(self._memory, 0, 1, 1)

    def say_counts(self, counts: Mapping[abi.Count, int]) -> None:
        """Let others read them."""
        _COUNTS.pack_into(self._memory, _COUNTS_AT, *(counts[kind] for kind in abi.Count))

    def label(self, table: int) -> Label:
        """What is said of the connections that a table has decided."""
        at = _LABELS_AT + table % TABLES * _LABEL_BYTES
        length = int.from_bytes(self._memory[at : at + 4], "little")
        listener, rules, keepalive = json.loads(self._memory[at + 4 : at + 4 + length])
        return Label(listener, rules, keepalive)

    def is_offered(self, place: int) -> bool:
        """Whether the programs have a place, or had it."""
        return bool(self._memory[_OFFERED_AT + place])

    def say_offered(self, place: int, *, offered: bool) -> None:
        """They have it from here on, or have not."""
        self._memory[_OFFERED_AT + place] = offered

    def targets(self) -> int:
        """How many servers have a number: from 1 on."""
        self._number_all()
        return len(self._numbers)

    def number_of(self, server: Server) -> int:
        """The number of a server that a listener has or had; 0: none has."""
        if server not in self._numbers:
            self._number_all()
        return self._numbers.get(server, 0)

    def _number_all(self) -> None:
        for number in range(len(self._numbers) + 1, MOST_TARGETS):
            found = Server(*_WANTED.unpack_from(self._memory, _WANTED_AT + number * 32))
            if not found.version:
                return
            self._numbers[found] = number

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
        self.connecting.close()

    def close(self) -> None:
        """Close the maps and sockets."""
        for end in (*self.workers, *self.keepers):
            end.close()
        os.close(self.wake_fd)
        self._memory.close()
        self.connecting.close()


def _key_of(address: Address) -> abi.ListenerKey:
    key = abi.ListenerKey(port=socket.htons(address.port))
    ctypes.memmove(key.address, packed(address.host), 16)
    return key

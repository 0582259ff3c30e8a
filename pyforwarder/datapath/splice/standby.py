"""Spliced pairs of other machines that this machine could continue: the keeper's part.

They are in the programs' map from the start, with mute sockets that keep their ports. So a takeover
needs no haste and no order: the programs forward the packets that arrive here. A pair that is in
the map does no harm while its packets go to another machine.

Once its addresses are this host's, the pair is taken over: a worker gets it, and it has counts and
timeouts. Its peers are probed until both have answered (`settling.py`). The machine that had the
pair releases it silently when it learns of that.

This part also gets the connections that no machine can continue (`fleet/failover/stays.py`): once
their address is here, their peers are reset (`challenging.py`).

Requests come from a process without privileges that reads a fleet's store. It is trusted no more
than a worker: a request is in the table, or that process is killed; and pairs are accepted only if
both local addresses are among the configured ones.
"""

from __future__ import annotations

import contextlib
import ipaddress
import resource
import secrets
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, ResetBy, Splice
from pyforwarder.datapath.splice.challenging import Challenges
from pyforwarder.datapath.splice.interfaces import LOOPBACK
from pyforwarder.datapath.splice.records import FLOW
from pyforwarder.datapath.splice.replicas import (
    Interfaces,
    boot_unix_s,
    is_replicable,
    is_wide,
    shown,
    slack_for,
    splice_of,
)
from pyforwarder.datapath.splice.routes import Route, Routes
from pyforwarder.datapath.splice.settling import Settling
from pyforwarder.datapath.splice.standby_requests import FaultyStandbyError, understand
from pyforwarder.errors import ControlError
from pyforwarder.fleet.failover import stays
from pyforwarder.fleet.failover.record import Endpoint, Entry, Pair, RecordFault
from pyforwarder.fleet.failover.stays import Connection
from pyforwarder.runtime import moving_addresses
from pyforwarder.runtime.interface_addresses import interface_addresses
from pyforwarder.runtime.socket_options import TRANSPARENT

if TYPE_CHECKING:
    import mmap

    from pyforwarder.datapath.ebpf import syscall as bpf
    from pyforwarder.datapath.splice.interfaces import Links
    from pyforwarder.datapath.splice.keepalive import Keepalives

_TAKEN_AT_ONCE: Final = 64
# In addition to notifications: an address may have come before we listened for them.
_LOOK_S: Final = 1.0
# Above the ids that a daemon assigns, and exact in every JSON parser.
_FIRST_ID: Final = 1 << 51


class Owner(Protocol):
    """What this module needs of the keeper."""

    def allocate(self) -> int:
        """A free record's index, or -1."""

    def take_in(self, index: int, shown: bytes) -> int:
        """Give a pair to a worker; returns which one."""

    def owns(self, index: int) -> bool:
        """Whether a worker has the pair."""

    def release(self, index: int) -> None:
        """A worker's pair goes through another machine now: release it, without a packet to its
        ends.
        """

    def give_way(self, index: int, since_s: float) -> bool:
        """Delete the flows of a record of this machine, which does not have their addresses; False:
        they are needed. Another machine has a connection there since then (CLOCK_MONOTONIC).
        """

    def show(self, index: int, record: Splice) -> None:
        """Make the flows of a pair; OSError if there are some with its addresses."""

    def forget(self, index: int) -> None:
        """Delete the flows of a pair."""

    def end(self, index: int, why: ResetBy) -> None:
        """Reset a pair."""

    def remember_joined(self, index: int, sockets: Sequence[socket.socket]) -> None:
        """Record that these sockets belong to the pair."""


@dataclass(slots=True)
class _Held:
    index: int
    pair: Pair
    sockets: tuple[socket.socket, socket.socket]
    routes: int  # count of route changes when its routes were looked up


class Standby:
    """The pairs of other machines, in one keeper."""

    def __init__(
        self,
        owner: Owner,
        memory: mmap.mmap,
        flows: bpf.Map,
        links: Links,
        keepalives: Keepalives,
        *,
        addresses: Collection[str],
        most: int,
        ports_held: int = 0,
    ) -> None:
        """`addresses` are those that move with the pairs; none: this part does nothing.

        At most `most` pairs are held. The keeper has a descriptor for each of `ports_held` ports.
        """
        self._owner = owner
        self._memory = memory
        self._flows = flows
        self._links = links
        self._addresses = frozenset(ipaddress.ip_address(one).packed for one in addresses)
        # Half of the other descriptors are for requests of workers; a pair has two.
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = min(most, max(0, files - ports_held) // 4)
        self._routes = Routes() if self._addresses else None
        self._held: dict[str, _Held] = {}
        # Of pairs that were taken over.
        self._sockets: dict[int, tuple[socket.socket, socket.socket]] = {}
        self._left: deque[str] = deque()  # keys of pairs to be taken over
        # Connections of other machines that end with their machine.
        self._stays: dict[str, str] = {}
        # Likewise of pairs that could not be held, by key; the newest last.
        self._unheld: dict[str, tuple[Connection, ...]] = {}
        self._challenges = Challenges(self._goes_on)
        self._settling = Settling(memory, keepalives, owner.end)
        self._taken = 0  # pairs, since the last answer that has said so
        self._waiting: set[int] = set()  # workers that must be told
        self._is_changed = True
        self._changes = 0  # of routes
        self._look_s = 0.0
        # Addresses that were absent since the start, or since a pair of theirs was released: only
        # when these come, pairs are taken over.
        self._absent: set[bytes] = set()
        self._present = self._addresses  # at the last check
        self._boot_unix_s = boot_unix_s()

    # Reports

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._addresses)

    def routes_changed(self) -> None:
        """Addresses or routes have changed."""
        self._is_changed = True
        self._changes += 1

    def unsettled(self, index: int, record: Splice) -> None:
        """An earlier keeper has taken a pair over, and its peers have not answered yet."""
        if self.is_wanted and is_wide(record):
            self._settling.begin(index, record.id)

    def sockets_of(self, index: int) -> tuple[socket.socket, socket.socket] | None:
        """The mute sockets of a pair that was taken over; the caller closes them."""
        return self._sockets.pop(index, None)

    def is_away(self, index: int) -> bool:
        """Whether another machine has this pair's addresses, and may continue it.

        Then no packet is sent to its ends from here: it could end the pair there.
        """
        if not self._addresses:
            return False
        here = self._here()
        record = self._record(index)
        own = {
            _ip_of(bytes(direction.from_.target), record.family) for direction in record.direction
        }
        return own <= self._addresses and not own <= here and is_replicable(record)

    def forgotten(self, index: int) -> None:
        """A pair has ended."""
        for sock in self._sockets.pop(index, ()):
            sock.close()

    def answer(self, data: bytes) -> dict[str, object]:
        """Handle a request.

        Raises:
            FaultyStandbyError: it is not in the table.
        """
        request = understand(data)
        answer: dict[str, object] = {"n": request["n"]}
        if time.monotonic() > request["until"]:
            return {**answer, "late": True}
        match request["do"]:
            case "begin":
                for key in list(self._held):
                    self._release(key)
                self._stays.clear()
                self._unheld.clear()
            case "hold":
                answer["refused"] = [
                    key for key, text in request["pairs"] if not self._hold_or_note(key, text)
                ]
            case "release":
                for key in request["keys"]:
                    self._release(key)
            case "stay":
                self._stay(*request["group"])
            case "let_go":
                here = self._here()
                for text in request["pairs"]:
                    self._release_moved(_decode(text), here)
            case _:
                answer["waiting"] = sorted(self._waiting)
                answer["taken"], answer["held"] = self._taken, len(self._held)
                self._taken = 0
                self._waiting.clear()
        return answer

    def _stay(self, key: str, text: str) -> None:
        """Replace the connections of a group by these."""
        try:
            stays.decode(text or f"{stays.SCHEMA} ")
        except RecordFault as error:
            raise FaultyStandbyError(str(error)) from error
        self._stays.pop(key, None)
        if text and len(self._stays) < stays.MOST_GROUPS:
            self._stays[key] = text
            self._is_changed = True  # they may have to be reset by this machine already

    def _goes_on(self, one: Connection) -> bool:
        """Whether a connection belongs to a spliced pair here, which another machine had reported
        under another key.
        """
        return self._index_of(_packets_from(one.peer, one.own)) is not None

    def _hold_or_note(self, key: str, text: str) -> bool:
        try:
            entry, pair = Entry.decode(key, text)
        except RecordFault as error:
            raise FaultyStandbyError(str(error)) from error
        self._unheld.pop(key, None)
        if self._hold(key, entry, pair):
            return True
        if len(self._unheld) >= self._most:
            del self._unheld[next(iter(self._unheld))]
        client, listener, source, server = pair.ends
        self._unheld[key] = Connection(listener, client, True), Connection(source, server, False)
        self._is_changed = True
        return False

    def _hold(self, key: str, entry: Entry, pair: Pair) -> bool:
        if {pair.ends.listener.ip, pair.ends.source.ip} - self._addresses:
            return False  # of a machine with another configuration
        held = self._held.get(key)
        if held is not None and held.pair.deltas != pair.deltas:
            self._release(key)  # another connection with the same ports
            held = None
        before = held.pair if held is not None else None
        slack = slack_for(before, pair)
        interfaces: Interfaces | None = None
        if held is not None and held.routes == self._changes:
            interfaces = Interfaces(*self._record(held.index).out)
        else:
            with contextlib.suppress(OSError):
                interfaces = self._interfaces_of(pair)
        if interfaces is None:
            # Without a route now: when one exists again, it leads as before.
            return held is not None
        if held is not None:
            record = self._record(held.index)
            if not any(direction.last_received_s for direction in record.direction):
                new = splice_of(pair, record.id, interfaces, claim=entry.claim + 1, slack=slack)
                self._write(held.index, new)
            held.pair, held.routes = pair, self._changes
            return True
        return self._begin(key, entry, pair, interfaces, slack)

    def _begin(
        self, key: str, entry: Entry, pair: Pair, interfaces: Interfaces, slack: int
    ) -> bool:
        if len(self._held) >= self._most:
            return False
        record = splice_of(
            pair, _FIRST_ID + secrets.randbits(50), interfaces, claim=entry.claim + 1, slack=slack
        )
        # Rounded up, as it has been rounded down.
        since_s = pair.started_s + 1 - self._boot_unix_s
        if not all(self._has_no_flow(record, direction, since_s) for direction in Direction):
            return False  # a pair of this machine has these ports, or had them a moment ago
        index = self._owner.allocate()
        if index < 0:
            return False
        made: list[socket.socket] = []
        try:
            made.extend(_mute_socket(record, direction) for direction in Direction)
            self._write(index, record)
            self._owner.show(index, record)
        except OSError:
            for sock in made:
                sock.close()
            self._owner.forget(index)
            return False
        self._held[key] = _Held(index, pair, (made[0], made[1]), self._changes)
        return True

    def _has_no_flow(self, record: Splice, direction: Direction, since_s: float) -> bool:
        """Whether no record has the flow of these packets, of a connection that began at `since_s`.

        What this machine had there gives way once their address is another machine's: with the
        addresses it has used the same ports, as those of express are few, and the same on both.
        """
        from_peer = record.direction[direction].from_
        index = self._index_of(bytes(from_peer))
        if index is None:
            return True
        own = _ip_of(bytes(from_peer.target), record.family)
        return own not in self._here() and self._owner.give_way(index, since_s)

    def _here(self) -> frozenset[bytes]:
        """Those of the addresses that this host has now."""
        if self._is_changed:
            self._present = self._addresses & _addresses_here()
        return self._present

    def _interfaces_of(self, pair: Pair) -> Interfaces | None:
        """The interfaces by which the peers are reached; None: none that suits the programs.

        The local addresses may not be this host's yet, so routes are looked up without them.
        """
        assert self._routes is not None
        found = []
        for end, mark in ((pair.ends.client, pair.marks[0]), (pair.ends.server, pair.marks[1])):
            target = end.ip if len(end.ip) == 16 else b"\0" * 10 + b"\xff\xff" + end.ip
            out = self._routes.interface(Route(pair.family, b"", target, 0, end.port, mark, 0))
            if not out or out == LOOPBACK or not self._links.add(out):
                return None
            found.append(out)
        return Interfaces(*found)

    def _release(self, key: str) -> None:
        self._unheld.pop(key, None)
        held = self._held.pop(key, None)
        if held is not None:
            for sock in held.sockets:
                sock.close()
            self._owner.forget(held.index)

    def _release_moved(self, pair: Pair, here: Collection[bytes]) -> None:
        for end in (pair.ends.listener, pair.ends.source):
            self._absent.discard(end.ip)
        self._is_changed = True  # it may be absent already
        if not {pair.ends.listener.ip, pair.ends.source.ip}.isdisjoint(here):
            # Without the record our kernel would reset the connections whose packets still come
            # here. Both machines do the same with them, and we are asked again.
            return
        # Only the keys of this record are used, so its interfaces do not matter.
        record = splice_of(pair, 1, Interfaces(0, 0), claim=0, slack=0)
        found = {self._index_of(bytes(direction.from_)) for direction in record.direction}
        index = found.pop()
        if found or index is None or not self._owner.owns(index):
            return
        there = self._record(index)
        if [direction.seq_delta for direction in there.direction] == [
            direction.seq_delta for direction in record.direction
        ]:
            self._owner.release(index)

    # Takeover

    def wait_s(self, most_s: float) -> float:
        """Seconds until `run_due` is due."""
        if not self._addresses:
            return most_s
        if self._left or self._is_changed:
            return 0.0
        now_s = time.monotonic()
        wait_s = min(most_s, max(0.0, self._look_s - now_s))
        return self._challenges.wait_s(self._settling.wait_s(wait_s))

    def run_due(self) -> None:
        """Do some of what is due. Never raises."""
        if not self._addresses:
            return
        now_s = time.monotonic()
        try:
            if self._is_changed or now_s >= self._look_s:
                self._is_changed, self._look_s = False, now_s + _LOOK_S
                self._look_at_addresses()
            for _ in range(min(_TAKEN_AT_ONCE, len(self._left))):
                self._take(self._left.popleft())
            self._settling.run_due()
            self._challenges.run_due()
        except Exception:
            traceback.print_exc(file=sys.stderr)

    def _look_at_addresses(self) -> None:
        self._present = present = self._addresses & _addresses_here()
        # IPv4 and IPv6 addresses of a fleet move together or apart, as their pairs need them.
        ready = present & self._absent
        for key, held in self._held.items():
            both = {held.pair.ends.listener.ip, held.pair.ends.source.ip}
            if both <= present and both & ready:
                self._left.append(key)
        lost = self._lost(ready) if ready else []
        if self._left or lost:
            self._announce(ready)
        self._challenges.begin(lost)
        self._absent |= self._addresses - present

    def _lost(self, ready: Collection[bytes]) -> list[Connection]:
        """The connections at these addresses that no machine can continue, once each.

        Addresses come one after the other: connections of a group, and the two connections of a
        pair, are kept until their own addresses have come.
        """
        lost: list[Connection] = []
        for key, text in list(self._stays.items()):
            some, others = _divided(stays.decode(text), ready)
            lost += some
            if not others:
                del self._stays[key]
            elif some:
                self._stays[key] = stays.encode(others)
        for key, ends in list(self._unheld.items()):
            some, others = _divided(ends, ready)
            lost += some
            if not others:
                del self._unheld[key]
            elif some:
                self._unheld[key] = tuple(others)
        return lost

    def _announce(self, ready: Collection[bytes]) -> None:
        """Announce addresses to their neighbours, before peers are probed: the answers must get
        here.

        The software that moves the addresses announces them, too, but perhaps later; and a peer
        that has answered another packet is silent for half a second (tcp_invalid_ratelimit).
        """
        for packed in ready:
            with contextlib.suppress(OSError, ControlError):
                moving_addresses.announce([str(ipaddress.ip_address(packed))])

    def _take(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is None:
            return  # it has ended meanwhile
        record = self._record(held.index)
        self._sockets[held.index] = held.sockets
        self._owner.remember_joined(held.index, held.sockets)
        said = shown(held.pair, record, boot_unix_s=self._boot_unix_s)
        worker = self._owner.take_in(held.index, said)
        self._waiting.add(worker)
        self._taken += 1
        self._settling.begin(held.index, record.id)

    # Records

    def _index_of(self, key: bytes) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return int(FLOW.unpack(self._flows.lookup(key))[0])
        return None

    def _record(self, index: int) -> Splice:
        return Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)

    def _write(self, index: int, record: Splice) -> None:
        base = index * SPLICE_BYTES
        self._memory[base : base + SPLICE_BYTES] = bytes(record)


def _mute_socket(record: Splice, direction: Direction) -> socket.socket:
    """A mute socket, which keeps the ports even while their address is another machine's."""
    sock = splice_sockets.revive(record.direction[direction], record.family)
    # Otherwise it could send from an address that has gone again.
    sock.setsockopt(*TRANSPARENT[sock.family], 0)
    return sock


def _divided(
    connections: Iterable[Connection], ips: Collection[bytes]
) -> tuple[list[Connection], list[Connection]]:
    """The connections at these local addresses, and the others."""
    some: list[Connection] = []
    others: list[Connection] = []
    for one in connections:
        (some if one.own.ip in ips else others).append(one)
    return some, others


def _packets_from(peer: Endpoint, own: Endpoint) -> bytes:
    """The key of a peer's packets (struct splice_key)."""
    ips = (ip if len(ip) == 16 else b"\0" * 10 + b"\xff\xff" + ip for ip, _ in (peer, own))
    return b"".join(ips) + struct.pack("!HH", peer.port, own.port)


def _ip_of(packed: bytes, family: int) -> bytes:
    """An address as 4 or 16 bytes, as configured addresses are stored."""
    return packed if family == 6 else packed[12:]


def _addresses_here() -> set[bytes]:
    """The addresses of this host's interfaces, 4 or 16 bytes each."""
    return {one.address.packed for one in interface_addresses()}


def _decode(text: str) -> Pair:
    try:
        return Pair.decode(text)
    except RecordFault as error:
        raise FaultyStandbyError(str(error)) from error

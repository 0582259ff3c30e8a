"""The keeper's part of express: ports, places, the ways to servers, and who is told of what.

Twice a second it looks at all places. A connection that lasts becomes a spliced pair of a worker
that has few of these; of one that has ended a worker is told, which counts it and writes the log.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction, PairRecord, PairState
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.places import LASTS_AFTER_S, Ended, Places
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice

if TYPE_CHECKING:
    import mmap

    from pyforwarder.datapath.express.sharing import Express, Label, Server

_LOOK_S: Final = 0.5
# While all of it is to come to an end.
_SOON_S: Final = 0.02
# What is known of the way to a server is learned anew after so long: rules of a packet filter tell
# nobody that they have changed.
_KNOWN_FOR_S: Final = 60.0
# A port that another program has is asked for again.
_HOLD_S: Final = 10.0
# In one message; a message is taken whole or not at all.
MOST_TOLD: Final = 24
# That have ended, and no worker has read of yet: then their places wait.
_MOST_UNTOLD: Final = 8192
_SEND_BYTES: Final = 4 << 20
_ID_AT: Final = Splice.id.offset


class Owner(Protocol):
    """What the keeper does for it."""

    def take_in(self, index: int, said: bytes, worker: int | None = None) -> int:
        """A pair is a worker's from now on, which is to adopt it."""

    def keep_alive(self, index: int) -> None:
        """Its peers are asked from now on, if they are to be."""


class _Known(NamedTuple):
    target: abi.Target
    until_s: float


class ExpressKeeper:
    """One keeper's."""

    def __init__(self, express: Express, memory: mmap.mmap, owner: Owner, workers: int) -> None:
        """`memory` are the records of all splices, those of places among them."""
        self._express = express
        self._connecting = express.connecting
        self._memory = memory
        self._owner = owner
        self._workers = workers
        self.first = self._connecting.first_splice
        self._places = Places(self._connecting, self._record)
        self._next_s = 0.0
        self._adopted: dict[int, int] = {}  # index -> worker
        self._untold: list[deque[Ended]] = [deque() for _ in range(workers)]
        self._is_waking = [False] * workers  # to be told that there is a pair to adopt
        self._known: dict[int, _Known] = {}
        self._ports: dict[int, socket.socket] = {}
        self._unheld: list[int] = []
        self._hold_s = 0.0
        for end in express.keepers:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)

    def begin(self, is_used: Callable[[int], bool]) -> None:
        """Hold the ports, and offer the places whose records are not used.

        An earlier keeper of this daemon may have done so: what it has learned is learned anew.
        """
        for number in range(1, self._express.targets() + 1):
            self._connecting.aim(number, abi.Target())
        # Those that are in the queue are free. Of others a program may have one in this moment.
        free = set(self._connecting.take_back())
        for place in free:
            self._express.say_offered(place, offered=False)
        for place in range(self._connecting.places):
            if place in free or not (
                self._express.is_offered(place) or is_used(self.first + place)
            ):
                self._offer(place)
            else:
                self._hold(place)

    def owns(self, index: int, record: Splice) -> bool:
        """Whether a record is of a connection that no worker has been told of."""
        if index < self.first:
            return False
        state = self._connecting.word(index - self.first) & abi.STATE_MASK
        if state == abi.AskState.FREE:
            return False
        is_lingering = state == abi.AskState.JOINED and not record.id
        return is_lingering or record.worker == abi.NO_WORKER

    def adopted(self, index: int, worker: int) -> None:
        """A pair at a place has a worker."""
        if index >= self.first:
            self._adopted[index] = worker

    def said(self, index: int) -> bytes:
        """What `show` said of a pair that a worker was to adopt, or had; empty: not known."""
        if index < self.first:
            return b""
        ask = self._connecting.ask(index - self.first)
        if ask.word & abi.STATE_MASK != abi.AskState.JOINED:
            return b""  # it was an earlier daemon's
        label = self._express.label(ask.listener_table)
        return _shown(self._record(index), label, ask, DatapathKind.SPLICE)

    def freed(self, index: int) -> None:
        """A record at a place is of no pair any more."""
        self._adopted.pop(index, None)
        place = index - self.first
        word = self._connecting.word(place)
        if word & abi.STATE_MASK == abi.AskState.JOINED:
            self._connecting.let_go(place, word)
        else:
            self._offer(place)  # it was an earlier daemon's

    # Ports

    def _offer(self, place: int) -> None:
        if self._hold(place):
            self._express.say_offered(place, offered=True)
            self._connecting.offer(place)
        else:
            self._unheld.append(place)

    def _hold(self, place: int) -> bool:
        """Keep other programs of this host away from the port; False: one has it."""
        if place in self._ports:
            return True
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(self._ports) >= files // 2:
            return False
        sock = hold_port(self._connecting.first_port + place)
        if sock is not None:
            self._ports[place] = sock
        return sock is not None

    def _hold_others(self, now_s: float) -> None:
        if self._unheld and now_s >= self._hold_s:
            self._hold_s = now_s + _HOLD_S
            places, self._unheld = self._unheld, []
            for place in places:
                self._offer(place)

    # Ways to servers

    def learn(self, server: Server, target: abi.Target, now_s: float) -> bool:
        """How a server is reached, which a connection has shown; whether any listener has it."""
        number = self._express.number_of(server)
        if not number:
            return False
        known = self._known.get(number)
        if known is not None and bytes(known.target) != bytes(target):
            self._forget_way(number)
        if number not in self._known:
            self._aim(number, target)
        self._known[number] = _Known(target, now_s + _KNOWN_FOR_S)
        return True

    def ways_changed(self) -> None:
        """Interfaces, addresses, routes or rules have: all is learned anew."""
        for number in list(self._known):
            self._forget_way(number)

    def _forget_way(self, number: int) -> None:
        known = self._known.pop(number)
        # The rest stays as it is: a program may be reading it.
        self._connecting.aim(number, _without_way(known.target))

    def _aim(self, number: int, target: abi.Target) -> None:
        self._connecting.aim(number, _without_way(target))
        self._connecting.aim(number, target)

    # Looking

    def wait_s(self, most_s: float) -> float:
        """How long `go_on` need not be called."""
        return min(most_s, max(0.0, self._next_s - time.monotonic()))

    def go_on(self) -> None:
        """Do what is due."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        is_stopping = self._express.is_to_stop and not self._express.has_stopped
        self._next_s = now_s + (_SOON_S if is_stopping else _LOOK_S)
        room = _MOST_UNTOLD - sum(map(len, self._untold))
        lasts_after_s = 0.0 if is_stopping else LASTS_AFTER_S
        seen = self._places.look(now_s, lasts_after_s=lasts_after_s, most=room)
        for ended in seen.ended:
            self._untold[ended.place % self._workers].append(ended)
        for place in seen.lasting:
            self._take_in(place)
        self._tell_all()
        self._hold_others(now_s)
        for number, known in list(self._known.items()):
            if known.until_s < now_s:
                self._forget_way(number)
        self._express.say_counts(self._connecting.counts())
        if is_stopping and not seen.asked and not any(self._untold) and not any(self._is_waking):
            self._express.say_stopped()

    @property
    def wake_fd(self) -> int:
        """Readable when `woken` is to be called."""
        return self._express.wake_fd

    def woken(self) -> None:
        """Somebody wants a look now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._express.wake_fd)
        self._next_s = 0.0

    def _take_in(self, place: int) -> None:
        index = self.first + place
        ask, record = self._connecting.ask(place), self._record(index)
        label = self._express.label(ask.listener_table)
        for at, number in zip(
            (Splice.keep_idle_s, Splice.keep_interval_s, Splice.keep_count),
            label.keepalive,
            strict=True,
        ):
            self._store("=I", index, at.offset, number)
        count = Counter(self._adopted.values())
        worker = min(range(self._workers), key=lambda one: count[one])
        self._adopted[index] = worker
        self._owner.take_in(index, _shown(record, label, ask, DatapathKind.NONE), worker)
        self._owner.keep_alive(index)
        self._is_waking[worker] = True

    def _tell_all(self) -> None:
        for worker, end in enumerate(self._express.keepers):
            untold = self._untold[worker]
            while untold or self._is_waking[worker]:
                told = [untold[n] for n in range(min(MOST_TOLD, len(untold)))]
                message = {
                    "adopt": int(self._is_waking[worker]),
                    "ended": [self._describe(one) for one in told],
                }
                try:
                    end.send(json.dumps(message).encode())
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.ECONNREFUSED):
                        raise
                    break  # its worker is busy, or another will come
                self._is_waking[worker] = False
                for one in told:
                    untold.popleft()
                    if self._connecting.word(one.place) == one.ask.word:
                        # A keeper that comes after us tells nobody again.
                        self._store("=Q", self.first + one.place, _ID_AT, 0)

    def _describe(self, ended: Ended) -> list[object]:
        """As `worker/express.py` reads it."""
        label = self._express.label(ended.ask.listener_table)
        record = ended.record
        up, down = record.way
        return [
            label.listener,
            _rule_of(label, ended.ask),
            [_end(up.from_.source, up.from_.sport), _end(up.from_.target, up.from_.dport)],
            [_end(up.source, up.sport), _end(up.target, up.dport)],
            ended.ask.begun_ns,
            ended.ended_ns,
            [
                ended.carried_bytes(Direction.UP),
                int(up.packets),
                ended.carried_bytes(Direction.DOWN),
                int(down.packets),
            ],
        ]

    def _record(self, index: int) -> Splice:
        return Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)

    def _store(self, form: str, index: int, at: int, number: int) -> None:
        struct.pack_into(form, self._memory, index * SPLICE_BYTES + at, number)


def _without_way(target: abi.Target) -> abi.Target:
    found = abi.Target.from_buffer_copy(bytes(target))
    found.out = 0
    return found


def _rule_of(label: Label, ask: abi.Ask) -> str:
    return label.rules[ask.rule] if ask.rule < len(label.rules) else "-"


def _end(address: object, port_be: int) -> list[object]:
    return [bytes(address).hex(), socket.ntohs(port_be)]  # type: ignore[call-overload]


def _shown(record: Splice, label: Label, ask: abi.Ask, kind: DatapathKind) -> bytes:
    """What `show` is to say of it: a struct pair. `NONE`: no worker has counted it yet."""
    said = PairRecord()
    said.id = record.id
    said.started_ns = ask.begun_ns
    said.last_ns = time.monotonic_ns()
    said.state, said.datapath = PairState.JOINED, kind
    up = record.way[Direction.UP]
    for name, address, port_be in (
        ("client", up.from_.source, up.from_.sport),
        ("listener", up.from_.target, up.from_.dport),
        ("source", up.source, up.sport),
        ("server", up.target, up.dport),
    ):
        endpoint = getattr(said, name)
        endpoint.ip[:] = bytes(address)
        endpoint.port, endpoint.family = socket.ntohs(port_be), record.family
    most = PairRecord.rule.size - 1
    said.rule = _rule_of(label, ask).encode()[:most]
    said.listener_name = label.listener.encode()[:most]
    return bytes(said)


def hold_port(port: int) -> socket.socket | None:
    """A socket that has this port of all addresses to itself; None: somebody has it."""
    for family, host in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                return None
            continue  # the host has no IPv6
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((host, port))
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL:
                continue
            return None
        return sock
    return None


def free_ports(count: int) -> int:
    """The first of so many ports in a row that no program seems to have, as high as possible.

    Raises:
        OSError: there are none.
    """
    for first in range(65536 - count, 1024 - 1, -count):
        held = [hold_port(port) for port in range(first, first + count, max(1, count // 64))]
        for sock in held:
            if sock is not None:
                sock.close()
        if None not in held:
            return first
    raise OSError(errno.EADDRINUSE, f"no {count} ports in a row are free")

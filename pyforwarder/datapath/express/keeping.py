"""The keeper's part of express: places, routes to servers, and reports to the workers.

Twice a second it looks at all places, a part of them in each turn of the keeper's loop. A
connection that lasts becomes a spliced pair of a worker. The end of one that has ended is reported
to the worker of its place, which counts it and writes the log line. In between the keeper glances
at how fast places are taken, and has the programs free those that have rested (pace.py).
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import socket
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction, PairRecord, PairState
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.counting import Counting
from pyforwarder.datapath.express.learning import shown_route
from pyforwarder.datapath.express.places import LASTS_AFTER_S, Ended, Places
from pyforwarder.datapath.express.ports import Ports
from pyforwarder.datapath.express.telling import Telling
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice
from pyforwarder.runtime.one_store import store32, store64
from pyforwarder.runtime.own_addresses import this_host_has

if TYPE_CHECKING:
    import mmap

    from pyforwarder.datapath.express.numbering import Server
    from pyforwarder.datapath.express.sharing import Express, Label

_LOOK_S: Final = 0.5
# While places are short, the ends that no program counts are reported this often.
_LOOK_WHEN_SHORT_S: Final = 0.1
# While express is stopping.
_SOON_S: Final = 0.02
# The route to a server is learned anew after so long: no notification tells when rules of a packet
# filter change.
_KNOWN_FOR_S: Final = 60.0
# In one turn of the keeper's loop, which has other requests: places that are looked at, and pairs
# that are given to workers.
_LOOKS_AT_ONCE: Final = 128
_TAKEN_AT_ONCE: Final = 64
# Pairs that a worker was told to adopt, and has not adopted yet. It gets no more than that; others
# continue without a worker until it has adopted some.
MOST_WAITING: Final = 512
_ID_AT: Final = Splice.id.offset


class Owner(Protocol):
    """What this module needs of the keeper."""

    def take_in(self, index: int, shown: bytes, worker: int | None = None) -> int:
        """Give a pair to a worker, which is to adopt it."""

    def keep_alive(self, index: int) -> None:
        """Start keepalives to the pair's peers, if they are configured."""


class _Known(NamedTuple):
    target: abi.Target
    until_s: float


class ExpressKeeper:
    """Express in one keeper."""

    def __init__(self, express: Express, memory: mmap.mmap, owner: Owner, workers: int) -> None:
        """`memory` has the records of all splices, those of the places among them."""
        self._express = express
        self._connections = express.connections
        self._memory = memory
        self._owner = owner
        self.first = self._connections.first_splice
        self._ports = Ports(express)
        self._places = Places(self._connections, self._record)
        self._counting = Counting(express, workers)
        self._telling = Telling(express, workers, self._told, self._first_of)
        self._next_s = 0.0
        self._looked_s = 0.0  # when the last look began
        self._glance_s = 0.0
        self._is_counting = False  # an end was found that the programs count in the next round
        self._is_asking = False  # a place was waiting for its server in the last look
        # By worker: place -> word of the connections that it will get, oldest first. A place occurs
        # once at most, and may have another connection before its turn.
        self._lasting: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(workers)]
        self._worker_of: dict[int, int] = {}  # index -> worker
        # By worker: pairs whose adoption the worker has not confirmed.
        self._waiting: list[set[int]] = [set() for _ in range(workers)]
        self._known: dict[int, _Known] = {}

    def begin(self, is_used: Callable[[int], bool]) -> None:
        """Bind the ports, and offer the places whose records are not used.

        An earlier keeper of this daemon may have run: the routes that it has learned are learned
        anew. Everything else in the targets stays as it is, since a program may be reading it.
        """
        for number in range(1, self._express.targets() + 1):
            self._connections.write_target(number, _without_route(self._connections.target(number)))
        self._counting.begin()
        indexes = range(self.first, self.first + self._connections.places)
        self._ports.begin([is_used(index) for index in indexes])

    def owns(self, index: int, record: Splice) -> bool:
        """Whether a record is of a connection that was not reported to a worker."""
        if index < self.first:
            return False
        place = index - self.first
        if self._connections.word(place) & abi.STATE_MASK == abi.AskState.FREE:
            # It may have ended since it was found, and its place is in the queue by now.
            return self._express.is_offered(place)
        return bool(record.worker == abi.NO_WORKER)

    def adopted(self, index: int, worker: int, *, has_it: bool) -> None:
        """A pair at a place belongs to this worker from here on; `has_it`: it has adopted it
        already.
        """
        if index < self.first:
            return
        self._freed(index)
        self._worker_of[index] = worker
        if not has_it:
            self._waiting[worker].add(index)
            self._name(index, worker)
            self._telling.wake(worker)

    def had(self, index: int) -> None:
        """The worker of a pair confirms that it has adopted and counted it."""
        worker = self._worker_of.get(index)
        if worker is not None:
            self._waiting[worker].discard(index)
            self._connections.mark_counted(index - self.first)

    def word_of(self, index: int) -> int:
        """The word of a record's place, which identifies its connection among all that have had the
        place.
        """
        return self._connections.word(index - self.first)

    def said(self, index: int) -> bytes:
        """What `show` printed for a pair that a worker was to adopt, or had; empty: not known."""
        if index < self.first:
            return b""
        ask = self._connections.ask(index - self.first)
        if ask.word & abi.STATE_MASK != abi.AskState.JOINED:
            return b""  # the pair is of an earlier daemon
        label = self._label(ask)
        is_counted = self._connections.is_counted(ask)
        kind = DatapathKind.SPLICE if is_counted else DatapathKind.NONE
        return _shown(self._record(index), label, ask, kind)

    def freed(self, index: int) -> None:
        """A record at a place belongs to no pair any more."""
        self._freed(index)
        place = index - self.first
        word = self._connections.word(place)
        if word & abi.STATE_MASK == abi.AskState.JOINED:
            self._places.leave(place, word, time.monotonic())
        else:
            self._ports.offer(place)  # the pair is of an earlier daemon

    def _freed(self, index: int) -> None:
        worker = self._worker_of.pop(index, None)
        if worker is not None:
            self._waiting[worker].discard(index)

    # Routes to servers

    def learn(
        self,
        client: socket.socket,
        server: socket.socket,
        find_interfaces: Callable[[Splice], PairReason | None],
        *,
        has_source: bool,
    ) -> bool:
        """Learn from a connection how its server is reached; returns whether it is of use.

        `has_source`: the upstream names the address from which it comes. Then nothing is learned
        for upstreams that name no address. See `shown_route`.

        Raises:
            OSError: a socket is no longer connected.
        """
        shown = shown_route(client, server, find_interfaces)
        if shown is None:
            return False
        reached, target = shown
        source = bytes(target.source)
        # It may have gone since the worker has connected, and `routes_changed` been called before
        # this.
        address = ipaddress.IPv6Address(source)
        if not this_host_has(address.ipv4_mapped or address):
            return False
        if has_source:
            reached = reached._replace(source=source)
        return self._learn(reached, target, time.monotonic())

    def _learn(self, server: Server, target: abi.Target, now_s: float) -> bool:
        number = self._express.number_of(server)
        if not number:
            return False
        known = self._known.get(number)
        if known is not None and bytes(known.target) != bytes(target):
            self._forget_route(number)
        if number not in self._known:
            self._aim(number, target)
        self._known[number] = _Known(target, now_s + _KNOWN_FOR_S)
        return True

    def routes_changed(self) -> None:
        """Interfaces, addresses, routes or rules have changed: all routes are learned anew."""
        for number in list(self._known):
            self._forget_route(number)

    def _forget(self, numbers: Iterable[int], words: Iterable[int]) -> None:
        """Forget servers that no listener has, unless a connection to one is still being opened."""
        asking = abi.AskState.FILLING, abi.AskState.ASKED
        asked = {
            self._connections.ask(place).target
            for place, word in enumerate(words)
            if word & abi.STATE_MASK in asking
        }
        numbers = list(numbers)
        asked |= self._counting.forget(numbers)
        for number in numbers:
            if number in self._known:
                self._forget_route(number)
            if number not in asked:
                self._express.mark_forgotten(number)

    def _forget_route(self, number: int) -> None:
        known = self._known.pop(number)
        # Everything else stays as it is: a program may be reading it.
        self._connections.write_target(number, _without_route(known.target))

    def _aim(self, number: int, target: abi.Target) -> None:
        self._connections.write_target(number, _without_route(target))
        self._connections.write_target(number, target)

    # Looking

    def wait_s(self, most_s: float) -> float:
        """Seconds until `go_on` is due."""
        due_s = min(self._next_s, self._glance_s)
        return min(most_s, max(0.0, due_s - time.monotonic()))

    def go_on(self) -> None:
        """Do some of what is due. Never raises: what has failed is tried again."""
        now_s = time.monotonic()
        try:
            if now_s >= self._glance_s:
                self._glance(now_s)
            if now_s >= self._next_s:
                self._next_s = now_s + _LOOK_S
                if self._go_on(now_s):
                    self._next_s = now_s  # after the requests that are waiting
        except Exception:
            traceback.print_exc(file=sys.stderr)

    def _glance(self, now_s: float) -> None:
        self._glance_s = now_s + _LOOK_S
        self._counting.look()  # before a round, which may follow
        self._glance_s = now_s + self._places.glance(now_s)
        if self._places.is_short:
            self._next_s = min(self._next_s, self._looked_s + _LOOK_WHEN_SHORT_S)

    def _go_on(self, now_s: float) -> bool:
        """Returns whether more can be done at once."""
        is_stopping = self._express.is_to_stop and not self._express.has_stopped
        if is_stopping:
            self._next_s = now_s + _SOON_S
        if self._places.is_through:
            self._looked_s = now_s
            self._counting.look()
            self._is_counting = False
        kinds = self._counting.kinds
        seen = self._places.look(
            now_s,
            lasts_after_s=0.0 if is_stopping else LASTS_AFTER_S,
            has_room=self._telling.has_room,
            at_once=_LOOKS_AT_ONCE,
        )
        for place in seen.lasting:
            # By place, and not the worker with the fewest pairs: one that ends its pairs at once
            # would get them all. The word is still the one that was looked at: only the keeper
            # changes that of a place that is JOINED.
            lasting = self._lasting[place % len(self._lasting)]
            lasting[place] = self._connections.word(place)
        for ended in seen.ended:
            if self._places.is_counting and self._counting.covers(ended):
                self._places.forget(ended.place)
                self._is_counting = True
                continue
            self._telling.ended(ended.place, ended.ask.word, self._describe(ended))
        has_lasting = self._take_in_some()
        has_untold = self._telling.go_on()
        self._is_asking |= bool(seen.asked)
        if self._counting.kinds > kinds:
            # The programs count most of the rest, which may be very much in a burst.
            self._places.begin_anew()
            return True
        if not self._places.is_through:
            return True
        if self._places.is_short:
            self._next_s = min(self._next_s, now_s + _LOOK_WHEN_SHORT_S)
        is_asking, self._is_asking = self._is_asking, False
        self._counting.report(self._places.counted)
        self._ports.go_on(now_s)
        for number, known in list(self._known.items()):
            if known.until_s < now_s:
                self._forget_route(number)
        if given_back := self._express.given_back():
            self._forget(given_back, self._connections.words())
        self._express.store_counts(
            self._connections.counts(), ports=self._ports.held, used=self._places.used
        )
        is_done = self._telling.is_done and self._counting.is_done
        is_behind = is_asking or self._is_counting or any(self._lasting)
        if is_stopping and is_done and not is_behind:
            self._express.mark_stopped()
        return has_lasting or has_untold

    def closed(self) -> list[int]:
        """Workers that have closed the socket for reports, since the last call."""
        found = sorted(self._express.closed)
        self._express.closed.clear()
        return found

    @property
    def wake_fd(self) -> int:
        """A descriptor that is readable when `woken` must be called."""
        return self._express.wake_fd

    def woken(self) -> None:
        """Another process asks for a look now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._express.wake_fd)
        self._next_s = 0.0

    def _take_in_some(self) -> bool:
        """Give lasting connections to workers; returns whether there are more for which a worker
        has room.
        """
        left = _TAKEN_AT_ONCE
        for worker, lasting in enumerate(self._lasting):
            while lasting and len(self._waiting[worker]) < MOST_WAITING:
                if not left:
                    return True
                left -= 1
                place, word = lasting.popitem(last=False)
                if self._connections.word(place) != word:
                    continue  # it has ended while it waited, and was counted
                if self.first + place in self._worker_of:
                    continue  # a worker has it
                try:
                    self._take_in(place, worker)
                except Exception:
                    lasting[place] = word  # at the end of the queue
                    raise
        return False

    def _take_in(self, place: int, worker: int) -> None:
        index = self.first + place
        ask, record = self._connections.ask(place), self._record(index)
        label = self._label(ask)
        for at, number in zip(
            (Splice.keep_idle_s, Splice.keep_interval_s, Splice.keep_count),
            label.keepalive,
            strict=True,
        ):
            store32(self._memory, index * SPLICE_BYTES + at.offset, number)
        self._owner.take_in(index, _shown(record, label, ask, DatapathKind.NONE), worker)
        self.adopted(index, worker, has_it=False)
        self._owner.keep_alive(index)

    def _name(self, index: int, worker: int) -> None:
        """Report the first packet of a pair to its worker, if the log needs it."""
        place, record = index - self.first, self._record(index)
        ask = self._connections.ask(place)
        if ask.word & abi.STATE_MASK != abi.AskState.JOINED:
            return  # the pair is of an earlier daemon
        label = self._label(ask)
        if ask.rule in label.told:
            port = socket.ntohs(record.direction[Direction.UP].from_.dport)
            label_parts = [int(record.id), label.listener, _rule_of(label, ask), port]
            self._telling.name(worker, place, ask.word, label_parts)

    def _first_of(self, place: int, word: int) -> bytes:
        """The first packet of a connection; empty: it is not needed, or no longer there."""
        ask = self._connections.ask(place)
        if ask.rule not in self._label(ask).told:
            return b""
        return self._connections.saved(place, word)

    def _told(self, place: int, word: int) -> None:
        if self._connections.word(place) == word:
            # So that a later keeper does not report it again.
            store64(self._memory, (self.first + place) * SPLICE_BYTES + _ID_AT, 0)
            self._places.told(place, word, time.monotonic())

    def _describe(self, ended: Ended) -> str:
        """The end of a connection as `worker/express.py` reads it: a JSON array, formatted by hand
        as there are many.
        """
        label = self._label(ended.ask)
        up, down = ended.record.direction
        came = up.from_
        return (
            f"[{_quoted(label.listener)}, {_quoted(_rule_of(label, ended.ask))}"
            f", [{_end(came.source, came.sport)}, {_end(came.target, came.dport)}]"
            f", [{_end(up.source, up.sport)}, {_end(up.target, up.dport)}]"
            f", {ended.ask.begun_ns}, {ended.ended_ns}"
            f", [{ended.carried_bytes(Direction.UP)}, {up.packets}"
            f", {ended.carried_bytes(Direction.DOWN)}, {down.packets}]]"
        )

    def _label(self, ask: abi.Ask) -> Label:
        return self._express.label(ask.listener_table, ask.begun_ns)

    def _record(self, index: int) -> Splice:
        return Splice.from_buffer_copy(self._memory, index * SPLICE_BYTES)


def _without_route(target: abi.Target) -> abi.Target:
    found = abi.Target.from_buffer_copy(bytes(target))
    found.out = 0
    return found


def _rule_of(label: Label, ask: abi.Ask) -> str:
    return label.rules[ask.rule] if ask.rule < len(label.rules) else "-"


@functools.lru_cache(maxsize=1024)
def _quoted(text: str) -> str:
    return json.dumps(text)


def _end(address: Any, port_be: int) -> str:
    return f'["{bytes(address).hex()}", {socket.ntohs(port_be)}]'


def _shown(record: Splice, label: Label, ask: abi.Ask, kind: DatapathKind) -> bytes:
    """What `show` prints for it: a struct pair. `NONE`: no worker has counted it yet."""
    shown = PairRecord()
    shown.id = record.id
    shown.started_ns = ask.begun_ns
    shown.last_ns = time.monotonic_ns()
    shown.state, shown.datapath, shown.reason = PairState.JOINED, kind, PairReason.DECIDED
    up = record.direction[Direction.UP]
    for name, address, port_be in (
        ("client", up.from_.source, up.from_.sport),
        ("listener", up.from_.target, up.from_.dport),
        ("source", up.source, up.sport),
        ("server", up.target, up.dport),
    ):
        endpoint = getattr(shown, name)
        endpoint.ip[:] = bytes(address)
        endpoint.port, endpoint.family = socket.ntohs(port_be), record.family
    most = PairRecord.rule.size - 1
    shown.rule = _rule_of(label, ask).encode()[:most]
    shown.listener_name = label.listener.encode()[:most]
    return bytes(shown)

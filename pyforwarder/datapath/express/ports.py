"""The local ports of places: bound by the keeper, so that no other program of this host gets them.

A keeper that starts finds places that its predecessor has offered, whose ports were not bound in
between. If another program has taken such a port, the place is not used again until that ends.
"""

from __future__ import annotations

import errno
import resource
import socket
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.express import connect_abi as abi

if TYPE_CHECKING:
    from pyforwarder.datapath.express.sharing import Express

# A port that another program has is tried again after so long, and so many ports at once.
_HOLD_S: Final = 10.0
_HELD_AT_ONCE: Final = 64
# Long before that a program that takes a place out of the queue has changed its word.
_LOST_AFTER_S: Final = 1.0


class Ports:
    """The ports of one keeper's places."""

    def __init__(self, express: Express) -> None:
        """No port is bound yet."""
        self._express = express
        self._connections = express.connections
        self._held: dict[int, socket.socket] = {}
        # Places that wait to be offered, as their ports are not bound; oldest first.
        self._to_offer: OrderedDict[int, None] = OrderedDict()
        # Offered by an earlier keeper, while their ports are not bound.
        self._lost: set[int] = set()
        self._hold_s = 0.0
        # Offered and free, but not in the queue: place -> word. A program may be about to put the
        # place back, or to take it, which changes the word; or an earlier keeper died while it
        # moved the place.
        self._missing: dict[int, int] = {}
        self._missing_s = 0.0  # when these are checked
        self._is_really_missing = False  # they were not in the queue at a second check, either

    @property
    def held(self) -> int:
        """How many ports are bound."""
        return len(self._held)

    def begin(self, is_used: list[bool]) -> None:
        """Offer the places that are free; `is_used` says of each whether its record is used.

        Places that an earlier keeper of this daemon has offered may be in use by the programs at
        this moment.
        """
        taken = self._take_back()
        self._missing = {
            place: word
            for place, word in enumerate(self._connections.words())
            if word & abi.STATE_MASK == abi.AskState.FREE
            and self._express.is_offered(place)
            and place not in taken
        }
        self._missing_s = time.monotonic() + _LOST_AFTER_S
        for place, has_record in enumerate(is_used):
            if not (self._express.is_offered(place) or has_record):
                self.offer(place)
            elif not self._hold(place) and self._express.is_offered(place):
                self._lost.add(place)
            self._connections.set_port_lost(place, is_lost=place not in self._held)

    def offer(self, place: int) -> None:
        """Offer a place to the programs, once its port is bound; no effect if it is offered
        already.
        """
        if self._express.is_offered(place):
            return
        if not self._hold(place):
            self._to_offer[place] = None
            return
        self._to_offer.pop(place, None)
        # In this order: if the keeper dies in between, the place must not get into the queue twice,
        # where two connections would take it.
        self._express.set_offered(place, offered=True)
        self._connections.offer(place)

    def go_on(self, now_s: float) -> None:
        """Bind ports that could not be bound, and withdraw places without a bound port from the
        programs.
        """
        is_due = bool(self._missing) and now_s >= self._missing_s
        if is_due or any(self._is_free(place) for place in self._lost):
            taken = self._take_back()
            if is_due:
                taken |= self._look_for_missing(taken, now_s)
            self._lost -= taken
            for place in taken:
                self.offer(place)
        left = len(self._to_offer) + len(self._lost)
        if not left or now_s < self._hold_s:
            return
        # Each of them about every _HOLD_S, unless they are too many.
        self._hold_s = now_s + _HOLD_S * min(1.0, _HELD_AT_ONCE / left)
        for _ in range(min(_HELD_AT_ONCE, len(self._to_offer))):
            self.offer(self._to_offer.popitem(last=False)[0])
        for place in sorted(self._lost):
            self._hold(place)

    def _look_for_missing(self, taken: set[int], now_s: float) -> set[int]:
        """The places that are missing at a second check; `taken` were in the queue just now."""
        self._missing = {
            place: word
            for place, word in self._missing.items()
            if place not in taken and self._connections.word(place) == word
        }
        if not self._is_really_missing:
            self._is_really_missing, self._missing_s = True, now_s + _LOST_AFTER_S
            return set()
        lost = set(self._missing)
        self._missing.clear()
        for place in lost:
            self._express.set_offered(place, offered=False)
        return lost

    def _is_free(self, place: int) -> bool:
        return self._connections.word(place) & abi.STATE_MASK == abi.AskState.FREE

    def _take_back(self) -> set[int]:
        """Take all places out of the queue of free places."""
        taken = set()
        for place in self._connections.take_free_places():
            # One by one: a place that is marked as offered, but in no queue, would be lost if the
            # keeper dies.
            self._express.set_offered(place, offered=False)
            taken.add(place)
        return taken

    def _hold(self, place: int) -> bool:
        """Bind a place's port; False: another program has it."""
        if place in self._held:
            return True
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(self._held) >= files // 2:
            return False
        sock = hold_port(self._connections.first_port + place)
        if sock is not None:
            self._held[place] = sock
            self._lost.discard(place)
            self._connections.set_port_lost(place, is_lost=False)
        return sock is not None


def hold_port(port: int) -> socket.socket | None:
    """A socket that is bound to this port of all addresses; None: another program has the port."""
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
    """The first of `count` consecutive ports that no program seems to have, as high as possible.

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

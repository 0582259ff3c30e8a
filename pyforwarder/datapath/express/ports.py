"""The ports of places: kept from other programs of this host before a connection may have them.

A keeper that begins finds places that its predecessor has offered, whose ports nobody has kept in
between. Where another program has taken one meanwhile, the place is not used again before that is
over.
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

# A port that another program has is asked for again after so long, and so many at once.
_HOLD_S: Final = 10.0
_HELD_AT_ONCE: Final = 64
# A program that has taken a place out of the queue has said so long before.
_LOST_AFTER_S: Final = 1.0


class Ports:
    """Of one keeper."""

    def __init__(self, express: Express) -> None:
        """None is held yet."""
        self._express = express
        self._connecting = express.connecting
        self._held: dict[int, socket.socket] = {}
        # Not held, oldest first: places that are to be offered.
        self._to_offer: OrderedDict[int, None] = OrderedDict()
        # Not held either, and the programs have them: they were offered by an earlier keeper.
        self._lost: set[int] = set()
        self._hold_s = 0.0
        # Offered and free, but not in the queue: place -> word. A program may be about to give it
        # back, or to take it, which changes the word; or an earlier keeper died while it moved it.
        self._missing: dict[int, int] = {}
        self._missing_s = 0.0  # when they are looked at
        self._is_really_missing = False  # they were not in the queue later, either

    @property
    def held(self) -> int:
        """How many are held."""
        return len(self._held)

    def begin(self, is_used: list[bool]) -> None:
        """Offer the places that nobody has; `is_used` says of each whether its record is used.

        What an earlier keeper of this daemon has offered the programs may have in this moment.
        """
        taken = self._take_back()
        self._missing = {
            place: word
            for place, word in enumerate(self._connecting.words())
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
            self._connecting.set_port_lost(place, is_lost=place not in self._held)

    def offer(self, place: int) -> None:
        """Let the programs use a place, once its port is held; nothing happens if they may."""
        if self._express.is_offered(place):
            return
        if not self._hold(place):
            self._to_offer[place] = None
            return
        self._to_offer.pop(place, None)
        # In this order: a place that is twice in the queue would be two connections'.
        self._express.set_offered(place, offered=True)
        self._connecting.offer(place)

    def go_on(self, now_s: float) -> None:
        """Hold what could not be held, and take back what the programs must not use meanwhile."""
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
        # Each of them about every _HOLD_S, if they are not too many.
        self._hold_s = now_s + _HOLD_S * min(1.0, _HELD_AT_ONCE / left)
        for _ in range(min(_HELD_AT_ONCE, len(self._to_offer))):
            self.offer(self._to_offer.popitem(last=False)[0])
        for place in sorted(self._lost):
            self._hold(place)

    def _look_for_missing(self, taken: set[int], now_s: float) -> set[int]:
        """Those that nobody has, the second time; `taken` was in the queue just now."""
        self._missing = {
            place: word
            for place, word in self._missing.items()
            if place not in taken and self._connecting.word(place) == word
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
        return self._connecting.word(place) & abi.STATE_MASK == abi.AskState.FREE

    def _take_back(self) -> set[int]:
        """All places that are free; the programs have none of them from here on."""
        taken = set()
        for place in self._connecting.take_back():
            # One by one: what is in no queue and said to be offered would be lost if we die.
            self._express.set_offered(place, offered=False)
            taken.add(place)
        return taken

    def _hold(self, place: int) -> bool:
        """Keep other programs of this host away from the port; False: one has it."""
        if place in self._held:
            return True
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(self._held) >= files // 2:
            return False
        sock = hold_port(self._connecting.first_port + place)
        if sock is not None:
            self._held[place] = sock
            self._lost.discard(place)
            self._connecting.set_port_lost(place, is_lost=False)
        return sock is not None


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

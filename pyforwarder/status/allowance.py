"""How much each client of the page may ask, so that none of them keeps others out.

Pure: the time is passed in. A client is an address, or the /64 of an IPv6 one.

A bound on all clients together would be a way to shut others out: the client that uses it up is
served, and the rest is not. So what is refused is refused to a client for what itself has asked,
and where something is bounded in all, viewers have a part of their own.
"""

from __future__ import annotations

import functools
import ipaddress
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Final, Generic, NamedTuple, TypeVar

Kept = TypeVar("Kept")

# Clients of which something is remembered; a host of the internet has one address, a botnet many.
MOST_CLIENTS: Final = 4096


class Budget:
    """Allows so many at once, and one more every `refill_s`."""

    __slots__ = ("_at_s", "_left", "_most", "_refill_s")

    def __init__(self, most: float, refill_s: float) -> None:
        self._most = float(most)
        self._refill_s = refill_s
        self._left = float(most)
        self._at_s = 0.0

    def wait_s(self, now_s: float, cost: float = 1.0) -> float:
        """How long until so many are left; 0: now."""
        gained = max(0.0, now_s - self._at_s) / self._refill_s
        self._left = min(self._most, self._left + gained)
        self._at_s = now_s
        return max(0.0, min(cost, self._most) - self._left) * self._refill_s

    def take(self, now_s: float, cost: float = 1.0) -> bool:
        """Take so many; False if they are not left. More than fit in are taken as a debt."""
        if self.wait_s(now_s, cost):
            return False
        self._left -= cost
        return True

    def give_back(self, cost: float = 1.0) -> None:
        """Give back what was taken and not used."""
        self._left = min(self._most, self._left + cost)


class PerClient(Generic[Kept]):
    """Something for each client; of those that have not asked for longest it is forgotten."""

    def __init__(self, make: Callable[[], Kept], *, most: int = MOST_CLIENTS) -> None:
        self._make = make
        self._most = most
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, client: str) -> Kept:
        """Return what is kept for this client; it is made if there is nothing."""
        kept = self._kept.get(client)
        if kept is None:
            if len(self._kept) >= self._most:
                self._kept.popitem(last=False)
            kept = self._kept[client] = self._make()
        else:
            self._kept.move_to_end(client)
        return kept


class Rate(NamedTuple):
    """A rate: so much at once, and so much a second after that."""

    at_once: float
    per_s: float

    def budget(self) -> Budget:
        """Return a full budget."""
        return Budget(self.at_once, 1.0 / self.per_s)


class RefusedRequest(NamedTuple):
    """Too much was asked: by this client (429), or by all together (503)."""

    status: HTTPStatus
    retry_after_s: int


class Allowance:
    """What may be asked, by a client and in all; viewers have a share of their own."""

    def __init__(self, *, client: Rate, in_all: Rate, viewer: Rate) -> None:
        """`viewer` is for a client that has the page open, apart from all others: there are few."""
        self._clients = PerClient(client.budget)
        self._viewers = PerClient(viewer.budget)
        self._in_all = in_all.budget()

    def refuses(
        self, client: str, now_s: float, *, cost: float = 1.0, is_viewer: bool = False
    ) -> RefusedRequest | None:
        """Take the cost off the client's budget; returns why not, or None."""
        own = self._clients.of(client)
        wait_s = own.wait_s(now_s, cost)
        if wait_s:
            return RefusedRequest(HTTPStatus.TOO_MANY_REQUESTS, math.ceil(wait_s))
        if not (is_viewer and self._viewers.of(client).take(now_s, cost)):
            wait_s = self._in_all.wait_s(now_s, cost)
            if wait_s:
                return RefusedRequest(HTTPStatus.SERVICE_UNAVAILABLE, math.ceil(wait_s))
            self._in_all.take(now_s, cost)
        own.take(now_s, cost)
        return None


def network_of(host: str) -> str:
    """An IPv4 address, or the /64 of an IPv6 one: a host has a whole network of those."""
    return _prefixes(host)[-1]


@functools.lru_cache(maxsize=1024)
def _prefixes(host: str) -> tuple[str, ...]:
    """The networks that an address is in, the widest first, the last one a client's."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return (host,)
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is not None:
            return _prefixes(str(mapped))
        return tuple(
            str(ipaddress.ip_network((address, bits), strict=False)) for bits in (32, 48, 56, 64)
        )
    wider = (str(ipaddress.ip_network((address, bits), strict=False)) for bits in (16, 24))
    return (*wider, str(address))


def most_crowded(hosts: Sequence[str]) -> list[int]:
    """The places in `hosts` of those that have most company, in order.

    Of the widest networks the one with most of them, in it the narrower one with most, and so on:
    who has many addresses is counted as one as long as others come from elsewhere.
    """
    left = list(range(len(hosts)))
    prefixes = [_prefixes(host) for host in hosts]
    for level in range(4):
        held: dict[str, list[int]] = {}
        for place in left:
            known = prefixes[place]
            held.setdefault(known[min(level, len(known) - 1)], []).append(place)
        most = max(map(len, held.values()), default=0)
        left = [place for group in held.values() if len(group) == most for place in group]
    return sorted(left)

"""Host names to addresses, off the loop, bounded in every way.

Names that the configuration has and names that clients give are asked for by two resolvers that
share nothing, so no client can hold up an upstream. A question has a deadline and is dropped when
nobody waits for it; each client, each network of clients and all together may have so many of them;
answers are kept for a while: `KEEP_S`, or what an upstream says (`resolve_every`).

A name server's failure is not its servers': while it does not answer, a name keeps the addresses
that it had, and nobody waits for it longer than `STALE_WAIT_S` (RFC 8767, serve-stale).
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.core.address import Address
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.askers import MOST_ADDRESSES as MOST_ADDRESSES  # for those who ask
from pyforwarder.runtime.askers import CaresAsker, Mailbox, ThreadAsker, cares_knows_all_sources
from pyforwarder.runtime.loop import Timed

if TYPE_CHECKING:
    from pyforwarder.runtime.askers import Asker
    from pyforwarder.runtime.loop import Loop

KEEP_S: Final = 5.0  # getaddrinfo hides the record's TTL; short enough for a name that moves
NOTHING_KEEP_S: Final = 1.0  # that a name has no address, or that nobody knows
STALE_S: Final = 86400.0  # RFC 8767 section 5 suggests one to three days
STALE_WAIT_S: Final = 0.5  # RFC 8767 has 1.8 s, for people who wait; a connection may be a request
QUESTION_S: Final = 5.0
_MOST_KEPT: Final = 4096
_MOST_KEPT_HOSTS: Final = 16 * _MOST_KEPT  # of all kept names together: 5 MB of text

Answer = Callable[[list[str]], None]  # addresses in getaddrinfo's order (RFC 6724), [] if none


class TooManyNamesError(ForwarderError):
    """Raised when as many names are being asked for as may be; says for whom."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many names may be asked for at once."""

    total: int
    client: int  # one IPv4 address, or an IPv6 /64
    network: int  # an IPv4 /24, or an IPv6 /48: what one customer has


# The configuration bounds how many there are.
_CONFIGURED: Final = Bounds(total=1 << 20, client=1 << 20, network=1 << 20)
_CONFIGURED_THREADS: Final = 16
_CLIENTS: Final = Bounds(total=2048, client=32, network=512)
# Where names have sources that c-ares does not know, each question takes a thread, for as long as
# getaddrinfo(3) likes: no network may have all of them.
_CLIENTS_BY_THREADS: Final = Bounds(total=256, client=8, network=16)
_CLIENT_THREADS: Final = 32


class _Kept(NamedTuple):
    """An answer."""

    asked_s: float  # when it was asked for last
    answered_s: float  # when that was answered last
    hosts: list[str]


class Wait:
    """A connection that waits for an answer, until it comes or `stop` is called."""

    __slots__ = ("answer", "question")

    def __init__(self, question: _Question, answer: Answer) -> None:
        self.question = question
        self.answer = answer

    def stop(self) -> None:
        """Wait no more; nothing happens if the answer has come."""
        if self in self.question.waits:
            del self.question.waits[self]
            self.question.left()


class _Question(Timed):
    """A name that is being asked for, also when nobody waits for it any more.

    What the asker cannot give up takes a place there until it ends, so it stays charged until then.
    """

    __slots__ = ("_resolver", "charged", "is_overdue", "name", "stale", "waits")

    def __init__(self, resolver: Resolver, name: str, charged: tuple[str, ...]) -> None:
        super().__init__()
        self._resolver = resolver
        self.name = name
        self.charged = charged
        self.waits: dict[Wait, None] = {}
        self.stale: list[str] | None = None  # what to say while it takes long
        self.is_overdue = False  # its deadline has passed, and no other runs

    def expired(self) -> None:
        """Nobody has answered in time."""
        self._resolver.waited_long(self)

    def left(self) -> None:
        """A client that waited has gone."""
        if not self.waits:
            self._resolver.abandoned(self)

    def answer(self, hosts: list[str]) -> None:
        """Answer all that wait."""
        waits, self.waits = self.waits, {}
        for wait in waits:
            wait.answer(hosts)


class Resolver:
    """Answers on the loop."""

    def __init__(
        self,
        loop: Loop,
        make_asker: Callable[[Mailbox], Asker],
        bounds: Bounds,
        *,
        stale_wait_s: float = STALE_WAIT_S,
    ) -> None:
        """`stale_wait_s` is how long a new answer is waited for where an old one is known."""
        self._loop = loop
        self._mailbox = Mailbox(loop, self._answered)
        self._asker = make_asker(self._mailbox)
        self._bounds = bounds
        self._stale_wait_s = stale_wait_s
        self._charges: Counter[str] = Counter()
        self._open: dict[str, _Question] = {}
        self._kept: dict[str, _Kept] = {}
        self._kept_hosts = 0  # in all of them

    def resolve(
        self, name: str, answer: Answer, *, keep_s: float = KEEP_S, client: str | None = None
    ) -> Wait | None:
        """Call `answer` with the name's addresses, now if they are known (None), else later.

        What was answered up to `keep_s` ago counts as known. `client` is the address of who has
        given the name; None: the configuration, or a client on a unix socket.

        Raises:
            TooManyNamesError: as many questions are open; `answer` is never called.
        """
        now_s = self._loop.now_s
        kept = self._kept.get(name)
        if kept is not None:
            fresh_s = keep_s if kept.hosts else min(keep_s, NOTHING_KEEP_S)
            if kept.asked_s + fresh_s > now_s:
                answer(kept.hosts)
                return None
        stale = self._stale(kept)
        question = self._open.get(name)
        if question is None:
            try:
                charged = self._charge(client)
            except TooManyNamesError:
                if stale is None:
                    raise
                answer(stale)
                return None
            question = self._open[name] = _Question(self, name, charged)
            if not self._stale_wait_s:
                question.stale = stale
            waits_for_stale = stale is not None and question.stale is None
            first_s = self._stale_wait_s if waits_for_stale else QUESTION_S
            self._loop.deadlines.start(question, first_s, now_s)
            self._asker.ask(name)
        if question.stale is not None:
            answer(question.stale)
            return None
        if question.is_overdue:
            question.is_overdue = False
            self._loop.deadlines.start(question, QUESTION_S, now_s)
        wait = Wait(question, answer)
        question.waits[wait] = None
        return wait

    def _stale(self, kept: _Kept | None) -> list[str] | None:
        """Old addresses, if they are better than none."""
        if kept is None or not kept.hosts or self._loop.now_s - kept.answered_s >= STALE_S:
            return None
        return kept.hosts

    def _charge(self, client: str | None) -> tuple[str, ...]:
        """Count one more question of this client."""
        own, network = prefixes_of(client)
        bounds = self._bounds
        for key, most, whose in (
            ("", bounds.total, "this worker"),
            (own, bounds.client, own),
            (network, bounds.network, network),
        ):
            if self._charges[key] >= most:
                raise TooManyNamesError(f"{most} names are being resolved for {whose} already")
        keys = ("", own, network)
        self._charges.update(keys)
        return keys

    def _discharge(self, question: _Question) -> None:
        for key in question.charged:
            self._charges[key] -= 1
            if not self._charges[key]:
                del self._charges[key]
        question.charged = ()

    def abandoned(self, question: _Question) -> None:
        """Nobody waits for it any more: it is not asked, if it can be helped."""
        if question.stale is None and self._asker.forget(question.name):
            self._close(question)

    def waited_long(self, question: _Question) -> None:
        """The next deadline of a question: what was known has to do, or nothing is."""
        if question.stale is None:
            stale = self._stale(self._kept.get(question.name))
            if stale is not None:
                question.stale = stale
                self._loop.deadlines.start(question, QUESTION_S, self._loop.now_s)
                question.answer(stale)
                return
        hosts = self._keep(question.name, None)
        if self._asker.forget(question.name):
            self._close(question)
        else:
            question.is_overdue = True
        question.answer(hosts)

    def _close(self, question: _Question) -> None:
        del self._open[question.name]
        self._discharge(question)
        self._loop.deadlines.stop(question)

    def _answered(self, name: str, hosts: list[str] | None) -> None:
        """The asker's answer; it may come long after its question's deadline, or end."""
        question = self._open.get(name)
        if question is not None:
            self._close(question)
        if not hosts and (question is None or question.is_overdue):
            return  # no address, or no answer: its askers were told so at the deadline
        hosts = self._keep(name, hosts)
        if question is not None:
            question.answer(hosts)

    def _keep(self, name: str, hosts: list[str] | None) -> list[str]:
        """Remember an answer; what to tell those who asked."""
        now_s = answered_s = self._loop.now_s
        old = self._kept.pop(name, None)
        if hosts is None:
            hosts = self._stale(old) or []
            if hosts and old is not None:
                answered_s = old.answered_s
        if old is not None:
            self._kept_hosts -= len(old.hosts)
        self._kept[name] = _Kept(now_s, answered_s, hosts)
        self._kept_hosts += len(hosts)
        while len(self._kept) > _MOST_KEPT or self._kept_hosts > _MOST_KEPT_HOSTS:
            self._kept_hosts -= len(self._kept.pop(next(iter(self._kept))).hosts)
        return hosts

    def close(self) -> None:
        """Drop what was asked: there are no more answers."""
        for question in list(self._open.values()):
            self._close(question)
        self._asker.close()
        self._mailbox.close()


def configured_names(loop: Loop, *, stale_wait_s: float = STALE_WAIT_S) -> Resolver:
    """Return a resolver for names that the configuration has, as this host's C library resolves
    them.
    """
    return Resolver(
        loop,
        lambda mailbox: ThreadAsker(mailbox, threads=_CONFIGURED_THREADS),
        _CONFIGURED,
        stale_wait_s=stale_wait_s,
    )


def client_names(loop: Loop) -> Resolver:
    """Return a resolver for names that clients give."""
    if cares_knows_all_sources():
        return Resolver(loop, CaresAsker, _CLIENTS)
    return Resolver(
        loop, lambda mailbox: ThreadAsker(mailbox, threads=_CLIENT_THREADS), _CLIENTS_BY_THREADS
    )


class Names:
    """The resolvers of a worker."""

    def __init__(self, loop: Loop) -> None:
        self._configured = configured_names(loop)
        self._clients = client_names(loop)
        # The sender of a datagram may have made up its address.
        self._senders = client_names(loop)

    def of(self, *, named_by_client: bool, by_datagram: bool = False) -> Resolver:
        """The asker for a name of the configuration, of a client, of a sender of datagrams."""
        if not named_by_client:
            return self._configured
        return self._senders if by_datagram else self._clients

    def close(self) -> None:
        """Close all resolvers: there are no more answers."""
        for resolver in (self._configured, self._clients, self._senders):
            resolver.close()


def prefixes_of(host: str | None) -> tuple[str, str]:
    """What counts as one client, and as one network of them."""
    if host is None:
        return "unix", "unix "
    ip = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    one, network = (32, 24) if ip.version == 4 else (64, 48)
    return tuple(  # type: ignore[return-value]
        f"{ipaddress.ip_network((ip, bits), strict=False)}" for bits in (one, network)
    )


def addresses_of(hosts: list[str], port: int) -> list[Address]:
    """The answer as addresses; a zone (`fe80::1%eth0`) makes no address we would connect to."""
    return [Address(host, port) for host in hosts if "%" not in host]

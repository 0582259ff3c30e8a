"""From accept to a decision: PROXY header, first packet, and the dialogues of some protocols."""

from __future__ import annotations

import _socket
import ipaddress
import os
import time
from typing import TYPE_CHECKING, Final, Literal

from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import Address
from pyforwarder.core.connection import Event, Life
from pyforwarder.core.first_packet.cursor import ParseError
from pyforwarder.core.first_packet.outcome import NO_MATCH, Outcome
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import NEED_MORE, Claim, End, Refuse, Route, Send, Verify
from pyforwarder.runtime.counters import (
    DECISION_BOUNDS_S,
    DECISION_FIRST,
    Counter,
    RuleCounter,
    observe,
)
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.loop import EPOLLERR, EPOLLIN, EPOLLPRI, EPOLLRDHUP
from pyforwarder.runtime.password_checks import Check
from pyforwarder.worker.token_claims import Claiming

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from pyforwarder.core.routing import Decision
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.server import Server


# Plain names: looking a member up in its enum costs more than most of what is done with it.
_SNIFFING: Final = Life.SNIFFING
_OPEN: Final = End.OPEN
_ROUTED: Final = Event.ROUTED
_TAKEN: Final = int(RuleCounter.TAKEN)
_PAIRS_OPEN: Final = int(Counter.PAIRS_OPEN)
_PAIRS_OPENED: Final = int(Counter.PAIRS_OPENED)
# Every piece of a first packet is one more look at all of it. A client that sends it byte by byte
# may cost so much processor time, three times what 16 KiB of HTTP took; then what has come is
# all that there is to decide by.
DECIDING_S: Final = 0.5
# And all of them together: so much of the worker's time, and so much at once. Those for which there
# is none left are looked at a little later, with the bytes that have come by then.
AGAIN_SHARE: Final = 0.25
AGAIN_BURST_S: Final = 0.25
_AGAIN_PAUSE_S: Final = 0.02


def _network_of(peer: Address | None) -> Hashable:
    """Which clients share one place in the queue: those of a host, of IPv6 of its /64."""
    if peer is None or ":" not in peer.host:
        return peer.host if peer is not None else None
    return ipaddress.IPv6Address(peer.host.partition("%")[0]).packed[:8]


class Sniffer:
    """Reads what clients send first, and asks the rules about it until they decide."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = server.loop
        self._again_s = AGAIN_BURST_S  # what is left for second looks
        self._again_from_s = server.loop.now_s
        # Those whose second look waits, the longest first; one that ends must leave it.
        self.put_off: dict[Client, None] = {}

    def begin_specially(self, client: Client) -> None:
        """What else comes first on some listeners: a PROXY header, or a decision without a byte."""
        state = client.listener
        if state.trusted_proxies is not None:
            client.proxied = False
            client.proxied_to = None
            client.header = b""
            if client.peer is not None and not state.trusted_proxies.contains(client.peer.host):
                if state.needs_header:
                    # It is not one of our proxies: nothing it says is read.
                    cause = "not one of the trusted proxies"
                    self._refuse_header(client, CloseReason.DENIED, cause)
                else:
                    self._sniff_without_header(client, EPOLLIN)
                return
            self._loop.redirect(client.client_fd, self._header_came)
        elif client.over_limit is None:
            self.decide(client, End.OPEN)

    # The PROXY header

    def _header_came(self, client: Client, fd: int, mask: int) -> None:
        """Bytes of the header: looked at where they are, so that what follows it stays there."""
        if mask & EPOLLERR:
            self._server.broken(client, CloseReason.CLIENT_RESET)
            return
        try:
            header = self._read_header(client, fd)
        except BlockingIOError:
            return
        except OSError:
            self._server.broken(client, CloseReason.CLIENT_RESET)
            return
        except ParseError as error:
            self._refuse_header(client, CloseReason.MALFORMED, f"PROXY header: {error}")
            return
        if header is NO_MATCH:
            self._sniff_without_header(client, mask)
            return
        if header is None:
            reason = CloseReason.MALFORMED if client.header else CloseReason.CLIENT_GONE
            self._refuse_header(client, reason, "the client has closed before its PROXY header")
            return
        self._take_header(client, header)
        if client.life is Life.SNIFFING:
            self._loop.redirect(fd, self.sniffed)
            if client.listener.decides_at_once and client.over_limit is None:
                # No edge will tell of what came with the header; the pair may be joined at once.
                client.up.readable = True
                client.up.end_seen = bool(mask & EPOLLRDHUP)
                client.up.urgent = bool(mask & EPOLLPRI)
                self.decide(client, End.OPEN)
            if client.life is Life.SNIFFING:
                self.sniffed(client, fd, mask)

    def _sniff_without_header(self, client: Client, mask: int) -> None:
        """The client is who it seems to be; what was taken for a header is its first packet's."""
        client.proxied = True
        client.received, client.header = client.header, b""
        if not self._count_client(client):
            return
        self._loop.redirect(client.client_fd, self.sniffed)
        if len(client.received) >= client.listener.max_bytes:
            client.up.readable = True
            self.decide(client, End.FULL)
            return
        if client.listener.decides_at_once and client.over_limit is None:
            client.up.readable = True
            client.up.end_seen = bool(mask & EPOLLRDHUP)
            client.up.urgent = bool(mask & EPOLLPRI)
            self.decide(client, End.OPEN)
        if client.life is Life.SNIFFING:
            self.sniffed(client, client.client_fd, mask)

    def _count_client(self, client: Client) -> bool:
        """Now that it is known who the client is: whether it is served, or told that it is not."""
        if client.listener.asks_limits and client.over_limit is None:
            accepting = self._server.accepting
            accepting.count_client(client)
            if client.over_limit is not None and not accepting.count_busy(client):
                self._refuse_header(client, CloseReason.BUSY, "")
                return False
        return True

    @staticmethod
    def _read_header(
        client: Client, fd: int
    ) -> proxy_protocol.Header | Literal[Outcome.NO_MATCH] | None:
        """The header, taken out of the socket; None: the client has closed before its end.

        NO_MATCH: there need not be one, and there is none; what tells that stays in the socket.

        Raises:
            BlockingIOError: it is not complete.
            ParseError: there is none.
            OSError: from the socket.
        """
        while True:
            new = client.client.recv(proxy_protocol.MAX_LENGTH, _socket.MSG_PEEK)
            if not client.listener.needs_header:
                begins = proxy_protocol.begins(client.header + new)
                if begins is False or (begins is None and not new):
                    return NO_MATCH
            header = proxy_protocol.read(client.header + new)
            if isinstance(header, proxy_protocol.Header):
                rest = header.length - len(client.header)
                os.read(fd, rest)
                client.up.read_bytes += rest
                return header
            if not new:
                return None
            # While it is incomplete, all that is there belongs to it. Out of the queue with that: a
            # unix socket with 70 small pieces in it takes no more (unix_writable in
            # net/unix/af_unix.c), and a peek may stop between two of them.
            os.read(fd, len(new))
            client.header += new
            client.up.read_bytes += len(new)

    def _refuse_header(self, client: Client, reason: CloseReason, cause: str) -> None:
        """No rule is asked about a connection that has to begin with a header and does not."""
        client.refusal = cause
        self._server.broken(client, reason)

    def _take_header(self, client: Client, header: proxy_protocol.Header) -> None:
        """From here on the client is who the proxy says it is."""
        client.proxied = True
        if isinstance(header.source, Address):
            client.peer = header.source
        elif header.source is not None:
            client.peer = None  # a unix socket
        if isinstance(header.destination, Address):
            client.proxied_to = header.destination
        if not self._count_client(client):
            return
        if client.slot >= 0:
            self._server.records.show(client)

    # Sniffing

    def timed_out(self, client: Client) -> None:
        """The first packet's time is over: decide by what has come."""
        if isinstance(client.approach, Check | Claiming):
            client.refusal = client.approach.late
            self._server.broken(client, CloseReason.TIMEOUT)
            return
        if client.listener.trusted_proxies is not None and not client.proxied:
            if client.listener.needs_header or proxy_protocol.begins(client.header):
                # Silence is no header either.
                self._refuse_header(client, CloseReason.TIMEOUT, "no PROXY header in time")
                return
            self._sniff_without_header(client, 0)
            if client.life is Life.SNIFFING:
                self.decide(client, End.TIMEOUT)
        else:
            self.decide(client, End.TIMEOUT)

    def sniffed(self, client: Client, fd: int, mask: int) -> None:
        """The client has sent something, or closed, or reset."""
        if mask & EPOLLERR:
            self._server.broken(client, CloseReason.CLIENT_RESET)
            return
        if mask & EPOLLRDHUP:
            client.up.end_seen = True
        room = client.listener.max_bytes - len(client.received)
        try:
            data = os.read(fd, room)
        except BlockingIOError:
            return
        except OSError:
            self._server.broken(client, CloseReason.CLIENT_RESET)
            return
        size = len(data)
        client.up.read_bytes += size
        if not size:
            # No edge will tell of it again to who takes the connection from here.
            client.up.readable = client.up.end_seen = True
            self.decide(client, End.EOF)
            return
        is_first = not client.received
        client.received = data if is_first else client.received + data
        if size == room:
            # There may be more behind it, and no edge will tell.
            client.up.readable = True
            self.decide(client, End.FULL)
            return
        if mask & EPOLLPRI:
            client.up.urgent = True
        client.up.readable = client.up.end_seen or client.up.urgent
        if is_first:
            self.decide(client, _OPEN)
        else:
            self._decide_again(client)
        if client.up.readable and client.life is _SNIFFING and client.approach is None:
            self.sniffed(client, fd, mask)

    def _decide_again(self, client: Client) -> None:
        """Another piece has come: look at all of it again, now or a little later."""
        if self.put_off or not self._refill_budget():
            if not self.put_off:
                self._loop.after(_AGAIN_PAUSE_S, self._decide_put_off)
            self.put_off[client] = None
            return
        self._sniff_again(client)

    def _refill_budget(self) -> bool:
        """Add what has come with time; returns whether there is any."""
        now_s = self._loop.now_s
        self._again_s += (now_s - self._again_from_s) * AGAIN_SHARE
        self._again_s = min(self._again_s, AGAIN_BURST_S)
        self._again_from_s = now_s
        return self._again_s > 0

    def _decide_put_off(self) -> None:
        while self.put_off and self._refill_budget():
            client = next(iter(self.put_off))
            del self.put_off[client]
            if client.life is _SNIFFING:
                try:
                    self._sniff_again(client)
                except Exception as error:
                    self._loop.on_error(client, error)
        if self.put_off:
            self._loop.after(_AGAIN_PAUSE_S, self._decide_put_off)

    def _sniff_again(self, client: Client) -> None:
        before_s = time.thread_time()
        self.decide(client, _OPEN)
        took_s = time.thread_time() - before_s
        self._again_s -= took_s
        client.deciding_s += took_s
        if client.deciding_s > DECIDING_S and client.life is _SNIFFING:
            self.decide(client, End.FULL)

    def decide(self, client: Client, end: End) -> None:
        if client.approach is not None:
            return  # decided but for an answer: to ask the rules again would use a token twice
        state = client.listener
        ruleset = state.ruleset
        while True:
            # By position: names cost as much as the rest of the call, for every connection.
            decision: Decision = ruleset.decide(
                client.received,
                client.peer,
                state.local_port,
                end,
                time.time() if ruleset.needs_clock else None,  # noqa: TID251 - expiry
                client.conversation,
            )
            following = self._obey(client, decision, end)
            if following is None:
                return
            end = following

    def follow(self, client: Client, decision: Decision, end: End) -> None:
        """Do what was decided about the bytes that have come."""
        following = self._obey(client, decision, end)
        if following is not None:
            self.decide(client, following)

    def _obey(self, client: Client, decision: Decision, end: End) -> End | None:
        """Do what was decided; whether the rules have to be asked again, and with which end."""
        if decision is NEED_MORE:
            return None
        if isinstance(decision, Route):
            self._route(client, decision)
            return None
        if isinstance(decision, Refuse):
            self._refuse(client, decision, end)
            return None
        if isinstance(decision, Verify):
            return self._verify(client, decision, end)
        if isinstance(decision, Claim):
            return self._claim(client, decision, end)
        if not self._send(client, decision):
            return None
        if end is End.FULL and decision.skip:
            # Room again for what the dialogue goes on with.
            self._loop.soon(client, client.client_fd)
            return End.OPEN
        return end

    def _verify(self, client: Client, decision: Verify, end: End) -> End | None:
        """Have a password verified; what the client sends meanwhile waits in the kernel."""

        def answer(is_right: bool) -> None:
            # Deferred, so that what goes wrong is this client's and nobody else's.
            self._loop.defer(
                lambda _: self._continue_with(client, lambda: decision.then(is_right), end), client
            )

        asked = self._server.passwords.ask(
            decision.stored, decision.password, client=_network_of(client.peer), answer=answer
        )
        if asked is None:
            return self._obey(client, decision.busy, end)
        if asked is True:
            return self._obey(client, decision.then(True), end)
        assert isinstance(asked, Check)
        client.approach = asked
        self._loop.redirect(client.client_fd, self.waiting)
        return None

    def _claim(self, client: Client, claim: Claim, end: End) -> End | None:
        """Have a token used up in the fleet; as with a password, what the client sends waits."""

        def answer(is_first: bool | None) -> None:
            self._loop.defer(
                lambda _: self._continue_with(client, lambda: claim.then(is_first), end), client
            )

        asked = self._server.claims.ask(
            claim.digest, until_unix_s=claim.until_unix_s, wait_s=claim.wait_s, answer=answer
        )
        if asked is None:
            return self._obey(client, claim.then(None), end)
        client.approach = asked
        self._loop.redirect(client.client_fd, self.waiting)
        return None

    def _continue_with(self, client: Client, decide: Callable[[], Decision], end: End) -> None:
        """It is known now what the decision depended on."""
        if client.life is not Life.SNIFFING or client.approach is None:
            return
        client.approach = None
        self._loop.redirect(client.client_fd, self.sniffed)
        self.follow(client, decide(), end)
        # No edge will tell of what has come meanwhile.
        self._read_on(client)

    def _read_on(self, client: Client) -> None:
        if client.life is Life.SNIFFING and client.approach is None:
            self.sniffed(client, client.client_fd, EPOLLIN)

    def _send(self, client: Client, decision: Send) -> bool:
        """Our part of a dialogue; a client that does not read a few bytes is not waited for."""
        try:
            written = os.write(client.client_fd, decision.data)
        except OSError:
            written = 0
        client.down.written_bytes += written
        if written < len(decision.data):
            self._server.broken(client, CloseReason.CLIENT_RESET)
            return False
        client.received = client.received[decision.skip :]
        return True

    def _route(self, client: Client, route: Route) -> None:
        client.route = route
        took_s = time.monotonic() - client.accepted_s
        observe(self._server.counters, DECISION_FIRST, DECISION_BOUNDS_S, took_s)
        server = self._server
        if server.log.tells:
            client.facts = (
                *route.facts,
                *client.listener.ruleset.facts(route.rule, client.received),
            )
        counters = server.counters
        listener = client.listener
        counter = listener.rule_counters[route.rule.index]
        self._loop.deadlines.stop(client)
        self._loop.redirect(client.client_fd, self.waiting)
        if client.over_limit is None:
            if server.pressure.is_full and server.pressure.forbids(client):
                server.accepting.limited(client, Limit.MEMORY)
            elif not server.limits.add_pair_below(
                listener.generation.most_pairs, listener.counter, listener.most_here
            ):
                server.accepting.limited(client, Limit.PAIRS)
        if client.over_limit is not None:
            server.refuse(client, CloseReason.BUSY)
            return
        counters[counter + _TAKEN] += 1
        client.counts_pair = True
        counters[_PAIRS_OPEN] += 1
        counters[_PAIRS_OPENED] += 1
        server.happen(client, _ROUTED)

    def _refuse(self, client: Client, refusal: Refuse, end: End) -> None:
        took_s = time.monotonic() - client.accepted_s
        observe(self._server.counters, DECISION_FIRST, DECISION_BOUNDS_S, took_s)
        client.refused_by = refusal.rule
        client.refusal = refusal.cause
        client.facts = (*client.listener.ruleset.read(client.received), *refusal.facts)
        if refusal.reason in (CloseReason.TIMEOUT, CloseReason.NO_MATCH, CloseReason.MALFORMED):
            if end is End.FULL:
                self._server.counters[Counter.FIRST_PACKET_FULL] += 1
            elif end is End.TIMEOUT:
                self._server.counters[Counter.FIRST_PACKET_TIMEOUT] += 1
        client.reason = refusal.reason
        if refusal.reset:
            self._server.happen(client, Event.BROKEN)
        elif refusal.reply:
            client.down.pending = refusal.reply
            self._server.happen(client, Event.REFUSED)
        elif end is End.EOF:
            self._server.happen(client, Event.FINISHED)
        else:
            self._server.happen(client, Event.REFUSED)

    def waiting(self, client: Client, _fd: int, mask: int) -> None:
        """While its server is being connected, the client's bytes wait in the kernel."""
        if mask & EPOLLERR:
            self._server.broken(client, CloseReason.CLIENT_RESET)
            return
        if mask & EPOLLRDHUP:
            client.up.end_seen = True
        if mask & EPOLLPRI:
            client.up.urgent = True
        if mask & (EPOLLIN | EPOLLRDHUP):
            client.up.readable = True

"""From accept to a decision: PROXY header, first packet, and the dialogues of some protocols."""

from __future__ import annotations

import _socket
import os
import time
from typing import TYPE_CHECKING, Final

from pyforwarder import proxy_protocol
from pyforwarder.address import Address
from pyforwarder.connection import Event, Life
from pyforwarder.counters import Counter, ListenerCounter, RuleCounter
from pyforwarder.first_packet.cursor import ParseError
from pyforwarder.loop import EPOLLERR, EPOLLIN, EPOLLPRI, EPOLLRDHUP
from pyforwarder.reasons import CloseReason
from pyforwarder.routing import NEED_MORE, End, Refuse, Route, Send

if TYPE_CHECKING:
    from pyforwarder.routing import Decision
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


class Sniffer:
    """Reads what clients send first, and asks the rules about it until they decide."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = server.loop

    def begin_specially(self, client: Client) -> None:
        """What else comes first on some listeners: a PROXY header, or a decision without a byte."""
        state = client.listener
        if state.trusted_proxies is not None:
            client.proxied = False
            client.proxied_to = None
            client.header = b""
            if client.peer is not None and not state.trusted_proxies.contains(client.peer.host):
                # Whoever it is, it is not one of our proxies: nothing it says is read.
                self._refuse_header(client, CloseReason.DENIED)
                return
            self._loop.redirect(client.client_fd, self._header_came)
        elif not client.over_limit:
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
        except ParseError:
            self._refuse_header(client, CloseReason.MALFORMED)
            return
        if header is None:
            reason = CloseReason.MALFORMED if client.header else CloseReason.CLIENT_GONE
            self._refuse_header(client, reason)
            return
        self._take_header(client, header)
        if client.life is Life.SNIFFING:
            self._loop.redirect(fd, self.sniffed)
            if client.listener.decides_at_once and not client.over_limit:
                # No edge will tell of what came with the header; the pair may be joined at once.
                client.up.readable = True
                client.up.end_seen = bool(mask & EPOLLRDHUP)
                client.up.urgent = bool(mask & EPOLLPRI)
                self.decide(client, End.OPEN)
            if client.life is Life.SNIFFING:
                self.sniffed(client, fd, mask)

    @staticmethod
    def _read_header(client: Client, fd: int) -> proxy_protocol.Header | None:
        """The header, taken out of the socket; None: the client has closed before its end.

        Raises:
            BlockingIOError: it is not complete.
            ParseError: there is none.
            OSError: from the socket.
        """
        while True:
            new = client.client.recv(proxy_protocol.MAX_LENGTH, _socket.MSG_PEEK)
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

    def _refuse_header(self, client: Client, reason: CloseReason) -> None:
        """No rule is asked about a connection that has to begin with a header and does not."""
        self._server.counters[client.listener.counter + ListenerCounter.REFUSED] += 1
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
        if client.listener.generation.limits.pairs_per_client and not client.over_limit:
            self._server.count_client(client)
            if client.over_limit and not self._server.listen_to_busy(client):
                self._refuse_header(client, CloseReason.BUSY)
                return
        if client.slot >= 0:
            self._server.records.show(client)

    # Sniffing

    def timed_out(self, client: Client) -> None:
        """The first packet's time is over: decide by what has come."""
        if client.listener.trusted_proxies is not None and not client.proxied:
            self._refuse_header(client, CloseReason.TIMEOUT)  # silence is no header either
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
        if client.up.readable and client.life is _SNIFFING:
            self.sniffed(client, fd, mask)

    def _decide_again(self, client: Client) -> None:
        before_s = time.thread_time()
        self.decide(client, _OPEN)
        client.deciding_s += time.thread_time() - before_s
        if client.deciding_s > DECIDING_S and client.life is _SNIFFING:
            self.decide(client, End.FULL)

    def decide(self, client: Client, end: End) -> None:
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
            if decision is NEED_MORE:
                return
            if isinstance(decision, Route):
                self._route(client, decision)
                return
            if isinstance(decision, Refuse):
                self._refuse(client, decision, end)
                return
            if not self._say(client, decision):
                return
            if end is End.FULL and decision.skip:
                end = End.OPEN  # room again for what the dialogue goes on with
                self._loop.soon(client, client.client_fd)

    def _say(self, client: Client, decision: Send) -> bool:
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
        server = self._server
        counters = server.counters
        listener = client.listener
        counter = listener.rule_counters[route.rule.index]
        self._loop.deadlines.stop(client)
        self._loop.redirect(client.client_fd, self._waiting)
        most_pairs = listener.generation.most_pairs
        if client.over_limit or not server.limits.add_pair_below(most_pairs):
            counters[counter + RuleCounter.REFUSED] += 1
            server.refuse(client, CloseReason.BUSY)
            return
        counters[counter + _TAKEN] += 1
        client.counts_pair = True
        counters[_PAIRS_OPEN] += 1
        counters[_PAIRS_OPENED] += 1
        server.happen(client, _ROUTED)

    def _refuse(self, client: Client, refusal: Refuse, end: End) -> None:
        if refusal.rule is not None:
            counter = client.listener.rule_counters[refusal.rule.index]
            self._server.counters[counter + RuleCounter.REFUSED] += 1
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

    def _waiting(self, client: Client, _fd: int, mask: int) -> None:
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

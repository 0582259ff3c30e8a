"""What becomes of a client's first datagrams: a session, a refusal, or a wait for more of them.

Every datagram is whole, so there is mostly nothing to wait for: a rule that would need more bytes
does not match. Where a protocol's first word may take several datagrams they are held until it is
there (undecided.py), and then go on in their order.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pyforwarder.core.address import Address
from pyforwarder.core.first_packet.datagrams import Datagrams, datagrams_in
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import NEED_MORE, Claim, Decision, End, Refuse, Route, Rule
from pyforwarder.datapath.ebpf.abi import PairState
from pyforwarder.runtime.counters import (
    LIMITED_INDEX,
    Counter,
    ListenerCounter,
    RuleCounter,
)
from pyforwarder.worker.generation import is_local
from pyforwarder.worker.udp.routes import followed_route
from pyforwarder.worker.udp.session import RefusedClient, Session
from pyforwarder.worker.udp.undecided import Undecided, UndecidedClients

if TYPE_CHECKING:
    from pyforwarder.worker.generation import ListenerState
    from pyforwarder.worker.token_claims import TokenClaims
    from pyforwarder.worker.udp.connection_ids import SessionTarget
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import DatagramPort
    from pyforwarder.worker.udp.sockets import Key


class Deciding:
    """Decides about clients that have no session."""

    def __init__(self, server: DatagramServer, claims: TokenClaims | None) -> None:
        self._server = server
        self._log = server.log
        self._counters = server.counters
        self._loop = server.loop
        self._claims = claims
        self._undecided = UndecidedClients(server.loop, self._decide_now)

    @property
    def is_idle(self) -> bool:
        """Whether no client waits for a decision."""
        return not len(self._undecided)

    def open(self, port: DatagramPort, key: Key, datagram: bytes) -> None:
        """A client without a session has sent a datagram."""
        if self._is_ours(port, key):
            return
        if port.listener.ruleset.followed and self._follow(port, key, datagram):
            return
        undecided = self._undecided.get(port, key)
        if undecided is not None and undecided.claim is not None:
            count, size_bytes = len(undecided.datagrams), undecided.size_bytes
            if self._undecided.may_wait(port, count, size_bytes):
                self._undecided.hold(port, key, datagram)
            else:
                self._counters[Counter.DATAGRAMS_LOST] += 1
            return
        if undecided is None:
            count, size_bytes, data = 1, len(datagram), datagram
        else:
            data = Datagrams((*undecided.datagrams, datagram))
            count, size_bytes = len(data.all), undecided.size_bytes + len(datagram)
        ruleset = port.listener.ruleset
        may_wait = ruleset.spans_datagrams and self._undecided.may_wait(port, count, size_bytes)
        decision = self._decide(port, key, data, End.OPEN if may_wait else End.FULL)
        if decision is NEED_MORE:
            self._undecided.hold(port, key, datagram)
            return
        if isinstance(decision, Claim):
            self._claim(port, key, datagram, decision)
            return
        if undecided is not None:
            self._undecided.forget(undecided)
        self._act(port, key, data, decision)

    def _is_ours(self, port: DatagramPort, key: Key) -> bool:
        """Whether the datagram names a listener of this forwarder as its sender: then there is no
        session.

        What a server answered would come back as a client's next datagram, without an end. Linux
        takes such packets from the wire where they are IPv6 (ip6_rcv_core asks for loopback's
        addresses alone).
        """
        listener, client = port.listener, Address(key[0], key[1])
        # Whose a link-local address is, its link alone tells.
        named = Address(f"{key[0]}%{key[3]}", key[1]) if key[3] else client
        if not listener.generation.own["udp"].includes(named, is_local=is_local):
            return False
        refused = RefusedClient(self._server, listener, client, None)
        refused.refusal = "its sender would be this forwarder"
        self._counters[listener.counter + ListenerCounter.ACCEPTED] += 1
        self._turn_away(refused, listener, None, CloseReason.DENIED)
        return True

    def _claim(self, port: DatagramPort, key: Key, datagram: bytes, claim: Claim) -> None:
        """Have a token used up in the fleet; what the client sends meanwhile waits."""
        self._undecided.hold(port, key, datagram)
        undecided = self._undecided.get(port, key)
        if undecided is None:  # it had to make room at once
            return
        undecided.claim = claim

        def answer(is_first: bool | None) -> None:
            if self._undecided.get(port, key) is undecided:
                self._claimed(undecided, is_first)

        asked = self._claims and self._claims.ask(
            claim.digest, until_unix_s=claim.until_unix_s, wait_s=claim.wait_s, answer=answer
        )
        if asked is None:
            self._claimed(undecided, None)

    def _claimed(self, undecided: Undecided, is_first: bool | None) -> None:
        port, key, claim = undecided.port, undecided.key, undecided.claim
        assert claim is not None
        self._undecided.forget(undecided)
        try:
            self._act(port, key, Datagrams(undecided.datagrams), claim.then(is_first))
        except Exception as error:
            self._server.blame(port, key, error)

    def _decide_now(self, undecided: Undecided) -> None:
        """The client has sent no more in time, or has to make room for another."""
        if undecided.claim is not None:
            self._claimed(undecided, None)
            return
        port, key = undecided.port, undecided.key
        self._undecided.forget(undecided)
        data = Datagrams(undecided.datagrams)
        try:
            self._act(port, key, data, self._decide(port, key, data, End.TIMEOUT))
        except Exception as error:
            self._server.blame(port, key, error)

    def _decide(self, port: DatagramPort, key: Key, data: bytes, end: End) -> Decision:
        listener = port.listener
        return listener.ruleset.decide(
            data,
            client=Address(key[0], key[1]),
            local_port=listener.local_port,
            end=end,
            now_unix_s=time.time() if listener.ruleset.needs_clock else None,  # noqa: TID251 - expiry
            state=listener.ruleset.begin(),
        )

    def _follow(self, port: DatagramPort, key: Key, datagram: bytes) -> bool:
        """Whether a connection id leads to a server: then the client has a session with that.

        It is a session of its own, by another socket. So the server sees that the address has
        changed, and has the client prove it (RFC 9000 section 9); a stranger that has only seen the
        id turns nobody's answers away.
        """
        listener = port.listener
        found = self._server.ids.find(datagram, listener=listener.counter, now_s=self._loop.now_s)
        if found is None:
            return False
        connection_id, target = found
        route = followed_route(listener, target)
        if route is None:
            return False
        self._act(port, key, datagram, route, target)
        session = port.sessions.get(key)
        if session is not None:
            self._server.ids.learn(connection_id, target, self._loop.now_s)
            session.ids = (connection_id,)
        return True

    def _act(
        self,
        port: DatagramPort,
        key: Key,
        data: bytes,
        decision: Decision,
        target: SessionTarget | None = None,
    ) -> None:
        """Do with a client's first datagrams what has been decided."""
        listener = port.listener
        counters = self._counters
        client = Address(key[0], key[1])
        first, *later = datagrams_in(data)
        if isinstance(decision, Route):
            counters[listener.counter + ListenerCounter.ACCEPTED] += 1
            heard_bytes = len(first) + sum(map(len, later))
            session = Session(self._server, port, key, decision, heard_bytes)
            session.target = target
            session.facts = (*decision.facts, *listener.ruleset.facts(decision.rule, data))
            limit = self._server.admission.admit(session)
            if limit is not None:
                counters[LIMITED_INDEX[limit.counted_as]] += 1
                self._server.send_refusal(session, CloseReason.BUSY)
                refused = RefusedClient(self._server, listener, client, decision.rule)
                refused.route, refused.facts = decision, session.facts
                refused.over_limit = limit
                self._turn_away(refused, listener, decision.rule, CloseReason.BUSY)
                return
            session.id = self._server.next_id()
            rule_counter = listener.rule_counters[decision.rule.index]
            counters[rule_counter + RuleCounter.TAKEN] += 1
            counters[Counter.PAIRS_OPENED] += 1
            self._server.enter(session)
            self._server.records.show(session, PairState.CONNECTING)
            payload = first[decision.skip :]
            if payload or not decision.skip:
                self._server.copying.hold(session, payload)
            for datagram in later:
                self._server.copying.hold(session, datagram)
            self._server.connecting.choose(session)
            return
        # Not ours to serve: one word if the protocol has one, never more than was sent.
        rule = decision.rule if isinstance(decision, Refuse) else None
        refused = RefusedClient(self._server, listener, client, rule)
        if isinstance(decision, Refuse):
            reason = decision.reason
            refused.refusal = decision.cause
            refused.facts = (*listener.ruleset.read(data), *decision.facts)
            if decision.reply and len(decision.reply) <= len(first):
                self._server.copying.send_down(port, key, decision.reply)
        else:
            reason = CloseReason.MALFORMED
            refused.refusal = "the protocol is a dialogue, which needs a stream"
        counters[listener.counter + ListenerCounter.ACCEPTED] += 1
        self._turn_away(refused, listener, rule, reason)

    def _turn_away(
        self,
        refused: RefusedClient,
        listener: ListenerState,
        rule: Rule | None,
        reason: CloseReason,
    ) -> None:
        """Count and log a first datagram that gets no session."""
        refused.reason = reason
        self._server.count_end(listener, rule, reason, is_served=False)
        self._log.closed(refused, (0, 0), (0, 0))

    def forget_all(self, port: DatagramPort) -> int:
        """A listener is gone; how many datagrams are lost with those who are not decided."""
        return self._undecided.forget_all(port)

"""The life of connections in one worker: feeds events to the tables, and has commands obeyed."""

from __future__ import annotations

import _socket
from functools import partial
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import (
    LIFE,
    PHASES,
    Command,
    Event,
    Life,
    Phase,
    Step,
    UnexpectedEventError,
)
from pyforwarder.core.reasons import CloseReason, refusal_code
from pyforwarder.datapath.copying import CopyDatapath
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.datapath.splice.paused_pair import PausedPair
from pyforwarder.runtime.counters import Counter, ListenerCounter
from pyforwarder.runtime.password_checks import PasswordChecks
from pyforwarder.runtime.raw_sockets import end_writing
from pyforwarder.runtime.resolver import Names
from pyforwarder.worker.accepting import Acceptor
from pyforwarder.worker.client import Client
from pyforwarder.worker.closing import Closing
from pyforwarder.worker.connector import Connector
from pyforwarder.worker.destinations import Destinations
from pyforwarder.worker.foreign_pairs import ForeignPairs
from pyforwarder.worker.log import audit_of
from pyforwarder.worker.opening import Opening
from pyforwarder.worker.plain import PlainPath
from pyforwarder.worker.pressure import Pressure
from pyforwarder.worker.records import Records
from pyforwarder.worker.refusing import Refusing
from pyforwarder.worker.server_states import ServerStates
from pyforwarder.worker.sniffer import Sniffer
from pyforwarder.worker.token_claims import TokenClaims
from pyforwarder.worker.udp.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.datapath.base import Flow, Pair
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.runtime.limits import SharedLimits
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.generation import Generation
    from pyforwarder.worker.handover import Handover
    from pyforwarder.worker.log import ConnectionLog

# Plain names and numbers for the path of every connection: looking a member up in its enum costs
# more than most of what is done with it.
_CLOSED: Final = Life.CLOSED
_ENDING: Final = Life.ENDING
_PHASE_CLOSED: Final = Phase.CLOSED
_ACCEPTED: Final = int(Counter.ACCEPTED)
_FINISHED: Final = CloseReason.FINISHED
_FIN: Final = Step.FIN
_DELIVERED: Final = Step.DELIVERED


def _in_turn(actions: list[Callable[[Client], None]]) -> Callable[[Client], None]:
    """Return one function that calls all of them."""
    if len(actions) == 1:
        return actions[0]

    def obey(client: Client) -> None:
        for action in actions:
            action(client)

    return obey


class Server:
    """Accepts, decides, connects, joins and closes. It is the `PairHost` of its datapaths."""

    def __init__(
        self,
        loop: Loop,
        *,
        generation: Generation,
        counters: memoryview,
        limits: SharedLimits,
        window: PairWindow,
        log: ConnectionLog,
        worker: int,
        workers: int,
        most_clients: int,
        ask_supervisor: Callable[[str, list[int], int], None],
        last_id: int = 0,
        send_claim: Callable[[dict[str, object]], None] | None = None,
    ) -> None:
        """`most_clients` bounds open connections, by the descriptors this process may have.

        `ask_supervisor(what, descriptors, number)` asks for what needs a privilege, without
        waiting for it. `last_id` is the highest id of the pairs that go on from before;
        `send_claim` asks for the use of a token, see `TokenClaims`.
        """
        self.ask_supervisor = ask_supervisor
        self.loop = loop
        self.generation = generation
        self.counters = counters
        self.window = window
        self.copying = CopyDatapath(self)
        self.handover: Handover
        self.limits = limits
        self.log = log
        self._workers = workers
        self._first_id = last_id + worker + 1
        self.most_clients = most_clients
        self.clients: dict[int, Client] = {}
        self.pressure: Pressure = Pressure(
            self, memory_bytes=generation.memory_bytes, workers=workers
        )
        self.records: Records = Records(loop, window)
        self.passwords = PasswordChecks(loop)
        self.claims = TokenClaims(loop, send_claim)
        self._sniffer = Sniffer(self)
        self.names = Names(loop)
        self._connector = Connector(self)
        destinations = Destinations(self, self.names, self._connector)
        self.refusing = Refusing(self)
        self.opening = Opening(self)
        self.foreign_pairs = ForeignPairs(self)
        self.servers = ServerStates(self)
        self.closing = Closing(self, self._sniffer, self._connector)
        plain = PlainPath(self, self._sniffer, destinations, self._connector)
        self.accepting = Acceptor(self, self._sniffer, plain)
        commands: dict[Command, Callable[[Client], None]] = {
            Command.CONNECT: destinations.start,
            Command.CONNECT_NEXT: destinations.next,
            Command.ANSWER: self.refusing.answer,
            Command.FLUSH: self.opening.flush,
            Command.JOIN: self._join,
            Command.CLOSE: self.closing.close,
            Command.RESET: self.closing.reset,
        }
        # The table of connection.py, with what obeys its commands in place of their names.
        self._life = {
            life: {
                event: (following, _in_turn([commands[command] for command in row_commands]))
                for event, (following, row_commands) in row.items()
            }
            for life, row in LIFE.items()
        }
        loop.on_error = self.failed

    # Events

    def happen(self, client: Client, event: Event) -> None:
        """Feed one event to the connection's table and obey."""
        try:
            client.life, act = self._life[client.life][event]
        except KeyError:
            raise UnexpectedEventError(f"{event.name} while {client.life.name}") from None
        if self.log.tells_steps:
            self.log.step(
                client,
                event.name.lower(),
                life=client.life.name.lower(),
                rule=client.rule_name.decode(),
                server=str(client.destination) if client.destination else "-",
                datapath=client.kind.label,
                # Where the pair outlives us, the worker that writes the line of its end does not
                # know that.
                **(audit_of(client) if event is Event.ROUTED else {}),
            )
        act(client)

    def refuse(self, client: Client, reason: CloseReason, cause: str = "") -> None:
        """The routed client cannot be served; without words for that it is reset.

        A clean EOF instead would look like a server that had nothing to say. `cause` is for the
        log (empty: as was said before).
        """
        client.reason = reason
        client.refusal = cause or client.refusal
        route = client.route
        if route is not None and route.negotiation is not None:
            answer = route.negotiation.refused(refusal_code(reason))
            if answer:
                client.down.pending = answer
                self.happen(client, Event.REFUSED)
                return
        self.happen(client, Event.BROKEN)

    def failed(self, owner: object, error: Exception) -> None:
        """An exception of ours while serving one connection: that one is reset, the rest go on.

        One of a timer, of deferred work or of a ring, which belong to no client, is logged alone.
        """
        # A datapath's timer belongs to a pair, too.
        client = getattr(owner, "pair", owner)
        if isinstance(owner, Session):
            self.log.internal_error(error)
            owner.owner.end(owner, CloseReason.INTERNAL)
            return
        if not isinstance(client, Client):
            if owner is not None and not callable(owner):
                raise error  # a listener, or the supervisor's channel: without them we are useless
            self.log.internal_error(error)
            return
        self.log.internal_error(error)
        if client.life is not Life.CLOSED:
            client.reason = CloseReason.INTERNAL
            client.life = Life.CLOSED
            self.closing.reset(client)

    # Accepting

    def next_id(self) -> int:
        """Count one more client and name it; the count survives the worker, so no id recurs."""
        number: int = self.counters[_ACCEPTED]
        self.counters[_ACCEPTED] = number + 1
        return self._first_id + number * self._workers

    def pass_ids(self, count: int) -> None:
        """Count so many more clients without naming them."""
        self.counters[_ACCEPTED] += count

    # Handing over

    def _join(self, client: Client) -> None:
        """Bytes flow from here on: first copied, and handed over when that pays."""
        client.active_s = self.loop.now_s
        client.datapath = self.copying
        client.kind = DatapathKind.COPY  # which `show` says, also if the handover fails
        self.handover.joined(client)
        if client.life is not Life.JOINED:
            return  # it broke as the kernel took it
        self.watch_idle(client)
        if client.slot >= 0:
            self.records.show(client)
        if client.datapath is self.copying:
            self.copying.join(client)

    # PairHost

    def fin_seen(self, pair: Pair, flow: Flow) -> None:
        """The flow's source has sent FIN."""
        if TYPE_CHECKING:
            assert isinstance(pair, Client)
        flow.phase = PHASES[flow.phase][_FIN]
        if pair.slot >= 0:
            self.records.show_state(pair)

    def delivered(self, pair: Pair, flow: Flow) -> None:
        """Send the FIN of a direction on: every byte is with the target's TCP."""
        if TYPE_CHECKING:
            assert isinstance(pair, Client)
        flow.phase = PHASES[flow.phase][_DELIVERED]
        other = pair.down if flow is pair.up else pair.up
        if other.phase is _PHASE_CLOSED:
            # Nothing is unread on either side, so close() sends the second FIN.
            if pair.life is not _ENDING:
                pair.reason = _FINISHED
                self._end_with(pair, Event.FINISHED)
            return
        # A spliced pair's source has said that itself. Our socket would say it again and again to
        # nobody, give up after some minutes, and its port would be free while the pair goes on.
        if pair.kind is not DatapathKind.SPLICE and not end_writing(flow.target_fd):
            # ENOTCONN: the target was reset, and the event of that is on its way to us.
            side = CloseReason.SERVER_RESET if flow is pair.up else CloseReason.CLIENT_RESET
            self.broken(pair, side)
            return
        pair.active_s = self.loop.now_s
        if pair.slot >= 0:
            self.records.show_state(pair)

    def ended(self, pair: Pair, flow: Flow) -> None:
        """Both at once: nearly every connection ends so, twice."""
        if TYPE_CHECKING:
            assert isinstance(pair, Client)
        flow.phase = _PHASE_CLOSED
        if (pair.down if flow is pair.up else pair.up).phase is _PHASE_CLOSED:
            pair.reason = _FINISHED
            if pair.is_bare and pair.slot < 0 and not self.log.tells_steps:
                self.closing.finish(pair)
            else:
                self.happen(pair, Event.FINISHED)
            return
        if not end_writing(flow.target_fd):
            side = CloseReason.SERVER_RESET if flow is pair.up else CloseReason.CLIENT_RESET
            self.broken(pair, side)
            return
        pair.active_s = self.loop.now_s
        if pair.slot >= 0:
            self.records.show_state(pair)

    def broken(self, pair: Pair, reason: CloseReason) -> None:
        """The pair cannot be continued correctly."""
        assert isinstance(pair, Client)
        if pair.life is not _CLOSED and pair.life is not _ENDING:
            if isinstance(pair.datapath, PausedPair):
                # Where it is will be known in a moment; that ends it then.
                pair.datapath.ends_with = pair.datapath.ends_with or reason
                return
            if not pair.is_refused:
                pair.reason = reason  # a refusal stays what it is, however its client takes it
            self._end_with(pair, Event.BROKEN)

    def _end_with(self, client: Client, event: Event) -> None:
        """FINISHED or BROKEN, now or when its datapath is ready for that."""
        datapath = client.datapath
        if datapath is None or datapath.end(client, partial(self._end_at_last, event)):
            self.happen(client, event)
        else:
            self.happen(client, Event.PUT_OFF)

    def _end_at_last(self, event: Event, pair: Pair) -> None:
        assert isinstance(pair, Client)
        self.happen(pair, event)

    def moved(self, pair: Pair, flow: Flow) -> None:
        """Userspace has moved bytes of this flow."""
        if pair.slot >= 0:
            self.window.count(
                pair.slot,
                flow.direction,
                max(0, flow.carried_bytes),
                flow.carried_packets,
                int(self.loop.now_s * 1e9),
            )
        if TYPE_CHECKING:
            assert isinstance(pair, Client)
        if pair.is_bare and flow.carried_packets > 1 and flow is pair.up:
            pair.settle()  # what TCP has put off goes out by that, too
        if pair.waits_for_handover:
            self.handover.moved(pair, flow)

    def enlarge(self, pair: Pair | None, sock: _socket.socket, by_bytes: int) -> None:
        """Ask the supervisor, which has the privilege, to enlarge a socket's send buffer."""
        if pair is not None:
            pair.is_shared = True
        self.ask_supervisor("enlarge", [sock.fileno()], by_bytes)

    # Deadlines

    def expired(self, client: Client) -> None:
        """A deadline has passed: what it meant depends on where the connection is."""
        match client.life:
            case Life.SNIFFING:
                self._sniffer.timed_out(client)
            case Life.CONNECTING:
                self._connector.timed_out(client)
            case Life.HANDOVER:
                self.broken(client, CloseReason.TIMEOUT)
            case Life.JOINED:
                self._check_idle(client)
            case Life.ENDING:
                pass  # the keeper has a deadline of its own
            case Life.REFUSING:
                self.happen(client, Event.BROKEN)

    def watch_idle(self, client: Client) -> None:
        """Look at the joined pair every now and then; a byte that moves does not touch a timer."""
        generation = client.listener.generation
        wait_s = generation.young_check_s if client.waits_for_handover else generation.idle_check_s
        self.loop.deadlines.start(client, wait_s, self.loop.now_s)

    @staticmethod
    def _idle_limit(client: Client) -> tuple[float, CloseReason]:
        timeouts = client.listener.generation.config.timeouts
        if client.up.phase is Phase.OPEN and client.down.phase is Phase.OPEN:
            return timeouts.idle_s, CloseReason.IDLE
        # Half closed, or draining to a peer that does not read: both end.
        return min(timeouts.half_closed_s, timeouts.idle_s), CloseReason.HALF_CLOSED

    def _check_idle(self, client: Client) -> None:
        assert client.datapath is not None
        limit_s, reason = self._idle_limit(client)
        if self.loop.now_s - client.datapath.active_s(client) >= limit_s:
            self.broken(client, reason)
            return
        if client.waits_for_handover:
            self.handover.aged(client)
        if client.life is Life.JOINED:
            self.watch_idle(client)

    # What the supervisor asks

    def flush_ids(self, ids: list[int] | None) -> list[int]:
        """Reset the pairs with these ids, or all of them (None); the ids that were found."""
        wanted = None if ids is None else set(ids)
        chosen = [c for c in self.clients.values() if wanted is None or c.id in wanted]
        for client in chosen:
            self.broken(client, CloseReason.FLUSHED)
        return [client.id for client in chosen]

    def reset_all(self, reason: CloseReason) -> None:
        """End every connection now."""
        for client in list(self.clients.values()):
            self.broken(client, reason)

    # Between daemons

    def take_in(self, client: Client) -> None:
        """Count a pair that did not come by a listener among those that are open."""
        client.counts_pair = True
        self.limits.add_pair(client.listener.counter)
        self.counters[Counter.PAIRS_OPEN] += 1
        self.counters[Counter.OPEN] += 1
        self.counters[client.listener.counter + ListenerCounter.OPEN] += 1
        self.clients[client.client_fd] = client

    def take_back(self, client: Client) -> None:
        """A pair that has left its sockmap is copied from here on, and not handed over again."""
        client.kind = DatapathKind.COPY
        client.waits_for_handover = False
        if client.slot >= 0:
            self.window.set_datapath(client.slot, client.kind, client.pair_reason)
        for flow in (client.up, client.down):
            self.moved(client, flow)
        self.copying.take_back(client)

    def join(self, client: Client) -> None:
        """A pair that another worker had copied flows here."""
        self._join(client)

    def granted(self, number: int, *, done: bool) -> None:
        """The supervisor's answer to what `ask_supervisor` asked under this number."""
        self._connector.granted(number, done=done)

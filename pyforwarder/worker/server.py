"""The life of connections in one worker: feeds events to the tables and obeys their commands."""

from __future__ import annotations

import _socket
import errno
import os
from typing import TYPE_CHECKING, Final

from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import UnixAddress
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
from pyforwarder.core.routing import Route
from pyforwarder.datapath.copying import WATCHED, CopyDatapath
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.datapath.splice.question import Question
from pyforwarder.errors import ControlError
from pyforwarder.runtime.channel import BACKLOG
from pyforwarder.runtime.counters import (
    CLOSED_INDEX,
    LIMITED_INDEX,
    Counter,
    ListenerCounter,
    ServerCounter,
    change,
    count_connect,
    count_disconnect,
)
from pyforwarder.runtime.keepalive import keep_alive
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.linger import end_orderly
from pyforwarder.runtime.loop import (
    EPOLLERR,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
    Loop,
)
from pyforwarder.runtime.password_checks import PasswordChecks
from pyforwarder.runtime.raw_sockets import accept, end_writing, peer_name
from pyforwarder.runtime.refusals import count_refusal
from pyforwarder.runtime.resolver import Names
from pyforwarder.worker.adopting import (
    adoptable,
    cookie_of,
    read_so_far,
    set_up,
    written_so_far,
)
from pyforwarder.worker.client import Client, address_of
from pyforwarder.worker.connector import Connector
from pyforwarder.worker.plain import PlainPath
from pyforwarder.worker.pressure import Pressure
from pyforwarder.worker.records import Records
from pyforwarder.worker.sniffer import Sniffer
from pyforwarder.worker.token_claims import TokenClaims
from pyforwarder.worker.udp.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyforwarder.datapath.base import Flow, Pair
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.runtime.limits import SharedLimits
    from pyforwarder.worker.generation import Generation, ListenerState
    from pyforwarder.worker.handover import Handover
    from pyforwarder.worker.log import ConnectionLog

# How many connections one turn of the loop accepts, before those it has get their turn.
ACCEPT_BATCH: Final = 16
# accept(2): out of descriptors or memory. What waits in the backlog stays there.
OVERLOADED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
ACCEPT_PAUSE_S: Final = 0.1
# accept(2) asks to treat these errors of a connection that was never ours like EAGAIN.
NEVER_OURS: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.EPERM,
    }
)
# A refused client gets this long, and this many bytes, to read its answer and close. Closing at
# once would turn into a RST by what it had sent meanwhile, and the RST would take the answer along.
REFUSAL_LINGER_S: Final = 1.0
REFUSAL_DISCARD_BYTES: Final = 64 * 1024
# Clients over a limit that are still listened to, so that they can be told `busy`.
BUSY_CLIENTS: Final = 64

# Plain names and numbers for the path of every connection: looking a member up in its enum costs
# more than most of what is done with it.
_SNIFFING: Final = Life.SNIFFING
_CLOSED: Final = Life.CLOSED
_HANDOVER: Final = Life.HANDOVER
_PHASE_CLOSED: Final = Phase.CLOSED
_ACCEPTED: Final = int(Counter.ACCEPTED)
_OPEN: Final = int(Counter.OPEN)
_PAIRS_OPEN: Final = int(Counter.PAIRS_OPEN)
_UP_BYTES: Final = int(Counter.UP_BYTES)
_DOWN_BYTES: Final = int(Counter.DOWN_BYTES)
_LISTENER_ACCEPTED: Final = int(ListenerCounter.ACCEPTED)
_LISTENER_OPEN: Final = int(ListenerCounter.OPEN)
_LISTENER_UP_BYTES: Final = int(ListenerCounter.UP_BYTES)
_LISTENER_DOWN_BYTES: Final = int(ListenerCounter.DOWN_BYTES)
_FINISHED: Final = CloseReason.FINISHED
_FLUSHED: Final = Event.FLUSHED
_CLOSED_FINISHED: Final = CLOSED_INDEX[CloseReason.FINISHED]
_SERVER_PAIRS: Final = int(ServerCounter.PAIRS)
_FIN: Final = Step.FIN
_DELIVERED: Final = Step.DELIVERED


def _in_turn(actions: list[Callable[[Client], None]]) -> Callable[[Client], None]:
    """One call for all of them; most are alone."""
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
        self._adopted: dict[int, Client] = {}  # by the cookies of both its sockets
        self._busy_clients = 0
        self.pressure = Pressure(self, memory_bytes=generation.memory_bytes, workers=workers)
        self.records = Records(loop, window)
        self.passwords = PasswordChecks(loop)
        self.claims = TokenClaims(loop, send_claim)
        self._sniffer = Sniffer(self)
        self.names = Names(loop)
        self._connector = Connector(self, self.names)
        self._plain = PlainPath(self, self._sniffer, self._connector)
        self._listeners: dict[int, tuple[_socket.socket, ListenerState]] = {}
        commands: dict[Command, Callable[[Client], None]] = {
            Command.CONNECT: self._connector.start,
            Command.CONNECT_NEXT: self._connector.next,
            Command.ANSWER: self._answer,
            Command.FLUSH: self._flush,
            Command.JOIN: self._join,
            Command.CLOSE: self._close,
            Command.RESET: self._reset,
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

        One of a timer, of work that was put off or of a ring, which are nobody's, is told of.
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
            self._reset(client)

    # Accepting

    def listen(self, sock: _socket.socket, state: ListenerState) -> None:
        """Accept from this socket, which stays the caller's to close after `unlisten`."""
        fd = sock.fileno()
        self._listeners[fd] = (sock, state)
        self.loop.watch(fd, EPOLLIN, self._accept, state)

    def unlisten(self, sock: _socket.socket) -> None:
        """Accept no more from this socket."""
        if self._listeners.pop(sock.fileno(), None) is not None:
            self.loop.forget(sock.fileno())

    def accept_rest(self, sock: _socket.socket) -> None:
        """Take in everybody who waits at a listener that is about to go.

        For them they have been connected for a while: closing it would reset them.
        """
        fd = sock.fileno()
        if fd in self._listeners:
            self._accept(self._listeners[fd][1], fd, 0, most=BACKLOG)

    def _accept(
        self, state: ListenerState, fd: int, _mask: int, *, most: int = ACCEPT_BATCH
    ) -> None:
        for _ in range(most):
            client_fd = accept(fd)
            if client_fd < 0:
                code = -client_fd
                if code == errno.EAGAIN:
                    return
                if code in OVERLOADED:
                    self._pause(self._listeners[fd][0])
                    return
                if code in NEVER_OURS:
                    continue
                raise OSError(code, os.strerror(code))
            if (
                state.is_plain
                and not self.log.tells_steps
                and len(self.clients) < self.most_clients
            ):
                self._plain.serve(state, client_fd, peer_name(), self.next_id())
            else:
                self._admit(state, client_fd, peer_name())

    def _pause(self, listener: _socket.socket) -> None:
        """Let the backlog wait until some connections have ended."""
        self.counters[Counter.ACCEPT_PAUSED] += 1
        fd = listener.fileno()
        self.loop.change(fd, 0)

        def resume() -> None:
            if fd in self._listeners:
                self.loop.change(fd, EPOLLIN)

        self.loop.after(ACCEPT_PAUSE_S, resume)

    def next_id(self) -> int:
        """Count one more client and name it; the count survives the worker, so no id recurs."""
        number: int = self.counters[_ACCEPTED]
        self.counters[_ACCEPTED] = number + 1
        return self._first_id + number * self._workers

    def _admit(self, state: ListenerState, fd: int, peer: bytes) -> None:
        counters = self.counters
        counters[state.counter + _LISTENER_ACCEPTED] += 1
        client = Client(self, state, None, fd, peer, self.loop.now_s)
        client.id = self.next_id()
        if state.asks_limits:
            self._ask_limits(client)
        if client.over_limit is not None and not self.listen_to_busy(client):
            self._turn_away(client)
            return
        if len(self.clients) >= self.most_clients:
            self.limited(client, Limit.DESCRIPTORS)
            self._turn_away(client)
            return
        counters[_OPEN] += 1
        counters[state.counter + _LISTENER_OPEN] += 1
        self.clients[fd] = client
        client.client_mask = WATCHED
        self.loop.watch(fd, WATCHED, self._sniffer.sniffed, client)
        if state.converses:
            client.conversation = state.ruleset.begin()
        self.records.show_later(client)
        try:
            if state.starts_specially:
                self._sniffer.begin_specially(client)
            else:
                # Most of those that speak first have spoken by now: that saves an event.
                self._sniffer.sniffed(client, fd, EPOLLIN)
            if client.life is _SNIFFING:
                self.loop.deadlines.start(client, state.timeout_s, self.loop.now_s)
        except Exception as error:
            # To the loop the listener would be its owner, whose faults end the process.
            self.failed(client, error)

    def _ask_limits(self, client: Client) -> None:
        """Whether the connection is one too many, in this second or of this client."""
        state = client.listener
        is_known = client.peer is not None and state.trusted_proxies is None
        host = client.peer.host if client.peer is not None and is_known else None
        self._settle(client, self.limits.admit(host, state.scopes, self.loop.now_s))

    def count_client(self, client: Client) -> None:
        """Ask the limits on clients, now that a PROXY header has said who it is."""
        if client.peer is not None:
            scopes = client.listener.scopes
            answer = self.limits.admit_host(client.peer.host, scopes, self.loop.now_s)
            self._settle(client, answer)

    def _settle(self, client: Client, answer: Limit | tuple[int, ...]) -> None:
        if isinstance(answer, Limit):
            self.limited(client, answer)
        else:
            client.client_keys = answer

    def limited(self, client: Client, limit: Limit) -> None:
        """A limit says no to the connection, which is to be told or reset."""
        client.over_limit = limit
        self.counters[LIMITED_INDEX[limit]] += 1

    def listen_to_busy(self, client: Client) -> bool:
        """Count one more client over a limit; whether there is room to tell it so."""
        client.counts_busy = True
        self._busy_clients += 1
        return self._busy_clients <= BUSY_CLIENTS

    def _turn_away(self, client: Client) -> None:
        """No room even to listen: a reset, at once."""
        client.life = Life.CLOSED
        client.refusal = client.refusal or "limit of descriptors"
        client.reason = CloseReason.BUSY
        self.counters[CLOSED_INDEX[CloseReason.BUSY]] += 1
        self._count_refusal(client)
        self.log.closed(client, (0, 0), (0, 0))
        self._give_back(client)
        sock = client.give_up_client()
        os.close(client.client_fd if sock is None else sock.detach())

    # Refusing

    def _count_refusal(self, client: Client) -> None:
        """Settle whether the connection that was not joined is a refusal."""
        rule, state = client.rule, client.listener
        assert client.reason is not None
        client.is_refused = count_refusal(
            self.counters,
            client.reason,
            listener=state.counter,
            rule=state.rule_counters[rule.index] if rule is not None else None,
        )

    def _answer(self, client: Client) -> None:
        """Tell the client why not, send FIN, and give it a moment to read that."""
        self._count_refusal(client)
        reply = client.down.pending
        client.down.pending = None
        try:
            if reply:
                # A few bytes into an empty queue: if TCP does not take them, nobody is reading.
                os.write(client.client_fd, reply)
        except OSError:
            self.happen(client, Event.BROKEN)
            return
        if not end_writing(client.client_fd):
            self.happen(client, Event.BROKEN)
            return
        self.loop.redirect(client.client_fd, self._discard)
        self.loop.deadlines.start(client, REFUSAL_LINGER_S, self.loop.now_s)
        client.up.read_bytes = 0
        self.records.show_state(client)
        self._discard(client, client.client_fd, EPOLLIN)

    def _discard(self, client: Client, fd: int, mask: int) -> None:
        """Read what a refused client still sends, up to a bound, until it closes."""
        if mask & (EPOLLERR | EPOLLHUP):
            self.happen(client, Event.FINISHED)
            return
        while client.up.read_bytes < REFUSAL_DISCARD_BYTES:
            try:
                size = len(os.read(fd, 4096))
            except BlockingIOError:
                return
            except OSError:
                break
            if not size:
                break
            client.up.read_bytes += size
        self.happen(client, Event.FINISHED)

    # Handing over

    def _flush(self, client: Client) -> None:
        """Write what comes before the join: the answer, the PROXY header, the first bytes."""
        route = client.route
        assert route is not None
        up, down = client.up, client.down
        first = client.received[route.skip :] if route.skip else client.received
        client.received = b""
        if first:
            up.pending = first
            up.carried_packets = 1
        if client.listener.send_proxy is not None:
            header = self._proxy_header(client, client.listener.send_proxy[route.rule.index])
            if header:
                up.pending = header + first
                up.carried_bytes = -len(header)
        negotiation = route.negotiation
        if negotiation is not None:
            source = client.source_address() if negotiation.tells_source else None
            answer = negotiation.granted(source)
            if answer:
                down.pending = answer
                # Not carried for anybody: what is written of it must not count.
                down.carried_bytes = -len(answer)
        self.go_on_flushing(client)

    def go_on_flushing(self, client: Client) -> None:
        """Write what is `pending` before the join, now or as there is room."""
        self._flush_more(client)
        if client.life is _HANDOVER:
            self.loop.redirect(client.client_fd, self.flushing)
            self.loop.redirect(client.server_fd, self.flushing)
            self.loop.deadlines.start(
                client, client.listener.generation.config.timeouts.connect_s, self.loop.now_s
            )

    def _proxy_header(self, client: Client, form: str) -> bytes:
        """What the server is told about the client before the first byte."""
        if form == "off":
            return b""
        client_end = server_end = client.peer
        if client_end is not None:
            server_end = client.proxied_to if client.listener.trusted_proxies is not None else None
            server_end = server_end or address_of(client.client.getsockname())
        if form == "v1":
            return proxy_protocol.build_v1(client_end, server_end)
        # The id that `show` and the log know the connection by.
        unique_id = (proxy_protocol.TLV_UNIQUE_ID, b"%d" % client.id)
        return proxy_protocol.build_v2(client_end, server_end, [unique_id])

    def _flush_more(self, client: Client) -> None:
        # The answer first: nothing of the server's may come before it.
        done = client.down.pending is None or self.copying.write_pending(client, client.down)
        if client.life is not _HANDOVER:
            return
        done &= client.up.pending is None or self.copying.write_pending(client, client.up)
        if done:
            self.happen(client, _FLUSHED)

    def flushing(self, client: Client, fd: int, mask: int) -> None:
        """An event while something still has to be written before the join."""
        inward, outward = (
            (client.up, client.down) if fd == client.client_fd else (client.down, client.up)
        )
        if mask & EPOLLERR:
            side = CloseReason.CLIENT_RESET if inward is client.up else CloseReason.SERVER_RESET
            self.broken(client, side)
            return
        if mask & EPOLLRDHUP:
            inward.end_seen = True
        if mask & EPOLLPRI:
            inward.urgent = True
        if mask & (EPOLLIN | EPOLLRDHUP):
            inward.readable = True
        if mask & EPOLLOUT and outward.blocked:
            outward.blocked = False
            self._flush_more(client)

    def _join(self, client: Client) -> None:
        """Bytes flow from here on: first copied, and handed over when that pays."""
        client.active_s = self.loop.now_s
        client.datapath = self.copying
        client.kind = DatapathKind.COPY  # which `show` says, whatever the handover comes to
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
        """Every byte is with the target's TCP: its FIN goes out."""
        if TYPE_CHECKING:
            assert isinstance(pair, Client)
        flow.phase = PHASES[flow.phase][_DELIVERED]
        other = pair.down if flow is pair.up else pair.up
        if other.phase is _PHASE_CLOSED:
            # Nothing is unread on either side, so close() sends the second FIN.
            pair.reason = _FINISHED
            self.happen(pair, Event.FINISHED)
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
                self._finish(pair)
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
        if pair.life is not _CLOSED:
            if isinstance(pair.datapath, Question):
                # Where it is will be known in a moment; that ends it then.
                pair.datapath.ends_with = pair.datapath.ends_with or reason
                return
            if not pair.is_refused:
                pair.reason = reason  # a refusal stays what it is, however its client takes it
            self.happen(pair, Event.BROKEN)

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

    def enlarge(self, sock: _socket.socket, by_bytes: int) -> None:
        """Ask the supervisor, who may."""
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
                self._look_at_idle(client)
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

    def _look_at_idle(self, client: Client) -> None:
        assert client.datapath is not None
        limit_s, reason = self._idle_limit(client)
        if self.loop.now_s - client.datapath.active_s(client) >= limit_s:
            self.broken(client, reason)
            return
        if client.waits_for_handover:
            self.handover.aged(client)
        if client.life is Life.JOINED:
            self.watch_idle(client)

    # The end

    def _close(self, client: Client) -> None:
        """An orderly end: TCP goes on sending what it has, and the FIN behind it."""
        end_orderly(client.client_fd)
        if client.server is not None:
            end_orderly(client.server_fd)
        self._end(client)

    def _finish(self, client: Client) -> None:
        """`_close` of a pair that came by the straight path and was never shown: most of them."""
        client.life = _CLOSED
        client.datapath = None
        client_fd, server_fd, server = client.client_fd, client.server_fd, client.server
        end_orderly(client_fd)
        end_orderly(server_fd)
        self.records.unshown.pop(client, None)
        counters, listener = self.counters, client.listener.counter
        up, down = client.up, client.down
        counters[_CLOSED_FINISHED] += 1
        counters[_UP_BYTES] += up.carried_bytes
        counters[_DOWN_BYTES] += down.carried_bytes
        counters[listener + _LISTENER_UP_BYTES] += up.carried_bytes
        counters[listener + _LISTENER_DOWN_BYTES] += down.carried_bytes
        chosen = client.server_state
        gauges: tuple[int, ...] = (_OPEN, _PAIRS_OPEN, listener + _LISTENER_OPEN)
        if chosen is not None:
            assert client.upstream is not None
            client.upstream.balancer.closed(chosen)
            chosen.held.add(-1)  # as Balancer.release does
            client.server_state = None
            if chosen.counter:
                gauges = (*gauges, chosen.counter + _SERVER_PAIRS)
        for gauge in gauges:
            count = counters[gauge]
            if count:  # as `change` does
                counters[gauge] = count - 1
        self.limits.remove_pair(listener)
        if self.log.tells:
            self.log.closed(
                client,
                (up.carried_bytes, up.carried_packets),
                (down.carried_bytes, down.carried_packets),
            )
        queue = client._queue
        if queue is not None:
            del queue[client]
            client._queue = None
        del self.clients[client_fd]
        client.server = None
        self.loop.close_two(client_fd, client.give_up_client(), server_fd, server)

    def _reset(self, client: Client) -> None:
        """Both ends get a RST: all sockets have had SO_LINGER 0 from their first moment."""
        self._end(client)

    def _end(self, client: Client) -> None:
        reason = client.reason
        if reason is None:
            reason = client.reason = _FINISHED
        counters = self.counters
        loop = self.loop
        counters[CLOSED_INDEX[reason]] += 1
        change(counters, _OPEN, -1)
        change(counters, client.listener.counter + _LISTENER_OPEN, -1)
        datapath = client.datapath
        # Below 0 as long as some of what we say ourselves is not written.
        up = max(0, client.up.carried_bytes), client.up.carried_packets
        down = max(0, client.down.carried_bytes), client.down.carried_packets
        if datapath is not None:
            if datapath is not self.copying:
                up = datapath.carried(client, client.up)[:2]
                down = datapath.carried(client, client.down)[:2]
                counters[Counter.BACKLOG_TRIPS] += datapath.trips(client)
                datapath.leave(client)
            client.datapath = None
        elif not client.is_refused:
            self._count_refusal(client)
        # The slot first: who adds the table to these counters may miss the bytes for a moment, but
        # must not see them twice.
        self.records.release(client)
        if datapath is not None:
            change(counters, _UP_BYTES, up[0])
            change(counters, _DOWN_BYTES, down[0])
            change(counters, client.listener.counter + _LISTENER_UP_BYTES, up[0])
            change(counters, client.listener.counter + _LISTENER_DOWN_BYTES, down[0])
        self.log.closed(client, up, down)
        loop.deadlines.stop(client)
        if client.keeper_wait is not None:
            loop.deadlines.stop(client.keeper_wait)
        if client.approach is not None:
            client.approach.stop()
            client.approach = None
        if client.asked:
            self._connector.forget(client)
        if self._sniffer.put_off:
            self._sniffer.put_off.pop(client, None)
        self._give_back(client)
        client_fd = client.client_fd
        del self.clients[client_fd]
        if client.is_adopted:
            for cookie in client.cookies:
                del self._adopted[cookie]
        if client.is_adopted or client.is_shared:
            # Another process may keep its descriptor. Then close() does not take the socket out of
            # epoll, and its events would reach the next owner of that number.
            loop.forget(client_fd)
            loop.forget(client.server_fd)
        sock = client.give_up_client()
        if sock is None:
            loop.close(client_fd)
        else:
            loop.close_socket(client_fd, sock)
        if client.server is not None:
            loop.close_socket(client.server_fd, client.server)
            client.server = None

    def _give_back(self, client: Client) -> None:
        """What limits and balancers counted for this connection."""
        if client.counts_busy:
            self._busy_clients -= 1
        if client.client_keys:
            self.limits.give_back(client.client_keys)
        if client.counts_pair:
            self.limits.remove_pair(client.listener.counter)
            change(self.counters, _PAIRS_OPEN, -1)
        if client.server_state is not None:
            if client.server_opened:
                assert client.upstream is not None
                client.upstream.balancer.closed(client.server_state)
                count_disconnect(self.counters, client.server_state.counter)
            assert client.upstream is not None
            client.upstream.balancer.release(client.server_state)
            client.server_state = None

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

    # What the supervisor asks

    def join_sockets(self, client_fd: int, server_fd: int) -> int:
        """Join two connected stream sockets of another program; the pair's id.

        They are ours from here on, and closed at the end; other copies of their descriptors must
        not be used any more. What was read and written before is not our business: the counts
        begin now.

        Raises:
            ControlError: the sockets cannot be joined; both descriptors are closed, and the sockets
                are what they were.
        """
        try:
            client_socket = adoptable(client_fd)
        except OSError as error:
            os.close(server_fd)
            raise ControlError(f"cannot join: {error.strerror}") from error
        try:
            server_socket = adoptable(server_fd)
        except OSError as error:
            client_socket.close()
            raise ControlError(f"cannot join: {error.strerror}") from error
        try:
            cookies = self._admit_join(client_socket, server_socket)
            peer = address_of(client_socket.getpeername())
            destination = address_of(server_socket.getpeername())
            # Only now: the caller keeps sockets that are refused, and goes on with them.
            for sock in (client_socket, server_socket):
                set_up(sock)
                if sock.family != _socket.AF_UNIX:
                    keep_alive(sock, self.generation.keepalive)
        except (ControlError, OSError) as error:
            client_socket.close()
            server_socket.close()
            words = error.strerror if isinstance(error, OSError) else error
            raise ControlError(f"cannot join: {words}") from error
        state = self.generation.joined
        counters = self.counters
        client = Client(self, state, client_socket, client_fd, peer, self.loop.now_s)
        client.id = self.next_id()
        client.attach_server(server_socket, server_fd)
        client.destination = destination or UnixAddress("/")
        client.route = Route(state.ruleset.rules[0], client.destination, 0, None, False)
        client.is_adopted = True
        client.cookies = cookies
        self._adopted.update(dict.fromkeys(cookies, client))
        counters[Counter.PAIRS_OPENED] += 1
        counters[state.counter + ListenerCounter.ACCEPTED] += 1
        self.take_in(client)
        for flow, source, target in (
            (client.up, client_socket, server_socket),
            (client.down, server_socket, client_socket),
        ):
            flow.readable = True
            flow.read_bytes = read_so_far(source)
            flow.written_bytes = written_so_far(target)
        client.client_mask = client.server_mask = WATCHED
        self.loop.watch(client_fd, WATCHED, self.flushing, client)
        self.loop.watch(server_fd, WATCHED, self.flushing, client)
        client.life = Life.HANDOVER
        self.records.show_later(client)
        self.happen(client, Event.FLUSHED)
        return client.id

    def _admit_join(self, *sockets: _socket.socket) -> tuple[int, ...]:
        """Their cookies, if they may be joined here.

        Raises:
            ControlError: a pair has one of them, or there is no room.
        """
        cookies = tuple(map(cookie_of, sockets))
        if len(set(cookies)) < len(cookies):
            raise ControlError("the two are the same socket")
        if (owner := self.pair_with(cookies)) is not None:
            raise ControlError(f"pair {owner} has that socket already")
        limit = self.generation.limits.pairs
        if self.pressure.is_full and self.pressure.is_all_held():
            self.counters[LIMITED_INDEX[Limit.MEMORY]] += 1
            raise ControlError("pairs hold as much memory as they may (limits.memory)")
        if len(self.clients) >= self.most_clients or self.limits.pairs >= limit:
            raise ControlError(f"there are as many pairs as there may be (limits.pairs: {limit})")
        return cookies

    def pair_with(self, cookies: Iterable[int]) -> int | None:
        """The id of the pair that was given one of these sockets by another program."""
        for cookie in cookies:
            if (client := self._adopted.get(cookie)) is not None:
                return client.id
        return None

    def take_in(self, client: Client) -> None:
        """Count a pair that did not come by a listener among those that are open."""
        client.counts_pair = True
        self.limits.add_pair(client.listener.counter)
        self.counters[Counter.PAIRS_OPEN] += 1
        self.counters[Counter.OPEN] += 1
        self.counters[client.listener.counter + ListenerCounter.OPEN] += 1
        self.clients[client.client_fd] = client

    # Between daemons

    def let_go(self, client: Client) -> None:
        """The pair is another daemon's from here on, with its sockets: forget it, and say nothing.

        Nothing of it is left with a datapath of ours.
        """
        change(self.counters, _OPEN, -1)
        change(self.counters, client.listener.counter + _LISTENER_OPEN, -1)
        client.life = Life.CLOSED
        client.datapath = None
        client.waits_for_handover = False
        if client.kind is DatapathKind.SPLICE:
            client.slot = -1  # the record tells the other daemon what `show` said
        else:
            self.records.release(client)
        self.loop.deadlines.stop(client)
        if client.keeper_wait is not None:
            self.loop.deadlines.stop(client.keeper_wait)
        self._give_back(client)
        del self.clients[client.client_fd]
        for cookie in client.cookies:
            del self._adopted[cookie]
        # Closing does not take them out of epoll: the other daemon has the sockets.
        self.loop.forget(client.client_fd)
        self.loop.forget(client.server_fd)
        self.loop.close_socket(client.client_fd, client.client)
        assert client.server is not None
        self.loop.close_socket(client.server_fd, client.server)
        client.server = None

    def know_adopted(self, client: Client, cookies: tuple[int, ...]) -> None:
        """Another program may have its sockets, which have these cookies."""
        client.is_adopted = True
        client.cookies = cookies
        self._adopted.update(dict.fromkeys(cookies, client))

    def hold_server(self, client: Client, upstream: str, server: str) -> None:
        """Count the pair for a server of an upstream, if it is configured still."""
        state = self.generation.upstreams.get(upstream)
        if state is None:
            return
        found = next((one for one in state.balancer.servers if one.name == server), None)
        if found is None:
            return
        client.upstream, client.server_state = state, found
        state.balancer.hold(found)
        state.balancer.opened(found)
        count_connect(self.counters, found.counter)
        client.server_opened = True

    def join(self, client: Client) -> None:
        """A pair that another worker had copied flows here."""
        self._join(client)

    def upstreams(self) -> dict[str, dict[str, dict[str, object]]]:
        """What this worker knows of every server: upstream -> server -> state and counts."""
        now_s = self.loop.now_s
        return {
            name: {
                server.name: {
                    "state": balancer.condition(server, now_s).value,
                    "pairs": server.pairs,
                    "connects": server.connects,
                    "failures": server.failures,
                }
                for server in balancer.servers
            }
            for name, balancer in self.generation.balancers.items()
        }

    def granted(self, number: int, *, done: bool) -> None:
        """The supervisor's answer to what `ask_supervisor` asked under this number."""
        self._connector.granted(number, done=done)

    def mark(self, upstream: str, server: str, *, up: bool) -> None:
        """A health check has changed its mind about a server."""
        balancer = self.generation.balancers.get(upstream)
        if balancer is None:
            return
        if up:
            balancer.mark_up(server, self.loop.now_s)
        else:
            balancer.mark_down(server)
        self.tell_of_servers()

    def tell_of_servers(self) -> None:
        """Write down which servers get no new pairs here, and why."""
        for balancer in self.generation.balancers.values():
            for server in balancer.servers:
                if server.counter:
                    self.counters[server.counter + ServerCounter.DOWN] = int(not server.is_up)
                    drained = int(server.is_drained)
                    self.counters[server.counter + ServerCounter.DRAINED] = drained

"""A worker receives the pairs that a worker of the daemon before sends (moving.py)."""

from __future__ import annotations

import _socket
import base64
import contextlib
import errno
import os
import resource
import socket
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.core.connection import Event, Step, next_life, next_phase
from pyforwarder.core.routing import Route
from pyforwarder.datapath.copying import BLOCKED, WATCHED
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import ABI_VERSION, NAME_BYTES, PairRecord
from pyforwarder.datapath.splice.sessions import SessionOrphan
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.loop import EPOLLIN, MOST_EVENTS
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.socket_options import cookie_of
from pyforwarder.worker.client import Client
from pyforwarder.worker.foreign_sockets import is_plain_tcp
from pyforwarder.worker.moving import (
    MOST_MESSAGE_BYTES,
    AddressMessage,
    KernelSessionsMessage,
    PairMessage,
    SessionMessage,
)
from pyforwarder.worker.moving_facts import (
    facts_of,
)
from pyforwarder.worker.orphans import resume_spliced

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.datapath.splice.adopted import Orphan
    from pyforwarder.datapath.splice.datapath import SpliceDatapath
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.worker.server import Server
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import Session

# For how many spliced pairs the keeper is asked at once, after what pause again if its queue is
# full, and how long it may take to answer for all of them.
_ASKED_AT_ONCE: Final = 16
_AGAIN_S: Final = 0.2
_KEEPER_S: Final = 10.0
# How many messages are read before the pairs have their turn, and how soon the channel is read
# again: where hundreds of sockets are ready, epoll would report it once in many turns. Where it is
# empty it is read more and more seldom, and in the end when epoll says so. Few events: short turns.
_TAKEN_AT_ONCE: Final = 8
_FIRST_POLL_S: Final = 0.001
_LAST_LOOK_S: Final = 0.256
_EVENTS_MEANWHILE: Final = 32
# More messages than a socket holds at once.
_MOST_QUEUED: Final = 512
# How long no client of UDP is heard at most, as the last session has not come.
_SESSIONS_S: Final = 30.0
# How long one turn reads of them, and of sessions.
_TURN_S: Final = 0.003
# How often a line of the log says how many have come.
_TELL_S: Final = 1.0
# So many descriptors are never used by pairs that are received.
_OWN_DESCRIPTORS: Final = 64


_SplicedPair = tuple[PairMessage, socket.socket, socket.socket]


class PairReceiver:
    """Goes on with the pairs and sessions that a worker of the daemon before sends."""

    def __init__(
        self,
        channel: Channel,
        server: Server,
        datagrams: DatagramServer,
        splice: SpliceDatapath | None,
    ) -> None:
        """`channel` is ours to close."""
        self._channel = channel
        self._server = server
        self._datagrams = datagrams
        self._splice = splice
        self._sessions: list[Session] = []  # until all have come
        # Spliced pairs with their sockets, until our own keeper has answered for them.
        self._spliced: deque[_SplicedPair] = deque()
        self._asked: dict[int, _SplicedPair] = {}  # by the number of the pair
        self._may_splice = False
        self._deadline = 0  # the timer after which the keeper is not waited for any more
        self._then: Callable[[], None] | None = None  # called when all spliced pairs are here
        self._is_over = False
        self._poll_s = 0.0  # until the channel is read again; 0: epoll reports it
        self._taken = 0  # since the log has said how many
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_fds = max(soft - _OWN_DESCRIPTORS, soft // 2)
        datagrams.waits_for_sessions = True
        # A daemon before that stands still sends neither the last session nor the channel's end.
        server.loop.after(scaled_s(_SESSIONS_S), self._sessions_have_come)
        server.loop.watch(channel.fileno(), EPOLLIN, self._readable, None)

    def _readable(self, _owner: object, _fd: int, _mask: int) -> None:
        if self._receive_some() and not self._poll_s:
            self._poll_again(_FIRST_POLL_S)

    def _receive_some(self) -> bool:
        """Whether there were any."""
        count = 0
        ends_s = time.monotonic() + _TURN_S
        while self._receive_one():
            count += 1
            if count < _TAKEN_AT_ONCE:
                continue
            # All clients of UDP wait until the last session has come.
            if not self._datagrams.waits_for_sessions or time.monotonic() >= ends_s:
                break
        return count > 0

    def _poll(self) -> None:
        """Read the channel, ready or not; more and more seldom where it is empty."""
        self._poll_again(_FIRST_POLL_S if self._receive_some() else 2 * self._poll_s)

    def _poll_again(self, after_s: float) -> None:
        loop = self._server.loop
        if self._is_over or after_s > _LAST_LOOK_S:
            self._poll_s, loop.most_events = 0.0, MOST_EVENTS
        else:
            self._poll_s, loop.most_events = after_s, _EVENTS_MEANWHILE
            loop.after(after_s, self._poll)

    def _receive_one(self) -> bool:
        """Receive one message; False: there is none now, or the channel has ended."""
        if self._is_over:
            return False
        try:
            received = self._channel.receive(most_bytes=MOST_MESSAGE_BYTES)
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            received = None
        if received is None:
            self._is_over = True
            self._server.loop.forget(self._channel.fileno())
            self._channel.close()
            self._sessions_have_come()
            return False
        message, fds = received
        try:
            if any(fd >= self._most_fds for fd in fds):
                # The lowest free number is given: others would be refused for these.
                raise ValueError("more sockets than there is room for")
            self._take_in(message, fds)
        except (ValidationError, ValueError, OSError) as error:
            # This pair is reset, and no other.
            self._server.log.internal_error(ValueError(f"not taken over: {type(error).__name__}"))
        except Exception as error:
            self._server.log.internal_error(error)
        finally:
            for one in fds:
                with contextlib.suppress(OSError):
                    os.close(one)
        return True

    def _take_in(self, message: dict[str, Any], fds: list[int]) -> None:
        """The descriptors that are used are taken out of `fds`."""
        if "pair" in message:
            pair_message = PairMessage.model_validate(message["pair"])
            if len(fds) != 2:
                raise ValueError("a pair has two sockets")
            client, server = (_stream_socket(fds.pop(0)) for _ in range(2))
            if not pair_message.is_foreign and not all(map(_is_known_kind, (client, server))):
                raise ValueError("sockets that no listener of ours accepts")
            if pair_message.spliced is None:
                self._resume_copied(pair_message, client, server)
            else:
                self._spliced.append((pair_message, _known(client), _known(server)))
                if self._may_splice:  # it has come late, as its worker had much to do
                    self._ask_keeper()
        elif "session" in message:
            one = SessionMessage.model_validate(message["session"])
            if len(fds) != 1:
                raise ValueError("a session has one socket")
            sock = socket.socket(fileno=fds.pop())
            if sock.type != socket.SOCK_DGRAM:
                sock.close()
                raise ValueError("no UDP socket")
            sock.setblocking(False)
            self._datagrams.adoption.remember(one)
            said_by_table = _shown(one)
            orphan = SessionOrphan(
                -1,
                one.id,
                sock,
                (one.client, one.client_port),
                (one.local, one.local_port),
                said_by_table,
            )
            # What its server says goes on at once.
            session = self._datagrams.adoption.take_one(orphan)
            if session is not None:
                self._sessions.append(session)
                if not self._datagrams.waits_for_sessions:
                    self._take_notice()  # it is late, and its client is heard by now
        elif "known" in message:
            for known in KernelSessionsMessage.model_validate(message).known:
                self._datagrams.adoption.remember(known)
        elif message.get("sessions") == "all":
            self._sessions_have_come()

    def _sessions_have_come(self) -> None:
        if self._datagrams.waits_for_sessions:
            self._datagrams.sessions_have_come()
            self._take_notice()

    def _take_notice(self) -> None:
        sessions, self._sessions = self._sessions, []
        self._count(len(sessions))
        self._datagrams.adoption.all_are_known(sessions)

    def _count(self, taken: int) -> None:
        """Have the log say how many were taken over: soon, as the last of them may take long."""
        if taken and not self._taken:
            self._server.loop.after(_TELL_S, self._log_taken)
        self._taken += taken

    def _log_taken(self) -> None:
        taken, self._taken = self._taken, 0
        self._server.log.log.write("info", "taken_over", pairs=taken)

    def take_over_spliced(self, then: Callable[[], None]) -> None:
        """Our keeper has what the daemon before has spliced: go on with those pairs.

        `then` is called when all have come whose sockets were sent: what the keeper has besides
        has lost them, and gets new ones. These would be refused while the old ones are there.
        """
        self._read_all(then, _MOST_QUEUED)

    def _read_all(self, then: Callable[[], None], most: int) -> None:
        """All were sent before the other daemon said that nothing is left, which we have read.

        Copied pairs may be in front of the last of them, and more come behind: these have turns.
        """
        ends_s = time.monotonic() + _TURN_S
        left = most
        while left and self._receive_one():
            left -= 1
            if time.monotonic() >= ends_s:
                self._server.loop.defer(partial(self._read_on, then, left), None)
                return
        self._may_splice = True
        self._then = then
        self._ask_keeper()

    def _read_on(self, then: Callable[[], None], most: int, _owner: None) -> None:
        self._read_all(then, most)

    def _ask_keeper(self) -> None:
        """Ask the keeper for some of the pairs that are left."""
        loop = self._server.loop
        if self._spliced and not self._deadline:
            self._deadline = loop.after(scaled_s(_KEEPER_S), self._reset_all)
        while self._spliced and len(self._asked) < _ASKED_AT_ONCE:
            pair = self._spliced.popleft()
            pair_message, client, server = pair
            assert pair_message.spliced is not None
            if pair_message.id in self._asked or self._splice is None:
                _close(client, server)
                continue
            self._asked[pair_message.id] = pair
            if not self._splice.take_over(
                pair_message.spliced.index, client, server, partial(self._answered, pair)
            ):
                del self._asked[pair_message.id]
                self._spliced.appendleft(pair)
                loop.after(_AGAIN_S, self._ask_keeper)
                return
        if self._spliced or self._asked:
            return
        loop.cancel(self._deadline)
        self._deadline = 0
        if self._then is not None:
            then, self._then = self._then, None
            then()

    def _answered(self, pair: _SplicedPair, orphan: Orphan | None) -> None:
        pair_message, client, server = pair
        if self._asked.get(pair_message.id) is not pair:
            return  # it took too long
        del self._asked[pair_message.id]
        try:
            if orphan is None or orphan.id != pair_message.id:
                _close(client, server)  # it has ended meanwhile
            else:
                self._resume_spliced(pair_message, orphan)
        except Exception as error:
            self._server.log.internal_error(error)
        self._ask_keeper()

    def _reset_all(self) -> None:
        """The keeper has not answered: nobody can speak for what is left any more.

        Its peers' next packets get a RST.
        """
        self._deadline = 0
        lost = [*self._asked.values(), *self._spliced]
        self._asked.clear()
        self._spliced.clear()
        for pair_message, client, server in lost:
            _close(client, server)
            if self._splice is not None and pair_message.spliced is not None:
                self._splice.forget(pair_message.spliced.index, pair_message.id)
        self._ask_keeper()

    def _make(
        self,
        pair_message: PairMessage,
        client_socket: _socket.socket,
        server_socket: _socket.socket,
    ) -> Client:
        """The pair as a client of ours, counted and watched for nothing yet."""
        server = self._server
        listener, rule = server.generation.listener_and_rule(
            pair_message.listener, pair_message.port, pair_message.rule
        )
        peer = _address_of(pair_message.peer)
        client = Client(
            server, listener, client_socket, client_socket.fileno(), peer, server.loop.now_s
        )
        client.id = pair_message.id
        client.is_shared = True  # its worker may still have it in its hands, and closes it later
        client.attach_server(server_socket, server_socket.fileno())
        client.destination = _address_of(pair_message.destination) or UnixAddress("/")
        client.source = _address_of(pair_message.source)
        client.route = Route(rule, client.destination, 0, None, False)
        client.facts = facts_of(pair_message.audit)
        client.accepted_s = min(pair_message.started_s, server.loop.now_s)
        client.active_s = min(pair_message.active_s, server.loop.now_s)
        if pair_message.is_foreign:
            cookies = tuple(map(cookie_of, (client_socket, server_socket)))
            if server.foreign_pairs.pair_with(cookies) is None:
                server.foreign_pairs.know(client, cookies)
        if peer is not None and listener.scopes:
            scopes = listener.scopes
            answer = server.limits.admit(peer.host, scopes, server.loop.now_s, is_new=False)
            if not isinstance(answer, Limit):  # it is no new one: it may be one too many
                client.client_keys = answer
        server.servers.hold(client, pair_message.upstream, pair_message.server)
        for flow, one in zip((client.up, client.down), pair_message.flows, strict=True):
            flow.read_bytes, flow.written_bytes = one.read_bytes, one.written_bytes
            flow.carried_bytes, flow.carried_packets = one.carried_bytes, one.carried_packets
            flow.pending = memoryview(base64.b64decode(one.pending)) if one.pending else None
        server.take_in(client)
        client.life, _ = next_life(client.life, Event.ADOPTED)
        self._count(1)
        return client

    def _resume_copied(
        self,
        pair_message: PairMessage,
        client_socket: _socket.socket,
        server_socket: _socket.socket,
    ) -> None:
        """A pair that is copied: here from now on, and handed over if that pays."""
        server = self._server
        client = self._make(pair_message, client_socket, server_socket)
        for flow, one in zip((client.up, client.down), pair_message.flows, strict=True):
            flow.readable = not one.is_closed
            flow.blocked = flow.pending is not None
            if one.is_closed:
                flow.phase = next_phase(flow.phase, Step.ENDED)
        # What is there already is reported by the new watch, urgent bytes and ends too.
        client.client_mask = BLOCKED if client.down.blocked else WATCHED
        client.server_mask = BLOCKED if client.up.blocked else WATCHED
        for fd, mask in (
            (client.client_fd, client.client_mask),
            (client.server_fd, client.server_mask),
        ):
            server.loop.watch(fd, mask, server.copying.ready, client)
        server.records.show_later(client)
        server.join(client)

    def _resume_spliced(self, pair_message: PairMessage, orphan: Orphan) -> None:
        assert self._splice is not None
        assert pair_message.spliced is not None
        client = self._make(pair_message, orphan.client, orphan.server)
        resume_spliced(
            self._server,
            self._splice,
            client,
            orphan,
            left_bytes=pair_message.spliced.left_bytes,
            is_mute=pair_message.spliced.is_mute,
        )


def _shown(said: SessionMessage) -> PairRecord | None:
    """What the pair table of the daemon before says of a session, in our layout."""
    if said.layout in (None, ABI_VERSION) or said.shown is None:
        return table.inherited(bytes.fromhex(said.record), said.id)
    record = PairRecord(
        id=said.id,
        started_ns=int(said.shown.started_s * 1e9),
        rule=said.shown.rule.encode()[: NAME_BYTES - 1],
        listener_name=said.shown.listener.encode()[: NAME_BYTES - 1],
    )
    for flow, (carried_bytes, packets) in zip(record.worker, said.shown.carried, strict=True):
        flow.carried_bytes, flow.carried_packets = carried_bytes, packets
    return table.inherited(bytes(record), said.id)


def _close(*sockets: socket.socket) -> None:
    for sock in sockets:
        sock.close()


def _stream_socket(fd: int) -> _socket.socket:
    """The socket behind a descriptor, which is its from here on; closed if it is another kind.

    Raises:
        OSError: it is no stream socket.
    """
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
    if sock.type & ~_socket.SOCK_NONBLOCK != _socket.SOCK_STREAM:
        sock.close()
        raise OSError(errno.EPROTOTYPE, "not a stream socket")
    os.set_blocking(fd, False)
    return sock


def _is_known_kind(sock: _socket.socket) -> bool:
    """Whether a pair of ours may have it: MPTCP in a sockmap can crash a 6.1 kernel."""
    return sock.family == socket.AF_UNIX or is_plain_tcp(sock)


def _known(sock: _socket.socket) -> socket.socket:
    """Return the socket as one that has the methods which requests to the keeper need."""
    return socket.socket(fileno=sock.detach())


def _address_of(address: AddressMessage | None) -> Address | None:
    return None if address is None else Address(address.host, address.port)

"""Pairs that go from a worker to one of the daemon that takes its daemon's place.

    sessions   UDP, each with its socket to the server; then a word that these were all
    pairs      TCP, each with both sockets and what is known of them: bytes that were read and not
               written yet, which ends have been said, what was carried

A pair is in one process's hands at any time: the one lets go of it with the message in which it
goes. The kernel keeps the sockets meanwhile, and what comes waits in their queues. A message that
nobody gets any more closes them, and their peers see resets.

What moves is what is copied, what is spliced, and what is in a sockmap, out of which it is taken
first (datapath/sockmap_exit.py). A pair that has no server yet follows as soon as it has.

The other worker is believed no more than a stranger: it may have been taken over. What it says of a
pair is compared with a table, and one that does not make sense is reset.
"""

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
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.core.connection import Life, Phase
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import Route
from pyforwarder.datapath.copying import BLOCKED, BULK_READ_BYTES, WATCHED
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.sockmap_exit import ExitError
from pyforwarder.datapath.splice.sessions import SessionOrphan
from pyforwarder.runtime.limits import Limit
from pyforwarder.runtime.loop import EPOLLIN
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.adopting import cookie_of, is_plain_tcp
from pyforwarder.worker.client import Client
from pyforwarder.worker.orphans import go_on_spliced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.datapath.base import Flow
    from pyforwarder.datapath.sockmap import SockmapDatapath
    from pyforwarder.datapath.sockmap_exit import SockmapExit
    from pyforwarder.datapath.splice.datapath import Orphan, SpliceDatapath
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.worker.server import Server
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import Session

# So many go in one turn of the loop: the pairs that stay have theirs in between.
_BATCH: Final = 32
# Spliced pairs for which the keeper is asked at once, when it is asked again if there is no room,
# and how long it may take until it has answered for all of them.
_ASKED_AT_ONCE: Final = 16
_AGAIN_S: Final = 0.2
_KEEPER_S: Final = 10.0
# How often it is looked for those that have got a server, or can leave their sockmap by now.
_LOOK_S: Final = 0.02
# A pair stands still while it is under way, so few are at a time: memory of messages that were not
# read yet, and how often it is looked whether they were.
_MOST_UNDER_WAY_BYTES: Final = 12 * 1024
_PAUSE_S: Final = 0.002
# How many the other takes in before its pairs have their turn.
_TAKEN_AT_ONCE: Final = 8
# More messages than a socket holds at once.
_MOST_QUEUED: Final = 512
# How long one turn reads of them.
_TURN_S: Final = 0.003
# Bytes of two directions, each at most one read, in base64, and some words.
_MOST_MESSAGE_BYTES: Final = 4 * BULK_READ_BYTES
# Of messages; of descriptors under way; of memory, or descriptors for long messages.
_NO_ROOM: Final = (
    errno.EAGAIN,
    errno.ETOOMANYREFS,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
)
_GONE: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED)
# So many descriptors are never taken by pairs of the other's.
_OWN_DESCRIPTORS: Final = 64

_Name = Annotated[str, Field(max_length=1024)]
_Number = Annotated[int, Field(ge=0, lt=1 << 62)]
_Carried = Annotated[int, Field(gt=-(1 << 20), lt=1 << 50)]
_Port = Annotated[int, Field(ge=0, le=65535)]


class _Said(BaseModel):
    """No conversion of types; a field that another version adds is not for us."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class FlowSaid(_Said):
    """One direction."""

    is_closed: bool  # its FIN has been sent on
    pending: Annotated[str, Field(max_length=2 * BULK_READ_BYTES)]  # read, not written; base64
    read_bytes: _Number
    written_bytes: _Number
    carried_bytes: _Carried
    carried_packets: _Number


class SplicedSaid(_Said):
    """What the kernel has of a spliced pair."""

    index: Annotated[int, Field(ge=0, lt=(1 << 32) - 1)]
    left_bytes: Annotated[
        list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=2, max_length=2)
    ]
    is_mute: bool


class AddressSaid(_Said):
    """Where one end is."""

    host: Annotated[str, Field(max_length=64)]
    port: _Port


class PairSaid(_Said):
    """A pair; its client's socket and its server's come with it.

    Where these are connected to they may not say any more: both FINs may be there, to be read.
    """

    id: Annotated[int, Field(ge=1, lt=1 << 62)]
    listener: _Name
    port: _Port  # which of its addresses
    rule: _Name
    upstream: _Name
    server: _Name
    started_s: Annotated[float, Field(ge=0, lt=1e12)]
    active_s: Annotated[float, Field(ge=0, lt=1e12)]
    peer: AddressSaid | None  # the rest are unix sockets
    destination: AddressSaid | None
    source: AddressSaid | None
    is_adopted: bool
    flows: Annotated[list[FlowSaid], Field(min_length=2, max_length=2)]
    spliced: SplicedSaid | None


class SessionSaid(_Said):
    """A UDP session; its socket to the server comes with it."""

    id: Annotated[int, Field(ge=1, lt=1 << 62)]
    client: Annotated[str, Field(max_length=64)]
    client_port: _Port
    local: Annotated[str, Field(max_length=64)]
    local_port: _Port
    record: Annotated[str, Field(max_length=2 * PAIR_BYTES, pattern=r"^([0-9a-f][0-9a-f])*$")]


class _NoRoomError(Exception):
    """The other has to read first."""


class _HeirGoneError(Exception):
    """There is nobody any more who would read."""


class Giving:
    """Sends what it can of a worker's pairs, until the worker ends."""

    def __init__(
        self,
        heir: Channel,
        server: Server,
        datagrams: DatagramServer,
        splice: SpliceDatapath | None,
        sockmap: SockmapDatapath | None,
    ) -> None:
        """`heir` is where they go, and ours to close."""
        self._heir = heir
        self._sockmap = sockmap
        self._exit: SockmapExit | None = None
        self._queue: deque[Client] = deque()
        self._server = server
        self._datagrams = datagrams
        self._splice = splice
        self._sessions_told = False
        self._is_over = False
        # Nothing more is given to the kernel; what has been, moves or stays.
        server.handover.stop()
        datagrams.handover.settle(splice=False)
        server.loop.defer(lambda _: self._go_on(), None)

    def spliced_left(self) -> int:
        """How many pairs and sessions that the kernel has are here still."""
        if self._is_over:
            return 0  # nobody gets them
        left = sum(1 for client in self._server.clients.values() if self._is_spliced(client))
        if self._splice is not None:
            # They may be spliced in a moment; and what is to be reset must be, before it is theirs.
            left += self._splice.questions + self._splice.unsettled
        return left + (0 if self._sessions_told else 1)

    def _is_spliced(self, client: Client) -> bool:
        return client.datapath is not None and client.datapath is self._splice

    def _go_on(self) -> None:
        try:
            pause_s = self._give_some()
        except _NoRoomError:
            pause_s = _PAUSE_S
        except _HeirGoneError:
            self._stay()
            return
        except Exception as error:
            # A fault of ours: whom it does not concern goes on to be given.
            self._server.log.internal_error(error)
            pause_s = _LOOK_S
        if pause_s:
            self._server.loop.after(pause_s, self._go_on)
        else:
            self._server.loop.defer(lambda _: self._go_on(), None)

    def _stay(self) -> None:
        """The other worker is gone: what is copied ends here, and what is spliced is adopted."""
        self._is_over = True
        self._heir.close()
        if self._exit is not None:
            self._exit.close()
        self._server.handover.finish()
        for client in list(self._server.clients.values()):
            if self._is_spliced(client):
                assert self._splice is not None
                self._splice.let_go(client)
                self._server.let_go(client)
        for session in self._datagrams.sessions():
            if session.place is not None:
                # As long as we have its socket, nobody else can make one that is as it.
                self._datagrams.let_go(session)

    def _send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Without waiting.

        Raises:
            _NoRoomError: the other has to read first; nothing has happened.
            _HeirGoneError: there is no other any more.
            OSError: it is the message's own fault.
        """
        try:
            self._heir.send(message, fds, wait=False)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise _NoRoomError from error
            if error.errno in _GONE:
                raise _HeirGoneError from error
            raise

    def _give_some(self) -> float:
        """How long to wait before the next ones.

        Raises:
            _NoRoomError, _HeirGoneError: see `_send`.
        """
        if not self._sessions_told:
            for session in self._datagrams.sessions()[:_BATCH]:
                try:
                    self._give_session(session)
                except (_NoRoomError, _HeirGoneError):
                    raise
                except Exception as error:
                    self._server.log.internal_error(error)
                    self._datagrams.end(session, CloseReason.INTERNAL)
            if self._datagrams.sessions():
                return 0.0
            self._send({"sessions": "all"})
            self._sessions_told = True
        if not self._queue:
            # Spliced pairs first: all wait for the last of them. Then those of which it is known
            # that they can go.
            clients = [one for one in self._server.clients.values() if self._may_move(one)]
            clients.sort(key=self._turn_of)
            self._queue.extend(clients)
        for _ in range(min(_BATCH, len(self._queue))):
            if self._heir.unread_bytes() > _MOST_UNDER_WAY_BYTES:
                return _PAUSE_S
            client = self._queue[0]
            try:
                if self._may_move(client) and self._is_portable(client):
                    self._give(client)
            except (_NoRoomError, _HeirGoneError):
                raise
            except Exception as error:
                # It costs this pair, and no other.
                self._queue.popleft()
                self._server.log.internal_error(error)
                self._give_up(client)
                continue
            self._queue.popleft()
        return 0.0 if self._queue else _LOOK_S

    def _give_up(self, client: Client) -> None:
        """A pair that cannot be given, by a fault of ours: one that is spliced is adopted."""
        if self._is_spliced(client):
            assert self._splice is not None
            self._splice.let_go(client)
            self._server.let_go(client)
        elif client.life is not Life.CLOSED:
            self._server.broken(client, CloseReason.INTERNAL)

    def _turn_of(self, client: Client) -> int:
        if self._is_spliced(client):
            return 0
        return 1 if client.datapath is self._server.copying else 2

    def _may_move(self, client: Client) -> bool:
        if client.life is not Life.JOINED or client.server is None:
            return False
        datapath = client.datapath
        if datapath is self._server.copying:
            return True
        if self._sockmap is not None and datapath is self._sockmap:
            return True
        return self._is_spliced(client)

    def _is_portable(self, client: Client) -> bool:
        """Whether all that is known of the pair fits into a message; it may have ended instead."""
        if self._sockmap is not None and client.datapath is self._sockmap:
            if not self._take_out(self._sockmap, client):
                return False
            self._server.take_back(client)
            if client.life is not Life.JOINED:
                return False
        if self._is_spliced(client):
            return True
        # More than that is written first.
        return all(len(flow.pending or b"") <= BULK_READ_BYTES for flow in (client.up, client.down))

    def _take_out(self, sockmap: SockmapDatapath, client: Client) -> bool:
        """See `SockmapExit.take_out`; where there is no way out, what is in the sockmap stays."""
        try:
            if self._exit is None:
                self._exit = sockmap.exit()
            return self._exit.take_out(client)
        except ExitError as error:
            self._server.log.log.write("warning", "sockmap_stays", error=str(error))
            self._sockmap = None
            return False

    def _give(self, client: Client) -> None:
        spliced = None
        if self._is_spliced(client):
            assert self._splice is not None
            index, left_bytes, is_mute = self._splice.peek(client)
            spliced = {"index": index, "left_bytes": left_bytes, "is_mute": is_mute}
        if client.is_bare:
            client.settle()  # the other takes its sockets as they are
        state = client.listener
        assert client.route is not None
        message: dict[str, Any] = {
            "id": client.id,
            "listener": state.config.name,
            "port": state.local_port,
            "rule": client.route.rule.name,
            "upstream": _upstream_of(client),
            "server": client.server_state.name if client.server_state is not None else "",
            "started_s": client.accepted_s,
            "active_s": client.active_s,
            "peer": _address_said(client.peer),
            "destination": _address_said(client.destination),
            "source": _address_said(client.source_address()),
            "is_adopted": client.is_adopted,
            "flows": [_said_of(flow) for flow in (client.up, client.down)],
            "spliced": spliced,
        }
        self._send({"pair": message}, [client.client_fd, client.server_fd])
        # Sent, and so it is the other's.
        if spliced is not None:
            assert self._splice is not None
            self._splice.let_go(client)
        self._server.let_go(client)

    def _give_session(self, session: Session) -> None:
        server = self._datagrams
        record = b""
        if session.slot >= 0:
            record = server.records.record_of(session)
        if session.sock is None or not record or session.key[3] or session.proxy_header:
            # It has no server yet, or is too much: its client's next datagram begins another.
            server.end(session, CloseReason.SHUTDOWN)
            return
        if session.place is not None:
            # The kernel's: it goes on there, and comes to the other by its keeper.
            server.let_go(session)
            return
        local = session.asked_address()
        message = {
            "id": session.id,
            "client": session.key[0],
            "client_port": session.key[1],
            "local": local.host,
            "local_port": local.port,
            "record": record.hex(),
        }
        self._send({"session": message}, [session.sock.fileno()])
        server.let_go(session)


def _upstream_of(client: Client) -> str:
    """The name of the upstream that counts it; empty: none."""
    if client.server_state is None or client.route is None:
        return ""
    to = client.route.rule.to
    return to if isinstance(to, str) else ""


def _address_said(address: object) -> dict[str, str | int] | None:
    if not isinstance(address, Address):
        return None
    return {"host": address.host, "port": address.port}


def _address_of(said: AddressSaid | None) -> Address | None:
    return None if said is None else Address(said.host, said.port)


def _said_of(flow: Flow) -> dict[str, Any]:
    return {
        "is_closed": flow.phase is Phase.CLOSED,
        "pending": base64.b64encode(flow.pending or b"").decode(),
        "read_bytes": flow.read_bytes,
        "written_bytes": flow.written_bytes,
        "carried_bytes": flow.carried_bytes,
        "carried_packets": flow.carried_packets,
    }


_SplicedPair = tuple[PairSaid, socket.socket, socket.socket]


class Taking:
    """Takes in what a worker of the daemon before sends."""

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
        self._sessions: list[SessionOrphan] = []
        # Spliced, with their sockets, until our own keeper has them. It is asked for some of them.
        self._spliced: deque[_SplicedPair] = deque()
        self._asked: dict[int, _SplicedPair] = {}  # by the number of the pair
        self._may_splice = False
        self._deadline = 0  # the timer of when the keeper is waited for no more
        self._then: Callable[[], None] | None = None  # what is to follow when there are none left
        self._is_over = False
        self.taken = 0
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_fds = max(soft - _OWN_DESCRIPTORS, soft // 2)
        datagrams.waits_for_sessions = True
        server.loop.watch(channel.fileno(), EPOLLIN, self._hear, None)

    def _hear(self, _owner: object, _fd: int, _mask: int) -> None:
        for _ in range(_TAKEN_AT_ONCE):
            if not self._read():
                return

    def _read(self) -> bool:
        """Take in one more; False: there is none just now, or never will be."""
        if self._is_over:
            return False
        try:
            received = self._channel.receive(most_bytes=_MOST_MESSAGE_BYTES)
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            received = None
        if received is None:
            self._is_over = True
            self._server.loop.forget(self._channel.fileno())
            self._channel.close()
            self._sessions_have_come()
            if self.taken:
                self._server.log.log.write("info", "taken_over", pairs=self.taken)
            return False
        message, fds = received
        try:
            if any(fd >= self._most_fds for fd in fds):
                # The lowest free number is given: others would be refused for these.
                raise ValueError("more sockets than there is room for")
            self._take(message, fds)
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

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        """What is ours of the descriptors is taken out of `fds`."""
        if "pair" in message:
            said = PairSaid.model_validate(message["pair"])
            if len(fds) != 2:
                raise ValueError("a pair has two sockets")
            client, server = (_stream_socket(fds.pop(0)) for _ in range(2))
            if not said.is_adopted and not all(map(_is_known_kind, (client, server))):
                raise ValueError("sockets that no listener of ours accepts")
            if said.spliced is None:
                self._go_on_with(said, client, server)
            else:
                self._spliced.append((said, _known(client), _known(server)))
                if self._may_splice:  # it has come late, as its worker had much to do
                    self._go_on_with_more()
        elif "session" in message:
            one = SessionSaid.model_validate(message["session"])
            if len(fds) != 1:
                raise ValueError("a session has one socket")
            sock = socket.socket(fileno=fds.pop())
            if sock.type != socket.SOCK_DGRAM:
                sock.close()
                raise ValueError("no UDP socket")
            sock.setblocking(False)
            said_by_table = table.inherited(bytes.fromhex(one.record), one.id)
            self._sessions.append(
                SessionOrphan(
                    -1,
                    one.id,
                    sock,
                    (one.client, one.client_port),
                    (one.local, one.local_port),
                    said_by_table,
                )
            )
        elif message.get("sessions") == "all":
            self._sessions_have_come()

    def _sessions_have_come(self) -> None:
        if self._datagrams.waits_for_sessions:
            sessions, self._sessions = self._sessions, []
            self.taken += self._datagrams.adoption.take_in(sessions)
            self._datagrams.sessions_have_come()

    def take_over_spliced(self, then: Callable[[], None]) -> None:
        """Our keeper has what the daemon before has spliced: go on with those pairs.

        `then` is called when all have come whose sockets were sent: what the keeper has besides
        has lost them, and gets new ones. These would be refused while the old ones are there.
        """
        self._read_all(then, _MOST_QUEUED)

    def _read_all(self, then: Callable[[], None], most: int) -> None:
        """All were sent before the other daemon said that nothing is left, and we heard it.

        Copied pairs may be in front of the last of them, and more come behind: these have turns.
        """
        ends_s = time.monotonic() + _TURN_S
        left = most
        while left and self._read():
            left -= 1
            if time.monotonic() >= ends_s:
                self._server.loop.defer(partial(self._read_on, then, left), None)
                return
        self._may_splice = True
        self._then = then
        self._go_on_with_more()

    def _read_on(self, then: Callable[[], None], most: int, _owner: None) -> None:
        self._read_all(then, most)

    def _go_on_with_more(self) -> None:
        """Ask the keeper for some of those that are left."""
        loop = self._server.loop
        if self._spliced and not self._deadline:
            self._deadline = loop.after(scaled_s(_KEEPER_S), self._lose_all)
        while self._spliced and len(self._asked) < _ASKED_AT_ONCE:
            pair = self._spliced.popleft()
            said, client, server = pair
            assert said.spliced is not None
            if said.id in self._asked or self._splice is None:
                _close(client, server)
                continue
            self._asked[said.id] = pair
            if not self._splice.take_over(
                said.spliced.index, client, server, partial(self._answered, pair)
            ):
                del self._asked[said.id]
                self._spliced.appendleft(pair)
                loop.after(_AGAIN_S, self._go_on_with_more)
                return
        if self._spliced or self._asked:
            return
        loop.cancel(self._deadline)
        self._deadline = 0
        if self._then is not None:
            then, self._then = self._then, None
            then()

    def _answered(self, pair: _SplicedPair, orphan: Orphan | None) -> None:
        said, client, server = pair
        if self._asked.get(said.id) is not pair:
            return  # it took too long
        del self._asked[said.id]
        try:
            if orphan is None or orphan.id != said.id:
                _close(client, server)  # it has ended meanwhile
            else:
                self._go_on_spliced(said, orphan)
        except Exception as error:
            self._server.log.internal_error(error)
        self._go_on_with_more()

    def _lose_all(self) -> None:
        """The keeper has not answered: nobody can speak for what is left any more.

        Its peers' next packets get a RST.
        """
        self._deadline = 0
        lost = [*self._asked.values(), *self._spliced]
        self._asked.clear()
        self._spliced.clear()
        for said, client, server in lost:
            _close(client, server)
            if self._splice is not None and said.spliced is not None:
                self._splice.forget(said.spliced.index, said.id)
        self._go_on_with_more()

    def _make(
        self, said: PairSaid, client_socket: _socket.socket, server_socket: _socket.socket
    ) -> Client:
        """The pair as a client of ours, counted and watched for nothing yet."""
        server = self._server
        state, rule = server.generation.listener_and_rule(said.listener, said.port, said.rule)
        peer = _address_of(said.peer)
        client = Client(
            server, state, client_socket, client_socket.fileno(), peer, server.loop.now_s
        )
        client.id = said.id
        client.is_shared = True  # its worker may still have it in its hands, and closes it later
        client.attach_server(server_socket, server_socket.fileno())
        client.destination = _address_of(said.destination) or UnixAddress("/")
        client.source = _address_of(said.source)
        client.route = Route(rule, client.destination, 0, None, False)
        client.accepted_s = min(said.started_s, server.loop.now_s)
        client.active_s = min(said.active_s, server.loop.now_s)
        if said.is_adopted:
            cookies = tuple(map(cookie_of, (client_socket, server_socket)))
            if server.joining.pair_with(cookies) is None:
                server.joining.know(client, cookies)
        if peer is not None and state.scopes:
            answer = server.limits.admit(peer.host, state.scopes, server.loop.now_s)
            if not isinstance(answer, Limit):  # it is no new one: it may be one too many
                client.client_keys = answer
        server.hold_server(client, said.upstream, said.server)
        for flow, one in zip((client.up, client.down), said.flows, strict=True):
            flow.read_bytes, flow.written_bytes = one.read_bytes, one.written_bytes
            flow.carried_bytes, flow.carried_packets = one.carried_bytes, one.carried_packets
            flow.pending = memoryview(base64.b64decode(one.pending)) if one.pending else None
        server.take_in(client)
        client.life = Life.JOINED
        self.taken += 1
        return client

    def _go_on_with(
        self, said: PairSaid, client_socket: _socket.socket, server_socket: _socket.socket
    ) -> None:
        """A pair that is copied: here from now on, and handed over if that pays."""
        server = self._server
        client = self._make(said, client_socket, server_socket)
        for flow, one in zip((client.up, client.down), said.flows, strict=True):
            flow.readable = not one.is_closed
            flow.blocked = flow.pending is not None
            if one.is_closed:
                flow.phase = Phase.CLOSED
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

    def _go_on_spliced(self, said: PairSaid, orphan: Orphan) -> None:
        assert self._splice is not None
        assert said.spliced is not None
        client = self._make(said, orphan.client, orphan.server)
        go_on_spliced(
            self._server,
            self._splice,
            client,
            orphan,
            left_bytes=said.spliced.left_bytes,
            is_mute=said.spliced.is_mute,
        )


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
    """The same socket, with the methods that the keeper's questions need."""
    return socket.socket(fileno=sock.detach())

"""A worker sends its pairs to a worker of the daemon that takes its daemon's place (moving.py)."""

from __future__ import annotations

import base64
import errno
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.core.address import Address
from pyforwarder.core.connection import Life, Phase
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.copying import BULK_READ_BYTES
from pyforwarder.datapath.ebpf.abi import ABI_VERSION
from pyforwarder.datapath.sockmap.exit import ExitError
from pyforwarder.worker.moving import BATCH
from pyforwarder.worker.moving_facts import audit_message, session_facts
from pyforwarder.worker.udp.endings import ENDS_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyforwarder.datapath.base import Flow
    from pyforwarder.datapath.sockmap.datapath import SockmapDatapath
    from pyforwarder.datapath.sockmap.exit import SockmapExit
    from pyforwarder.datapath.splice.datapath import SpliceDatapath
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.server import Server
    from pyforwarder.worker.udp.server import DatagramServer
    from pyforwarder.worker.udp.session import Session

# How often it is looked for those that have got a server, or can leave their sockmap by now.
_LOOK_S: Final = 0.02
# How often it is looked whether UDP listeners are of no use any more.
_LEAVE_S: Final = 0.1
# A pair stands still while it is under way, so few are at a time: memory of messages that were not
# read yet, and how often it is looked whether they were.
_MOST_UNDER_WAY_BYTES: Final = 12 * 1024
_PAUSE_S: Final = 0.002
# What lacks room: the queue of messages, descriptors under way, memory, or descriptors for long
# messages.
_NO_ROOM: Final = (
    errno.EAGAIN,
    errno.ETOOMANYREFS,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
)
_GONE: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED)


class _QueueFullError(Exception):
    """The receiver has to read first."""


class _ReceiverGoneError(Exception):
    """The receiver has closed its end."""


class PairSender:
    """Sends a worker's pairs and sessions, each when it can move, until the worker ends."""

    def __init__(
        self,
        channel: Channel,
        server: Server,
        datagrams: DatagramServer,
        splice: SpliceDatapath | None,
        sockmap: SockmapDatapath | None,
        *,
        keeps_spliced: bool = False,
    ) -> None:
        """`channel` leads to the worker that receives them, and is ours to close.

        `keeps_spliced`: the receiver's daemon cannot read the kernel's records. Spliced pairs stay
        here; UDP sessions, for which no numbers are translated, leave the kernel and are sent.
        """
        self._channel = channel
        self._keeps_spliced = keeps_spliced
        self._sockmap = sockmap
        self._exit: SockmapExit | None = None
        self._queue: deque[Client] = deque()
        self._server = server
        self._datagrams = datagrams
        self._splice = splice
        self._sessions_told = False
        # Sessions in the kernel, where these cannot go on there; and those that have left it, until
        # it is known what they have carried.
        self._to_withdraw: deque[Session] | None = None
        self._uncounted: list[Session] = []
        self._is_over = False
        # Nothing more is given to the kernel; what has been, moves or stays.
        server.handover.stop()
        datagrams.handover.settle(splice=False)
        server.loop.defer(lambda _: self._send_more(), None)
        self._leave_listeners()

    def _leave_listeners(self) -> None:
        """Close UDP listeners once no answer goes out by them.

        Pairs of TCP may stay for long. Nobody else could bind these addresses meanwhile, after an
        end of the other daemon, or once that has no such listeners any more.
        """
        if (self._sessions_told or self._is_over) and self._datagrams.is_idle:
            self._datagrams.listen_only_at(())
        else:
            self._server.loop.after(_LEAVE_S, self._leave_listeners)

    def spliced_left(self) -> int:
        """How many pairs and sessions in the kernel are not sent yet, and do not stay."""
        if self._is_over:
            return 0  # there is no receiver
        left = sum(1 for client in self._server.clients.values() if self._moves_spliced(client))
        if self._splice is not None:
            # They may be spliced in a moment; and those that are to be reset must be before that.
            left += self._splice.paused + self._splice.unsettled
        return left + (0 if self._sessions_told else 1)

    def _is_spliced(self, client: Client) -> bool:
        return client.datapath is not None and client.datapath is self._splice

    def _moves_spliced(self, client: Client) -> bool:
        return not self._keeps_spliced and self._is_spliced(client)

    def _send_more(self) -> None:
        try:
            pause_s = self._send_some()
        except _QueueFullError:
            pause_s = _PAUSE_S
        except _ReceiverGoneError:
            self._stay()
            return
        except Exception as error:
            # A fault of ours: the other pairs are sent all the same.
            self._server.log.internal_error(error)
            pause_s = _LOOK_S
        if pause_s:
            self._server.loop.after(pause_s, self._send_more)
        else:
            self._server.loop.defer(lambda _: self._send_more(), None)

    def _stay(self) -> None:
        """The receiver is gone: copied pairs end here, and spliced ones are adopted, or stay."""
        self._is_over = True
        self._channel.close()
        if self._exit is not None:
            self._exit.close()
        self._server.handover.finish()
        if self._keeps_spliced:
            return
        for client in list(self._server.clients.values()):
            if self._is_spliced(client):
                assert self._splice is not None
                self._splice.release(client)
                self._server.closing.release(client)
        for session in self._datagrams.sessions():
            if session.in_kernel is not None:
                # As long as we have its socket, no other of its addresses can be made.
                self._datagrams.release(session)

    def _send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a message, without waiting.

        Raises:
            _QueueFullError: the receiver has to read first; nothing was sent.
            _ReceiverGoneError: the receiver has closed its end.
            OSError: it is the message's own fault.
        """
        try:
            self._channel.send(message, fds, wait=False)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise _QueueFullError from error
            if error.errno in _GONE:
                raise _ReceiverGoneError from error
            raise

    def _send_some(self) -> float:
        """How long to wait before the next ones.

        Raises:
            _QueueFullError, _ReceiverGoneError: see `_send`.
        """
        if not self._sessions_told:
            if self._keeps_spliced and not self._has_withdrawn():
                return _PAUSE_S
            sessions = list(islice(self._datagrams.by_id.values(), BATCH))
            self._send_facts([one for one in sessions if one.in_kernel is not None])
            for session in sessions:
                try:
                    self._send_session(session)
                except (_QueueFullError, _ReceiverGoneError):
                    raise
                except Exception as error:
                    self._server.log.internal_error(error)
                    self._datagrams.end(session, CloseReason.INTERNAL)
            if self._datagrams.by_id:
                return 0.0
            self._send({"sessions": "all"})
            self._sessions_told = True
        if not self._queue:
            # Spliced pairs first: all wait for the last of them. Then copied ones, which can move
            # at once.
            clients = [one for one in self._server.clients.values() if self._may_move(one)]
            clients.sort(key=self._order_of)
            self._queue.extend(clients)
        for _ in range(min(BATCH, len(self._queue))):
            if self._channel.unread_bytes() > _MOST_UNDER_WAY_BYTES:
                return _PAUSE_S
            client = self._queue[0]
            try:
                if self._may_move(client) and self._is_portable(client):
                    self._send_pair(client)
            except (_QueueFullError, _ReceiverGoneError):
                raise
            except Exception as error:
                # The error costs this pair, and no other.
                self._queue.popleft()
                self._server.log.internal_error(error)
                self._fail(client)
                continue
            self._queue.popleft()
        return 0.0 if self._queue else _LOOK_S

    def _has_withdrawn(self) -> bool:
        """Whether no session is in the kernel, and it is known what each has carried there.

        Each call withdraws some of them. None comes to the kernel meanwhile.
        """
        if self._to_withdraw is None:
            self._to_withdraw = deque(
                one
                for one in self._datagrams.sessions()
                if one.in_kernel is not None or one.pending is not None
            )
        for _ in range(0, BATCH, ENDS_AT_ONCE):
            count = min(ENDS_AT_ONCE, len(self._to_withdraw))
            some = [self._to_withdraw.popleft() for _ in range(count)]
            self._datagrams.handover.withdraw([one for one in some if not one.has_ended])
            self._uncounted += some
        if self._to_withdraw:
            return False
        self._uncounted = [one for one in self._uncounted if not one.is_counted]
        return not self._uncounted

    def _send_facts(self, sessions: Sequence[Session]) -> None:
        """Send what the kernel's records do not have of its sessions.

        In one message: new clients wait until all are known there.
        """
        if not sessions:
            return
        try:
            self._send({"known": [session_facts(one) for one in sessions]})
        except (_QueueFullError, _ReceiverGoneError):
            raise
        except Exception as error:
            self._server.log.internal_error(error)  # they go by their records

    def _fail(self, client: Client) -> None:
        """A pair cannot be sent, by a fault of ours: it ends, or is adopted if it is spliced."""
        if self._is_spliced(client):
            assert self._splice is not None
            self._splice.release(client)
            self._server.closing.release(client)
        elif client.life is not Life.CLOSED:
            self._server.broken(client, CloseReason.INTERNAL)

    def _order_of(self, client: Client) -> int:
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
        return self._moves_spliced(client)

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

    def _send_pair(self, client: Client) -> None:
        spliced = None
        if self._is_spliced(client):
            assert self._splice is not None
            index, left_bytes, is_mute = self._splice.peek(client)
            spliced = {"index": index, "left_bytes": left_bytes, "is_mute": is_mute}
        if client.is_bare:
            client.settle()  # the receiver takes its sockets as they are
        listener = client.listener
        assert client.route is not None
        message: dict[str, Any] = {
            "id": client.id,
            "listener": listener.config.name,
            "port": listener.local_port,
            "rule": client.route.rule.name,
            "upstream": _upstream_of(client),
            "server": client.server_state.name if client.server_state is not None else "",
            "started_s": client.accepted_s,
            "active_s": client.active_s,
            "peer": _address_message(client.peer),
            "destination": _address_message(client.destination),
            "source": _address_message(client.source_address()),
            "is_adopted": client.is_foreign,
            "flows": [_flow_message(flow) for flow in (client.up, client.down)],
            "spliced": spliced,
            "audit": audit_message(client),
        }
        self._send({"pair": message}, [client.client_fd, client.server_fd])
        # Sent, and so the receiver's.
        if spliced is not None:
            assert self._splice is not None
            self._splice.release(client)
        self._server.closing.release(client)

    def _send_session(self, session: Session) -> None:
        server = self._datagrams
        record = b""
        if session.slot >= 0:
            record = server.records.record_of(session)
        if session.sock is None or not record or session.key[3] or session.proxy_header:
            # The session has no server yet, or does not fit: its client's next datagram begins
            # another.
            server.end(session, CloseReason.SHUTDOWN)
            return
        if session.in_kernel is not None:
            # The session goes on in the kernel, and the receiver gets it from its keeper.
            server.release(session)
            return
        server.records.count(session, now_ns=int(session.active_s * 1e9))
        record = server.records.record_of(session)
        local = session.asked_address()
        message = {
            **session_facts(session),
            "client": session.key[0],
            "client_port": session.key[1],
            "local": local.host,
            "local_port": local.port,
            "record": record.hex(),
            "layout": ABI_VERSION,
            "shown": {
                "listener": session.listener_name,
                "rule": session.route.rule.name,
                "started_s": session.accepted_s,
                "carried": [
                    [session.up_bytes, session.up_packets],
                    [session.down_bytes, session.down_packets],
                ],
            },
        }
        self._send({"session": message}, [session.sock.fileno()])
        server.release(session)


def _upstream_of(client: Client) -> str:
    """The name of the upstream that counts it; empty: none."""
    if client.server_state is None or client.route is None:
        return ""
    to = client.route.rule.to
    return to if isinstance(to, str) else ""


def _address_message(address: object) -> dict[str, str | int] | None:
    if not isinstance(address, Address):
        return None
    return {"host": address.host, "port": address.port}


def _flow_message(flow: Flow) -> dict[str, Any]:
    return {
        "is_closed": flow.phase is Phase.CLOSED,
        "pending": base64.b64encode(flow.pending or b"").decode(),
        "read_bytes": flow.read_bytes,
        "written_bytes": flow.written_bytes,
        "carried_bytes": flow.carried_bytes,
        "carried_packets": flow.carried_packets,
    }

"""Opens a pair: writes what comes before its bytes flow, to the client and to the server.

To the client an answer of its protocol, to the server a PROXY header and the first bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core import proxy_protocol
from pyforwarder.core.connection import Event, Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.loop import (
    EPOLLERR,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
)
from pyforwarder.worker.client import Client, address_of

if TYPE_CHECKING:
    from pyforwarder.worker.host import Host

_HANDOVER: Final = Life.HANDOVER
_FLUSHED: Final = Event.FLUSHED


class Opening:
    """Writes what comes before a pair's bytes flow."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = host.loop

    def flush(self, client: Client) -> None:
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
            header = _proxy_header(client, client.listener.send_proxy[route.rule.index])
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
        self.flush_pending(client)

    def flush_pending(self, client: Client) -> None:
        """Write what is `pending` before the join, now or as there is room."""
        self._flush_more(client)
        if client.life is _HANDOVER:
            self._loop.redirect(client.client_fd, self.flushing)
            self._loop.redirect(client.server_fd, self.flushing)
            self._loop.deadlines.start(
                client, client.listener.generation.config.timeouts.connect_s, self._loop.now_s
            )

    def _flush_more(self, client: Client) -> None:
        # The answer first: nothing of the server's may come before it.
        write = self._host.copying.write_pending
        done = client.down.pending is None or write(client, client.down)
        if client.life is not _HANDOVER:
            return
        done &= client.up.pending is None or write(client, client.up)
        if done:
            self._host.happen(client, _FLUSHED)

    def flushing(self, client: Client, fd: int, mask: int) -> None:
        """An event while something still has to be written before the join."""
        inward, outward = (
            (client.up, client.down) if fd == client.client_fd else (client.down, client.up)
        )
        if mask & EPOLLERR:
            side = CloseReason.CLIENT_RESET if inward is client.up else CloseReason.SERVER_RESET
            self._host.broken(client, side)
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


def _proxy_header(client: Client, form: str) -> bytes:
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

"""How a server is reached, read from a pair of sockets that a worker has connected."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.numbering import Server
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import Splice
from pyforwarder.datapath.splice.interfaces import mtu_of

if TYPE_CHECKING:
    from pyforwarder.datapath.base import PairReason


def shown_route(
    client: socket.socket,
    server: socket.socket,
    find_interfaces: Callable[[Splice], PairReason | None],
) -> tuple[Server, abi.Target] | None:
    """A server and the route to it; None: the pair could not be spliced.

    The conditions are those of splicing a pair: the handshakes were seen, with the addresses of the
    sockets. `find_interfaces` writes the interfaces into the record, or returns why there are none.

    Raises:
        OSError: a socket is no longer connected.
    """
    if not all(map(splice_sockets.is_of_our_network, (client, server))):
        return None
    ends = splice_sockets.SocketEnd.of(client), splice_sockets.SocketEnd.of(server)
    there = ends[1]
    if splice_sockets.obstacle(*ends) is not None or there.mark or there.routing:
        return None
    record = Splice()
    splice_sockets.describe(record, *ends)
    if find_interfaces(record) is not None:
        return None
    direction = record.direction[Direction.UP]
    out = record.out[Direction.DOWN]
    headers = splice_sockets.HEADERS_BYTES[there.family]
    target = abi.Target(port=direction.dport, mss=min(mtu_of(out), 0xFFFF) - headers, out=out)
    target.source[:], target.server[:] = direction.source, direction.target
    target.from_interfaces[:] = record.direction[Direction.DOWN].from_interfaces
    return Server(there.peer, direction.dport, there.family), target

"""How a server is reached, as a pair of sockets shows it that a worker has connected."""

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


def shown_way(
    client: socket.socket,
    server: socket.socket,
    find_ways: Callable[[Splice], PairReason | None],
) -> tuple[Server, abi.Target] | None:
    """A server and the way to it; None: a pair with it could not be spliced.

    By what makes a pair be spliced: packets that come from there were seen, under these addresses.
    `find_ways` writes the interfaces, or says why there are none.

    Raises:
        OSError: a socket has none of its addresses any more.
    """
    if not all(map(splice_sockets.is_of_our_network, (client, server))):
        return None
    ends = splice_sockets.End.of(client), splice_sockets.End.of(server)
    there = ends[1]
    if splice_sockets.obstacle(*ends) is not None or there.mark or there.routing:
        return None
    record = Splice()
    splice_sockets.describe(record, *ends)
    if find_ways(record) is not None:
        return None
    way = record.way[Direction.UP]
    out = record.out[Direction.DOWN]
    headers = splice_sockets.HEADERS_BYTES[there.family]
    target = abi.Target(port=way.dport, mss=min(mtu_of(out), 0xFFFF) - headers, out=out)
    target.source[:], target.server[:] = way.source, way.target
    target.by[:] = record.way[Direction.DOWN].by
    return Server(there.peer, way.dport, there.family), target

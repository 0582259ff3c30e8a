"""A pair begins to be spliced, and its sockets become mute: the keeper's part.

Addresses come from the sockets, interfaces from the kernel. If a pair cannot begin, nothing of it
is left: neither marks on its sockets nor a record.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Busy, Splice, SpliceState
from pyforwarder.datapath.splice.handshakes import Handshakes
from pyforwarder.datapath.splice.interfaces import LOOPBACK
from pyforwarder.datapath.splice.keeper_client import begins_until_s
from pyforwarder.datapath.splice.keeper_replies import Begun, Declined, JoinReply, Late, NotNow

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from pyforwarder.datapath.express.keeping import ExpressKeeper
    from pyforwarder.datapath.splice.keepalive import Keepalives
    from pyforwarder.datapath.splice.keeper_pairs import KeeperPairs
    from pyforwarder.datapath.splice.maps import SpliceMaps

# How often a pair is read again whose ISN does not match the recorded handshake.
_LOOKS: Final = 4
# The packet that the program `control` reads: the pair, and until when it may begin.
_BEGINNING: Final = struct.Struct("=14xIIQ34x")
_NEVER_NS: Final = 1 << 63  # some centuries after the start of the host
_CLOCKS_AT: Final = Splice.clocks.offset


class Joining:
    """Joining, for one keeper."""

    def __init__(self, maps: SpliceMaps, pairs: KeeperPairs, keepalives: Keepalives) -> None:
        self._maps = maps
        self._pairs = pairs
        self._keepalives = keepalives
        self._handshakes = Handshakes(maps.handshakes_fd)

    def join(
        self, worker: int, request: Mapping[str, Any], client: socket.socket, server: socket.socket
    ) -> JoinReply:
        """Splice a worker's pair of sockets; the answer says whether it has begun, or why not.

        Raises:
            OSError: a step failed. The pair has not begun, unless the step came after `control`.
        """
        try:
            ends = splice_sockets.SocketEnd.of(client), splice_sockets.SocketEnd.of(server)
        except OSError:
            # A peer has reset it; the worker will learn of that.
            return Declined(PairReason.REFUSED_BY_KERNEL)
        obstacle = splice_sockets.obstacle(*ends)
        if obstacle is not None:
            return Declined(obstacle)
        if not all(map(splice_sockets.is_of_our_network, (client, server))):
            # In a network namespace of its own a worker could give its sockets any addresses.
            return Declined(PairReason.NOT_ELIGIBLE)
        index = self._pairs.allocate()
        if index < 0:
            return Declined(PairReason.MAP_FULL)
        record = Splice()
        record.id, record.worker, record.slot = request["id"], worker, request["slot"]
        record.keep_idle_s, record.keep_interval_s, record.keep_count = request["keepalive"]
        splice_sockets.describe(record, *ends)
        try:
            try:
                obstacle = self._find_interfaces(
                    index, record, any_interface=bool(request["any_interface"])
                )
            except OSError:  # no program can be attached there; nothing has begun
                obstacle = PairReason.REFUSED_BY_KERNEL
            if obstacle is not None:
                self._pairs.give_back(index)
                return Declined(obstacle)
            # Before the peers are checked: of two forwarders, one behind the other, that join at
            # the same moment at least one sees the other's mark.
            for sock in (client, server):
                splice_sockets.mark(sock)
            for direction in Direction:
                record.direction[direction].pending = request["pending"][direction]
            record.state = SpliceState.ARMED
            self._pairs.write(index, record)
            self._pairs.owners[index] = worker
            self._pairs.remember_joined(index, (client, server))
            self._pairs.show(index, record)
            busy = self._switch(index, client, server, until_s=request["until"])
        except OSError:
            if index in self._pairs.owners:
                self._pairs.forget(index)
            else:
                self._pairs.give_back(index)
            raise
        if busy:
            self._pairs.forget(index)
            for sock in (client, server):
                splice_sockets.unmark(sock)
            if busy & Busy.LATE:
                return Late()
            if busy & Busy.FOREIGN:
                return Declined(PairReason.CHAINED)
            if busy & Busy.COARSE:
                return Declined(PairReason.SMALL_WINDOW)
            return NotNow(busy)
        self._keepalives.watch([index])
        unread = [from_peer.unread for from_peer in self._pairs.record(index).direction]
        mute = False
        # It has begun, even if this fails: muting is requested again.
        with contextlib.suppress(OSError):
            mute = self.mute(index, (client, server))
        return Begun(index, unread, mute)

    def learn(
        self,
        express: ExpressKeeper,
        client: socket.socket,
        server: socket.socket,
        *,
        has_source: bool,
    ) -> bool:
        """Tell express how the server of a pair is reached; returns whether that is of use.

        `has_source`: see `ExpressKeeper.learn`.
        """
        index = self._pairs.allocate()
        if index < 0:
            return False

        def find_interfaces(record: Splice) -> PairReason | None:
            return self._find_interfaces(index, record, any_interface=False)

        try:
            return express.learn(client, server, find_interfaces, has_source=has_source)
        finally:
            self._pairs.write(index, Splice())
            self._pairs.give_back(index)

    def _find_interfaces(
        self, index: int, record: Splice, *, any_interface: bool
    ) -> PairReason | None:
        """Write the interfaces by which packets leave and may arrive; returns why the programs
        would not see them, or None.

        They may arrive by the interface of the handshake, and by that of our route to the peer.
        """
        self._pairs.write(index, record)  # FREE: for the program `probe` alone
        handshakes = [
            self._handshakes.find(bytes(from_peer.from_)) for from_peer in record.direction
        ]
        for _ in range(_LOOKS):
            self._pairs.probe(index)
            seen = self._pairs.record(index)
            # Another connection may have had the same addresses before, and any host may have sent
            # a SYN in the peer's name: so the ISN is compared.
            came_by = [
                handshake.get(isn, 0) for handshake, isn in zip(handshakes, seen.isn, strict=True)
            ]
            # A byte that is arriving just now may be counted in one of the two numbers of which the
            # ISN is computed, and not yet in the other.
            if all(came_by) or not all(handshakes):
                break
        out = list(seen.out)
        if not all(out):
            return PairReason.REFUSED_BY_KERNEL  # a route has just changed
        for interface in out:
            if not self._maps.links.add(interface):
                is_taken = interface in self._maps.links.refusals
                return PairReason.INTERFACE_TAKEN if is_taken else PairReason.NOT_ETHERNET
        if not all(came_by):
            for interface in out:
                self._maps.links.put_back(interface)
            return PairReason.HANDSHAKE_UNSEEN
        for direction in Direction:
            stays = came_by[direction] == LOOPBACK and out[1 - direction] == LOOPBACK
            record.direction[direction].interface = 0 if stays else out[1 - direction]
            record.out[direction] = out[direction]
            if not any_interface:
                record.direction[direction].from_interfaces[:] = came_by[direction], out[direction]
        return None

    def _switch(
        self, index: int, client: socket.socket, server: socket.socket, *, until_s: float
    ) -> int:
        """Let the pair begin, soon after `until_s` at the latest; returns 0, or why not."""
        struct.pack_into(
            "=II",
            self._pairs.memory,
            index * SPLICE_BYTES + _CLOCKS_AT,
            splice_sockets.clock(client),
            splice_sockets.clock(server),
        )
        # The worker may have sent any number.
        until_ns = int(min(begins_until_s(until_s) * 1e9, _NEVER_NS))
        return bpf.run_program(self._maps.control_fd, _BEGINNING.pack(index, 0, until_ns))

    def mute(self, index: int, sockets: Sequence[socket.socket]) -> bool:
        """Make the sockets mute if they have nothing to retransmit; returns whether that was done.

        Until then closing them resets the pair, as long as a peer lacks some of the tail: this must
        happen if all our processes die.
        """
        if any(direction.tail_open for direction in self._pairs.record(index).direction):
            self._pairs.probe(index)
            if any(direction.tail_open for direction in self._pairs.record(index).direction):
                return False
        # Also the second one, if the first one is not.
        are_mute = [splice_sockets.mute(sock) for sock in sockets]
        return all(are_mute)

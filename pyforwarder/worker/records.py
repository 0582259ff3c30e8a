"""The records of a worker's connections in the pair table: written late, and when they change."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.core.connection import Life, shown_state
from pyforwarder.datapath.ebpf.abi import PairState, pack_endpoint
from pyforwarder.worker.client import address_of

if TYPE_CHECKING:
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.client import Client

# A connection shows up in the table once it is this old: most of the short ones never pay for it.
SHOW_AFTER_S: Final = 0.02
# But while many make each other slow, all would: beyond so many at a look the others are shown once
# they are that old.
_SHOWN_AT_ONCE: Final = 16
_SHOW_ALL_AFTER_S: Final = 0.1

_NO_ENDPOINT: Final = pack_endpoint(None)
_UNIX_ENDPOINT: Final = pack_endpoint(UnixAddress("/"))
_SHOWN: Final = {state.label: state for state in PairState}


def _pack_end(address: Address | None) -> bytes:
    """Pack one end of an established connection; without an address it is a unix socket."""
    return _UNIX_ENDPOINT if address is None else pack_endpoint(address)


class Records:
    """Describes connections in the worker's window of the table."""

    def __init__(self, loop: Loop, window: PairWindow) -> None:
        self._loop = loop
        self._window = window
        # Clients without a record yet, the oldest first; one that ends must leave it.
        self.unshown: dict[Client, None] = {}
        self._timer = 0

    def show_later(self, client: Client) -> None:
        """Show the connection once it has lived long enough to be looked at."""
        self.unshown[client] = None
        if not self._timer:
            self._timer = self._loop.after(SHOW_AFTER_S, self._show_unshown)

    def show(self, pair: Client) -> None:
        """Write the connection's record; it gets a slot if it has none and one is free."""
        if pair.is_bare:
            pair.settle()  # it has lived a while, or is about to be handed over
        if pair.slot < 0:
            pair.slot = self._window.allocate()
            if pair.slot < 0:
                return
            self.unshown.pop(pair, None)  # a handover does not wait for that
            for flow in (pair.up, pair.down):
                self._window.count(
                    pair.slot,
                    flow.direction,
                    max(0, flow.carried_bytes),
                    flow.carried_packets,
                    int(pair.active_s * 1e9),
                )
        state = pair.listener
        listener = state.endpoint or self._local_endpoint(pair)
        source = server = _NO_ENDPOINT
        if pair.life >= Life.HANDOVER and pair.server is not None:
            source = _pack_end(pair.source_address())
        if isinstance(pair.destination, Address | UnixAddress):
            server = pack_endpoint(pair.destination)
        self._window.describe(
            pair.slot,
            pair_id=pair.id,
            started_ns=int(pair.accepted_s * 1e9),
            endpoints=_pack_end(pair.peer) + listener + source + server,
            rule=pair.rule_name,
            listener=state.name,
            state=_SHOWN[shown_state(pair.life, pair.up.phase, pair.down.phase)],
            datapath=pair.kind,
            reason=pair.pair_reason,
        )

    @staticmethod
    def _local_endpoint(client: Client) -> bytes:
        name = client.client.getsockname()
        return _pack_end(address_of(name))

    def show_state(self, pair: Client) -> None:
        if pair.slot >= 0:
            self._window.set_state(
                pair.slot, _SHOWN[shown_state(pair.life, pair.up.phase, pair.down.phase)]
            )

    def _show_unshown(self) -> None:
        """Write the records of the connections that have lived long enough to be looked at."""
        now_s = self._loop.now_s
        due = [
            client
            for number, client in enumerate(
                itertools.takewhile(lambda c: c.accepted_s <= now_s - SHOW_AFTER_S, self.unshown)
            )
            if number < _SHOWN_AT_ONCE or client.accepted_s <= now_s - _SHOW_ALL_AFTER_S
        ]
        for client in due:
            del self.unshown[client]
            if client.slot < 0:
                self.show(client)
        self._timer = self._loop.after(SHOW_AFTER_S, self._show_unshown) if self.unshown else 0

    def release(self, client: Client) -> None:
        """Give the record back, if there is one; if not, none is made any more."""
        if client.slot < 0:
            # Now, not when its time comes: memory that is used again soon is still in the cache.
            self.unshown.pop(client, None)
        else:
            self._window.release(client.slot)
            client.slot = -1

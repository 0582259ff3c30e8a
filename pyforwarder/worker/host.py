"""The worker of a connection, as the parts know it that each do one step of its life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyforwarder.core.connection import Event
    from pyforwarder.core.reasons import CloseReason
    from pyforwarder.datapath.base import Pair
    from pyforwarder.datapath.copying import CopyDatapath
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.runtime.limits import SharedLimits
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.generation import Generation
    from pyforwarder.worker.log import ConnectionLog
    from pyforwarder.worker.records import Records


class Host(Protocol):
    """What the parts of a worker share, and the events that they report; `Server` is one."""

    loop: Loop
    generation: Generation  # the one in force
    counters: memoryview
    limits: SharedLimits
    log: ConnectionLog
    window: PairWindow
    records: Records
    copying: CopyDatapath
    clients: dict[int, Client]

    def happen(self, client: Client, event: Event) -> None:
        """Feed one event to the connection's table and obey."""
        ...

    def refuse(self, client: Client, reason: CloseReason, cause: str = "") -> None:
        """The routed client cannot be served; `cause` is for the log."""
        ...

    def broken(self, pair: Pair, reason: CloseReason) -> None:
        """The pair cannot be continued correctly."""
        ...

    def ask_supervisor(self, what: str, fds: list[int], number: int, /) -> None:
        """Send a request for what needs a privilege, without waiting for it."""
        ...

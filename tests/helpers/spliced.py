"""A forwarder on the middle one of three hosts, and pairs through it.

PYFORWARDER_TEST_DATAPATH=copy plays the same with another datapath: a test that fails there as well
is wrong itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from tests.helpers.peers import Waiting, address_text, dial_through, pattern, read_exactly
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.helpers.topology import Topology, Way

DATAPATH: Final = os.environ.get("PYFORWARDER_TEST_DATAPATH", "splice")


def config(more: str = "", *, datapath: str = DATAPATH, listener: str = "", rule: str = "") -> str:
    """A listener for each version of IP that connects to everybody whom a client names.

    No timeout is so short that lost packets alone could make it expire.
    """
    listeners = "".join(
        f"""
  - name: main{version}
    bind: "{address}"
    first_packet: {{timeout: 30s}}
    {listener}
    rules: [{{match: instruction, allow: [any]{rule}}}]"""
        for version, address in ((4, "0.0.0.0:7004"), (6, "[::]:7006"))
    )
    timeouts = "" if "timeouts:" in more else "timeouts: {connect: 30s}"
    return f"""
listeners:{listeners}
datapath: {datapath}
{timeouts}
{more}
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A topology with a forwarder in its middle."""

    topology: Topology
    forwarder: Daemon

    def via(self, way: Way, version: int) -> tuple[str, int]:
        """Where a client on that way finds the forwarder."""
        return way.listener[version], self.forwarder.listeners()[f"main{version}"][1]

    @contextlib.contextmanager
    def pair(
        self,
        way: Way,
        version: int,
        *,
        before: Callable[[socket.socket], None] = lambda _: None,
        alone: bool = False,
    ) -> Iterator[tuple[socket.socket, socket.socket]]:
        """(client, server): joined, and a few bytes have gone both ways.

        `before` is called with the listening socket of the server. `alone`: the client's port can
        be bound again (`bind_alone` in helpers/peers.py).
        """
        with contextlib.ExitStack() as stack:
            with way.server.entered():
                waiting = stack.enter_context(Waiting(way.destination[version]))
            before(waiting.listener)
            with way.client.entered():
                client = dial_through(self.via(way, version), waiting.address, alone=alone)
            stack.enter_context(client)
            server = stack.enter_context(waiting.accept())
            exchange(client, server)
            yield client, server

    @contextlib.contextmanager
    def spliced(
        self, way: Way, version: int, *, alone: bool = False
    ) -> Iterator[tuple[socket.socket, socket.socket, int]]:
        """The same with the pair's id, once the pair is on the datapath."""
        with self.pair(way, version, alone=alone) as (client, server):
            yield client, server, self.wait_until_spliced(client)["id"]

    @contextlib.contextmanager
    def configured(self, more: str) -> Iterator[None]:
        """The forwarder has this in its configuration meanwhile."""
        for text in (more, ""):
            self.forwarder.reconfigure(config(text))
            self.forwarder.control().reload()
            if text:
                yield

    def pairs(self) -> list[dict[str, Any]]:
        """The rows of `show --json`."""
        return cast("list[dict[str, Any]]", self.forwarder.control().pairs())

    def stats(self) -> dict[str, Any]:
        """What `show stats --json` says."""
        return self.forwarder.control().stats()

    def joined(self) -> int:
        """How many pairs the datapath has taken so far."""
        return int(self.stats()["joined"][DATAPATH])

    def row(self, client: socket.socket) -> dict[str, Any] | None:
        """What `show` says of a client's pair."""
        text = address_text(client.getsockname()[:2])
        return next((row for row in self.pairs() if row["client"] == text), None)

    def wait_until_spliced(self, client: socket.socket) -> dict[str, Any]:
        """What `show` says of it then."""

        def look() -> dict[str, Any] | None:
            row = self.row(client)
            return row if row and row["datapath"] == DATAPATH and row["state"] == "joined" else None

        try:
            row = wait_for(look, f"on {DATAPATH}")
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.row(client)}") from None
        assert row is not None
        assert row["reason"] == "the configuration says so"
        assert row["backlog_bytes"] == 0
        return row

    def wait_until_gone(self, pair_id: int) -> None:
        """Until `show` has no pair of that number."""
        wait_for(lambda: pair_id not in [row["id"] for row in self.pairs()], f"{pair_id} is gone")

    def wait_for_no_pairs(self) -> None:
        """Until nothing is open any more, and everything is counted as closed."""
        wait_for(lambda: self.stats()["open"] == 0, "no connection left")


def exchange(client: socket.socket, server: socket.socket, size: int = 1000) -> None:
    """The same bytes there and back."""
    for sender, receiver in ((client, server), (server, client)):
        sender.sendall(pattern(size))
        assert read_exactly(receiver, size) == pattern(size)

"""Ways from clients to servers that the kernel opens by the first packet, for tests."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express.places import Places
from pyforwarder.datapath.splice.abi import Splice, SpliceState
from tests.helpers.connections import FIRST_PORT, Kernel
from tests.helpers.express_keeper import AtOnce
from tests.helpers.peers import Waiting, bind_alone, half_close, read_exactly, read_to_end
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.express import Rules
    from tests.helpers.topology import Topology, Way

ANY: Final[Rules] = [{"match": "any", "to": "127.0.0.1:1"}]
# The kernel repeats its SYN-ACK then, and a client that has said nothing so far is a worker's.
SILENCE_S: Final = 1.0


class Site:
    """A way through the kernel, to a server that waits."""

    def __init__(
        self, kernel: Kernel, way: Way, listener: socket.socket, waiting: Waiting, source: str
    ) -> None:
        self.kernel, self.way, self.listener, self.waiting = kernel, way, listener, waiting
        self.source = source
        self.numbers: Sequence[int] = ()  # of the targets
        self.before = kernel.counts()

    def target(self, address: tuple[str, int]) -> abi.Target:
        """A server where this way's are."""
        interface = "lo" if self.way.server is self.kernel.network else "f1"
        return self.kernel.target(address, source=self.source, interface=interface)

    def dial(self, first: bytes = b"", *, alone: bool = False) -> socket.socket:
        """A client that has sent this; soon enough, as one that is silent for a second is a
        worker's.

        `alone`: its port can be bound again (`bind_alone` in helpers/peers.py).
        """
        while True:
            started_s = time.monotonic()
            with self.way.client.entered():
                address = self.listener.getsockname()[:2]
                client = socket.socket(self.listener.family)
                client.settimeout(DEADLINE_S)
                try:
                    if alone:
                        bind_alone(client)
                    client.connect(address)
                except BaseException:
                    client.close()
                    raise
            if not first:
                return client
            client.sendall(first)
            if time.monotonic() - started_s < SILENCE_S / 2:
                return client
            client.close()
            listeners = [s for s in (self.listener, self.waiting.listener) if s.fileno() >= 0]
            for listener in select.select(listeners, [], [], DEADLINE_S)[0]:
                listener.accept()[0].close()

    def accept(self, first: bytes) -> tuple[socket.socket, int]:
        """The server's end with those bytes, and the place of the pair."""
        server = self.waiting.accept()
        place = server.getpeername()[1] - FIRST_PORT
        assert place in range(self.kernel.connections.places)
        assert read_exactly(server, len(first)) == first
        return server, place

    @contextlib.contextmanager
    def pair(self, first: bytes = b"hello") -> Iterator[tuple[socket.socket, socket.socket, int]]:
        """Client and server, without a socket of ours, and the place of the pair."""
        with self.dial(first) as client:
            server, place = self.accept(first)
            with server:
                yield client, server, place

    def falls_back(self, client: socket.socket, first: bytes) -> None:
        """The listener itself gets the client with these bytes, none of them missing or doubled."""
        worker, _ = self.listener.accept()
        with worker:
            worker.settimeout(DEADLINE_S)
            assert worker.getpeername()[:2] == client.getsockname()[:2]
            assert read_exactly(worker, len(first)) == first
            worker.sendall(b"from a worker")
            assert read_exactly(client, 13) == b"from a worker"
            half_close(client)
            assert read_to_end(worker) == b""

    def nobody_was_accepted(self) -> bool:
        """Whether the listener has got no client."""
        self.listener.setblocking(False)
        try:
            self.listener.accept()[0].close()
        except BlockingIOError:
            return True
        finally:
            self.listener.settimeout(DEADLINE_S)
        return False

    def counted(self) -> dict[str, int]:
        """What has been counted since the test began, but zeros."""
        now = self.kernel.counts()
        return {name: n - self.before[name] for name, n in now.items() if n != self.before[name]}


Open = Callable[..., Site]


@contextlib.contextmanager
def opener(hosts: Topology, kernel: Kernel) -> Iterator[Open]:
    """Opens sites."""
    with contextlib.ExitStack() as stack:

        def open_site(ways: tuple[bool, bool], version: int, rules: Rules = ANY) -> Site:
            way = hosts.way(client_local=ways[0], server_local=ways[1])
            listener = stack.enter_context(kernel.listen((way.listener[version], 0)))
            with way.server.entered():
                waiting = stack.enter_context(Waiting(way.destination[version]))
            remote = {4: "10.2.0.1", 6: "fd02::1"}[version]
            source = way.destination[version] if ways[1] else remote
            site = Site(kernel, way, listener, waiting, source)
            targets = [site.target(waiting.address)] * len(rules)
            site.numbers = kernel.decide(listener, rules, targets)
            return site

        yield open_site


def leaves(here: Site) -> int:
    """How many places wait for programs that may know their connections, and are free then.

    No server is asked for.
    """
    connections, kernel = here.kernel.connections, here.kernel
    states = [word & abi.STATE_MASK for word in connections.words()]
    assert not {abi.AskState.FILLING, abi.AskState.ASKED} & set(states)
    leaving = [n for n, state in enumerate(states) if state == abi.AskState.LEAVING]
    assert [(kernel.flows_of(n), kernel.record(n).state) for n in leaving] == [(0, 0)] * len(
        leaving
    )
    now_s = time.monotonic()
    gone = connections.go_round(now_s, is_short=False)
    assert (gone.freed, gone.leaving) == (0, len(leaving))
    connections.wait_for_programs()
    gone = connections.go_round(now_s + 0.001, is_short=False, passed_ns=int(now_s * 1e9))
    assert (gone.freed, gone.leaving) == (len(leaving), 0)
    return len(leaving)


def has_ended(here: Site, place: int) -> None:
    """Both FINs have been acknowledged."""

    def look() -> bool:
        record: Splice = here.kernel.record(place)
        return record.state == SpliceState.ACTIVE and all(way.fin_acked for way in record.direction)

    wait_for(look, "both ends known")


def asked_place(here: Site) -> int:
    """Of the one connection whose server is asked for."""
    words = here.kernel.connections.words()
    (place,) = [n for n, word in enumerate(words) if word & abi.STATE_MASK == abi.AskState.ASKED]
    return place


def asked(here: Site) -> abi.Ask:
    """That connection."""
    return here.kernel.connections.ask(asked_place(here))


def looked_after(here: Site) -> Places:
    """By a keeper that has just begun."""
    kernel = here.kernel

    def record(index: int) -> Splice:
        return kernel.record(index - kernel.connections.first_splice)

    return Places(kernel.connections, record, AtOnce(kernel.connections.wait_for_programs))

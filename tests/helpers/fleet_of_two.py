"""Two machines of a fleet with a daemon each, and verified connections through one of them."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from pyforwarder.fleet.failover import stays
from pyforwarder.fleet.failover.record import Pair
from pyforwarder.fleet.layout import Keys
from tests.helpers.churn import Churn
from tests.helpers.daemon import COMMAND
from tests.helpers.etcd import Etcd, running
from tests.helpers.peers import address_text
from tests.helpers.two_machines import (
    BACK,
    FRONT,
    SERVER,
    STORE,
    Machines,
    Traffic,
    two_machines,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.record import Endpoint
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

# By the datapath of their pairs.
PORTS: Final = {"splice": 9000, "sockmap": 9001, "copy": 9002, "express": 9003}
_LAST_OF_WORKERS: Final = 60999  # the end of ip_local_port_range; express has the last ports of all


def config(
    etcd: Etcd,
    name: str,
    *,
    mover: str = "external",
    drain: str = "30s",
    express_ports: int = 0,
) -> str:
    """Of one machine: a listener for each datapath and version of IP, and a server for each.

    `express` is one of the datapaths if it has ports.
    """
    addresses = ", ".join(f"'{ip}'" for ip in (*FRONT.values(), *BACK.values()))
    listeners = "".join(
        f"- {{name: {datapath}{v}, datapath: {datapath}, bind: '{host}:{port}', "
        f"rules: [{{name: all, match: any, to: web{v}}}]}}\n"
        for datapath, port in PORTS.items()
        if datapath != "express" or express_ports
        for v, host in ((4, "0.0.0.0"), (6, "[::]"))
    )
    upstreams = "".join(
        f"  web{v}: {{servers: ['{text}:7000'], source: ['{BACK[v]}']}}\n"
        for v, text in ((4, SERVER[4]), (6, f"[{SERVER[6]}]"))
    )
    return (
        f"fleet: {{endpoints: ['{etcd.endpoint}'], name: edge, instance: {name}, "
        f"failover: {{addresses: [{addresses}], mover: {mover}}}}}\n"
        f"datapath: splice\nworkers: 2\nlog: {{level: debug}}\ntimeouts: {{drain: {drain}}}\n"
        "handover: {after_bytes: 0, after_round_trips: 0, after: 0s}\n"
        f"express: {{ports: {express_ports or 1024}}}\n"
        f"upstreams:\n{upstreams}listeners:\n{listeners}"
    )


class Fleet:
    """Both machines' daemons, and connections through them."""

    def __init__(
        self, hosts: Machines, etcd: Etcd, start: StartForwarder, traffic: Traffic
    ) -> None:
        """The caller closes `traffic`."""
        self.hosts, self.etcd, self._start, self.traffic = hosts, etcd, start, traffic
        self.daemons: dict[str, Daemon] = {}
        # Of each machine that starts; none: no listener has `datapath: express`.
        self.express_ports = 0
        with hosts.server.entered():
            self._waiting = {
                v: socket.create_server(
                    (SERVER[v], 7000),
                    family=socket.AF_INET if v == 4 else socket.AF_INET6,
                    backlog=1024,
                )
                for v in (4, 6)
            }

    def config(self, name: str, *, mover: str = "external", drain: str = "30s") -> str:
        """What a machine gets."""
        return config(self.etcd, name, mover=mover, drain=drain, express_ports=self.express_ports)

    def start(self, name: str, *, mover: str = "external", drain: str = "30s") -> Daemon:
        """The daemon of this machine; it has heard what is in the store."""
        with self.hosts.machines[name].entered():
            text = self.config(name, mover=mover, drain=drain)
            daemon = self._start(text, instance=name)
        daemon.wait_for_line("failover_store_connected")
        self.daemons[name] = daemon
        return daemon

    def command(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`pyforwarder fleet WORDS` on this machine."""
        daemon = self.daemons[name]
        verb, *more = words
        if verb == "move":
            more += ["-c", str(daemon.config_path)]
        with self.hosts.machines[name].entered():
            return subprocess.run(
                [*COMMAND, "fleet", verb, "--instance", name, *more],
                env=daemon.place.environ(),
                capture_output=True,
                text=True,
                timeout=4 * DEADLINE_S,
                check=False,
            )

    def connect(
        self, version: int, datapath: str = "splice"
    ) -> tuple[socket.socket, socket.socket]:
        """A client and its server, whose first byte has come."""
        with self.hosts.client.entered():
            client = socket.create_connection((FRONT[version], PORTS[datapath]), timeout=DEADLINE_S)
        client.sendall(b"x")
        self._waiting[version].settimeout(DEADLINE_S)
        server, _ = self._waiting[version].accept()
        server.settimeout(DEADLINE_S)
        assert server.recv(1) == b"x"
        return client, server

    def by_kernel(self, version: int) -> tuple[socket.socket, socket.socket]:
        """A client and its server, to whom the kernel has connected: it is younger than a second.

        Before it knows how the server is reached, workers do.
        """

        def opened() -> tuple[socket.socket, socket.socket] | None:
            client, server = self.connect(version, "express")
            if server.getpeername()[1] > _LAST_OF_WORKERS:
                return client, server
            client.close()
            server.close()
            return None

        found = wait_for(opened, "the kernel connects", deadline_s=4 * DEADLINE_S)
        assert found is not None
        return found

    def open_by_kernel(self, count: int, *, rate: int = 2000) -> list[int]:
        """The same for connections with traffic, as `open`; the ports that the server sees."""
        ports = []
        for n in range(count):
            client, server = self.by_kernel(6 if n % 2 else 4)
            ports.append(server.getpeername()[1])
            self.traffic.add(client, server, 0 if n % 4 == 3 else rate)
        return ports

    def datapath_of(self, name: str, client: socket.socket) -> str:
        """The one that the client's pair got at this machine; empty: none so far."""
        address = address_text(client.getsockname()[:2])
        rows = self.daemons[name].control().pairs()
        found = [row["datapath"] for row in rows if row["client"] == address]
        return found[0] if found else ""

    def open(self, name: str, count: int, *, rate: int = 2000) -> None:
        """Spliced connections, of both versions of IP in turns; every fourth is idle."""
        for n in range(count):
            client, server = self.spliced(name, 6 if n % 2 else 4)
            self.traffic.add(client, server, 0 if n % 4 == 3 else rate)

    def open_many(self, name: str, count: int, *, rate: int, every: int) -> None:
        """The same for so many that one after the other would take too long; none is idle."""
        missing = count
        while missing:
            opened = [self.connect(6 if n % 2 else 4) for n in range(missing)]
            joined = {address_text(client.getsockname()[:2]) for client, _ in opened}

            def spliced(joined: set[str] = joined) -> dict[str, str]:
                rows = self.daemons[name].control().pairs()
                found = {row["client"]: row["datapath"] for row in rows if row["client"] in joined}
                is_done = found.keys() == joined and "copy" not in found.values()
                return found if is_done else {}

            datapaths = wait_for(
                spliced, f"{missing} more have a datapath", deadline_s=4 * DEADLINE_S
            )
            for client, server in opened:
                if datapaths[address_text(client.getsockname()[:2])] == "splice":
                    self.traffic.add(client, server, rate, every=every)
                    missing -= 1
                else:
                    client.close()
                    server.close()

    def spliced(self, name: str, version: int) -> tuple[socket.socket, socket.socket]:
        """A client and a server whose pair is spliced at this machine."""
        for _ in range(20):
            client, server = self.connect(version)

            def datapath(client: socket.socket = client) -> str:
                found = self.datapath_of(name, client)
                return found if found in ("splice", "sockmap") else ""

            if wait_for(datapath, "a datapath") == "splice":
                return client, server
            # On a busy host the keeper is not waited for.
            client.close()
            server.close()
        raise AssertionError("no pair is spliced")

    def wait_until_spliced(self, name: str, count: int, *, or_more: bool = False) -> None:
        """So many pairs are, at this machine."""

        def spliced() -> int:
            return sum(row["datapath"] == "splice" for row in self.daemons[name].control().pairs())

        wait_for(
            lambda: spliced() == count or (or_more and spliced() > count),
            f"{count} are spliced at {name}",
            deadline_s=4 * DEADLINE_S,
        )

    def wait_until_held(self, name: str, count: int) -> None:
        """This machine knows of so many pairs of the other, and has none."""

        def is_held() -> bool:
            state = self.daemons[name].control().failover()
            return (state["own"], state["held"]) == (0, count)

        wait_for(is_held, f"{name} knows of {count}", deadline_s=4 * DEADLINE_S)

    def in_store(self) -> list[Pair]:
        """The pairs with which another machine can go on."""
        with self.hosts.switch.entered():
            said = self.etcd.ctl("get", "--prefix", "--print-value-only", Keys("edge").pairs)
        return [Pair.decode(line.split(" ")[3]) for line in said.split("\n") if line]

    def replicated(self) -> set[str]:
        """The clients of these."""
        clients = [pair.ends.client for pair in self.in_store()]
        return {address_text((str(ipaddress.ip_address(ip)), port)) for ip, port in clients}

    def staying(self) -> set[tuple[str, str]]:
        """Connections in the store with which no other machine could go on: peer, our end."""
        prefix = Keys("edge").stays
        with self.hosts.switch.entered():
            said = self.etcd.ctl("get", "--prefix", "--print-value-only", prefix)
        found = [one for line in said.splitlines() if line for one in stays.decode(line)]

        def text(end: Endpoint) -> str:
            return address_text((str(ipaddress.ip_address(end.ip)), end.port))

        return {(text(one.peer), text(one.own)) for one in found}

    def flush_left(self, name: str, count: int) -> None:
        """Pairs of this machine of which the store was not told in time: no other asks for them.

        Called where it has no addresses, and knows of so many pairs of the other or will.
        """
        control = self.daemons[name].control()
        wait_for(
            lambda: control.failover()["held"] == count,
            f"{name} knows of {count}",
            deadline_s=4 * DEADLINE_S,
        )
        control.flush_all()

    def wait_until_released(self, name: str, count: int) -> None:
        """So many pairs of this daemon go on elsewhere; it may have left out lines of its log."""
        control = self.daemons[name].control()

        def released() -> bool:
            closed = control.stats()["closed"]
            assert isinstance(closed, dict)
            return closed.get("moved", 0) == count

        wait_for(released, f"{name} releases {count}", deadline_s=4 * DEADLINE_S)

    def churn(self, seed: int) -> Churn:
        """Connections that begin and end meanwhile; nothing else may be opened until it is over."""

        def connect() -> socket.socket:
            with self.hosts.client.entered():
                return socket.create_connection((FRONT[4], PORTS["splice"]), timeout=1)

        return Churn(connect, self._waiting[4], seed=seed, at_once=4, think_s=4.0)

    def close(self) -> None:
        """The server's listening sockets."""
        for sock in self._waiting.values():
            sock.close()


@contextlib.contextmanager
def fleet_of_two(start: StartForwarder) -> Iterator[Fleet]:
    """Machines, store, and nothing running on the machines so far."""
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(two_machines())
        with hosts.switch.entered():
            etcd, _ = stack.enter_context(running(host=STORE))
        traffic = stack.enter_context(contextlib.closing(Traffic()))
        yield stack.enter_context(contextlib.closing(Fleet(hosts, etcd, start, traffic)))

"""`datapath: express`: connections that the kernel opens by itself, with a whole daemon around."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from pyforwarder.datapath.proof.apart import prove_express_apart, prove_splice_apart
from pyforwarder.datapath.proof.remembered import proven
from tests.helpers import transfers as judge
from tests.helpers.faults import Action
from tests.helpers.first_packets import client_hello
from tests.helpers.peers import (
    Waiting,
    address_text,
    ends_with_reset,
    half_close,
    pattern,
    read_exactly,
    read_to_end,
    reset,
)
from tests.helpers.topology import Topology, Way, topology
from tests.helpers.waiting import DEADLINE_S, stays, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.helpers.faults import Faults
    from tests.helpers.transfers import Line, Transfers
    from tests.kernel.conftest import StartForwarder

# Whether the client and the server are on the forwarder's host. From `lo` out is a worker's.
pytestmark = pytest.mark.timeout(240)

WAYS: Final = [(True, True), (False, True), (False, False)]
PORTS: Final = 64
KEEPERS_KILLED: Final = 6
TRIES: Final = 20
HELLO: Final = b"hello"
ANY: Final = """
      - {{name: rest, match: any, to: "{one}"}}
"""
WHY: Final = "the kernel has decided on its first packet"


class Site:
    """A forwarder between a client and a server, which are where `way` says."""

    def __init__(self, start: StartForwarder, way: Way, version: int, more: str = "") -> None:
        self.start, self.way, self.version, self.more = start, way, version, more
        self._opened = contextlib.ExitStack()
        self.servers: dict[str, Waiting] = {}
        self.daemon: Daemon
        self.config = ""
        self.log_level = "info"

    def serve(self, name: str) -> Waiting:
        """A server that waits."""
        with self.way.server.entered():
            found = self._opened.enter_context(Waiting(self.way.destination[self.version]))
        self.servers[name] = found
        return found

    def up(self, rules: str, *, listener: str = "", forwarder: Any) -> Daemon:
        """Start it; in `rules` a server's name in braces stands for its address."""
        names = {name: address_text(one.address) for name, one in self.servers.items()}
        host = {4: "0.0.0.0", 6: '"[::]"'}[self.version]
        bind = f'"{host.strip(chr(34))}:7000"'
        self.config = f"""
datapath: express
express: {{ports: {PORTS}}}
workers: 2
log: {{format: json, level: {self.log_level}}}
{self.more.format(**names)}
listeners:
  - name: main
    bind: {bind}
    {listener}
    rules:
{rules.format(**names)}
"""
        with forwarder.entered():
            self.daemon = self.start(self.config)
        return self.daemon

    def dial(self, first: bytes = b"") -> socket.socket:
        """A client that has sent this, right behind its handshake."""
        with self.way.client.entered():
            client = socket.create_connection(
                (self.way.listener[self.version], 7000), timeout=DEADLINE_S
            )
        if first:
            client.sendall(first)
        return client

    @contextlib.contextmanager
    def pair(
        self, first: bytes = HELLO, *, name: str = "one"
    ) -> Iterator[tuple[socket.socket, socket.socket]]:
        """A client and its server."""
        with self.dial(first) as client:
            served = self.servers[name].accept()
            with served:
                assert read_exactly(served, len(first)) == first
                yield client, served

    def learn(self, first: bytes = HELLO, *, name: str = "one") -> None:
        """Connect until the kernel does it by itself."""

        def one() -> bool:
            with self.pair(first, name=name) as (client, served):
                is_so = is_of_the_kernel(served)
                end(client, served)
                return is_so

        wait_for(one, f"the kernel connects to {name}")

    @contextlib.contextmanager
    def opened(
        self, first: bytes = HELLO, *, name: str = "one"
    ) -> Iterator[tuple[socket.socket, socket.socket]]:
        """A pair that the kernel has opened; a client that was slow is another's."""
        for _ in range(TRIES):
            with self.pair(first, name=name) as (client, served):
                if is_of_the_kernel(served):
                    yield client, served
                    return
            # The way is learned anew when routes or addresses change, which a new namespace's do.
            self.learn(first, name=name)
        raise AssertionError("the kernel opens nothing")

    def stats(self) -> dict[str, Any]:
        """The numbers of `show stats`."""
        found = self.daemon.look("stats")
        assert isinstance(found, dict)
        return found

    def row(self, client: socket.socket) -> dict[str, Any] | None:
        """What `show` says of a client."""
        name = address_text(client.getsockname()[:2])
        return next((row for row in self.daemon.look() if row["client"] == name), None)

    def line(self, client: tuple[str, int]) -> dict[str, Any]:
        """What the log says of the end of a client."""
        name = re.escape(json.dumps(address_text(client)))
        found: dict[str, Any] = json.loads(
            self.daemon.wait_for_line(f'"event": "closed".*"client": {name}')
        )
        return found

    def close(self) -> None:
        """End the servers."""
        self._opened.close()


def is_of_the_kernel(served: socket.socket) -> bool:
    """Whether it comes from a port that is kept for connections of the kernel.

    Those of a daemon that takes the place of another are in front of the other's.
    """
    return int(served.getpeername()[1]) in range(65536 - 2 * PORTS, 65536)


def exchange(client: socket.socket, served: socket.socket, size: int = 100_000) -> None:
    """So many bytes both ways, compared."""
    for sender, receiver in ((client, served), (served, client)):
        thread = threading.Thread(target=sender.sendall, args=(pattern(size),))
        thread.start()
        assert read_exactly(receiver, size) == pattern(size)
        thread.join()


def decided(site: Site, client: socket.socket) -> str | None:
    """The kernel or a worker, as `show` says of the client."""
    row = site.row(client)
    return None if row is None else str(row["decided"])


def end(client: socket.socket, served: socket.socket) -> None:
    """Both ends end it, the client first."""
    half_close(client)
    assert read_to_end(served) == b""
    half_close(served)
    assert read_to_end(client) == b""


Open = Callable[..., Site]


@pytest.fixture
def hosts() -> Iterator[Topology]:
    with topology() as made:
        yield made


@pytest.fixture
def start(hosts: Topology, start_forwarder: StartForwarder) -> Iterator[Open]:
    """Start a forwarder on the middle host, with servers of these names."""
    with contextlib.ExitStack() as stack:

        def open_site(
            ways: tuple[bool, bool] = (True, True),
            version: int = 4,
            *,
            servers: str = "one",
            rules: str = ANY,
            more: str = "",
            listener: str = "",
        ) -> Site:
            way = hosts.way(client_local=ways[0], server_local=ways[1])
            site = Site(start_forwarder, way, version, more)
            stack.callback(site.close)
            for name in servers.split():
                site.serve(name)
            site.up(rules, listener=listener, forwarder=hosts.forwarder)
            return site

        yield open_site


@pytest.fixture(scope="module", autouse=True)
def is_proven(network: None) -> None:
    """Compiled and proven once, so that no daemon has to do it within its deadline."""
    del network
    for name, prove in (("splice", prove_splice_apart), ("express", prove_express_apart)):
        proven(name, "nobody", prove, anew=False)


every_way = pytest.mark.parametrize(
    ("ways", "version"),
    [
        pytest.param(ways, version, id=f"{name}-{version}")
        for ways, name in zip(WAYS, ("lo-lo", "far-lo", "far-far"), strict=True)
        for version in (4, 6)
    ],
)


@every_way
def test_pairs_are_opened_and_counted_and_told_of(
    start: Open, ways: tuple[bool, bool], version: int
) -> None:
    """Short ones, those that last, and the first one, which shows the way to the server."""
    site = start(ways, version)
    site.learn()
    wait_for(lambda: site.stats()["open"] == 0, "all are counted")
    wait_for(lambda: site.stats()["accepted"] == sum(site.stats()["closed"].values()), "as ended")
    before = site.stats()
    with site.opened() as (client, served):
        short = client.getsockname()[:2], served.getpeername()[:2]
        exchange(client, served)
        end(client, served)
    line = site.line(short[0])
    assert (line["listener"], line["rule"], line["reason"]) == ("main", "rest", "finished")
    assert (line["datapath"], line["why"]) == ("splice", WHY)
    assert line["source"] == address_text(short[1])
    assert line["server"] == address_text(site.servers["one"].address)
    assert (line["up_bytes"], line["down_bytes"]) == (100_000 + len(HELLO), 100_000)
    assert 0 < line["age_s"] < DEADLINE_S
    with site.opened() as (client, served):
        row = wait_for(lambda: site.row(client), "it is shown")
        assert row is not None
        assert (row["state"], row["datapath"], row["reason"]) == ("joined", "splice", WHY)
        assert row["decided"] == "kernel"
        assert (row["rule"], row["up_bytes"], row["down_bytes"]) == ("rest", len(HELLO), 0)
        exchange(client, served)
        wait_for(lambda: (site.row(client) or {}).get("down_bytes") == 100_000, "counted")
        name = client.getsockname()[:2]
        end(client, served)
    line = site.line(name)
    assert (line["reason"], line["why"]) == ("finished", WHY)
    assert (line["up_bytes"], line["down_bytes"]) == (100_000 + len(HELLO), 100_000)
    after = site.stats()
    assert after["joined"]["express"] - before["joined"]["express"] >= 2
    opened = after["accepted"] - before["accepted"]
    assert after["pairs_opened"] - before["pairs_opened"] == opened
    assert after["closed"]["finished"] - before["closed"].get("finished", 0) >= 2
    (listener,) = site.daemon.look("listeners")
    assert listener["accepted"] == after["accepted"]
    (rule,) = site.daemon.look("rules")
    assert (rule["taken"], rule["decided"]) == (after["accepted"], "kernel")


# Of ways, versions and networks every two meet; all three together say nothing more.
@pytest.mark.parametrize(
    ("ways", "version", "lossy", "log_level"),
    [
        pytest.param(
            *(ways, version, lossy, level),
            id=f"{name}-{version}-{'lossy' if lossy else 'calm'}-{level}",
        )
        for number, (ways, name) in enumerate(
            zip(WAYS, ("lo-lo", "far-lo", "far-far"), strict=True)
        )
        for version, lossy, level in (
            (4, number == 1, ("info", "warning")[number % 2]),
            (6, number != 1, ("warning", "info")[number % 2]),
        )
    ],
)
def test_every_byte_and_every_end_of_many(
    hosts: Topology,
    start_forwarder: StartForwarder,
    transfers: Transfers,
    bad_network: Faults,
    ways: tuple[bool, bool],
    version: int,
    log_level: str,
    *,
    lossy: bool,
) -> None:
    """More at once than there are ports, so that some are a worker's; short ones and longer ones.

    Nothing is doubled, lost or out of order, whether a worker or the kernel has opened them, and
    all are counted, whether they have lines in the log or not.
    """
    way = hosts.way(client_local=ways[0], server_local=ways[1])
    site = Site(start_forwarder, way, version)
    site.log_level = log_level
    with contextlib.closing(site), transfers.server(way.server) as server:
        to = address_text((way.destination[version], server.port))
        site.up(f'      - {{{{match: any, to: "{to}"}}}}', forwarder=hosts.forwarder)
        listener = (way.listener[version], 7000)
        many, seed = (600, 1) if lossy else (3000, 2)

        def run(count: int, first: int) -> list[Line]:
            with transfers.clients(
                way.client,
                count,
                to=listener,
                via=None,
                seed=seed + version,
                largest=50_000,
                parallel=100,
                first=first,
                # Of thousands one may lose four of its SYN and their answers in a row: 15 s.
                stall=20_000,
            ) as running:
                return running.wait()

        clients: list[Line] = []
        # The kernel has to see how the server is reached.
        while not site.stats()["joined"]["express"]:
            clients += run(1, len(clients))
        with contextlib.ExitStack() as stack:
            if lossy:
                stack.enter_context(bad_network.put_on(*way.doors))
                bad_network.set(seed=seed, lose=0.02, duplicate=0.01, delay=0.01)
            clients += run(many, len(clients))
            # Routes that are still being made have the way learned anew, once in a second at most.
            while site.stats()["joined"]["express"] < PORTS and len(clients) < 4 * many:
                clients += run(many, len(clients))
        count = len(clients)
        servers = server.wait()
        bad = judge.faults(count, clients, servers)
        assert not bad, f"{len(bad)} faults\n" + "\n".join(bad[:20])
        wait_for(lambda: site.stats()["pairs_opened"] >= count, "all are counted")
        wait_for(lambda: site.stats()["open"] == 0, "all have ended")
        stats = site.stats()
        assert stats["pairs_opened"] == count
        # Where the packet is lost by which our own stack is to forget a handshake, a worker gets a
        # socket besides the pair: it hears nothing but the client's reset. One in fifty is lost, by
        # chance some more than that.
        besides = stats["accepted"] - count
        assert 0 <= besides <= (count // 20 if lossy else 0)
        closed = {reason: n for reason, n in stats["closed"].items() if n}
        assert closed.pop("finished") == count
        assert closed == ({"client_reset": besides} if besides else {})
        assert (stats["bytes_up"], stats["bytes_down"]) == judge.totals(clients)
        assert stats["joined"]["express"] >= PORTS, stats["express_left"]
        assert stats["joined"]["express"] + stats["joined"]["copy"] == count
        (listener_row,), (rule_row,) = site.daemon.look("listeners"), site.daemon.look("rules")
        assert listener_row["accepted"] == rule_row["taken"] + besides == stats["accepted"]


@pytest.mark.parametrize("log_level", ["info", "warning"])
def test_keepers_that_are_killed_lose_no_end_and_double_none(
    hosts: Topology, start_forwarder: StartForwarder, transfers: Transfers, log_level: str
) -> None:
    """At any moment, again and again, while places are used over and over."""
    way = hosts.way()
    site = Site(start_forwarder, way, 4)
    site.log_level = log_level
    with contextlib.closing(site), transfers.server(way.server) as server:
        to = address_text((way.destination[4], server.port))
        site.up(f'      - {{{{match: any, to: "{to}"}}}}', forwarder=hosts.forwarder)
        clients: list[Line] = []

        def begin(count: int) -> contextlib.AbstractContextManager[Any]:
            return transfers.clients(
                way.client,
                count,
                to=(way.listener[4], 7000),
                via=None,
                seed=11,
                largest=2_000,
                parallel=24,
                first=len(clients),
            )

        while not site.stats()["joined"]["express"]:
            with begin(1) as running:
                clients += running.wait()
        over = threading.Event()
        killed = 0

        def kill() -> None:
            nonlocal killed
            moments = random.Random(5)
            # A keeper that dies often is started ever later.
            while not over.wait(moments.uniform(0.5, 1.5)) and killed < KEEPERS_KILLED:
                for child in psutil.Process(site.daemon.process.pid).children():
                    if child.uids().real == 0:
                        child.kill()
                        killed += 1

        with ThreadPoolExecutor(1) as pool:
            killing = pool.submit(kill)
            try:
                while not killing.done():
                    with begin(500) as running:
                        clients += running.wait()
            finally:
                over.set()
            killing.result()
        bad = judge.faults(len(clients), clients, server.wait())
        assert not bad, f"{len(bad)} faults\n" + "\n".join(bad[:20])
        wait_for(lambda: site.stats()["pairs_opened"] >= len(clients), "all are counted")
        wait_for(lambda: site.stats()["open"] == 0, "all have ended")
        stats = site.stats()
        assert killed >= KEEPERS_KILLED
        assert stats["accepted"] == stats["closed"]["finished"] == len(clients)
        assert (stats["bytes_up"], stats["bytes_down"]) == judge.totals(clients)
        assert stats["joined"]["express"] >= PORTS, stats["express_left"]


@pytest.mark.parametrize("level", ["info", "warning"])
def test_reloads_under_many_connections(
    hosts: Topology, start_forwarder: StartForwarder, transfers: Transfers, level: str
) -> None:
    """Other rules again and again, and none of the kernel's in between: nobody notices.

    Nor where the log wants to know of their ends now, and now not.
    """
    way = hosts.way()
    site = Site(start_forwarder, way, 4)
    site.log_level = level
    with contextlib.closing(site), transfers.server(way.server) as server:
        to = address_text((way.destination[4], server.port))
        site.up(f'      - {{{{match: any, to: "{to}"}}}}', forwarder=hosts.forwarder)
        only = f'      - {{match: any, to: "{to}"}}\n'
        others = (
            only + f'      - {{match: ssh, to: "{to}"}}\n',
            only.replace("match: any", "name: other, match: any"),
            only.replace("match: any", "datapath: auto, match: any"),
            only,
        )
        listener = (way.listener[4], 7000)
        clients: list[Line] = []

        def begin(count: int) -> contextlib.AbstractContextManager[Any]:
            return transfers.clients(
                way.client,
                count,
                to=listener,
                via=None,
                seed=7,
                largest=50_000,
                parallel=100,
                first=len(clients),
            )

        while not site.stats()["joined"]["express"]:
            with begin(1) as running:
                clients += running.wait()
        over = threading.Event()

        def reload() -> int:
            for number in itertools.count():
                rules = others[number % len(others)]
                config = site.config.replace(only.rstrip("\n"), rules.rstrip("\n"))
                if number % 3 == 1:
                    config = config.replace("level: warning", "level: info")
                site.daemon.reconfigure(config)
                assert site.daemon.command("reload").returncode == 0
                if over.is_set():
                    break
            return number

        with ThreadPoolExecutor(1) as pool:
            reloading = pool.submit(reload)
            try:
                with begin(8000) as running:
                    clients += running.wait()
            finally:
                over.set()
            assert reloading.result() >= len(others)
        bad = judge.faults(len(clients), clients, server.wait())
        assert not bad, f"{len(bad)} faults\n" + "\n".join(bad[:20])
        wait_for(lambda: site.stats()["pairs_opened"] >= len(clients), "all are counted")
        wait_for(lambda: site.stats()["open"] == 0, "all have ended")
        stats = site.stats()
        assert stats["accepted"] == stats["closed"]["finished"] == len(clients)
        assert (stats["bytes_up"], stats["bytes_down"]) == judge.totals(clients)
        assert stats["joined"]["express"] >= PORTS, stats["express_left"]


@pytest.mark.parametrize("who", [0, 1])
def test_a_reset_goes_to_the_other_end_and_is_its_reason(start: Open, who: int) -> None:
    site = start((False, False))
    site.learn()
    with site.opened() as ends:
        name = ends[0].getsockname()[:2]
        reset(ends[who])
        assert ends_with_reset(ends[1 - who]) == b""
    assert site.line(name)["reason"] == ("client_reset", "server_reset")[who]


def test_a_client_that_waits_for_the_server_is_a_worker_s(start: Open) -> None:
    """Its connection is the listener's once it was silent for a second."""
    site = start((False, False))
    site.learn()
    with site.dial() as client:
        served = site.servers["one"].accept()
        with served:
            assert not is_of_the_kernel(served)
            wait_for(lambda: decided(site, client) == "user", "it is shown")
            served.sendall(b"welcome")
            assert read_exactly(client, 7) == b"welcome"
            exchange(client, served)
            end(client, served)
    wait_for(lambda: site.stats()["express_left"].get("silent") == 1, "it is counted")


def test_a_server_that_is_gone_is_left_to_workers(start: Open) -> None:
    """They say no as they do always, and know of it again when it is back."""
    site = start((False, False))
    site.learn()
    address = site.servers["one"].address
    site.servers["one"].listener.close()
    for _ in range(3):
        with site.dial(HELLO) as client:
            assert ends_with_reset(client) == b""
            assert site.line(client.getsockname()[:2])["reason"] == "refused"
    with site.way.server.entered():
        site.servers["one"] = Waiting(*address)
    with contextlib.closing(site.servers["one"].listener):
        site.learn()


def http(host: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"


def test_rules_choose_by_name_and_what_they_cannot_tell_is_a_worker_s(start: Open) -> None:
    rules = """
      - {{name: sni, match: {{tls: {{sni: ["a.example.com", "*.example.org"]}}}}, to: "{one}"}}
      - {{name: host, match: {{http: {{host: example.com}}}}, to: "{two}"}}
      - {{name: long, match: {{http: {{path: "/x/*"}}}}, to: "{one}"}}
      - {{name: rest, match: any, to: "{two}"}}
"""
    site = start((False, False), servers="one two", rules=rules)
    sure = [
        (client_hello(b"a.example.com"), "one", "sni", "a.example.com"),
        (client_hello(b"b.example.org"), "one", "sni", "b.example.org"),
        (http(b"example.com"), "two", "host", "example.com"),
    ]
    for first, name, rule, read in sure:
        site.learn(first, name=name)
        for is_adopted in (False, True):
            with site.opened(first, name=name) as (client, served):
                if is_adopted:
                    wait_for(lambda one=client: site.row(one), "it is shown")  # type: ignore[misc]
                address = client.getsockname()[:2]
                end(client, served)
            line = site.line(address)
            assert (line["rule"], line[rule]) == (rule, read)
    # That pairs last is nothing to tell an operator.
    assert '"adopted"' not in site.daemon.output()
    for first in (http(b"example.net"), client_hello(b"example.com")):
        with site.pair(first, name="two") as (client, served):
            assert not is_of_the_kernel(served)
            address = client.getsockname()[:2]
            end(client, served)
        assert site.line(address)["rule"] == "rest"
    decided = {row["rule"]: row["decided"] for row in site.daemon.look("rules")}
    assert decided == {"sni": "kernel", "host": "kernel", "long": "user", "rest": "user"}
    why = {row["rule"]: row["why"] for row in site.daemon.look("rules")}
    assert why == {
        "sni": "",
        "host": "",
        "long": "userspace alone compares `path` and `header`",
        "rest": "userspace decides the rule long in front of it",
    }
    wait_for(lambda: site.stats()["express_left"].get("undecided", 0) >= 2, "they are counted")


def test_a_reload_changes_rules_and_no_pair(start: Open, hosts: Topology) -> None:
    site = start((False, False), servers="one two")
    site.learn()
    with site.opened() as (client, served):
        names = {name: address_text(one.address) for name, one in site.servers.items()}
        site.daemon.reconfigure(site.config.replace(names["one"], names["two"]))
        assert site.daemon.command("reload").returncode == 0
        with site.pair(name="two") as (other, other_served):
            exchange(other, other_served)
            end(other, other_served)
        site.learn(name="two")
        exchange(client, served)
        address = client.getsockname()[:2]
        end(client, served)
    assert site.line(address)["server"] == names["one"]
    # Without the word nothing is the kernel's any more.
    site.daemon.reconfigure(
        site.daemon.config_path.read_text().replace(  # type: ignore[union-attr]
            "datapath: express", "datapath: auto"
        )
    )
    assert site.daemon.command("reload").returncode == 0
    for _ in range(3):
        with site.pair(name="two") as (client, served):
            assert not is_of_the_kernel(served)
            end(client, served)
    assert site.daemon.look("rules")[0]["decided"] == "user"


def test_a_drained_server_gets_nothing_new(start: Open) -> None:
    rules = """
      - {{name: rest, match: any, to: up}}
"""
    more = 'upstreams: {{up: {{servers: ["{one}"]}}}}'
    site = start((False, False), rules=rules, more=more)
    site.learn()
    name = f"up/{address_text(site.servers['one'].address)}"
    with site.opened() as (client, served):
        assert site.daemon.command("server", name, "drain").returncode == 0
        for _ in range(3):
            with site.dial(HELLO) as refused:
                assert ends_with_reset(refused) == b""
        exchange(client, served)
        assert site.daemon.command("server", name, "ready").returncode == 0
        site.learn()
        # What the kernel has opened is counted once it is told of.
        wait_for(lambda: site.daemon.look("upstreams")[0]["connects"] >= 3, "they are counted")
        end(client, served)


def test_ports_that_run_out_leave_clients_to_workers(start: Open) -> None:
    site = start((False, False))
    site.learn()
    with contextlib.ExitStack() as stack:
        kinds = []
        for _ in range(PORTS + 8):
            client, served = stack.enter_context(site.pair())
            kinds.append(is_of_the_kernel(served))
            exchange(client, served, 10)
        assert PORTS // 2 < kinds.count(True) <= PORTS
        assert not all(kinds)
        wait_for(lambda: len(site.daemon.look()) == PORTS + 8, "all are shown")
        assert site.stats()["pairs_open"] == PORTS + 8

        def said() -> bool:
            stats = site.stats()
            ports = stats["express"]
            # Some of the first ones are kept for a second after their end.
            return bool(
                ports["ports"] == PORTS
                and PORTS // 2 < ports["ports_used"] <= ports["ports_most"] <= PORTS
                and stats["express_left"].get("no_port")
            )

        wait_for(said, "the ports are counted")


def test_no_other_program_gets_its_ports(start: Open, hosts: Topology) -> None:
    site = start((False, False))
    site.learn()
    with hosts.forwarder.entered():
        for port in (65536 - PORTS, 65535):
            for family, host in ((socket.AF_INET, "10.2.0.1"), (socket.AF_INET6, "fd02::1")):
                with socket.socket(family) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    with pytest.raises(OSError, match="in use"):
                        sock.bind((host, port))


def test_flush_and_idle_end_what_the_kernel_has_opened(start: Open) -> None:
    site = start((False, False), more="timeouts: {{idle: 3s}}")
    site.learn()
    with site.opened() as (client, served):
        row = wait_for(lambda: site.row(client), "it is shown")
        assert row is not None
        site.daemon.control().flush([row["id"]])  # a command may take as long as it may be idle
        assert ends_with_reset(client) == ends_with_reset(served) == b""
        assert site.line(client.getsockname()[:2])["reason"] == "flushed"
    with site.opened() as (client, served):
        assert ends_with_reset(client) == ends_with_reset(served) == b""
        assert site.line(client.getsockname()[:2])["reason"] == "idle"


def test_a_half_closed_pair_goes_on_and_has_its_own_deadline(start: Open) -> None:
    site = start((False, False), more="timeouts: {{half_closed: 2s, idle: 1h}}")
    site.learn()
    for is_closed_at_once in (True, False):
        with site.opened() as (client, served):
            if not is_closed_at_once:
                wait_for(lambda client=client: site.row(client), "it is shown")  # type: ignore[misc]
            half_close(client)
            assert read_to_end(served) == b""
            for number in range(5):
                served.sendall(pattern(10_000, start=number))
                assert read_exactly(client, 10_000) == pattern(10_000, start=number)
            assert ends_with_reset(client) == b""
            assert site.line(client.getsockname()[:2])["reason"] == "half_closed"


def test_a_pair_that_carries_bytes_is_not_idle_and_another_is(start: Open) -> None:
    site = start((False, False), more="timeouts: {{idle: 2s}}")
    site.learn()
    with site.opened() as (busy, busy_served), site.opened() as (client, served):

        def chat() -> bool:
            busy.sendall(b"x")
            return read_exactly(busy_served, 1) == b"x"

        begun_s = time.monotonic()
        client.setblocking(False)

        def is_gone() -> bool:
            chat()
            try:
                assert client.recv(1), "a clean end of file"
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True
            raise AssertionError("bytes")

        wait_for(is_gone, "the idle pair is reset")
        assert time.monotonic() - begun_s >= 2
        assert ends_with_reset(served) == b""
        assert site.line(client.getsockname()[:2])["reason"] == "idle"
        stays(chat, "the other works", for_s=2.5)
        name = busy.getsockname()[:2]
        end(busy, busy_served)
    assert site.line(name)["reason"] == "finished"


def test_a_worker_and_the_keeper_may_die(start: Open) -> None:
    site = start((False, False))
    site.learn()
    with site.opened() as (client, served), site.opened() as (young, young_served):
        wait_for(lambda: site.row(client), "it is shown")
        for worker in site.daemon.workers()[:2]:
            worker.kill()
        exchange(young, young_served)
        site.daemon.wait_for_line("worker_died", count=2)
        wait_for(lambda: site.row(client) and site.row(young), "they are shown again")
        assert decided(site, client) == decided(site, young) == "kernel"
        keepers = [
            child
            for child in psutil.Process(site.daemon.process.pid).children()
            if child.uids().real == 0
        ]
        for keeper in keepers:
            keeper.kill()
        exchange(client, served)
        site.daemon.wait_for_line("splice_keeper_died")
        site.learn()
        for one, other in ((client, served), (young, young_served)):
            exchange(one, other)
            address = one.getsockname()[:2]
            end(one, other)
            line = site.line(address)
            assert (line["reason"], line["rule"]) == ("finished", "rest")
            assert line["up_bytes"] % 100_000 == len(HELLO)


def test_one_that_lasts_is_a_workers_although_our_own_stack_was_not_told(
    start: Open, bad_network: Faults
) -> None:
    """The packet by which it forgets a handshake may be lost in a full queue of this host."""
    site = start((False, False))
    site.learn()
    with bad_network.put_on(site.way.doors[1]):
        bad_network.set(marked=True, exact={1: Action.LOSE})
        with site.opened() as (client, served):
            wait_for(lambda: site.row(client), "it is shown")
            assert bad_network.counts()["lost"] == 1
            exchange(client, served)
            name = client.getsockname()[:2]
            end(client, served)
    assert site.line(name)["reason"] == "finished"


@pytest.mark.parametrize("who", ["keeper", "daemon"])
def test_death_while_a_server_is_asked(
    start: Open, hosts: Topology, bad_network: Faults, who: str
) -> None:
    """The next keeper goes on with it. Without a daemon it is no pair yet: the client is reset."""
    site = start((False, False))
    site.learn()
    with bad_network.put_on((site.way.server, "s0")):
        bad_network.set(lose=1.0)
        client = site.dial(HELLO)
        with client:
            wait_for(lambda: bad_network.counts()["lost"], "its server was asked")
            if who == "daemon":
                site.daemon.kill()
                wait_for(lambda: not site.daemon.place.processes(), "all of it has ended")
            else:
                for child in psutil.Process(site.daemon.process.pid).children():
                    if child.uids().real == 0:
                        child.kill()
                site.daemon.wait_for_line("splice_keeper_died")
            bad_network.set()
            if who == "daemon":
                assert ends_with_reset(client) == b""
                site.up(ANY, forwarder=hosts.forwarder)
            else:
                served = site.servers["one"].accept()
                with served:
                    assert read_exactly(served, len(HELLO)) == HELLO
                    wait_for(lambda: site.row(client), "it is shown")
                    exchange(client, served)
                    name = client.getsockname()[:2]
                    end(client, served)
                assert site.line(name)["reason"] == "finished"
    assert site.servers["one"].nobody_came()
    site.learn()
    wait_for(lambda: not site.daemon.look(), "nothing is left")


def test_the_daemon_may_die_and_the_next_one_goes_on(start: Open, hosts: Topology) -> None:
    site = start((False, False))
    site.learn()
    with site.opened() as (client, served), site.opened() as (young, young_served):
        wait_for(lambda: site.row(client), "it is shown")
        # The other may not be known to a worker yet.
        site.daemon.kill()
        wait_for(lambda: not site.daemon.place.processes(), "all of it has ended")
        for one, other in ((client, served), (young, young_served)):
            exchange(one, other)
        site.up(ANY, forwarder=hosts.forwarder)
        for one in (client, young):
            wait_for(lambda one=one: site.row(one), "it is shown")  # type: ignore[misc]
            assert decided(site, one) == "kernel"
        site.learn()
        for one, other in ((client, served), (young, young_served)):
            exchange(one, other)
            address = one.getsockname()[:2]
            end(one, other)
            assert site.line(address)["reason"] == "finished"


@pytest.mark.parametrize("is_now", [False, True])
def test_down_waits_for_young_pairs_or_resets_them(start: Open, *, is_now: bool) -> None:
    site = start((False, False))
    site.learn()
    with site.opened() as (client, served), site.dial() as silent:
        down = threading.Thread(
            target=site.daemon.command, args=("down", *(["--now"] if is_now else []))
        )
        down.start()
        if is_now:
            assert ends_with_reset(client) == ends_with_reset(served) == b""
            assert site.line(client.getsockname()[:2])["reason"] == "shutdown"
        else:
            # A client that had connected, and not spoken yet, is served as well.
            silent_served = site.servers["one"].accept()
            with silent_served:
                assert not is_of_the_kernel(silent_served)
                end(silent, silent_served)
            exchange(client, served)
            address = client.getsockname()[:2]
            end(client, served)
            assert site.line(address)["reason"] == "finished"
        down.join()
        assert site.daemon.wait() == 0


def test_an_upgrade_takes_them_along(start: Open, hosts: Topology) -> None:
    site = start((False, False))
    site.learn()
    with site.opened() as (client, served), site.opened() as (young, young_served):
        wait_for(lambda: site.row(client), "it is shown")
        with hosts.forwarder.entered():
            done = site.daemon.command("upgrade", deadline_s=3 * DEADLINE_S)
        assert done.returncode == 0, done.stderr
        for one, other in ((client, served), (young, young_served)):
            exchange(one, other)
        for one in (client, young):
            wait_for(lambda one=one: site.row(one), "it is shown")  # type: ignore[misc]
            assert decided(site, one) == "kernel"
        site.learn()
        for one, other in ((client, served), (young, young_served)):
            exchange(one, other)
            end(one, other)
    wait_for(lambda: not site.daemon.look(), "nothing is left")
    assert site.daemon.command("down", "--now").returncode == 0
    wait_for(lambda: not site.daemon.place.processes(), "all have ended")

"""The kernel chooses among the servers of an upstream, with a whole daemon around."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import pytest

from pyforwarder.config import parse_config
from pyforwarder.core.upstreams import Balancer
from pyforwarder.datapath.proof.apart import prove_express_apart, prove_splice_apart
from pyforwarder.datapath.proof.remembered import proven
from pyforwarder.runtime import tables
from tests.helpers.netns import blackhole
from tests.helpers.peers import Server, address_text, half_close, read_to_end, unused_port
from tests.helpers.samples import scrape, value
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

pytestmark = pytest.mark.timeout(240)

PORTS: Final = 256
LISTENER: Final = ("127.0.0.1", 7000)
HELLO: Final = b"hello"


class Named(Server):
    """Says its name and its client's (kernel or worker), behind what the client has sent."""

    def __init__(self, name: str, host: str, port: int) -> None:
        super().__init__(name, host, port)
        self.sources: dict[bool, set[str]] = {False: set(), True: set()}  # of workers; the kernel

    def serve(self, sock: socket.socket) -> None:
        source, port = sock.getpeername()
        by_kernel = port >= 65536 - PORTS
        self.sources[by_kernel].add(source)
        read_to_end(sock)
        sock.sendall(f"{self.name} {'kernel' if by_kernel else 'worker'}".encode())
        sock.shutdown(socket.SHUT_WR)


def ask(source: str = "127.0.0.1") -> tuple[str, str]:
    """The server that a client gets, and if kernel or worker connected; nobody: it was refused."""
    with socket.create_connection(LISTENER, timeout=DEADLINE_S, source_address=(source, 0)) as sock:
        try:
            sock.sendall(HELLO)
            half_close(sock)
            name, _, who = read_to_end(sock).decode().partition(" ")
        except ConnectionError:
            return "", ""
    return name, who


class Site:
    """A forwarder and its servers, all on `lo`."""

    def __init__(self, start: StartForwarder) -> None:
        self._start = start
        self._opened = contextlib.ExitStack()
        self._open: dict[str, contextlib.ExitStack] = {}
        self.servers: dict[str, tuple[str, int]] = {}
        self.named: dict[str, Named] = {}
        self.top: dict[str, object] = {}  # what else the configuration says
        self.daemon: Daemon

    def serve(self, name: str) -> None:
        """A server; the same address again after `end`."""
        _, port = self.servers.get(name, ("", 0))
        server = self.named[name] = Named(name, "127.0.0.1", port)
        stack = self._opened.enter_context(contextlib.ExitStack())
        stack.enter_context(server)
        self._open[name] = stack
        self.servers[name] = server.address

    def end(self, name: str) -> None:
        """It refuses from here on."""
        self._open.pop(name).close()

    def config(self, servers: Sequence[str | dict[str, object]], **more: object) -> str:
        """An upstream of these servers, by name or as the configuration has them."""
        listed = [
            {"address": self.text(one)}
            if isinstance(one, str)
            else {**one, "address": self.text(str(one["address"]))}
            for one in servers
        ]
        return json.dumps(
            {
                "datapath": "express",
                "express": {"ports": PORTS},
                "workers": 2,
                **self.top,
                "upstreams": {"up": {"servers": listed, **more}},
                "listeners": [
                    {
                        "name": "main",
                        "bind": address_text(LISTENER),
                        "rules": [{"match": "any", "to": "up"}],
                    }
                ],
            }
        )

    def text(self, name: str) -> str:
        return address_text(self.servers[name])

    def up(self, servers: Sequence[str | dict[str, object]], **more: object) -> None:
        """Start it."""
        self.daemon = self._start(self.config(servers, **more))

    def reload(self, servers: Sequence[str | dict[str, object]], **more: object) -> None:
        """It has these from here on."""
        self.daemon.reconfigure(self.config(servers, **more))
        self.daemon.control().reload()

    def learn(self, *names: str, sources: Sequence[str] = ("127.0.0.1",)) -> None:
        """Connect until the kernel does, to each of these."""
        known: set[str] = set()

        def one() -> bool:
            for source in sources:
                name, who = ask(source)
                if who == "kernel":
                    known.add(name)
            return known >= set(names)

        wait_for(one, f"the kernel connects to {names}")

    def by_kernel(self, count: int) -> list[str]:
        """The servers of so many clients that the kernel has connected; no worker gets any."""
        found = [ask() for _ in range(count)]
        assert {who for _, who in found} == {"kernel"}, found
        return [name for name, _ in found]

    def row(self, name: str) -> dict[str, Any]:
        """What `show upstreams` says of a server."""
        rows = self.daemon.look("upstreams")
        return next(row for row in rows if row["server"] == self.text(name))

    def stats(self) -> dict[str, Any]:
        """The numbers of `show stats`."""
        found = self.daemon.look("stats")
        assert isinstance(found, dict)
        return found

    def state(self, name: str) -> object:
        return self.row(name)["state"]

    def close(self) -> None:
        self._opened.close()


Open = Callable[..., Site]


@pytest.fixture(scope="module", autouse=True)
def is_proven(network: None) -> None:
    """Compiled and proven once, so that no daemon has to do it within its deadline."""
    del network
    for name, prove in (("splice", prove_splice_apart), ("express", prove_express_apart)):
        proven(name, "nobody", prove, anew=False)


@pytest.fixture
def site(start_forwarder: StartForwarder) -> Iterator[Site]:
    site = Site(start_forwarder)
    for name in ("one", "two", "three"):
        site.serve(name)
    yield site
    site.close()


ALL: Final = ("one", "two", "three")


def test_each_in_turn_and_counted(site: Site) -> None:
    site.up(ALL)
    site.learn(*ALL)
    before = {name: site.row(name)["connects"] for name in ALL}
    found = site.by_kernel(30)
    assert Counter(found) == dict.fromkeys(ALL, 10)
    assert found[:3] * 10 == found
    wait_for(
        lambda: all(site.row(name)["connects"] >= before[name] + 10 for name in ALL),
        "all are counted",
    )
    (rule,) = site.daemon.look("rules")
    assert rule["decided"] == "kernel"


def test_weights(site: Site) -> None:
    site.up([{"address": "one", "weight": 3}, "two", {"address": "three", "weight": 0}])
    site.learn("one", "two")
    assert Counter(site.by_kernel(40)) == {"one": 30, "two": 10}


def test_a_client_keeps_its_server(site: Site) -> None:
    settings = parse_config(site.config(ALL, balance="source_hash"), source="test").upstreams["up"]
    balancer = Balancer(settings)
    names = {site.text(name): name for name in ALL}
    sources = [f"127.0.0.{n}" for n in range(1, 31)]
    wanted = {}
    for source in sources:
        chosen = balancer.choose(source, 0.0)
        assert chosen is not None
        wanted[source] = names[chosen.name]
    site.up(ALL, balance="source_hash")
    site.learn(*ALL, sources=sources)
    for source in sources:
        assert ask(source) == (wanted[source], "kernel")


def test_a_server_that_refuses_is_ejected_and_no_client_notices(site: Site) -> None:
    site.up(ALL, eject={"failures": 1, "for": "5m"})
    site.learn(*ALL)
    site.end("two")

    def is_ejected() -> bool:
        name, _ = ask()
        assert name in ("one", "three")
        return site.state("two") == "ejected"

    wait_for(is_ejected, "it is ejected")
    wait_for(lambda: ask()[1] == ask()[1] == ask()[1] == "kernel", "the kernel has heard of it")
    assert Counter(site.by_kernel(20)) == {"one": 10, "three": 10}
    assert site.row("two")["failures"] >= 1


def test_connects_of_the_kernel_that_fail_are_counted_once(site: Site) -> None:
    """Beside those of the workers that serve these clients, and to the server that refused."""
    port = unused_port()
    site.top["metrics"] = {"bind": f"127.0.0.1:{port}"}
    site.up(ALL, eject={"failures": 0})
    site.learn(*ALL)
    assert site.stats()["connect_failed"] == 0
    site.end("two")
    for _ in range(6):
        assert ask()[0] in ("one", "three")

    def is_counted() -> bool:
        stats, failures = site.stats(), site.row("two")["failures"]
        in_kernel = stats["express_left"].get("refused", 0)
        assert in_kernel <= 6
        return bool(stats["connect_failed"] == failures >= in_kernel >= 1)

    wait_for(is_counted, "all are counted")
    stats = site.stats()
    text = site.daemon.place.bpffs.joinpath("default", "stats").read_text()
    assert tables.stats_from_text(text)["connect_failed"] == stats["connect_failed"]
    samples = scrape(port)
    named = {"upstream": "up", "server": site.text("two")}
    of_kernel = value(samples, "server_failures_total", cause="express", **named)
    of_workers = value(samples, "server_failures_total", cause="refused", **named)
    assert of_kernel == stats["express_left"]["refused"]
    assert value(samples, "connects_failed_total") == of_kernel + of_workers
    assert stats["connect_failed"] == of_kernel + of_workers
    # The server's numbers are kept while nobody leads to it.
    site.reload(("one", "three"), eject={"failures": 0})
    assert site.stats()["connect_failed"] == stats["connect_failed"]


def test_a_server_that_is_back_after_its_rest_gets_its_share(site: Site) -> None:
    site.up(ALL, eject={"failures": 1, "for": "2s"})
    site.learn(*ALL)
    site.end("two")
    wait_for(lambda: ask()[0] in ALL and site.state("two") == "ejected", "it is ejected")
    site.serve("two")
    site.learn("two")
    wait_for(lambda: sorted(ask()[0] for _ in range(3)) == sorted(ALL), "each has its turn")


def test_a_server_that_does_not_answer_is_ejected_after_the_connect_timeout(site: Site) -> None:
    site.up(ALL, eject={"failures": 1, "for": "5m"}, connect_timeout="1s")
    site.learn(*ALL)
    site.end("two")
    with blackhole("127.0.0.1", site.servers["two"][1]):
        for _ in range(3):
            name, _who = ask()
            assert name in ("one", "three")
        wait_for(lambda: ask()[0] and site.state("two") == "ejected", "it is ejected")
        wait_for(lambda: ask()[1] == ask()[1] == ask()[1] == "kernel", "the kernel has heard of it")
        assert Counter(site.by_kernel(20)) == {"one": 10, "three": 10}


def test_a_server_that_health_checks_find_down_gets_nothing_until_it_is_up(site: Site) -> None:
    checks = {"interval": "200ms", "rise": 1, "fall": 1}
    site.up(ALL, health=checks, eject={"failures": 0})
    site.learn(*ALL)
    site.end("two")
    wait_for(lambda: site.state("two") == "down", "it is down")
    assert Counter(site.by_kernel(20)) == {"one": 10, "three": 10}
    site.serve("two")
    wait_for(lambda: site.state("two") == "up", "it is up")
    site.learn("two")
    assert Counter(site.by_kernel(30)) == dict.fromkeys(ALL, 10)


def test_a_drained_server_gets_nothing_from_that_moment_on(site: Site) -> None:
    site.up(ALL)
    site.learn(*ALL)
    control = site.daemon.control()
    for _ in range(5):
        control.set_server(f"up/{site.text('one')}", "drain")
        assert Counter(site.by_kernel(6)) == {"two": 3, "three": 3}
        control.set_server(f"up/{site.text('one')}", "ready")
        assert Counter(site.by_kernel(6)) == dict.fromkeys(ALL, 2)


def test_a_reload_changes_servers_and_weights_at_once(site: Site) -> None:
    site.up(("one", "two"))
    site.learn("one", "two")
    site.reload(ALL)
    site.learn("three")
    assert Counter(site.by_kernel(30)) == dict.fromkeys(ALL, 10)
    site.reload([{"address": "one", "weight": 4}, "three"])
    assert Counter(site.by_kernel(20)) == {"one": 16, "three": 4}
    site.reload(("two",))
    assert site.by_kernel(10) == ["two"] * 10
    site.reload(ALL, balance="least_pairs")
    assert {who for _, who in (ask() for _ in range(10))} == {"worker"}
    (rule,) = site.daemon.look("rules")
    assert rule["decided"] == "user"


def test_a_backup_has_its_turn_when_nobody_else_is_left(site: Site) -> None:
    site.up(["one", {"address": "two", "backup": True}, {"address": "three", "backup": True}])
    site.learn("one")
    assert site.by_kernel(5) == ["one"] * 5
    site.daemon.control().set_server(f"up/{site.text('one')}", "drain")
    site.learn("two", "three")
    assert Counter(site.by_kernel(10)) == {"two": 5, "three": 5}


def test_where_no_server_is_left_the_ordinary_path_decides(site: Site) -> None:
    site.up(("one", "two"), eject={"failures": 1, "for": "5m"})
    site.learn("one", "two")
    control = site.daemon.control()
    for name in ("one", "two"):
        control.set_server(f"up/{site.text(name)}", "drain")
    for _ in range(5):
        assert ask() == ("", "")
    control.set_server(f"up/{site.text('one')}", "ready")
    assert site.by_kernel(5) == ["one"] * 5
    # Ejected, and alone: a worker tries it all the same.
    site.end("one")
    wait_for(lambda: ask() == ("", "") and site.state("one") == "ejected", "it is ejected")
    site.serve("one")
    wait_for(lambda: ask()[0] == "one", "a worker has tried")


def test_a_server_with_a_name_leaves_all_to_workers(site: Site) -> None:
    site.servers["name"] = ("localhost", site.servers["one"][1])
    site.up(("name", "two"))
    assert {who for _, who in (ask() for _ in range(10))} == {"worker"}


def test_a_server_is_asked_from_the_source_that_its_upstream_names(site: Site) -> None:
    """And from no other, though another upstream has the same server without one."""
    own, plain = "127.0.0.9", "127.0.0.1"
    site.up(("one", "two"), source=[own, "::1"])
    site.learn("one", "two")
    assert Counter(site.by_kernel(10)) == {"one": 5, "two": 5}
    for name in ("one", "two"):
        assert site.named[name].sources == {False: {own}, True: {own}}
    (rule,) = site.daemon.look("rules")
    assert (rule["decided"], rule["why"]) == ("kernel", "")
    # Without a source they are others: nothing is known of them yet, and they are found anew.
    site.reload(("one", "two"))
    assert ask()[1] == "worker"
    site.learn("one", "two")
    assert site.named["one"].sources == {False: {own, plain}, True: {own, plain}}
    # Back within the time for which the first ones keep their numbers: from there alone.
    for name in ("one", "two"):
        site.named[name].sources = {False: set(), True: set()}
    site.reload(("one", "two"), source=[own])
    site.learn("one", "two")
    assert site.named["one"].sources[True] == site.named["two"].sources[True] == {own}
    site.reload(("one", "two"), source=[own, "127.0.0.8"])
    assert {who for _, who in (ask() for _ in range(4))} == {"worker"}
    (rule,) = site.daemon.look("rules")
    assert rule["decided"] == "user"
    assert rule["why"].endswith("userspace alone chooses among several addresses of `source`")


def ip(command: str) -> None:
    """`ip COMMAND` in the module's network."""
    subprocess.run(["ip", *command.split()], check=True)


def test_a_source_that_goes_is_left_to_workers_at_once_and_is_the_kernels_when_it_is_back(
    site: Site,
) -> None:
    own = "10.99.0.1"
    ip(f"address add {own}/32 dev lo")
    try:
        site.up(("one",), source=[own])
        site.learn("one")
        assert site.by_kernel(5) == ["one"] * 5
        for number in range(3):
            ip(f"address del {own}/32 dev lo")
            # As soon as the keeper has heard of it; not one that began later is the kernel's.
            wait_for(lambda: ask() == ("", ""), "a worker has no address to connect from")
            assert {ask() for _ in range(5)} == {("", "")}

            def is_said() -> bool:
                (rule,) = site.daemon.look("rules")
                why = f"{own}, its upstream's `source`, is not this host's now"
                return (rule["decided"], rule["why"]) == ("user", why)

            wait_for(is_said, "it is said")
            ip(f"address add {own}/32 dev lo")
            site.learn("one")
            (rule,) = site.daemon.look("rules")
            assert (rule["decided"], rule["why"]) == ("kernel", ""), number
    finally:
        ip(f"address del {own}/32 dev lo")

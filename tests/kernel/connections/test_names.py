"""Names with a real name server: one that is silent, addresses that are, and those who suffer."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.nameserver import DnsServer, asking_it, dns_server
from tests.helpers.netns import Network, private_network
from tests.helpers.peers import (
    NameServer,
    address_text,
    dial,
    read_exactly,
    read_to_end,
    reset,
)
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

# Nobody answers there: what is sent is for no host at the other end of the wire.
SILENT4 = [f"198.51.100.{number}" for number in range(2, 62)]
SILENT6 = "2001:db8:51::2"


@pytest.fixture
def net() -> Iterator[Network]:
    """A namespace of this test with networks where nobody answers."""
    with private_network() as network:
        network.ip(
            "link add d0 type veth peer name d1",
            "addr add 198.51.100.1/24 dev d0",
            "addr add 2001:db8:51::1/64 dev d0 nodad",
            "link set d0 arp off up",
            "link set d1 up",
        )
        yield network


@pytest.fixture
def names(net: Network) -> Iterator[DnsServer]:
    """The name server of that namespace."""
    del net
    with dns_server(
        {
            "good.example": ["127.0.0.1"],
            "short.in-search.example": ["127.0.0.1"],
            "dual.example": [SILENT6, "127.0.0.1"],
            "many.example": SILENT4,
            "mixed.example": ["127.0.0.1", *SILENT4],
        }
    ) as server:
        yield server


def config(*, allow: str = "[loopback]", upstream: str = "", more: str = "") -> str:
    return (
        "datapath: copy\nworkers: 1\n"
        "listeners:\n"
        "  - name: open\n    bind: 127.0.0.1:0\n"
        f"    rules: [{{match: instruction, allow: {allow}}}]\n"
        "  - name: web\n    bind: 127.0.0.1:0\n"
        f"    rules: [{{match: any, to: {(upstream and 'web') or '127.0.0.1:1'}}}]\n"
        + (f"upstreams: {{web: {upstream}}}\n" if upstream else "")
        + more
    )


def dial_from(host: str, address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=30.0, source_address=(host, 0))


def ask(forwarder: Daemon, name: str, *, host: str = "127.0.0.1") -> bytes:
    """What somebody at `host` is told who names this server, up to the size of an answer."""
    with dial_from(host, forwarder.listeners()["open"]) as sock:
        sock.sendall(instruction(name))
        sock.shutdown(socket.SHUT_WR)
        return read_to_end(sock)


def served(forwarder: Daemon) -> str:
    with dial(forwarder.listeners()["web"]) as sock:
        return read_to_end(sock).decode()


def opened(net: Network) -> int:
    return net.counters()["TcpActiveOpens"]


def test_names_of_one_client_that_nobody_answers_stop_nobody_else(
    start_forwarder: StartForwarder, names: DnsServer, tmp_path: Path
) -> None:
    with NameServer("server") as server:
        good = f"good.example:{server.address[1]}"
        upstream = f"{{servers: ['{good}'], resolve_every: 50ms}}"
        forwarder = start_forwarder(config(upstream=upstream), prefix=asking_it(tmp_path))
        assert served(forwarder) == "server"
        attackers = []
        started_s = time.monotonic()
        for number in range(400):
            sock = dial_from("127.0.0.66", forwarder.listeners()["open"])
            sock.sendall(instruction(f"x{number}.silent.example:80"))
            sock.close()
            attackers.append(sock)
        for number in range(10):
            assert served(forwarder) == "server"
            assert ask(forwarder, good, host="127.0.0.7") == ACK + b"server"
            name = f"nobody{number}.example:80"
            assert ask(forwarder, name, host="127.0.0.8") == refusal("unresolved")
        # None of them waited for one that is not answered.
        assert time.monotonic() - started_s < scaled_s(15.0)
        stats = forwarder.show("stats")
        assert stats["names_refused"] >= 200
        assert len({name for name in names.asked if name.startswith("x")}) <= 2 * 32 + 5
        wait_for(lambda: forwarder.look("stats")["open"] == 0, "the attackers' end")
        # The client that did it is served again, too.
        assert ask(forwarder, good, host="127.0.0.66") == ACK + b"server"


def test_an_upstream_keeps_its_addresses_while_the_name_server_is_silent(
    start_forwarder: StartForwarder, names: DnsServer, tmp_path: Path
) -> None:
    with NameServer("server") as server:
        upstream = (
            f"{{servers: ['good.example:{server.address[1]}'], resolve_every: 50ms, "
            "health: {interval: 100ms, timeout: 80ms, fall: 2}}"
        )
        forwarder = start_forwarder(config(upstream=upstream), prefix=asking_it(tmp_path))
        assert served(forwarder) == "server"
        # The worker has asked for both families, and the process that checks, which asks by itself,
        # has had an answer: it asks again.
        wait_for(lambda: len(names.asked) >= 8, "several checks")
        names.is_silent = True
        asked = len(names.asked)
        for _ in range(5):
            wait_for(lambda: len(names.asked) > asked, "another question")
            assert served(forwarder) == "server"
        assert [row["state"] for row in forwarder.show("upstreams")] == ["up"]
        assert [row["failures"] for row in forwarder.show("upstreams")] == [0]


def test_a_name_is_never_asked_for_if_all_addresses_are_denied(
    start_forwarder: StartForwarder, names: DnsServer, tmp_path: Path
) -> None:
    forwarder = start_forwarder(
        config(allow="['127.0.0.0/8:80,8000-8010', 'private:443']"), prefix=asking_it(tmp_path)
    )
    for port in (79, 81, 7999, 8011, 444):
        assert ask(forwarder, f"good.example:{port}") == refusal("denied")
    assert names.asked == []
    assert ask(forwarder, "nobody.example:443") == refusal("unresolved")
    assert set(names.asked) == {"nobody.example", "nobody.example.in-search.example"}


@pytest.mark.parametrize("nsswitch", ["files dns", "files nis dns"])
def test_names_of_hosts_and_search_domains_are_known(
    start_forwarder: StartForwarder, names: DnsServer, tmp_path: Path, nsswitch: str
) -> None:
    with NameServer("server") as server:
        forwarder = start_forwarder(
            config(allow="[127.0.0.1, '[::1]']"), prefix=asking_it(tmp_path, nsswitch=nsswitch)
        )
        for name in ("from-hosts.example", "localhost", "short", "good.example", "GOOD.example."):
            assert ask(forwarder, f"{name}:{server.address[1]}") == ACK + b"server", name
        # One that has another address as well does not give it to those that share the first.
        assert ask(forwarder, f"two.hosts.example:{server.address[1]}") == refusal("denied")
        assert "from-hosts.example" not in names.asked
        assert "two.hosts.example" not in names.asked
        assert "localhost" not in names.asked


def test_a_name_server_that_comes_with_a_new_resolv_conf_is_asked(
    start_forwarder: StartForwarder, net: Network, names: DnsServer, tmp_path: Path
) -> None:
    del net
    prefix = asking_it(tmp_path)
    resolv_conf = tmp_path / "resolv.conf"
    right = resolv_conf.read_text()
    resolv_conf.write_text("nameserver 127.0.0.99\n")
    with NameServer("server") as server:
        forwarder = start_forwarder(config(), prefix=prefix)
        good = f"good.example:{server.address[1]}"
        assert ask(forwarder, good) == refusal("unresolved")
        assert names.asked == []
        resolv_conf.write_text(right)
        wait_for(lambda: ask(forwarder, good) == ACK + b"server", "the new name server")


def test_a_name_with_many_silent_addresses_costs_few_connections_and_one_deadline(
    start_forwarder: StartForwarder, net: Network, names: DnsServer, tmp_path: Path
) -> None:
    forwarder = start_forwarder(
        config(allow="[any]", more="timeouts: {connect: 2s}\n"), prefix=asking_it(tmp_path)
    )
    before = opened(net)
    started_s = time.monotonic()
    assert ask(forwarder, "many.example:80") == refusal("timeout")
    took_s = time.monotonic() - started_s
    assert took_s >= 1.9
    assert opened(net) - before == 1 + 6
    # It ends with its client, too.
    fds = forwarder.open_fds()
    sock = dial(forwarder.listeners()["open"])
    sock.sendall(instruction("many.example:80"))
    forwarder.wait_for_pair(lambda row: row["state"] == "connecting", "a connecting pair")
    reset(sock)
    forwarder.wait_for_no_pairs()
    forwarder.wait_for_no_more_fds(fds)
    assert names.asked.count("many.example") == 2  # A and AAAA


def test_one_address_that_is_not_allowed_denies_the_name_however_many_there_are(
    start_forwarder: StartForwarder, net: Network, names: DnsServer, tmp_path: Path
) -> None:
    del names
    forwarder = start_forwarder(config(), prefix=asking_it(tmp_path))
    before = opened(net)
    assert ask(forwarder, "mixed.example:80") == refusal("denied")
    assert opened(net) - before == 1


@pytest.mark.parametrize("by_client", [True, False])
def test_a_silent_address_is_passed_over_and_remembered(
    start_forwarder: StartForwarder,
    net: Network,
    names: DnsServer,
    tmp_path: Path,
    by_client: bool,
) -> None:
    del names
    with NameServer("server") as server:
        to = f"dual.example:{server.address[1]}"
        forwarder = start_forwarder(
            config(allow="[any]", upstream=f"{{servers: ['{to}'], connect_timeout: 20s}}"),
            prefix=asking_it(tmp_path),
        )

        def get() -> bytes:
            return ask(forwarder, to) if by_client else served(forwarder).encode()

        expected = (ACK if by_client else b"") + b"server"
        before = opened(net)
        assert get() == expected
        assert opened(net) - before == 1 + 2  # the client's, and one to each address
        for _ in range(5):
            before = opened(net)
            assert get() == expected
            assert opened(net) - before == 1 + 1


def test_a_server_is_up_if_any_of_its_addresses_is(
    start_forwarder: StartForwarder, net: Network, names: DnsServer, tmp_path: Path
) -> None:
    del net
    with NameServer("server") as server:
        port = server.address[1]
        upstream = (
            f"{{servers: ['dual.example:{port}', 'many.example:{port}'], connect_timeout: 200ms, "
            "health: {interval: 200ms, timeout: 400ms, rise: 1, fall: 1}}"
        )
        forwarder = start_forwarder(config(upstream=upstream), prefix=asking_it(tmp_path))

        def states() -> dict[str, str]:
            return {row["server"]: row["state"] for row in forwarder.look("upstreams")}

        wait_for(lambda: states()[f"many.example:{port}"] == "down", "the silent server down")
        assert states()[f"dual.example:{port}"] == "up"
        assert [served(forwarder) for _ in range(5)] == ["server"] * 5
        names.hosts["many.example"] = [SILENT4[0], "127.0.0.1"]
    assert address_text(server.address)


def test_bytes_of_both_sides_survive_a_race(
    start_forwarder: StartForwarder, net: Network, names: DnsServer, tmp_path: Path
) -> None:
    """A server that speaks first, a client that does not wait: nothing is lost or doubled."""
    del net, names
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(30.0)
        forwarder = start_forwarder(config(allow="[any]"), prefix=asking_it(tmp_path))
        with dial(forwarder.listeners()["open"]) as sock:
            sock.sendall(instruction(f"dual.example:{listening.getsockname()[1]}") + b"a" * 9000)
            sock.sendall(b"b" * 9000)
            peer, _ = listening.accept()
            with peer:
                peer.settimeout(30.0)
                peer.sendall(b"hello")
                assert read_exactly(sock, len(ACK) + 5) == ACK + b"hello"
                assert read_exactly(peer, 18000) == b"a" * 9000 + b"b" * 9000
                sock.shutdown(socket.SHUT_WR)
                assert peer.recv(1) == b""
                peer.sendall(b"bye")
            assert read_to_end(sock) == b"bye"


def test_senders_of_datagrams_have_bounds_of_their_own(
    start_forwarder: StartForwarder, net: Network, names: DnsServer, tmp_path: Path
) -> None:
    """Their addresses may be anybody's: what they ask for is not counted against their owners."""
    del net, names
    with NameServer("server") as server, contextlib.ExitStack() as stack:
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(30.0)
        text = config() + (
            "  - name: datagrams\n    bind: 127.0.0.1:0\n    protocol: udp\n"
            "    rules: [{match: instruction, allow: [loopback]}]\n"
        )
        forwarder = start_forwarder(text, prefix=asking_it(tmp_path))
        to = forwarder.listeners()["datagrams"]
        for number in range(60):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind(("127.0.0.7", 0))
            sock.sendto(instruction(f"x{number}.silent.example:80"), to)
        wait_for(lambda: forwarder.look("stats")["names_refused"] == 60 - 32, "28 refusals")
        good = f"good.example:{server.address[1]}"
        assert ask(forwarder, good, host="127.0.0.7") == ACK + b"server"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(30.0)
            sock.connect(to)
            sock.send(instruction(f"good.example:{udp.getsockname()[1]}") + b"hello")
            assert sock.recv(100) == ACK
            data, source = udp.recvfrom(100)
            assert data == b"hello"
            udp.sendto(b"bye", source)
            assert sock.recv(100) == b"bye"

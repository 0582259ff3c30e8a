"""Listeners on many addresses, of both families, on links, and on sockets of systemd."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.helpers.netns import private_network
from tests.helpers.peers import NameServer, address_text, dial, read_to_end, unused_port

if TYPE_CHECKING:
    from tests.helpers.netns import Network
    from tests.kernel.conftest import StartForwarder

DATAPATH = "datapath: copy\nlog: {level: warning}\n"

# Opens what follows as systemd would: NAME=ADDRESS ..., then `--` and the command.
ACTIVATE = """
import os, socket, sys
end = sys.argv.index("--")
socks, names = [], []
for word in sys.argv[1:end]:
    name, kind, host, port, v6only = word.split(",")
    family = socket.AF_UNIX if host.startswith("/") else (
        socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock = socket.socket(family, getattr(socket, kind))
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
    sock.bind(host if family == socket.AF_UNIX else (host, int(port)))
    if kind == "SOCK_STREAM":
        sock.listen(16)
    socks.append(os.dup2(os.dup(sock.detach()), 100 + len(socks)))
    names.append(name)
for number, fd in enumerate(socks):
    os.dup2(fd, 3 + number, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(socks)),
                  LISTEN_FDNAMES=":".join(names))
os.execv(sys.argv[end + 1], sys.argv[end + 1:])
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with private_network() as network:
        yield network


def activated(*sockets: str) -> list[str]:
    return [sys.executable, "-c", ACTIVATE, *sockets, "--"]


def said_by(address: tuple[str, int] | str) -> bytes:
    with contextlib.closing(dial(address)) as client:
        return read_to_end(client)


def run_of_ports(host: str, count: int) -> int:
    """The first of so many ports in a row that are free now."""
    while True:
        first = unused_port(host)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server((host, port)))
            return first


def test_each_port_of_a_range_leads_to_the_same_port_of_the_server(
    network: Network, start_forwarder: StartForwarder
) -> None:
    first = run_of_ports("127.0.0.1", 3)
    with contextlib.ExitStack() as stack:
        for port in range(first, first + 3):
            stack.enter_context(NameServer(f"server {port}", "127.0.0.2", port))
        forwarder = start_forwarder(
            "listeners:\n"
            f'- {{bind: ["127.0.0.1:{first}-{first + 1}", "127.0.0.1:{first + 2}"],'
            "   rules: [{match: any, to: servers}]}\n"
            "upstreams: {servers: {servers: [127.0.0.2:same]}}\n" + DATAPATH
        )
        assert f"listening on 127.0.0.1:{first}-{first + 2} (main)" in forwarder.output()
        for port in range(first, first + 3):
            assert said_by(("127.0.0.1", port)) == b"server %d" % port
        (row,) = forwarder.show("listeners")
        assert (row["bind"], row["accepted"]) == (f"127.0.0.1:{first}-{first + 2}", 3)
        (server,) = forwarder.show("upstreams")
        assert (server["server"], server["connects"]) == ("127.0.0.2:same", 3)


def test_dual_stack_listener_takes_both_families(
    network: Network, start_forwarder: StartForwarder
) -> None:
    with NameServer("web") as server:
        to = address_text(server.address)
        forwarder = start_forwarder(
            'listeners: [{bind: "[::]:0", dual_stack: true, '
            f'rules: [{{match: any, to: "{to}"}}]}}]\n' + DATAPATH
        )
        port = forwarder.address[1]
        with contextlib.closing(dial(("127.0.0.1", port))) as client:
            pair = forwarder.wait_for_pair(lambda row: row["server"] == to)
            # An IPv4 client is one, in every word of ours.
            assert pair["client"] == address_text(client.getsockname())
            assert pair["listener"] == f"127.0.0.1:{port}"
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == b"web"
        assert said_by(("::1", port)) == b"web"
        assert forwarder.show("listeners")[0]["bind"] == f"[::]:{port},0.0.0.0:{port}"


def test_addresses_on_a_link_are_bound_and_connected_to(
    network: Network, start_forwarder: StartForwarder
) -> None:
    network.run("ip", "link", "add", "one", "type", "veth", "peer", "other")
    for name in ("one", "other"):
        network.run("ip", "link", "set", name, "up")
    for host in ("fe80::1", "fe80::2"):
        network.run("ip", "address", "add", f"{host}/64", "dev", "one", "nodad")
    with contextlib.closing(socket.socket(socket.AF_INET6)) as listening:
        scope = socket.if_nametoindex("one")
        listening.bind(("fe80::2", 0, 0, scope))
        listening.listen()
        to = f"[fe80::2%one]:{listening.getsockname()[1]}"
        forwarder = start_forwarder(
            f'listeners: [{{bind: "[fe80::1%one]:0", rules: [{{match: any, to: "{to}"}}]}}]\n'
            + DATAPATH
        )
        port = forwarder.address[1]
        assert f"listening on [fe80::1%one]:{port} (main)" in forwarder.output()
        with contextlib.closing(socket.socket(socket.AF_INET6)) as client:
            client.settimeout(10)
            client.connect(("fe80::1", port, 0, scope))
            listening.settimeout(10)
            server, _ = listening.accept()
            with contextlib.closing(server):
                server.sendall(b"on the link")
                server.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == b"on the link"


def test_sockets_of_systemd_are_served_and_survive_a_reload_without_them(
    network: Network, start_forwarder: StartForwarder
) -> None:
    port, datagrams = unused_port(), unused_port()
    with NameServer("web") as server:
        rules = f"rules: [{{match: any, to: '{address_text(server.address)}'}}]"
        config = (
            "listeners:\n"
            f"- {{name: web, bind: [systemd:web, '127.0.0.3:{port}'], {rules}}}\n"
            f"- {{name: udp, bind: systemd:dns, protocol: udp, {rules}}}\n" + DATAPATH
        )
        forwarder = start_forwarder(
            config,
            prefix=activated(
                f"web,SOCK_STREAM,127.0.0.1,{port},0",
                f"dns,SOCK_DGRAM,127.0.0.1,{datagrams},0",
                f"web,SOCK_STREAM,::1,{port},1",
            ),
        )
        binds = {row["name"]: row["bind"] for row in forwarder.show("listeners")}
        assert binds == {
            "web": f"127.0.0.1:{port},[::1]:{port},127.0.0.3:{port}",
            "udp": f"127.0.0.1:{datagrams}",
        }
        for host in ("127.0.0.1", "::1", "127.0.0.3"):
            assert said_by((host, port)) == b"web"
        forwarder.reconfigure(f"listeners: [{{bind: '127.0.0.3:{port}', {rules}}}]\n" + DATAPATH)
        assert forwarder.command("reload").returncode == 0
        with contextlib.closing(dial(("127.0.0.1", port))) as waits:
            forwarder.reconfigure(config)
            assert forwarder.command("reload").returncode == 0
            assert read_to_end(waits) == b"web"

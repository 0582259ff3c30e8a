"""Servers that see the client's own address, and the routes that this takes.

One namespace is the client's. The other is the forwarder's and the server's: what the server sends
to the client's address must come to the forwarder's socket instead of going there, which a rule for
the server's port does, as README says.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.socket_options import TRANSPARENT
from pyforwarder.supervisor.messages import Ask
from pyforwarder.supervisor.workers.process import grant
from tests.helpers.netns import private_network
from tests.helpers.peers import Waiting, address_text, read_exactly
from tests.helpers.sessions import datagram_socket

if TYPE_CHECKING:
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

NETWORKS = {
    4: ("192.0.2.1", "192.0.2.2", "24", "0.0.0.0/0"),
    6: ("2001:db8::1", "2001:db8::2", "64", "::/0"),
}


def ip(*words: str, namespace_pid: int | None = None) -> None:
    inside = ["nsenter", "-t", str(namespace_pid), "-n"] if namespace_pid else []
    subprocess.run([*inside, "ip", *words], check=True)


@contextlib.contextmanager
def client_namespace(version: int) -> Iterator[int]:
    """A namespace joined to this one by a cable; the pid of a process in it."""
    here, there, length, _ = NETWORKS[version]
    options = ["nodad"] if version == 6 else []
    keeper = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "echo; exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"\n"  # it is in its namespace
        ip(
            "link",
            "add",
            "cable",
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            str(keeper.pid),
        )
        for address, pid in ((here, None), (there, keeper.pid)):
            ip("addr", "add", f"{address}/{length}", "dev", "cable", *options, namespace_pid=pid)
            ip("link", "set", "cable", "up", namespace_pid=pid)
        yield keeper.pid
    finally:
        keeper.communicate()


@pytest.fixture
def alone() -> Iterator[None]:
    """A namespace of this test: it changes routes."""
    with private_network():
        yield


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("datapath", ["copy", "sockmap"])
def test_the_server_sees_the_clients_own_address(
    version: int, datapath: str, start_forwarder: StartForwarder
) -> None:
    here, there, _, everywhere = NETWORKS[version]
    with client_namespace(version) as client_pid, Waiting(here) as server:
        family = f"-{version}"
        port = str(server.address[1])
        ip(
            family, "rule", "add", "ipproto", "6", "sport", port, "lookup", "100"
        )  # TCP; a bare container knows no names
        ip(family, "route", "add", "local", everywhere, "dev", "lo", "table", "100")
        bind = address_text((here, 9999))
        forwarder = start_forwarder(
            f"listeners: [{{bind: '{bind}', datapath: {datapath},"
            " rules: [{match: any, to: web}]}]\n"
            f"upstreams: {{web: {{servers: ['{address_text(server.address)}'],"
            " transparent: true}}\n"
        )
        client = subprocess.Popen(
            ["nsenter", "-t", str(client_pid), "-n", "socat", "-", f"TCP:{bind}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert client.stdin is not None
        assert client.stdout is not None
        with server.accept() as served:
            assert peer_of(served) == there
            client.stdin.write(b"up" * 50_000)
            client.stdin.flush()
            assert read_exactly(served, 100_000) == b"up" * 50_000
            served.sendall(b"down")
            assert client.stdout.read(4) == b"down"
            row = forwarder.wait_for_pair(lambda row: row["down_bytes"] == 4)
            assert row["source"].rpartition(":")[0].strip("[]") == there
        client.communicate()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("datapath", ["copy", "auto", "splice"])
def test_the_server_of_a_udp_session_sees_the_clients_own_address(
    version: int, datapath: str, hosts: Topology, start_forwarder: StartForwarder
) -> None:
    """Client and server on hosts of their own; such a session is copied with any `datapath`."""
    way = hosts.way()
    host = way.destination[version]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(datagram_socket(way.server, host))
        client = stack.enter_context(datagram_socket(way.client, {4: "0.0.0.0", 6: "::"}[version]))
        port = server.getsockname()[1]
        for words in (
            ("rule", "ipproto", "17", "sport", str(port), "lookup", "100"),  # UDP
            ("route", "local", NETWORKS[version][3], "dev", "lo", "table", "100"),
        ):
            change = ("ip", f"-{version}", words[0])
            hosts.forwarder.run(*change, "add", *words[1:])
            stack.callback(hosts.forwarder.run, *change, "del", *words[1:])
        with hosts.forwarder.entered():
            forwarder = start_forwarder(
                f"listeners: [{{name: main, bind: '{address_text((way.listener[version], 0))}',"
                f" protocol: udp, datapath: {datapath}, rules: [{{match: any, to: web}}]}}]\n"
                f"upstreams: {{web: {{servers: ['{address_text((host, port))}'],"
                " transparent: true}}\n"
                "handover: {after_bytes: 0}\n"
            )
        client.connect((way.listener[version], forwarder.listeners()["main"][1]))
        for number in range(20):
            client.send(b"up %d" % number)
            client.send(b"")  # nothing but its boundaries
            data, source = server.recvfrom(100)
            assert data == b"up %d" % number
            assert source[0] == client.getsockname()[0]
            assert server.recv(100) == b""
            server.sendto(b"down %d" % number, source)
            assert client.recv(100) == b"down %d" % number
        row = forwarder.wait_for_pair(lambda row: row["down_packets"] == 20)
        assert row["source"] == address_text(source[:2])
        assert (row["datapath"], row["reason"]) == ("copy", "datagrams are copied")


def peer_of(served: socket.socket) -> str:
    return str(served.getpeername()[0])


@pytest.mark.usefixtures("alone")
def test_no_worker_may_take_an_address_that_no_upstream_asks_for() -> None:
    with socket.socket() as sock:
        ask = Ask(ask="transparent", number=1)
        assert grant(ask, [sock.fileno()], may_be_transparent=False) is False
        assert sock.getsockopt(*TRANSPARENT[socket.AF_INET]) == 0
        assert grant(ask, [sock.fileno()], may_be_transparent=True) is True
        assert sock.getsockopt(*TRANSPARENT[socket.AF_INET]) == 1
    read_fd, write_fd = os.pipe()
    os.close(write_fd)
    assert grant(ask, [read_fd], may_be_transparent=True) is False
    os.close(read_fd)

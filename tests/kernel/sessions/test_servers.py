"""UDP sessions in the kernel whose server is lost: their clients' next datagrams find another."""

from __future__ import annotations

import contextlib
import select
import socket
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers.peers import address_text
from tests.helpers.sessions import SessionSite, Talk, datagram_socket
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

HOSTS: Final = {4: "10.2.0.2", 6: "fd02::2"}


def config(servers: list[str], version: int, more: str = "") -> str:
    bind = {4: "0.0.0.0:7004", 6: "[::]:7006"}[version]
    return (
        f'listeners: [{{name: main{version}, bind: "{bind}", protocol: udp,'
        " rules: [{match: any, to: web}]}]\n"
        f"upstreams: {{web: {{servers: {servers}{more}}}}}\n"
        "datapath: splice\n"
    )


class Servers:
    """Two of them, with what each is known by."""

    def __init__(self, hosts: Topology, version: int, stack: contextlib.ExitStack) -> None:
        self.version = version
        self.sockets = [
            stack.enter_context(datagram_socket(hosts.server, HOSTS[version])) for _ in range(2)
        ]
        self.texts = [address_text(sock.getsockname()[:2]) for sock in self.sockets]
        # What is looked at by TCP is there for it, too.
        self.looked_at = []
        for sock in self.sockets:
            with hosts.server.entered():
                family = socket.AF_INET6 if version == 6 else socket.AF_INET
                listener = stack.enter_context(socket.socket(family))
            listener.bind(sock.getsockname()[:2])
            listener.listen(100)
            self.looked_at.append(listener)

    @contextlib.contextmanager
    def spliced(self, site: SessionSite) -> Iterator[tuple[Talk, int]]:
        """A session in the kernel, and which of them has it."""
        way = site.topology.way()
        with datagram_socket(way.client, {4: "0.0.0.0", 6: "::"}[self.version]) as client:
            client.connect(site.via(way, self.version))
            client.send(b"first")
            row = wait_for(lambda: site.row(client), "it is shown")
            assert row is not None
            number = self.texts.index(row["server"])
            server = self.sockets[number]
            data, source = server.recvfrom(100)
            assert data == b"first"
            server.sendto(b"answer", source)
            assert client.recv(100) == b"answer"
            # Its socket stays everybody's: only what it sends goes to that client.
            talk = Talk(client, _Answering(server, source), row["id"])  # type: ignore[arg-type]
            site.wait_until_spliced(talk)
            yield talk, number

    def is_with_the_other(self, site: SessionSite, talk: Talk, number: int) -> None:
        """The session has ended, and what its client sends opens one with the other server.

        `show` has no such row from the moment on in which the keeper is asked to end the session:
        what comes before it has is still sent to the server before.
        """
        site.wait_until_gone(talk.id)
        other = self.sockets[1 - number]

        def reaches_the_other() -> bool:
            talk.client.send(b"who is there now?")
            return bool(select.select([other], [], [], 0.1)[0])

        wait_for(reaches_the_other, "the other server has it")
        data, source = other.recvfrom(100)
        assert data == b"who is there now?"
        other.sendto(b"me", source)
        assert talk.client.recv(100) == b"me"


class _Answering:
    """A server's socket as one that is connected to a session's."""

    def __init__(self, sock: socket.socket, source: tuple[str, int]) -> None:
        self._sock, self._source = sock, source
        self.recv = sock.recv

    def send(self, data: bytes) -> None:
        self._sock.sendto(data, self._source)


@pytest.mark.parametrize("version", [4, 6])
def test_a_session_whose_server_a_reload_takes_away_ends(
    hosts: Topology, start_forwarder: StartForwarder, version: int
) -> None:
    with contextlib.ExitStack() as stack:
        servers = Servers(hosts, version, stack)
        with hosts.forwarder.entered():
            site = SessionSite(hosts, start_forwarder(config(servers.texts, version)))
        talk, number = stack.enter_context(servers.spliced(site))
        site.forwarder.reconfigure(config([servers.texts[1 - number]], version))
        assert site.forwarder.command("reload").returncode == 0
        servers.is_with_the_other(site, talk, number)
        site.wait_until_closed("unreachable", 1)


@pytest.mark.parametrize("version", [4, 6])
def test_a_session_whose_server_goes_down_ends(
    hosts: Topology, start_forwarder: StartForwarder, version: int
) -> None:
    """It is silent, and nobody says so by ICMP: the health checks find out."""
    with contextlib.ExitStack() as stack:
        servers = Servers(hosts, version, stack)
        health = ", health: {interval: 200ms, timeout: 5s, fall: 2, rise: 1}"
        with hosts.forwarder.entered():
            site = SessionSite(hosts, start_forwarder(config(servers.texts, version, health)))
        talk, number = stack.enter_context(servers.spliced(site))
        servers.looked_at[number].close()
        servers.is_with_the_other(site, talk, number)
        site.wait_until_closed("unreachable", 1)

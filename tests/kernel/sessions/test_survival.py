"""UDP sessions whose worker, or whole daemon, is killed: the kernel sends their datagrams on."""

from __future__ import annotations

import contextlib
import select
import socket
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import address_text, pattern
from tests.helpers.sessions import (
    SessionSite,
    Talk,
    config,
    datagram_socket,
    numbered,
    send_with_options,
)
from tests.helpers.survival import everyone
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)


@pytest.fixture
def start(hosts: Topology, start_forwarder: StartForwarder) -> Any:
    """Start a forwarder, or its next life, on the middle host."""

    def start(text: str = "") -> SessionSite:
        with hosts.forwarder.entered():
            return SessionSite(hosts, start_forwarder(text or config(datapath="splice")))

    return start


def kill(site: SessionSite) -> None:
    """The whole daemon, at once."""
    processes = everyone(site.forwarder)
    site.forwarder.kill()
    for process in processes[1:]:
        wait_for(lambda one=process: not one.is_running(), "it has ended")  # type: ignore[misc]


def spliced(site: SessionSite, stack: contextlib.ExitStack) -> list[Talk]:
    """One for each mixture of ends, by both versions of IP."""
    ways = [
        site.topology.way(client_local=client, server_local=server)
        for client in (False, True)
        for server in (False, True)
    ]
    return [stack.enter_context(site.spliced(way, version)) for way in ways for version in VERSIONS]


def test_sessions_outlive_the_daemon_and_the_next_one_goes_on_with_them(start: Any) -> None:
    site = start()
    with contextlib.ExitStack() as stack:
        talks = spliced(site, stack)
        for talk in talks:
            talk.exchange(pattern(1000))
        before = {row["id"]: row for row in site.rows()}
        kill(site)
        for talk in talks:
            for number in range(10):
                talk.exchange(numbered(number, 100))
        site = start()
        site.forwarder.wait_for_line("adopted .*sessions=")
        for talk in talks:
            talk.exchange(pattern(77))
        after = {row["id"]: row for row in site.rows()}
        assert after.keys() == before.keys()
        for session_id, row in after.items():
            old = before[session_id]
            for name in ("client", "listener", "source", "server", "rule", "datapath"):
                assert row[name] == old[name]
            for direction in ("up", "down"):
                assert row[f"{direction}_bytes"] == old[f"{direction}_bytes"] + 1077
                assert row[f"{direction}_packets"] == old[f"{direction}_packets"] + 11
            assert row["reason"] == "it was spliced before this daemon or worker started"
        # What the program does not understand is copied, by sockets in the place of the old ones.
        for talk in talks:
            talk.exchange(pattern(4000))
        flushed = site.forwarder.control().flush(sorted(after))["flushed"]
        assert sorted(flushed) == sorted(after)
        assert site.rows() == []


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_socket_nobody_is_told_that_nobody_listens(start: Any, version: int) -> None:
    """What only they take is lost meanwhile; a refusal would end the session at its sender."""
    site = start()
    with site.spliced(site.topology.way(), version) as talk:
        kill(site)
        for sender, receiver in ((talk.client, talk.server), (talk.server, talk.client)):
            sender.send(pattern(4000))  # in fragments
            send_with_options(sender, b"lost")
            # An error that came back would be raised here.
            sender.send(b"and this")
            assert receiver.recv(1 << 16) == b"and this"
        for sock in (talk.client, talk.server):
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        talk.exchange()


def test_sessions_outlive_every_worker(start: Any) -> None:
    site = start()
    with contextlib.ExitStack() as stack:
        talks = spliced(site, stack)
        before = sorted(row["id"] for row in site.rows())
        for worker in site.forwarder.workers():
            worker.kill()
        for talk in talks:
            talk.exchange(pattern(500))

        def are_adopted() -> bool:
            for talk in talks:
                talk.exchange(b"x")
            return sorted(row["id"] for row in site.rows()) == before

        wait_for(are_adopted, "their successors have them")
        for talk in talks:
            talk.exchange(pattern(4000))
        assert site.stats()["pairs_open"] == len(talks)


def test_sessions_of_a_listener_that_is_no_more_end(start: Any) -> None:
    """Nobody could copy what the program passes, or answer from that address."""
    site = start()
    with site.spliced(site.topology.way(), 4) as talk:
        kill(site)
        talk.exchange()
        site = start(config(datapath="splice").replace(":7004", ":7005"))
        assert site.rows() == []
        talk.client.send(b"is anybody there?")
        with pytest.raises(ConnectionRefusedError):
            talk.client.recv(100)


def test_a_keeper_that_died_is_replaced_by_one_that_knows_the_sessions(start: Any) -> None:
    site = start()
    with site.spliced(site.topology.way(), 6) as talk:
        (keeper,) = (one for one in everyone(site.forwarder)[1:] if one.uids().real == 0)
        keeper.kill()
        site.forwarder.wait_for_line("splice_keeper_died")
        talk.exchange()

        def is_spliced() -> bool:
            with site.copied(site.topology.way(), 6) as other:
                other.exchange()
                other.exchange()
                row = site.row(other.client)
                return row is not None and row["datapath"] == "splice"

        wait_for(is_spliced, "new ones are spliced again")
        assert site.forwarder.control().flush([talk.id])["flushed"] == [talk.id]
        row = site.row(talk.client)
        assert row is None


def is_silent(sock: socket.socket) -> bool:
    """Nothing has come, and nothing was said of what it has sent."""
    return not select.select([sock], [], [], 0)[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_daemon_a_silent_session_ends_by_itself(start: Any, version: int) -> None:
    """One that speaks goes on, and the next daemon knows no other."""
    site = start()
    way = site.topology.way()
    with site.spliced(way, version) as silent, site.spliced(way, version) as speaking:
        kill(site)
        idle_ns = site.record(silent).idle_ns
        assert 120e9 < idle_ns < 180e9
        site.record(silent, silent_ns=idle_ns - int(30e9))
        for _ in range(2):  # it is time yet, and then it is not silent any more
            silent.exchange()
            speaking.exchange()
        site.record(silent, silent_ns=idle_ns + int(2e9))
        for sender, other in ((silent.client, speaking.client), (silent.server, speaking.server)):
            for size in (10, 4000):  # whole, and in fragments
                sender.send(numbered(1, size))
            other.send(b"behind it, by the same wire")
        for receiver in (speaking.client, speaking.server):
            assert receiver.recv(1 << 16) == b"behind it, by the same wire"
        assert all(is_silent(sock) for sock in (silent.client, silent.server))
        site = start()
        assert [row["id"] for row in site.rows()] == [speaking.id]
        speaking.exchange(pattern(4000))
        # The client's next datagram begins another.
        with datagram_socket(site.topology.server, way.destination[version]) as server:
            silent.client.send(instruction(address_text(server.getsockname()[:2])) + b"again")
            assert server.recv(100) == b"again"
            assert silent.client.recv(100) == ACK
        assert is_silent(silent.server)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_port_of_a_session_that_is_over_is_its_next_owners(start: Any, version: int) -> None:
    site = start()
    with site.spliced(site.topology.way(), version) as talk:
        kill(site)
        host, port = talk.server.getpeername()[:2]
        with datagram_socket(site.topology.forwarder, host, port) as other:
            talk.server.send(b"the session's")
            assert talk.client.recv(100) == b"the session's"
            assert is_silent(other)
            site.record(talk, silent_ns=int(600e9))
            talk.server.send(b"the other program's")
            assert other.recv(100) == b"the other program's"
            assert is_silent(talk.client)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_copied_of_a_session_keeps_it_in_the_kernel(start: Any, version: int) -> None:
    """Fragments alone, for as long as somebody likes: a worker has seen them come whole."""
    site = start()
    with site.spliced(site.topology.way(), version) as talk:
        record = site.record(talk, silent_ns=int(200e9))
        before = site.copies()
        talk.exchange(b"it is over")  # until a worker has copied that
        assert site.copies() == before + 1
        site.record(talk, silent_ns=int(200e9))
        talk.exchange(pattern(4000))
        talk.exchange(b"it is not")
        assert site.copies() == before + 3
        now = site.record(talk)
        assert all(
            now.direction[d].last_ns >= record.direction[d].last_ns + int(100e9) for d in (0, 1)
        )


@pytest.mark.parametrize("version", VERSIONS)
def test_adopted_sockets_are_their_workers_as_those_before(start: Any, version: int) -> None:
    """Filters and routes may go by the user and the group."""
    site = start()
    with site.spliced(site.topology.way(), version) as talk:
        kill(site)
        site = start()
        site.forwarder.wait_for_line("adopted .*sessions=")
        worker = site.forwarder.workers()[0]
        assert worker.uids().real != 0
        rule = "udp dport {} meta sk{}id != {} drop\n"
        port = talk.server.getsockname()[1]
        site.topology.forwarder.run(
            *("nft", "-f", "-"),
            stdin="table inet owners {\nchain out {\ntype filter hook output priority 0;\n"
            + rule.format(port, "u", worker.uids().real)
            + rule.format(port, "g", worker.gids().real)
            + "}\n}\n",
        )
        try:
            talk.exchange(pattern(4000))  # in fragments: copied by the sockets
        finally:
            site.topology.forwarder.run("nft", "delete", "table", "inet", "owners")
        tables = site.topology.forwarder.run("cat", "/proc/net/udp", "/proc/net/udp6")
        port = f":{talk.server.getpeername()[1]:04X}"
        lines = [line.split() for line in tables.splitlines()]
        assert [line[7] for line in lines if line[1].endswith(port)] == [str(worker.uids().real)]

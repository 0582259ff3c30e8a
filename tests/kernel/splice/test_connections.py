"""One spliced connection at a time, between remote ends: its endings, its idleness, its limits.

Many at once, and bad networks, are in test_transfers.py.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.faults import FIN, Action, Faults
from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import (
    Waiting,
    address_text,
    ends_with_reset,
    pattern,
    push_until_blocked,
    read_exactly,
    read_to_end,
    reset,
)
from tests.helpers.sent_again import send_again
from tests.helpers.spliced import Site, config, exchange
from tests.helpers.topology import topology
from tests.helpers.waiting import DEADLINE_S, stays, wait_for

if TYPE_CHECKING:
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)


@pytest.fixture(scope="module")
def site(hosts: Topology, start_shared_forwarder: StartForwarder) -> Site:
    """One forwarder for all tests that leave it as it was."""
    with hosts.forwarder.entered():
        return Site(hosts, start_shared_forwarder(config()))


@contextlib.contextmanager
def counted(site: Site, **reasons: int) -> Iterator[None]:
    """So many connections end meanwhile, for these reasons."""
    site.wait_for_no_pairs()
    before = site.stats()["closed"]
    yield
    site.wait_for_no_pairs()
    after = site.stats()["closed"]
    changed = {name: number - before.get(name, 0) for name, number in after.items()}
    assert {name: number for name, number in changed.items() if number} == reasons


# ---------------------------------------------------------------------------- endings


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_half_closed_pair_carries_on_the_other_way(site: Site, version: int, first: str) -> None:
    with (
        counted(site, finished=1),
        site.spliced(site.topology.way(), version) as (client, server, pair_id),
    ):
        one, other = (client, server) if first == "client" else (server, client)
        one.sendall(pattern(70_001))
        one.shutdown(socket.SHUT_WR)
        assert read_to_end(other) == pattern(70_001)
        wait_for(lambda: (site.row(client) or {}).get("state") == "half-closed", "half-closed")
        # Back and forth for a while: the half that is open is not on a timer of seconds.
        for size in (1, 1000, 300_007):
            other.sendall(pattern(size))
            assert read_exactly(one, size) == pattern(size)
        other.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""
        site.wait_until_gone(pair_id)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("by", ["client", "server"])
def test_a_reset_reaches_the_other_end(site: Site, version: int, by: str) -> None:
    with (
        counted(site, **{f"{by}_reset": 1}),
        site.spliced(site.topology.way(), version) as (client, server, pair_id),
    ):
        one, other = (client, server) if by == "client" else (server, client)
        reset(one)
        assert ends_with_reset(other) == b""
        site.wait_until_gone(pair_id)


@pytest.mark.parametrize("by", ["client", "server"])
def test_a_reset_with_unread_bytes_reaches_the_other_end(site: Site, by: str) -> None:
    """close() with something unread is a reset too, and what was sent before it is a prefix."""
    with (
        counted(site, **{f"{by}_reset": 1}),
        site.spliced(site.topology.way(), 4) as (client, server, pair_id),
    ):
        one, other = (client, server) if by == "client" else (server, client)
        other.sendall(pattern(100_003))
        one.sendall(pattern(5003))
        assert read_exactly(one, 17) == pattern(17)
        one.close()
        got = ends_with_reset(other)
        assert got == pattern(5003)[: len(got)]
        site.wait_until_gone(pair_id)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("by", ["client", "server"])
def test_a_reset_reaches_the_other_end_of_a_half_closed_pair(
    site: Site, version: int, by: str
) -> None:
    with (
        counted(site, **{f"{by}_reset": 1}),
        site.spliced(site.topology.way(), version) as (client, server, pair_id),
    ):
        one, other = (client, server) if by == "client" else (server, client)
        other.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""
        reset(one)
        assert ends_with_reset(other) == b""
        site.wait_until_gone(pair_id)


@pytest.mark.parametrize("version", VERSIONS)
def test_both_ends_close_at_once(site: Site, bad_network: Faults, version: int) -> None:
    """Each sends its FIN before the other's has come: the first two are lost on their last leg."""
    way = site.topology.way()
    with (
        counted(site, finished=1),
        site.spliced(way, version) as (client, server, pair_id),
    ):
        client.sendall(pattern(1009))
        server.sendall(pattern(2003))
        bad_network.set(flags=FIN, exact={1: Action.LOSE, 2: Action.LOSE})
        with bad_network.put_on(way.doors[0], way.doors[-1]):
            client.shutdown(socket.SHUT_WR)
            server.shutdown(socket.SHUT_WR)
            assert read_to_end(server) == pattern(1009)
            assert read_to_end(client) == pattern(2003)
        assert bad_network.counts()["lost"] == 2
        site.wait_until_gone(pair_id)


def test_urgent_bytes_stay_in_the_stream(site: Site) -> None:
    with site.spliced(site.topology.way(), 4) as (client, server, _):
        client.sendall(b"before")
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b"after")
        assert read_exactly(server, 12) == b"before!after"


# ---------------------------------------------------------------------------- standing still


def test_a_reader_that_stops_for_four_seconds_stops_its_sender_and_nobody_else(
    site: Site,
) -> None:
    """A window of zero for so long, in both directions and both versions at once."""
    way = site.topology.way()
    with contextlib.ExitStack() as stack:
        ends: list[tuple[socket.socket, socket.socket]] = []
        for version in VERSIONS:
            client, server, _ = stack.enter_context(site.spliced(way, version))
            ends.append((client, server))
        # Client to server in the first, server to client in the second.
        flows = [ends[0], ends[1][::-1]]
        with ThreadPoolExecutor(2) as pool:
            taken = list(
                pool.map(lambda flow: push_until_blocked(flow[0], most=1 << 28, quiet_s=4.0), flows)
            )
        for sender, receiver in flows:
            receiver.sendall(pattern(4001))
            assert read_exactly(sender, 4001) == pattern(4001)
        for (sender, receiver), size in zip(flows, taken, strict=True):
            assert read_exactly(receiver, size) == pattern(size)
            exchange(sender, receiver)
            row = site.row(sender) or site.row(receiver)
            assert row is not None
            assert row["backlog_bytes"] == 0


def keep_alive(sock: socket.socket) -> None:
    """A connection whose other end is silent for some three seconds has broken."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 1),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, 2),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


@pytest.mark.parametrize("version", VERSIONS)
def test_keepalives_are_answered_by_the_other_end(
    site: Site, bad_network: Faults, version: int
) -> None:
    """For as long as it is there, and no longer: nobody in the middle answers in its place."""
    way = site.topology.way()
    with site.spliced(way, version) as (client, server, pair_id):
        keep_alive(client)
        keep_alive(server)

        def is_open() -> bool:
            return not any(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for sock in (client, server)
            )

        stays(is_open, "both ends are connected", for_s=3.6)
        exchange(client, server)
        bad_network.set(lose=1.0)
        with bad_network.put_on(way.doors[-1]):  # nothing reaches the server any more
            with pytest.raises(OSError, match="timed out") as raised:
                client.recv(1)
            assert raised.value.errno == errno.ETIMEDOUT
        site.forwarder.control().flush([pair_id])
    site.wait_for_no_pairs()


def test_a_silent_pair_is_spliced_too(site: Site) -> None:
    """The client's only bytes come with the instruction, the server never says a word."""
    way = site.topology.way()
    with way.server.entered():
        waiting = Waiting(way.destination[4])
    with waiting, way.client.entered(), socket.create_connection(site.via(way, 4)) as client:
        client.settimeout(DEADLINE_S)
        client.sendall(instruction(address_text(waiting.address)) + pattern(333))
        with waiting.accept() as server:
            assert read_exactly(server, 333) == pattern(333)
            site.wait_until_spliced(client)
            assert read_exactly(client, len(ACK)) == ACK
            exchange(client, server)
    site.wait_for_no_pairs()


def test_acknowledgements_that_are_put_off(site: Site) -> None:
    """Nagle's algorithm at both ends, and two writes for each read: each waits for one.

    For one that comes, not for the timer of what has not been acknowledged.
    """
    with site.spliced(site.topology.way(), 4) as (client, server, _):
        before = site.topology.segments_sent_again()
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        for turn in range(20):
            for sender, receiver in ((client, server), (server, client)):
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
                sender.send(b"a")
                sender.send(bytes([turn]))
                assert read_exactly(receiver, 2) == b"a" + bytes([turn])
        # Of forty turns; a host with much to do may be late with some.
        assert site.topology.segments_sent_again() - before < 20


# ---------------------------------------------------------------------------- ports that come back


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("ending", ["client fin", "server fin", "client reset", "server reset"])
def test_ports_serve_again_at_once(site: Site, version: int, ending: str) -> None:
    """The client's own, and the forwarder's towards the server: it has only four."""
    way = site.topology.way()
    hosts = site.topology
    hosts.forwarder.set(ipv4__ip_local_port_range="40000 40003")
    with contextlib.ExitStack() as stack:
        stack.callback(hosts.forwarder.set, ipv4__ip_local_port_range="32768 60999")
        with way.server.entered():
            waiting = stack.enter_context(Waiting(way.destination[version]))
        for _ in range(9):
            with way.client.entered():
                client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
            client.settimeout(scaled_s(5))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # After its own FIN it is the client's TCP that keeps the port to itself.
            if ending != "client fin":
                client.bind(("", 33_333))
            with client:
                client.connect(site.via(way, version))
                client.sendall(instruction(address_text(waiting.address)))
                assert read_exactly(client, len(ACK)) == ACK
                with waiting.accept() as server:
                    exchange(client, server)
                    pair_id = site.wait_until_spliced(client)["id"]
                    exchange(client, server)
                    by, how = ending.split()
                    one, other = (client, server) if by == "client" else (server, client)
                    if how == "reset":
                        reset(one)
                        assert ends_with_reset(other) == b""
                    else:
                        one.shutdown(socket.SHUT_WR)
                        assert other.recv(1) == b""
                        other.shutdown(socket.SHUT_WR)
                        assert one.recv(1) == b""
            site.wait_until_gone(pair_id)


# ---------------------------------------------------------------------------- counting


@pytest.mark.parametrize("version", VERSIONS)
def test_bytes_are_counted_exactly_on_a_bad_network(
    site: Site, bad_network: Faults, version: int
) -> None:
    """Those that were lost and sent again once, those that came twice once."""
    way = site.topology.way()
    with site.spliced(way, version) as (client, server, _):
        bad_network.set(seed=version, lose=0.03, duplicate=0.05, delay=0.05)
        with bad_network.put_on(*way.doors):
            for _ in range(23):
                exchange(client, server, 10_007)
            client.sendall(pattern(501))
            assert read_exactly(server, 501) == pattern(501)
        row = site.row(client)
        assert row is not None
        assert (row["up_bytes"], row["down_bytes"]) == (
            1000 + 23 * 10_007 + 501,
            1000 + 23 * 10_007,
        )
        counts = bad_network.counts()
        assert counts["lost"]
        assert counts["duplicated"]


@pytest.mark.parametrize("by", ["client", "server"])
def test_bytes_from_before_the_switch_that_come_again_are_delivered_once(
    site: Site, by: str
) -> None:
    """All of a packet from before, and one of which the end is from after; made by hand."""
    hosts = site.topology
    with site.spliced(hosts.way(), 4) as (client, server, _):
        sender, network = (client, hosts.client) if by == "client" else (server, hosts.server)
        with network.entered():
            send_again(sender, pattern(1000)[-500:], b"")
        exchange(client, server, 307)
        with network.entered():
            send_again(sender, pattern(1000)[-400:] + pattern(307), b"")
        exchange(client, server, 503)
        row = site.row(client)
        assert row is not None
        assert (row["up_bytes"], row["down_bytes"]) == (1000 + 307 + 503,) * 2


# ---------------------------------------------------------------------------- endings of ours


@pytest.mark.parametrize("version", VERSIONS)
def test_flush_resets_both_ends_at_once(site: Site, version: int) -> None:
    """Neither says anything in between that could be answered with a reset."""
    with (
        counted(site, flushed=1),
        site.spliced(site.topology.way(), version) as (client, server, pair_id),
    ):
        assert site.forwarder.control().flush([pair_id]) == {"flushed": [pair_id], "unknown": []}
        assert ends_with_reset(client) == b""
        assert ends_with_reset(server) == b""


@pytest.mark.parametrize("version", VERSIONS)
def test_flush_resets_both_ends_of_a_busy_pair(site: Site, version: int) -> None:
    """Bytes are under way in both directions, and windows are full."""
    with (
        counted(site, flushed=1),
        site.spliced(site.topology.way(), version) as (client, server, pair_id),
    ):
        sent = [push_until_blocked(end, most=1 << 28, quiet_s=0.2) for end in (server, client)]
        assert site.forwarder.control().flush([pair_id]) == {"flushed": [pair_id], "unknown": []}
        for end, size in zip((client, server), sent, strict=True):
            got = ends_with_reset(end)
            assert got == pattern(size)[: len(got)]


def test_flush_resets_both_ends_while_they_talk(site: Site) -> None:
    with (
        counted(site, flushed=1),
        site.spliced(site.topology.way(), 4) as (client, server, pair_id),
    ):
        ended: list[str] = []

        def talk(sender: socket.socket, receiver: socket.socket) -> None:
            try:
                while True:
                    exchange(sender, receiver, 100_003)
            except ConnectionError:
                ended.append("reset")

        talker = threading.Thread(target=talk, args=(client, server))
        talker.start()
        wait_for(lambda: (site.row(client) or {}).get("up_bytes", 0) > 10_000_000, "traffic")
        site.forwarder.control().flush([pair_id])
        talker.join(timeout=DEADLINE_S)
        assert ended == ["reset"]
        for end in (client, server):
            wait_for(lambda end=end: is_reset(end), "a reset")  # type: ignore[misc]


def is_reset(end: socket.socket) -> bool:
    try:
        while end.recv(1 << 20):
            pass
        end.send(b"?")
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


@pytest.fixture
def own_site(start_forwarder: StartForwarder) -> Iterator[Callable[[str], Site]]:
    """A function that starts a forwarder of the test's own, on hosts of its own."""
    with topology() as hosts:

        def start(more: str) -> Site:
            with hosts.forwarder.entered():
                return Site(hosts, start_forwarder(config(more)))

        yield start


def test_down_waits_for_spliced_pairs_until_its_deadline(own_site: Callable[[str], Site]) -> None:
    site = own_site("timeouts: {drain: 3s}")
    way = site.topology.way()
    with (
        site.spliced(way, 4) as (client, server, _),
        site.spliced(way, 6) as (idle_client, idle_server, _),
    ):
        site.forwarder.control().down()
        wait_for(lambda: refuses(site), "no new connections")
        exchange(client, server)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.sendall(pattern(1013))
        server.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == pattern(1013)
        assert ends_with_reset(idle_client) == b""
        assert ends_with_reset(idle_server) == b""
    assert site.forwarder.wait() == 0


def refuses(site: Site) -> bool:
    with site.topology.client.entered(), socket.socket() as sock:
        return sock.connect_ex(site.via(site.topology.way(), 4)) == errno.ECONNREFUSED


def test_down_now_resets_spliced_pairs(own_site: Callable[[str], Site]) -> None:
    site = own_site("")
    way = site.topology.way()
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(site.spliced(way, version)) for version in (4, 6) * 4]
        assert site.forwarder.stop() == 0
        for client, server, _ in pairs:
            assert ends_with_reset(client) == b""
            assert ends_with_reset(server) == b""


def test_an_idle_pair_is_reset_when_its_time_is_up_and_a_talking_one_is_not(site: Site) -> None:
    way = site.topology.way()
    with (
        site.configured("timeouts: {idle: 4s}"),
        counted(site, idle=1, finished=1),
        site.spliced(way, 4) as (client, server, _),
        site.spliced(way, 6) as (talker, listener, _),
    ):
        ended: list[bytes] = []
        watcher = threading.Thread(target=lambda: ended.append(ends_with_reset(client)))
        watcher.start()

        def talk() -> bool:
            exchange(talker, listener, 10)
            return not watcher.is_alive()

        wait_for(talk, "the idle pair is reset")
        assert ended == [b""]
        assert ends_with_reset(server) == b""
        exchange(talker, listener)


def test_a_half_closed_pair_is_reset_when_its_time_is_up(site: Site) -> None:
    with (
        site.configured("timeouts: {half_closed: 1s}"),
        counted(site, half_closed=1),
        site.spliced(site.topology.way(), 4) as (client, server, _),
    ):
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        assert ends_with_reset(client) == b""
        wait_for(lambda: is_reset(server), "a reset")


def test_a_listener_may_forbid_it(site: Site) -> None:
    site.forwarder.reconfigure(config(listener="splice: off"))
    site.forwarder.control().reload()
    with site.pair(site.topology.way(), 4) as (client, server):
        wait_for(lambda: [row["datapath"] for row in site.pairs()] == ["sockmap"], "in the sockmap")
        exchange(client, server)
    site.forwarder.reconfigure(config())
    site.forwarder.control().reload()


def test_nothing_is_left_open_by_pairs_that_have_ended(site: Site) -> None:
    """Descriptors, in all processes of the daemon, after every kind of ending."""
    way = site.topology.way()
    with site.spliced(way, 4):
        pass  # what is opened once, for all of them, is open now
    site.wait_for_no_pairs()
    before = site.forwarder.open_fds()
    for version in VERSIONS:
        for first in ("neither", "client", "server"):
            with site.spliced(way, version) as (client, server, _):
                if first != "neither":
                    reset(client if first == "client" else server)
    site.wait_for_no_pairs()
    site.forwarder.wait_for_no_more_fds(before)

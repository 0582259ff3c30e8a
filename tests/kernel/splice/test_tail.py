"""Pairs that begin in mid-stream: what had come to our sockets by then (the tail) is still ours.

A reader that stops makes it long: megabytes wait in our sockets when the pair is switched.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, VERSION, Splice, SpliceState
from pyforwarder.datapath.splice.records import used_indexes
from pyforwarder.errors import ControlError
from pyforwarder.runtime.pidfd import fetch_descriptors
from tests.helpers.faults import Action
from tests.helpers.foreign import MOST as MOST_MARKED
from tests.helpers.forged import RST, Forger, Segment
from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import (
    Waiting,
    address_text,
    dial,
    dial_through,
    ends_with_reset,
    pattern,
    push_until_blocked,
    read_exactly,
    read_to_end,
    reset,
)
from tests.helpers.segments import segment, send_by_interface
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.stateful import invalid_packets, stateful_filter
from tests.helpers.topology import topology
from tests.helpers.waiting import stays, wait_for

if TYPE_CHECKING:
    from pyforwarder.datapath.attach.base import Side
    from tests.helpers.faults import Faults
    from tests.helpers.foreign import Foreign
    from tests.helpers.topology import Topology, Way
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
# (client is local, server is local)
WAYS: Final = {"remote": (False, False), "client-local": (True, False), "local": (True, True)}
PIECE: Final = 100_003
# A handover that is earned while the buffers on the way are full, and by bytes alone.
LATE: Final = """
handover: {after_bytes: 4MiB, after_round_trips: 1000000, after: 1h}
"""
MOST: Final = 1 << 28
SO_GET_FILTER, SO_BUF_LOCK = 26, 72  # asm-generic/socket.h
SOCK_RCVBUF_LOCK: Final = 2  # linux/net.h


@pytest.fixture(scope="module")
def site(hosts: Topology, start_shared_forwarder: StartForwarder) -> Site:
    with hosts.forwarder.entered():
        return Site(hosts, start_shared_forwarder(config(LATE, datapath="auto")))


@dataclass(slots=True)
class Stalled:
    """A pair on the datapath, with bytes in our sockets; what each end has sent and received."""

    client: socket.socket
    server: socket.socket
    id: int
    up_sent: int
    up_received: int
    down_sent: int

    def rest_of(self, end: socket.socket) -> bytes:
        """What this end has still to get of what was sent before."""
        if end is self.server:
            return pattern(self.up_sent)[self.up_received :]
        return pattern(self.down_sent)


def record_of(site: Site, pair_id: int) -> Splice | None:
    """The programs' record of a pair that has begun."""
    daemon = site.forwarder
    pinned = daemon.place.bpffs / daemon.instance / "splice" / f"splices_{VERSION}"
    with contextlib.ExitStack() as stack:
        fd = bpf.open_pin(pinned)
        stack.callback(os.close, fd)
        size = bpf.map_sizes(fd).entries * SPLICE_BYTES
        memory = stack.enter_context(contextlib.closing(bpf.map_memory(fd, size, write=False)))
        for index in used_indexes(memory):
            record = Splice.from_buffer_copy(memory, index * SPLICE_BYTES)
            # The self-tests had pairs of their own, with numbers from 1, too.
            if (record.id, record.state) == (pair_id, SpliceState.ACTIVE):
                return record
    return None


def open_tails(site: Site, pair_id: int) -> int:
    """In how many directions our sockets have still to send, or to hear that it has come."""
    record = record_of(site, pair_id)
    return sum(1 for way in record.direction if way.tail_open) if record else 0


def left_to_send(site: Site) -> list[int]:
    """Of each of the forwarder's connected sockets: bytes that nobody has acknowledged to it."""
    listed = site.topology.forwarder.run("ss", "-tnH", "state", "established")
    return [int(line.split()[1]) for line in listed.splitlines()]


def window_there(sock: socket.socket) -> int:
    """How many bytes a socket believes that its peer has room for (TCP_INFO: tcpi_snd_wnd)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 236)
    return int.from_bytes(info[228:232], sys.byteorder)


def window_here(sock: socket.socket) -> int:
    """How many bytes a socket has told its peer to have room for (tcpi_rcv_wnd)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 236)
    return int.from_bytes(info[232:236], sys.byteorder)


def came_out_of_order(sock: socket.socket) -> int:
    """Packets with bytes behind a gap, so far (tcpi_rcv_ooopack)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 236)
    return int.from_bytes(info[224:228], sys.byteorder)


def spliced_id(site: Site, client: socket.socket) -> int:
    """The pair's number; 0 as long as it is elsewhere."""
    row = site.row(client)
    return row["id"] if row and row["datapath"] == DATAPATH else 0


@contextlib.contextmanager
def stalled(site: Site, way: Way, version: int) -> Iterator[Stalled]:
    """Neither end reads, then the server does for a while, as the client goes on sending.

    So the pair is switched in mid-stream; and then the ends stand still again.
    """
    with contextlib.ExitStack() as stack:
        with way.server.entered():
            waiting = stack.enter_context(Waiting(way.destination[version]))
        waiting.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 30_000)
        with way.client.entered():
            client = stack.enter_context(dial(site.via(way, version)))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 30_000)
        client.sendall(instruction(address_text(waiting.address)) + pattern(PIECE))
        server = stack.enter_context(waiting.accept())
        down_sent = push_until_blocked(server, most=MOST, quiet_s=0.2)
        sent = PIECE + push_until_blocked(client, most=MOST, quiet_s=0.2, start=PIECE)
        received = 0

        def is_spliced() -> int:
            nonlocal received, sent
            assert read_exactly(server, PIECE) == pattern(PIECE, start=received)
            received += PIECE
            sent += push_until_blocked(client, most=MOST, quiet_s=0.002, start=sent)
            return spliced_id(site, client)

        pair_id = wait_for(is_spliced, "switched while bytes move")
        assert read_exactly(client, len(ACK)) == ACK
        yield Stalled(client, server, pair_id, sent, received, down_sent)


def way_of(site: Site, name: str) -> Way:
    client_local, server_local = WAYS[name]
    return site.topology.way(client_local=client_local, server_local=server_local)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", WAYS)
def test_what_waits_in_our_sockets_arrives(site: Site, name: str, version: int) -> None:
    """First it, then what is said from end to end; and then they are one connection."""
    with stalled(site, way_of(site, name), version) as pair:
        assert open_tails(site, pair.id) == 2
        # Nobody reads: nothing changes, and nobody gives up.
        stays(lambda: site.row(pair.client) is not None, "the pair", for_s=0.5)
        with ThreadPoolExecutor(4) as pool:
            more = pattern(3_000_017)
            sending = [pool.submit(end.sendall, more) for end in (pair.client, pair.server)]
            reading = [
                pool.submit(read_exactly, end, len(pair.rest_of(end)) + len(more))
                for end in (pair.client, pair.server)
            ]
            for end, got in zip((pair.client, pair.server), reading, strict=True):
                assert got.result() == pair.rest_of(end) + more
            for done in sending:
                done.result()
        exchange(pair.client, pair.server)
        assert open_tails(site, pair.id) == 0
        # They would send it again and again, until they give up, and their ports are free.
        wait_for(lambda: not any(left_to_send(site)), "our sockets have heard that it has come")
        pair.client.shutdown(socket.SHUT_WR)
        assert pair.server.recv(1) == b""
        pair.server.shutdown(socket.SHUT_WR)
        assert pair.client.recv(1) == b""
        site.wait_until_gone(pair.id)


@pytest.mark.parametrize("first", ["client", "server"])
def test_one_end_may_never_read(site: Site, first: str) -> None:
    """What the other reads does not wait for it."""
    with stalled(site, site.topology.way(), 4) as pair:
        reader, sender = pair.client, pair.server
        if first == "server":
            reader, sender = sender, reader
        with ThreadPoolExecutor(1) as pool:
            more = pattern(3_000_017)
            sending = pool.submit(sender.sendall, more)
            rest = pair.rest_of(reader)
            assert read_exactly(reader, len(rest) + len(more)) == rest + more
            sending.result()
        # And now that one.
        assert read_exactly(sender, len(pair.rest_of(sender))) == pair.rest_of(sender)
        exchange(pair.client, pair.server)


@pytest.mark.parametrize("name", WAYS)
def test_on_a_bad_network(site: Site, bad_network: Faults, name: str) -> None:
    """Five of a hundred packets are lost, one comes twice, some come late."""
    way = way_of(site, name)
    with stalled(site, way, 4) as pair:
        bad_network.set(seed=1, lose=0.05, duplicate=0.01, delay=0.03)
        with bad_network.put_on(*way.doors), ThreadPoolExecutor(4) as pool:
            more = pattern(500_017)
            reading = [
                pool.submit(read_exactly, end, len(pair.rest_of(end)) + len(more))
                for end in (pair.client, pair.server)
            ]
            sending = [pool.submit(end.sendall, more) for end in (pair.client, pair.server)]
            for end, got in zip((pair.client, pair.server), reading, strict=True):
                assert got.result() == pair.rest_of(end) + more
            for done in sending:
                done.result()
            assert bad_network.counts()["lost"] > 10


@pytest.mark.parametrize("mark", [0, 7])
@pytest.mark.parametrize(
    ("interface", "side"), [("lo", "out"), ("lo", "in"), ("f0", "in")], ids=str
)
def test_our_socket_hears_of_the_tail_though_packets_have_marks(
    site: Site,
    somebody: Foreign,
    bad_network: Faults,
    interface: str,
    side: Side,
    mark: int,
) -> None:
    """Packets are lost, so that the ends acknowledge selectively: that is always copied."""
    hosts = site.topology
    is_local = interface == "lo"
    way = hosts.way(client_local=is_local, server_local=is_local)
    with stalled(site, way, 4) as pair:
        bad_network.set(seed=1, lose=0.05)
        more = pattern(500_017)
        with (
            bad_network.put_on(*way.doors),
            somebody.at((hosts.forwarder, interface, side), mark=mark),
            ThreadPoolExecutor(4) as pool,
        ):
            reading = [
                pool.submit(read_exactly, end, len(pair.rest_of(end)) + len(more))
                for end in (pair.client, pair.server)
            ]
            sending = [pool.submit(end.sendall, more) for end in (pair.client, pair.server)]
            for end, got in zip((pair.client, pair.server), reading, strict=True):
                assert got.result() == pair.rest_of(end) + more
            for done in sending:
                done.result()
            wait_for(lambda: not any(left_to_send(site)), "our sockets have heard of all")
            assert 0 < somebody.marked < MOST_MARKED
        exchange(pair.client, pair.server)


def test_the_ends_may_close_while_it_waits(site: Site) -> None:
    with stalled(site, site.topology.way(), 4) as pair:
        for end in (pair.client, pair.server):
            end.shutdown(socket.SHUT_WR)
        for end in (pair.server, pair.client):
            assert read_to_end(end) == pair.rest_of(end)
        site.wait_until_gone(pair.id)


def check_cut_short(pair: Stalled, *ends: socket.socket) -> None:
    """They get some of what was sent, in order, and then a reset: never a clean end."""
    for end in ends:
        got = ends_with_reset(end)
        assert got == pair.rest_of(end)[: len(got)]


@pytest.mark.parametrize("by", ["client", "server"])
def test_a_reset_by_one_end_reaches_the_other(site: Site, by: str) -> None:
    with stalled(site, site.topology.way(), 4) as pair:
        one, other = (pair.client, pair.server) if by == "client" else (pair.server, pair.client)
        reset(one)
        site.wait_until_gone(pair.id)
        check_cut_short(pair, other)


@pytest.mark.parametrize("version", VERSIONS)
def test_flush_resets_both_ends(site: Site, version: int) -> None:
    with stalled(site, site.topology.way(), version) as pair:
        assert site.forwarder.control().flush([pair.id]) == {"flushed": [pair.id], "unknown": []}
        check_cut_short(pair, pair.client, pair.server)


@pytest.mark.parametrize("name", WAYS)
def test_a_worker_that_dies_takes_the_pair_with_it(
    start_forwarder: StartForwarder, name: str
) -> None:
    """Nobody else could send what waits."""
    with topology() as hosts:
        with hosts.forwarder.entered():
            own = Site(hosts, start_forwarder(config("workers: 1" + LATE, datapath="auto")))
        with stalled(own, way_of(own, name), 4) as pair:
            (worker,) = own.forwarder.workers()
            os.kill(worker.pid, signal.SIGKILL)
            check_cut_short(pair, pair.client, pair.server)
            own.forwarder.wait_for_line("worker_died")
        with own.pair(own.topology.way(), 4) as (client, server):
            exchange(client, server)


def test_an_acknowledgement_that_came_as_the_pair_began_is_not_waited_for(
    start_forwarder: StartForwarder, bad_network: Faults
) -> None:
    """It had passed the programs before they knew the pair; its sender need not repeat it.

    Here it comes in by an interface where there is no program.
    """
    early = "handover: {after_bytes: 8KiB, after_round_trips: 1000000, after: 1h}"
    with topology() as hosts:
        with hosts.forwarder.entered():
            own = Site(hosts, start_forwarder(config(early, datapath="auto")))
        hosts.forwarder.ip("link add x0 type veth peer name x1", "link set x0 up", "link set x1 up")
        hosts.forwarder.set(ipv4__conf__all__rp_filter=0, ipv4__conf__x0__rp_filter=0)
        way = hosts.way()
        with own.pair(way, 4) as (client, server):
            bad_network.set(lose=1.0, source=client.getsockname()[0])
            with bad_network.put_on((hosts.forwarder, "f0")):
                server.sendall(pattern(10_000))
                assert read_exactly(client, 10_000) == pattern(10_000)
                pair_id = wait_for(lambda: spliced_id(own, client), "switched")
                resent = hosts.forwarder.counters()["TcpRetransSegs"]
                wait_for(
                    lambda: hosts.forwarder.counters()["TcpRetransSegs"] > resent, "sent again"
                )
                assert open_tails(own, pair_id) == 1
                # That told the client how much the other end, not our socket, has room for.
                assert window_there(client) <= window_here(server)
                with hosts.forwarder.entered():
                    send_by_interface(client, segment(client), out="x1", into="x0")
                wait_for(lambda: open_tails(own, pair_id) == 0, "noticed all the same")
            # Its worker answers this when it is done with that: now the pair can do without us.
            own.forwarder.control().upstreams()
            own.forwarder.kill()
            exchange(client, server)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_lost_copy_of_the_tail_s_last_acknowledgement(
    start_forwarder: StartForwarder, bad_network: Faults, version: int
) -> None:
    """Our socket would not know that it is done, send it until it gives up, and free its port."""
    early = "handover: {after_bytes: 8KiB, after_round_trips: 1000000, after: 1h}"
    with topology() as hosts:
        with hosts.forwarder.entered():
            own = Site(hosts, start_forwarder(config(early, datapath="auto")))
        with own.pair(hosts.way(), version) as (client, server):
            bad_network.set(lose=1.0, source=client.getsockname()[0])
            with bad_network.put_on((hosts.forwarder, "f0")):
                server.sendall(pattern(10_000))
                assert read_exactly(client, 10_000) == pattern(10_000)
                pair_id = wait_for(lambda: spliced_id(own, client), "switched")
                assert open_tails(own, pair_id) == 1
                bad_network.set(marked=True, exact={1: Action.LOSE, 2: Action.LOSE})
                wait_for(lambda: open_tails(own, pair_id) == 0, "the client has the tail")
                assert bad_network.counts()["lost"] >= 1
                wait_for(lambda: left_to_send(own) == [0, 0], "both our sockets know it")
                assert bad_network.counts()["lost"] == 2
                exchange(client, server, 300_007)
            # Now its sockets are mute, and the pair can do without us: see above.
            wait_for(lambda: are_mute(own, client, server), "they hear SYNs alone")
            own.forwarder.control().upstreams()
            own.forwarder.kill()
            exchange(client, server)


@pytest.mark.parametrize("name", ["loopback", "own-address"])
def test_on_lo_our_socket_hears_that_the_first_bytes_have_come(
    start_forwarder: StartForwarder, name: str
) -> None:
    """Nothing but its handshake has come to it before; such a socket remembers no route."""
    with topology() as hosts:
        with hosts.forwarder.entered():
            own = Site(hosts, start_forwarder(config(datapath="splice")))
        way = hosts.way(client_local=True, server_local=True)
        if name == "own-address":  # of an interface of the host, and by `lo` all the same
            address = hosts.way().listener
            way = replace(way, listener=address, destination=address)
        for version in VERSIONS:
            with hosts.forwarder.entered(), contextlib.ExitStack() as stack:
                waiting = stack.enter_context(Waiting(way.destination[version]))
                pairs = []
                for _ in range(10):  # of some it has come before they begin
                    client = stack.enter_context(
                        dial_through(own.via(way, version), waiting.address)
                    )
                    client.sendall(pattern(1000))
                    pairs.append((client, stack.enter_context(waiting.accept())))
                for client, server in pairs:
                    assert read_exactly(server, 1000) == pattern(1000)
                    own.wait_until_spliced(client)
                wait_for(lambda: not any(left_to_send(own)), "all has been acknowledged")
                for client, server in pairs:
                    exchange(client, server)


@pytest.mark.parametrize("version", VERSIONS)
def test_bytes_that_overtake_an_unsent_tail_do_not_upset_a_stateful_filter(
    start_forwarder: StartForwarder, bad_network: Faults, version: int
) -> None:
    """The client acknowledges them selectively, in packets that are for our socket: conntrack has
    not seen them.
    """
    early = "handover: {after_bytes: 8KiB, after_round_trips: 1000000, after: 1h}"
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(topology())
        # Our socket may send two segments, and then has to hear of them.
        hosts.forwarder.ip(
            "route replace 10.1.0.0/24 dev f0 src 10.1.0.1 initcwnd 2",
            "route replace fd01::/64 dev f0 metric 1 initcwnd 2",
        )
        with hosts.forwarder.entered():
            own = Site(hosts, start_forwarder(config(early, datapath="auto")))
        stack.enter_context(stateful_filter(hosts.forwarder))
        client, server = stack.enter_context(own.pair(hosts.way(), version))
        bad_network.set(lose=1.0, source=client.getsockname()[0])
        with bad_network.put_on((hosts.forwarder, "f0")):
            server.sendall(pattern(20_000))
            pair_id = wait_for(lambda: spliced_id(own, client), "switched")
            record = record_of(own, pair_id)
            assert record is not None
            client_s = record.direction[Direction.UP]
            assert 0 < (client_s.tail_end - client_s.socket_sent_end) % (1 << 32) <= 20_000
            server.sendall(pattern(5003, start=20_000))
            wait_for(lambda: came_out_of_order(client) > 0, "some have come past the tail")
        assert read_exactly(client, 25_003) == pattern(25_003)
        exchange(client, server)
        assert invalid_packets(hosts.forwarder) == 0


def are_mute(site: Site, *peers: socket.socket) -> bool:
    """Whether our sockets to these hear SYNs alone: those have a filter."""
    return all(sock_option(site, peer, SO_GET_FILTER, 64) != b"" for peer in peers)


def test_a_reset_by_this_host_itself_during_a_tail_ends_the_pair(site: Site) -> None:
    """As a rule of its firewall may send one: nobody else would ever tell the other end."""
    with stalled(site, site.topology.way(), 4) as pair:
        assert open_tails(site, pair.id) == 2
        before = site.stats()["closed"].get("internal", 0)
        with contextlib.closing(
            Forger(site.topology.forwarder, "f0", site.topology.client, "c0")
        ) as forger:
            last = Segment(4, pair.client.getpeername(), pair.client.getsockname(), 0, 0, flags=RST)
            forger.send(last)
        site.wait_until_gone(pair.id)
        assert site.stats()["closed"].get("internal", 0) == before + 1
        check_cut_short(pair, pair.client, pair.server)


def sock_option(site: Site, peer: socket.socket, option: int, size: int) -> bytes:
    """What our socket to this one says to getsockopt(2), at the level of sockets."""
    for worker in site.forwarder.workers():
        for name in os.listdir(f"/proc/{worker.pid}/fd"):
            with contextlib.suppress(ControlError):  # not a connected socket
                (fd,) = fetch_descriptors(worker.pid, [int(name)])
                with socket.socket(fileno=fd) as sock:
                    if sock.getpeername()[:2] == peer.getsockname()[:2]:
                        said: bytes = sock.getsockopt(socket.SOL_SOCKET, option, size)
                        return said
    raise AssertionError("no worker has it")


def locked_buffers(site: Site, client: socket.socket) -> int:
    """Which buffers the kernel leaves as they are (SO_BUF_LOCK) of our socket to this client."""
    return int.from_bytes(sock_option(site, client, SO_BUF_LOCK, 4), sys.byteorder)


@pytest.mark.parametrize("timestamps", [1, 0])
def test_a_peer_of_a_pair_to_be_spliced_is_promised_no_more(
    start_forwarder: StartForwarder, timestamps: int
) -> None:
    """What is under way to us at that moment may find no room at the other end.

    A pair that cannot be spliced, because one connection alone has timestamps, is released again.
    """
    late = "handover: {after_bytes: 256KiB, after_round_trips: 1000000, after: 1h}"
    with topology() as hosts:
        hosts.client.set(ipv4__tcp_timestamps=timestamps)
        with hosts.forwarder.entered():
            own = Site(hosts, start_forwarder(config(late, datapath="auto")))
        with own.pair(hosts.way(), 4) as (client, server):
            assert locked_buffers(own, client) == 0
            exchange(client, server, 50_000)
            assert locked_buffers(own, client) == SOCK_RCVBUF_LOCK
            exchange(client, server, 200_000)
            if not timestamps:
                wait_for(lambda: locked_buffers(own, client) == 0, "as it was")
                return
            wait_for(lambda: spliced_id(own, client), "spliced")

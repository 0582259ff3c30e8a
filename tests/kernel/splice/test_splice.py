"""The splice datapath where it differs from the others: loss, resets of ours, ports that come back.

What it has in common with them is in test_conformance.py and test_differential.py.
"""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.datapath.proof.scenarios import (
    both_ways_in_pieces,
    half_closed_by_the_server,
    half_closed_goes_on,
    joined_in_mid_stream,
)
from pyforwarder.datapath.sockmap.maps import KernelMaps
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.splicing import Splicing
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers import daemon as daemons
from tests.helpers.faults import faults
from tests.helpers.netns import narrow_the_network, private_network
from tests.helpers.peers import (
    Waiting,
    ends_with_reset,
    pair_through,
    pattern,
    read_exactly,
    reset,
)
from tests.helpers.plays import both_close_at_once, fin_with_data, round_trips, server_closes_first
from tests.helpers.spliced_on_loopback import CONFIG, exchange, wait_until_spliced
from tests.helpers.stage import SLOTS, stage
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from pyforwarder.datapath.proof.rig import Rig
    from tests.helpers.daemon import Daemon, Place
    from tests.kernel.conftest import StartForwarder


@pytest.fixture
def forwarder(start_forwarder: StartForwarder) -> Daemon:
    return start_forwarder(CONFIG)


def test_flush_resets_both_ends(forwarder: Daemon) -> None:
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
        wait_until_spliced(forwarder)
        exchange(client, server)
        assert forwarder.command("flush", "--all").returncode == 0
        assert ends_with_reset(client) == b""
        assert ends_with_reset(server) == b""
    forwarder.wait_for_no_pairs()


def test_flush_resets_both_ends_while_bytes_wait_unread(forwarder: Daemon) -> None:
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
        wait_until_spliced(forwarder)
        client.sendall(pattern(100_001))
        server.sendall(pattern(50_001))
        assert forwarder.command("flush", "--all").returncode == 0
        for end, sent in ((server, 100_001), (client, 50_001)):
            got = ends_with_reset(end)
            assert got == pattern(sent)[: len(got)]


def test_flush_resets_a_half_closed_pair(forwarder: Daemon) -> None:
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
        wait_until_spliced(forwarder)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        forwarder.wait_for_pair(lambda row: row["state"] == "half-closed")
        server.sendall(pattern(1001))
        assert read_exactly(client, 1001) == pattern(1001)
        assert forwarder.command("flush", "--all").returncode == 0
        assert ends_with_reset(client) == b""
        wait_for(lambda: is_reset(server), "a reset")
    forwarder.wait_for_no_pairs()


def test_bytes_are_counted_once_and_without_the_instruction(forwarder: Daemon) -> None:
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server, 777)
        wait_until_spliced(forwarder)
        for _ in range(23):
            exchange(client, server, 100_003)
        (row,) = forwarder.pairs()
        assert (row["up_bytes"], row["down_bytes"]) == (777 + 23 * 100_003,) * 2


def test_ports_of_an_ended_pair_serve_again(forwarder: Daemon) -> None:
    with Waiting() as waiting, socket.socket() as chooser:
        chooser.bind(("127.0.0.1", 0))
        port = chooser.getsockname()[1]
        chooser.close()
        for _ in range(5):
            client = dial_from(port, forwarder.address)
            with client, dial_on(client, waiting) as server:
                exchange(client, server)
                wait_until_spliced(forwarder)
                exchange(client, server)
                reset(client)
                assert ends_with_reset(server) == b""
            forwarder.wait_for_no_pairs()


def dial_from(port: int, address: tuple[str, int]) -> socket.socket:
    client = socket.socket()
    client.settimeout(scaled_s(10))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(("127.0.0.1", port))
    client.connect(address)
    return client


def dial_on(client: socket.socket, waiting: Waiting) -> socket.socket:
    from tests.helpers.instruction import ACK, instruction
    from tests.helpers.peers import address_text

    client.sendall(instruction(address_text(waiting.address)))
    server = waiting.accept()
    assert read_exactly(client, len(ACK)) == ACK
    return server


@pytest.mark.each_attachment
def test_pairs_of_a_killed_worker_go_on(forwarder: Daemon) -> None:
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server, 777)
        wait_until_spliced(forwarder)
        exchange(client, server, 100_003)
        (before,) = forwarder.pairs()
        for worker in forwarder.workers():
            os.kill(worker.pid, signal.SIGKILL)
        exchange(client, server, 50_001)
        forwarder.wait_for_line("adopted")
        exchange(client, server, 1001)
        (row,) = forwarder.pairs()
        assert row["reason"] == "it was spliced before this daemon or worker started"
        same = ("id", "state", "datapath", "client", "listener", "source", "server", "rule")
        assert [row[name] for name in same] == [before[name] for name in same]
        total = 777 + 100_003 + 50_001 + 1001
        assert (row["up_bytes"], row["down_bytes"]) == (total, total)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.sendall(b"last")
        server.close()
        assert read_exactly(client, 4) == b"last"
        assert client.recv(1) == b""
    forwarder.wait_for_no_pairs()
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)


@pytest.mark.each_attachment
def test_an_up_that_fails_leaves_what_goes_on_alone(
    start_forwarder: StartForwarder, place: Place
) -> None:
    forwarder = start_forwarder(CONFIG)
    with (
        pair_through(forwarder.address) as (client, server),
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        exchange(client, server, 777)
        wait_until_spliced(forwarder)
        forwarder.kill()
        port = taken.getsockname()[1]
        failing = daemons.start(place, CONFIG.replace(".1:0", f".1:{port}"), wait=False)
        try:
            assert failing.wait(deadline_s=daemons.START_DEADLINE_S) == 1
        finally:
            failing.close()
        exchange(client, server, 100_003)
        forwarder = start_forwarder(CONFIG)
        exchange(client, server, 1001)
        (row,) = forwarder.pairs()
        total = 777 + 100_003 + 1001
        assert (row["datapath"], row["up_bytes"], row["down_bytes"]) == ("splice", total, total)
    forwarder.wait_for_no_pairs()


def is_reset(end: socket.socket) -> bool:
    try:
        end.send(b"?")
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def test_a_client_without_timestamps_goes_another_way(forwarder: Daemon) -> None:
    setting = Path("/proc/sys/net/ipv4/tcp_timestamps")
    with Waiting() as waiting:
        setting.write_text("0")
        client = dial_from(0, forwarder.address)
        setting.write_text("1")
        with client, dial_on(client, waiting) as server:
            exchange(client, server)
            row = forwarder.wait_for_pair(lambda row: row["datapath"] == "sockmap")
            assert row["reason"] == ("not spliced: only one of the connections has TCP timestamps")
            exchange(client, server)


def test_a_listener_may_forbid_it(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(CONFIG.replace("bind:", "splice: off\n    bind:"))
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
        forwarder.wait_for_pair(lambda row: row["datapath"] == "sockmap")


@pytest.fixture(params=["wide", "narrow"])
def lossy_stage(request: pytest.FixtureRequest) -> Iterator[tuple[KernelMaps, Splicing]]:
    """Everything that splice needs, on a loopback that loses one packet in a hundred."""
    with private_network() as network, faults() as bad_network:
        if request.param == "narrow":
            narrow_the_network()
        maps = KernelMaps.load(workers=1, slots=SLOTS)
        splicing = Splicing(
            SpliceMaps.load(workers=1, slots=SLOTS, pairs_fd=maps.pairs_fd), workers=1
        )
        bad_network.set(seed=random.SystemRandom().randrange(1 << 32), lose=0.01)
        with bad_network.put_on((network, "lo")):
            yield maps, splicing
        splicing.close()
        maps.close()


# No reset: one that is lost comes no second time, without us neither.
PLAYS: Final = (
    both_ways_in_pieces,
    joined_in_mid_stream,
    server_closes_first,
    fin_with_data,
    round_trips,
    half_closed_goes_on,
    half_closed_by_the_server,
    both_close_at_once,
)


@pytest.mark.timeout(120)
def test_lost_packets_cost_no_byte_and_no_ending(
    lossy_stage: tuple[KernelMaps, Splicing],
) -> None:
    maps, splicing = lossy_stage
    for _ in range(3):
        for play in PLAYS:
            with stage("splice", maps, splicing) as rig:
                play(rig)
                assert was_spliced(rig), play.__name__


def was_spliced(rig: Rig) -> bool:
    return all(pair.kind is DatapathKind.SPLICE for pair in rig._pairs)

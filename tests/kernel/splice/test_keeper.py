"""A keeper of spliced pairs that hangs: stopped, so that it lives and answers nothing.

Nobody may wait for it but a moment, and nobody's bytes may get lost.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.datapath.proof.rig import Reader, Rig, RigPair
from pyforwarder.datapath.sockmap.maps import KernelMaps
from pyforwarder.datapath.splice import keeper_client
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.datapath import SpliceDatapath
from pyforwarder.datapath.splice.keeper_joining import Joining
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.splicing import Splicing
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.keepers import keeper_of, stopped
from tests.helpers.peers import pattern
from tests.helpers.spliced import DATAPATH, Site, config, exchange
from tests.helpers.stage import SLOTS, stage_with_keeper
from tests.helpers.survival import comes_to_be_spliced, rows
from tests.helpers.topology import topology
from tests.helpers.waiting import DEADLINE_S, stays, wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

VERSIONS: Final = (4, 6)
PAIRS: Final = 20
# All of these pairs together, the first of which waits for a quarter of a second. With a worker
# that waits for two it would be more; without any waiting it is a tenth.
MOST_S: Final = 1.8
HANGS_S: Final = 0.5
NO_KEEPER: Final = "not spliced: the process that does it did not answer"


@pytest.fixture
def site(start_forwarder: StartForwarder) -> Iterator[Site]:
    """One worker, so that all pairs wait where one does."""
    with topology() as hosts:
        with hosts.forwarder.entered():
            site = Site(hosts, start_forwarder(config("workers: 1")))
        yield site
        assert site.stats()["closed"].get("internal", 0) == 0


def open_pairs(
    site: Site, stack: contextlib.ExitStack, count: int = PAIRS
) -> tuple[list[tuple[socket.socket, socket.socket]], float]:
    """So many pairs whose bytes go both ways, and how long that took."""
    way = site.topology.way()
    began_s = time.monotonic()
    pairs = [stack.enter_context(site.pair(way, VERSIONS[n % 2])) for n in range(count)]
    return pairs, time.monotonic() - began_s


def test_a_keeper_that_hangs_keeps_nobody_waiting_and_is_replaced(site: Site) -> None:
    """Spliced pairs go on and end, new ones are copied meanwhile and spliced by another."""
    with contextlib.ExitStack() as stack:
        kept, ending = (
            stack.enter_context(site.spliced(site.topology.way(), version)) for version in VERSIONS
        )
        keeper = keeper_of(site.forwarder)
        with stopped(keeper):
            pairs, took_s = open_pairs(site, stack)
            assert took_s < MOST_S
            for pair in pairs:
                row = site.row(pair[0])
                assert row is not None
                assert (row["datapath"], row["reason"]) == ("copy", NO_KEEPER)
                exchange(*pair, 100_003)
            client, server, pair_id = ending
            client.close()
            assert server.recv(1) == b""
            server.close()
            site.wait_until_gone(pair_id)
            site.forwarder.wait_for_line(f"error: splice_keeper_hangs pid={keeper.pid}")
            site.forwarder.wait_for_line("splice_keeper_died")
        wait_for(lambda: comes_to_be_spliced(site), "pairs are spliced again")
        assert keeper_of(site.forwarder) != keeper
        for client, _ in pairs:
            site.wait_until_spliced(client)
        for client, server in (kept[:2], *pairs):
            exchange(client, server, 100_003)
    site.wait_for_no_pairs()


def test_a_keeper_that_goes_on_is_asked_again_at_once(site: Site) -> None:
    """It finds what it was asked, and leaves it; it is asked for that pair once more, soon."""
    supervisor = psutil.Process(site.forwarder.process.pid)
    with contextlib.ExitStack() as stack:
        keeper = keeper_of(site.forwarder)
        with stopped(supervisor):  # so that it is not replaced
            with stopped(keeper):
                before, took_s = open_pairs(site, stack)
                assert took_s < MOST_S
            # Nothing tells when it has read what it found.
            wait_for(lambda: keeper.status() == psutil.STATUS_SLEEPING, "it has gone on")
            after, _ = open_pairs(site, stack)
        for client, server in after:
            row = site.row(client)
            assert row is not None
            assert row["datapath"] == DATAPATH, row
            exchange(client, server, 100_003)
        for client, server in before:
            site.wait_until_spliced(client)
            exchange(client, server, 100_003)
        # The supervisor, too, was stopped for longer than a keeper may be: that proves nothing.
        stays(lambda: keeper_of(site.forwarder) == keeper, "the same keeper", for_s=5.0)
    site.wait_for_no_pairs()


def test_pairs_of_a_worker_that_dies_while_the_keeper_hangs(site: Site) -> None:
    """Its successor comes when there is a keeper that can give them to it."""
    with contextlib.ExitStack() as stack:
        way = site.topology.way()
        pairs = [stack.enter_context(site.spliced(way, version)) for version in VERSIONS * 3]
        for client, server, _ in pairs:
            exchange(client, server)  # so that nothing of before the switch is under way any more
        # And the worker has seen that, before it came to another pair.
        wait_for(lambda: comes_to_be_spliced(site), "another pair is spliced")
        wait_for(lambda: len(rows(site)) == len(pairs), "the other pair is gone")
        (worker,) = site.forwarder.workers()
        with stopped(keeper_of(site.forwarder)):
            worker.kill()
            site.forwarder.wait_for_line("worker_died")
            for client, server, _ in pairs:
                exchange(client, server)
            site.forwarder.wait_for_line("adopted .*pairs=6")
        assert sorted(row["id"] for row in rows(site)) == sorted(pair[2] for pair in pairs)
        for client, server, _ in pairs:
            exchange(client, server)
    site.wait_for_no_pairs()
    wait_for(lambda: comes_to_be_spliced(site), "new pairs are spliced")


def test_a_worker_that_reads_no_answers_keeps_no_other_waiting(network: None) -> None:
    del network
    with contextlib.ExitStack() as stack:
        maps = KernelMaps.load(workers=2, slots=SLOTS)
        stack.callback(maps.close)
        splicing = Splicing(
            SpliceMaps.load(workers=2, slots=SLOTS, pairs_fd=maps.pairs_fd), workers=2
        )
        stack.callback(splicing.close)
        sock = splicing.keeper.clients[0]
        sock.settimeout(DEADLINE_S)
        request = json.dumps({"do": "clear", "n": 1, "until": time.monotonic() + DEADLINE_S})
        for _ in range(1000):  # a queue takes some hundreds
            sock.send(request.encode())
        assert splicing.client(1).ask("adopt").keys() == {"n"}


@contextlib.contextmanager
def hanging(maps: KernelMaps, where: object, name: str, patch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A stage whose keeper hangs in that function for longer than a worker waits."""
    usual = getattr(where, name)

    def hangs(*words: Any) -> Any:
        time.sleep(scaled_s(3 * HANGS_S))
        return usual(*words)

    patch.setattr(keeper_client, "_READ_TIMEOUT_S", HANGS_S)
    patch.setattr(keeper_client, "_BEGIN_TIMEOUT_S", HANGS_S)
    with stage_with_keeper(maps, patch, where, name, hangs) as rig:
        yield rig
        assert isinstance(rig.datapath, SpliceDatapath)
        assert rig.datapath._keeper.finish(DEADLINE_S)  # it goes on


def go_through(rig: Rig, pair: RigPair, client: socket.socket, server: socket.socket) -> None:
    """What waits and more both ways, and both ends."""
    data = pattern(100_003)
    readers = [Reader("client", client), Reader("server", server)]
    for sock in (client, server):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    rig.finish(pair, *readers)
    assert [reader.ended for reader in readers] == ["eof", "eof"]
    assert bytes(readers[0].data) == data
    assert bytes(readers[1].data) == b"while it hangs" + data
    assert pair.reason is None


def test_no_pair_begins_after_its_worker_has_given_the_keeper_up(
    maps: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs right before, with all that it looks at behind it, and then goes on."""
    with hanging(maps, splice_sockets, "clock", monkeypatch) as rig:
        client, pair, server = rig.connect()
        rig.copy(pair)
        client.sendall(b"while it hangs")
        assert rig.datapath.join(pair) is PairReason.NO_KEEPER
        time.sleep(scaled_s(8 * HANGS_S))  # by then it has gone on
        assert pair.datapath is rig.copying
        go_through(rig, pair, client, server)


def test_a_pair_that_has_begun_goes_on_though_its_keeper_hangs(
    maps: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs right behind that, and does not say so in time."""
    with hanging(maps, Joining, "mute", monkeypatch) as rig:
        client, pair, server = rig.connect()
        rig.copy(pair)
        client.sendall(b"while it hangs")  # unread, as the pair begins
        assert rig.datapath.join(pair) is None
        assert pair.kind is DatapathKind.SPLICE
        go_through(rig, pair, client, server)

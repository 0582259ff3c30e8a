"""Pairs that are switched in mid-stream while their keeper is stopped, goes on, or is killed.

A pair stands still while the keeper is asked for it, and goes on with any answer, or without
one. helpers/transfers.c is both ends and compares each byte; PYFORWARDER_TEST_SEED=NUMBER plays the
same once more.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from tests.helpers import transfers as judge
from tests.helpers.keepers import keeper_of, stopped
from tests.helpers.peers import (
    Waiting,
    dial_through,
    ends_with_reset,
    pattern,
    read_exactly,
    read_to_end,
    reset,
)
from tests.helpers.spliced import Site, config, exchange
from tests.helpers.survival import comes_to_be_spliced
from tests.helpers.topology import topology
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.transfers import Clients, Transfers
    from tests.kernel.conftest import StartForwarder

SEED: Final = int(
    os.environ.get("PYFORWARDER_TEST_SEED") or random.SystemRandom().randrange(1 << 32)
)
# Each asks for its switch while bytes move both ways, and no two at quite the same moment.
MID_STREAM: Final = """
handover: {after_bytes: 300KiB, splice_after_bytes: 300KiB, after_round_trips: 1000000, after: 1h}
"""
COUNT: Final = 300
# Of these, by how many it must be proven; the others ended before a keeper was there for them.
LEAST_SPLICED: Final = 10
MOST_TURNS: Final = 5
MOST_RUNS: Final = 8
# Less and more than a worker waits until the keeper has read, and until a pair may begin.
STOPS_S: Final = (0.02, 0.1, 0.3, 0.6, 1.2)


@pytest.fixture
def site(start_forwarder: StartForwarder) -> Iterator[Site]:
    """One worker, so that all ask over the same socket."""
    with topology() as hosts:
        with hosts.forwarder.entered():
            site = Site(hosts, start_forwarder(config("workers: 1" + MID_STREAM)))
        yield site


def trouble(
    site: Site, running: Clients, rng: random.Random, turns: Iterator[int], *, kills: bool
) -> Counter[str]:
    """Stop and continue the keeper, or kill it, until the clients are through; how often."""
    done: Counter[str] = Counter()
    while running.process.poll() is None:
        turn = next(turns)
        with contextlib.suppress(ValueError, psutil.NoSuchProcess):  # there is none just now
            keeper = keeper_of(site.forwarder)
            if kills and turn % 3 == 1:
                # Stopped first: it dies with questions open as a rule.
                keeper.suspend()
                time.sleep(rng.choice(STOPS_S[:2]))
                keeper.kill()
                done["killed"] += 1
            else:
                keeper.suspend()
                try:
                    time.sleep(rng.choice(STOPS_S))
                finally:
                    keeper.resume()
                done["stopped"] += 1
        time.sleep(rng.choice((0.05, 0.2, 0.4)))
    return done


def changes(after: dict[str, Any], before: dict[str, Any]) -> dict[str, int]:
    return {
        name: number - before.get(name, 0)
        for name, number in after.items()
        if number != before.get(name, 0)
    }


@pytest.mark.timeout(240)  # gigabytes, which others on this host may take the processors from
@pytest.mark.parametrize("kills", [False, True], ids=["stopped", "killed"])
def test_bytes_in_mid_stream_are_whole_when_the_keeper_is_stopped_or_killed(
    site: Site, transfers: Transfers, *, kills: bool
) -> None:
    rng = random.Random(SEED)
    turns = itertools.count()
    site.topology.wire("wide")
    way = site.topology.way()
    before = site.stats()
    done: Counter[str] = Counter()
    up = down = runs = spliced = 0
    options = {"seed": SEED, "wait": 0, "parallel": 60, "exactly": 4_000_003, "calm": 1}
    # A quick host is through before much has become of the keeper.
    while done["stopped"] < 2 or done["killed"] < kills or spliced < LEAST_SPLICED:
        runs += 1
        assert runs <= MOST_RUNS, (done, spliced)
        with transfers.server(way.server) as server:
            to, via = (way.destination[4], server.port), site.via(way, 4)
            with transfers.clients(way.client, COUNT, to=to, via=via, **options) as running:
                done += trouble(site, running, rng, turns, kills=kills)
                clients = running.wait()
            servers = server.wait()
        bad = judge.faults(COUNT, clients, servers)
        assert not bad, f"seed {SEED}, {done}: {len(bad)} faults\n" + "\n".join(bad[:20])
        carried = judge.totals(clients)
        up, down = up + carried[0], down + carried[1]
        spliced = site.stats()["joined"].get("splice", 0) - before["joined"].get("splice", 0)
    site.wait_for_no_pairs()
    after = site.stats()
    assert changes(after["closed"], before["closed"]) == {"finished": runs * COUNT}
    assert (after["bytes_up"] - before["bytes_up"], after["bytes_down"] - before["bytes_down"]) == (
        up,
        down,
    )
    wait_for(lambda: comes_to_be_spliced(site), "pairs are spliced again")


# A few pairs, each looked at


@pytest.fixture
def eager(start_forwarder: StartForwarder) -> Iterator[Site]:
    """One worker; the keeper is asked for pairs of IPv4 as they are joined, others are copied."""
    head, name, tail = config("workers: 1").partition("  - name: main6")
    text = head + name + tail.replace("allow: [any]", "allow: [any], datapath: copy", 1)
    with topology() as hosts:
        with hosts.forwarder.entered():
            site = Site(hosts, start_forwarder(text))
        yield site
        assert site.stats()["closed"].get("internal", 0) == 0
        site.wait_for_no_pairs()


@contextlib.contextmanager
def asked_for(site: Site) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(client, server), just joined; while the keeper is stopped no byte goes through."""
    way = site.topology.way()
    with contextlib.ExitStack() as stack:
        with way.server.entered():
            waiting = stack.enter_context(Waiting(way.destination[4]))
        with way.client.entered():
            client = stack.enter_context(dial_through(site.via(way, 4), waiting.address))
        yield client, stack.enter_context(waiting.accept())


def has_bytes(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def test_other_pairs_go_on_while_the_keeper_is_asked(eager: Site) -> None:
    """A message there and back is through before the pair that is asked for moves again."""
    with eager.pair(eager.topology.way(), 6) as (client, server):
        for _ in range(MOST_TURNS):  # on a slow host a second may pass meanwhile
            with contextlib.ExitStack() as stack:
                with stopped(keeper_of(eager.forwarder)):
                    late, late_server = stack.enter_context(asked_for(eager))
                    late.sendall(b"meanwhile")
                    exchange(client, server)
                    stood_still = not has_bytes(late_server)
                assert read_exactly(late_server, 9) == b"meanwhile"
            if stood_still:
                return
    raise AssertionError("the others waited, too")


@pytest.mark.parametrize("turn", range(3))
def test_what_happens_while_the_keeper_is_asked(eager: Site, turn: int) -> None:
    """Bytes, ends and resets of either side, and a flush: each does what it always does."""
    data = pattern(30_001)
    with contextlib.ExitStack() as stack:
        with stopped(keeper_of(eager.forwarder)):
            pairs = [stack.enter_context(asked_for(eager)) for _ in range(6)]
            talks, up_ends, down_ends, is_reset, resets, flushed = pairs
            for end in talks:
                end.sendall(data)
            for end in (up_ends[0], down_ends[1]):
                end.sendall(data)
                end.shutdown(socket.SHUT_WR)
            reset(is_reset[0])
            reset(resets[1])
            row = wait_for(functools.partial(eager.row, flushed[0]), "it is shown")
            assert row is not None
            eager.forwarder.control().flush([row["id"]])
            time.sleep(STOPS_S[turn])
        for end in talks:
            assert read_exactly(end, len(data)) == data
        assert read_to_end(up_ends[1]) == data
        assert read_to_end(down_ends[0]) == data
        for one, other in (down_ends, up_ends[::-1]):  # the other half is open still
            one.sendall(data)
            assert read_exactly(other, len(data)) == data
        for end in (is_reset[1], resets[0], *flushed):
            assert ends_with_reset(end) == b""
    closed = {"client_reset": 1, "server_reset": 1, "flushed": 1}
    wait_for(lambda: eager.stats()["open"] == 0, "all have ended")
    assert {name: eager.stats()["closed"].get(name, 0) for name in closed} == closed


def test_no_end_waits_for_a_keeper_that_hangs(eager: Site) -> None:
    """What it was asked is unread, and holds the sockets of pairs that have been copied since."""
    supervisor = psutil.Process(eager.forwarder.process.pid)
    keeper = keeper_of(eager.forwarder)
    # The supervisor, too, so that the keeper is not replaced.
    with stopped(supervisor), stopped(keeper), contextlib.ExitStack() as stack:
        up_first, down_first, is_reset, resets = [
            stack.enter_context(asked_for(eager)) for _ in range(4)
        ]
        for one, other in (up_first, down_first[::-1]):
            for sender, receiver in ((one, other), (other, one)):
                sender.sendall(b"last")
                sender.shutdown(socket.SHUT_WR)
                assert read_to_end(receiver) == b"last"
        reset(is_reset[0])
        assert ends_with_reset(is_reset[1]) == b""
        reset(resets[1])
        assert ends_with_reset(resets[0]) == b""


def test_a_daemon_stops_while_its_keeper_is_asked(start_forwarder: StartForwarder) -> None:
    with topology() as hosts, contextlib.ExitStack() as stack:
        with hosts.forwarder.entered():
            site = Site(hosts, start_forwarder(config("workers: 1")))
        stack.enter_context(stopped(keeper_of(site.forwarder)))
        ends = stack.enter_context(asked_for(site))
        ends[0].sendall(b"unread")
        assert site.forwarder.stop() == 0
        for end in ends:
            assert ends_with_reset(end) == b""

"""Workers and the keeper die while a daemon drains: what outlives them goes on, and has an owner.

What cannot go on is reset at both ends, also where they only wait; all is counted once; and the
daemon ends when its pairs have, or at its deadline.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.daemon import COMMAND, leftovers
from tests.helpers.draining import going_down, state
from tests.helpers.keepers import keeper_of
from tests.helpers.peers import address_text, dial, pattern, read_exactly
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    import psutil

    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

    Start = Callable[[str], "Play"]

COPY: Final = ("127.0.0.1", 9711)
SOCKMAP: Final = ("127.0.0.1", 9712)
SPLICE: Final = ("127.0.0.1", 9713)
EXPRESS: Final = ("127.0.0.1", 9714)
UDP: Final = ("127.0.0.1", 9715)
# What has no socket of its worker's that the peers' bytes go through.
OUTLIVING: Final = (SPLICE, EXPRESS)
DATAPATHS: Final = {COPY: "copy", SOCKMAP: "sockmap", SPLICE: "splice", EXPRESS: "splice"}

CONFIG: Final = """
workers: 1
listeners:
  - {name: copy, bind: 127.0.0.1:9711, datapath: copy, rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: sockmap, bind: 127.0.0.1:9712, datapath: sockmap,
     rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: splice, bind: 127.0.0.1:9713, datapath: splice,
     rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: express, bind: 127.0.0.1:9714, datapath: express,
     rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: udp, bind: 127.0.0.1:9715, protocol: udp, datapath: splice,
     rules: [{match: any, to: "127.0.0.1:UDP"}]}
express: {ports: 64}
timeouts: {drain: DRAIN}
"""


@dataclass(slots=True)
class Pair:
    """Both ends, and how many bytes have gone each way."""

    client: socket.socket
    server: socket.socket
    id: int
    carried_bytes: int = 0

    def exchange(self, size: int = 5003) -> None:
        """The same bytes there and back."""
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            sender.sendall(pattern(size))
            assert read_exactly(receiver, size) == pattern(size)
        self.carried_bytes += size

    def end(self) -> None:
        """Both ends say so, in order."""
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            sender.shutdown(socket.SHUT_WR)
            assert receiver.recv(1) == b""

    def is_reset(self) -> bool:
        """Whether both ends have been reset, though they say nothing; waits for that."""
        for sock in (self.client, self.server):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        return True


@dataclass(slots=True)
class Play:
    """A daemon with one worker, and who speaks through it."""

    daemon: Daemon
    listener: socket.socket  # the server's
    udp: socket.socket  # the same
    stack: contextlib.ExitStack
    start: Start  # another daemon, at the same place

    def rows(self) -> dict[int, str]:
        """Pairs and sessions that are joined, and where they are."""
        return {r["id"]: r["datapath"] for r in self.daemon.look() if r["state"] == "joined"}

    def pair(self, address: tuple[str, int]) -> Pair:
        """One that has come to the datapath of its listener."""
        client = self.stack.enter_context(dial(address))
        client.sendall(b"first")
        server, _ = self.listener.accept()
        self.stack.enter_context(server)
        server.settimeout(DEADLINE_S)
        assert read_exactly(server, 5) == b"first"
        server.sendall(b"first")
        assert read_exactly(client, 5) == b"first"
        pair = Pair(client, server, 0, 5)
        text = address_text(client.getsockname())

        def look() -> Any:
            pair.exchange(100)
            rows = [row for row in self.daemon.look() if row["client"] == text]
            return rows and rows[0]["datapath"] == DATAPATHS[address] and rows[0]

        row = wait_for(look, f"on {DATAPATHS[address]}", deadline_s=scaled_s(30.0))
        pair.id = row["id"]
        return pair

    @property
    def worker(self) -> psutil.Process:
        """The only one."""
        (worker,) = self.daemon.workers()
        return worker

    def lines(self, pair_id: int) -> list[str]:
        """What the log says of the end of a pair, all daemons' lines."""
        found = re.compile(rf" closed (.* )?id={pair_id} ")
        return [line for line in self.daemon.output().splitlines() if found.search(line)]

    def stats(self) -> Any:
        """What `show stats --json` says."""
        return self.daemon.look("stats")

    def closed(self) -> dict[str, int]:
        """How many have ended so far, by reason."""
        return {reason: count for reason, count in self.stats()["closed"].items() if count}

    def assert_told_once(self, pair: Pair, reason: str) -> None:
        """The log has its end once, with all of its bytes."""
        (line,) = self.lines(pair.id)
        words = (f"reason={reason} ", f"up_bytes={pair.carried_bytes} ")
        assert all(word in line for word in (*words, f"down_bytes={pair.carried_bytes} ")), line


@pytest.fixture
def start(start_forwarder: StartForwarder) -> Iterator[Start]:
    """Start a daemon whose drain lasts so long at most."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(DEADLINE_S)
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(DEADLINE_S)
        text = CONFIG.replace("TCP", str(listener.getsockname()[1]))
        text = text.replace("UDP", str(udp.getsockname()[1]))

        def start(drain: str) -> Play:
            daemon = start_forwarder(text.replace("DRAIN", drain))
            return Play(daemon, listener, udp, stack, start)

        yield start


# Killed, or stopped until it is.
LOST: Final = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])


@LOST
@pytest.mark.timeout(scaled_s(240))
def test_what_outlives_a_worker_lost_in_a_drain_goes_on_and_is_counted(
    start: Start, how: signal.Signals
) -> None:
    """Others are reset at once. The daemon ends when the last has ended, in order."""
    at = start("300s")
    ending = [at.pair(address) for address in (COPY, SOCKMAP)]
    going_on = [at.pair(address) for address in OUTLIVING for _ in range(2)]
    for pair in (*ending, *going_on):
        pair.exchange()
    with going_down(at.daemon) as down:
        for pair in (*ending, *going_on):
            pair.exchange()
        lost = at.worker
        lost.send_signal(how)
        line = at.daemon.wait_for_line(" worker_died ")
        assert f"pid={lost.pid} " in line
        assert f" pairs_reset={len(ending)} " in line
        assert all(pair.is_reset() for pair in ending)
        for pair in going_on:
            pair.exchange()
        wait_for(
            lambda: at.rows() == {pair.id: "splice" for pair in going_on}, "another has them all"
        )
        assert at.worker.pid != lost.pid
        assert state(at.daemon) == "draining"
        for address in DATAPATHS:
            with socket.socket() as sock:
                assert sock.connect_ex(address) != 0, "it accepts nobody"
        assert at.closed() == {"internal": len(ending)}
        # The next one is as mortal. It may come after a pause, for which all goes on.
        at.worker.send_signal(how)
        at.daemon.wait_for_line(" worker_died ", count=2)
        for pair in going_on:
            pair.exchange()
        wait_for(lambda: len(at.rows()) == len(going_on), "a third has them")
        first, *rest = going_on
        first.end()
        wait_for(lambda: len(at.rows()) == len(rest), "one is gone")
        assert at.closed() == {"internal": len(ending), "finished": 1}
        assert down.poll() is None
        for pair in rest:
            pair.exchange()
            pair.end()
        assert at.daemon.wait() == 0
    assert down.returncode == 0
    for pair in going_on:
        at.assert_told_once(pair, "finished")
    assert leftovers(at.daemon.place) == []


@pytest.mark.timeout(scaled_s(240))
@pytest.mark.parametrize("also", ["the keeper alone", "a worker, too", "a worker before it"])
def test_a_keeper_that_dies_in_a_drain_is_replaced(start: Start, also: str) -> None:
    """Its pairs go on meanwhile, and end with the next one's help."""
    at = start("300s")
    pairs = [at.pair(address) for address in OUTLIVING for _ in range(2)]
    with going_down(at.daemon) as down:
        keeper = keeper_of(at.daemon)
        if also == "a worker before it":
            at.worker.kill()
        keeper.kill()
        if also == "a worker, too":
            at.worker.kill()
        at.daemon.wait_for_line(" splice_keeper_died")
        for pair in pairs:
            pair.exchange()
        pairs[0].end()
        for pair in pairs[1:]:
            pair.exchange()
        wait_for(lambda: len(at.rows()) == len(pairs) - 1, "the other pair is gone")
        assert at.closed() == {"finished": 1}
        # Both ends of one that only waits hear of it, by another keeper.
        flushed = pairs[1]
        assert at.daemon.control().flush([flushed.id])["flushed"] == [flushed.id]
        assert flushed.is_reset()
        for pair in pairs[2:]:
            pair.exchange()
            pair.end()
        assert at.daemon.wait() == 0
    assert down.returncode == 0
    at.assert_told_once(flushed, "flushed")
    for pair in pairs[2:]:
        at.assert_told_once(pair, "finished")
    assert leftovers(at.daemon.place) == []


@LOST
@pytest.mark.timeout(scaled_s(240))
def test_ends_that_only_wait_are_reset_at_the_deadline_though_their_worker_was_lost(
    start: Start, how: signal.Signals
) -> None:
    """The deadline is the daemon's, also if another process has died meanwhile."""
    at = start("12s")
    pairs = [at.pair(address) for address in OUTLIVING for _ in range(2)]
    with going_down(at.daemon) as down:
        at.worker.send_signal(how)
        at.daemon.wait_for_line(" adopted ")
        assert all(pair.is_reset() for pair in pairs)
        assert at.daemon.wait() == 0
    assert down.returncode == 0
    assert f" resetting pairs={len(pairs)}" in at.daemon.output()
    for pair in pairs:
        at.assert_told_once(pair, "shutdown")
    assert leftovers(at.daemon.place) == []


@pytest.mark.timeout(scaled_s(240))
@pytest.mark.parametrize("lost", ["worker", "keeper", "both"])
def test_a_second_down_ends_a_drain_at_once_also_while_a_replacement_is_due(
    start: Start, lost: str
) -> None:
    """Ends that only wait are reset then, too."""
    at = start("300s")
    pairs = [at.pair(address) for address in OUTLIVING for _ in range(2)]
    with going_down(at.daemon):
        if lost in ("keeper", "both"):
            keeper_of(at.daemon).kill()
            at.daemon.wait_for_line(" splice_keeper_died")
        if lost in ("worker", "both"):
            at.worker.kill()
            at.daemon.wait_for_line(" worker_died ")
        if lost == "worker":  # the next one dies so soon that there is a pause
            at.daemon.wait_for_line(" adopted ")
            at.worker.kill()
            # or it had not yet begun
            at.daemon.wait_for_line(" worker_(died|start) ", count=2)
        at.daemon.signal(signal.SIGTERM)
        assert all(pair.is_reset() for pair in pairs)
        assert at.daemon.wait() == 0
    if lost == "worker":
        assert f" resetting pairs={len(pairs)}" in at.daemon.output()
    for pair in pairs:
        at.assert_told_once(pair, "shutdown")
    assert leftovers(at.daemon.place) == []


@pytest.mark.timeout(scaled_s(240))
def test_a_keeper_that_dies_while_pairs_are_reset_is_replaced_at_once(start: Start) -> None:
    """It was asked to reset them, and has not read that. Ends that only wait hear of it."""
    at = start("300s")
    pairs = [at.pair(address) for address in OUTLIVING for _ in range(2)]
    with going_down(at.daemon):
        keeper = keeper_of(at.daemon)
        keeper.suspend()
        at.daemon.signal(signal.SIGTERM)
        at.daemon.wait_for_line(f" resetting pairs={len(pairs)}")
        keeper.kill()
        assert all(pair.is_reset() for pair in pairs)
        assert at.daemon.wait() == 0
    for pair in pairs:
        at.assert_told_once(pair, "shutdown")
    assert leftovers(at.daemon.place) == []


@pytest.mark.timeout(scaled_s(240))
@pytest.mark.parametrize("lost", ["worker", "keeper", "both", "worker twice"])
def test_the_next_daemon_goes_on_with_what_has_just_lost_its_worker(
    start: Start, lost: str
) -> None:
    """`up` comes while a replacement is made, or is due."""
    at = start("300s")
    pairs = [at.pair(address) for address in OUTLIVING for _ in range(2)]
    with going_down(at.daemon) as down:
        if lost in ("keeper", "both"):
            keeper_of(at.daemon).kill()
        if lost != "keeper":
            at.worker.kill()
        if lost == "worker twice":
            at.daemon.wait_for_line(" adopted ")
            at.worker.kill()
        after = at.start("300s")
        assert at.daemon.wait() == 0
    assert down.returncode == 0
    for pair in pairs:
        pair.exchange()
    wait_for(lambda: after.rows() == {pair.id: "splice" for pair in pairs}, "it has them all")
    for pair in pairs:
        pair.exchange()
        pair.end()
    wait_for(lambda: not after.rows(), "they have ended")
    for pair in pairs:
        assert at.lines(pair.id) == []
        after.assert_told_once(pair, "finished")
    assert after.closed() == {"finished": len(pairs)}
    assert after.daemon.stop() == 0


@pytest.mark.timeout(scaled_s(240))
def test_sessions_of_a_worker_that_is_lost_as_a_drain_begins_end_with_it(
    start: Start,
) -> None:
    """A session has no end to wait for; the pairs do not wait for it, either."""
    at = start("300s")
    server = at.udp
    pair = at.pair(SPLICE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect(UDP)
        count = 0

        def is_spliced() -> bool:
            nonlocal count
            client.send(b"up")
            data, source = server.recvfrom(100)
            assert data == b"up"
            server.sendto(b"down", source)
            assert client.recv(100) == b"down"
            count += 1
            rows = [row for row in at.daemon.look() if row["listener"] == address_text(UDP)]
            return [row["datapath"] for row in rows] == ["splice"]

        wait_for(is_spliced, "the kernel has it", deadline_s=scaled_s(30.0))
        for _ in range(3):
            assert is_spliced()
        (row,) = (row for row in at.daemon.look() if row["listener"] == address_text(UDP))
        at.worker.suspend()
        with going_down(at.daemon) as down:
            at.daemon.wait_for_line(" worker_died ")
            line = at.daemon.wait_for_line(rf" closed .*id={row['id']} ")
            words = ("reason=shutdown ", "listener=udp ", f"up_bytes={2 * count} ")
            assert all(word in line for word in (*words, f"down_packets={count} ")), line
            assert at.closed() == {"shutdown": 1}
            assert list(at.rows()) == [pair.id]
            with contextlib.suppress(ConnectionRefusedError):
                client.send(b"late")
            pair.exchange()
            pair.end()
            assert at.daemon.wait() == 0
        assert down.returncode == 0
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recv(100)
    at.assert_told_once(pair, "finished")


@pytest.mark.timeout(scaled_s(240))
@pytest.mark.parametrize("lost", ["worker", "keeper"])
def test_short_connections_of_express_are_counted_though_a_process_dies_as_the_drain_begins(
    start: Start, lost: str
) -> None:
    """What is to be told of them is told to the one that comes in its place."""
    at = start("300s")
    stays = [at.pair(EXPRESS) for _ in range(2)]  # the first may have shown the way
    before = at.stats()["accepted"]
    process = at.worker if lost == "worker" else keeper_of(at.daemon)
    process.suspend()
    shorts = 10
    for _ in range(shorts):
        with dial(EXPRESS) as client:
            client.sendall(b"x")
            with at.listener.accept()[0] as server:
                server.settimeout(DEADLINE_S)
                assert read_exactly(server, 1) == b"x"
                client.shutdown(socket.SHUT_WR)
                assert server.recv(1) == b""
                server.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
    command = [*COMMAND, "down", "--instance", at.daemon.instance]
    with subprocess.Popen(command, env=at.daemon.place.environ()) as down:
        if lost == "keeper":  # the worker is asked to drain, and does not answer
            wait_for(lambda: state(at.daemon) != "serving", "it is about to drain")
            process.kill()
        wait_for(lambda: state(at.daemon) == "draining", "it drains")
        wait_for(lambda: at.stats()["accepted"] == before + shorts, "all are counted")
        assert at.closed() == {"finished": shorts}
        for pair in stays:
            pair.exchange()
            pair.end()
        assert at.daemon.wait() == 0
        assert down.wait(scaled_s(60.0)) == 0
    for pair in stays:
        at.assert_told_once(pair, "finished")

"""A daemon takes a running one's place: nobody who is connected, or connects, notices."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from pyforwarder.client import ControlClient
from pyforwarder.core import token
from pyforwarder.core.address import Address
from pyforwarder.errors import ControlError
from pyforwarder.runtime.instance import Instance
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.succession import Predecessor, find
from pyforwarder.worker.used_tokens import SHARES
from tests.helpers.daemon import START_DEADLINE_S
from tests.helpers.instruction import ACK, refusal
from tests.helpers.peers import (
    AnswerServer,
    address_text,
    dial,
    read_exactly,
    read_to_end,
    unused_port,
)
from tests.helpers.steady import steady_traffic
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.daemon import Daemon
    from tests.helpers.steady import Seen
    from tests.kernel.conftest import StartForwarder

COPY: Final = ("127.0.0.1", 9701)
AUTO: Final = ("127.0.0.1", 9702)
AUTO6: Final = ("::1", 9702)
COPY6: Final = ("::1", 9701)
UDP: Final = ("127.0.0.1", 9703)
UDP_SPLICED: Final = ("127.0.0.1", 9704)
SOCKMAP: Final = ("127.0.0.1", 9705)
PAIRS: Final = 3

CONFIG: Final = """
listeners:
  - {name: copy, bind: 127.0.0.1:9701, datapath: copy, rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: auto, bind: 127.0.0.1:9702, rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: copy6, bind: "[::1]:9701", datapath: copy, rules: [{match: any, to: "[::1]:TCP"}]}
  - {name: auto6, bind: "[::1]:9702", rules: [{match: any, to: "[::1]:TCP"}]}
  - {name: udp, bind: 127.0.0.1:9703, protocol: udp, datapath: copy,
     rules: [{match: any, to: "127.0.0.1:UDP"}]}
  - {name: udps, bind: 127.0.0.1:9704, protocol: udp, datapath: splice,
     rules: [{match: any, to: "127.0.0.1:UDP"}]}
  - {name: sockmap, bind: 127.0.0.1:9705, datapath: sockmap,
     rules: [{match: any, to: "127.0.0.1:TCP"}]}
handover: {after_round_trips: 1}
timeouts: {drain: 60s}
"""


class Lineage:
    """A daemon, and those that come after it; all have ended after `end`."""

    def __init__(self, first: Daemon) -> None:
        self.first = first
        self.place = first.place
        self.instance = Instance.named(first.instance, first.place.environ())

    @property
    def pid(self) -> int:
        """Of the one that serves now."""
        return int(self.instance.pid_file.read_text())

    def upgrade(self, *words: str) -> None:
        """Another takes its place."""
        before = self.pid
        done = self.first.command("upgrade", *words, deadline_s=START_DEADLINE_S)
        assert done.returncode == 0, done.stderr
        assert self.pid != before

    def fail_to_upgrade(self, *words: str) -> str:
        """Another does not take its place; why not."""
        before = self.pid
        done = self.first.command("upgrade", *words, deadline_s=START_DEADLINE_S)
        assert done.returncode != 0
        assert self.pid == before
        return done.stderr

    def shown(self) -> Counter[str]:
        """How many pairs are joined, by datapath."""
        return Counter(row["datapath"] for row in self.first.pairs() if row["state"] == "joined")

    @contextlib.contextmanager
    def offered(self) -> Iterator[Predecessor]:
        """As a successor that is this process, and ends after this block."""
        control = ControlClient(self.instance)
        successor = find(lambda fd: control.request("succeed", fds_sent=[fd]))
        try:
            yield successor
        finally:
            successor.discard()

    def end(self) -> None:
        """`down --now`: nothing is left of any of them."""
        done = self.first.command("down", "--now")
        assert done.returncode == 0, done.stderr
        wait_for(lambda: not self.place.processes(), "all have ended")
        assert self.first.wait() == 0


@pytest.fixture
def begin(start_forwarder: StartForwarder) -> Iterator[Any]:
    """Start the first of a lineage."""
    with contextlib.ExitStack() as stack:

        def start(config: str) -> Lineage:
            lineage = Lineage(start_forwarder(config))
            stack.callback(lineage.end)
            return lineage

        yield start


def configured(tcp_port: int, udp_port: int) -> str:
    return CONFIG.replace("TCP", str(tcp_port)).replace("UDP", str(udp_port))


def no_fault(seen: Seen) -> None:
    assert not seen.faults, f"{len(seen.faults)} faults: {seen.faults[:5]}"


def is_served() -> bool:
    """Whether a new connection is forwarded."""
    with dial(COPY) as sock:
        sock.sendall(b"hello")
        return read_exactly(sock, 5) == b"hello"


def play(begin: Any, upgrades: int, pairs: int, within_s: float = math.inf) -> Seen:
    """Upgrades and one that fails, under traffic of all kinds; what was seen of it.

    So many upgrades, or those for which there is time; two at least.
    """
    ends_s = time.monotonic() + within_s
    with steady_traffic() as (server, traffic, seen):
        config = configured(server.tcp_port, server.udp_port)
        lineage = begin(config)
        broken = lineage.place.run_dir.parent / "broken.yaml"
        broken.write_text(config.replace("match: any", "match: many"))
        for address in (COPY, AUTO, COPY6, AUTO6):
            traffic.hold(address, pairs, name=str(address))
        traffic.hold(SOCKMAP, pairs, name="sockmap")
        traffic.speak(UDP, 2, name="udp")
        traffic.speak(UDP_SPLICED, 2, name="spliced udp")
        wanted = Counter(copy=2 * pairs + 2, splice=2 * pairs + 2, sockmap=pairs)
        wait_for(lambda: lineage.shown() == wanted, f"{wanted}")
        ids = {row["id"] for row in lineage.first.pairs()}
        traffic.connect((COPY, AUTO, COPY6, AUTO6), 2)
        seen.longest_s = 0.0
        assert "match" in lineage.fail_to_upgrade("-c", str(broken))
        done = 0
        while done < upgrades and (done < 2 or time.monotonic() < ends_s):
            lineage.upgrade()
            done += 1
            wanted_new = seen.new + 9
            wait_for(lambda least=wanted_new: seen.new > least, "new connections")  # type: ignore[misc]
            no_fault(seen)

        def those_from_before() -> Counter[str]:
            rows = [row for row in lineage.first.pairs() if row["id"] in ids]
            assert not [row for row in rows if "the daemon before" in row["reason"]]
            return Counter(row["datapath"] for row in rows)

        assert those_from_before()["splice"] == wanted["splice"]
        wait_for(lambda: those_from_before() == wanted, f"all are where they were: {wanted}")
        assert len(seen.udp_sources) == 4, "a client of UDP has got another session"
        traffic.stop()
        no_fault(seen)
    return seen


@pytest.mark.timeout(scaled_s(240))
def test_pairs_go_on_and_nobody_is_refused_through_upgrades(begin: Any) -> None:
    """Copied and spliced pairs, UDP, new connections, and an upgrade that fails in between."""
    seen = play(begin, upgrades=2, pairs=PAIRS)
    print(f"longest wait {seen.longest_s * 1e3:.0f} ms in {seen.turns} turns, {seen.new} new")


@pytest.mark.soak
def test_pairs_go_on_through_many_upgrades(begin: Any, soak_s: float) -> None:
    seen = play(begin, upgrades=20, pairs=50, within_s=soak_s)
    print(f"longest wait {seen.longest_s * 1e3:.0f} ms in {seen.turns} turns, {seen.new} new")


@pytest.mark.timeout(scaled_s(240))
def test_a_successor_that_fails_at_any_step_changes_nothing(begin: Any) -> None:
    with steady_traffic() as (server, _traffic, _seen):
        lineage = begin(configured(server.tcp_port, server.udp_port))
        # It ends after each of the steps before the last one.
        with lineage.offered():
            pass
        assert is_served()
        with lineage.offered() as successor:
            assert successor.offer.workers == len(lineage.first.workers())
            assert successor.last_id() > 0
            # Only one at a time.
            wait_for(lambda: "under way" in lineage.fail_to_upgrade(), "a refusal")
        assert is_served()
        with lineage.offered() as successor:
            with pytest.raises(ControlError, match="as many workers"):
                successor.take([])
            # Its listeners may be others now.
            assert lineage.first.command("reload").returncode == 0
            with pytest.raises(ControlError, match="has changed meanwhile"):
                successor.take([0] * successor.offer.workers)
        assert is_served()
        # What has been spliced is of another version.
        pins = lineage.instance.bpffs_dir / "splice"
        if pins.is_dir():
            pin = next(pins.glob("sessions_*"))
            aside = pin.with_name("sessions_99")
            os.rename(pin, aside)
            assert "is not there" in lineage.fail_to_upgrade()
            os.rename(aside, pin)
        assert is_served()


def answer(instruction: bytes) -> bytes:
    with dial(COPY) as sock:
        sock.sendall(instruction)
        sock.shutdown(socket.SHUT_WR)
        return read_to_end(sock)


@pytest.mark.timeout(scaled_s(240))
def test_a_token_is_good_once_through_more_upgrades_than_tables_take_turns(
    begin: Any, tmp_path: Path
) -> None:
    key = tmp_path / "ops.key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    with AnswerServer("server") as server:
        lineage = begin(
            "workers: 2\nlisteners:\n  - bind: 127.0.0.1:9701\n"
            "    rules: [{match: instruction, allow: [loopback], token: required}]\n"
            f"tokens: {{keys: {{ops: {key}}}, max_lifetime: 30m}}\n"
        )
        expires_unix_s = int(time.time()) + 1200  # noqa: TID251 - tokens expire by the wall clock
        tokens = [
            token.make(
                Address(*server.address),
                expires_unix_s=expires_unix_s + number,
                key_id="ops",
                key=b"k" * 32,
            )
            for number in range(SHARES + 1)
        ]
        for number, made in enumerate(tokens):
            if number:
                lineage.upgrade()
            for used in tokens[:number]:
                # Each connection falls to one of two workers by its hash.
                assert [answer(used) for _ in range(8)] == [refusal("token")] * 8
            assert answer(made) == ACK


@pytest.mark.timeout(scaled_s(240))
def test_the_next_daemon_knows_which_servers_are_down(begin: Any, tmp_path: Path) -> None:
    dead = f"127.0.0.1:{unused_port()}"
    with AnswerServer("alive") as alive:
        text = (
            "listeners: [{bind: 127.0.0.1:9701, rules: [{match: any, to: web}]}]\n"
            f"upstreams: {{web: {{servers: [{address_text(alive.address)}, {dead}], "
            "health: {interval: 200ms, timeout: 100ms}}}\n"
        )
        lineage = begin(text)

        def state() -> str:
            rows = lineage.first.show("upstreams")
            return next(str(row["state"]) for row in rows if row["server"] == dead)

        wait_for(lambda: state() == "down", "the server is down")
        # The second of two servers is looked at after half an hour.
        other = tmp_path / "slow.yaml"
        other.write_text(text.replace("200ms", "1h"))
        lineage.upgrade("-c", str(other))
        assert state() == "down"
        for _ in range(4):
            assert answer(b"x").startswith(b"alive")


@pytest.mark.timeout(scaled_s(240))
def test_a_successor_serves_who_waits_and_tells_of_who_stays(begin: Any) -> None:
    """With another configuration: a listener is gone, and a new one there.

    A pair in a sockmap goes along, and a client that has said nothing yet stays with its worker:
    `show` tells of it, `flush` ends it, and once it has a server it follows. In the queue of a
    stopped worker's socket there is somebody when its daemon retires.
    """
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        config = configured(server.tcp_port, server.udp_port).replace(
            "handover:",
            "  - {name: ssh, bind: 127.0.0.1:9706, datapath: copy, first_packet: {timeout: 60s},\n"
            f"     rules: [{{match: ssh, to: '127.0.0.1:{server.tcp_port}'}}]}}\nhandover:",
        )
        lineage = begin(config)
        other = lineage.place.run_dir.parent / "other.yaml"
        other.write_text(config.replace("127.0.0.1:9702", "127.0.0.1:9712"))
        goes = stack.enter_context(dial(SOCKMAP))
        goes.sendall(b"hello")
        assert read_exactly(goes, 5) == b"hello"
        stay = [stack.enter_context(dial(("127.0.0.1", 9706))) for _ in range(2)]
        wait_for(lambda: lineage.shown()["sockmap"] == 1, "a pair in a sockmap")

        def silent() -> list[dict[str, Any]]:
            return [row for row in lineage.first.pairs() if row["state"] == "sniffing"]

        wait_for(lambda: len(silent()) == 2, "clients that have said nothing")
        before = lineage.pid
        for worker in lineage.first.workers():
            worker.suspend()
        waiting = [stack.enter_context(socket.create_connection(COPY)) for _ in range(9)]
        for worker in lineage.first.workers():
            worker.resume()
        lineage.upgrade("-c", str(other))
        for sock in waiting:
            sock.settimeout(scaled_s(20.0))
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            sock.close()
        goes.sendall(b"again")
        assert read_exactly(goes, 5) == b"again"
        wait_for(lambda: lineage.shown()["sockmap"] == 1, "it is in a sockmap again")
        rows = silent()
        assert {row["reason"] for row in rows} == {f"it ends with the daemon before (pid {before})"}
        assert psutil.pid_exists(before)
        (flushed,) = (row for row in rows if row["client"] == address_text(stay[0].getsockname()))
        done = lineage.first.command("flush", str(flushed["id"]))
        assert done.returncode == 0, done.stderr
        with pytest.raises(ConnectionResetError):
            stay[0].recv(1)
        assert psutil.pid_exists(before)
        said = b"SSH-2.0-a\r\n"
        stay[1].sendall(said)
        assert read_exactly(stay[1], len(said)) == said
        wait_for(lambda: lineage.first.process.poll() is not None, "the daemon before has ended")
        assert lineage.first.process.returncode == 0
        stay[1].sendall(b"more")
        assert read_exactly(stay[1], 4) == b"more"
        with dial(("127.0.0.1", 9712)) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
        with socket.socket() as sock:
            assert sock.connect_ex(AUTO) != 0
        # What the daemon is told to read again is that file from now on.
        assert lineage.first.command("reload").returncode == 0
        assert {row["bind"] for row in lineage.first.show("listeners")} >= {"127.0.0.1:9712"}

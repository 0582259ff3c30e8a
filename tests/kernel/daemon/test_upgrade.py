"""A daemon takes a running one's place: nobody who is connected, or connects, notices."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from pyforwarder.core import token
from pyforwarder.core.address import Address
from pyforwarder.errors import ControlError
from pyforwarder.runtime.pidfd import fetch_descriptors
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.takeover.predecessor import NoAnswerError
from pyforwarder.worker.used_tokens import SHARES
from tests.helpers.continuous_traffic import steady_traffic
from tests.helpers.daemon import COMMAND, START_DEADLINE_S
from tests.helpers.first_packets import client_hello
from tests.helpers.instruction import ACK, refusal
from tests.helpers.peers import (
    AnswerServer,
    Waiting,
    address_text,
    dial,
    ends_with_reset,
    read_exactly,
    read_to_end,
    reset,
    unused_port,
)
from tests.helpers.successive_daemons import Lineage, echoes, lineages
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.continuous_traffic import Seen
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


@pytest.fixture
def begin(start_forwarder: StartForwarder) -> Iterator[Any]:
    """Start the first of a lineage."""
    with lineages(start_forwarder) as start:
        yield start


def configured(tcp_port: int, udp_port: int) -> str:
    return CONFIG.replace("TCP", str(tcp_port)).replace("UDP", str(udp_port))


def no_fault(seen: Seen) -> None:
    assert not seen.faults, f"{len(seen.faults)} faults: {seen.faults[:5]}"


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
            rows = [row for row in lineage.first.look() if row["id"] in ids]
            assert not [row for row in rows if "the daemon before" in row["reason"]]
            return Counter(row["datapath"] for row in rows)

        assert those_from_before()["splice"] == wanted["splice"]
        wait_for(
            lambda: those_from_before() == wanted,
            f"all are where they were: {wanted}",
        )
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
        assert echoes(COPY)
        with lineage.offered() as successor:
            assert successor.offer.workers == len(lineage.first.workers())
            assert successor.last_id() > 0
            # Only one at a time.
            wait_for(lambda: "under way" in lineage.fail_to_upgrade(), "a refusal")
        assert echoes(COPY)
        with lineage.offered() as successor:
            with pytest.raises(ControlError, match="as many workers"):
                successor.take([])
            # Its listeners may be others now.
            assert lineage.first.command("reload").returncode == 0
            with pytest.raises(ControlError, match="has changed meanwhile"):
                successor.take([0] * successor.offer.workers)
        assert echoes(COPY)


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
def test_a_successor_serves_waiting_clients_and_shows_those_that_stay(begin: Any) -> None:
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


@pytest.mark.timeout(scaled_s(240))
@pytest.mark.parametrize("listener", [COPY, SOCKMAP], ids=["copy", "sockmap"])
def test_no_end_waits_for_a_process_before_that_has_the_sockets(
    begin: Any, listener: tuple[str, int]
) -> None:
    """As one that hangs does, in the moment in which it has sent them: here the test has them."""
    name = "copy" if listener is COPY else "sockmap"
    with Waiting("127.0.0.1") as server, contextlib.ExitStack() as stack:
        lineage = begin(configured(server.address[1], unused_port()))
        pairs = []
        for _ in range(4):
            client = stack.enter_context(dial(listener))
            client.sendall(b"hello")
            served = stack.enter_context(server.accept())
            assert read_exactly(served, 5) == b"hello"
            served.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
            pairs.append((client, served))
        wait_for(lambda: lineage.shown() == {name: 4}, "four pairs")
        kept = [fd for worker in lineage.first.workers() for fd in connected_of(worker.pid)]
        for fd in kept:
            stack.callback(os.close, fd)
        assert len(kept) == 8
        lineage.upgrade()
        wait_for(lambda: lineage.shown() == {name: 4}, "they go on")
        wait_for(lambda: lineage.first.process.poll() is not None, "the daemon before has ended")
        for turn in (1, -1):
            one, other = pairs.pop()[::turn]
            for sender, receiver in ((one, other), (other, one)):
                sender.sendall(b"last")
                sender.shutdown(socket.SHUT_WR)
                assert read_to_end(receiver) == b"last"
            one, other = pairs.pop()[::turn]
            reset(one)
            assert ends_with_reset(other) == b""
        wait_for(lambda: not lineage.shown(), "all have ended")


def connected_of(pid: int) -> list[int]:
    """The TCP connections that a process has, as descriptors of ours."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(ControlError):  # another kind of file, or gone
            (fd,) = fetch_descriptors(pid, [int(name)])
            with socket.socket(fileno=fd) as sock:
                if sock.family == socket.AF_INET:
                    found.append(sock.detach())
    return found


class Attempt:
    """An upgrade that goes on beside the test; what it has started ends with its daemon."""

    def __init__(self, lineage: Lineage, *before: str) -> None:
        """`before`: the words of another command that runs it."""
        self._lineage = lineage
        self._others = {one.pid for one in lineage.place.processes()}
        words = [*before, *COMMAND, "upgrade", "--instance", lineage.first.instance]
        self._command = subprocess.Popen(
            words,
            env=lineage.place.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _new(self) -> list[psutil.Process]:
        return [one for one in self._lineage.place.processes() if one.pid not in self._others]

    def successor(self) -> psutil.Process:
        """The daemon that is to be, once it has been offered what the running one has.

        From then on it makes processes, and only then.
        """

        def look() -> psutil.Process | None:
            # Not the process between the command and the daemon, which has a child for a moment.
            new = self._new()
            parents = {self._command.pid, *(one.pid for one in new)}
            for one in new:
                with contextlib.suppress(psutil.Error):
                    is_daemon = one.pid != self._command.pid and one.ppid() not in parents
                    if is_daemon and one.children():
                        return one
            return None

        found = wait_for(look, "a successor")
        assert found is not None
        return found

    def worker(self, successor: psutil.Process) -> psutil.Process:
        """A worker of it, once there is one."""

        def look() -> psutil.Process | None:
            for one in successor.children():
                with contextlib.suppress(psutil.Error):
                    if one.uids().real != os.getuid():
                        return one
            return None

        found = wait_for(look, "a worker", deadline_s=START_DEADLINE_S)
        assert found is not None
        return found

    def result(self) -> tuple[int, str]:
        """Exit code, and what it has said; it leaves no process behind where it has failed."""
        said, _ = self._command.communicate(timeout=START_DEADLINE_S)
        if self._command.returncode:
            wait_for(lambda: not self._new(), "its processes have ended")
        return self._command.returncode, said


@contextlib.contextmanager
def steady_lineage(begin: Any) -> Iterator[tuple[Lineage, Seen]]:
    """A daemon with pairs of every datapath on which bytes go to and fro, all of them right."""
    with steady_traffic() as (server, traffic, seen):
        lineage = begin(configured(server.tcp_port, server.udp_port))
        for address in (COPY, AUTO, SOCKMAP):
            traffic.hold(address, 2, name=str(address))
        traffic.speak(UDP, 1, name="udp")
        traffic.speak(UDP_SPLICED, 1, name="spliced udp")
        wanted = Counter(copy=3, splice=3, sockmap=2)
        wait_for(lambda: lineage.shown() == wanted, f"{wanted}")
        yield lineage, seen
        traffic.stop()


def pairs_go_on_and_clients_are_served(lineage: Lineage, seen: Seen) -> None:
    """Every pair goes on, and new clients are served."""
    turns = seen.turns + 100
    wait_for(lambda: seen.turns > turns, "traffic goes on")
    assert echoes(COPY)
    no_fault(seen)
    assert "retired" not in lineage.first.output()


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(scaled_s(240))
def test_a_successor_that_is_killed_at_any_step_changes_nothing(begin: Any) -> None:
    """While it gets ready, once it is, and after it has asked for the place."""
    with steady_lineage(begin) as (lineage, seen):
        before = lineage.pid
        attempt = Attempt(lineage)
        attempt.successor().kill()
        assert attempt.result()[0] != 0
        pairs_go_on_and_clients_are_served(lineage, seen)
        # All is loaded and proven, and it waits for an answer.
        attempt = Attempt(lineage)
        successor = attempt.successor()
        with suspended(before):
            wait_for(lambda: not successor.children(), "it is ready", deadline_s=START_DEADLINE_S)
            successor.kill()
            successor.wait(scaled_s(10.0))
        assert attempt.result()[0] != 0
        pairs_go_on_and_clients_are_served(lineage, seen)
        # What it has asked is heard after its end.
        with lineage.offered() as last, contextlib.ExitStack() as stack:
            ends = [stack.enter_context(end) for _ in range(last.offer.workers) for end in pair()]
            with suspended(before):
                with pytest.raises(NoAnswerError):
                    last._ask(
                        "take",
                        [end.fileno() for end in ends[::2]],
                        timeout_s=0.1,
                        serial=last.offer.serial,
                    )
                last.close()
        lineage.first.wait_for_line("upgrade_failed", count=3)
        pairs_go_on_and_clients_are_served(lineage, seen)
        assert lineage.pid == before
        lineage.upgrade()
        no_fault(seen)


def pair() -> tuple[socket.socket, socket.socket]:
    """As a successor makes for each worker."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@pytest.mark.timeout(scaled_s(240))
def test_a_daemon_that_is_killed_in_an_upgrade_has_a_successor(begin: Any) -> None:
    """Its spliced pairs go on, and nobody who connects meanwhile is refused."""
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        lineage = begin(configured(server.tcp_port, server.udp_port))
        spliced = stack.enter_context(dial(AUTO))
        for word in (b"hello", b"again"):
            spliced.sendall(word)
            assert read_exactly(spliced, 5) == word
        wait_for(lambda: lineage.shown() == {"splice": 1}, "a spliced pair")
        (row,) = lineage.first.pairs()
        attempt = Attempt(lineage)
        attempt.successor()
        os.kill(lineage.pid, signal.SIGKILL)
        lineage.first_ends_with = -signal.SIGKILL
        lineage.first.process.wait(START_DEADLINE_S)
        waiting = stack.enter_context(dial(COPY))
        waiting.sendall(b"hello")
        code, said = attempt.result()
        assert code == 0, said
        assert read_exactly(waiting, 5) == b"hello"
        spliced.sendall(b"still")
        assert read_exactly(spliced, 5) == b"still"
        wait_for(
            lambda: (
                [one["datapath"] for one in lineage.first.pairs() if one["id"] == row["id"]]
                == ["splice"]
            ),
            "the pair is known",
        )
        fresh = stack.enter_context(dial(COPY))
        fresh.sendall(b"hello")
        assert read_exactly(fresh, 5) == b"hello"
        assert len({one["id"] for one in lineage.first.pairs()}) == len(lineage.first.pairs())


@pytest.mark.timeout(scaled_s(300))
def test_a_daemon_that_stands_still_in_an_upgrade_has_a_successor(begin: Any) -> None:
    """It would go on one day, with its keeper: it is ended, and its spliced pairs go on."""
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        lineage = begin(configured(server.tcp_port, server.udp_port))
        dialled = [stack.enter_context(dial(AUTO)) for _ in range(4)]
        for spliced in dialled:
            for word in (b"hello", b"again"):
                spliced.sendall(word)
                assert read_exactly(spliced, 5) == word
        wait_for(lambda: lineage.shown() == {"splice": 4}, "spliced pairs")
        wanted = {row["id"] for row in lineage.first.pairs()}
        before = lineage.pid
        old = psutil.Process(before).children()
        attempt = Attempt(lineage)
        # It has said all that its successor asks before it has workers.
        attempt.worker(attempt.successor())
        lineage.first_ends_with = -signal.SIGKILL
        os.kill(before, signal.SIGSTOP)
        assert "retired" not in lineage.first.output()
        # It waits for an answer as long as a busy daemon may take.
        lineage.first.wait_for_line("predecessor_silent", deadline_s=scaled_s(90.0))
        code, said = attempt.result()
        assert code == 0, said
        assert lineage.pid != before
        wait_for(lambda: not any(one.is_running() for one in old), "its processes have ended")

        def are_known() -> bool:
            rows = lineage.first.pairs()
            return {one["id"] for one in rows if one["datapath"] == "splice"} == wanted

        wait_for(are_known, "the pairs are known")
        for spliced in dialled:
            spliced.sendall(b"still")
            assert read_exactly(spliced, 5) == b"still"
            spliced.close()
        wait_for(lambda: not lineage.shown(), "their ends are heard of")


@pytest.mark.timeout(scaled_s(240))
def test_a_successor_elsewhere_than_the_daemon_changes_nothing(begin: Any) -> None:
    """In another network namespace, or where other pins are than those of its spliced pairs."""
    with steady_lineage(begin) as (lineage, seen):
        code, said = Attempt(lineage, "unshare", "--net").result()
        assert code != 0
        assert "another network namespace" in said
        pairs_go_on_and_clients_are_served(lineage, seen)
        other = f'mount -t bpf bpf {lineage.place.bpffs} && exec "$@"'
        code, said = Attempt(lineage, "unshare", "--mount", "sh", "-c", other, "sh").result()
        assert code != 0
        assert "is not what this process finds there" in said
        pairs_go_on_and_clients_are_served(lineage, seen)


@pytest.mark.timeout(scaled_s(240))
def test_unix_sockets_go_along(begin: Any) -> None:
    """A pair between two of them, and the listener's file, which stays the very same."""
    with socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
        # Short, and workers, which run as nobody, may pass.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unix-")))
        directory.chmod(0o755)
        listening, serving = directory / "listening", directory / "serving"
        server.bind(str(serving))
        server.listen(8)
        serving.chmod(0o666)
        lineage = begin(
            f"listeners: [{{bind: 'unix:{listening}', mode: 0600, "
            f"rules: [{{match: any, to: 'unix:{serving}'}}]}}]\n"
        )
        inode = listening.stat().st_ino

        def connect() -> tuple[socket.socket, socket.socket]:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(scaled_s(20.0))
            client.connect(str(listening))
            client.sendall(b"hello")
            server.settimeout(scaled_s(20.0))
            accepted, _ = server.accept()
            stack.enter_context(accepted)
            accepted.settimeout(scaled_s(20.0))
            assert read_exactly(accepted, 5) == b"hello"
            return client, accepted

        client, accepted = connect()
        for number in range(2):
            lineage.upgrade()
            wanted = ["one end is a unix socket"] * (number + 1)

            def reasons() -> list[str]:
                return [row["reason"] for row in lineage.first.pairs()]

            wait_for(lambda: reasons() == wanted, "the pairs have moved")  # noqa: B023
            for sender, receiver in ((client, accepted), (accepted, client)):
                sender.sendall(b"still %d" % number)
                assert read_exactly(receiver, 7) == b"still %d" % number
            assert listening.stat().st_ino == inode
            assert listening.stat().st_mode & 0o777 == 0o600
            connect()
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
        accepted.sendall(b"end")
        accepted.close()
        assert read_to_end(client) == b"end"


@pytest.mark.timeout(scaled_s(240))
def test_decisions_and_the_times_of_the_last_bytes_go_along(begin: Any) -> None:
    """Two upgrades: the line of an end says as much, and a client that was heard once ends as soon.

    A pair that is copied, one in a sockmap and one that is spliced, and sessions of UDP with one
    datagram, and of the kernel.
    """
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        rules = "rules: [{match: {tls: {sni: [a.test]}}, to: web}]"
        lineage = begin(
            "listeners:\n"
            f"  - {{name: copy, bind: 127.0.0.1:9701, datapath: copy, {rules}}}\n"
            f"  - {{name: auto, bind: 127.0.0.1:9702, datapath: splice, {rules}}}\n"
            f"  - {{name: sockmap, bind: 127.0.0.1:9705, datapath: sockmap, {rules}}}\n"
            "  - {name: udp, bind: 127.0.0.1:9703, protocol: udp, datapath: copy,"
            " rules: [{match: any, to: udp}]}\n"
            "  - {name: udps, bind: 127.0.0.1:9704, protocol: udp, datapath: splice,"
            " rules: [{match: any, to: udp}]}\n"
            f"upstreams:\n  web: {{servers: ['127.0.0.1:{server.tcp_port}']}}\n"
            f"  udp: {{servers: ['127.0.0.1:{server.udp_port}']}}\n"
            "handover: {after_round_trips: 1}\n"
        )
        for address in (COPY, AUTO, SOCKMAP):
            client = stack.enter_context(dial(address))
            client.sendall(client_hello(b"a.test"))
            read_exactly(client, len(client_hello(b"a.test")))
        once, often = (
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2)
        )
        once.connect(UDP)
        once.send(b"once")
        often.connect(UDP_SPLICED)
        often.settimeout(scaled_s(20.0))
        for _ in range(3):
            often.send(b"often")
            assert often.recv(100) == b"often"
        wanted = Counter(copy=2, splice=2, sockmap=1)
        wait_for(lambda: lineage.shown() == wanted, f"{wanted}")
        for _ in range(2):
            lineage.upgrade()
        lineage.first.wait_for_line("taken_over pairs=")
        lineage.first.wait_for_line("closed .*reason=idle .*listener=udp .*upstream=udp")
        assert lineage.first.command("flush", "--all").returncode == 0
        for name in ("copy", "auto", "sockmap"):
            line = lineage.first.wait_for_line(f"closed .*reason=flushed .*listener={name} ")
            assert "sni=a.test" in line
            assert "upstream=web" in line
        lineage.first.wait_for_line("closed .*reason=flushed .*listener=udps .*upstream=udp")

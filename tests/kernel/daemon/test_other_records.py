"""An upgrade between versions with other records: spliced pairs stay, and everything else moves."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.syscall import AttachType
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.continuous_traffic import steady_traffic
from tests.helpers.daemon import COMMAND, START_DEADLINE_S
from tests.helpers.other_version import CANNOT_KEEP, OTHER_RECORDS, other_version
from tests.helpers.peers import dial, ends_with_reset, read_exactly
from tests.helpers.successive_daemons import Lineage, lineages
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.continuous_traffic import Seen, SteadyTraffic
    from tests.kernel.conftest import StartForwarder

COPY: Final = ("127.0.0.1", 9701)
AUTO: Final = ("127.0.0.1", 9702)
AUTO6: Final = ("::1", 9702)
UDP: Final = ("127.0.0.1", 9703)
UDP_SPLICED: Final = ("127.0.0.1", 9704)
SOCKMAP: Final = ("127.0.0.1", 9705)
EXPRESS: Final = ("127.0.0.1", 9706)
LO: Final = 1

CONFIG: Final = """
workers: 2
listeners:
  - {name: copy, bind: 127.0.0.1:9701, datapath: copy, rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: auto, bind: 127.0.0.1:9702, datapath: splice,
     rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: auto6, bind: "[::1]:9702", datapath: splice, rules: [{match: any, to: "[::1]:TCP"}]}
  - {name: udp, bind: 127.0.0.1:9703, protocol: udp, datapath: copy,
     rules: [{match: any, to: "127.0.0.1:UDP"}]}
  - {name: udps, bind: 127.0.0.1:9704, protocol: udp, datapath: splice,
     rules: [{match: any, to: "127.0.0.1:UDP"}]}
  - {name: sockmap, bind: 127.0.0.1:9705, datapath: sockmap,
     rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: express, bind: 127.0.0.1:9706, datapath: express,
     rules: [{match: any, to: "127.0.0.1:TCP"}]}
express: {ports: 64}
handover: {after_round_trips: 1}
timeouts: {drain: 300s}
"""


@pytest.fixture
def begin(start_forwarder: StartForwarder) -> Iterator[Any]:
    """Start the first of a lineage."""
    with lineages(start_forwarder) as start:
        yield start


@pytest.fixture
def copies() -> Iterator[Callable[..., tuple[str, ...]]]:
    """Make a version with these changes; the words that run it."""
    directory = Path(tempfile.mkdtemp(prefix="versions-"))
    directory.chmod(0o755)
    try:
        yield lambda name, changes: other_version(directory / name, changes)
    finally:
        shutil.rmtree(directory)


def configured(tcp_port: int, udp_port: int) -> str:
    return CONFIG.replace("TCP", str(tcp_port)).replace("UDP", str(udp_port))


def hold_all(traffic: SteadyTraffic, name: str) -> None:
    """Two pairs of each kind, and a session of each."""
    for address in (COPY, AUTO, AUTO6, SOCKMAP, EXPRESS):
        traffic.hold(address, 2, name=f"{name} {address}")
    for address in (UDP, UDP_SPLICED):
        traffic.speak(address, 1, name=f"{name} {address}")


HELD: Final = Counter(copy=3, splice=7, sockmap=2)
SPLICED_TCP: Final = 6


def kinds(lineage: Lineage, *, stays: bool) -> Counter[str]:
    """The joined pairs by datapath: those that stay with a daemon before, or the others."""
    return Counter(
        row["datapath"]
        for row in lineage.first.look()
        if row["state"] == "joined" and ("the daemon before" in row["reason"]) == stays
    )


def hold_and_wait(lineage: Lineage, traffic: SteadyTraffic, name: str) -> None:
    before = kinds(lineage, stays=False)
    hold_all(traffic, name)
    wanted = before + HELD
    wait_for(lambda: kinds(lineage, stays=False) == wanted, f"{wanted}")


def wait_for_staying(lineage: Lineage, count: int) -> None:
    wait_for(lambda: kinds(lineage, stays=True) == {"splice": count}, f"{count} stay")


def go_on(seen: Seen, turns: int = 300) -> None:
    """All pairs that are held go on, byte by byte."""
    wanted = seen.turns + turns
    wait_for(lambda: seen.turns > wanted or seen.faults, "traffic goes on")
    no_fault(seen)


def no_fault(seen: Seen) -> None:
    assert not seen.faults, f"{len(seen.faults)} faults: {seen.faults[:5]}"


def directories(lineage: Lineage) -> list[str]:
    """Those of the pins of splice."""
    return sorted(path.name for path in lineage.instance.bpffs_dir.glob("splice*"))


def programs_on_lo(lineage: Lineage) -> int:
    """How many sets of ours are on `lo`."""
    if os.environ.get(attaching.FORCED) == "clsact" or attaching.kind() == "clsact":
        names = [one.name for one in lineage.first.filters() if one.interface == LO]
        assert set(Counter(names).values()) <= {2}
        return len(set(names))
    return max(bpf.query_interface(LO, AttachType.TCX_INGRESS), 0)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.timeout(scaled_s(400))
@pytest.mark.each_attachment
def test_spliced_pairs_stay_and_all_others_move_in_either_direction(
    begin: Any, copies: Callable[..., tuple[str, ...]]
) -> None:
    """Forth to other records and back again, while those of the first daemon still go on."""
    other = copies("other", OTHER_RECORDS)
    with steady_traffic() as (server, traffic, seen):
        lineage = begin(configured(server.tcp_port, server.udp_port))
        hold_and_wait(lineage, traffic, "first")
        traffic.connect((COPY, AUTO, SOCKMAP, EXPRESS), 2)
        assert directories(lineage) == ["splice"]
        sources = len(seen.udp_sources)
        first = lineage.pid
        for build, name in ((other, "second"), (COMMAND, "third")):
            staying = SPLICED_TCP + sum(kinds(lineage, stays=True).values())
            said = lineage.upgrade(build=build)
            assert "spliced pairs stay with the daemon before" in said
            go_on(seen)
            wait_for_staying(lineage, staying)
            # The UDP session that was spliced is so again.
            wait_for(
                lambda: kinds(lineage, stays=False)["splice"] >= 1, "a session is spliced again"
            )
            hold_and_wait(lineage, traffic, name)
            go_on(seen)
        assert len(seen.udp_sources) == sources + 4, "a client of UDP has got another session"
        assert directories(lineage) == ["splice", "splice-2", "splice-3"]
        wait_for(lambda: programs_on_lo(lineage) == 3, "programs of 3")
        lineage.first.wait_for_line("warning: splice_stays pairs=", count=2)
        ids = [row["id"] for row in lineage.first.pairs()]
        assert len(ids) == len(set(ids))
        assert not gone(first)
        traffic.stop()
        no_fault(seen)
        wait_for(lambda: gone(first), "the first has ended")
        lineage.first.wait_for_line("predecessor_ended", count=2)
        wait_for(lambda: directories(lineage) == ["splice-3"], "its pins are gone")
        wait_for(lambda: programs_on_lo(lineage) == 1, "programs of 1")


@pytest.mark.timeout(scaled_s(240))
def test_a_version_that_cannot_keep_them_goes_on_as_before(
    begin: Any, copies: Callable[..., tuple[str, ...]]
) -> None:
    other, cannot = copies("other", OTHER_RECORDS), copies("cannot", CANNOT_KEEP)
    with steady_traffic() as (server, traffic, seen):
        lineage = begin(configured(server.tcp_port, server.udp_port))
        assert lineage.upgrade(build=cannot).count("stay") == 0
        hold_and_wait(lineage, traffic, "held")
        said = lineage.fail_to_upgrade(build=other)
        assert "spliced pairs could not go on: spliced pairs of the running daemon" in said
        go_on(seen)
        assert kinds(lineage, stays=False) == HELD
        assert directories(lineage) == ["splice"]
        # One of the same records takes all of them.
        lineage.upgrade()
        wait_for(lambda: kinds(lineage, stays=False) == HELD, "all have moved")
        assert directories(lineage) == ["splice"]


def spliced(stack: contextlib.ExitStack, lineage: Lineage, count: int) -> list[socket.socket]:
    """So many more pairs that are spliced."""
    before = kinds(lineage, stays=False)["splice"]
    dialled = [stack.enter_context(dial(AUTO)) for _ in range(count)]
    for sock in dialled:
        for word in (b"hello", b"again"):
            sock.sendall(word)
            assert read_exactly(sock, 5) == word
    wanted = before + count
    wait_for(lambda: kinds(lineage, stays=False)["splice"] == wanted, "they are spliced")
    return dialled


def pairs_of(worker: psutil.Process, dialled: list[socket.socket]) -> int:
    """How many of these that process has: one that has none ends when its daemon retires."""
    clients = {connection.raddr for connection in worker.net_connections("tcp")}
    return sum(sock.getsockname() in clients for sock in dialled)


def answers(sock: socket.socket) -> bool:
    sock.sendall(b"still")
    return read_exactly(sock, 5) == b"still"


def is_reset(sock: socket.socket) -> bool:
    """By what it sends, if not before."""
    try:
        sock.send(b"x")
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def row_of(lineage: Lineage, sock: socket.socket) -> dict[str, Any]:
    port = f":{sock.getsockname()[1]}"
    (row,) = (row for row in lineage.first.pairs() if row["client"].endswith(port))
    return row


@pytest.mark.timeout(scaled_s(300))
@pytest.mark.each_attachment
def test_those_that_stay_are_flushed_and_lose_no_process(
    begin: Any, copies: Callable[..., tuple[str, ...]]
) -> None:
    """`flush` reaches them; a worker, or the keeper, of the daemon before that dies is replaced."""
    other = copies("other", OTHER_RECORDS)
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        lineage = begin(configured(server.tcp_port, server.udp_port))
        pairs = spliced(stack, lineage, 6)
        while min(pairs_of(worker, pairs) for worker in lineage.first.workers()) < 2:
            pairs += spliced(stack, lineage, 1)
        before = lineage.pid
        assert f"{len(pairs)} spliced pairs stay" in lineage.upgrade(build=other)
        first = pairs.pop()
        done = lineage.first.command("flush", str(row_of(lineage, first)["id"]))
        assert done.returncode == 0, done.stderr
        assert ends_with_reset(first) == b""
        stay = {"splice": len(pairs)}
        wait_for(lambda: kinds(lineage, stays=True) == stay, "one less")
        children = psutil.Process(before).children()
        for child in children:
            child.kill()
            child.wait(scaled_s(10.0))
            assert all(map(answers, pairs))
        lineage.first.wait_for_line("worker_died", count=2)
        lineage.first.wait_for_line("splice_keeper_died")
        wait_for(lambda: kinds(lineage, stays=True) == stay, "they have workers again")
        new = spliced(stack, lineage, 2)
        assert all(map(answers, [*pairs, *new]))
        second = pairs.pop()
        wait_for(
            lambda: (
                lineage.first.command("flush", str(row_of(lineage, second)["id"])).returncode == 0
            ),
            "it is flushed",
        )
        assert ends_with_reset(second) == b""
        for sock in pairs:
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        wait_for(lambda: gone(before), "the daemon before has ended")
        assert all(map(answers, new))
        assert directories(lineage) == ["splice-2"]
        wait_for(lambda: programs_on_lo(lineage) == 1, "programs of 1")


@pytest.mark.timeout(scaled_s(300))
@pytest.mark.each_attachment
def test_what_a_daemon_before_leaves_that_is_killed_is_removed(
    begin: Any, copies: Callable[..., tuple[str, ...]]
) -> None:
    """Its spliced pairs are reset, and others go on."""
    other = copies("other", OTHER_RECORDS)
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        lineage = begin(configured(server.tcp_port, server.udp_port))
        old = spliced(stack, lineage, 2)
        before = lineage.pid
        lineage.upgrade(build=other)
        new = spliced(stack, lineage, 2)
        assert all(map(answers, [*old, *new]))
        lineage.first_ends_with = -signal.SIGKILL
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: directories(lineage) == ["splice-2"], "its pins are gone")
        wait_for(lambda: programs_on_lo(lineage) == 1, "programs of 1")
        for sock in old:
            wait_for(partial(is_reset, sock), "a reset")
        assert all(map(answers, new))
        wait_for(lambda: kinds(lineage, stays=True) == {}, "nothing stays")


@pytest.mark.timeout(scaled_s(300))
@pytest.mark.each_attachment
def test_the_next_up_beside_a_daemon_that_keeps_pairs_takes_those_of_the_killed_one(
    begin: Any, start_forwarder: StartForwarder, copies: Callable[..., tuple[str, ...]]
) -> None:
    """The one that served was killed, and the one before it lives: its pins are not touched."""
    other = copies("other", OTHER_RECORDS)
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        config = configured(server.tcp_port, server.udp_port)
        lineage = begin(config)
        first = spliced(stack, lineage, 2)
        oldest = lineage.pid
        lineage.upgrade(build=other)
        lineage.upgrade()
        third = spliced(stack, lineage, 2)
        middle = set(map(int, _daemons(lineage))) - {oldest, lineage.pid}
        killed = psutil.Process(lineage.pid)
        killed.kill()
        wait_for(lambda: gone(killed.pid), "it was killed")
        assert not gone(oldest)
        assert directories(lineage) == ["splice", "splice-2", "splice-3"]
        again = start_forwarder(config)
        wait_for(
            lambda: Counter(row["datapath"] for row in again.look()) == {"splice": 2}, "taken over"
        )
        assert all(map(answers, [*first, *third]))
        for sock in first:
            sock.close()
        wait_for(lambda: gone(oldest), "the oldest has ended")
        wait_for(lambda: all(map(gone, middle)), "the one between has ended")
        wait_for(lambda: directories(lineage) == ["splice-3"], "pins are gone")
        assert all(map(answers, third))
        wait_for(lambda: programs_on_lo(lineage) == 1, "programs of 1")
        for sock in third:
            sock.close()
        lineage.first = again


@pytest.mark.timeout(scaled_s(300))
@pytest.mark.parametrize("drain", ["4s", "300s"], ids=["deadline", "down"])
def test_those_that_stay_are_reset_at_the_deadline_or_when_both_are_to_end(
    start_forwarder: StartForwarder, copies: Callable[..., tuple[str, ...]], drain: str
) -> None:
    other = copies("other", OTHER_RECORDS)
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        config = configured(server.tcp_port, server.udp_port).replace("300s", drain)
        lineage = Lineage(start_forwarder(config))
        old = spliced(stack, lineage, 3)
        before = lineage.pid
        lineage.upgrade(build=other)
        assert all(map(answers, old))
        if drain == "4s":
            wait_for(lambda: gone(before), "the daemon before has ended")
            wait_for(lambda: directories(lineage) == ["splice-2"], "its pins are gone")
            wait_for(lambda: programs_on_lo(lineage) == 1, "programs of 1")
            assert [ends_with_reset(sock) for sock in old] == [b""] * 3
        lineage.end()
        assert lineage.place.pins() == []
        if drain == "300s":
            assert [ends_with_reset(sock) for sock in old] == [b""] * 3


@pytest.mark.timeout(scaled_s(400))
@pytest.mark.each_attachment
@pytest.mark.parametrize("after_s", [0.0, 0.3])
@pytest.mark.parametrize("victim", ["old", "new"])
def test_nothing_is_left_where_one_of_both_is_killed_in_the_midst_of_it(
    start_forwarder: StartForwarder,
    copies: Callable[..., tuple[str, ...]],
    victim: str,
    after_s: float,
) -> None:
    """Right after the old one has retired, or while the new one pins what it has."""
    other = copies("other", OTHER_RECORDS)
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        config = configured(server.tcp_port, server.udp_port)
        lineage = Lineage(start_forwarder(config))
        old = spliced(stack, lineage, 3)
        before = lineage.pid
        command = subprocess.Popen(
            [*other, "upgrade"], env=lineage.place.environ(), stderr=subprocess.DEVNULL
        )
        line = lineage.first.wait_for_line(" retired ", deadline_s=START_DEADLINE_S)
        after = int(line.partition("successor=")[2].split()[0])
        time.sleep(after_s)
        os.kill(before if victim == "old" else after, signal.SIGKILL)
        code = command.wait(START_DEADLINE_S)
        if victim == "old":
            assert code == 0
            lineage.first_ends_with = -signal.SIGKILL
            wait_for(lambda: directories(lineage) == ["splice-2"], "its pins are gone")
            for sock in old:
                wait_for(partial(is_reset, sock), "a reset")
            new = spliced(stack, lineage, 2)
        else:
            assert all(map(answers, old))
            lineage = Lineage(start_forwarder(config))
            new = spliced(stack, lineage, 2)
            assert all(map(answers, [*old, *new]))
            for sock in old:
                sock.close()
            wait_for(lambda: gone(before), "the daemon before has ended")
            assert "splice" not in directories(lineage)
        assert all(map(answers, new))
        wait_for(lambda: programs_on_lo(lineage) == 1, "programs of one")
        lineage.end()
        assert lineage.place.pins() == []
        assert not lineage.instance.bpffs_dir.exists()
        assert lineage.first.filters() == []


@pytest.mark.timeout(scaled_s(240))
def test_pairs_stay_also_where_the_next_daemon_is_not_to_splice(
    begin: Any, copies: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    other = copies("other", OTHER_RECORDS)
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        lineage = begin(configured(server.tcp_port, server.udp_port))
        old = spliced(stack, lineage, 3)
        before = lineage.pid
        only_copied = tmp_path / "copied.yaml"
        only_copied.write_text(
            "datapath: copy\nlisteners: [{bind: 127.0.0.1:9702, "
            f"rules: [{{match: any, to: '127.0.0.1:{server.tcp_port}'}}]}}]\n"
        )
        said = lineage.upgrade("-c", str(only_copied), build=other)
        assert "3 spliced pairs stay" in said
        new = stack.enter_context(dial(AUTO))
        assert all(map(answers, [*old, new]))
        assert kinds(lineage, stays=True) == {"splice": 3}
        wait_for(lambda: kinds(lineage, stays=False) == {"copy": 1}, "one that is copied")
        for sock in old:
            sock.close()
        wait_for(lambda: gone(before), "the daemon before has ended")
        assert directories(lineage) == []
        assert answers(new)


def _daemons(lineage: Lineage) -> list[int]:
    """Supervisors: processes that are no child of another one of this place."""
    processes = lineage.place.processes()
    pids = {one.pid for one in processes}
    return [one.pid for one in processes if one.ppid() not in pids]


@pytest.mark.timeout(scaled_s(300))
def test_up_takes_the_place_of_a_draining_daemon_with_other_records(
    place: Any, start_forwarder: StartForwarder, copies: Callable[..., tuple[str, ...]]
) -> None:
    other = copies("other", OTHER_RECORDS)
    with steady_traffic() as (server, _traffic, _seen), contextlib.ExitStack() as stack:
        config = configured(server.tcp_port, server.udp_port)
        lineage = Lineage(start_forwarder(config))
        old = spliced(stack, lineage, 3)
        before = lineage.pid
        lineage.first.control().down()
        done = lineage.first.command(
            "up",
            "-c",
            str(lineage.first.config_path),
            "--detach",
            build=other,
            deadline_s=START_DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr
        assert "3 spliced pairs stay with the daemon before" in done.stdout + done.stderr
        wait_for(lambda: kinds(lineage, stays=True) == {"splice": 3}, "they stay")
        new = spliced(stack, lineage, 2)
        assert all(map(answers, [*old, *new]))
        for sock in old:
            sock.close()
        wait_for(lambda: gone(before), "the daemon before has ended")
        assert all(map(answers, new))
        done = lineage.first.command("down", "--now")
        assert done.returncode == 0, done.stderr
        wait_for(lambda: not place.processes(), "all have ended")

"""The files of a running daemon, of one that was killed, and of two beside each other."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.errors import ForwarderError
from pyforwarder.runtime import tables
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.daemon import Daemon, Place, leftovers, run_command
from tests.helpers.instruction import instruction, refusal
from tests.helpers.peers import (
    EchoServer,
    SinkServer,
    Waiting,
    address_text,
    dial,
    dial_through,
    pair_through,
    pattern,
    push_until_blocked,
    read_exactly,
    read_to_end,
    unused_port,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

DATAPATHS: Final = ["copy", "sockmap"]
# The ways in which the kernel prints the files (view_walks.py), whichever is the first choice here.
EACH_WALK: Final = [
    pytest.param("map", marks=pytest.mark.needs("map iterators")),
    pytest.param("ksym", marks=pytest.mark.needs("ksym iterators")),
]
FILES: Final = ("show", "stats", "listeners")
HEADER: Final = list(tables.PAIR_COLUMNS)
GONE: Final = "# the daemon is gone"
STATES: Final = "sniffing|connecting|handover|joined|half-closed|draining"
END: Final = r"(?:\d+\.\d+\.\d+\.\d+:\d+|\[[0-9a-f:]+\]:\d+|-)"
LINE: Final = re.compile(
    rf" *\d+ (?:{STATES}) +(?:-|copy|sockmap) +{END} +{END} +{END} +{END} +\d+ +\d+ +\d+ +\d+"
    r" \S+ +user"
)


def config(datapath: str, *, extra: str = "") -> str:
    """An IPv4 and an IPv6 listener."""
    return f"""
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{{name: named, match: instruction, allow: [loopback]}}]
  - name: six
    bind: "[::1]:0"
    rules: [{{name: a-name-longer-than-that, match: instruction, allow: [loopback]}}]
datapath: {datapath}
{extra}
"""


def only_by(walk: str) -> tuple[str, ...]:
    """The words in front of a daemon's command that leave it this way, or `daemon`."""
    return ("env", f"PYFORWARDER_VIEW={walk}")


def text_of(place: Place, name: str = "show", instance: str = "default") -> str:
    """What `cat` prints of a pin."""
    path = place.bpffs / instance / name
    return subprocess.run(["cat", path], capture_output=True, check=True).stdout.decode()


def rows_of(place: Place, name: str = "show", instance: str = "default") -> list[dict[str, str]]:
    return tables.parse(text_of(place, name, instance))


def wait_for_datapath(
    place: Place, datapath: str, count: int = 1, *, down_bytes: int = 0
) -> list[dict[str, str]]:
    """That all pairs are on it, and each has carried so many bytes to its client at least."""

    def look() -> list[dict[str, str]]:
        rows = rows_of(place)
        if any(int(row["down_bytes"]) < down_bytes for row in rows):
            return []
        return rows if [row["datapath"] for row in rows] == [datapath] * count else []

    return wait_for(look, f"{count} pairs on {datapath}")


def transfer(sender: socket.socket, receiver: socket.socket, size: int) -> None:
    """`size` bytes, in steps that no socket buffer has to hold."""
    sent = 0
    while sent < size:
        step = min(100_003, size - sent)
        sender.sendall(pattern(step))
        assert read_exactly(receiver, step) == pattern(step)
        sent += step


# ---------------------------------------------------------------------------- counters


@pytest.mark.parametrize("datapath", DATAPATHS)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_counters_are_exact_and_live(
    place: Place, start_forwarder: StartForwarder, datapath: str, host: str
) -> None:
    forwarder = start_forwarder(config(datapath))
    listener = forwarder.listeners()["main" if host == "127.0.0.1" else "six"]
    with Waiting(host) as waiting:
        client = dial_through(listener, waiting.address, b"x" * 23)
        server = waiting.accept()
        with client, server:
            assert read_exactly(server, 23) == b"x" * 23
            up, down = 23, 0
            # The first bytes are copied in any case; then the kernel has the pair, if it may.
            for size in (1, 1461, 300_001):
                transfer(client, server, size)
                transfer(server, client, 2 * size)
                up, down = up + size, down + 2 * size
                # What is copied reaches its end a moment before the worker counts it.
                row = wait_for_datapath(place, datapath, down_bytes=down)[0]
                assert (int(row["up_bytes"]), int(row["down_bytes"])) == (up, down)
            assert row["state"] == "joined"
            assert row["client"] == address_text(client.getsockname()[:2])
            assert row["listener"] == address_text(listener)
            assert row["source"] == address_text(server.getpeername()[:2])
            assert row["server"] == address_text(waiting.address)
            assert row["rule"] == ("named" if host == "127.0.0.1" else "a-name-longer-t")
            stats = {row["stat"]: row["value"] for row in rows_of(place, "stats")}
            assert (stats["bytes_up"], stats["bytes_down"]) == (str(up), str(down))
            assert stats["pairs_open"] == "1"
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(server) == b""
            wait_for(lambda: rows_of(place)[0]["state"] == "half-closed", "half-closed")
            server.close()
            assert read_to_end(client) == b""
    wait_for(lambda: rows_of(place) == [], "an empty table")
    stats = {row["stat"]: row["value"] for row in rows_of(place, "stats")}
    assert (stats["bytes_up"], stats["bytes_down"]) == (str(up), str(down))
    assert stats["closed.finished"] == "1"
    names = {row["name"]: row for row in rows_of(place, "listeners")}
    used = names["main" if host == "127.0.0.1" else "six"]
    assert (used["accepted"], used["open"], used["refused"]) == ("1", "0", "0")


def test_files_and_command_say_the_same(place: Place, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config("sockmap"))
    with pair_through(forwarder.address) as (client, server):
        transfer(client, server, 4711)
        wait_for_datapath(place, "sockmap")
        for what, name in (("pairs", "show"), ("listeners", "listeners"), ("stats", "stats")):
            said = tables.parse(forwarder.command("show", what).stdout)
            clocks = ("age_s", "idle_s")
            said, file = (
                [{key: row[key] for key in row if key not in clocks} for row in rows]
                for rows in (said, rows_of(place, name))
            )
            assert said == file, what
        row = forwarder.pairs()[0]
        assert (row["up_packets"] >= 1, row["backlog_bytes"]) == (True, 0)
        assert row["reason"] == "the configuration says so"


def test_links_in_the_run_directory_lead_to_the_pins(
    place: Place, start_forwarder: StartForwarder
) -> None:
    start_forwarder(config("copy"))
    for name in FILES:
        link = place.run_dir / "default" / "proc" / name
        assert link.readlink() == place.bpffs / "default" / name
        assert link.read_text() == text_of(place, name)


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_no_line_is_torn_while_connections_come_and_go(
    place: Place, start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder(config(datapath))
    listeners = forwarder.listeners()
    stop = threading.Event()
    failed: list[BaseException] = []
    done = [0] * 8

    def come_and_go(number: int, via: tuple[str, int], to: tuple[str, int], size: int) -> None:
        began_s = time.monotonic()
        try:
            while not stop.is_set():
                with dial_through(via, to, b"x" * size) as client:
                    assert read_exactly(client, size) == b"x" * size
                    # Some live long enough to be in the table, all end.
                    stop.wait(0.02)
                done[number] += 1
                # Eight of us, together 200 a second.
                stop.wait(max(0.0, began_s + done[number] / 25 - time.monotonic()))
        except BaseException as error:
            failed.append(error)

    with (
        EchoServer() as one,
        EchoServer(host="::1") as two,
        pair_through(forwarder.address) as (client, peer),
    ):
        transfer(client, peer, 5003)
        stays = wait_for_datapath(place, datapath)[0]
        # Two kinds, with nothing in common: a line has all of one and nothing of the other.
        kinds = [(listeners["main"], one.address, 1023), (listeners["six"], two.address, 777)]
        rules = ["named", "a-name-longer-than-that"[:15]]
        threads = [
            threading.Thread(target=come_and_go, args=(number, *kinds[number % 2]))
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        looks = seen = 0
        end_s = time.monotonic() + 2 * DEADLINE_S  # on a busy host most are gone before a look
        while (looks < 40 or seen < 100 or sum(done) < 400) and time.monotonic() < end_s:
            text = text_of(place)
            header, *lines = text.splitlines()
            assert header.split() == HEADER
            assert text.endswith("\n")
            for line in lines:
                assert LINE.fullmatch(line), line
            rows = tables.parse(text)
            ids = [row["id"] for row in rows]
            assert len(set(ids)) == len(ids)
            by_id = {row["id"]: row for row in rows}
            kept = by_id.pop(stays["id"])
            assert (kept["client"], kept["up_bytes"]) == (stays["client"], "5003")
            for row in by_id.values():
                kind = int(row["listener"] != address_text(kinds[0][0]))
                listener, server, size = kinds[kind]
                host = address_text(listener).rpartition(":")[0]
                assert row["listener"] == address_text(listener), row
                assert row["client"].rpartition(":")[0] == host, row
                assert row["rule"] in ("-", rules[kind]), row
                assert row["server"] in ("-", address_text(server)), row
                assert row["source"] == "-" or row["source"].rpartition(":")[0] == host, row
                assert row["up_bytes"] in ("0", str(size)), row
                assert row["down_bytes"] in ("0", str(size)), row
            looks += 1
            seen += len(by_id)
        stop.set()
        for thread in threads:
            thread.join(timeout=DEADLINE_S)
    assert failed == []
    print(f"{looks} looks, {seen} lines, {sum(done)} connections")
    assert looks >= 40
    assert seen >= 100
    assert sum(done) >= 400


def test_backlog_stays_small_before_a_stalled_reader_and_is_0_once_it_is_drained(
    place: Place, start_forwarder: StartForwarder, narrow_network: None
) -> None:
    del narrow_network
    forwarder = start_forwarder(config("sockmap"))
    with pair_through(forwarder.address) as (client, server):
        transfer(client, server, 5003)
        wait_for_datapath(place, "sockmap")
        assert forwarder.pairs()[0]["backlog_bytes"] == 0
        sent = push_until_blocked(client, most=64 << 20)
        row = forwarder.pairs()[0]
        # The server reads nothing. Only what its TCP can take is redirected, so that between the
        # two sockets next to nothing waits; the rest is still the client's, and not carried.
        assert row["backlog_bytes"] <= 1 << 20
        assert row["up_bytes"] < 5003 + sent
        received = 0
        while received < sent:
            received += len(server.recv(1 << 20))
        wait_for(lambda: forwarder.look()[0]["backlog_bytes"] == 0, "a drained pair")
        assert forwarder.pairs()[0]["up_bytes"] == 5003 + sent


# ---------------------------------------------------------------------------- ends


@pytest.mark.parametrize("walk", EACH_WALK)
def test_a_killed_daemon_leaves_files_that_say_so(
    place: Place, start_forwarder: StartForwarder, walk: str
) -> None:
    forwarder = start_forwarder(config("sockmap"), prefix=only_by(walk))
    with pair_through(forwarder.address) as (client, server):
        transfer(client, server, 5003)
        before = wait_for_datapath(place, "sockmap")[0]
        # A daemon that stands still is not a dead one.
        forwarder.signal(signal.SIGSTOP)
        assert GONE not in text_of(place)
        forwarder.signal(signal.SIGKILL)
        forwarder.wait()
        wait_for(lambda: all(GONE in text_of(place, name) for name in FILES), "the end to be told")
    header, line = text_of(place).splitlines()
    assert header.split()[: len(HEADER)] == HEADER
    assert tables.parse(f"{header}\n{line}")[0]["up_bytes"] == "5003"
    assert rows_of(place)[0]["client"] == before["client"]
    again = start_forwarder(config("sockmap"), prefix=only_by(walk))
    for name in FILES:
        assert GONE not in text_of(place, name)
    assert rows_of(place) == []
    assert again.stop() == 0
    assert leftovers(place) == []


def test_two_instances_show_their_own_pairs(place: Place, start_forwarder: StartForwarder) -> None:
    one = start_forwarder(config("copy"), instance="one")
    two = start_forwarder(config("sockmap"), instance="two")
    with pair_through(one.address) as first, pair_through(two.address) as second:
        transfer(*first, 23)
        transfer(*second, 1023)
        for instance, listener, size in (("one", one.address, 23), ("two", two.address, 1023)):

            def pairs(instance: str = instance) -> list[dict[str, str]]:
                return rows_of(place, instance=instance)

            [row] = wait_for(pairs, "its pair")
            assert (row["listener"], row["up_bytes"]) == (address_text(listener), str(size))
        assert one.stop() == 0
        assert not (place.bpffs / "one").exists()
        assert rows_of(place, instance="two")[0]["up_bytes"] == "1023"


def test_a_pin_removed_by_hand_does_not_disturb_the_end(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config("copy"))
    (place.bpffs / "default" / "show").unlink()
    (place.run_dir / "default" / "proc" / "stats").unlink()
    (place.run_dir / "default" / "proc" / "flush").unlink()
    assert rows_of(place, "listeners")[0]["name"] == "main"
    assert forwarder.stop() == 0
    assert leftovers(place) == []


def test_what_a_dead_daemon_left_is_replaced_and_what_is_not_ours_stays(
    place: Place, start_forwarder: StartForwarder
) -> None:
    first = start_forwarder(config("copy"))
    first.process.kill()
    first.wait()
    pins = place.bpffs / "default"
    stale = (pins / "show").stat().st_ino
    strange = place.bpffs / "default" / "strange"
    subprocess.run(["ln", pins / "stats", strange], check=True)
    half_made = place.bpffs / "default~new"
    half_made.mkdir()
    subprocess.run(["ln", pins / "stats", half_made / "stats"], check=True)
    second = start_forwarder(config("copy"))
    assert (pins / "show").stat().st_ino != stale
    assert not half_made.exists()
    assert GONE not in text_of(place)
    assert second.stop() == 0
    assert [path.name for path in place.pins()] == ["strange"]
    strange.unlink()
    pins.rmdir()


def test_bpffs_is_mounted_where_it_is_not(tmp_path: Path, network: None) -> None:
    del network
    place = Place(tmp_path / "run", tmp_path / "pins")
    (tmp_path / "c.yaml").write_text(config("copy"))
    done = run_command(
        place, "up", "-c", str(tmp_path / "c.yaml"), "--detach", deadline_s=scaled_s(60)
    )
    try:
        assert done.returncode == 0, done.stderr
        assert text_of(place).split() == HEADER
        assert place.bpffs.is_mount()
    finally:
        assert run_command(place, "down", "--now").returncode == 0
    assert not place.bpffs.is_mount()
    assert list(place.bpffs.iterdir()) == []


def test_without_bpf_the_daemon_itself_fills_the_files(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(
        config("auto"),
        prefix=("setpriv", "--bounding-set", "-bpf,-perfmon,-sys_admin"),
    )
    assert place.pins() == []
    proc = place.run_dir / "default" / "proc"
    with pair_through(forwarder.address) as (client, server):
        transfer(client, server, 5003)
        forwarder.wait_for_pair(lambda row: row["state"] == "joined")
        header, line = (proc / "show").read_text().splitlines()
        assert header.split()[: len(HEADER)] == HEADER
        assert "no BPF view here" in header
        assert tables.parse(f"{header}\n{line}")[0]["up_bytes"] == "5003"
        # Made at the moment of reading.
        transfer(client, server, 4711)
        # The server has the bytes a moment before they are counted.
        wait_for(
            lambda: tables.parse((proc / "show").read_text())[0]["up_bytes"] == "9714", "counted"
        )
    rows = {row["stat"]: row["value"] for row in tables.parse((proc / "stats").read_text())}
    assert rows["accepted"] == "1"
    assert tables.parse((proc / "listeners").read_text())[0]["accepted"] == "1"


def test_where_the_kernel_prints_nothing_the_daemon_does_and_says_so(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config("sockmap"), prefix=only_by("daemon"))
    line = forwarder.wait_for_line("warning: no_view")
    assert 'consequence="the daemon fills the files in proc/ itself; once it is killed they' in line
    assert "run as root" not in line
    assert not re.search(r"\\012|\\n|insns", line)
    proc = place.run_dir / "default" / "proc"
    with pair_through(forwarder.address) as (client, server):
        transfer(client, server, 5003)
        row = forwarder.wait_for_pair(lambda row: row["datapath"] == "sockmap")
        # Until the kernel carries the first bytes, nothing can wait there.
        assert row["backlog_bytes"] in (0, None)
        transfer(client, server, 5003)
        assert forwarder.pairs()[0]["backlog_bytes"] is None
        header, line = (proc / "show").read_text().splitlines()
        assert f"said by the daemon (pid {forwarder.process.pid}): no BPF view here" in header
        assert tables.parse(f"{header}\n{line}")[0]["up_bytes"] == "10006"
        forwarder.kill()
    wait_for(lambda: not place.processes(), "its workers end")
    # What it said last, with the time at which it did.
    assert (proc / "show").read_text().splitlines() == [header, line]
    assert start_forwarder(config("sockmap")).stop() == 0
    assert leftovers(place) == []


@pytest.mark.parametrize("datapath", ["copy", "auto"])
def test_without_a_view_no_directory_is_left_in_bpffs(
    place: Place, start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder(config(datapath), prefix=only_by("daemon"))
    assert forwarder.stop() == 0
    assert [path for path in place.bpffs.iterdir() if path.is_dir()] == []


# ---------------------------------------------------------------------------- the controls


def shell(place: Place, command: str) -> str:
    """What it prints, in the pseudo-/proc."""
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=place.run_dir / "default" / "proc",
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


@contextlib.contextmanager
def listening_on(forwarder: Daemon, port: int) -> Iterator[None]:
    """A pair through that port works."""
    with pair_through((forwarder.address[0], port)) as (client, server):
        transfer(client, server, 23)
        yield


def test_listen_port_moves_the_first_listener_and_drops_no_pair(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config("sockmap"))
    old = forwarder.address[1]
    new = unused_port()  # not the next one: that may be some earlier client's, in TIME_WAIT
    with pair_through(forwarder.address) as (client, server):
        transfer(client, server, 5003)
        assert shell(place, "cat listen_port") == f"{old}\n"
        shell(place, f"echo {new} > listen_port")
        wait_for(lambda: shell(place, "cat listen_port") == f"{new}\n", "the new port")
        transfer(server, client, 5003)
        with listening_on(forwarder, new):
            assert rows_of(place, "listeners")[0]["bind"] == f"127.0.0.1:{new}"
        with pytest.raises(ConnectionRefusedError):
            dial((forwarder.address[0], old))
        with Waiting() as taken:
            shell(place, f"echo {taken.address[1]} > listen_port")
            error = wait_for(lambda: shell(place, "cat errors"), "the refusal")
        assert "listen_port: cannot listen on" in error
        assert shell(place, "cat listen_port") == f"{new}\n"
        for bad in ("banana", "65536", "-1", "1 2", ""):
            assert shell(place, f"echo '{bad}' > listen_port; cat listen_port") == f"{new}\n"
        wait_for(lambda: len(shell(place, "cat errors").splitlines()) == 6, "six refusals")
        transfer(client, server, 23)


def test_flush_resets_pairs(place: Place, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config("copy"))
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(pair_through(forwarder.address)) for _ in range(4)]
        for client, server in pairs:
            transfer(client, server, 23)
        ids = {row["client"]: row["id"] for row in wait_for_datapath(place, "copy", 4)}
        first, second, *others = [
            (client, ids[address_text(client.getsockname()[:2])]) for client, _ in pairs
        ]
        shell(place, f"echo {first[1]} > flush; echo {second[1]} > flush; cat flush")
        for client, _ in (first, second):
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        wait_for(lambda: {row["id"] for row in rows_of(place)} == {n for _, n in others}, "two")
        assert "flush: no such pair: 999999" in shell(place, "echo 999999 > flush; cat errors")
        assert "banana" in shell(place, f"echo '{others[0][1]} banana' > flush; cat errors")
        assert len(rows_of(place)) == 2
        shell(place, "echo all > flush")
        for client, _ in others:
            with pytest.raises(ConnectionResetError):
                client.recv(1)


def test_forward_joins_sockets_of_another_process(
    place: Place, start_forwarder: StartForwarder
) -> None:
    start_forwarder(config("sockmap"))
    with (
        Waiting() as left,
        Waiting() as right,
        dial(left.address) as client,
        dial(right.address) as server,
    ):
        # The other ends of both are ours to give away.
        ends = left.accept(), right.accept()
        fds = " ".join(str(end.fileno()) for end in ends)
        assert shell(place, f"echo {os.getpid()} {fds} > forward; cat errors") == ""
        for end in ends:
            end.close()
        transfer(client, server, 5003)
        transfer(server, client, 4711)
        [row] = wait_for(lambda: rows_of(place), "the pair")
        assert (row["up_bytes"], row["down_bytes"]) == ("5003", "4711")
    assert "process 2147483647" in shell(place, "echo 2147483647 3 4 > forward; cat errors")


def test_what_cannot_be_forwarded_is_not_kept(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config("copy"))
    with open(os.devnull, "rb") as no_socket, socket.socket() as unconnected:
        fds = (no_socket.fileno(), unconnected.fileno())
        before = forwarder.open_fds()
        for one, other in [fds, fds[::-1]] * 5:
            request = f"echo {os.getpid()} {one} {other} > forward; cat errors"
            assert "not a connected socket" in shell(place, request)
            with pytest.raises(ForwarderError):
                forwarder.control().join(one, other)
        forwarder.wait_for_no_more_fds(before)


def test_only_root_may_write(place: Place, start_forwarder: StartForwarder) -> None:
    start_forwarder(config("copy"))
    for path in (place.run_dir.parent, place.run_dir):
        path.chmod(0o755)
    proc = place.run_dir / "default" / "proc"
    for name in ("listen_port", "forward", "flush"):
        done = subprocess.run(
            ["setpriv", "--reuid", "65534", "--clear-groups", "sh", "-c", f"echo all > {name}"],
            cwd=proc,
            capture_output=True,
            check=False,
        )
        assert done.returncode != 0
        assert b"ermission denied" in done.stderr
    assert shell(place, "cat errors") == ""


def test_refusals_are_counted_by_reason(place: Place, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config("copy"))
    with SinkServer():
        for _ in range(3):
            with dial(forwarder.address) as client:
                client.sendall(instruction("10.0.0.1:80"))
                assert read_to_end(client) == refusal("denied")
    wait_for(lambda: {r["stat"]: r for r in rows_of(place, "stats")}.get("closed.denied"), "stats")
    wait_for(
        lambda: (
            {row["stat"]: row["value"] for row in rows_of(place, "stats")}["closed.denied"] == "3"
        ),
        "three denied",
    )
    assert rows_of(place, "listeners")[0]["refused"] == "3"

"""`show`, `flush` and `connect` as someone uses them at a prompt."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers.daemon import COMMAND, run_command
from tests.helpers.peers import (
    EchoServer,
    SinkServer,
    Waiting,
    address_text,
    dial_through,
    digest,
    ends_with_reset,
    pair_through,
    pattern,
    read_exactly,
    read_to_end,
    unused_port,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon, Place
    from tests.kernel.conftest import StartForwarder

COLUMNS: Final = [
    *("ID", "STATE", "DATAPATH", "CLIENT", "LISTENER", "SOURCE", "SERVER"),
    *("UP_BYTES", "DOWN_BYTES", "AGE_S", "IDLE_S", "RULE"),
]
DATAPATHS: Final = ["copy", "sockmap", "splice"]


def config(datapath: str = "auto") -> str:
    return f"""
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{{name: named, match: instruction, allow: [loopback]}}]
datapath: {datapath}
"""


def text_rows(forwarder: Daemon) -> list[dict[str, str]]:
    """What `show` prints for people, by column."""
    done = forwarder.command("show")
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split()[: len(COLUMNS)] == COLUMNS
    return [dict(zip(COLUMNS, line.split(), strict=False)) for line in lines]


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_show_counts_payload_only_and_to_the_byte(
    start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder(config(datapath))
    with Waiting() as waiting:
        client = dial_through(forwarder.address, waiting.address, b"early bytes")
        server = waiting.accept()
        with client, server:
            assert read_exactly(server, 11) == b"early bytes"
            up, down = 11, 0
            for size in (1, 1461, 50_001, 300_007):
                carry(client, server, size)
                carry(server, client, size)
                up, down = up + size, down + size
                wait_for_counts(forwarder, up, down)
            row = forwarder.wait_for_pair(lambda row: row["datapath"] == datapath)
            (text,) = text_rows(forwarder)
            assert text["ID"] == str(row["id"])
            assert text["STATE"] == row["state"] == "joined"
            assert text["DATAPATH"] == datapath
            assert text["CLIENT"] == row["client"] == address_text(client.getsockname())
            assert text["LISTENER"] == row["listener"] == address_text(forwarder.address)
            assert text["SOURCE"] == row["source"] == address_text(server.getpeername())
            assert text["SERVER"] == row["server"] == address_text(waiting.address)
            assert (text["UP_BYTES"], text["DOWN_BYTES"]) == (str(up), str(down))
            assert text["RULE"] == row["rule"] == "named"
            assert {name.lower() for name in COLUMNS} <= set(row)
            assert {"reason", "up_packets", "down_packets", "backlog_bytes"} <= set(row)
            # Also those that the datapath itself has carried.
            carry(client, server, 70_001)
            carry(server, client, 30_011)
            up, down = up + 70_001, down + 30_011
            wait_for_counts(forwarder, up, down)
    forwarder.wait_for_no_pairs()
    stats = forwarder.show("stats")
    assert (stats["bytes_up"], stats["bytes_down"]) == (up, down)


def carry(sender: socket.socket, receiver: socket.socket, size: int) -> None:
    """Bytes of one direction, more than the sockets take while nobody reads."""
    with ThreadPoolExecutor() as threads:
        sent = threads.submit(sender.sendall, pattern(size))
        assert read_exactly(receiver, size) == pattern(size)
        sent.result()


def wait_for_counts(forwarder: Daemon, up: int, down: int) -> None:
    """Until `show` says this of the only pair; the counts follow the bytes by a moment."""
    wait_for(
        lambda: [(row["up_bytes"], row["down_bytes"]) for row in forwarder.look()] == [(up, down)],
        f"{up} bytes up, {down} down",
    )


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_flush_resets_the_named_pairs_and_no_others(
    start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder(config(datapath))
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(pair_through(forwarder.address)) for _ in range(3)]
        for client, server in pairs:
            exchange(client, server)
        wait_for(
            lambda: [row["datapath"] for row in forwarder.look()] == [datapath] * 3, "three pairs"
        )
        ids = {row["client"]: str(row["id"]) for row in forwarder.pairs()}
        (client, server), *others = pairs
        done = forwarder.command("flush", ids[address_text(client.getsockname())])
        assert done.returncode == 0, done.stderr
        assert ends_with_reset(client) == b""
        assert ends_with_reset(server) == b""
        for client, server in others:
            exchange(client, server)
        done = forwarder.command("flush", "999999999")
        assert done.returncode == 1
        assert "999999999" in done.stderr
        assert forwarder.command("flush").returncode == 2
        assert forwarder.command("flush", "--all").returncode == 0
        for client, server in others:
            assert ends_with_reset(client) == b""
            assert ends_with_reset(server) == b""
    forwarder.wait_for_no_pairs()
    assert forwarder.show("stats")["closed"]["flushed"] == 3


def exchange(client: socket.socket, server: socket.socket) -> None:
    for sender, receiver in ((client, server), (server, client)):
        sender.sendall(b"x" * 1000)
        assert read_exactly(receiver, 1000) == b"x" * 1000


@pytest.mark.parametrize(
    ("what", "lines", "known"),
    [
        ("pairs", 1, {"state": "joined", "rule": "named"}),
        ("listeners", 1, {"name": "main", "protocol": "tcp"}),
        ("rules", 2, {"listener": "main", "rule": "named"}),
        ("upstreams", 1, {"upstream": "pool", "server": "127.0.0.1:1"}),
    ],
)
def test_every_show_has_a_line_for_what_its_json_form_has_an_object_for(
    start_forwarder: StartForwarder, what: str, lines: int, known: dict[str, str]
) -> None:
    more = "upstreams: {pool: {servers: ['127.0.0.1:1']}}"
    rules = "allow: [loopback]}, {match: any, to: pool}]"
    forwarder = start_forwarder(config().replace("allow: [loopback]}]", rules) + more)
    with pair_through(forwarder.address):
        forwarder.wait_for_pair(lambda row: row["state"] == "joined")
        rows = forwarder.show(what)
        text = forwarder.command("show", what)
    assert (text.returncode, text.stderr) == (0, "")
    header, *printed = text.stdout.splitlines()
    assert len(printed) == len(rows) == lines
    assert {name.lower() for name in header.split()} <= set(rows[0])
    assert {name: rows[0][name] for name in known} == known
    for value in known.values():
        assert value in printed[0].split()


# ---------------------------------------------------------------------------- connect


def connect(
    place: Place, forwarder: Daemon, destination: str, stdin: bytes
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, "connect", destination, "--via", address_text(forwarder.address)],
        env=place.environ(),
        input=stdin,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_connect_carries_every_byte_both_ways(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config())
    data = pattern(3_000_001)
    with EchoServer() as echo:
        done = connect(place, forwarder, address_text(echo.address), data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data


def test_connect_half_closes_where_its_input_ends(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config())
    with SinkServer() as sink:
        done = connect(place, forwarder, address_text(sink.address), pattern(100_000))
    assert done.stdout == f"sink 100000 {digest(100_000)}".encode()
    assert done.returncode == 0


@contextlib.contextmanager
def connecting(
    place: Place, forwarder: Daemon, destination: tuple[str, int]
) -> Iterator[subprocess.Popen[bytes]]:
    """The command with its input still open, as ssh has it."""
    via = address_text(forwarder.address)
    with subprocess.Popen(
        [*COMMAND, "connect", address_text(destination), "--via", via],
        env=place.environ(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_connect_passes_bytes_on_as_they_come(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config())
    with Waiting() as waiting, connecting(place, forwarder, waiting.address) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with waiting.accept() as server:
            for number in range(5):
                server.sendall(b"server %d\n" % number)
                assert process.stdout.readline() == b"server %d\n" % number
                process.stdin.write(b"client %d\n" % number)
                process.stdin.flush()
                assert read_exactly(server, 9) == b"client %d\n" % number
            process.stdin.close()
            assert read_to_end(server) == b""
        assert process.wait(timeout=DEADLINE_S) == 0


def test_connect_says_why_it_was_refused(place: Place, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config())
    for destination, word in (
        ("10.0.0.1:80", b"denied"),
        (f"127.0.0.1:{unused_port()}", b"refused"),
    ):
        done = connect(place, forwarder, destination, b"payload")
        assert done.returncode == 1
        assert done.stdout == b""
        assert word in done.stderr
        assert b"Traceback" not in done.stderr


def test_connect_fails_when_there_is_no_forwarder(place: Place) -> None:
    port = unused_port()
    done = run_command(place, "connect", "127.0.0.1:1", "--via", f"127.0.0.1:{port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_connect_fails_when_the_stream_is_cut(
    place: Place, start_forwarder: StartForwarder
) -> None:
    """A reset must not look like the end of a whole stream."""
    forwarder = start_forwarder(config())
    with Waiting() as waiting, connecting(place, forwarder, waiting.address) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        with waiting.accept() as server:
            server.sendall(b"half a sen\n")
            assert process.stdout.readline() == b"half a sen\n"
            assert forwarder.command("flush", "--all").returncode == 0
            assert process.wait(timeout=DEADLINE_S) == 1
        assert process.stdout.read() == b""
        said = process.stderr.read()
        assert said
        assert b"Traceback" not in said

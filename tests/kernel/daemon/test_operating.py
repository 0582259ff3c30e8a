"""What operators do to a running daemon, rightly and wrongly, and what must not stop it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from pyforwarder.runtime.instance import Instance
from tests.helpers.daemon import COMMAND, Place, leftovers, run_command
from tests.helpers.first_packets import client_hello
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.peers import (
    AnswerServer,
    EchoServer,
    Waiting,
    address_text,
    dial,
    dial_through,
    pair_through,
    read_exactly,
    read_to_end,
    unused_port,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

CONFIG: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{name: named, match: instruction, allow: [loopback]}]
datapath: copy
"""


def ask(place: Place, request: bytes, instance: str = "default") -> dict[str, Any]:
    """The daemon's answer to these bytes on its control socket."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(DEADLINE_S)
        control.connect(str(Instance.named(instance, place.environ()).control))
        control.sendall(request)
        answer = json.loads(control.makefile().readline())
        assert isinstance(answer, dict)
        return answer


# ---------------------------------------------------------------------------- the control socket


def test_bad_requests_are_answered_and_nothing_stops(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(CONFIG)
    with pair_through(forwarder.address) as (client, server):
        for request in (
            b"[" * 60_000,
            b'{"do": "flush", "ids": [true]}',
            b'{"do": "flush", "ids": [1.5]}',
            b'{"do": "forward", "pid": true, "fds": [1, 2]}',
            b'{"do": "forward", "pid": 1, "fds": [0, false]}',
            b'{"do": "forward", "pid": 1, "fds": [0, 4294967296]}',
            b'{"do": "show", "what": {"a": []}}',
            b'{"do": "listen_port", "port": [1]}',
            b'{"do": "join"}',
            b'{"do": "nonsense"}',
        ):
            assert ask(place, request + b"\n")["kind"] == "usage", request[:60]
        client.sendall(b"still here")
        assert read_exactly(server, 10) == b"still here"


# ---------------------------------------------------------------------------- the log


def test_log_that_nobody_reads_stops_nothing(place: Place) -> None:
    (place.run_dir.parent / "c.yaml").write_text(CONFIG)
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [*COMMAND, "up", "-c", place.run_dir.parent / "c.yaml"],
        env=place.environ(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=write_fd,
    )
    try:
        os.close(write_fd)
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        port = int(line.split()[2].rpartition(":")[2])
        lines = 0
        # A pipe takes 64 KiB, and a line has more than 100 bytes: twice what fits.
        while lines * 100 < 128 * 1024:
            with dial(("127.0.0.1", port)) as client:
                client.sendall(instruction("10.0.0.1:80"))
                assert read_to_end(client) == refusal("denied")
            lines += 1
        assert run_command(place, "down").returncode == 0
        assert process.wait(timeout=DEADLINE_S) == 0
        with os.fdopen(read_fd, "rb") as log:
            assert b" info: accepting " in log.readline()
            assert b" info: started " in log.readline()
            assert b"reason=denied" in log.readline()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert leftovers(place) == []


def test_closed_connection_is_a_line_with_every_field(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(CONFIG + "log: {format: json}\n")
    with pair_through(forwarder.address) as (client, server):
        client.sendall(b"x" * 1023)
        read_exactly(server, 1023)
        server.sendall(b"y" * 23)
        read_exactly(client, 23)
        ours, theirs = client.getsockname(), server.getpeername()
        row = forwarder.wait_for_pair(lambda row: row["up_bytes"] == 1023)
    said = json.loads(forwarder.wait_for_line('"event": "closed"'))
    assert 0 < said.pop("age_s") < 60
    told = datetime.datetime.fromisoformat(said.pop("time"))
    assert abs((told - datetime.datetime.now(datetime.UTC)).total_seconds()) < 60
    assert said == {
        "instance": "default",
        "asked": row["server"],
        "level": "info",
        "event": "closed",
        "id": row["id"],
        "reason": "finished",
        "listener": "main",
        "rule": "named",
        "client": f"{ours[0]}:{ours[1]}",
        "source": f"{theirs[0]}:{theirs[1]}",
        "server": row["server"],
        "datapath": "copy",
        "why": row["reason"],
        "up_bytes": 1023,
        "down_bytes": 23,
        "up_packets": row["up_packets"],
        "down_packets": row["down_packets"],
    }


def test_log_of_text_begins_with_the_time(place: Place, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(CONFIG)
    with pair_through(forwarder.address):
        pass
    line = forwarder.wait_for_line(" closed ")
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z pyforwarder info: closed id=", line)
    del place


# ---------------------------------------------------------------------------- reload


def test_reload_changes_the_log_too_and_says_what_it_cannot_change(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(CONFIG + "workers: 1\nlog: {level: warning}\n")
    with pair_through(forwarder.address):
        pass
    forwarder.reconfigure(
        CONFIG.replace("datapath: copy", "datapath: sockmap")
        + "workers: 2\nlog: {level: info, format: json}\n"
    )
    done = forwarder.command("reload")
    assert done.returncode == 0
    assert done.stderr == (
        "reloaded: 1 listener\nchanged, but fixed until the next `up`: workers, datapath\n"
    )
    said = json.loads(forwarder.wait_for_line("restart_needed"))
    assert said["keys"] == "workers,datapath"
    with pair_through(forwarder.address):
        pass
    said = json.loads(forwarder.wait_for_line('"closed"'))
    assert said["reason"] == "finished"
    assert " closed " not in forwarder.output()
    del place


def test_refused_reload_is_in_the_log(place: Place, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(CONFIG)
    forwarder.reconfigure("listeners: [{bnd: 1}]\n")
    assert forwarder.command("reload").returncode == 2
    assert "bnd" in forwarder.wait_for_line("reload_refused")
    forwarder.signal(signal.SIGHUP)
    assert "bnd" in forwarder.wait_for_line("reload_refused", count=2)
    forwarder.reconfigure(CONFIG)
    assert forwarder.command("reload").returncode == 0
    forwarder.wait_for_line("reloaded listeners=1")
    del place


# ---------------------------------------------------------------------------- listen_port


def test_listen_port_moves_the_first_tcp_listener_and_nothing_else(
    place: Place, start_forwarder: StartForwarder
) -> None:
    path = place.run_dir.parent / "u.sock"
    others = f"""
listeners:
  - name: datagrams
    bind: 127.0.0.1:0
    protocol: udp
    rules: [{{match: any, to: "127.0.0.1:9"}}]
  - name: local
    bind: "unix:{path}"
    rules: [{{name: named, match: instruction, allow: [loopback]}}]
"""
    forwarder = start_forwarder(others + CONFIG.removeprefix("\nlisteners:\n"))
    before = forwarder.listeners()
    # What stands in the file by now is for a reload.
    forwarder.reconfigure("nonsense: 1\n")
    port = unused_port()
    proc = place.run_dir / "default" / "proc"
    assert (proc / "listen_port").read_text() == f"{before['main'][1]}\n"
    (proc / "listen_port").write_text(f"{port}\n")
    wait_for(lambda: (proc / "listen_port").read_text() == f"{port}\n", "the new port")
    assert (proc / "errors").read_text() == ""
    rows = {row["name"]: row["bind"] for row in forwarder.show("listeners")}
    assert rows == {
        "datagrams": f"127.0.0.1:{before['datagrams'][1]}",
        "local": f"unix:{path}",
        "main": f"127.0.0.1:{port}",
    }
    with pair_through(("127.0.0.1", port)) as (client, server):
        client.sendall(b"x")
        assert read_exactly(server, 1) == b"x"
    # It stays there over a reload.
    forwarder.reconfigure(CONFIG)
    assert forwarder.command("reload").returncode == 0
    assert forwarder.show("listeners")[0]["bind"] == f"127.0.0.1:{port}"


# ---------------------------------------------------------------------------- forward


@pytest.mark.parametrize("datapath", ["copy", "sockmap"])
def test_sockets_that_a_pair_has_are_not_joined_again_by_any_worker(
    place: Place, start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder(CONFIG.replace("copy", datapath) + "workers: 3\n")
    with (
        Waiting() as left,
        Waiting() as right,
        Waiting() as third,
        dial(left.address) as client,
        dial(right.address) as server,
        dial(third.address) as other,
    ):
        ends = left.accept(), right.accept(), third.accept()
        first, second, unused = (str(end.fileno()) for end in ends)
        me = str(os.getpid())
        done = forwarder.command("forward", me, first, second)
        assert done.returncode == 0, done.stderr
        pair_id = int(done.stdout)
        for fds in ((first, second), (second, first), (unused, first), (second, unused)) * 2:
            done = forwarder.command("forward", me, *fds)
            assert (done.returncode, done.stdout) == (1, "")
            assert f"pair {pair_id} has that socket already" in done.stderr
        for end in ends[:2]:
            end.close()
        client.sendall(b"x" * 100_000)
        assert read_exactly(server, 100_000) == b"x" * 100_000
        assert [row["id"] for row in forwarder.pairs()] == [pair_id]
        # The one that was refused goes on as if nothing had been.
        other.sendall(b"mine")
        assert ends[2].recv(4) == b"mine"
        ends[2].close()
        assert other.recv(1) == b""
    del place


# ---------------------------------------------------------------------------- after a kill -9


def test_everything_that_was_shown_can_be_shown_after_a_kill(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(CONFIG)
    with EchoServer() as server, dial_through(forwarder.address, server.address) as client:
        client.sendall(b"x" * 23)
        read_exactly(client, 23)
        forwarder.wait_for_pair(lambda row: row["down_bytes"] == 23)
        before = {what: forwarder.show(what) for what in ("stats", "listeners")}
        forwarder.kill()
    wait_for(lambda: not place.processes(), "its workers end")
    for what, said in before.items():
        done = run_command(place, "show", what, "--json")
        assert done.returncode == 3
        assert "a daemon that is gone has left" in done.stderr
        assert json.loads(done.stdout) == said
        done = run_command(place, "show", what)
        assert "# the daemon is gone" in done.stdout.splitlines()[0]
    assert run_command(place, "show", "rules").stdout == ""


# ---------------------------------------------------------------------------- drain


@pytest.mark.parametrize("how", ["drain", "move"])
def test_clients_that_have_connected_by_then_are_served(
    place: Place, start_forwarder: StartForwarder, how: str
) -> None:
    # More than a worker accepts at one go, while it is busy with something else.
    forwarder = start_forwarder(CONFIG + "workers: 1\n")
    (worker,) = forwarder.workers()
    with EchoServer() as server, contextlib.ExitStack() as stack:
        worker.suspend()
        clients = [stack.enter_context(dial(forwarder.address)) for _ in range(40)]
        for client in clients:
            client.sendall(instruction(address_text(server.address)) + b"x")
        if how == "drain":
            before = psutil.Process(forwarder.process.pid).num_fds()
            forwarder.signal(signal.SIGTERM)
            wait_for(
                lambda: psutil.Process(forwarder.process.pid).num_fds() < before,
                "the daemon closes its listener, and tells the worker next",
            )
        else:
            new = ("127.0.0.1", unused_port())
            (place.run_dir / "default" / "proc" / "listen_port").write_text(f"{new[1]}\n")

            def listens() -> bool:
                with contextlib.suppress(ConnectionRefusedError), dial(new):
                    return True
                return False

            wait_for(listens, "the daemon listens at the new port, and tells the worker next")
        worker.resume()
        for client in clients:
            assert read_exactly(client, 7) == ACK + b"x"
    if how == "drain":
        assert forwarder.wait() == 0


# ---------------------------------------------------------------------------- audit

AUDITED: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules:
      - {name: web, match: {tls: {sni: "*.test"}}, to: web}
      - {name: sni, match: {tls: {sni: localhost}}, to: sni, port: PORT, allow: [127.0.0.0/8]}
      - {name: away, match: {tls: {sni: "*.away"}}, to: away}
      - {name: named, match: instruction, allow: [127.0.0.0/8]}
      - {name: rest, match: any, reject: close}
upstreams:
  web: {servers: ["127.0.0.1:PORT"]}
  away: {servers: [{address: "127.0.0.1:PORT", weight: 0}]}
log: {format: json}
"""


def test_a_line_tells_what_a_connection_was_decided_on_and_why_it_was_refused(
    start_forwarder: StartForwarder,
) -> None:
    with AnswerServer("a") as server:
        port = server.address[1]
        forwarder = start_forwarder(AUDITED.replace("PORT", str(port)))
        told: list[dict[str, object]] = []
        for sent in (
            client_hello(b"A.test"),
            client_hello(b"localhost"),
            client_hello(b"b.other"),
            client_hello(b"a.away"),
            instruction(f"127.0.0.1:{port}") + b"x",
            instruction("192.0.2.7:9"),
            b"x",
        ):
            with dial(forwarder.address) as client, contextlib.suppress(OSError):
                client.sendall(sent)
                client.recv(100)
            told.append(
                json.loads(forwarder.wait_for_line('"event": "closed"', count=len(told) + 1))
            )
    fields = ("rule", "sni", "asked", "resolved", "upstream", "refusal")
    assert [{name: line[name] for name in fields if name in line} for line in told] == [
        {"rule": "web", "sni": "a.test", "upstream": "web"},
        {
            "rule": "sni",
            "sni": "localhost",
            "asked": f"localhost:{port}",
            "resolved": f"127.0.0.1:{port}",
        },
        {"rule": "rest", "sni": "b.other", "refusal": "the rule says `reject: close`"},
        {
            "rule": "away",
            "sni": "a.away",
            "upstream": "away",
            "refusal": "no server of upstream away: 1 drained",
        },
        {"rule": "named", "asked": f"127.0.0.1:{port}"},
        {
            "rule": "named",
            "asked": "192.0.2.7:9",
            "refusal": "allow does not list 192.0.2.7 port 9",
        },
        {"rule": "rest", "refusal": "the rule says `reject: close`"},
    ]


def test_start_reload_and_stop_are_lines_and_steps_are_at_level_debug(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(CONFIG + "log: {level: debug}\n")
    with socket.create_connection(forwarder.address):
        pass
    forwarder.wait_for_line(r" closed id=\d+ reason=client_gone ")
    with pair_through(forwarder.address):
        line = forwarder.wait_for_line(r" debug: flushed id=\d+ ")
    (pair,) = re.findall(r" id=\d+ ", line)
    forwarder.wait_for_line(f" closed{pair}")
    assert run_command(place, "reload").returncode == 0
    assert forwarder.stop() == 0
    told = [line for line in forwarder.output().splitlines() if " pyforwarder info: " in line]
    said = [line.split()[3] for line in told if " id=" not in line]
    assert said == ["accepting", "started", "reloaded", "stopped"]
    steps = [line.split()[3] for line in forwarder.output().splitlines() if pair in line]
    assert steps == ["routed", "connected", "flushed", "finished", "closed"]
    # The line of the end of a pair that outlives its worker does not know what it was decided on.
    (routed,) = [
        line for line in forwarder.output().splitlines() if f" debug: routed{pair}" in line
    ]
    assert re.search(r" asked=127\.0\.0\.1:\d+ ", routed)

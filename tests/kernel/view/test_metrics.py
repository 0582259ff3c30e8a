"""What Prometheus gets from a running daemon."""

from __future__ import annotations

import contextlib
import signal
import socket
from typing import TYPE_CHECKING

import psutil

from tests.helpers.instruction import instruction, refusal
from tests.helpers.peers import (
    EchoServer,
    dial,
    dial_through,
    pair_through,
    pattern,
    read_exactly,
    read_to_end,
    unused_port,
)
from tests.helpers.samples import Samples, scrape, value
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder


def config(port: int, *, datapath: str = "sockmap", name: str = "main", host: str = "") -> str:
    return f"""
workers: 2
listeners:
  - name: {name}
    bind: 127.0.0.1:0
    rules: [{{name: named, match: instruction, allow: [loopback]}}]
datapath: {datapath}
metrics: {{bind: "{host or "127.0.0.1"}:{port}"}}
"""


def metrics_process(forwarder: Daemon, port: int) -> psutil.Process:
    """The process that listens there."""

    def look() -> psutil.Process | None:
        for child in psutil.Process(forwarder.process.pid).children():
            listens = [c.laddr.port for c in child.net_connections() if c.status == "LISTEN"]
            if port in listens:
                return child
        return None

    found = wait_for(look, "the metrics process")
    assert found is not None
    return found


def test_traffic_is_counted_over_all_workers(start_forwarder: StartForwarder) -> None:
    port = unused_port()
    forwarder = start_forwarder(config(port))
    with EchoServer() as server:
        for _ in range(23):
            with dial_through(forwarder.address, server.address, b"x" * 1023) as client:
                assert read_exactly(client, 1023) == b"x" * 1023
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == b""
    with dial(forwarder.address) as client:
        client.sendall(instruction("10.0.0.1:80"))
        assert read_to_end(client) == refusal("denied")
    with pair_through(forwarder.address) as (client, peer):
        client.sendall(pattern(5003))
        assert read_exactly(peer, 5003) == pattern(5003)

        def look() -> Samples:
            samples = scrape(port)
            closed = value(samples, "connections_closed_total", reason="finished")
            joined = value(samples, "pairs", state="joined", datapath="sockmap")
            return samples if (closed, joined) == (23, 1) else {}

        samples = wait_for(look, "the counts")
    assert value(samples, "connections_accepted_total", listener="main") == 25
    assert value(samples, "connections_refused_total", listener="main") == 1
    assert value(samples, "connections_closed_total", reason="denied") == 1
    assert value(samples, "rule_taken_total", listener="main", rule="named") == 25
    assert value(samples, "pairs_joined_total", datapath="copy") == 24
    assert value(samples, "carried_bytes_total", direction="up") == 23 * 1023 + 5003
    assert value(samples, "carried_bytes_total", direction="down") == 23 * 1023
    assert value(samples, "datapath_available", datapath="sockmap") == 1
    assert value(samples, "workers") == 2


def test_the_process_has_no_privilege_and_is_replaced(start_forwarder: StartForwarder) -> None:
    port = unused_port()
    forwarder = start_forwarder(config(port, datapath="copy"))
    scrape(port)
    first = metrics_process(forwarder, port)
    assert 0 not in {*first.uids(), *first.gids()}
    first.send_signal(signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(first.pid), "its end")
    second = metrics_process(forwarder, port)
    assert second.pid != first.pid
    assert value(scrape(port), "connections_open", listener="main") == 0


def test_a_reload_brings_new_names_and_another_address(start_forwarder: StartForwarder) -> None:
    port, other = unused_port(), unused_port("::1")
    forwarder = start_forwarder(config(port, datapath="copy"))
    forwarder.reconfigure(config(port, datapath="copy", name="web"))
    assert forwarder.command("reload").returncode == 0
    assert value(scrape(port), "connections_open", listener="web") == 0
    forwarder.reconfigure(config(other, datapath="copy", name="web", host="[::1]"))
    assert forwarder.command("reload").returncode == 0
    assert value(scrape(other, "[::1]"), "connections_open", listener="web") == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    # An address that is taken changes nothing.
    with socket.create_server(("127.0.0.1", port)):
        forwarder.reconfigure(config(port, datapath="copy", name="late"))
        done = forwarder.command("reload")
        assert done.returncode == 1
        assert "metrics" in done.stderr
    assert value(scrape(other, "[::1]"), "connections_open", listener="web") == 0


def test_slow_and_many_clients_stop_neither_scrapes_nor_the_daemon(
    start_forwarder: StartForwarder,
) -> None:
    port = unused_port()
    forwarder = start_forwarder(config(port, datapath="copy"))
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(("127.0.0.1", port))) for _ in range(300)]
        for sock in silent[::2]:
            with contextlib.suppress(OSError):
                sock.sendall(b"GET /metrics HTTP/1.1\r\nHost")
        for _ in range(3):
            assert value(scrape(port), "workers") == 2
        # The oldest have made room.
        assert silent[0].recv(1) == b""
        process = metrics_process(forwarder, port)
        assert (process.num_threads(), process.num_fds() < 200) == (1, True)
        assert forwarder.pairs() == []


def _answers(port: int) -> bool:
    try:
        return bool(scrape(port))
    except OSError:
        return False

"""Servers of an upstream as an operator has them: drained by command, and counted."""

from __future__ import annotations

import contextlib
import urllib.request
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.peers import (
    EchoServer,
    address_text,
    dial,
    read_exactly,
    read_to_end,
    unused_port,
)
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    import socket

    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder


def states(forwarder: Daemon) -> dict[str, str]:
    return {row["server"]: row["state"] for row in forwarder.show("upstreams")}


def says(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    assert read_exactly(client, len(data)) == data


def test_drained_server_keeps_its_pairs_and_gets_no_new_ones_through_reloads(
    start_forwarder: StartForwarder,
) -> None:
    with EchoServer("one") as one, EchoServer("two") as two, contextlib.ExitStack() as stack:
        names = [address_text(server.address) for server in (one, two)]
        config = (
            "listeners: [{bind: 127.0.0.1:0, rules: [{match: any, to: web}]}]\n"
            f"upstreams: {{web: {{servers: [{', '.join(names)}]}}}}\n"
            "datapath: copy\nworkers: 2\n"
        )
        forwarder = start_forwarder(config)

        def connect() -> socket.socket:
            client = stack.enter_context(contextlib.closing(dial(forwarder.address)))
            says(client, b"hello")
            return client

        clients = [connect() for _ in range(8)]
        held = one.connections
        assert held > 0
        done = forwarder.command("server", f"web/{names[0]}", "drain")
        assert (done.returncode, done.stdout) == (0, "")
        assert states(forwarder) == {names[0]: "drained", names[1]: "up"}
        clients += [connect() for _ in range(8)]
        assert (one.connections, two.connections) == (held, 16 - held)
        assert forwarder.command("reload").returncode == 0
        assert states(forwarder)[names[0]] == "drained"
        for client in clients:
            says(client, b"still here")
        # A worker that is replaced knows of it, too.
        worker = forwarder.workers()[0]
        worker.kill()
        forwarder.wait_for_line("worker_died")
        wait_for(
            lambda: len(forwarder.workers()) == 2 and worker not in forwarder.workers(), "a worker"
        )
        wait_for(lambda: states(forwarder)[names[0]] == "drained", "a worker that was told")
        done = forwarder.command("server", f"web/{names[0]}", "ready")
        assert (done.returncode, done.stderr) == (0, f"web/{names[0]}: takes new pairs\n")
        assert states(forwarder)[names[0]] == "up"
        # A name that the configuration has lost is forgotten.
        assert forwarder.command("server", f"web/{names[1]}", "drain").returncode == 0
        forwarder.reconfigure(config.replace(f", {names[1]}", ""))
        assert forwarder.command("reload").returncode == 0
        forwarder.reconfigure(config)
        assert forwarder.command("reload").returncode == 0
        assert states(forwarder) == dict.fromkeys(names, "up")
        forwarder.reconfigure(
            config.replace(f", {names[1]}", f", {{address: '{names[1]}', weight: 0}}")
        )
        assert forwarder.command("reload").returncode == 0
        done = forwarder.command("server", f"web/{names[1]}", "ready")
        said = f"web/{names[1]}: no new pairs: its weight is 0 in the configuration\n"
        assert (done.returncode, done.stderr) == (0, said)
        wrong = forwarder.command("server", f"wep/{names[0]}", "drain")
        assert (wrong.returncode, wrong.stderr.count(f"did you mean 'web/{names[0]}'")) == (2, 1)


def test_what_servers_do_is_told_to_prometheus(start_forwarder: StartForwarder) -> None:
    port, dead = unused_port(), unused_port()
    with EchoServer("web") as server:
        name = address_text(server.address)
        forwarder = start_forwarder(
            "listeners: [{name: main, bind: 127.0.0.1:0, rules: [{match: any, to: web}]}]\n"
            f"upstreams: {{web: {{servers: [{name}, 127.0.0.1:{dead}]}}}}\n"
            f"datapath: copy\nworkers: 1\nmetrics: {{bind: 127.0.0.1:{port}}}\n"
        )

        def scrape() -> dict[tuple[str, ...], float]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            return {
                (sample.name.removeprefix("pyforwarder_"), *sample.labels.values()): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }

        with contextlib.closing(dial(forwarder.address)) as client:
            says(client, b"12345")
            wait_for(lambda: scrape()["server_pairs", name, "web"] == 1, "a pair")
        with contextlib.closing(dial(forwarder.address)) as client:
            says(client, b"1234567")
        forwarder.wait_for_no_pairs()
        wait_for(lambda: scrape()["listener_bytes_total", "up", "main"] == 12, "bytes")
        found = scrape()
        assert found["listener_bytes_total", "down", "main"] == 12
        assert found["server_connects_total", name, "web"] == 2
        assert found["server_pairs", name, "web"] == 0
        assert found["server_failures_total", "refused", f"127.0.0.1:{dead}", "web"] == 1
        assert found["server_up", name, "web"] == 1
        assert found["connect_seconds_count", "web"] == 2
        assert found["connect_seconds_count", "-"] == 0
        assert found["decision_seconds_count",] == 2
        assert forwarder.command("server", f"web/{name}", "drain").returncode == 0
        assert scrape()["server_drained", name, "web"] == 1


def test_end_of_a_drained_servers_pair_is_its_own(start_forwarder: StartForwarder) -> None:
    with EchoServer("web") as server:
        name = address_text(server.address)
        forwarder = start_forwarder(
            "listeners: [{bind: 127.0.0.1:0, rules: [{match: any, to: web}]}]\n"
            f"upstreams: {{web: {{servers: [{name}]}}}}\ndatapath: copy\n"
        )
        with contextlib.closing(dial(forwarder.address)) as client:
            says(client, b"hello")
            assert forwarder.command("server", f"web/{name}", "drain").returncode == 0
            with (
                contextlib.suppress(ConnectionResetError),
                contextlib.closing(dial(forwarder.address)) as late,
            ):
                assert read_to_end(late) == b""
            says(client, b"and on")
        forwarder.wait_for_no_pairs()
        assert forwarder.show("stats")["closed"] == {"finished": 1, "unreachable": 1}

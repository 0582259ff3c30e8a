"""Active health checks: a server that is down gets no pair, and is back when it answers."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

import psutil
import pytest

from pyforwarder.core import proxy_protocol
from pyforwarder.core.first_packet.outcome import NEED_MORE
from tests.helpers.peers import NameServer, Waiting, address_text, dial, read_to_end, unused_port
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

pytestmark = pytest.mark.copied

HEALTH = "{interval: 100ms, timeout: 80ms, rise: 2, fall: 2}"


def config(*servers: str, more: str = "", health: str = HEALTH) -> str:
    listed = ", ".join(f"'{server}'" for server in servers)
    return (
        "workers: 2\n"
        "listeners: [{name: main, bind: '127.0.0.1:0', rules: [{match: any, to: web}]}]\n"
        f"upstreams: {{web: {{servers: [{listed}], health: {health}{more}}}}}\n"
    )


def states(forwarder: Daemon) -> dict[str, str]:
    return {row["server"]: row["state"] for row in forwarder.show("upstreams")}


def who_answers(forwarder: Daemon) -> str:
    with dial(forwarder.address) as sock:
        return read_to_end(sock).decode()


def wait_for_state(forwarder: Daemon, server: str, state: str) -> None:
    def is_so() -> bool:
        rows = {row["server"]: row["state"] for row in forwarder.look("upstreams")}
        return bool(rows[server] == state)

    wait_for(is_so, f"{server} {state}")


def test_a_server_that_goes_down_gets_no_pair_until_it_is_back(
    start_forwarder: StartForwarder,
) -> None:
    port = unused_port()
    text = f"127.0.0.1:{port}"
    with NameServer("always") as always:
        with NameServer("sometimes", port=port):
            forwarder = start_forwarder(config(address_text(always.address), text))
            assert {who_answers(forwarder) for _ in range(8)} == {"always", "sometimes"}
        wait_for_state(forwarder, text, "down")
        failures = forwarder.show("upstreams")
        assert [who_answers(forwarder) for _ in range(8)] == ["always"] * 8
        # Nobody tried it in vain.
        assert [row["failures"] for row in forwarder.show("upstreams")] == [
            row["failures"] for row in failures
        ]
        with NameServer("sometimes", port=port):
            wait_for_state(forwarder, text, "up")
            assert {who_answers(forwarder) for _ in range(8)} == {"always", "sometimes"}
    assert forwarder.wait_for_line(
        f'server_down upstream=web server={text} why="TCP: Connection refused"'
    )
    assert forwarder.wait_for_line(f"server_up upstream=web server={text} why=connected")


def test_a_server_that_is_dead_from_the_start_is_down_after_one_check(
    start_forwarder: StartForwarder,
) -> None:
    dead = f"127.0.0.1:{unused_port()}"
    slow = HEALTH.replace("fall: 2", "fall: 100")
    with NameServer("alive") as alive:
        forwarder = start_forwarder(config(dead, address_text(alive.address), health=slow))
        wait_for_state(forwarder, dead, "down")
        assert states(forwarder)[address_text(alive.address)] == "up"


def test_a_new_worker_knows_what_is_down(start_forwarder: StartForwarder) -> None:
    dead = f"127.0.0.1:{unused_port()}"
    with NameServer("alive") as alive:
        forwarder = start_forwarder(config(dead, address_text(alive.address)))
        wait_for_state(forwarder, dead, "down")
        before = {process.pid for process in forwarder_workers(forwarder)}
        for process in forwarder_workers(forwarder):
            process.send_signal(signal.SIGKILL)
        forwarder.wait_for_line("worker_died", count=2)
        wait_for(
            lambda: len({p.pid for p in forwarder_workers(forwarder)} - before) == 2, "new workers"
        )
        assert states(forwarder)[dead] == "down"


def test_the_checks_are_continued_when_their_process_dies(start_forwarder: StartForwarder) -> None:
    port = unused_port()
    with NameServer("alive") as alive:
        forwarder = start_forwarder(config(f"127.0.0.1:{port}", address_text(alive.address)))
        wait_for_state(forwarder, f"127.0.0.1:{port}", "down")
        checker(forwarder).send_signal(signal.SIGKILL)
        forwarder.wait_for_line("health_checks_died")
        assert states(forwarder)[f"127.0.0.1:{port}"] == "down"
        with NameServer("back", port=port):
            wait_for_state(forwarder, f"127.0.0.1:{port}", "up")
        assert checker(forwarder).uids().real != 0


def test_a_reload_without_health_brings_a_server_back(start_forwarder: StartForwarder) -> None:
    dead = f"127.0.0.1:{unused_port()}"
    with NameServer("alive") as alive:
        text = config(dead, address_text(alive.address))
        forwarder = start_forwarder(text)
        wait_for_state(forwarder, dead, "down")
        forwarder.reconfigure(text)
        assert forwarder.command("reload").returncode == 0
        assert states(forwarder)[dead] == "down"
        forwarder.reconfigure(text.replace(f", health: {HEALTH}", ""))
        assert forwarder.command("reload").returncode == 0
        assert states(forwarder)[dead] == "up"


def test_a_name_is_checked_at_its_addresses(start_forwarder: StartForwarder) -> None:
    # localhost is ::1 and 127.0.0.1: one that answers is enough.
    with NameServer("four") as server:
        name = f"localhost:{server.address[1]}"
        gone = f"localhost:{unused_port()}"
        forwarder = start_forwarder(config(name, gone, "no.such.name.invalid:1"))
        wait_for_state(forwarder, gone, "down")
        wait_for_state(forwarder, "no.such.name.invalid:1", "down")
        assert states(forwarder)[name] == "up"
        assert who_answers(forwarder) == "four"


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_a_check_says_that_it_is_none_of_the_clients(
    form: str, start_forwarder: StartForwarder
) -> None:
    with Waiting() as server:
        start_forwarder(config(address_text(server.address), more=f", send_proxy: {form}"))
        with server.accept() as served:
            data = b""
            while (header := proxy_protocol.read(data)) is NEED_MORE:
                data += served.recv(4096)
            assert isinstance(header, proxy_protocol.Header)
            assert (header.source, header.length) == (None, len(data))
            assert header.is_local == (form == "v2")
            assert served.recv(1) == b""


def test_a_server_that_accepts_nobody_is_down(start_forwarder: StartForwarder) -> None:
    # The queue has room for one: with that taken, further SYNs are not answered.
    with Waiting(backlog=0) as full, dial(full.address), socket.socket() as second:
        second.setblocking(False)
        second.connect_ex(full.address)
        forwarder = start_forwarder(config(address_text(full.address)))
        wait_for_state(forwarder, address_text(full.address), "down")
        forwarder.wait_for_line('why="TCP: no answer in time"')


def checker(forwarder: Daemon) -> psutil.Process:
    """The process that checks: the child that has no listening socket."""
    found = [p for p in forwarder.workers() if not listens(p)]
    assert len(found) == 1
    return found[0]


def forwarder_workers(forwarder: Daemon) -> list[psutil.Process]:
    return [p for p in forwarder.workers() if listens(p)]


def listens(process: psutil.Process) -> bool:
    return any(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp"))

"""`up` from its first line to its last: draining, reloading, dying, and coming back."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from pyforwarder.client import ControlClient
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.instance import Instance
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers import daemon as daemons
from tests.helpers.daemon import Daemon, Place, leftovers, run_command
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.peers import (
    EchoServer,
    NameServer,
    Waiting,
    address_text,
    dial,
    dial_through,
    ends_with_reset,
    pair_through,
    pattern,
    read_exactly,
    read_to_end,
)
from tests.helpers.waiting import stays, wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

DATAPATHS = ["copy", "sockmap", "splice"]
# A spliced pair outlives worker and daemon: test_splice.py.
RESET_AT_DEATH = ["copy", "sockmap"]


def config(
    *, datapath: str = "auto", drain: str = "10s", port: int = 0, allow: str = "loopback"
) -> str:
    return f"""
listeners:
  - name: main
    bind: 127.0.0.1:{port}
    rules: [{{match: instruction, allow: [{allow}]}}]
datapath: {datapath}
timeouts: {{drain: {drain}}}
"""


def ask(address: tuple[str, int], destination: tuple[str, int]) -> bytes:
    with dial(address) as client:
        client.sendall(instruction(address_text(destination)))
        return read_to_end(client)


def exchange(client: socket.socket, server: socket.socket, size: int = 50_000) -> None:
    """Both directions of a pair carry bytes."""
    for sender, receiver in ((client, server), (server, client)):
        sender.sendall(pattern(size))
        assert read_exactly(receiver, size) == pattern(size)


@contextlib.contextmanager
def joined_pairs(
    forwarder: Daemon, count: int, datapath: str
) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Pairs that have carried bytes and are on that datapath."""
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(pair_through(forwarder.address)) for _ in range(count)]
        for client, server in pairs:
            exchange(client, server)
        wait_for(
            lambda: (
                [row["datapath"] for row in forwarder.look() if row["state"] == "joined"]
                == [datapath] * count
            ),
            f"{count} pairs joined on {datapath}",
        )
        yield pairs


# ---------------------------------------------------------------------------- starting


def test_the_files_of_a_running_instance(place: Place, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config())
    home = place.run_dir / "default"
    control = home / "control"
    assert stat.S_ISSOCK(control.lstat().st_mode)
    assert stat.S_IMODE(control.lstat().st_mode) == 0o600
    assert int((home / "pid").read_text()) == forwarder.process.pid
    assert forwarder.stop() == 0
    assert leftovers(place) == []


def test_workers_have_no_privilege(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder("workers: 3\n" + config())
    workers = forwarder.workers()
    assert len(workers) == 3
    for worker in workers:
        assert set(worker.uids()) != {0}
        assert 0 not in worker.uids()
        assert 0 not in worker.gids()
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0, name
        assert status["NoNewPrivs"] == "1"


def test_a_second_up_of_the_same_instance_fails_and_touches_nothing(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config())
    files = sorted((path, path.lstat().st_ino) for path in place.run_files())
    pins = sorted(place.pins())
    with joined_pairs(forwarder, 1, forwarder_datapath(forwarder)) as [(client, server)]:
        done = run_command(place, "up", "-c", str(forwarder.config_path), deadline_s=scaled_s(30))
        assert done.returncode == 1
        assert "default" in done.stderr
        assert "running" in done.stderr
        exchange(client, server)
    assert sorted((path, path.lstat().st_ino) for path in place.run_files()) == files
    assert sorted(place.pins()) == pins


def forwarder_datapath(forwarder: Daemon) -> str:
    """What `auto` becomes here: the datapath of a pair that has been joined for long enough."""
    with pair_through(forwarder.address) as (client, server):
        for _ in range(10):
            exchange(client, server)
        row = forwarder.wait_for_pair(lambda row: row["state"] == "joined")
        return str(row["datapath"])


def test_two_instances_side_by_side(start_forwarder: StartForwarder) -> None:
    one = start_forwarder(config(), instance="one")
    two = start_forwarder(config(allow='"127.0.0.0/8:1"'), instance="two")
    with NameServer("there") as server:
        assert ask(one.address, server.address) == ACK + b"there"
        assert ask(two.address, server.address) == refusal("denied")
        assert one.stop() == 0
        assert ask(two.address, server.address) == refusal("denied")


def test_commands_for_an_instance_that_is_not_running_end_with_3(place: Place) -> None:
    for words in (["show"], ["flush", "--all"], ["reload"], ["down"]):
        done = run_command(place, *words)
        assert done.returncode == 3, words
        assert done.stdout == ""
        assert "default" in done.stderr


def test_detach_returns_once_it_listens(place: Place) -> None:
    path = place.bpffs.parent / "config.yaml"
    path.write_text(config())
    try:
        done = run_command(place, "up", "-c", str(path), "--detach", deadline_s=scaled_s(60))
        assert done.returncode == 0, done.stderr
        shown = run_command(place, "show", "listeners")
        assert shown.returncode == 0
        assert "main" in shown.stdout
        assert run_command(place, "down").returncode == 0
        assert leftovers(place) == []
    finally:
        for process in place.processes():
            process.kill()


def test_systemd_is_told_when_it_is_ready(place: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        path = place.bpffs.parent / "notify"
        notify.bind(str(path))
        notify.settimeout(daemons.START_DEADLINE_S)
        forwarder = daemons.start(place, config(), environ={"NOTIFY_SOCKET": str(path)}, wait=False)
        try:
            assert b"READY=1" in notify.recv(4096).split(b"\n")
            forwarder.wait_for_line("listening on")
            assert forwarder.stop() == 0
        finally:
            forwarder.close()


# ---------------------------------------------------------------------------- draining


# Which signal it is and where the pairs are have nothing to do with each other.
@pytest.mark.parametrize(
    ("datapath", "number"),
    list(zip(DATAPATHS, [signal.SIGTERM, signal.SIGINT, signal.SIGTERM], strict=True)),
)
def test_a_signal_drains(
    start_forwarder: StartForwarder, datapath: str, number: signal.Signals
) -> None:
    forwarder = start_forwarder(config(datapath=datapath, drain="60s"))
    with joined_pairs(forwarder, 2, datapath) as pairs:
        forwarder.signal(number)
        wait_for(lambda: refuses(forwarder.address), "no new connection is accepted")
        for client, server in pairs:
            exchange(client, server)
        assert forwarder.process.poll() is None
    assert forwarder.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_its_processes_is_for_the_daemon_alone(
    start_forwarder: StartForwarder, number: signal.Signals
) -> None:
    """As Ctrl-C in a terminal is, where every process of the foreground gets it."""
    forwarder = start_forwarder(config())
    before = {process.pid for process in forwarder.place.processes()}
    os.killpg(forwarder.process.pid, number)
    if number is signal.SIGHUP:
        wait_for(lambda: " reloaded " in forwarder.output(), "it has read its configuration")
        assert {process.pid for process in forwarder.place.processes()} == before
        forwarder.signal(signal.SIGTERM)
    assert forwarder.wait() == 0
    assert " error: " not in forwarder.output()


def test_everything_can_be_shown_while_pairs_drain(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(drain="60s"))
    before = forwarder.show("listeners")
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
        forwarder.signal(signal.SIGTERM)
        wait_for(lambda: refuses(forwarder.address), "no new connection is accepted")
        for what in ("pairs", "rules", "upstreams", "stats"):
            forwarder.show(what)
            assert forwarder.command("show", what).returncode == 0
        assert forwarder.command("show", "listeners").returncode == 0
        assert [(row["name"], row["bind"], row["open"]) for row in forwarder.show("listeners")] == [
            (row["name"], row["bind"], 1) for row in before
        ]
        exchange(client, server)
    assert forwarder.wait() == 0
    assert "Error" not in forwarder.output()


def refuses(address: tuple[str, int]) -> bool:
    try:
        dial(address).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # it was in the queue of the listener when that was closed
    return False


def test_a_drain_ends_at_its_deadline_with_a_reset(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(drain="700ms"))
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
        began_s = time.monotonic()
        forwarder.signal(signal.SIGTERM)
        assert ends_with_reset(client) == b""
        assert ends_with_reset(server) == b""
        assert time.monotonic() - began_s >= 0.6
    assert forwarder.wait() == 0
    said = [line.split(" info: ")[-1] for line in forwarder.output().splitlines()]
    (draining,) = (line for line in said if line.startswith("draining "))
    assert re.fullmatch(r"draining pairs=1 until=20\S+Z instance=\S+", draining)
    (resetting,) = (line for line in said if line.startswith("resetting "))
    assert resetting.startswith("resetting pairs=1 ")


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_a_second_signal_ends_at_once_with_a_reset(
    start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder(config(datapath=datapath, drain="60s"))
    with joined_pairs(forwarder, 1, datapath) as [(client, server)]:
        forwarder.signal(signal.SIGTERM)
        wait_for(lambda: refuses(forwarder.address), "no new connection is accepted")
        forwarder.signal(signal.SIGTERM)
        assert ends_with_reset(client) == b""
        assert ends_with_reset(server) == b""
        forwarder.wait(deadline_s=scaled_s(10))


def test_down_drains_and_down_now_resets(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(drain="60s"), instance="patient")
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
        going = subprocess.Popen(
            [*daemons.COMMAND, "down", "--instance", "patient"], env=forwarder.place.environ()
        )
        wait_for(lambda: refuses(forwarder.address), "no new connection is accepted")
        exchange(client, server)
        assert going.poll() is None
        done = forwarder.command("down", "--now")
        assert done.returncode == 0, done.stderr
        assert "instance 'patient' stopped; 1 pair reset\n" in done.stderr
        assert ends_with_reset(client) == b""
        assert ends_with_reset(server) == b""
        assert going.wait(timeout=scaled_s(15)) == 0
    assert forwarder.wait() == 0


# ---------------------------------------------------------------------------- reloading


@pytest.mark.parametrize(
    ("datapath", "how"), list(zip(DATAPATHS, ["SIGHUP", "reload", "SIGHUP"], strict=True))
)
def test_a_reload_changes_the_rules_and_not_the_pairs(
    start_forwarder: StartForwarder, datapath: str, how: str
) -> None:
    forwarder = start_forwarder(config(datapath=datapath))
    address = forwarder.address
    with NameServer("there") as there, joined_pairs(forwarder, 2, datapath) as pairs:
        assert ask(address, there.address) == ACK + b"there"
        forwarder.reconfigure(config(datapath=datapath, allow='"127.0.0.0/8:1"'))
        if how == "SIGHUP":
            forwarder.signal(signal.SIGHUP)
            forwarder.wait_for_line(" reloaded ")  # every worker has them
        else:
            assert forwarder.command("reload").returncode == 0
        assert [ask(address, there.address) for _ in range(8)] == [refusal("denied")] * 8
        for client, server in pairs:
            exchange(client, server)


def test_a_reload_with_an_error_changes_nothing(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config())
    with NameServer("there") as there, pair_through(forwarder.address) as (client, server):
        forwarder.reconfigure(config(allow='"127.0.0.0/8:1"') + "datapaht: copy\n")
        done = forwarder.command("reload")
        assert done.returncode == 2
        assert "datapaht" in done.stderr
        forwarder.signal(signal.SIGHUP)
        forwarder.wait_for_line("datapaht")
        assert [ask(forwarder.address, there.address) for _ in range(8)] == [ACK + b"there"] * 8
        exchange(client, server)


def test_a_reload_adds_and_removes_listeners(start_forwarder: StartForwarder) -> None:
    with NameServer("there") as there, Waiting() as reserved:
        port = reserved.address[1]
        forwarder = start_forwarder(config())
        reserved.listener.close()
        first = forwarder.address
        extra = (
            f"  - name: extra\n    bind: 127.0.0.1:{port}\n"
            "    rules: [{match: instruction, allow: [loopback]}]\n"
        )
        head, tail = config().split("datapath:")
        forwarder.reconfigure(head + extra + "datapath:" + tail)
        assert forwarder.command("reload").returncode == 0
        wait_for(lambda: not refuses(("127.0.0.1", port)), "the new listener accepts")
        assert ask(("127.0.0.1", port), there.address) == ACK + b"there"
        assert ask(first, there.address) == ACK + b"there"
        with pair_through(("127.0.0.1", port)) as (client, server):
            forwarder.reconfigure(config())
            assert forwarder.command("reload").returncode == 0
            wait_for(lambda: refuses(("127.0.0.1", port)), "the old listener is gone")
            exchange(client, server)
        assert ask(first, there.address) == ACK + b"there"


def test_no_connection_is_refused_or_lost_during_reloads(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config())
    with NameServer("there") as there:
        for number in range(100):
            if number % 10 == 0:
                forwarder.signal(signal.SIGHUP)
            assert ask(forwarder.address, there.address) == ACK + b"there"


# ---------------------------------------------------------------------------- dying


@pytest.mark.parametrize("datapath", RESET_AT_DEATH)
def test_peers_of_a_killed_daemon_see_a_reset_and_the_next_up_works(
    place: Place, start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder(config(datapath=datapath))
    port = forwarder.address[1]
    with joined_pairs(forwarder, 3, datapath) as pairs:
        forwarder.kill()
        for client, server in pairs:
            assert ends_with_reset(client) == b""
            assert ends_with_reset(server) == b""
    wait_for(lambda: not place.processes(), "its workers end too")
    again = start_forwarder(config(datapath=datapath, port=port))
    with joined_pairs(again, 2, datapath):
        pass
    assert again.stop() == 0
    assert leftovers(place) == []


@pytest.mark.parametrize("datapath", RESET_AT_DEATH)
def test_bytes_in_flight_when_the_daemon_is_killed_end_in_a_reset(
    start_forwarder: StartForwarder, datapath: str
) -> None:
    """What a stalled reader finds later is a prefix and a reset, never a clean end of file."""
    forwarder = start_forwarder(config(datapath=datapath))
    with joined_pairs(forwarder, 1, datapath) as [(client, server)]:
        size = 700_000  # below the limit of the backlog, above what nobody has to hold
        client.sendall(pattern(size))
        forwarder.kill()
        with contextlib.suppress(ConnectionError):
            assert ends_with_reset(client) == b""
        assert pattern(size).startswith(ends_with_reset(server))


@pytest.mark.parametrize("datapath", RESET_AT_DEATH)
def test_a_killed_worker_resets_its_pairs_only_and_is_replaced(
    start_forwarder: StartForwarder, datapath: str
) -> None:
    forwarder = start_forwarder("workers: 2\n" + config(datapath=datapath))
    with joined_pairs(forwarder, 12, datapath) as pairs:
        before = {worker.pid for worker in forwarder.workers()}
        assert len(before) == 2
        victim = psutil.Process(before.pop())
        victim.kill()
        victim.wait(timeout=scaled_s(10))
        left = wait_for(lambda: forwarder.look(), "the other worker's pairs")
        alive = {row["client"] for row in left}
        for client, server in pairs:
            if address_text(client.getsockname()) in alive:
                exchange(client, server)
            else:
                assert ends_with_reset(client) == b""
                assert ends_with_reset(server) == b""
        assert 0 < len(alive) < 12
        wait_for(
            lambda: (
                len({worker.pid for worker in forwarder.workers()} - before) == 1
                and len(forwarder.workers()) == 2
            ),
            "a worker in its place",
        )
        with NameServer("there") as there:
            for _ in range(20):
                assert ask(forwarder.address, there.address) == ACK + b"there"
    assert forwarder.process.poll() is None


def test_a_worker_that_is_killed_again_and_again_is_replaced_every_time(
    start_forwarder: StartForwarder,
) -> None:
    forwarder = start_forwarder("workers: 1\n" + config())
    with NameServer("there") as there:
        for _ in range(3):
            (worker,) = forwarder.workers()
            worker.kill()
            wait_for_another_worker(forwarder, worker)
            assert ask(forwarder.address, there.address) == ACK + b"there"


def wait_for_another_worker(forwarder: Daemon, gone: psutil.Process) -> None:
    def look() -> bool:
        workers = forwarder.workers()
        return bool(workers) and gone not in workers

    wait_for(look, "a worker in its place")


def test_leftovers_of_a_killed_daemon_are_cleaned_although_its_pid_is_taken(
    place: Place, start_forwarder: StartForwarder
) -> None:
    """The lock decides, not the pid: another process may have that by now."""
    forwarder = start_forwarder(config())
    forwarder.kill()
    wait_for(lambda: not place.processes(), "its workers end too")
    (place.run_dir / "default" / "pid").write_text(f"{os.getpid()}\n")
    assert run_command(place, "show").returncode == 3
    again = start_forwarder(config())
    with NameServer("there") as there:
        assert ask(again.address, there.address) == ACK + b"there"


def test_a_worker_that_does_not_take_a_reload_is_replaced(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder("workers: 1\n" + config())
    (worker,) = forwarder.workers()
    worker.send_signal(signal.SIGSTOP)
    ControlClient(Instance.named("default", forwarder.place.environ()), timeout_s=60.0).reload()
    forwarder.wait_for_line("worker_reload")
    check_replaced(forwarder, worker)


def test_a_refused_listen_port_does_not_keep_workers_from_being_replaced(
    start_forwarder: StartForwarder,
) -> None:
    metrics = "metrics: {bind: 127.0.0.1:9998}\n"
    forwarder = start_forwarder("workers: 1\n" + metrics + config())
    worker = forwarder.workers()[0]
    with pytest.raises(ForwarderError):
        forwarder.control().listen_port(9998)
    worker.kill()
    check_replaced(forwarder, worker)


def check_replaced(forwarder: Daemon, worker: psutil.Process) -> None:
    """There is another one, and it serves."""
    wait_for(
        lambda: [other.pid for other in forwarder.workers()] not in ([], [worker.pid]), "another"
    )
    with NameServer("there") as there:
        wait_for(lambda: ask(forwarder.address, there.address) == ACK + b"there", "it serves")


# ---------------------------------------------------------------------------- shortage


def limit_descriptors(process: psutil.Process, most: int) -> None:
    """Lower RLIMIT_NOFILE of a running process.

    As the user it runs as: root may do that to others with CAP_SYS_RESOURCE only, which containers
    are often not given (prlimit(2)).
    """
    user, group = process.uids().real, process.gids().real
    subprocess.run(
        ["prlimit", "--pid", str(process.pid), f"--nofile={most}:{most}"],
        check=True,
        user=user,
        group=group,
        extra_groups=[],
    )


def test_a_worker_is_replaced_as_soon_as_there_are_descriptors(
    start_forwarder: StartForwarder,
) -> None:
    """Until then the daemon lives, and tries again; first for the channel to splice's keeper."""
    forwarder = start_forwarder("workers: 1\n" + config())
    (worker,) = forwarder.workers()
    daemon = psutil.Process(forwarder.process.pid)
    _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, hard))
    worker.kill()
    forwarder.wait_for_line("worker_start|renew a worker's channel", count=2)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
    check_replaced(forwarder, worker)


def test_running_out_of_descriptors_is_survived(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder("workers: 1\n" + config())
    (worker,) = forwarder.workers()
    with EchoServer() as echo, contextlib.ExitStack() as stack:
        steady = stack.enter_context(dial_through(forwarder.address, echo.address))
        most = worker.num_fds() + 9
        limit_descriptors(worker, most)
        crowd = []
        for _ in range(40):
            client = stack.enter_context(dial(forwarder.address))
            client.sendall(instruction(address_text(echo.address)))
            crowd.append(client)

        def steady_works() -> bool:
            steady.sendall(b"x")
            return read_exactly(steady, 1) == b"x"

        stays(steady_works, "a pair from before works", for_s=0.5)
        busy_s = sum(worker.cpu_times()[:2])
        stays(steady_works, "a pair from before works", for_s=1.0)
        assert sum(worker.cpu_times()[:2]) - busy_s < 0.5, "it spins"
        for client in crowd:
            client.close()
        assert worker.is_running()
        # Once the crowd has been refused, new clients are served without a restart.
        with NameServer("there") as there:
            wait_for(
                lambda: ask(forwarder.address, there.address) == ACK + b"there",
                "a newcomer is served",
            )
            assert ask(forwarder.address, there.address) == ACK + b"there"
        assert steady_works()


def test_nothing_is_left_open_after_many_pairs(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(datapath="sockmap"))
    with NameServer("there") as there:
        for _ in range(20):
            assert ask(forwarder.address, there.address) == ACK + b"there"
        forwarder.wait_for_no_pairs()
        before = forwarder.open_fds()
        for _ in range(300):
            assert ask(forwarder.address, there.address) == ACK + b"there"
        forwarder.wait_for_no_pairs()
        forwarder.wait_for_no_more_fds(before)

"""Machines of a fleet take listeners, upstreams and servers from an etcd."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from pyforwarder.config import Fleet
from pyforwarder.fleet.layout import Edition, Keys
from pyforwarder.fleet.opening import open_store
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.daemon import COMMAND
from tests.helpers.etcd import Etcd, running
from tests.helpers.peers import NameServer, address_text, dial, read_to_end, unused_port
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

MACHINES = ("one", "two", "three")
READING = frozenset({"diff", "get", "history", "instances"})
TRIES = 3
EDITIONS = 34  # so the last of all is the 99th of a hundred


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with running() as (etcd, _):
        yield etcd


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYFORWARDER_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def own(etcd: Etcd, machine: str = "one", more: str = "") -> str:
    """A machine's own configuration: a listener of its own, and the fleet."""
    return (
        f"fleet: {{endpoints: ['{etcd.endpoint}'], name: edge, instance: {machine}}}\n"
        f"datapath: copy\nworkers: 1\n{more}"
        f"listeners: [{{name: own, bind: '127.0.0.1:0', rules: [{{match: any, reject: close}}]}}]\n"
    )


def shared(port: int, *servers: str, registered: str = "") -> str:
    """What the fleet has: one listener, at this port, and its upstream."""
    more = f", registered: [{registered}]" if registered else ""
    listed = ", ".join(f"'{server}'" for server in servers)
    return (
        f"upstreams:\n  web: {{servers: [{listed}]{more}}}\n"
        "listeners:\n"
        f"- {{name: main, bind: '127.0.0.1:{port}', rules: [{{match: any, to: web}}]}}\n"
    )


def put(machine: Daemon, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    file = machine.place.run_dir.parent / "shared.yaml"
    file.write_text(text)
    return fleet(machine, "put", str(file), *words)


def fleet(machine: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """A command; one that only reads is repeated while etcd does not answer in three seconds."""
    verb, *rest = words
    for _ in range(TRIES):
        done = subprocess.run(
            [*COMMAND, "fleet", verb, "-c", str(machine.config_path), *rest],
            env=machine.place.environ(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if verb not in READING or "etcd at " not in done.stderr:
            break
    return done


def instances(machine: Daemon) -> dict[str, tuple[int, int, str]]:
    """(serial in force, serial refused, why) by machine."""
    rows = json.loads(fleet(machine, "instances", "--json").stdout)
    return {row["instance"]: (row["serial"], row["refused"], row["why"]) for row in rows}


def who_answers(port: int) -> str:
    with contextlib.suppress(OSError), dial(("127.0.0.1", port)) as sock:
        return read_to_end(sock).decode()
    return ""


def test_a_machine_takes_each_edition_and_no_pair_is_touched(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    port, other = unused_port(), unused_port()
    with NameServer("a") as a, NameServer("b") as b:
        machine = start_forwarder(own(etcd))
        done = put(machine, shared(port, address_text(a.address)), "--comment", "first")
        assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
        machine.wait_for_line("fleet_in_force serial=1")
        assert who_answers(port) == "a"
        assert [row["name"] for row in machine.show("listeners")] == ["own", "main"]
        with dial(("127.0.0.1", port)) as sock:
            assert sock.recv(1) == b"a"
            assert put(machine, shared(other, address_text(b.address))).stdout == "2\n"
            machine.wait_for_line("fleet_in_force serial=2")
            assert (who_answers(port), who_answers(other)) == ("", "b")
            # The connection from before has its pair still.
            assert len(machine.show()) == 1
        again = fleet(machine, "rollback", "1")
        assert (again.returncode, again.stdout) == (0, "3\n")
        machine.wait_for_line("fleet_in_force serial=3")
        assert (who_answers(port), who_answers(other)) == ("a", "")
        rows = json.loads(fleet(machine, "history", "--json").stdout)
        assert [(row["serial"], row["comment"]) for row in rows] == [
            (3, "rollback to 1"),
            (2, ""),
            (1, "first"),
        ]
        assert fleet(machine, "get").stdout == shared(port, address_text(a.address))
        assert fleet(machine, "diff", "--serial", "1").returncode == 0
        assert fleet(machine, "diff", "--serial", "2").returncode == 1
        wait_for(lambda: instances(machine) == {"one": (3, 0, "")}, "it says so")


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE_S) as answer:
        said: bytes = answer.read()
    return said.decode()


def test_all_machines_hear_of_an_edition_and_of_each_other(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    metrics = unused_port()
    with NameServer("name") as server:
        more = f"upstreams: {{mine: {{servers: ['{address_text(server.address)}']}}}}\n"
        texts = [own(etcd, name, more).replace("reject: close", "to: mine") for name in MACHINES]
        texts[2] += f"metrics: {{bind: 127.0.0.1:{metrics}}}\n"
        machines = [
            start_forwarder(text, instance=name) for name, text in zip(MACHINES, texts, strict=True)
        ]
        tell_each_other(machines, metrics)


def tell_each_other(machines: list[Daemon], metrics: int) -> None:
    text = "upstreams: {web: {servers: ['127.0.0.1:9']}}\n"
    assert put(machines[0], text).returncode == 0
    for machine in machines:
        machine.wait_for_line("fleet_in_force serial=1")
        assert machine.show("upstreams")[-1]["server"] == "127.0.0.1:9"
    expected = dict.fromkeys(MACHINES, (1, 0, ""))
    wait_for(lambda: instances(machines[0]) == expected, "all are listed")
    # Each machine tells of all of them, without asking the store for it.
    with dial(machines[1].address) as sock:
        assert sock.recv(1) == b"n"

        def seen() -> dict[str, tuple[int, int, str]]:
            rows = json.loads(machines[2].command("show", "--fleet", "--json").stdout)
            return {
                row["instance"]: (row["serial"], row["pairs"], row["datapaths"]) for row in rows
            }

        wanted = {"one": (1, 0, "copy"), "two": (1, 1, "copy"), "three": (1, 0, "copy")}
        wait_for(lambda: seen() == wanted, f"each tells of all: {seen()}")
        told = machines[2].command("show", "--fleet")
        assert [line.split()[0] for line in told.stdout.splitlines()] == [
            "INSTANCE",
            *sorted(MACHINES),
        ]
        series = 'pyforwarder_fleet_pairs{instance="two"} 1.0'
        wait_for(lambda: series in scraped(metrics), "Prometheus is told")
        assert 'pyforwarder_fleet_serial{instance="one"} 1.0' in scraped(metrics)
        refused = machines[2].command("show", "rules", "--fleet")
        assert refused.returncode == 2


def test_a_machine_that_ends_is_listed_no_more(start_forwarder: StartForwarder, etcd: Etcd) -> None:
    one, two = (start_forwarder(own(etcd, name), instance=name) for name in MACHINES[:2])
    wait_for(lambda: sorted(instances(one)) == ["one", "two"], "both are listed")
    assert two.command("down").returncode == 0
    assert sorted(instances(one)) == ["one"]
    # A store that does not answer keeps nobody: the lease ends without it.
    with etcd.suspended():
        assert one.command("down").returncode == 0


def test_editions_are_in_force_on_three_machines_in_a_moment(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    machines = [start_forwarder(own(etcd, name), instance=name) for name in MACHINES]
    store = open_store(Fleet.model_validate({"endpoints": [etcd.endpoint], "name": "edge"}))
    key, took_s = Keys("edge").config, []
    for serial in range(1, EDITIONS + 1):
        text = f"upstreams: {{web: {{servers: ['127.0.0.1:{serial}']}}}}\n"
        found = store.get(key)
        put_s = time.time()  # noqa: TID251 - log lines have the wall clock's
        edition = Edition(serial=serial, text=text).encode()
        assert store.change(key, edition, was=found[1] if found else 0)
        for machine in machines:
            line = machine.wait_for_line(f"fleet_in_force serial={serial} ")
            took_s.append(datetime.fromisoformat(line.split()[0]).timestamp() - put_s)
    took_s.sort()
    print(f"in force after {took_s[len(took_s) // 2]:.3f} s, the last after {took_s[-1]:.3f} s")
    assert took_s[len(took_s) // 2] < scaled_s(0.2)
    assert took_s[-1] < scaled_s(2.0)


def test_warnings_say_where_each_part_of_the_whole_stands(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    """At `put` and in the machine's log, of its own file and of what the fleet has."""
    never = "{match: any, reject: close}, {match: ssh, reject: close}"
    mine = own(etcd).replace("{match: any, reject: close}", never)
    machine = start_forwarder(mine)
    why = "is never reached: the rule 'any' takes everything"
    its_own = rf"{machine.config_path}, line 4, listeners\[0\]\.rules\[1\]: {why}"
    machine.wait_for_line(f'config reason="{its_own}"')
    text = shared(unused_port(), "127.0.0.1:9").replace(
        "{match: any, to: web}", "{match: any, to: web}, {match: ssh, to: web}"
    )
    done = put(machine, text)
    assert done.returncode == 0
    assert done.stdout == "1\n"
    file = machine.place.run_dir.parent / "shared.yaml"
    theirs = rf"line 4, listeners\[0\]\.rules\[1\]: {why}"
    first, second = done.stderr.splitlines()
    assert re.fullmatch(f"warning: {its_own}", first)
    assert re.fullmatch(f"warning: {file}, {theirs}", second)
    machine.wait_for_line(f'config reason="fleet edge, edition 1, {theirs}"')
    machine.wait_for_line(f'config reason="{its_own}"', count=2)
    assert machine.command("reload").returncode == 0
    machine.wait_for_line(f'config reason="{its_own}"', count=3)
    machine.wait_for_line(f'config reason="fleet edge, edition 1, {theirs}"', count=2)


def test_what_one_machine_cannot_use_changes_nothing_there(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    port = unused_port()
    with NameServer("a") as a:
        machine = start_forwarder(own(etcd))
        good = shared(port, address_text(a.address))
        assert put(machine, good).returncode == 0
        machine.wait_for_line("fleet_in_force serial=1")
        taken = shared(a.address[1], address_text(a.address))  # somebody else's port
        assert put(machine, taken).stdout == "2\n"
        machine.wait_for_line("fleet_refused serial=2 .*Address already in use")
        assert who_answers(port) == "a"
        wait_for(lambda: instances(machine)["one"][:2] == (1, 2), "it says so")
        assert fleet(machine, "instances").returncode == 1
        # Not by our command: nobody has looked at it before.
        etcd.put(
            "/pyforwarder/edge/current/config",
            {"schema": 1, "serial": 3, "text": "listeners: [{bind: nowhere, rules: []}]"},
        )
        machine.wait_for_line("fleet_refused serial=3 .*edition 3, line 1, listeners")
        etcd.ctl("put", "/pyforwarder/edge/current/config", "no json")
        machine.wait_for_line("fleet_value .*config: Invalid JSON")
        machine.wait_for_line("fleet_without_edition kept=1")
        assert who_answers(port) == "a"
        etcd.ctl("del", "/pyforwarder/edge/current/config")
        machine.wait_for_line("fleet_without_edition kept=1", count=2)
        assert who_answers(port) == "a"
        etcd.put("/pyforwarder/edge/current/config", {"schema": 1, "serial": 4, "text": good})
        machine.wait_for_line("fleet_in_force serial=4")
        assert who_answers(port) == "a"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("workers: 3\n", "shared.yaml, line 1, workers: 'workers' is each machine's own"),
        ("upstreams:\n  web: {servers: [1]}\n", "shared.yaml, line 2, upstreams.web.servers[0]"),
        (
            "listeners:\n- {name: own, bind: '127.0.0.1:1', rules: [{match: any, to: 'a:1'}]}\n",
            "shared.yaml, line 2, listeners[0].name: this machine has a listener 'own' of its own",
        ),
        ("- 1\n", "shared.yaml: must be keys and values (listeners, upstreams)"),
    ],
)
def test_an_edition_is_checked_before_it_is_put(
    start_forwarder: StartForwarder, etcd: Etcd, text: str, said: str
) -> None:
    machine = start_forwarder(own(etcd))
    done = put(machine, text)
    assert done.returncode == 2
    assert said in done.stderr
    assert fleet(machine, "history", "--json").stdout == "[]\n"


def register(machine: Daemon, upstream: str, address: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "register", "-c", str(machine.config_path), upstream, address, *words],
        env=machine.place.environ(),
        stderr=subprocess.PIPE,
        text=True,
    )


def states(machine: Daemon) -> dict[str, str]:
    return {row["server"]: row["state"] for row in machine.look("upstreams")}


def test_servers_register_themselves_and_are_gone_with_their_lease(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    port = unused_port()
    with NameServer("a") as a, NameServer("b") as b:
        machine = start_forwarder(own(etcd))
        assert put(machine, shared(port, registered="127.0.0.0/8")).returncode == 0
        machine.wait_for_line("fleet_in_force serial=1")
        assert who_answers(port) == ""
        servers = [
            register(machine, "web", address_text(server.address), "--ttl", "2s")
            for server in (a, b)
        ]
        try:
            both = {address_text(a.address): "up", address_text(b.address): "up"}
            wait_for(lambda: states(machine) == both, "both are there")
            assert {who_answers(port) for _ in range(4)} == {"a", "b"}
            servers[0].send_signal(signal.SIGTERM)
            assert servers[0].wait() == 0
            wait_for(lambda: states(machine) == {address_text(b.address): "up"}, "a is out")
            servers[1].kill()  # says nothing: its lease ends
            wait_for(lambda: states(machine) == {}, "b is out")
        finally:
            for server in servers:
                server.kill()
                server.wait()
                assert server.stderr is not None
                server.stderr.close()
        # Any client of the store may register one; weight 0 drains it, elsewhere is not taken.
        key = f"/pyforwarder/edge/current/servers/web/{address_text(a.address)}"
        etcd.put(key, {"weight": 0})
        etcd.put("/pyforwarder/edge/current/servers/web/192.0.2.1:80", {"weight": 1})
        etcd.put("/pyforwarder/edge/current/servers/web/not-an-address", {"weight": 1})
        wait_for(lambda: states(machine) == {address_text(a.address): "drained"}, "it is drained")
        machine.wait_for_line("fleet_value .*not-an-address")


def test_a_server_that_no_machine_takes_is_told_so_and_may_be_taken_later(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    machine = start_forwarder(own(etcd))
    port = unused_port()
    assert put(machine, shared(port, "127.0.0.1:9")).returncode == 0
    machine.wait_for_line("fleet_in_force serial=1 registered=0")
    server = register(machine, "web", "127.0.0.2:9")
    try:
        why = "the upstream 'web' has no `registered`"
        machine.wait_for_line(f"fleet_server_not_taken upstream=web server=127.0.0.2:9 .*{why}")
        machine.wait_for_line("fleet_in_force serial=1 registered=0", count=2)
        assert server.stderr is not None
        registered, warning = server.stderr.readline(), server.stderr.readline()  # of edition 1
        assert put(machine, shared(port, registered="127.0.0.0/8")).returncode == 0
        machine.wait_for_line("fleet_in_force serial=2 registered=1")
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=DEADLINE_S)
    finally:
        server.kill()
        server.wait()
    assert said == ""
    assert warning.startswith("pyforwarder: warning: machines do not take this server: " + why)
    assert warning.endswith("(edition 1)\n")
    assert registered == "pyforwarder: registered\n"


def test_without_the_store_machines_go_on_and_start_with_what_was_in_force_last(
    start_forwarder: StartForwarder, etcd: Etcd, state_dir: Path
) -> None:
    port, other = unused_port(), unused_port()
    with NameServer("a") as a:
        machine = start_forwarder(own(etcd))
        assert put(machine, shared(port, address_text(a.address))).returncode == 0
        machine.wait_for_line("fleet_in_force serial=1")
        etcd.stop()
        machine.wait_for_line("fleet_store_lost")
        assert who_answers(port) == "a"
        assert machine.command("reload").returncode == 0
        assert who_answers(port) == "a"
        assert machine.stop() == 0
        kept = state_dir / "default" / "fleet.json"
        assert kept.stat().st_mode & 0o777 == 0o600
        machine = start_forwarder(own(etcd))
        machine.wait_for_line(r"listening on 127.0.0.1:\d+ \(main\)")
        assert who_answers(port) == "a"
        etcd.start()
        machine.wait_for_line("fleet_store_connected")
        assert put(machine, shared(other, address_text(a.address))).stdout == "2\n"
        machine.wait_for_line("fleet_in_force serial=2")
        assert (who_answers(port), who_answers(other)) == ("", "a")
        # What others could have written is not believed.
        etcd.stop()
        assert machine.stop() == 0
        kept.chmod(0o622)
        machine = start_forwarder(own(etcd))
        assert [row["name"] for row in machine.show("listeners")] == ["own"]


def speaking_to(machine: Daemon, etcd: Etcd) -> psutil.Process:
    """The machine's process that has connections to the store."""
    port = int(etcd.endpoint.rpartition(":")[2])
    (speaker,) = [
        process
        for process in psutil.Process(machine.process.pid).children(recursive=True)
        if any(port in (c.raddr or ()) for c in process.net_connections())
    ]
    return speaker


def test_a_process_that_dies_is_replaced(start_forwarder: StartForwarder, etcd: Etcd) -> None:
    machine = start_forwarder(own(etcd))
    machine.wait_for_line("fleet_store_connected")
    speaking_to(machine, etcd).kill()
    machine.wait_for_line("fleet_died")
    machine.wait_for_line("fleet_store_connected", count=2)
    assert put(machine, "upstreams: {web: {servers: ['127.0.0.1:9']}}\n").returncode == 0
    machine.wait_for_line("fleet_in_force serial=1")


def test_a_store_that_wants_certificates_and_a_user(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    with running(with_tls=True) as (etcd, tls):
        assert tls is not None
        for words in (
            ("user", "add", "root:secret"),
            ("role", "add", "root"),
            ("user", "grant-role", "root", "root"),
            ("user", "add", "edge:password"),
            ("role", "add", "edge"),
            (
                "role",
                "grant-permission",
                "edge",
                "--prefix=true",
                "readwrite",
                "/pyforwarder/edge/",
            ),
            ("user", "grant-role", "edge", "edge"),
            ("auth", "enable"),
        ):
            etcd.ctl(*words)
        password = tmp_path / "password"
        password.write_text("password\n")
        password.chmod(0o600)
        files = f"tls: {{ca: {tls.certificate}, cert: {tls.certificate}, key: {tls.key}}}"
        login = f"user: edge, password: {password}"
        text = own(etcd).replace("name: edge,", f"name: edge, {files}, {login},")
        machine = start_forwarder(text)
        machine.wait_for_line("fleet_store_connected")
        assert put(machine, "upstreams: {web: {servers: ['127.0.0.1:9']}}\n").stdout == "1\n"
        machine.wait_for_line("fleet_in_force serial=1")
        password.write_text("wrong\n")
        done = fleet(machine, "get")
        assert done.returncode == 1
        assert "authentication failed" in done.stderr
        without = machine.place.run_dir.parent / "without.yaml"
        without.write_text(text.replace(f", cert: {tls.certificate}, key: {tls.key}", ""))
        refused = subprocess.run(
            [*COMMAND, "fleet", "get", "-c", str(without)],
            env=machine.place.environ(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert refused.returncode == 1
        assert "etcd at https://" in refused.stderr


def test_files_that_cannot_be_used_are_told_of_before_and_while_it_runs(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    with running(with_tls=True) as (etcd, tls):
        assert tls is not None
        key = tmp_path / "own.key"
        key.write_bytes(tls.key.read_bytes())
        key.chmod(0o600)
        # Nobody but root has to read any of them.
        authority = tmp_path / "ca.pem"
        authority.write_bytes(tls.certificate.read_bytes())
        authority.chmod(0o600)
        files = f"tls: {{ca: {authority}, cert: {tls.certificate}, key: {key}}}"
        machine = start_forwarder(own(etcd).replace("name: edge,", f"name: edge, {files},"))
        machine.wait_for_line("fleet_store_connected")
        key.write_text("no key")
        checked = machine.command("check", str(machine.config_path))
        assert checked.returncode == 2
        assert f"line 1, fleet.tls.key: {key}: no private key in PEM" in checked.stderr
        assert "fleet.tls.key" in machine.command("reload").stderr
        speaking_to(machine, etcd).kill()
        machine.wait_for_line("fleet_failed error=.*no private key in PEM", count=2)
        key.write_bytes(tls.key.read_bytes())
        assert machine.command("reload").returncode == 0
        machine.wait_for_line("fleet_store_connected", count=2)


def test_an_edition_that_did_not_fit_is_tried_again_after_a_reload(
    start_forwarder: StartForwarder, etcd: Etcd
) -> None:
    port = unused_port()
    with NameServer("a") as a:
        mine = own(etcd, more="upstreams: {web: {servers: ['127.0.0.1:9']}}\n")
        machine = start_forwarder(mine)
        machine.wait_for_line("fleet_store_connected")
        file = machine.place.run_dir.parent / "other.yaml"
        file.write_text(own(etcd))
        text = shared(port, address_text(a.address))
        shared_file = machine.place.run_dir.parent / "shared.yaml"
        shared_file.write_text(text)
        done = subprocess.run(
            [*COMMAND, "fleet", "put", "-c", str(file), str(shared_file)],
            env=machine.place.environ(),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert done.stdout == "1\n"
        machine.wait_for_line("fleet_refused serial=1 .*an upstream 'web' of its own")
        machine.reconfigure(own(etcd))
        assert machine.command("reload").returncode == 0
        machine.wait_for_line("fleet_in_force serial=1")
        assert who_answers(port) == "a"
        # And without the fleet its listeners are gone.
        machine.reconfigure(own(etcd).partition("\n")[2])
        assert machine.command("reload").returncode == 0
        assert [row["name"] for row in machine.show("listeners")] == ["own"]

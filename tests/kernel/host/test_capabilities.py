"""What each capability of the systemd unit is for: without it exactly one thing is missing.

The daemon is root with the unit's bounding set and no way to gain more, as under systemd and in a
container; bpffs is mounted, as both have it.
"""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers import daemon as daemons
from tests.helpers.peers import pair_through, pattern, read_exactly
from tests.helpers.waiting import stays, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon, Place
    from tests.kernel.conftest import StartForwarder

UNIT: Final = Path(__file__).parents[3] / "packaging" / "systemd" / "pyforwarder@.service"
# CapEff of /proc/PID/status
NO_CAPABILITIES: Final = "0000000000000000"

# Two connections to itself; the accepted ends are to be joined.
HOLDER: Final = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
clients = [socket.create_connection(listener.getsockname()) for _ in range(2)]
accepted = [listener.accept()[0] for _ in range(2)]
print(*(sock.fileno() for sock in accepted), flush=True)
sys.stdin.read()
"""


def capabilities() -> set[str]:
    """Those of the unit, as setpriv writes them."""
    line = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert line is not None
    return {name.removeprefix("CAP_").lower() for name in line[1].split()}


def with_capabilities(names: set[str]) -> list[str]:
    """The words in front of a command that gives it these and no others."""
    allowed = ",".join(["-all", *(f"+{name}" for name in sorted(names))])
    return ["setpriv", "--bounding-set", allowed, "--inh-caps=-all", "--no-new-privs"]


def without(name: str) -> list[str]:
    assert name in capabilities()
    return with_capabilities(capabilities() - {name})


def config(*, port: int = 0) -> str:
    # Pairs of the kernel's datapath are handed over at once, so that no test waits for it.
    return f"""
listeners:
  - name: main
    bind: 127.0.0.1:{port}
    rules: [{{match: instruction, allow: [loopback]}}]
handover: {{after_bytes: 0}}
timeouts: {{drain: 2s}}
"""


def carry_by(forwarder: Daemon, datapath: str) -> None:
    """Bytes of a pair are moved, and it comes to be on that datapath."""
    with pair_through(forwarder.address) as (client, server):
        client.sendall(pattern(100_003))
        assert read_exactly(server, 100_003) == pattern(100_003)
        forwarder.wait_for_pair(
            lambda row: (row["state"], row["datapath"]) == ("joined", datapath),
            f"a pair on {datapath}",
        )


def test_the_capabilities_of_the_unit_are_enough(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(port=443), prefix=with_capabilities(capabilities()))
    carry_by(forwarder, "splice")
    pins = forwarder.place.bpffs / forwarder.instance
    assert (pins / "show").read_text().split()[:3] == ["ID", "STATE", "DATAPATH"]
    assert forwarder.command("reload").returncode == 0
    for worker in forwarder.workers():
        status = Path(f"/proc/{worker.pid}/status").read_text()
        assert re.findall(r"^Cap(?:Eff|Prm):\s+(\w+)$", status, re.M) == [NO_CAPABILITIES] * 2


def test_a_peer_that_cannot_be_asked_is_not_given_up(start_forwarder: StartForwarder) -> None:
    """CAP_NET_RAW: the keeper asks silent peers of spliced pairs."""
    text = config() + "keepalive: {idle: 1s, interval: 1s, count: 1}\n"
    forwarder = start_forwarder(text, prefix=without("net_raw"))
    with pair_through(forwarder.address) as (client, server):
        client.sendall(b"x")
        assert read_exactly(server, 1) == b"x"
        forwarder.wait_for_pair(lambda row: row["datapath"] == "splice", "a spliced pair")
        stays(lambda: len(forwarder.control().pairs()) == 1, "it is there", for_s=4.5)
        server.sendall(b"y")
        assert read_exactly(client, 1) == b"y"


def test_a_worker_that_does_not_answer_can_be_ended(start_forwarder: StartForwarder) -> None:
    """CAP_KILL: the workers belong to another user."""
    forwarder = start_forwarder(config(), prefix=with_capabilities(capabilities()))
    forwarder.workers()[0].send_signal(signal.SIGSTOP)
    assert forwarder.command("down", "--now").returncode == 0
    assert forwarder.wait() == 0


@pytest.mark.parametrize("name", ["bpf", "perfmon", "net_admin"])
def test_a_kernel_datapath_needs(name: str, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(), prefix=without(name))
    carry_by(forwarder, "copy")
    assert "no_sockmap" in forwarder.output()
    assert "no_splice" in forwarder.output()


def test_pairs_are_spliced_without_net_raw_too(start_forwarder: StartForwarder) -> None:
    """Nobody asks their silent peers then."""
    forwarder = start_forwarder(config(), prefix=without("net_raw"))
    carry_by(forwarder, "splice")


@pytest.mark.parametrize(
    ("name", "has_view"), [("bpf", False), ("perfmon", False), ("net_admin", True)]
)
def test_the_view_needs_less(name: str, has_view: bool, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(config(), prefix=without(name))
    pins = forwarder.place.bpffs / forwarder.instance
    assert (pins / "show").exists() is has_view


def test_a_port_below_1024_needs_net_bind_service(place: Place) -> None:
    forwarder = daemons.start(
        place, config(port=443), wait=False, prefix=without("net_bind_service")
    )
    try:
        assert forwarder.wait(deadline_s=daemons.START_DEADLINE_S) == 1
        assert "127.0.0.1:443" in forwarder.output()
    finally:
        forwarder.close()


@pytest.mark.parametrize("name", ["setuid", "setgid"])
def test_up_refuses_to_run_workers_that_stay_root(name: str, place: Place) -> None:
    forwarder = daemons.start(place, config(), wait=False, prefix=without(name))
    try:
        assert forwarder.wait(deadline_s=daemons.START_DEADLINE_S) == 1
        assert "listening on" not in forwarder.output()
    finally:
        forwarder.close()


@pytest.mark.parametrize(("kept", "code"), [(True, 0), (False, 1)])
def test_forward_takes_sockets_of_another_user_with_sys_ptrace(
    kept: bool, code: int, start_forwarder: StartForwarder
) -> None:
    prefix = with_capabilities(capabilities()) if kept else without("sys_ptrace")
    forwarder = start_forwarder(config(), prefix=prefix)
    with subprocess.Popen(
        # The distribution's Python: another user need not be able to enter the checkout.
        [
            *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
            *("/usr/bin/python3", "-c", HOLDER),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    ) as holder:
        assert holder.stdout is not None
        fds = holder.stdout.readline().split()
        done = forwarder.command("forward", str(holder.pid), *fds)
        assert done.returncode == code, done.stderr
        holder.kill()
    wait_for(lambda: not forwarder.look(), "the pair ends with its process")

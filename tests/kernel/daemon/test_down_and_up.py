"""`down`, and `up` at once, while pairs are left: they go on, and nothing of either collides."""

from __future__ import annotations

import signal
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pytest

from pyforwarder.client import ControlClient
from pyforwarder.errors import ControlError
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.continuous_traffic import steady_traffic
from tests.helpers.daemon import START_DEADLINE_S, leftovers
from tests.helpers.draining import going_down, state
from tests.helpers.peers import address_text, dial, read_exactly
from tests.helpers.successive_daemons import echoes, instance_of, introduced, pid_of
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

COPY: Final = ("127.0.0.1", 9701)
SPLICE: Final = ("127.0.0.1", 9702)
SOCKMAP: Final = ("127.0.0.1", 9703)
EXPRESS: Final = ("127.0.0.1", 9704)
SILENT: Final = ("127.0.0.1", 9705)
UDP: Final = ("127.0.0.1", 9706)
METRICS: Final = ("127.0.0.1", 9707)

CONFIG: Final = """
listeners:
  - {name: copy, bind: 127.0.0.1:9701, datapath: copy, rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: splice, bind: 127.0.0.1:9702, rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: sockmap, bind: 127.0.0.1:9703, datapath: sockmap,
     rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: express, bind: 127.0.0.1:9704, datapath: express,
     rules: [{match: any, to: "127.0.0.1:TCP"}]}
  - {name: silent, bind: 127.0.0.1:9705, datapath: copy, first_packet: {timeout: 300s},
     rules: [{match: ssh, to: "127.0.0.1:TCP"}]}
  - {name: udp, bind: 127.0.0.1:9706, protocol: udp, rules: [{match: any, to: "127.0.0.1:UDP"}]}
metrics: {bind: 127.0.0.1:9707}
handover: {after_round_trips: 1}
express: {ports: 64}
workers: 2
timeouts: {drain: DRAIN}
"""


def configured(server: Any, drain: str = "300s") -> str:
    text = CONFIG.replace("DRAIN", drain)
    return text.replace("TCP", str(server.tcp_port)).replace("UDP", str(server.udp_port))


def joined(daemon: Daemon) -> dict[int, str]:
    """Pairs, and where they are."""
    return {row["id"]: row["datapath"] for row in daemon.look() if row["state"] == "joined"}


def answers_udp(address: tuple[str, int]) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(scaled_s(10.0))
        sock.connect(address)
        sock.send(b"hello")
        return sock.recv(100) == b"hello"


@pytest.mark.timeout(scaled_s(240))
def test_pairs_of_a_daemon_that_drains_go_on_with_the_next(
    start_forwarder: StartForwarder,
) -> None:
    """Of every datapath; new clients are served, and `down` returns when its daemon has ended."""
    with steady_traffic() as (server, traffic, seen):
        config = configured(server)
        first = start_forwarder(config)
        for address, count in ((COPY, 2), (SPLICE, 2), (SOCKMAP, 2), (EXPRESS, 2)):
            traffic.hold(address, count, name=str(address))
        wanted = Counter(copy=2, splice=4, sockmap=2)
        wait_for(lambda: Counter(joined(first).values()) == wanted, f"{wanted}")
        before = joined(first)
        assert answers_udp(UDP)
        with going_down(first) as down:
            for address in (COPY, SPLICE, SOCKMAP, EXPRESS):
                with socket.socket() as sock:
                    assert sock.connect_ex(address) != 0
            assert joined(first).keys() == before.keys()
            turns = seen.turns + 100
            wait_for(lambda: seen.turns > turns, "its pairs go on")
            # Another version would have to take its place: that is `up`'s from here on.
            refused = first.command("upgrade", deadline_s=START_DEADLINE_S)
            assert refused.returncode == 1
            assert "`pyforwarder up` starts another one" in refused.stderr
            second = start_forwarder(config)
            assert pid_of(second) == second.process.pid
            assert first.wait() == 0
        assert down.returncode == 0
        # Nothing of what the first one has removed at its end was the second one's.
        assert state(second) == "serving"
        assert second.look().__class__ is list
        for address in (COPY, SPLICE, SOCKMAP, EXPRESS):
            assert echoes(address)
        assert answers_udp(UDP)
        with socket.create_connection(METRICS, timeout=scaled_s(10.0)) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9707\r\n\r\n")
            assert sock.recv(12) == b"HTTP/1.1 200"
        wait_for(
            lambda: Counter(joined(second).get(number) for number in before) == wanted,
            f"all are where they were: {wanted}",
        )
        assert set(instance_of(second).bpffs_dir.rglob("*")) >= {
            instance_of(second).bpffs_dir / "version"
        }
        turns = seen.turns + 100
        wait_for(lambda: seen.turns > turns, "traffic goes on")
        traffic.stop()
        assert not seen.faults, seen.faults[:5]
    assert second.stop() == 0
    assert leftovers(second.place) == []
    assert second.filters() == []


@pytest.mark.timeout(scaled_s(240))
def test_a_client_that_stays_with_a_daemon_that_drains_ends_with_it_or_by_its_deadline(
    start_forwarder: StartForwarder,
) -> None:
    """A client that has said nothing has no server: `show` says where it is."""
    with steady_traffic() as (server, _traffic, _seen):
        config = configured(server, drain="8s")
        first = start_forwarder(config, "--datapath", "copy")
        with dial(COPY) as goes, dial(SILENT) as stays:
            goes.sendall(b"hello")
            assert read_exactly(goes, 5) == b"hello"
            wait_for(lambda: len(first.look()) == 2, "both are shown")
            with going_down(first):
                second = start_forwarder(config, "--datapath", "copy")
                reason = f"it ends with the daemon before (pid {first.process.pid})"
                rows = {row["client"]: row for row in second.look()}
                assert rows[address_text(stays.getsockname())]["reason"] == reason
                assert rows[address_text(goes.getsockname())]["reason"] != reason
                # What `down` has promised, and no more: its own deadline is as it was.
                with pytest.raises(ConnectionResetError):
                    stays.recv(1)
                assert first.wait() == 0
            goes.sendall(b"again")
            assert read_exactly(goes, 5) == b"again"
            assert state(second) == "serving"


@pytest.mark.timeout(scaled_s(240))
def test_a_second_down_ends_both(start_forwarder: StartForwarder) -> None:
    with steady_traffic() as (server, _traffic, _seen):
        config = configured(server)
        first = start_forwarder(config, "--datapath", "copy")
        with dial(COPY) as goes, dial(SILENT) as stays:
            goes.sendall(b"hello")
            assert read_exactly(goes, 5) == b"hello"
            wait_for(lambda: len(first.look()) == 2, "both are shown")
            with going_down(first):
                second = start_forwarder(config, "--datapath", "copy")
                with going_down(second):
                    assert first.process.poll() is None
                    goes.sendall(b"again")
                    assert read_exactly(goes, 5) == b"again"
                    # A third takes what both have.
                    third = start_forwarder(config, "--datapath", "copy")
                    assert second.process.poll() is None, "it keeps the one before it"
                    assert len(third.look()) == 2
                    assert third.command("down", "--now").returncode == 0
                    for sock in (goes, stays):
                        with pytest.raises(ConnectionResetError):
                            sock.recv(1)
                    assert [one.wait() for one in (first, second, third)] == [0, 0, 0]
    assert leftovers(first.place) == []


@pytest.mark.timeout(scaled_s(240))
def test_a_daemon_that_drains_has_its_say_until_the_next_one_serves(
    start_forwarder: StartForwarder,
) -> None:
    """An `up` that fails changes nothing; one that gets ready ends with a second `down`."""
    with steady_traffic() as (server, _traffic, _seen):
        config = configured(server)
        first = start_forwarder(config, "--datapath", "copy")
        control = ControlClient(instance_of(first))

        with dial(COPY) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            with going_down(first) as down:
                with socket.create_server(COPY):
                    words = ("up", "-c", str(first.config_path))
                    failed = first.command(*words, deadline_s=START_DEADLINE_S)
                assert failed.returncode == 1
                assert "cannot listen on 127.0.0.1:9701" in failed.stderr
                assert state(first) == "draining"
                sock.sendall(b"again")
                assert read_exactly(sock, 5) == b"again"
                # All pairs have ended, and somebody is about to take its place: it waits.
                with introduced(control) as successor:
                    assert successor.offer.is_draining
                    sock.shutdown(socket.SHUT_WR)
                    assert sock.recv(1) == b""
                    # The one that serves metrics is left.
                    wait_for(lambda: len(first.workers()) == 1, "no worker is left")
                    assert successor.last_id() > 0
                    assert state(first) == "draining"
                    # But it ends when it is told so once more.
                    first.signal(signal.SIGTERM)
                    with pytest.raises(ControlError, match="told to end meanwhile"):
                        wait_for(lambda: not successor.last_id(), "a refusal")
                assert first.wait() == 0
            assert down.returncode == 0
    assert leftovers(first.place) == []

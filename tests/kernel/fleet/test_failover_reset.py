"""What another machine cannot go on with is reset there at the first packet of either end."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.peers import address_text, seconds_until_reset
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.helpers.fleet_of_two import Fleet

WITHIN_S = scaled_s(1.0)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("steps", [("01",), ("0", "1"), ("1", "0")], ids="-".join)
def test_ends_that_only_wait_are_reset_at_once_where_nobody_can_go_on(
    fleet: Fleet, steps: Sequence[str]
) -> None:
    """The addresses of the clients' side (0) and of the server's come in some steps."""
    hosts = fleet.hosts
    hosts.give_addresses("a")
    fleet.start("a")
    fleet.start("b")
    fleet.open("a", 4)
    fleet.wait_until_held("b", 4)
    ends: dict[str, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        for version in (4, 6):
            for datapath in ("copy", "sockmap"):
                client, server = fleet.connect(version, datapath)
                ends |= {
                    f"{datapath}{version} client": client,
                    f"{datapath}{version} server": server,
                }
                stack.callback(client.close)
                stack.callback(server.close)
        # One whose client has ended while its server has not.
        client, server = fleet.connect(4, "copy")
        stack.callback(client.close)
        stack.callback(server.close)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        ends |= {"half client": client, "half server": server}
        # And of no others: a spliced pair is one of them until it was written itself.
        wanted = {
            (address_text(sock.getsockname()[:2]), address_text(sock.getpeername()[:2]))
            for sock in ends.values()
        }
        wait_for(lambda: fleet.staying() == wanted, "the store knows of all of them")
        fleet.traffic.mark()
        hosts.cut_off("a")
        fleet.daemons["a"].kill()
        side_of = {"client": "0", "server": "1"}
        for sides in steps:
            since_s = time.monotonic()
            hosts.give_addresses("b", sides)
            took_s = {
                what: seconds_until_reset(what, sock, since_s)
                for what, sock in ends.items()
                if side_of[what.split()[1]] in sides
            }
            print("reset after", {what: f"{each_s:.2f}" for what, each_s in took_s.items()})
            assert max(took_s.values()) < WITHIN_S + fleet.traffic.host_late_s(), took_s
    # Nobody else's pair was; and what has ended is not kept in the store.
    fleet.traffic.pause()
    wait_for(fleet.traffic.is_whole, "all bytes have come")
    assert fleet.traffic.errors() == []


@pytest.mark.timeout(240)
def test_both_ends_of_what_is_not_known_are_reset_as_soon_as_they_speak(fleet: Fleet) -> None:
    hosts = fleet.hosts
    hosts.give_addresses("a")
    fleet.start("a")
    fleet.start("b")
    fleet.open("a", 4)
    fleet.wait_until_held("b", 4)
    ends: list[tuple[str, socket.socket]] = []
    with contextlib.ExitStack() as stack:

        def keep(what: str, client: socket.socket, server: socket.socket) -> None:
            ends.extend([(f"{what} client", client), (f"{what} server", server)])
            stack.callback(client.close)
            stack.callback(server.close)

        for version in (4, 6):
            for datapath in ("copy", "sockmap"):
                client, server = fleet.connect(version, datapath)
                wait_for(
                    lambda client=client, datapath=datapath: (  # type: ignore[misc]
                        fleet.datapath_of("a", client) == datapath
                    ),
                    datapath,
                )
                keep(f"{datapath}{version}", client, server)
        # The store hears no more of this machine: it dies before it could tell of these.
        hosts.switch.ip("link set am down")
        for version in (4, 6):
            keep(f"late{version}", *fleet.spliced("a", version))
        hosts.cut_off("a")
        fleet.daemons["a"].kill()
        fleet.traffic.mark()
        # One end speaks while there is nobody, the other one afterwards.
        for _, sock in ends[::2]:
            sock.sendall(b"y")
        hosts.give_addresses("b")
        since_s = time.monotonic()
        for _, sock in ends[1::2]:
            poll = select.poll()
            poll.register(sock, 0)
            if not poll.poll(0):  # else it has heard already that the other end was answered
                with contextlib.suppress(ConnectionResetError):
                    sock.sendall(b"y")
        took_s = {what: seconds_until_reset(what, sock, since_s) for what, sock in ends}
        print("reset after", {what: f"{each_s:.2f}" for what, each_s in took_s.items()})
        assert max(took_s.values()) < WITHIN_S + fleet.traffic.host_late_s(), took_s
    # Nobody else's pair was.
    fleet.traffic.pause()
    wait_for(fleet.traffic.is_whole, "all bytes have come")
    assert fleet.traffic.errors() == []

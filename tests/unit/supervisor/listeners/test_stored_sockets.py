"""What the service manager is given to keep, and what is made of it when it comes back."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.supervisor.listeners import stored_sockets
from pyforwarder.supervisor.listeners.binding import BoundSocket

HERE = Address("127.0.0.1", 0)


@pytest.mark.parametrize(
    ("environ", "kept"),
    [
        ({}, False),
        ({"NOTIFY_SOCKET": "/run/x"}, False),
        ({"NOTIFY_SOCKET": "/run/x", "FDSTORE": "0"}, False),
        ({"FDSTORE": "9"}, False),
        ({"NOTIFY_SOCKET": "/run/x", "FDSTORE": "9"}, True),
    ],
)
def test_sockets_are_given_only_to_a_manager_that_keeps_them(
    environ: dict[str, str], kept: bool
) -> None:
    assert stored_sockets.is_kept(environ) is kept


def test_the_manager_forgets_what_it_had_and_gets_all_there_is(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    tcp, unix = BoundSocket(HERE, "tcp", 2), BoundSocket(UnixAddress(f"{tmp_path}/u"), "tcp", 2)
    given = BoundSocket(HERE, "tcp", 1)
    given.is_ours = False  # systemd has opened it
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(5)
        stored_sockets.store(path, [tcp, unix, given])
        assert manager.recv(99) == b"FDSTOREREMOVE=1\nFDNAME=pyforwarder-listener"
        said, fds, _, _ = socket.recv_fds(manager, 99, 9)
        assert said == b"FDSTORE=1\nFDPOLL=0\nFDNAME=pyforwarder-listener"
        stored_sockets.store(path, [])
        assert manager.recv(99).startswith(b"FDSTOREREMOVE=1\n")
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(99)
    socks = [socket.socket(fileno=fd) for fd in fds]
    assert isinstance(tcp.bind, Address)
    names = [str(sock.getsockname()) for sock in socks]
    assert names == [str(tuple(tcp.bind))] * 2 + [f"{tmp_path}/u"]
    for sock in socks:
        sock.close()
    for bound in (tcp, unix, given):
        bound.close()


def test_what_comes_back_is_as_it_was_and_no_socket_is_left_without_a_worker() -> None:
    """Of three sockets of TCP two workers can serve two; of UDP a client's one would be gone."""
    tcp, udp = BoundSocket(HERE, "tcp", 3), BoundSocket(HERE, "udp", 3)
    same = BoundSocket(HERE, "udp", 2)
    with socket.socket() as idle, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        strange = [idle.dup(), other.dup()]
        kept = stored_sockets.restored(
            [*tcp.sockets, *strange, *udp.sockets, *same.sockets], workers=2
        )
    assert [(one.protocol, one.wanted, len(one.sockets)) for one in kept] == [
        ("tcp", tcp.bind, 2),
        ("udp", same.bind, 2),
    ]
    assert all(one.is_ours and not one.is_shared for one in kept)
    assert [sock.fileno() >= 0 for sock in tcp.sockets] == [True, True, False]
    assert not any(sock.fileno() >= 0 for sock in (*udp.sockets, *strange))
    for one in kept:
        one.close()

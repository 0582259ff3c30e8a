"""What waits at a socket is received by one call, each datagram with its boundaries and sender."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from pyforwarder.runtime.recvmmsg import MOST_AT_ONCE, Receiver, Room
from pyforwarder.worker.udp.sockets import (
    ANCILLARY_BYTES,
    NAME_BYTES,
    datagram_socket_from_fd,
    key_of,
    local_address_in,
    name_of,
)

LONGEST = 65_507


def bound(host: str) -> socket.socket:
    ipv6 = ":" in host
    sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    if ipv6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    wildcard = host in ("0.0.0.0", "::")
    adopted = datagram_socket_from_fd(sock.detach(), ipv6=ipv6, wildcard=wildcard)
    adopted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    return adopted


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    with bound(request.param) as sock:
        yield sock


def receiver_of(sock: socket.socket, *, wildcard: bool = False) -> Receiver:
    return Receiver(
        Room(),
        name_bytes=NAME_BYTES[sock.family],
        control_bytes=ANCILLARY_BYTES if wildcard else 0,
    )


@contextlib.contextmanager
def client_of(sock: socket.socket) -> Iterator[socket.socket]:
    with socket.socket(sock.family, socket.SOCK_DGRAM) as client:
        client.connect(sock.getsockname())
        yield client


def test_datagrams_of_any_size_keep_their_boundaries(listener: socket.socket) -> None:
    receiver = receiver_of(listener)
    wanted = [b"", b"a", b"", bytes(range(256)) * 5, b"x" * LONGEST, b"b" * 1472]
    with client_of(listener) as client:
        for data in wanted:
            client.send(data)
        got = receiver.receive(listener.fileno())
        assert [bytes(data) for data in got] == wanted
        assert {key_of(name)[:2] for name in receiver.names()} == {client.getsockname()[:2]}
        assert len(receiver.names()) == len(wanted)


def test_names_are_those_that_recvfrom_says(listener: socket.socket) -> None:
    receiver = receiver_of(listener)
    with client_of(listener) as one, client_of(listener) as other:
        for client in (one, other, one):
            client.send(b"x")
        receiver.receive(listener.fileno())
        keys = [key_of(name) for name in receiver.names()]
        wanted = [client.getsockname() for client in (one, other, one)]
        assert [key[:2] for key in keys] == [name[:2] for name in wanted]
        assert {key[2:] for key in keys} == {(b"", 0)}
        listener.sendto(b"answer", name_of(keys[1]))
        other.settimeout(10)
        assert other.recv(100) == b"answer"


def test_more_than_one_call_takes_comes_with_the_next(listener: socket.socket) -> None:
    receiver = receiver_of(listener)
    fd = listener.fileno()
    with client_of(listener) as client:
        for number in range(MOST_AT_ONCE + 6):
            client.send(b"%d" % number)
        got = [bytes(data) for data in receiver.receive(fd, 3)]
        got += [bytes(data) for data in receiver.receive(fd, MOST_AT_ONCE)]
        got += [bytes(data) for data in receiver.receive(fd, 10 * MOST_AT_ONCE)]
    assert got == [b"%d" % number for number in range(MOST_AT_ONCE + 6)]


def test_nothing_there_is_nothing(listener: socket.socket) -> None:
    receiver = receiver_of(listener, wildcard=True)
    assert receiver.receive(listener.fileno()) == []
    assert receiver.names() == receiver.controls() == []
    assert not receiver.has_controls()


def test_refusal_of_the_peer_is_an_error_and_costs_no_datagram() -> None:
    with bound("127.0.0.1") as sock, bound("127.0.0.1") as peer:
        receiver = Receiver(Room())
        sock.connect(peer.getsockname())
        peer.sendto(b"before", sock.getsockname())
        address = peer.getsockname()
        peer.close()
        sock.send(b"to nobody")
        with pytest.raises(ConnectionRefusedError):
            receiver.receive(sock.fileno())
        assert [bytes(data) for data in receiver.receive(sock.fileno())] == [b"before"]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
            again.bind(address)
            again.sendto(b"after", sock.getsockname())
        assert [bytes(data) for data in receiver.receive(sock.fileno())] == [b"after"]


@pytest.mark.parametrize(
    ("host", "asked", "local"),
    [
        ("0.0.0.0", "127.0.0.7", socket.inet_aton("127.0.0.7")),
        ("::", "::1", socket.inet_pton(socket.AF_INET6, "::1")),
        ("::", "127.0.0.7", socket.inet_pton(socket.AF_INET6, "::ffff:127.0.0.7")),
    ],
)
def test_wildcard_socket_tells_which_address_was_asked(host: str, asked: str, local: bytes) -> None:
    with bound(host) as sock:
        receiver = receiver_of(sock, wildcard=True)
        family = socket.AF_INET6 if ":" in asked else socket.AF_INET
        for count in (3, 1, 2):  # what the call before has written is not read again
            with socket.socket(family, socket.SOCK_DGRAM) as client:
                client.connect((asked, sock.getsockname()[1]))
                for _ in range(count):
                    client.send(b"x")
                assert len(receiver.receive(sock.fileno())) == count
                assert [local_address_in(said) for said in receiver.controls()] == [local] * count
                (key,) = {key_of(name + local) for name in receiver.names()}
                host_said = client.getsockname()[0]
                if host == "::" and family == socket.AF_INET:
                    host_said = "::ffff:" + host_said
                assert key == (host_said, client.getsockname()[1], local, 0)


def test_scope_of_a_link_local_client_is_part_of_its_key() -> None:
    packed = socket.inet_pton(socket.AF_INET6, "fe80::1")
    name = struct.pack("=H", socket.AF_INET6) + struct.pack(">HI", 53, 0) + packed
    assert key_of(name + struct.pack("=I", 7)) == ("fe80::1", 53, b"", 7)


@pytest.mark.parametrize(
    "control",
    [b"", b"short", struct.pack("@Nii", 20, socket.SOL_SOCKET, 1) + bytes(12)],
)
def test_other_control_messages_say_no_address(control: bytes) -> None:
    assert local_address_in(control) == b""


def test_receivers_may_share_their_memory() -> None:
    room = Room()
    with bound("127.0.0.1") as one, bound("::1") as other:
        first, second = Receiver(room), Receiver(room, name_bytes=28)
        gc.collect()
        with client_of(one) as client, client_of(other) as client6:
            for number in range(5):
                client.send(b"4" * number)
                client6.send(b"6" * number)
        assert [bytes(data) for data in first.receive(one.fileno())] == [b"4" * n for n in range(5)]
        assert [bytes(d) for d in second.receive(other.fileno())] == [b"6" * n for n in range(5)]


def test_descriptor_that_is_none_is_an_error() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        Receiver(Room()).receive(-1)

"""Users whose passwords are kept as hashes, in a worker that has no file to open any more."""

from __future__ import annotations

import base64
import contextlib
import socket
from typing import TYPE_CHECKING

import bcrypt
import pytest

from pyforwarder.core import password
from tests.helpers.peers import EchoServer, address_text, dial, read_exactly, read_to_end

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
BCRYPT = bcrypt.hashpw(b"secret", bcrypt.gensalt(4))


def config(file: Path) -> str:
    return (
        "listeners:\n"
        "- {name: main, bind: 127.0.0.1:0, first_packet: {timeout: 60s}, rules: [\n"
        "    {name: socks, match: socks, allow: [loopback], users: [alice]},\n"
        "    {name: http, match: http_connect, allow: [loopback], users: [alice]},\n"
        "    {name: named, match: instruction, allow: [loopback], ack: false}]}\n"
        f"users: {{alice: {file}}}\nworkers: 1\ndatapath: copy\n"
    )


def keep(file: Path, stored: bytes) -> None:
    file.write_bytes(stored + b"\n")
    file.chmod(0o600)


def connect(forwarder: Daemon, to: str, said: bytes) -> socket.socket:
    """A client that asks for a destination by HTTP CONNECT."""
    client = dial(forwarder.address)
    basic = base64.b64encode(b"alice:" + said).decode()
    head = f"CONNECT {to} HTTP/1.1\r\nProxy-Authorization: Basic {basic}\r\n\r\n"
    client.sendall(head.encode() + b"at once")
    return client


def socks(forwarder: Daemon, to: tuple[str, int], said: bytes) -> socket.socket:
    """The same by SOCKS 5, all of it without waiting for an answer."""
    client = dial(forwarder.address)
    address = socket.inet_aton(to[0]) + to[1].to_bytes(2, "big")
    client.sendall(
        b"\x05\x01\x02\x01\x05alice" + bytes([len(said)]) + said + b"\x05\x01\0\x01" + address
    )
    client.sendall(b"at once")
    return client


@pytest.mark.parametrize("kind", ["bcrypt", "argon2id"])
def test_hash_decides_in_workers_that_knew_none_when_they_started(
    start_forwarder: StartForwarder, tmp_path: Path, kind: str
) -> None:
    stored = BCRYPT if kind == "bcrypt" else password.make_hash(b"secret").encode()
    file = tmp_path / "alice"
    keep(file, b"plain")
    with EchoServer("server") as server:
        forwarder = start_forwarder(config(file))
        keep(file, stored)
        assert forwarder.command("reload").returncode == 0
        to = address_text(server.address)
        for _ in range(2):
            with contextlib.closing(connect(forwarder, to, b"secret")) as client:
                assert read_exactly(client, len(ESTABLISHED)) == ESTABLISHED
                assert read_exactly(client, 7) == b"at once"
            with contextlib.closing(socks(forwarder, server.address, b"secret")) as client:
                assert read_exactly(client, 14)[:5] == b"\x05\x02\x01\x00\x05"
                assert read_exactly(client, 7) == b"at once"
        for wrong in (b"plain", b"", stored):
            with contextlib.closing(connect(forwarder, to, wrong)) as client:
                assert read_to_end(client).startswith(b"HTTP/1.1 407 ")
        with contextlib.closing(socks(forwarder, server.address, b"wrong")) as client:
            assert read_to_end(client) == b"\x05\x02\x01\x01"
        forwarder.wait_for_no_pairs()
        assert forwarder.show("stats")["closed"] == {"finished": 4, "denied": 4}


def test_slow_hash_holds_up_nobody_else(start_forwarder: StartForwarder, tmp_path: Path) -> None:
    file = tmp_path / "alice"
    keep(file, bcrypt.hashpw(b"secret", bcrypt.gensalt(14)))
    with EchoServer("server") as server, contextlib.ExitStack() as stack:
        forwarder = start_forwarder(config(file))
        to = address_text(server.address)
        waits = [
            stack.enter_context(contextlib.closing(connect(forwarder, to, said)))
            for said in (b"wrong", b"secret")
        ]
        for number in range(20):
            with contextlib.closing(dial(forwarder.address)) as other:
                other.sendall(b"%02d%s00" % (len(to) + 4, to.encode()) + b"echo %02d" % number)
                assert read_exactly(other, 7) == b"echo %02d" % number
        for client in waits:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)
            client.settimeout(60)
        assert read_to_end(waits[0]).startswith(b"HTTP/1.1 407 ")
        assert read_exactly(waits[1], len(ESTABLISHED)) == ESTABLISHED
        # A client that leaves meanwhile is forgotten.
        connect(forwarder, to, b"another").close()

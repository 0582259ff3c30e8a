"""Unix sockets as listeners and as servers, with PROXY headers and without."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import Address
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.peers import (
    AnswerServer,
    NameServer,
    Waiting,
    address_text,
    dial,
    pattern,
    read_exactly,
    read_to_end,
    unused_port,
)
from tests.helpers.programs import WebServer, curl, haproxy, nginx
from tests.helpers.proxy_headers import DECLARED, DECLARED_CLIENT, DECLARED_SERVER
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder


@pytest.fixture
def directory() -> Iterator[Path]:
    """For sockets: a short path that workers, which run as nobody, may pass."""
    path = Path(tempfile.mkdtemp(prefix="unix-"))
    try:
        path.chmod(0o755)
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A server's socket; the test accepts."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen()
        yield sock


def accept(sock: socket.socket) -> socket.socket:
    served, _ = sock.accept()
    served.settimeout(DEADLINE_S)
    return served


def config(listener: Path, *rules: str, options: str = "", more: str = "") -> str:
    lines = "".join(f"      - {rule}\n" for rule in rules)
    return (
        f"listeners:\n  - name: main\n    bind: unix:{listener}\n"
        f"    first_packet: {{timeout: 2s}}\n{options}    rules:\n{lines}{more}"
    )


def closed(forwarder: Daemon, reason: str) -> int:
    found = forwarder.show("stats")["closed"].get(reason, 0)
    assert isinstance(found, int)
    return found


def test_a_unix_client_names_a_tcp_server(directory: Path, start_forwarder: StartForwarder) -> None:
    path = directory / "listener"
    forwarder = start_forwarder(config(path, "{match: instruction, allow: [loopback]}"))
    assert f"listening on unix:{path} (main)" in forwarder.output()
    assert stat.S_ISSOCK(path.stat().st_mode)
    with AnswerServer("tcp") as server, dial(str(path)) as client:
        client.sendall(instruction(address_text(server.address)) + b"payload")
        assert read_exactly(client, len(ACK)) == ACK
        assert read_exactly(client, 15) == b"tcp got payload"
        # What is copied reaches its end a moment before the worker counts it.
        row = forwarder.wait_for_pair(lambda row: row["down_bytes"] == 15)
        assert row["state"] == "joined"
        assert (row["client"], row["listener"]) == ("unix:", "unix:")
        assert (row["datapath"], row["up_bytes"], row["down_bytes"]) == ("copy", 7, 15)
        assert "unix" in row["reason"]
    with dial(str(path)) as client:
        client.sendall(instruction("192.0.2.1:80"))
        assert read_to_end(client) == refusal("denied")
    assert forwarder.stop() == 0
    assert not path.exists()


def test_bytes_and_ends_between_unix_sockets(
    directory: Path, start_forwarder: StartForwarder
) -> None:
    up, down = pattern(700_001), pattern(900_007, start=5)
    with listening(directory / "server") as server:
        forwarder = start_forwarder(
            config(directory / "listener", f"{{match: any, to: 'unix:{directory}/server'}}")
        )
        with dial(str(directory / "listener")) as client, accept(server) as served:
            served.sendall(b"first")
            assert read_exactly(client, 5) == b"first"
            for source, target, data in ((client, served, up), (served, client, down)):
                received = bytearray()
                view = memoryview(data)
                while len(received) < len(data):
                    # In steps: nobody reads while one side sends.
                    view = view[source.send(view[: 1 << 16]) :] if view else view
                    received += target.recv(1 << 20)
                assert received == data
            # A FIN from one side, then data and FIN from the other.
            client.shutdown(socket.SHUT_WR)
            assert served.recv(1) == b""
            served.sendall(b"last")
            served.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == b"last"
        forwarder.wait_for_no_pairs()
        assert closed(forwarder, "finished") == 1


def test_unix_servers_of_an_upstream(directory: Path, start_forwarder: StartForwarder) -> None:
    servers = ", ".join(f"'unix:{directory}/{name}'" for name in ("dead", "alive"))
    with listening(directory / "alive") as alive:
        forwarder = start_forwarder(
            "workers: 1\nlisteners: [{bind: '127.0.0.1:0', rules: [{match: any, to: web}]}]\n"
            f"upstreams: {{web: {{servers: [{servers}], send_proxy: v2,"
            " health: {interval: 100ms}}}\n"
        )

        def states() -> dict[str, str]:
            return {row["server"]: row["state"] for row in forwarder.look("upstreams")}

        # The first check decides alone; nobody has come yet, so this is the health checks' work.
        wait_for(lambda: states()[f"unix:{directory}/dead"] == "down", "the first check")
        assert states()[f"unix:{directory}/alive"] == "up"
        with dial(forwarder.address) as client:
            local = Address(*client.getsockname())
            while True:
                with accept(alive) as served:
                    header = proxy_protocol.read(served.recv(4096))
                    assert isinstance(header, proxy_protocol.Header)
                    if header.is_local:
                        continue  # a check
                    assert (header.source, header.destination) == (
                        local,
                        Address(*forwarder.address),
                    )
                    served.sendall(b"alive")
                    assert read_exactly(client, 5) == b"alive"
                    break


# PROXY headers: a client that can open the socket is believed.

ACCEPTS = "    proxy_protocol: {accept: true}\n"


@pytest.mark.parametrize("version", DECLARED)
@pytest.mark.parametrize("form", ["v1", "v2"])
def test_the_header_on_a_unix_socket_has_the_clients_address(
    version: str, form: str, directory: Path, start_forwarder: StartForwarder
) -> None:
    path = directory / "listener"
    with Waiting() as server, NameServer("other") as other:
        forwarder = start_forwarder(
            config(
                path,
                f"{{match: {{client: 192.0.2.0/24}}, to: '{address_text(server.address)}',"
                f" send_proxy: {form}}}",
                f"{{match: any, to: '{address_text(other.address)}'}}",
                options=ACCEPTS,
            )
        )
        with dial(str(path)) as client:
            # A socket with a deadline waits until it is writable, which a unix socket is not while
            # some 70 pieces are in it: a worker that only looked at a header in the queue would
            # wait for ever.
            for byte in DECLARED[version]:
                client.sendall(bytes([byte]))
            client.sendall(b"payload")
            with server.accept() as served:
                data = b""
                while not (
                    isinstance(header := proxy_protocol.read(data), proxy_protocol.Header)
                    and data.endswith(b"payload")
                ):
                    data += served.recv(4096)
                assert (header.source, header.destination) == (DECLARED_CLIENT, DECLARED_SERVER)
                assert data[header.length :] == b"payload"
                row = forwarder.wait_for_pair(lambda row: row["up_bytes"] == 7)
                assert (row["client"], row["state"]) == (str(DECLARED_CLIENT), "joined")
        forwarder.wait_for_no_pairs()
        # The proxy speaks for itself, or does not know: a client without an address.
        for nameless in (
            proxy_protocol.build_v2(None, None, is_local=True),
            proxy_protocol.build_v1(None, None),
        ):
            with dial(str(path)) as client:
                client.sendall(nameless)
                assert read_to_end(client) == b"other"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(b"GET / HTTP/1.1\r\n\r\n", "malformed"), (b"PROXY TCP4 1", "timeout"), (b"", "timeout")],
)
def test_a_unix_client_without_a_header_is_no_client(
    wrong: bytes, reason: str, directory: Path, start_forwarder: StartForwarder
) -> None:
    path = directory / "listener"
    with Waiting() as server:
        forwarder = start_forwarder(
            config(path, f"{{match: any, to: '{address_text(server.address)}'}}", options=ACCEPTS)
        )
        with dial(str(path)) as client:
            client.sendall(wrong)
            # A unix socket knows a reset only where something was unread (unix(7)).
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        assert server.nobody_came()
        wait_for(lambda: closed(forwarder, reason) == 1, reason)


def test_clients_behind_a_proxy_on_a_unix_socket_are_limited_one_by_one(
    directory: Path, start_forwarder: StartForwarder
) -> None:
    path = directory / "listener"
    with AnswerServer("server") as server:
        start_forwarder(
            config(
                path,
                "{match: instruction, allow: [loopback]}",
                options=ACCEPTS,
                more="limits: {pairs_per_client: 1}\n",
            )
        )
        wanted = instruction(address_text(server.address))
        other = proxy_protocol.build_v1(Address("192.0.2.8", 1), DECLARED_SERVER)
        with dial(str(path)) as first, dial(str(path)) as second, dial(str(path)) as third:
            for sock, header, answer in (
                (first, DECLARED["v1"], ACK),
                (second, other, ACK),
                (third, DECLARED["v2"], refusal("busy")),
            ):
                sock.sendall(header + wanted)
                assert read_exactly(sock, len(answer)) == answer


@pytest.mark.parametrize("proxy", ["haproxy", "nginx"])
def test_a_proxy_before_us_on_a_unix_socket(
    proxy: str, directory: Path, start_forwarder: StartForwarder
) -> None:
    path, port = directory / "listener", unused_port()
    with WebServer("web") as web, WebServer("other") as other:
        start_forwarder(
            config(
                path,
                f"{{match: {{client: 127.0.0.9}}, to: '{address_text(web.address)}'}}",
                f"{{match: {{client: 127.0.0.1}}, to: '{address_text(other.address)}'}}",
                options="    proxy_protocol: {accept: true}\n    mode: 0666\n",
            )
        )
        front = (
            haproxy(
                directory,
                port,
                f"listen front\n  bind 127.0.0.1:{port}\n  server us unix@{path} send-proxy-v2\n",
            )
            if proxy == "haproxy"
            else nginx(
                directory,
                port,
                stream=f"server {{ listen 127.0.0.1:{port}; proxy_pass unix:{path};"
                " proxy_protocol on; }\n",
            )
        )
        with front:
            url = f"http://127.0.0.1:{port}/a"
            assert curl("--interface", "127.0.0.9", url) == "web: GET /a\n"
            assert curl(url) == "other: GET /a\n"


# The modes of their files: which users may connect.


def may_connect(path: Path) -> bool:
    """Whether a user without privilege may."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with socket.socket(socket.AF_UNIX) as sock:
                code = 0 if sock.connect_ex(str(path)) == 0 else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1)
    return code == 0


def test_the_mode_says_which_users_may_connect_and_a_reload_changes_it(
    directory: Path, start_forwarder: StartForwarder
) -> None:
    path = directory / "listener"

    def text(mode: str) -> str:
        return config(path, "{match: any, reject: close}", options=f"    mode: {mode}\n")

    forwarder = start_forwarder(text("0600"))
    assert not may_connect(path)
    forwarder.reconfigure(text("0666"))
    assert forwarder.command("reload").returncode == 0
    assert may_connect(path)
    forwarder.reconfigure(text("600"))
    assert forwarder.command("reload").returncode == 0
    assert not may_connect(path)


def test_a_socket_that_a_killed_daemon_has_left_is_taken_over(
    directory: Path, start_forwarder: StartForwarder
) -> None:
    path = directory / "listener"
    text = config(path, "{match: any, reject: close}", options="    mode: 0666\n")
    forwarder = start_forwarder(text)
    forwarder.kill()
    assert path.exists()
    start_forwarder(text)
    assert may_connect(path)

"""UDP listeners: sessions by client address, boundaries kept, bad input dropped."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.udp.eviction import STEADY_AFTER_S
from tests.helpers.first_packets import CLIENTS
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.netns import Network, private_network
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

SIZES = (0, 1, 512, 1472, 9000, 60_000)


class EchoServer(threading.Thread):
    """Answers every datagram with its name in front; `quit` ends it."""

    def __init__(self, name: str, host: str = "127.0.0.1") -> None:
        super().__init__(daemon=True)
        self.sock = socket.socket(
            socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM
        )
        self.sock.bind((host, 0))
        self.label = name.encode()
        self.start()

    @property
    def text(self) -> str:
        host, port = self.sock.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, address = self.sock.recvfrom(65535)
                if data == b"quit":
                    return
                self.sock.sendto(self.label + data, address)

    def close(self) -> None:
        with socket.socket(self.sock.family, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"quit", self.sock.getsockname())
        self.join(timeout=scaled_s(5))
        self.sock.close()


@pytest.fixture
def server() -> Iterator[EchoServer]:
    echo = EchoServer("A")
    yield echo
    echo.close()


@contextlib.contextmanager
def client_of(address: tuple[str, int]) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(scaled_s(5))
        sock.connect(address)
        yield sock


def config(*rules: str, bind: str = "127.0.0.1:0", more: str = "") -> str:
    lines = "".join(f"      - {rule}\n" for rule in rules)
    return (
        f"listeners:\n  - name: main\n    bind: '{bind}'\n    protocol: udp\n"
        f"    rules:\n{lines}datapath: copy\n{more}"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagrams_keep_their_boundaries(start_forwarder: StartForwarder, host: str) -> None:
    echo = EchoServer("A", host)
    bind = f"[{host}]:0" if ":" in host else f"{host}:0"
    daemon = start_forwarder(config(f'{{match: any, to: "{echo.text}"}}', bind=bind))
    with client_of(daemon.address) as client:
        for size in SIZES:
            client.send(b"x" * size)
            assert client.recv(65535) == b"A" + b"x" * size
    echo.close()


def test_dns_and_openvpn_are_recognised_in_datagrams(start_forwarder: StartForwarder) -> None:
    names, tunnel, other = EchoServer("N"), EchoServer("V"), EchoServer("O")
    daemon = start_forwarder(
        config(
            f"{{match: {{dns: {{qname: '*.internal.example'}}}}, to: '{names.text}'}}",
            f"{{match: openvpn, to: '{tunnel.text}'}}",
            f"{{match: any, to: '{other.text}'}}",
        )
    )
    query = CLIENTS["dns-dig"][2:]
    sent = {
        query: b"N",
        query.replace(b"\x08internal", b"\x08external"): b"O",
        CLIENTS["openvpn"][2:]: b"V",
        b"neither": b"O",
    }
    for data, server in sent.items():
        with client_of(daemon.address) as client:
            client.send(data)
            assert client.recv(65535) == server + data
    for echo in (names, tunnel, other):
        echo.close()


def test_each_client_has_its_own_session_and_gets_its_own_answers(
    start_forwarder: StartForwarder, server: EchoServer
) -> None:
    daemon = start_forwarder(config(f"{{match: any, to: '{server.text}'}}"))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(daemon.address)) for _ in range(23)]
        for turn in range(3):
            for number, client in enumerate(clients):
                client.send(b"%d-%d" % (turn, number))
            for number, client in enumerate(clients):
                assert client.recv(100) == b"A%d-%d" % (turn, number)
        control = daemon.control()
        # What is copied reaches its end a moment before the worker counts it.
        wait_for(lambda: {row["down_packets"] for row in control.pairs()} == {3}, "all are counted")
        rows = daemon.pairs()
        assert len(rows) == 23
        for row in rows:
            assert (row["state"], row["datapath"]) == ("joined", "copy")
            assert (row["up_packets"], row["down_packets"]) == (3, 3)
            assert row["down_bytes"] == row["up_bytes"] + 3
            assert row["server"] == server.text
        ports = {f"127.0.0.1:{client.getsockname()[1]}" for client in clients}
        assert {row["client"] for row in rows} == ports


def test_the_first_datagram_decides(start_forwarder: StartForwarder, server: EchoServer) -> None:
    other = EchoServer("B")
    daemon = start_forwarder(
        config(
            f"{{match: {{bytes: {{prefix: 'to-b'}}}}, to: '{other.text}'}}",
            f"{{match: any, to: '{server.text}'}}",
        )
    )
    with client_of(daemon.address) as first, client_of(daemon.address) as second:
        first.send(b"to-b please")
        assert first.recv(100) == b"Bto-b please"
        first.send(b"still b")
        assert first.recv(100) == b"Bstill b"
        second.send(b"to")  # could still become `to-b`, but a datagram is whole
        assert second.recv(100) == b"Ato"
    other.close()


def test_an_instruction_names_the_server(
    start_forwarder: StartForwarder, server: EchoServer
) -> None:
    daemon = start_forwarder(config("{match: instruction, allow: [loopback]}"))
    with client_of(daemon.address) as client:
        client.send(instruction(server.text) + b"payload")
        assert client.recv(100) == ACK
        assert client.recv(100) == b"Apayload"
        client.send(b"more")
        assert client.recv(100) == b"Amore"
    with client_of(daemon.address) as client:
        client.send(instruction("169.254.1.1:53"))
        assert client.recv(100) == refusal("denied")
    with client_of(daemon.address) as client:
        client.send(instruction(f"127.0.0.1:{daemon.address[1]}"))
        assert client.recv(100) == refusal("denied")  # never to ourselves
    # Each is counted a moment after it was said.
    wait_for(lambda: daemon.look("stats")["closed"].get("denied") == 2, "both are counted")


def test_a_wildcard_listener_answers_from_the_address_that_was_asked(
    start_forwarder: StartForwarder, server: EchoServer
) -> None:
    daemon = start_forwarder(config(f"{{match: any, to: '{server.text}'}}", bind="0.0.0.0:0"))
    port = daemon.address[1]
    for host in ("127.0.0.1", "127.0.0.77"):
        with client_of((host, port)) as client:
            client.send(b"who")
            assert client.recv(100) == b"Awho"  # a connected socket takes it from there only
    assert {row["listener"] for row in daemon.pairs()} == {
        f"127.0.0.1:{port}",
        f"127.0.0.77:{port}",
    }


def test_a_server_that_is_not_there_ends_the_session(start_forwarder: StartForwarder) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    daemon = start_forwarder(config(f"{{match: any, to: '127.0.0.1:{port}'}}"))
    with client_of(daemon.address) as client:
        client.send(b"anybody")
        wait_for(lambda: daemon.look("stats")["closed"].get("refused"), "end of the session")
        assert daemon.pairs() == []


def test_silent_sessions_end(start_forwarder: StartForwarder, server: EchoServer) -> None:
    daemon = start_forwarder(
        config(f"{{match: any, to: '{server.text}'}}", more="timeouts: {idle: 400ms}\n")
    )
    with client_of(daemon.address) as client:
        client.send(b"once")
        assert client.recv(100) == b"Aonce"
        wait_for(lambda: daemon.look("stats")["closed"].get("idle") == 1, "idle session to end")
        client.send(b"again")
        assert client.recv(100) == b"Aagain"


def test_limits_hold_for_sessions(start_forwarder: StartForwarder, server: EchoServer) -> None:
    daemon = start_forwarder(
        config("{match: instruction, allow: [loopback]}", more="limits: {pairs: 2}\nworkers: 1\n")
    )
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(daemon.address)) for _ in range(3)]
        for client in clients[:2]:
            client.send(instruction(server.text))
            assert client.recv(100) == ACK
        time.sleep(STEADY_AFTER_S)  # a client that goes on speaking makes room for nobody
        for client in clients[:2]:
            client.send(b"still here")
            assert client.recv(100) == b"Astill here"
        clients[2].send(instruction(server.text))
        assert clients[2].recv(100) == refusal("busy")


def test_sessions_of_an_upstream_come_from_its_source_addresses(
    start_forwarder: StartForwarder,
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.settimeout(scaled_s(5))
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        daemon = start_forwarder(
            config(
                "{match: any, to: dns}",
                more=f"workers: 1\nupstreams: {{dns: {{servers: ['127.0.0.1:{port}'],"
                " source: [127.0.0.7, '::1', 127.0.0.8]}}\n",
            )
        )
        seen = []
        for _ in range(4):
            with client_of(daemon.address) as client:
                client.send(b"question")
                _, address = server.recvfrom(100)
                server.sendto(b"answer", address)
                assert client.recv(100) == b"answer"
                seen.append(address[0])
        assert sorted(seen) == ["127.0.0.7", "127.0.0.7", "127.0.0.8", "127.0.0.8"]


def test_garbage_is_dropped_and_counted(
    start_forwarder: StartForwarder, server: EchoServer
) -> None:
    daemon = start_forwarder(config("{match: instruction, allow: [loopback]}"))
    with client_of(daemon.address) as client:
        for junk in (b"", b"\xff" * 1400, b"GET / HTTP/1.1\r\n\r\n", b"18127.0.0.1:9001"):
            client.send(junk)
        client.send(instruction(server.text))
        seen = [client.recv(100)]
        while seen[-1] != ACK:
            seen.append(client.recv(100))
        assert len(seen) <= 2  # at most the truncated instruction had an answer
    assert daemon.show("listeners")[0]["refused"] == 4


def test_sessions_survive_a_reload_and_can_be_flushed(
    start_forwarder: StartForwarder, server: EchoServer
) -> None:
    text = config(f"{{match: any, to: '{server.text}'}}", bind="127.0.0.1:7653")
    daemon = start_forwarder(text)
    with client_of(daemon.address) as client:
        client.send(b"one")
        assert client.recv(100) == b"Aone"
        (before,) = daemon.pairs()
        assert daemon.command("reload").returncode == 0
        client.send(b"two")
        assert client.recv(100) == b"Atwo"
        (after,) = daemon.pairs()
        assert (after["id"], after["source"]) == (before["id"], before["source"])
        assert daemon.command("flush", str(after["id"])).returncode == 0
        assert daemon.pairs() == []
        wait_for(lambda: daemon.look("stats")["closed"] == {"flushed": 1}, "it is counted")


def test_a_drain_does_not_wait_for_sessions(
    start_forwarder: StartForwarder, server: EchoServer
) -> None:
    daemon = start_forwarder(config(f"{{match: any, to: '{server.text}'}}"))
    address = daemon.address
    with client_of(address) as client:
        client.send(b"one")
        assert client.recv(100) == b"Aone"
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        client.send(b"gone")
        with pytest.raises(ConnectionRefusedError) as error:
            client.recv(100)
        assert error.value.errno == errno.ECONNREFUSED


def test_an_address_in_use_is_an_error(start_forwarder: StartForwarder) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match=f"cannot listen on 127.0.0.1:{port}"):
            start_forwarder(config("{match: any, to: '127.0.0.1:9'}", bind=f"127.0.0.1:{port}"))


@pytest.mark.parametrize("workers", [1, 2])
def test_link_local_clients_are_answered_on_the_link_they_came_from(
    start_forwarder: StartForwarder, workers: int
) -> None:
    """Two hosts with the same link-local address and port, on two links, are two clients."""
    with private_network() as forwarder_net, contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(contextlib.closing(Network())) for _ in range(2)]
        for number, host in enumerate(hosts):
            forwarder_net.ip(f"link add f{number} type veth peer name c0 netns {host.path}")
            forwarder_net.ip(f"addr add fe80::1/64 dev f{number} nodad", f"link set f{number} up")
            host.ip("addr add fe80::2/64 dev c0 nodad", "link set c0 up")
        server = EchoServer("A", "127.0.0.1")
        stack.callback(server.close)
        forwarder = start_forwarder(
            config(
                f"{{match: any, to: '{server.text}'}}", bind="[::]:0", more=f"workers: {workers}\n"
            )
        )
        port = forwarder.address[1]
        clients = []
        for host in hosts:
            with host.entered():
                sock = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
                sock.settimeout(scaled_s(5))
                sock.bind(("fe80::2", 4711, 0, socket.if_nametoindex("c0")))
                sock.connect(("fe80::1", port, 0, socket.if_nametoindex("c0")))
                clients.append(sock)
        for turn in range(3):
            for number, sock in enumerate(clients):
                sock.send(b"%d.%d" % (number, turn))
            for number, sock in enumerate(clients):
                assert sock.recv(100) == b"A%d.%d" % (number, turn)
        assert len(forwarder.pairs()) == 2

"""Programs that people use over UDP, through rules that were written for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from aioquic.asyncio.client import connect

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers import programs
from tests.helpers.peers import unused_port
from tests.helpers.quic_peers import Nat, client_of, server
from tests.helpers.survival import everyone
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.helpers.netns import Network
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder


@contextlib.contextmanager
def running(network: Network, *command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A program in that network until the end of the block; what it said is shown at the end."""
    with tempfile.TemporaryFile("w+") as output:
        with network.entered():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait(DEADLINE_S)
            output.seek(0)
            print(f"--- {command[0]}", output.read(), sep="\n")


def kill(daemon: Daemon) -> None:
    """The whole daemon, at once."""
    processes = everyone(daemon)
    daemon.kill()
    for process in processes[1:]:
        wait_for(lambda one=process: not one.is_running(), "it has ended")  # type: ignore[misc]


# DNS

DNS: Final = """
listeners:
  - name: dns
    bind: "10.1.0.1:5353"
    protocol: udp
    rules: &rules
      - {match: {dns: {qname: "*.one.example"}}, to: "10.2.0.2:5301"}
      - {match: {dns: {qtype: TXT}}, to: "10.2.0.2:5302"}
      - {match: dns, reject: close}
  - {name: streams, bind: "10.1.0.1:5353", rules: *rules}
"""


def dnsmasq(port: int, *options: str) -> tuple[str, ...]:
    return (
        *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="),
        *("--user=root", "--no-resolv", "--no-hosts", "--bind-interfaces", "--log-facility=-"),
        *("--listen-address=10.2.0.2", f"--port={port}", *options),
    )


@pytest.mark.copied
def test_dig_gets_to_the_dnsmasq_that_has_the_name(
    hosts: Topology, start_forwarder: StartForwarder
) -> None:
    """By the name and by the type; in fragments, and by TCP where an answer is too long."""
    text = "x" * 250
    long = [f"--txt-record=long{n}.two.example," + ",".join([text] * n) for n in (10, 20)]
    with (
        running(hosts.server, *dnsmasq(5301, "--address=/one.example/10.9.9.1")),
        running(hosts.server, *dnsmasq(5302, "--edns-packet-max=4096", *long)),
    ):
        with hosts.forwarder.entered():
            daemon = start_forwarder(DNS)

        def dig(*words: str) -> str:
            always = ("dig", "@10.1.0.1", "-p", "5353", "+tries=1", "+time=10", "+short")
            with hosts.client.entered():
                done = subprocess.run(
                    [*always, *words], capture_output=True, text=True, timeout=60, check=False
                )
            return done.stdout.strip()

        with hosts.client.entered():
            wait_for(lambda: dig("a.one.example") == "10.9.9.1", "dnsmasq serves")
        answer = dig("long10.two.example", "TXT", "+bufsize=4096")
        assert answer.replace('"', "").replace(" ", "") == text * 10
        answer = dig("long20.two.example", "TXT", "+bufsize=4096")
        assert answer.replace('"', "").replace(" ", "") == text * 20
        accepted = {row["name"]: row["accepted"] for row in daemon.show("listeners")}
        assert accepted["streams"] == 1  # the longest alone was asked for again
        assert "10.9.9.1" not in dig("a.three.example")


# Tunnels: a socket at each end of one says what comes through.


@contextlib.contextmanager
def echo(hosts: Topology, inside: str) -> Iterator[Callable[[bytes], None]]:
    """A function that has something go to that address, which is in the tunnel, and back."""

    def bound() -> socket.socket:
        with hosts.server.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.bind((inside, 7))
        except OSError:  # the tunnel's end is not there yet
            sock.close()
            raise
        return sock

    with hosts.client.entered():
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def is_there() -> socket.socket | None:
        with contextlib.suppress(OSError):
            return bound()
        return None

    far = wait_for(is_there, "the tunnel has its address")
    assert far is not None
    with client, far:
        far.settimeout(0.5)
        client.settimeout(0.5)

        def exchange(data: bytes) -> None:
            """Tried again as long as the tunnel is being made."""

            def comes_back() -> bool:
                with contextlib.suppress(OSError):
                    client.sendto(data, (inside, 7))
                    got, source = far.recvfrom(1 << 16)
                    while got != data:
                        got, source = far.recvfrom(1 << 16)
                    far.sendto(data, source)
                    while client.recv(1 << 16) != data:
                        pass
                    return True
                return False

            wait_for(comes_back, "it goes there and back", deadline_s=40)

        yield exchange


def tunnel(protocol: str, port: int) -> str:
    return f"""
datapath: splice
listeners:
  - name: tunnel
    bind: "10.1.0.1:{port}"
    protocol: udp
    rules:
      - {{name: tunnel, match: {protocol}, to: "10.2.0.2:{port}"}}
"""


def goes_on(
    hosts: Topology, start: StartForwarder, text: str, exchange: Callable[[bytes], None]
) -> None:
    """Spliced, without a daemon, and with the next one, it is the same session."""

    def begin() -> Daemon:
        with hosts.forwarder.entered():
            return start(text)

    daemon = begin()
    exchange(b"first")

    def spliced() -> str:
        exchange(b"again")
        (row,) = daemon.control().pairs()
        return str(row["id"]) if row["datapath"] == "splice" else ""

    session = wait_for(spliced, "the kernel has it")
    for size in (1, 500, 1300):
        exchange(bytes(size))
    kill(daemon)
    exchange(b"nobody is there")
    daemon = begin()
    exchange(b"somebody is there")
    (row,) = daemon.control().pairs()
    assert str(row["id"]) == session
    assert row["rule"] == "tunnel"


def test_openvpn_goes_on_without_a_daemon(
    hosts: Topology, start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    both = programs.make_certificate(tmp_path)
    common = (
        *("openvpn", "--dev-type", "tun", "--proto", "udp", "--disable-dco", "--ping", "1"),
        *("--ca", f"{both}.crt", "--cert", f"{both}.crt", "--key", str(both), "--verb", "3"),
        *("--connect-retry", "1", "1", "--hand-window", "60"),
    )
    at_server = ("--tls-server", "--dh", "none", "--local", "10.2.0.2", "--port", "1194")
    at_client = ("--tls-client", "--remote", "10.1.0.1", "1194", "--nobind")
    with (
        running(
            hosts.server, *common, *at_server, "--dev", "vpn-s",
            "--ifconfig", "10.50.0.1", "10.50.0.2",
        ),
        running(
            hosts.client, *common, *at_client, "--dev", "vpn-c",
            "--ifconfig", "10.50.0.2", "10.50.0.1",
        ),
        echo(hosts, "10.50.0.1") as exchange,
    ):  # fmt: skip
        goes_on(hosts, start_forwarder, tunnel("openvpn", 1194), exchange)


def test_wireguard_goes_on_without_a_daemon(
    hosts: Topology, start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    """The one in userspace: not every kernel has its own."""

    def key(name: str) -> str:
        """Its public half."""
        private = programs.run("wg", "genkey")
        (tmp_path / name).write_text(private)
        return programs.run("wg", "pubkey", stdin=private).strip()

    ends = {"client": hosts.client, "server": hosts.server}
    public = {name: key(name) for name in ends}
    # Where both are spoken to by `wg`, in one directory for all networks.
    devices = {name: f"pfw{name[0]}{os.getpid()}" for name in ends}
    with contextlib.ExitStack() as stack:
        for name, network in ends.items():
            stack.enter_context(running(network, "wireguard-go", "--foreground", devices[name]))
            pipe = Path("/var/run/wireguard", f"{devices[name]}.sock")
            stack.callback(pipe.unlink, missing_ok=True)
            wait_for(pipe.exists, "it is there")
        network = hosts.server
        network.run("wg", "set", devices["server"], "listen-port", "51820",
                    "private-key", str(tmp_path / "server"),
                    "peer", public["client"], "allowed-ips", "10.60.0.2/32")  # fmt: skip
        network = hosts.client
        network.run("wg", "set", devices["client"], "private-key", str(tmp_path / "client"),
                    "peer", public["server"], "allowed-ips", "10.60.0.1/32",
                    "endpoint", "10.1.0.1:51820", "persistent-keepalive", "1")  # fmt: skip
        for name, number in (("server", 1), ("client", 2)):
            ends[name].ip(
                f"address add 10.60.0.{number}/24 dev {devices[name]}",
                f"link set {devices[name]} mtu 1420 up",
            )
        exchange = stack.enter_context(echo(hosts, "10.60.0.1"))
        goes_on(hosts, start_forwarder, tunnel("wireguard", 51820), exchange)


# QUIC


def test_a_quic_connection_goes_on_when_its_client_moves_and_without_a_daemon(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    """The kernel has it, by its server's name; after the move it is another session there."""
    certificate = programs.make_certificate(tmp_path)
    first, port = unused_port(), unused_port()
    text = f"""
datapath: splice
listeners:
  - name: main
    bind: 127.0.0.1:{port}
    protocol: udp
    rules:
      - {{name: one, match: {{quic: {{sni: one.example.com}}}}, to: '127.0.0.1:{first}'}}
"""
    daemons = [start_forwarder(text)]

    async def play() -> None:
        nat = Nat(("127.0.0.1", port))
        async with server("first", first, certificate), asyncio.timeout(scaled_s(60)):
            address = await nat.start()
            async with connect(*address, configuration=client_of("one.example.com")) as client:
                reader, writer = await client.create_stream()
                said = 0

                async def exchange() -> None:
                    nonlocal said
                    writer.write(b"%04d" % said)
                    answer = await reader.readexactly(len(b"first ") + 4)
                    assert answer == b"first %04d" % said
                    said += 1

                async def until_spliced(count: int) -> None:
                    while True:
                        await exchange()
                        rows = daemons[-1].control().pairs()
                        if [row["datapath"] for row in rows] == ["splice"] * count:
                            return

                await until_spliced(1)
                await nat.move()
                await until_spliced(2)
                for _ in range(3):  # the first ones may be copied still
                    await exchange()
                before = {row["id"] for row in daemons[-1].control().pairs()}
                kill(daemons[-1])
                for _ in range(10):
                    await exchange()
                daemons.append(start_forwarder(text))
                for _ in range(10):
                    await exchange()
                assert {row["id"] for row in daemons[-1].control().pairs()} == before
                writer.write_eof()
            await nat.close()

    asyncio.run(play())

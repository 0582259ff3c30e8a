"""Real QUIC and DTLS through rules on datagrams: aioquic's client and server, OpenSSL's."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aioquic.asyncio.client import connect

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers import programs
from tests.helpers.peers import unused_port
from tests.helpers.quic import V1, V2
from tests.helpers.quic_peers import ALPN, Nat, client_of, server

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

pytestmark = pytest.mark.copied


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return programs.make_certificate(tmp_path_factory.mktemp("quic"))


async def ask(
    address: tuple[str, int], name: str, said: bytes, *, version: int = V1, more: int = 0
) -> bytes:
    """What the server of this name answers; `more`: bytes that make the hello longer."""
    configuration = client_of(name, version=version, more=more)
    async with asyncio.timeout(scaled_s(20)):
        async with connect(*address, configuration=configuration) as client:
            reader, writer = await client.create_stream()
            writer.write(said)
            writer.write_eof()
            return await reader.read()


def rules(one: int, two: int) -> str:
    return f"""
listeners:
  - name: main
    bind: 127.0.0.1:0
    protocol: udp
    rules:
      - {{name: one, match: {{quic: {{sni: one.example.com}}}}, to: '127.0.0.1:{one}'}}
      - name: two
        match: {{quic: {{sni: '*.example.com', alpn: {ALPN}}}}}
        to: '127.0.0.1:{two}'
      - {{name: local, match: quic, to: sni, port: {two}, allow: [loopback]}}
"""


@pytest.mark.parametrize("later", [False, True], ids=["from-the-start", "by-a-reload"])
def test_aioquic_gets_to_the_server_it_names(
    start_forwarder: StartForwarder, certificate: Path, later: bool
) -> None:
    """Also where workers that are confined already have to import what decrypts."""
    first, second = unused_port(), unused_port()
    text = rules(first, second)
    if later:
        head, _, _ = text.partition("    rules:")
        daemon = start_forwarder(f"{head}    rules: [{{match: any, reject: close}}]\n")
        before = [worker.pid for worker in daemon.workers()]
        daemon.reconfigure(text)
        assert daemon.command("reload").returncode == 0
        assert [worker.pid for worker in daemon.workers()] == before
    else:
        daemon = start_forwarder(text)

    async def play() -> list[bytes]:
        async with server("first", first, certificate), server("second", second, certificate):
            return [
                await ask(daemon.address, "one.example.com", b"x" * 10_000),
                await ask(daemon.address, "two.example.com", b"v2", version=V2),
                await ask(daemon.address, "two.example.com", b"long", more=1500),
                await ask(daemon.address, "localhost", b"named"),
            ]

    answers = asyncio.run(play())
    assert answers[0].replace(b"first ", b"") == b"x" * 10_000
    assert answers[0].startswith(b"first x")
    assert answers[1:] == [b"second v2", b"second long", b"second named"]


def test_client_whose_port_changes_keeps_its_connection(
    start_forwarder: StartForwarder, certificate: Path
) -> None:
    """Six times, so that both workers get it; each time what was said is answered."""
    first, second = unused_port(), unused_port()
    daemon = start_forwarder(rules(first, second))

    async def play() -> list[bytes]:
        nat = Nat(daemon.address)
        answers = []
        async with server("first", first, certificate), asyncio.timeout(scaled_s(40)):
            address = await nat.start()
            async with connect(*address, configuration=client_of("one.example.com")) as client:
                reader, writer = await client.create_stream()
                for number in range(7):
                    writer.write(b"%d" % number)
                    answers.append(await reader.readexactly(len(b"first ") + 1))
                    if number < 6:
                        await nat.move()
                writer.write_eof()
            await nat.close()
        return answers

    assert asyncio.run(play()) == [b"first %d" % number for number in range(7)]
    rows = daemon.show("pairs")
    assert {row["rule"] for row in rows} == {"one"}
    assert len(rows) == 7


@contextlib.contextmanager
def dtls_server(certificate: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = ["openssl", "s_server", "-dtls1_2", "-accept", str(port), "-cert", str(certificate)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        while b"ACCEPT" not in process.stdout.readline():
            assert process.poll() is None
        yield process
        process.kill()


def test_openssl_gets_to_the_dtls_server_it_names(
    start_forwarder: StartForwarder, certificate: Path
) -> None:
    """With a small MTU its hello comes in three datagrams."""
    port = unused_port()
    daemon = start_forwarder(
        "listeners: [{name: main, bind: '127.0.0.1:0', protocol: udp, rules: ["
        f"{{match: {{dtls: {{sni: dtls.example.com}}}}, to: '127.0.0.1:{port}'}},"
        "{match: any, reject: close}]}]\n"
    )
    offered = "h2," + ",".join(f"p{number:03}" for number in range(60))
    with dtls_server(certificate, port):
        for mtu in (1400, 256):
            done = subprocess.run(
                [
                    *("openssl", "s_client", "-dtls1_2", "-connect", programs.at(daemon)),
                    *("-servername", "dtls.example.com", "-mtu", str(mtu), "-alpn", offered),
                ],
                input=b"Q\n",
                capture_output=True,
                timeout=scaled_s(20),
                check=False,
            )
            assert b"Cipher is ECDHE" in done.stdout

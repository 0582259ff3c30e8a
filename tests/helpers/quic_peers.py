"""QUIC servers and clients of aioquic, and a NAT in front of a client."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent, StreamDataReceived

from tests.helpers.quic import V1, V2

ALPN = "echo"


class Echo(QuicConnectionProtocol):
    """Answers what comes on a stream with its server's name in front."""

    label = b""

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            answer = (self.label if event.data else b"") + event.data
            self._quic.send_stream_data(event.stream_id, answer, event.end_stream)
            self.transmit()


@contextlib.asynccontextmanager
async def server(label: str, port: int, certificate: Path) -> AsyncIterator[None]:
    configuration = QuicConfiguration(
        is_client=False, alpn_protocols=[ALPN], supported_versions=[V1, V2]
    )
    configuration.load_cert_chain(f"{certificate}.crt", certificate)
    protocol = type(label, (Echo,), {"label": label.encode() + b" "})
    running = await serve("127.0.0.1", port, configuration=configuration, create_protocol=protocol)
    try:
        yield
    finally:
        running.close()
        await asyncio.sleep(0)  # the loop closes the socket in its next turn


def client_of(name: str, *, version: int = V1, more: int = 0) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=True,
        server_name=name,
        alpn_protocols=[ALPN, *(f"p{number:08}" for number in range(more // 10))],
        verify_mode=ssl.CERT_NONE,
        original_version=version,
        supported_versions=[version],
    )


class Nat(asyncio.DatagramProtocol):
    """Between a client and the forwarder; `move` gives it another port there."""

    def __init__(self, forwarder: tuple[str, int]) -> None:
        self._forwarder = forwarder
        self._client: tuple[str, int] | None = None
        self._inside: asyncio.DatagramTransport | None = None
        self._outside: asyncio.DatagramTransport | None = None

    async def start(self) -> tuple[str, int]:
        """Where the client sends to."""
        loop = asyncio.get_running_loop()
        self._inside, _ = await loop.create_datagram_endpoint(
            lambda: self, local_addr=("127.0.0.1", 0)
        )
        await self.move()
        host, port = self._inside.get_extra_info("sockname")
        return host, port

    async def move(self) -> None:
        """Another port towards the forwarder, from here on; the old one is deaf."""
        loop = asyncio.get_running_loop()
        before = self._outside
        self._outside, _ = await loop.create_datagram_endpoint(
            lambda: Outside(self), remote_addr=self._forwarder
        )
        if before is not None:
            before.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """From the client."""
        self._client = addr
        assert self._outside is not None
        self._outside.sendto(data)

    def to_client(self, data: bytes) -> None:
        """From the forwarder."""
        assert self._inside is not None
        self._inside.sendto(data, self._client)

    async def close(self) -> None:
        for transport in (self._inside, self._outside):
            assert transport is not None
            transport.close()
        await asyncio.sleep(0)


class Outside(asyncio.DatagramProtocol):
    """The NAT's side of the forwarder."""

    def __init__(self, nat: Nat) -> None:
        self._nat = nat

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._nat.to_client(data)

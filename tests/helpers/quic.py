"""QUIC clients' first datagrams: what aioquic sends, and what only a test would put together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.crypto import CryptoPair

V1: Final = 0x00000001
V2: Final = 0x6B3343CF
DCID: Final = bytes.fromhex("8394c8f03e515708")
# Types of long headers, by version.
INITIAL: Final = {V1: 0, V2: 1}
ZERO_RTT: Final = {V1: 1, V2: 2}
HANDSHAKE: Final = {V1: 2, V2: 3}
RETRY: Final = {V1: 3, V2: 0}

PADDING: Final = b"\x00"
PING: Final = b"\x01"


def varint(number: int) -> bytes:
    """RFC 9000 section 16."""
    for bits, size in ((6, 1), (14, 2), (30, 4)):
        if number < 1 << bits:
            return (number | (size.bit_length() - 1) << 8 * size - 2).to_bytes(size, "big")
    return (number | 3 << 62).to_bytes(8, "big")


def extension(kind: int, value: bytes) -> bytes:
    """One of a ClientHello."""
    return kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value


def server_name(name: str) -> bytes:
    """The extension that says a name."""
    entry = b"\0" + len(name).to_bytes(2, "big") + name.encode()
    return extension(0, len(entry).to_bytes(2, "big") + entry)


def hello(
    name: str | None = "a.example.com",
    *,
    alpn: Sequence[bytes] = (b"h3",),
    size: int = 0,
    more: bytes = b"",
    cookie: bytes | None = None,
) -> bytes:
    """A ClientHello's message; `size`: filled up to so many bytes, as by a post-quantum key.

    `cookie`: as DTLS has it, without a header.
    """
    names = b"".join(bytes([len(each)]) + each for each in alpn)
    extensions = server_name(name) if name is not None else b""
    if alpn:
        extensions += extension(16, len(names).to_bytes(2, "big") + names)
    extensions += extension(43, b"\x02\x03\x04") + more
    body = b"\3\3" + bytes(32) + b"\0"
    if cookie is not None:
        body += bytes([len(cookie)]) + cookie
    body += b"\0\2\x13\1" + b"\1\0"
    rest = size - 4 - len(body) - 2 - len(extensions)
    if rest > 4:
        extensions += extension(51, bytes(rest - 4))
    body += len(extensions).to_bytes(2, "big") + extensions
    if cookie is not None:
        return body
    return b"\1" + len(body).to_bytes(3, "big") + body


def crypto(offset: int, data: bytes) -> bytes:
    """A CRYPTO frame."""
    return b"\x06" + varint(offset) + varint(len(data)) + data


def header(
    kind: int, *, version: int = V1, dcid: bytes = DCID, scid: bytes = b"", bits: int = 0
) -> bytes:
    """The beginning of a long header."""
    first = 0xC0 | kind << 4 | bits
    return (
        bytes([first])
        + version.to_bytes(4, "big")
        + bytes([len(dcid)])
        + dcid
        + bytes([len(scid)])
        + scid
    )


def initial(
    frames: bytes,
    *,
    version: int = V1,
    dcid: bytes = DCID,
    keys_of: bytes | None = None,
    scid: bytes = b"",
    token: bytes = b"",
    number: int = 0,
    number_length: int = 2,
    reserved: int = 0,
    size: int = 1200,
) -> bytes:
    """A client's Initial packet, padded to `size` bytes.

    `keys_of`: the connection id whose keys protect it, if that is not `dcid`.
    """
    bits = number_length - 1 | reserved << 2
    start = header(INITIAL[version], version=version, dcid=dcid, scid=scid, bits=bits)
    start += varint(len(token)) + token
    frames += bytes(max(0, size - len(start) - 2 - number_length - len(frames) - 16))
    length = number_length + len(frames) + 16
    start += (length | 0x4000).to_bytes(2, "big") + number.to_bytes(number_length, "big")
    pair = CryptoPair()
    pair.setup_initial(cid=dcid if keys_of is None else keys_of, is_client=True, version=version)
    return pair.encrypt_packet(start, frames, number)


def zero_rtt(size: int = 200, *, version: int = V1, dcid: bytes = DCID) -> bytes:
    """A packet of early data; nobody but the server can read it."""
    start = header(ZERO_RTT[version], version=version, dcid=dcid)
    return start + (size | 0x4000).to_bytes(2, "big") + random.Random(size).randbytes(size)


def split_hello(message: bytes, at: int, **options: object) -> tuple[bytes, bytes]:
    """The two datagrams of a hello that does not fit into one."""
    return (
        initial(crypto(0, message[:at]), number=0, **options),  # type: ignore[arg-type]
        initial(crypto(at, message[at:]), number=1, **options),  # type: ignore[arg-type]
    )


def scrambled(message: bytes, chance: random.Random, *, count: int = 1) -> list[bytes]:
    """A hello in `count` datagrams, cut up and strewn as Chromium and quic-go do."""
    cuts = sorted(
        chance.sample(range(1, len(message)), min(chance.randrange(12), len(message) - 1))
    )
    pieces = [
        crypto(start, message[start:stop])
        for start, stop in zip([0, *cuts], [*cuts, len(message)], strict=True)
    ]
    pieces += [chance.choice((PING, PADDING * chance.randrange(1, 9))) for _ in range(10)]
    chance.shuffle(pieces)
    parts = [b"".join(pieces[each::count]) or PING for each in range(count)]
    return [
        initial(part, number=number, number_length=chance.randrange(1, 5))
        for number, part in enumerate(parts)
    ]


def aioquic_client(
    name: str, *, versions: Sequence[int] = (V1,), alpn: Sequence[str] = ("h3",)
) -> list[bytes]:
    """The first datagrams of aioquic."""
    configuration = QuicConfiguration(
        is_client=True,
        server_name=name,
        alpn_protocols=list(alpn),
        supported_versions=list(versions),
    )
    client = QuicConnection(configuration=configuration)
    client.connect(("192.0.2.1", 443), now=0.0)
    return [data for data, _ in client.datagrams_to_send(now=0.0)]

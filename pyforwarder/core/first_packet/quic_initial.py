"""What a QUIC client's Initial packets carry: packet protection off, CRYPTO frames out.

An Initial is encrypted with keys that anybody can derive from the connection id in the client's
first packet; they stay the same when the client uses another id later.  A packet that does not
decrypt is none, as for a server.

Source: RFC 9000 sections 12, 17.2 and 19, RFC 9001 section 5, RFC 9369 (version 2).
"""

from __future__ import annotations

import functools
import hmac
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.core.first_packet.cursor import Cursor, ParseError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    from pyforwarder.core.first_packet.pieces import Piece


class _Version(NamedTuple):
    """What differs between the versions."""

    salt: bytes
    label: bytes  # in front of key, iv and hp
    initial: int  # types of long headers
    zero_rtt: int
    retry: int


VERSIONS: Final = {"1": 0x00000001, "2": 0x6B3343CF}
_KNOWN: Final = {
    # RFC 9000 section 17.2, RFC 9001 section 5.2
    VERSIONS["1"]: _Version(
        bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a"), b"quic ", 0, 1, 3
    ),
    # RFC 9369 sections 3.2 and 3.3
    VERSIONS["2"]: _Version(
        bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"), b"quicv2 ", 1, 2, 0
    ),
}
_LONG_HEADER: Final = 0x80
_MAX_CONNECTION_ID: Final = 20  # RFC 9000 section 17.2
_SAMPLE: Final = 16
_TAG: Final = 16

# A client puts an Initial, a 0-RTT and perhaps a second Initial into one datagram. Each costs a
# decryption.
MOST_PACKETS: Final = 6
MOST_FRAMES: Final = 256
# As in TLS over streams; no bytes are kept for what has not come.
_MAX_OFFSET: Final = 131_400

_PADDING, _PING, _ACK, _ACK_ECN, _CRYPTO, _CLOSE = 0x00, 0x01, 0x02, 0x03, 0x06, 0x1C


class Beginning(NamedTuple):
    """The first packet of a client: what its long header says."""

    version: int
    destination_id: bytes
    is_initial: bool  # else 0-RTT, which has overtaken the Initial


class _Header(NamedTuple):
    """A long header up to the packet number."""

    version: _Version
    number: int  # the version's
    destination_id: bytes
    kind: int
    protected: int  # where the packet number stands
    end: int


def type_of_retry(version: int) -> int:
    """The type that a Retry packet has in its long header."""
    return _KNOWN[version].retry


def beginning_of(datagram: bytes) -> Beginning:
    """What the first packet in a client's first datagram is.

    Raises:
        ParseError: no QUIC of a version known here, or not how a client begins.
    """
    header = _read_header(Cursor(datagram, 0, len(datagram)))
    if header.kind not in (header.version.initial, header.version.zero_rtt):
        raise ParseError("not how a client begins")
    return Beginning(
        header.number, header.destination_id, is_initial=header.kind == header.version.initial
    )


# For each rule that is asked, and again when the next datagram has come.
@functools.lru_cache(maxsize=16)
def crypto_in(datagram: bytes, version: int, destination_id: bytes) -> tuple[Piece, ...] | None:
    """The pieces of the client's handshake in a datagram; None: no Initial in it that decrypts.

    `version` and `destination_id` are those of the client's first packet.

    Raises:
        ParseError: an Initial that no server would take.
    """
    cursor = Cursor(datagram, 0, len(datagram))
    pieces: list[Piece] = []
    has_initial = False
    for _ in range(MOST_PACKETS):
        if not cursor.remaining:
            break
        start = cursor.position
        try:
            header = _read_header(cursor)
        except ParseError:
            break  # short headers, and what some clients fill up datagrams with
        if header.number != version:
            break
        if header.kind == header.version.initial:
            payload = _decrypt(datagram, start, header, _keys(version, destination_id))
            if payload is not None:
                has_initial = True
                _read_frames(payload, pieces)
        cursor.position = header.end
    else:
        raise ParseError(f"more than {MOST_PACKETS} packets in a datagram")
    return tuple(pieces) if has_initial else None


def _read_header(cursor: Cursor) -> _Header:
    """The long header at the cursor, and how far its packet goes.

    Raises:
        ParseError: a short header, an unknown version, or a length that goes beyond the datagram.
    """
    first = cursor.get_uint8()
    if not first & _LONG_HEADER:
        raise ParseError("not a long header")
    number = cursor.get_uint32()
    version = _KNOWN.get(number)
    if version is None:
        raise ParseError("not a version known here")
    destination_id = _connection_id(cursor)
    _connection_id(cursor)  # the client's own
    kind = first >> 4 & 3
    if kind == version.retry:
        raise ParseError("clients send no Retry")
    if kind == version.initial:
        cursor.skip(_varint(cursor))  # token
    length = _varint(cursor)
    protected = cursor.position
    cursor.skip(length)
    end = cursor.position
    return _Header(version, number, destination_id, kind, protected, end)


def _connection_id(cursor: Cursor) -> bytes:
    length = cursor.get_uint8()
    if length > _MAX_CONNECTION_ID:
        raise ParseError("a connection id has at most 20 bytes")
    return cursor.get_bytes(length)


def _varint(cursor: Cursor) -> int:
    """RFC 9000 section 16."""
    first = cursor.get_uint8()
    more = (1 << (first >> 6)) - 1
    if not more:
        return first
    return int.from_bytes(cursor.get_bytes(more), "big") | (first & 0x3F) << 8 * more


class _Keys(NamedTuple):
    payload: AESGCM
    iv: int
    header: Cipher[ECB]


# 15 us a time: the datagrams of one client come one after another.
@functools.lru_cache(maxsize=16)
def _keys(version: int, destination_id: bytes) -> _Keys:
    """A client's Initial keys (RFC 9001 section 5.2)."""
    # Imported here: 8 MB and 12 ms, and few configurations look into QUIC.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    known = _KNOWN[version]
    initial = hmac.digest(known.salt, destination_id, "sha256")
    secret = _expand(initial, b"client in", 32)
    return _Keys(
        AESGCM(_expand(secret, known.label + b"key", 16)),
        int.from_bytes(_expand(secret, known.label + b"iv", 12), "big"),
        # ECB of single blocks is what RFC 9001 section 5.4.3 wants; it protects no payload.
        Cipher(algorithms.AES(_expand(secret, known.label + b"hp", 16)), modes.ECB()),
    )


def _expand(secret: bytes, label: bytes, length: int) -> bytes:
    """HKDF-Expand-Label of RFC 8446 section 7.1, with an empty context."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    name = b"tls13 " + label
    info = bytes((0, length, len(name))) + name + b"\0"
    return HKDFExpand(SHA256(), length, info).derive(secret)


def _decrypt(datagram: bytes, start: int, header: _Header, keys: _Keys) -> bytes | None:
    """An Initial's payload; None: it does not decrypt.

    Raises:
        ParseError: reserved bits are set, which a server takes for an attack.
    """
    from cryptography.exceptions import InvalidTag

    at = header.protected
    # The sample stands where the payload would begin after the longest packet number.
    sample = datagram[at + 4 : at + 4 + _SAMPLE]
    if header.end - at < 4 + _SAMPLE:
        return None
    mask = keys.header.encryptor().update(sample)
    first = datagram[start] ^ mask[0] & 0x0F
    number_length = (first & 3) + 1
    payload_at = at + number_length
    # Whole: a client whose packets nobody has acknowledged leaves nothing of the number out.
    number = int.from_bytes(datagram[at:payload_at], "big") ^ int.from_bytes(
        mask[1 : 1 + number_length], "big"
    )
    associated = b"".join(
        (bytes((first,)), datagram[start + 1 : at], number.to_bytes(number_length, "big"))
    )
    nonce = (keys.iv ^ number).to_bytes(12, "big")
    try:
        payload = keys.payload.decrypt(nonce, datagram[payload_at : header.end], associated)
    except InvalidTag:
        return None
    if first & 0x0C:
        raise ParseError("reserved bits are set")
    return payload


def _read_frames(payload: bytes, pieces: list[Piece]) -> None:
    """Add what the CRYPTO frames of an Initial carry to `pieces`.

    Raises:
        ParseError: no frame, or one that no Initial has (RFC 9000 section 12.4).
    """
    if not payload:
        raise ParseError("a packet without frames")
    cursor = Cursor(payload, 0, len(payload))
    for _ in range(MOST_FRAMES):
        # Most of a payload is PADDING, and some clients strew PING in it: both are one byte.
        rest = payload[cursor.position :].lstrip(b"\x00\x01")
        if not rest:
            return
        cursor.position = len(payload) - len(rest)
        kind = cursor.get_uint8()
        if kind == _CRYPTO:
            offset = _varint(cursor)
            data = cursor.get_bytes(_varint(cursor))
            if offset + len(data) > _MAX_OFFSET:
                raise ParseError("a hello of more bytes than servers take")
            if data:
                pieces.append((offset, data))
        elif kind in (_ACK, _ACK_ECN):
            _skip_ack(cursor, has_ecn=kind == _ACK_ECN)
        elif kind == _CLOSE:
            return  # what follows does not matter any more
        else:
            raise ParseError(f"no Initial has frames of type {kind}")
    raise ParseError(f"more than {MOST_FRAMES} frames in a packet")


def _skip_ack(cursor: Cursor, *, has_ecn: bool) -> None:
    """RFC 9000 section 19.3."""
    _varint(cursor)  # largest acknowledged
    _varint(cursor)  # delay
    ranges = _varint(cursor)
    if ranges > MOST_FRAMES:
        raise ParseError("more ranges than there are packets in a beginning")
    for _ in range(1 + 2 * ranges + 3 * has_ecn):
        _varint(cursor)

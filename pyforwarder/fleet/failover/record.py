"""A spliced pair as another machine must know it to go on with it: about 200 bytes.

Two connections that are one from end to end are constants (addresses, ports, what is added to
numbers), and a few numbers that move: with those of a moment ago a machine can still tell what
belongs to the pair. Everything else follows from these.

It is read from a store that others may write, so every field has its bounds.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

SCHEMA: Final = "1"
# In the store, key and all: what a pair may cost (fleet's names of up to 40 characters).
MOST_STORED_BYTES: Final = 400
# So much of a name, in UTF-8: `show` needs no more.
MOST_NAME_BYTES: Final = 15

_HEAD: Final = struct.Struct("!BBBBBB4H4I2I3HI")
_HALF: Final = struct.Struct("!5IBQ")
_IPV6: Final = 1
_NO_ECN: Final = 2
_ANY_INTERFACE: Final = 4
_MOST_SCALE: Final = 14  # RFC 7323, 2.3
_MOST_KEEPALIVE_S: Final = 32767  # tcp(7)
_MOST_PROBES: Final = 127
_MOST_BYTES: Final = 1 << 62
_MOST_TEXT: Final = MOST_STORED_BYTES
_BASE64: Final = re.compile(r"[A-Za-z0-9_-]+")
_TAG: Final = re.compile(r"[A-Za-z0-9_-]{8}")
_MOST_CLAIM: Final = (1 << 32) - 2


class RecordFault(ValueError):
    """What stands in the store is no pair."""


class Fin(enum.IntFlag):
    """How far the end of one direction has come."""

    DUE = 1  # a FIN was seen, but perhaps bytes in front of it are missing
    SEEN = 2  # and nothing is missing
    ACKED = 4


class Endpoint(NamedTuple):
    """An address in wire order, 4 or 16 bytes, and a port."""

    ip: bytes
    port: int


class Ends(NamedTuple):
    """client -> listener is the one connection, source -> server the other."""

    client: Endpoint
    listener: Endpoint
    source: Endpoint
    server: Endpoint


class Deltas(NamedTuple):
    """What is added to the client's and the server's numbers and timestamps."""

    up_seq: int
    down_seq: int
    up_time: int
    down_time: int


@dataclass(frozen=True, slots=True)
class Half:
    """What one peer has said; numbers as it counts, but `last_ack` as the other side does."""

    last_ack: int
    last_end: int
    limit: int  # the furthest right edge of a window that it was told
    recent: int  # its latest timestamp; 0: none
    fin_seq: int
    fin: Fin
    carried_bytes: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One spliced pair."""

    ends: Ends
    deltas: Deltas  # two pairs at the same ends with the same deltas are the same pair
    scales: tuple[int, int, int, int]  # client's windows: left, right; the server's
    no_ecn: bool
    any_interface: bool  # packets may come by any interface
    marks: tuple[int, int]  # SO_MARK of the sockets towards the client and the server
    keepalive: tuple[int, int, int]  # idle_s, interval_s, count; all 0: never
    started_s: int  # since 1970
    rule: bytes
    listener_name: bytes
    up: Half
    down: Half

    @property
    def family(self) -> int:
        """4 or 6."""
        return 6 if len(self.ends.client.ip) == 16 else 4

    @property
    def key(self) -> str:
        """What these addresses and ports are called in the store; 20 characters."""
        ends = b"".join(struct.pack("!16sH", ip, port) for ip, port in self.ends)
        digest = hashlib.blake2b(ends, digest_size=15).digest()
        return base64.urlsafe_b64encode(digest).decode()

    def encode(self) -> str:
        """The text that `decode` reads."""
        bits = _IPV6 * (self.family == 6) | _NO_ECN * self.no_ecn
        bits |= _ANY_INTERFACE * self.any_interface
        data = _HEAD.pack(
            bits,
            *self.scales,
            len(self.rule),
            *(port for _, port in self.ends),
            *self.deltas,
            *self.marks,
            *self.keepalive,
            self.started_s,
        )
        for half in (self.up, self.down):
            data += _HALF.pack(
                half.last_ack,
                half.last_end,
                half.limit,
                half.recent,
                half.fin_seq,
                half.fin,
                half.carried_bytes,
            )
        data += b"".join(ip for ip, _ in self.ends) + self.rule + self.listener_name
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Pair:
        """What `encode` has written.

        Raises:
            RecordFault: it is none, or cannot be.
        """
        if len(text) > _MOST_TEXT:
            raise RecordFault("too long")
        if not _BASE64.fullmatch(text):
            raise RecordFault("no base64")
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise RecordFault("no base64") from error
        try:
            head = _HEAD.unpack_from(data)
            up = _half(_HALF.unpack_from(data, _HEAD.size))
            down = _half(_HALF.unpack_from(data, _HEAD.size + _HALF.size))
        except struct.error as error:
            raise RecordFault("too short") from error
        bits, rule_bytes = head[0], head[5]
        if bits & ~(_IPV6 | _NO_ECN | _ANY_INTERFACE):
            raise RecordFault("bits of a later version")
        ip_bytes = 16 if bits & _IPV6 else 4
        at = _HEAD.size + 2 * _HALF.size
        names = data[at + 4 * ip_bytes :]
        if len(data) < at + 4 * ip_bytes or len(names) < rule_bytes:
            raise RecordFault("too short")
        ips = [data[at + n * ip_bytes : at + (n + 1) * ip_bytes] for n in range(4)]
        pair = cls(
            Ends(*map(Endpoint, ips, head[6:10])),
            Deltas(*head[10:14]),
            scales=head[1:5],
            no_ecn=bool(bits & _NO_ECN),
            any_interface=bool(bits & _ANY_INTERFACE),
            marks=head[14:16],
            keepalive=head[16:19],
            started_s=head[19],
            rule=names[:rule_bytes],
            listener_name=names[rule_bytes:],
            up=up,
            down=down,
        )
        pair._check()
        return pair

    def _check(self) -> None:
        """Raise RecordFault for what no keeper would write."""
        if not all(port for _, port in self.ends):
            raise RecordFault("port 0")
        if max(self.scales) > _MOST_SCALE:
            raise RecordFault("a scale")
        idle_s, interval_s, count = self.keepalive
        is_off = self.keepalive == (0, 0, 0)
        if not is_off and not (
            0 < idle_s <= _MOST_KEEPALIVE_S
            and 0 < interval_s <= _MOST_KEEPALIVE_S
            and 0 < count <= _MOST_PROBES
        ):
            raise RecordFault("a keepalive")
        for name in (self.rule, self.listener_name):
            if len(name) > MOST_NAME_BYTES or any(c < 0x20 or c == 0x7F for c in name):
                raise RecordFault("a name")


def _half(fields: tuple[int, ...]) -> Half:
    last_ack, last_end, limit, recent, fin_seq, fin, carried_bytes = fields
    if fin > int(Fin.DUE | Fin.SEEN | Fin.ACKED) or carried_bytes > _MOST_BYTES:
        raise RecordFault("a direction")
    if (fin & Fin.ACKED and not fin & Fin.SEEN) or (fin & Fin.SEEN and not fin & Fin.DUE):
        raise RecordFault("an end without a beginning")
    return Half(last_ack, last_end, limit, recent, fin_seq, Fin(fin), carried_bytes)


def tag_of(instance: str) -> str:
    """What a machine is called in entries: 8 characters."""
    digest = hashlib.blake2b(instance.encode(), digest_size=6).digest()
    return base64.urlsafe_b64encode(digest).decode()


class Entry(NamedTuple):
    """What stands at a pair's key: whose it is, by which claim, and the pair.

    Who takes a pair over claims it with the next number, so that the one before releases it.
    """

    owner: str  # a tag
    claim: int
    data: str  # `Pair.encode`

    def encode(self) -> str:
        """The text that `decode` reads."""
        return f"{SCHEMA} {self.owner} {self.claim} {self.data}"

    @classmethod
    def decode(cls, key: str, text: bytes | str) -> tuple[Entry, Pair]:
        """What `encode` has written, at this key.

        Raises:
            RecordFault: it is none, or belongs elsewhere.
        """
        if len(text) > _MOST_TEXT:
            raise RecordFault("too long")
        if isinstance(text, bytes):
            try:
                text = text.decode("ascii")
            except UnicodeDecodeError as error:
                raise RecordFault("no ASCII") from error
        words = text.split(" ")
        if len(words) != 4 or words[0] != SCHEMA:
            raise RecordFault("of another version")
        _, owner, claim, data = words
        if not _TAG.fullmatch(owner) or not re.fullmatch("[1-9][0-9]{0,9}", claim, re.ASCII):
            raise RecordFault("no owner, or no claim")
        if int(claim) > _MOST_CLAIM:
            raise RecordFault("a claim")
        pair = Pair.decode(data)
        if pair.key != key:
            raise RecordFault("at another pair's key")
        return cls(owner, int(claim), data), pair

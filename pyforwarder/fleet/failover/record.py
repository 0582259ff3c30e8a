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
_NUMBERS: Final = "4I2I3HI5IBQ5IBQ"  # deltas to `started_s`, and both halves
_DELTAS: Final = slice(14, 30)
_RULE_BYTES: Final = slice(5, 6)
_STARTED: Final = slice(_HEAD.size - 4, _HEAD.size)
_UP_BYTES: Final = slice(_HEAD.size + _HALF.size - 8, _HEAD.size + _HALF.size)
_DOWN_BYTES: Final = slice(_UP_BYTES.start + _HALF.size, _UP_BYTES.stop + _HALF.size)
_UP_END: Final = slice(_HEAD.size + 16, _HEAD.size + 21)
_DOWN_END: Final = slice(_UP_END.start + _HALF.size, _UP_END.stop + _HALF.size)
_ENDS: Final = struct.Struct("!16s2s16s2s16s2s16s2s")
_NO_NAME: Final = hashlib.blake2b(digest_size=15)
IPV6: Final = 1
NO_ECN: Final = 2
ANY_INTERFACE: Final = 4
_MOST_SCALE: Final = 14  # RFC 7323, 2.3
_MOST_KEEPALIVE_S: Final = 32767  # tcp(7)
_MOST_PROBES: Final = 127
_MOST_BYTES: Final = 1 << 62
_MOST_TEXT: Final = MOST_STORED_BYTES
_BASE64: Final = re.compile(r"[A-Za-z0-9_-]+")
_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")
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
        ip_ports = (part for ip, port in self.ends for part in (ip, port.to_bytes(2, "big")))
        return key_of(*ip_ports)

    def pack(self) -> bytes:
        """The bytes that `unpack` reads."""
        bits = IPV6 * (self.family == 6) | NO_ECN * self.no_ecn
        bits |= ANY_INTERFACE * self.any_interface
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
        return data + b"".join(ip for ip, _ in self.ends) + self.rule + self.listener_name

    def encode(self) -> str:
        """The text that `decode` reads."""
        return text_of(self.pack())

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
        return cls.unpack(data)

    @classmethod
    def unpack(cls, data: bytes) -> Pair:
        """What `pack` has written.

        Raises:
            RecordFault: it is none, or cannot be.
        """
        try:
            head = _HEAD.unpack_from(data)
            up = _half(_HALF.unpack_from(data, _HEAD.size))
            down = _half(_HALF.unpack_from(data, _HEAD.size + _HALF.size))
        except struct.error as error:
            raise RecordFault("too short") from error
        bits, rule_bytes = head[0], head[5]
        if bits & ~(IPV6 | NO_ECN | ANY_INTERFACE):
            raise RecordFault("bits of a later version")
        ip_bytes = 16 if bits & IPV6 else 4
        at = _HEAD.size + 2 * _HALF.size
        names = data[at + 4 * ip_bytes :]
        if len(data) < at + 4 * ip_bytes or len(names) < rule_bytes:
            raise RecordFault("too short")
        ips = [data[at + n * ip_bytes : at + (n + 1) * ip_bytes] for n in range(4)]
        pair = cls(
            Ends(*map(Endpoint, ips, head[6:10])),
            Deltas(*head[10:14]),
            scales=head[1:5],
            no_ecn=bool(bits & NO_ECN),
            any_interface=bool(bits & ANY_INTERFACE),
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


def key_of(*ip_ports: bytes) -> str:
    """What these addresses and ports are called in the store; in turns, in the order of `Ends`,
    in wire order.
    """
    name = _NO_NAME.copy()
    name.update(_ENDS.pack(*ip_ports))
    return binascii.b2a_base64(name.digest(), newline=False).translate(_URL_SAFE).decode()


def text_of(packed: bytes) -> str:
    """`Pair.encode` of what `Pair.pack` has written."""
    text = binascii.b2a_base64(packed, newline=False).translate(_URL_SAFE)
    return text.rstrip(b"=").decode()


# What `pack` writes of a pair at once: a machine makes thousands of them in a second.
PACKED: Final = {
    4: struct.Struct(f"!6B2s2s2s2s{_NUMBERS}4s4s4s4s"),
    6: struct.Struct(f"!6B2s2s2s2s{_NUMBERS}16s16s16s16s"),
}


def has_names(packed: bytes) -> bool:
    """Whether a pair says by which listener it came."""
    return len(packed) > PACKED[6 if packed[0] & IPV6 else 4].size + packed[5]


def with_names_of(known: bytes, packed: bytes) -> bytes:
    """A pair with the names, the beginning and the counts of bytes that were told of it before.

    Another pair at the same ends has its own.
    """
    end = PACKED[6 if packed[0] & IPV6 else 4].size
    if packed[_DELTAS] != known[_DELTAS] or (packed[0] ^ known[0]) & IPV6:
        return packed
    mixed = bytearray(packed[:end])
    for part in (_RULE_BYTES, _STARTED, _UP_BYTES, _DOWN_BYTES):
        mixed[part] = known[part]
    return bytes(mixed) + known[end:]


def told_at_once(packed: bytes) -> tuple[bytes, bytes, bytes, bool]:
    """What of a pair is told to others as soon as it changes: its deltas, and how far its ends have
    come.
    """
    # A pair of express is known before its worker says of which listener it is.
    return packed[_DELTAS], packed[_UP_END], packed[_DOWN_END], has_names(packed)


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

r"""Signed instructions: parse, verify, make.

    FWD1 DEST exp=UNIX_SECONDS key=KEY_ID [from=CIDR] [aud=GATEWAY] [nonce=WORD] sig=BASE64URL\r\n

The signature is HMAC-SHA256 over everything before ` sig=`.  The fields come in this order, one
blank between them; the whole has at most 512 bytes.  A nonce makes two of them differ that are for
the same destination and end in the same second, so that each is good once.

Pure: keys and the time are passed in.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import hmac
import ipaddress
import re
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

from pyforwarder.core.address import (
    Address,
    AddressError,
    HostPort,
    network_text,
    parse_destination,
)
from pyforwarder.core.first_packet.cursor import ParseError
from pyforwarder.core.first_packet.outcome import NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_LENGTH: Final = 512
MAGIC: Final = b"FWD1 "
# RFC 2104 section 3: a key shorter than the hash's output weakens it; 16 bytes is the least that
# cannot be guessed, and what `openssl rand 16` gives.
MIN_KEY_LENGTH: Final = 16

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_LINE = re.compile(
    rb"(FWD1 (?P<dest>[!-~]+) exp=(?P<exp>[0-9]{1,12}) key=(?P<key>[A-Za-z0-9._-]{1,63})"
    rb"(?: from=(?P<from>[0-9A-Fa-f.:/]{2,49}))?(?: aud=(?P<aud>[A-Za-z0-9._-]{1,63}))?"
    rb"(?: nonce=[A-Za-z0-9._-]{1,63})?)"
    rb" sig=(?P<sig>[A-Za-z0-9_-]{43})=?"
)
_PRINTABLE = re.compile(rb"[ -~]*\r?")
_NOT_THE_FIELDS = (
    "the fields are not DEST exp= key= [from=] [aud=] [nonce=] sig= in printable ASCII"
)
_WORD = re.compile(r"[A-Za-z0-9._-]{1,63}")


class SignedInstruction(NamedTuple):
    """One that is well formed; nothing about it is proven before `TokenKeys.refusal`."""

    destination: Address | HostPort
    expires_unix_s: int
    key_id: str
    source: _Network | None  # the clients it is good for; None: all
    audience: str | None  # the gateway it is good for; None: all that have its key
    signed: bytes
    signature: bytes  # base64url without padding
    length: int  # bytes of the whole line, \r\n included


def read(
    data: bytes,
) -> SignedInstruction | Literal[Outcome.NEED_MORE, Outcome.NO_MATCH]:
    """The signed instruction at the beginning of `data`.

    Raises:
        ParseError: it begins like one and then breaks.
    """
    if not data.startswith(MAGIC):
        return NEED_MORE if MAGIC.startswith(data) else NO_MATCH
    stop = data.find(b"\r\n", 0, MAX_LENGTH)
    # The first byte that is wrong settles what is wrong: more of them change nothing.
    if stop < 0:
        if not _PRINTABLE.fullmatch(data, 0, MAX_LENGTH):
            raise ParseError(_NOT_THE_FIELDS)
        if len(data) >= MAX_LENGTH:
            raise ParseError(f"no end within {MAX_LENGTH} bytes")
        return NEED_MORE
    fields = _LINE.fullmatch(data, 0, stop)
    if not fields:
        raise ParseError(_NOT_THE_FIELDS)
    try:
        destination = parse_destination(fields["dest"].decode("ascii"))
        source = ipaddress.ip_network(fields["from"].decode("ascii")) if fields["from"] else None
    except AddressError as error:
        raise ParseError(str(error)) from error
    except ValueError as error:
        raise ParseError("from= is not a network, or has bits set behind its prefix") from error
    return SignedInstruction(
        destination=destination,
        expires_unix_s=int(fields["exp"]),
        key_id=fields["key"].decode("ascii"),
        source=source,
        audience=fields["aud"].decode("ascii") if fields["aud"] else None,
        signed=fields[1],
        signature=fields["sig"],
        length=stop + 2,
    )


def make(
    destination: Address | HostPort,
    *,
    expires_unix_s: int,
    key_id: str,
    key: bytes,
    source: _Network | None = None,
    audience: str | None = None,
    nonce: str | None = None,
) -> bytes:
    """A signed instruction, ready to send; `audience` is the name of the only gateway to take it.

    `nonce` is a word that no other instruction has: where they are good once, two that are the same
    are one.  Gateways of version 0.1 take none that has one.

    Raises:
        ValueError: the key id, the gateway or the nonce has other characters than letters, digits
            and `._-`, the time is negative, or the whole is longer than 512 bytes.
    """
    if not _WORD.fullmatch(key_id):
        raise ValueError(f"{key_id!r} is no key id: 1 to 63 letters, digits, dots, - and _")
    if audience is not None:
        parse_audience(audience)
    if nonce is not None and not _WORD.fullmatch(nonce):
        raise ValueError(f"{nonce!r} is no nonce: 1 to 63 letters, digits, dots, - and _")
    if not 0 <= expires_unix_s < 10**12:
        raise ValueError(f"{expires_unix_s} is no time in seconds since 1970")
    text = f"FWD1 {destination} exp={expires_unix_s} key={key_id}"
    if source is not None:
        text += f" from={network_text(source)}"
    if audience is not None:
        text += f" aud={audience}"
    if nonce is not None:
        text += f" nonce={nonce}"
    signed = text.encode("ascii")
    line = signed + b" sig=" + _sign(signed, key) + b"\r\n"
    if len(line) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} bytes")
    return line


def parse_audience(text: str) -> str:
    """A gateway's name as instructions carry it.

    Raises:
        ValueError: it has other characters, or too many.
    """
    if not _WORD.fullmatch(text):
        raise ValueError(f"{text!r} is no gateway's name: 1 to 63 letters, digits, dots, - and _")
    return text


def key_from_file(content: bytes) -> bytes:
    """The key in a key file: its bytes without one final newline.

    Raises:
        ValueError: it is shorter than 16 bytes and could be guessed.
    """
    key = content.removesuffix(b"\n")
    if len(key) < MIN_KEY_LENGTH:
        raise ValueError(f"a key needs at least {MIN_KEY_LENGTH} bytes, this one has {len(key)}")
    return key


def _sign(signed: bytes, key: bytes) -> bytes:
    return base64.urlsafe_b64encode(hmac.digest(key, signed, hashlib.sha256)).rstrip(b"=")


class TokenMemory(Protocol):
    """Remembers signatures until they expire, so that each is good for one connection."""

    def spend(self, signature: bytes, *, expires_unix_s: float, now_unix_s: float) -> bool:
        """Whether this is the first use, and there was room to remember it."""
        ...


class UsedTokens:
    """A memory for one process.

    Bounded: when `capacity` unexpired ones are known, new ones are refused.  Only who holds a key
    can fill it, and forgetting one early would make it good a second time.
    """

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._known: set[bytes] = set()
        self._by_expiry: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self._known)

    def spend(self, signature: bytes, *, expires_unix_s: float, now_unix_s: float) -> bool:
        """Whether this is the first use, and there was room to remember it."""
        while self._by_expiry and self._by_expiry[0][0] < now_unix_s:
            self._known.discard(heapq.heappop(self._by_expiry)[1])
        if signature in self._known or len(self._known) >= self._capacity:
            return False
        self._known.add(signature)
        heapq.heappush(self._by_expiry, (expires_unix_s, signature))
        return True


class FleetUse(NamedTuple):
    """How a token is used up where several machines take the same ones."""

    wait_s: float  # for their store
    accepts_unknown: bool  # whether one is good here if the store does not say


class TokenKeys:
    """The keys in force and how strictly time is taken.

    `clock_skew_s` is how long after `exp` an instruction is still good: the clock of its signer
    may be that much behind ours.  `max_lifetime_s` bounds how far ahead `exp` may be (the
    skew comes on top), so that a forgotten one does not stay good for years; None: no bound.
    `audience` is this gateway's name: an instruction that names another is refused, one that names
    none only if `audience_required`.  A gateway without a name takes none that names one.
    """

    def __init__(
        self,
        keys: Mapping[str, bytes],
        *,
        clock_skew_s: float = 0.0,
        max_lifetime_s: float | None = None,
        audience: str | None = None,
        audience_required: bool = False,
        used: TokenMemory | None = None,
        in_fleet: FleetUse | None = None,
    ) -> None:
        self._keys = dict(keys)
        self._clock_skew_s = clock_skew_s
        self._max_lifetime_s = max_lifetime_s
        self._audience = audience
        self._audience_required = audience_required
        self._used = used
        # What has been spent here must be claimed there, too; None: there is no such place.
        self.in_fleet = in_fleet if used is not None else None

    def refusal(
        self, instruction: SignedInstruction, *, client: Address | None, now_unix_s: float
    ) -> str | None:
        """Why this instruction is not good for this client now; None: it is.

        The words are for logs and `explain`; the client is told `ERR token` in every case.
        """
        key = self._keys.get(instruction.key_id)
        if key is None:
            return f"unknown key {instruction.key_id!r}"
        if not hmac.compare_digest(_sign(instruction.signed, key), instruction.signature):
            return "wrong signature"
        if now_unix_s > instruction.expires_unix_s + self._clock_skew_s:
            return "expired"
        if (
            self._max_lifetime_s is not None
            and instruction.expires_unix_s > now_unix_s + self._max_lifetime_s + self._clock_skew_s
        ):
            left_s = instruction.expires_unix_s - now_unix_s
            return (
                f"good for {left_s:.0f} s more, and tokens.max_lifetime is "
                f"{self._max_lifetime_s:g} s"
            )
        source = instruction.source
        if source is not None and (client is None or not _is_from(client, source)):
            return "wrong source address"
        if instruction.audience is None:
            return "names no gateway (aud=)" if self._audience_required else None
        if instruction.audience != self._audience:
            return f"for the gateway {instruction.audience!r}, not this one"
        return None

    def good_until_unix_s(self, instruction: SignedInstruction) -> float:
        """After this it is refused as expired."""
        return instruction.expires_unix_s + self._clock_skew_s

    def spend(self, instruction: SignedInstruction, *, now_unix_s: float) -> bool:
        """Use it up here; False: it was used before.  Always True unless keys are single use."""
        return self._used is None or self._used.spend(
            instruction.signature,
            expires_unix_s=self.good_until_unix_s(instruction),
            now_unix_s=now_unix_s,
        )


def digest_of(signature: bytes) -> bytes:
    """What a signature is known by where it is remembered: nobody can use that."""
    return hashlib.blake2b(signature, digest_size=16).digest()


def _is_from(client: Address, network: _Network) -> bool:
    ip = ipaddress.ip_address(client.host)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped  # a dual-stack listener sees IPv4 clients this way
    return ip in network

"""`instruction`: the client says where it wants to go, and is told whether it got there.

    LEN(2) DEST CHECK(2)          e.g.   18127.0.0.1:900102

LEN counts the whole, LEN and CHECK included; CHECK is the sum of all bytes before it modulo
100.  The answer has the same frame: `06OK56`, or `ERR ` and a code.  A rule with `token` takes the
signed form of it, too, with the same answers:

    FWD1 DEST exp=UNIX_SECONDS key=KEY_ID [from=CIDR] [aud=GATEWAY] [nonce=WORD] sig=BASE64URL\\r\\n
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Final, Literal

from pyforwarder.core import token
from pyforwarder.core.address import AddressError, parse_destination
from pyforwarder.core.first_packet.cursor import ParseError
from pyforwarder.core.first_packet.matcher import Conversation, Speaker
from pyforwarder.core.first_packet.outcome import (
    MATCH,
    NEED_MORE,
    NO_MATCH,
    Answer,
    Claim,
    End,
    Facts,
    Outcome,
    Refuse,
    Route,
    Rule,
)
from pyforwarder.core.reasons import CloseReason, RefusalCode

if TYPE_CHECKING:
    from pyforwarder.core.address import Address

MIN_LENGTH: Final = 6
MAX_LENGTH: Final = 99
# Of 150 to 350 bytes each; a client that cycles through more only makes us read again.
MOST_KNOWN: Final = 4096
_Undecided = Literal[Outcome.NEED_MORE, Outcome.NO_MATCH]
_UNCHECKED: Final = b"00"

_LENGTHS: Final = {b"%02d" % length: length for length in range(MIN_LENGTH, MAX_LENGTH + 1)}
# The first digits an instruction may have: 0 for 06 to 09, then all the others.
_DIGITS: Final = frozenset(b"%d" % digit for digit in range(10))
_CHECKS: Final = tuple(b"%02d" % check for check in range(100))
# Letters, digits and punctuation of ip:port, [ip6]:port, name:port: what has another byte is
# broken before it is whole.
_DESTINATION: Final = re.compile(rb"[A-Za-z0-9._:\[\]-]*")


def frame(content: bytes) -> bytes:
    """`content` with its length before it and its check after it: `OK` gives `06OK56`.

    Raises:
        ValueError: the content is empty or longer than 95 bytes.
    """
    length = len(content) + 4
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise ValueError(f"a frame of {length} bytes cannot be written")
    body = b"%02d%b" % (length, content)
    return body + _CHECKS[sum(body) % 100]


OK: Final = frame(b"OK")
ERRORS: Final = {code: frame(b"ERR " + code.value.encode()) for code in RefusalCode}


_BREAKS_OFF: Final = "an instruction that breaks off"


class TokenUse(enum.Enum):
    """Which form of instruction a rule takes."""

    OFF = "off"  # unsigned only
    OPTIONAL = "optional"
    REQUIRED = "required"  # signed only


class Acknowledged:
    """Tells the client in instruction frames."""

    tells_source = False

    def granted(self, source: Address | None) -> bytes:
        return OK

    def refused(self, code: RefusalCode) -> bytes:
        return ERRORS[code]


class Instruction(Speaker):
    """Matches what is an instruction, and what begins like one and then breaks.

    `keys` is needed unless `tokens` is OFF.
    """

    def __init__(
        self,
        *,
        checksum_required: bool = False,
        tokens: TokenUse = TokenUse.OFF,
        keys: token.TokenKeys | None = None,
        acknowledged: bool = True,
    ) -> None:
        self._checksum_required = checksum_required
        self._tokens = tokens
        self._keys = keys or token.TokenKeys({})
        self._acknowledged = acknowledged
        self._negotiation = Acknowledged() if acknowledged else None
        # Instructions that were read before. They come again and again, and what one says depends
        # on its own bytes alone; names are not resolved here.
        self._known: dict[bytes, Route] = {}

    @property
    def needs_clock(self) -> bool:
        """Whether `answer` has to be told the time."""
        return self._tokens is not TokenUse.OFF

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        if data[:1] == b"F" and self._tokens is not TokenUse.OFF:
            try:
                signed = token.read(data)
            except ParseError:
                return MATCH
            return signed if isinstance(signed, Outcome) else MATCH
        length = _LENGTHS.get(data[:2])
        if length is None:
            return self._begins(data)
        if len(data) >= length or _is_broken(data, length):
            return MATCH
        return NEED_MORE

    def answer(
        self,
        rule: Rule,
        data: bytes,
        client: Address | None,
        now_unix_s: float | None,
        conversation: Conversation | None,
    ) -> Answer:
        length = _LENGTHS.get(data[:2])
        if length is None:
            if data[:1] == b"F" and self._tokens is not TokenUse.OFF:
                return self._answer_signed(rule, data, client, now_unix_s)
            return self._begins(data)
        if len(data) < length:
            return self._malformed(rule, _BREAKS_OFF) if _is_broken(data, length) else NEED_MORE
        known = self._known.get(data[:length])
        if known is not None and known.rule is rule:
            return known
        answer = self._read(rule, data[:length])
        if isinstance(answer, Route):
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[data[:length]] = answer
        return answer

    def _read(self, rule: Rule, data: bytes) -> Route | Refuse:
        """What a whole instruction says."""
        length = len(data)
        if _is_broken(data, length):
            return self._malformed(rule, _BREAKS_OFF)  # as when fewer of its bytes were there
        body = data[: length - 2]
        check = data[length - 2 : length]
        # Lenient takes 00 for "not checked"; a sum that really is 00 is right either way.
        wanted = _CHECKS[sum(body) % 100]
        if (check != _UNCHECKED or self._checksum_required) and check != wanted:
            said = f"the check is {check.decode('latin-1')!r}, not {wanted.decode()!r}"
            return self._malformed(rule, said)
        try:
            destination = parse_destination(body[2:].decode("ascii"))
        except (AddressError, UnicodeDecodeError) as error:
            return self._malformed(rule, str(error))
        if self._tokens is TokenUse.REQUIRED:
            return self._wrong_token(rule, "not signed")
        return Route(rule, destination, length, self._negotiation, True)

    def cut_short(self, end: End) -> bytes:
        if not self._acknowledged:
            return b""
        return ERRORS[RefusalCode.TIMEOUT if end is End.TIMEOUT else RefusalCode.MALFORMED]

    def describe(self, data: bytes) -> str:
        if data.startswith(token.MAGIC) and self._tokens is not TokenUse.OFF:
            return "a signed instruction"
        length = _LENGTHS.get(data[:2])
        if length is None:
            return ""
        if _is_broken(data[:length], length):
            return f"begins like an instruction of {length} bytes and then breaks"
        return f"an instruction of {length} bytes"

    def _begins(self, data: bytes) -> _Undecided:
        """The outcome for bytes that do not have both digits of a length."""
        if len(data) >= 2:
            return NO_MATCH
        if not data or data in _DIGITS:
            return NEED_MORE
        return NO_MATCH

    def _malformed(self, rule: Rule, cause: str) -> Refuse:
        reply = ERRORS[RefusalCode.MALFORMED] if self._acknowledged else b""
        return Refuse(rule, CloseReason.MALFORMED, reply, reset=False, cause=cause)

    def _wrong_token(self, rule: Rule, cause: str, facts: Facts = ()) -> Refuse:
        reply = ERRORS[RefusalCode.TOKEN] if self._acknowledged else b""
        return Refuse(rule, CloseReason.TOKEN, reply, False, f"token: {cause}", facts)

    def _answer_signed(
        self, rule: Rule, data: bytes, client: Address | None, now_unix_s: float | None
    ) -> Answer:
        try:
            signed = token.read(data)
        except ParseError as error:
            return self._malformed(rule, str(error))
        if isinstance(signed, Outcome):
            return signed
        facts = (("key", signed.key_id), ("asked", str(signed.destination)))
        if now_unix_s is None:
            # Without a clock nothing can be known to be in force: deny.
            return self._wrong_token(rule, "the time is not known", facts)
        why = self._keys.refusal(signed, client=client, now_unix_s=now_unix_s)
        if why is not None:
            return self._wrong_token(rule, why, facts)
        if not self._keys.spend(signed, now_unix_s=now_unix_s):
            return self._wrong_token(
                rule, "used already (tokens.single_use), or no room to remember it", facts
            )
        route = Route(rule, signed.destination, signed.length, self._negotiation, True, facts[:1])
        in_fleet = self._keys.in_fleet
        if in_fleet is None:
            return route
        accepts_unknown = in_fleet.accepts_unknown

        def then(is_first: bool | None) -> Route | Refuse:
            if is_first or (is_first is None and accepts_unknown):
                return route
            why = "used already at another machine of the fleet"
            if is_first is None:
                why = "the fleet's store does not say whether it was used (fleet.tokens)"
            return self._wrong_token(rule, why, facts)

        until_unix_s = self._keys.good_until_unix_s(signed)
        return Claim(token.digest_of(signed.signature), until_unix_s, in_fleet.wait_s, then)


def _is_broken(data: bytes, length: int) -> bool:
    """Whether no bytes can complete this beginning of an instruction of `length` bytes."""
    checked = data[length - 2 :]
    return bool(
        not _DESTINATION.fullmatch(data, 2, length - 2) or (checked and not checked.isdigit())
    )

"""`instruction`: the client says where it wants to go, and is told whether it got there.

    LEN(2) DEST CHECK(2)          e.g.   18127.0.0.1:900102

LEN counts the whole, LEN and CHECK included; CHECK is the sum of all bytes before it modulo
100.  The answer has the same frame: `06OK56`, or `ERR ` and a code.  A rule may also take the
signed form of token.py, with the same answers.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Final, Literal

from pyforwarder import token
from pyforwarder.address import AddressError, parse_destination
from pyforwarder.first_packet.cursor import ParseError
from pyforwarder.first_packet.matcher import Conversation, Speaker
from pyforwarder.first_packet.outcome import (
    MATCH,
    NEED_MORE,
    NO_MATCH,
    Answer,
    End,
    Outcome,
    Refuse,
    Route,
    Rule,
)
from pyforwarder.reasons import CloseReason, RefusalCode

if TYPE_CHECKING:
    from pyforwarder.address import Address

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
            if _is_broken(data, length):
                return self._refuse(rule, CloseReason.MALFORMED, RefusalCode.MALFORMED)
            return NEED_MORE
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
        body = data[: length - 2]
        check = data[length - 2 : length]
        # Lenient takes 00 for "not checked"; a sum that really is 00 is right either way.
        if (check != _UNCHECKED or self._checksum_required) and check != _CHECKS[sum(body) % 100]:
            return self._refuse(rule, CloseReason.MALFORMED, RefusalCode.MALFORMED)
        try:
            destination = parse_destination(body[2:].decode("ascii"))
        except (AddressError, UnicodeDecodeError):
            return self._refuse(rule, CloseReason.MALFORMED, RefusalCode.MALFORMED)
        if self._tokens is TokenUse.REQUIRED:
            return self._refuse(rule, CloseReason.TOKEN, RefusalCode.TOKEN)
        return Route(rule, destination, length, self._negotiation, True)

    def cut_short(self, end: End) -> bytes:
        if not self._acknowledged:
            return b""
        return ERRORS[RefusalCode.TIMEOUT if end is End.TIMEOUT else RefusalCode.MALFORMED]

    def found(self, data: bytes) -> str:
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

    def _refuse(self, rule: Rule, reason: CloseReason, code: RefusalCode) -> Refuse:
        return Refuse(rule, reason, ERRORS[code] if self._acknowledged else b"", reset=False)

    def _answer_signed(
        self, rule: Rule, data: bytes, client: Address | None, now_unix_s: float | None
    ) -> Answer:
        try:
            signed = token.read(data)
        except ParseError:
            return self._refuse(rule, CloseReason.MALFORMED, RefusalCode.MALFORMED)
        if isinstance(signed, Outcome):
            return signed
        # Without a clock nothing can be known to be in force: deny.
        if (
            now_unix_s is None
            or self._keys.refusal(signed, client=client, now_unix_s=now_unix_s)
            or not self._keys.spend(signed, now_unix_s=now_unix_s)
        ):
            return self._refuse(rule, CloseReason.TOKEN, RefusalCode.TOKEN)
        return Route(rule, signed.destination, signed.length, self._negotiation, True)


def _is_broken(data: bytes, length: int) -> bool:
    """Whether no bytes can complete this beginning of an instruction of `length` bytes."""
    checked = data[length - 2 :]
    return bool(
        not _DESTINATION.fullmatch(data, 2, length - 2) or (checked and not checked.isdigit())
    )

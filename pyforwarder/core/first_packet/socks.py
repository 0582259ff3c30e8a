"""`socks`: SOCKS 4, 4a and 5; the client names the destination.

    socks: {version: ["5"]}

Only CONNECT.  A rule with `users` asks SOCKS 5 clients for a name and a password and refuses SOCKS
4, which has none.

Source: RFC 1928, RFC 1929 (user name and password), the SOCKS 4 and 4A memos of Ying-Da Lee.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import AddressError, ip_text, parse_destination
from pyforwarder.core.first_packet.credentials import TOO_MANY_PASSWORDS
from pyforwarder.core.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.core.first_packet.matcher import Conversation, Speaker, Turn
from pyforwarder.core.first_packet.options import OptionError, Options
from pyforwarder.core.first_packet.outcome import (
    MATCH,
    NEED_MORE,
    NO_MATCH,
    Answer,
    Decision,
    End,
    Facts,
    Outcome,
    Refuse,
    Route,
    Rule,
    Send,
)
from pyforwarder.core.reasons import CloseReason, RefusalCode

if TYPE_CHECKING:
    from pyforwarder.core.address import Address, HostPort
    from pyforwarder.core.first_packet.credentials import Users

_CONNECT: Final = 1
_BIND: Final = 2

_NO_AUTHENTICATION: Final = 0
_USER_AND_PASSWORD: Final = 2
_NO_METHOD: Final = b"\x05\xff"
_WRONG_PASSWORD: Final = b"\x01\x01"

_IPV4: Final = 1
_NAME: Final = 3
_IPV6: Final = 4

_REPLIES_5: Final = {
    RefusalCode.MALFORMED: 1,
    RefusalCode.BUSY: 1,
    RefusalCode.DENIED: 2,
    RefusalCode.TOKEN: 2,
    RefusalCode.UNREACHABLE: 4,
    RefusalCode.UNRESOLVED: 4,
    RefusalCode.TIMEOUT: 4,  # not 6, "TTL expired": clients show it as a routing loop
    RefusalCode.REFUSED: 5,
}
_COMMAND_NOT_SUPPORTED: Final = 7
_ADDRESS_TYPE_NOT_SUPPORTED: Final = 8

# The memos give no bound; longer than any name that can be resolved.
_MAX_TEXT_4: Final = 255


_OTHER_COMMAND: Final = "only CONNECT is served"


def _reply_4(code: int) -> bytes:
    return bytes([0, code]) + bytes(6)


_REJECTED_4: Final = _reply_4(91)
_WRONG_USER_4: Final = _reply_4(93)


def _reply_5(code: int, source: Address | None = None) -> bytes:
    if source is None:
        return bytes([5, code, 0, _IPV4]) + bytes(6)
    ip = ipaddress.ip_address(source.host)
    kind = _IPV4 if ip.version == 4 else _IPV6
    return bytes([5, code, 0, kind]) + ip.packed + source.port.to_bytes(2, "big")


class Negotiation4:
    """Tells the client in SOCKS 4 replies."""

    tells_source = False

    def granted(self, source: Address | None) -> bytes:
        # The address in the reply means something after BIND only.
        return _reply_4(90)

    def refused(self, code: RefusalCode) -> bytes:
        return _REJECTED_4


class Negotiation5:
    """Tells the client in SOCKS 5 replies."""

    tells_source = True

    def granted(self, source: Address | None) -> bytes:
        return _reply_5(0, source)

    def refused(self, code: RefusalCode) -> bytes:
        return _reply_5(_REPLIES_5[code])


_NEGOTIATION_4: Final = Negotiation4()
_NEGOTIATION_5: Final = Negotiation5()


class Socks(Speaker):
    """Matches a whole SOCKS 4 request, or the greeting of SOCKS 5."""

    def __init__(
        self, *, versions: frozenset[int] = frozenset({4, 5}), users: Users | None = None
    ) -> None:
        self._versions = versions
        self._users = users
        self.converses = 5 in versions

    @classmethod
    def from_options(cls, options: Options, users: Users | None) -> Socks:
        """The matcher for what stands after `socks:`.

        Raises:
            OptionError: an unknown option or version.
        """
        versions = options.texts("version") or ("4", "5")
        options.finish()
        for version in versions:
            if version not in ("4", "5"):
                raise OptionError(f"{version!r} is not one of 4, 5", "version")
        return cls(versions=frozenset(int(version) for version in versions), users=users)

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        if not data:
            return NEED_MORE
        if data[0] not in self._versions:
            return NO_MATCH
        try:
            if data[0] == 4:
                _read_request_4(data)
            else:
                _read_greeting(data)
        except Truncated:
            return NEED_MORE
        except ParseError:
            # What begins like SOCKS 4 and then breaks is SOCKS 4 all the same, and told so.
            return MATCH if _is_request_4(data) else NO_MATCH
        return MATCH

    def answer(
        self,
        rule: Rule,
        data: bytes,
        client: Address | None,
        now_unix_s: float | None,
        conversation: Conversation | None,
    ) -> Answer:
        outcome = self.match(data, End.OPEN, client, 0)
        if outcome is not MATCH:
            return outcome
        if data[0] == 4:
            return self._answer_4(rule, data)
        methods, length = _read_greeting(data)
        method = _NO_AUTHENTICATION if self._users is None else _USER_AND_PASSWORD
        if method not in methods:
            wanted = "no" if self._users is None else "a"
            cause = f"the client offers no method with {wanted} password"
            return Refuse(rule, CloseReason.DENIED, _NO_METHOD, False, cause)
        assert conversation is not None, "rules that converse need Ruleset.begin()"
        conversation.rule = rule
        conversation.turn = (
            _AwaitRequest(rule) if self._users is None else _AwaitPassword(rule, self._users)
        )
        return Send(bytes([5, method]), length)

    def describe(self, data: bytes) -> str:
        return f"SOCKS {data[0]}" if data[:1] in (b"\x04", b"\x05") else ""

    def _answer_4(self, rule: Rule, data: bytes) -> Answer:
        try:
            command, destination, length = _read_request_4(data)
        except ParseError as error:
            return Refuse(rule, CloseReason.MALFORMED, _REJECTED_4, False, str(error))
        if command != _CONNECT:
            return Refuse(rule, CloseReason.DENIED, _REJECTED_4, False, _OTHER_COMMAND)
        if self._users is not None:
            cause = "SOCKS 4 has no password"
            return Refuse(rule, CloseReason.DENIED, _WRONG_USER_4, False, cause)
        return Route(rule, destination, length, _NEGOTIATION_4, named_by_client=True)


class _AwaitPassword(Turn):
    """RFC 1929: the client says who it is."""

    def __init__(self, rule: Rule, users: Users) -> None:
        self._rule = rule
        self._users = users

    def decide(self, data: bytes, conversation: Conversation) -> Decision:
        cursor = Cursor(data)
        try:
            if cursor.get_uint8() != 1:
                cause = "not a password as RFC 1929 has it"
                return Refuse(self._rule, CloseReason.MALFORMED, _WRONG_PASSWORD, False, cause)
            name = cursor.get_bytes(cursor.get_uint8())
            password = cursor.get_bytes(cursor.get_uint8())
        except Truncated:
            return NEED_MORE
        facts = (("user", name.decode("latin-1")),)
        rule, cause = self._rule, "wrong user or password"

        def right() -> Decision:
            conversation.turn = _AwaitRequest(rule, facts)
            return Send(b"\x01\x00", cursor.position)

        return self._users.decide(
            name,
            password,
            right=right,
            wrong=Refuse(rule, CloseReason.DENIED, _WRONG_PASSWORD, False, cause, facts),
            busy=Refuse(rule, CloseReason.BUSY, _WRONG_PASSWORD, False, TOO_MANY_PASSWORDS, facts),
        )


class _AwaitRequest(Turn):
    """RFC 1928 section 4: the client says where it wants to go."""

    def __init__(self, rule: Rule, facts: Facts = ()) -> None:
        self._rule = rule
        self._facts = facts

    def decide(self, data: bytes, conversation: Conversation) -> Decision:
        cursor = Cursor(data)
        try:
            version = cursor.get_uint8()
            command = cursor.get_uint8()
            cursor.skip(1)  # reserved
            kind = cursor.get_uint8()
            if version != 5:
                return self._refuse(1, "not a request of SOCKS 5")
            if kind == _IPV4:
                host = ip_text(ipaddress.IPv4Address(cursor.get_bytes(4)))
            elif kind == _IPV6:
                host = ip_text(ipaddress.IPv6Address(cursor.get_bytes(16)))
            elif kind == _NAME:
                host = cursor.get_bytes(cursor.get_uint8()).decode("latin-1")
            else:
                return self._refuse(_ADDRESS_TYPE_NOT_SUPPORTED, f"address type {kind}")
            port = cursor.get_uint16()
        except Truncated:
            return NEED_MORE
        # After the whole request, so that nothing unread turns our reply into a reset.
        if command != _CONNECT:
            return self._refuse(_COMMAND_NOT_SUPPORTED, _OTHER_COMMAND)
        try:
            destination = _destination(host, port)
        except AddressError as error:
            return self._refuse(1, str(error))
        return Route(self._rule, destination, cursor.position, _NEGOTIATION_5, True, self._facts)

    def _refuse(self, code: int, cause: str) -> Refuse:
        reply = _reply_5(code)
        return Refuse(self._rule, CloseReason.MALFORMED, reply, False, cause, self._facts)


def _read_greeting(data: bytes) -> tuple[bytes, int]:
    """The methods that a SOCKS 5 client offers, and the greeting's length."""
    cursor = Cursor(data, 1)
    count = cursor.get_uint8()
    if count == 0:
        raise ParseError("a greeting without a method")
    return cursor.get_bytes(count), cursor.position


def _is_request_4(data: bytes) -> bool:
    return data[0] == 4 and data[1:2] in (b"\x01", b"\x02")


def _read_request_4(data: bytes) -> tuple[int, Address | HostPort, int]:
    """The command, the destination and the length of a SOCKS 4 request."""
    cursor = Cursor(data, 1)
    command = cursor.get_uint8()
    if command not in (_CONNECT, _BIND):
        raise ParseError("not a command of SOCKS 4")
    port = cursor.get_uint16()
    ip = cursor.get_bytes(4)
    cursor.get_until(b"\0", at_most=_MAX_TEXT_4)  # who the client says it is
    if ip[:3] == bytes(3) and ip[3]:
        host = cursor.get_until(b"\0", at_most=_MAX_TEXT_4).decode("latin-1")  # 4A
    else:
        host = ip_text(ipaddress.IPv4Address(ip))
    try:
        return command, _destination(host, port), cursor.position
    except AddressError as error:
        raise ParseError(str(error)) from error


def _destination(host: str, port: int) -> Address | HostPort:
    # Clients put IPv6 addresses where a name belongs, some with brackets and some without.
    bare = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    return parse_destination(f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}")

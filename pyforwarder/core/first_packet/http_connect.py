"""`http_connect`: HTTP's CONNECT; the client names the destination.

A rule with `users` wants Proxy-Authorization with the Basic scheme.  What begins with `CONNECT` and
then breaks is told so; every other method is "no match".

Source: RFC 9110 section 9.3.6, RFC 7617 (Basic), RFC 9209 (Proxy-Status).
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import AddressError, parse_destination
from pyforwarder.core.first_packet.credentials import TOO_MANY_PASSWORDS
from pyforwarder.core.first_packet.cursor import ParseError, Truncated
from pyforwarder.core.first_packet.http import RequestHead, read_head
from pyforwarder.core.first_packet.matcher import Conversation, Speaker, match_prefix
from pyforwarder.core.first_packet.outcome import (
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
from pyforwarder.core.reasons import CloseReason, RefusalCode

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.first_packet.credentials import Users

_CONNECT: Final = b"CONNECT "
_ESTABLISHED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"


def _response(status: str, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, "Content-Length: 0", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("ascii")


def _refusal(status: str, error: str) -> bytes:
    return _response(status, f"Proxy-Status: pyforwarder; error={error}")


# The errors are those of RFC 9209 section 2.3.
_REFUSALS: Final = {
    RefusalCode.MALFORMED: _refusal("400 Bad Request", "http_request_error"),
    RefusalCode.DENIED: _refusal("403 Forbidden", "destination_ip_prohibited"),
    RefusalCode.REFUSED: _refusal("502 Bad Gateway", "connection_refused"),
    RefusalCode.UNREACHABLE: _refusal("502 Bad Gateway", "destination_ip_unroutable"),
    RefusalCode.TIMEOUT: _refusal("504 Gateway Timeout", "connection_timeout"),
    RefusalCode.UNRESOLVED: _refusal("502 Bad Gateway", "dns_error"),
    RefusalCode.BUSY: _refusal("503 Service Unavailable", "connection_limit_reached"),
    RefusalCode.TOKEN: _refusal("403 Forbidden", "http_request_denied"),
}
_WHO_ARE_YOU: Final = _response(
    "407 Proxy Authentication Required", 'Proxy-Authenticate: Basic realm="pyforwarder"'
)
_CUT_SHORT: Final = {
    End.TIMEOUT: _response("408 Request Timeout"),
    End.FULL: _response("431 Request Header Fields Too Large"),
    End.EOF: _response("400 Bad Request"),
}


class Negotiation:
    """Tells the client in HTTP responses."""

    tells_source = False

    def granted(self, source: Address | None) -> bytes:
        return _ESTABLISHED

    def refused(self, code: RefusalCode) -> bytes:
        return _REFUSALS[code]


_NEGOTIATION: Final = Negotiation()


class HttpConnect(Speaker):
    """Matches a whole CONNECT request, and what begins like one and then breaks."""

    def __init__(self, users: Users | None = None) -> None:
        self._users = users

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        begins = match_prefix(data, _CONNECT)
        if begins is not None:
            return begins
        try:
            read_head(data)
        except Truncated:
            return NEED_MORE
        except ParseError:
            return MATCH
        return MATCH

    def answer(
        self,
        rule: Rule,
        data: bytes,
        client: Address | None,
        now_unix_s: float | None,
        conversation: Conversation | None,
    ) -> Answer:
        begins = match_prefix(data, _CONNECT)
        if begins is NEED_MORE:
            return NEED_MORE
        if begins is not None:
            return NO_MATCH
        try:
            head = read_head(data)
            destination = parse_destination(head.target.decode("latin-1"))
        except Truncated:
            return NEED_MORE
        except (ParseError, AddressError) as error:
            reply = _REFUSALS[RefusalCode.MALFORMED]
            return Refuse(rule, CloseReason.MALFORMED, reply, False, str(error))
        if self._users is None:
            return Route(rule, destination, head.length, _NEGOTIATION, named_by_client=True)
        asked = ("asked", str(destination))
        said = _credentials(head)
        if said is None:
            return Refuse(rule, CloseReason.DENIED, _WHO_ARE_YOU, False, "no password", (asked,))
        name, password = said
        user = ("user", name.decode("latin-1"))
        facts = (user, asked)
        cause = "wrong user or password"
        busy = _REFUSALS[RefusalCode.BUSY]
        return self._users.decide(
            name,
            password,
            right=lambda: Route(rule, destination, head.length, _NEGOTIATION, True, (user,)),
            wrong=Refuse(rule, CloseReason.DENIED, _WHO_ARE_YOU, False, cause, facts),
            busy=Refuse(rule, CloseReason.BUSY, busy, False, TOO_MANY_PASSWORDS, facts),
        )

    def cut_short(self, end: End) -> bytes:
        return _CUT_SHORT[end]

    def describe(self, data: bytes) -> str:
        line = data.partition(b"\r\n")[0]
        return line.decode("latin-1") if line.startswith(_CONNECT) else ""


def _credentials(head: RequestHead) -> tuple[bytes, bytes] | None:
    """The user and the password of the Basic scheme; None: there are none, or not in that form."""
    values = head.values("proxy-authorization")
    if len(values) != 1:
        return None
    scheme, _, encoded = values[0].partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        text = base64.b64decode(encoded.strip(" ").encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        return None
    name, colon, password = text.partition(b":")
    return (name, password) if colon else None

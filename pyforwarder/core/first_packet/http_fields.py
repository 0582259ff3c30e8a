"""How the values of HTTP headers are compared with a rule's patterns.

Most headers are compared whole and letter by letter.  Some are defined otherwise: their value is a
list with commas, letters of either case mean the same, or both.

Source: RFC 9110 sections 5.6.1 (lists), 7.6.1 (Connection), 7.8 (Upgrade), 8.3 (Content-Type),
11.1 (schemes of authentication) and 12.5 (Accept and its kin), RFC 9112 section 6.1
(Transfer-Encoding), RFC 6455 sections 4.1 and 11.3 (WebSocket), RFC 9111 section 5.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pyforwarder.core.first_packet.glob import Globs


@dataclass(frozen=True, slots=True)
class FieldSyntax:
    """How the value of one header is read."""

    is_list: bool = False
    ignore_case: bool = False
    is_credentials: bool = False  # a scheme in any case, a blank, and what is compared as it is


_LIST: Final = FieldSyntax(is_list=True, ignore_case=True)
_SYNTAX: Final = {
    **dict.fromkeys(
        (
            "accept",
            "accept-charset",
            "accept-encoding",
            "accept-language",
            "access-control-request-headers",
            "cache-control",
            "connection",
            "content-encoding",
            "content-language",
            "expect",
            "forwarded",
            "keep-alive",
            "pragma",
            "prefer",
            "proxy-connection",
            "sec-websocket-extensions",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
            "via",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
        ),
        _LIST,
    ),
    **dict.fromkeys(
        ("if-match", "if-none-match", "sec-websocket-protocol", "sec-websocket-version"),
        FieldSyntax(is_list=True),
    ),
    **dict.fromkeys(("content-type", "origin"), FieldSyntax(ignore_case=True)),
    **dict.fromkeys(("authorization", "proxy-authorization"), FieldSyntax(is_credentials=True)),
}
_PLAIN: Final = FieldSyntax()

# A member of a list: commas inside of quotes do not end it.  Each character has one way on.
_MEMBER: Final = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')


class FieldPatterns:
    """The patterns of one header; its name is in lower case."""

    def __init__(self, name: str, patterns: Iterable[str]) -> None:
        self._syntax = _SYNTAX.get(name, _PLAIN)
        if self._syntax.is_credentials:
            patterns = [_fold_scheme(pattern) for pattern in patterns]
        self._globs = Globs(patterns, ignore_case=self._syntax.ignore_case)

    def include(self, values: Iterable[str]) -> bool:
        """Whether one of the header's values fits: whole, or one member of its list."""
        return any(
            self._globs.include(reading) for value in values for reading in self._readings(value)
        )

    def _readings(self, value: str) -> Iterable[str]:
        syntax = self._syntax
        if syntax.is_credentials:
            return (_fold_scheme(value),)
        if not syntax.is_list:
            # What follows a semicolon are parameters: `text/html; charset=utf-8`.
            return _with_bare((value,)) if syntax.ignore_case else (value,)
        members = [member.strip(" \t") for member in _MEMBER.findall(value)]
        return (value, *_with_bare(member for member in members if member))


def _with_bare(members: Iterable[str]) -> Iterable[str]:
    """Each member as it is, and without its parameters."""
    for member in members:
        yield member
        bare, semicolon, _ = member.partition(";")
        if semicolon:
            yield bare.rstrip(" \t")


def _fold_scheme(value: str) -> str:
    scheme, blank, rest = value.partition(" ")
    return scheme.lower() + blank + rest

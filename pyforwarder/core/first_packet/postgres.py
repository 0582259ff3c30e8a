"""`postgres`: PostgreSQL's protocol 3, by the first message.

    postgres: {user: [app], database: ["app_*"]}

A client usually begins by asking for encryption and says who it is only after the answer.  So a
rule with options answers `N`, "not here", and decides by the startup message that follows; a client
that insists on encryption (sslmode=require) then gives up.  Without options the first eight
bytes decide, nothing is answered, and encryption is between client and server.

A request to cancel names neither user nor database: it only matches without options.

Source: PostgreSQL documentation, "Message Formats" and "Message Flow"; src/include/libpq/pqcomm.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet import alphabet
from pyforwarder.core.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.core.first_packet.glob import Globs
from pyforwarder.core.first_packet.matcher import Parsed
from pyforwarder.core.first_packet.outcome import Send

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.options import Options

_PROTOCOL_3: Final = 3
_CANCEL: Final = 80877102
_SSL: Final = 80877103
_GSS: Final = 80877104
_REQUESTS: Final = frozenset({_CANCEL, _SSL, _GSS})
_HEADER: Final = 8
_MAX_STARTUP: Final = 10000  # MAX_STARTUP_PACKET_LENGTH
_NOT_ENCRYPTED: Final = Send(b"N", _HEADER)


class Postgres(Parsed):
    """Matches a client's first message; with `users` or `databases` its startup message."""

    def __init__(self, users: Globs | None = None, databases: Globs | None = None) -> None:
        self._users = users
        self._databases = databases
        self.asks = users is not None or databases is not None

    @classmethod
    def from_options(cls, options: Options) -> Postgres:
        """The matcher for what stands after `postgres:`.

        Raises:
            OptionError: an unknown option, or a name that no client can send.
        """
        users = alphabet.unicode_texts(options, "user")
        databases = alphabet.unicode_texts(options, "database")
        options.finish()
        return cls(
            Globs(users, ignore_case=False) if users else None,
            Globs(databases, ignore_case=False) if databases else None,
        )

    def _holds(self, cursor: Cursor) -> bool:
        length, code = _read_header(cursor)
        if not self.asks:
            return True
        if code == _CANCEL:
            return False
        if code in _REQUESTS:
            raise Truncated  # who it is comes after our answer
        user, database = _read_startup(cursor, length)
        if self._users is not None and not self._users.include(user):
            return False
        return self._databases is None or self._databases.include(database)

    def ask(self, data: bytes) -> Send | None:
        if not self.asks:
            return None
        try:
            _, code = _read_header(Cursor(data))
        except (Truncated, ParseError):
            return None
        return _NOT_ENCRYPTED if code in (_SSL, _GSS) else None

    def describe(self, data: bytes) -> str:
        try:
            cursor = Cursor(data)
            length, code = _read_header(cursor)
            if code == _CANCEL:
                return "a request to cancel"
            if code in _REQUESTS:
                return "a request for encryption"
            user, database = _read_startup(cursor, length)
        except (Truncated, ParseError):
            return ""
        return f"user {user!r}, database {database!r}"


def _read_header(cursor: Cursor) -> tuple[int, int]:
    """The length of the first message and what it is."""
    # Two halves: a wrong first byte is known when it comes.
    if cursor.get_uint8() != 0 or cursor.get_uint8() != 0:
        raise ParseError("longer than a first message may be")
    length = cursor.get_uint16()
    if not _HEADER <= length <= _MAX_STARTUP:
        raise ParseError("not as long as a first message")
    code = cursor.get_uint32()
    if code >> 16 != _PROTOCOL_3 and code not in _REQUESTS:
        raise ParseError("not a first message")
    if code in (_SSL, _GSS) and length != _HEADER:
        raise ParseError("a request for encryption has eight bytes")
    return length, code


def _read_startup(cursor: Cursor, length: int) -> tuple[str, str]:
    """The user and the database of a startup message; without a database it is the user's."""
    text = cursor.get_bytes(length - _HEADER)
    words = text.split(b"\0")
    # name \0 value \0 ... \0: an even number of words, an empty one, and what follows the last \0
    if len(words) < 2 or len(words) % 2 or words[-1] or words[-2]:
        raise ParseError("the parameters do not end where they should")
    names = words[:-2:2]
    parameters = dict(zip(names, words[1:-2:2], strict=True))
    user = parameters.get(b"user", b"")
    if not user or not all(names) or len(parameters) != len(names):
        raise ParseError("no user, or a parameter without a name or twice")
    return (
        user.decode("utf-8", "replace"),
        (parameters.get(b"database") or user).decode("utf-8", "replace"),
    )

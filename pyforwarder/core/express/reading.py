"""What a program in the kernel reads of a first packet: a ClientHello, the head of a request.

The program has fewer means than the matchers: bounded loops, and no buffers. It reads only messages
that are complete in this packet, and have the usual form; of any other message it says that it is
unknown. Where it gives an answer, the matchers give the same one. `first_packet/tls.py` and
`http.py` have the grammar and its sources.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pyforwarder.core.express.request_grammar import AUTOMATON, LAST_FINAL, MOST_STATES, State

# No more of a packet is read. Longer than any first segment on Ethernet.
MOST_BYTES: Final = 4096
MOST_EXTENSIONS: Final = 32
MOST_ALPN_NAMES: Final = 16
MOST_ALPN_BYTES: Final = 32  # of a protocol name that rules compare
MOST_NAME_BYTES: Final = 128  # of a name in a ClientHello or a Host header
MOST_METHOD_BYTES: Final = 24
MOST_HEAD_BYTES: Final = 1024  # of a request's head, the empty line included

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_RECORD_HEADER: Final = 5
_MESSAGE_HEADER: Final = 4
_MAX_FRAGMENT: Final = 1 << 14
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_SUPPORTED_VERSIONS: Final = 43


class Hello(NamedTuple):
    """What is known of a ClientHello."""

    begins: bool | None  # by the headers of record and message; None: too few bytes to tell
    is_read: bool  # the whole message was read
    name: bytes | None  # in lower case, without a final dot; None: it has none
    alpn: tuple[bytes, ...]  # the protocols that it offers


class Request(NamedTuple):
    """What is known of a request of HTTP/1."""

    method: bytes | None  # of a complete request line; empty: this is no request; None: unknown
    host: bytes | None  # in lower case, without port and final dot; None: unknown


NO_HELLO: Final = Hello(begins=False, is_read=False, name=None, alpn=())
_UNKNOWN_HELLO: Final = Hello(begins=None, is_read=False, name=None, alpn=())
_UNREAD_HELLO: Final = Hello(begins=True, is_read=False, name=None, alpn=())
_NO_REQUEST: Final = Request(b"", None)
_UNKNOWN_REQUEST: Final = Request(None, None)


def _uint16(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]


def read_hello(data: bytes) -> Hello:
    """What is known of a ClientHello at the beginning of `data`."""
    size = len(data)
    if (
        (size > 0 and data[0] != _HANDSHAKE)
        or (size > 1 and data[1] != 3)
        or (size > 2 and data[2] > 4)
        or (size > 4 and not 0 < _uint16(data, 3) <= _MAX_FRAGMENT)
        or (size > _RECORD_HEADER and data[5] != _CLIENT_HELLO)
    ):
        return NO_HELLO
    if size <= _RECORD_HEADER:
        return _UNKNOWN_HELLO
    start = _RECORD_HEADER + _MESSAGE_HEADER
    if size < start:
        return _UNREAD_HELLO
    end = start + (data[6] << 16 | _uint16(data, 7))
    if end > _RECORD_HEADER + _uint16(data, 3) or end > size:
        return _UNREAD_HELLO  # it continues in another record, or in another packet
    at = start + 2 + 32  # version, random
    if at + 1 > end or data[at] > 32:
        return _UNREAD_HELLO
    at += 1 + data[at]  # session id
    if at + 2 > end:
        return _UNREAD_HELLO
    at += 2 + _uint16(data, at)  # cipher suites
    if at + 1 > end:
        return _UNREAD_HELLO
    at += 1 + data[at]  # compression methods
    if at == end:
        return Hello(begins=True, is_read=True, name=None, alpn=())
    if at + 2 > end or at + 2 + _uint16(data, at) != end:
        return _UNREAD_HELLO
    return _read_extensions(data, at + 2, end)


def _read_extensions(data: bytes, at: int, end: int) -> Hello:
    name: bytes | None = None
    alpn: tuple[bytes, ...] = ()
    kinds: list[int] = []
    while at < end:
        if len(kinds) == MOST_EXTENSIONS or at + 4 > end:
            return _UNREAD_HELLO
        kind, length = _uint16(data, at), _uint16(data, at + 2)
        at += 4
        if at + length > end or kind in kinds:
            return _UNREAD_HELLO
        kinds.append(kind)
        if kind == _SERVER_NAME:
            name = _read_server_name(data, at, length)
            if name is None:
                return _UNREAD_HELLO
        elif kind == _ALPN:
            names = _read_alpn(data, at, length)
            if names is None:
                return _UNREAD_HELLO
            alpn = names
        elif kind == _SUPPORTED_VERSIONS and (
            length == 0 or data[at] != length - 1 or data[at] % 2
        ):
            return _UNREAD_HELLO
        at += length
    return Hello(begins=True, is_read=True, name=name, alpn=alpn)


def _read_server_name(data: bytes, at: int, length: int) -> bytes | None:
    """The only host name of a server_name extension; None: the extension has another form."""
    if length < 5 or _uint16(data, at) != length - 2 or data[at + 2] != 0:
        return None
    size = _uint16(data, at + 3)
    if size != length - 5 or not 0 < size <= MOST_NAME_BYTES:
        return None
    name = data[at + 5 : at + 5 + size]
    if not all(0x21 <= byte <= 0x7E for byte in name):
        return None
    return name.lower().removesuffix(b".") or None


def _read_alpn(data: bytes, at: int, length: int) -> tuple[bytes, ...] | None:
    """The names of an ALPN extension; None: the extension has another form."""
    if length < 2 or _uint16(data, at) != length - 2:
        return None
    end = at + length
    at += 2
    names: list[bytes] = []
    while at < end:
        stop = at + 1 + data[at]
        if len(names) == MOST_ALPN_NAMES or stop == at + 1 or stop > end:
            return None
        names.append(data[at + 1 : stop])
        at = stop
    return tuple(names)


def read_request(data: bytes) -> Request:
    """What is known of a request at the beginning of `data`."""
    state: int = State.START
    last, count = [0] * MOST_STATES, [0] * MOST_STATES
    for at, byte in enumerate(data[:MOST_HEAD_BYTES]):
        state = AUTOMATON.next(state, byte)
        last[state] = at
        count[state] += 1
        if state <= LAST_FINAL:
            break
    method_bytes = count[State.METHOD]
    if state == State.NO_REQUEST or method_bytes > MOST_METHOD_BYTES:
        return _NO_REQUEST
    if state == State.UNKNOWN or (state < State.LINE and state > LAST_FINAL):
        return _UNKNOWN_REQUEST
    method = data[:method_bytes]
    end = last[State.HOST] + 1
    host = data[end - count[State.HOST] : end]
    # In other forms the request target may name another host than the Host header.
    if (
        state != State.READ
        or not 0 < len(host) <= MOST_NAME_BYTES
        or data[method_bytes + 1] != ord("/")
        or method == b"CONNECT"
    ):
        return Request(method, None)
    return Request(method, host.lower().removesuffix(b".") or None)

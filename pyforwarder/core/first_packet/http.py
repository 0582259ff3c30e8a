"""`http`: an HTTP/1 request, and what its head says.

    http: {method: [GET, HEAD]}
    http: {host: ["*.example.com"]}              without the port; any case
    http: {path: ["/v1/*"]}                      without the query, compared as it is sent
    http: {header: {upgrade: websocket}}         one of the values; several names: all of them

Values are compared as the header's RFC has them, as a whole or as a list, with case or without:
`upgrade: websocket` takes `Upgrade: h2c, WebSocket`.

Without options, or with `method` and `path` only, the request line decides; else the whole head.

A server behind us reads the same bytes and must not come to another conclusion about whom they are
for.  So what RFC 9112 leaves to a reader's generosity is not accepted: bare line feeds, folded
lines, blanks before a colon, a second Host, a user name in the target.  Such a request is "no
match".

Source: RFC 9112 sections 2 to 5, RFC 9110 section 5.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.core.express.conditions import (
    Every,
    HttpHost,
    HttpRequest,
    UserspaceOnly,
    name_patterns,
)
from pyforwarder.core.first_packet import alphabet
from pyforwarder.core.first_packet.cursor import ParseError, Truncated
from pyforwarder.core.first_packet.glob import Globs
from pyforwarder.core.first_packet.http_fields import FieldPatterns
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.options import OptionError, Options
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.express.conditions import Condition
    from pyforwarder.core.first_packet.outcome import End, Facts

# The longest registered method has 17 letters (UPDATEREDIRECTREF).
_METHOD: Final = rb"[A-Z][A-Z_-]{0,23}"
_REQUEST_LINE: Final = re.compile(rb"(%b) ([!-~\x80-\xff]+) HTTP/1\.[0-9]\r\n" % _METHOD)


def _any_beginning(text: bytes) -> bytes:
    pattern = b""
    for byte in reversed(text):
        pattern = b"(?:%b%b)?" % (re.escape(bytes([byte])), pattern)
    return pattern


# Every beginning of a request line.  Each character allows one way on, so nothing backtracks.
_REQUEST_LINE_BEGINS: Final = re.compile(
    rb"(?:%b(?: (?:[!-~\x80-\xff]+(?: (?:%b|HTTP/1\.[0-9]\r?))?)?)?)?"
    % (_METHOD, _any_beginning(b"HTTP/1."))
)
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
# A whole head of a request as nearly all are: for a path, and each line a header.  No character can
# be two things, so nothing backtracks for long.
_PLAIN_HEAD: Final = re.compile(
    rb"(%b) (/[!-~\x80-\xff]*) HTTP/1\.[0-9](?=\r\n)"
    rb"((?:\r\n[!#$%%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*)*)\r\n\r\n" % _METHOD
)
_HOST_HEADER: Final = re.compile(rb"\r\n[Hh][Oo][Ss][Tt]:([^\r]*)")
_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[!$&'()*+,;=%0-9A-Za-z._~-]*)(?::[0-9]*)?")
_ABSOLUTE: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)(.*)", re.DOTALL)


class RequestLine(NamedTuple):
    """The first line of a request."""

    method: str
    target: bytes
    length: int  # bytes of the line, \r\n included


class RequestHead(NamedTuple):
    """A whole request head."""

    method: str
    target: bytes
    headers: Mapping[str, list[str]]  # names in lower case, values without blanks around
    length: int  # bytes up to and with the empty line

    def values(self, name: str) -> list[str]:
        """The values of every header of this name (in lower case)."""
        return self.headers.get(name, [])


def read_request_line(data: bytes) -> RequestLine:
    """The request line at the beginning of `data`.

    Raises:
        Truncated: it is not complete.
        ParseError: it is none, or not of HTTP/1.
    """
    line = _REQUEST_LINE.match(data)
    if line:
        return RequestLine(line[1].decode("ascii"), line[2], line.end())
    if _REQUEST_LINE_BEGINS.fullmatch(data):
        raise Truncated
    raise ParseError("not an HTTP/1 request line")


def read_head(data: bytes) -> RequestHead:
    """The request head at the beginning of `data`.

    Raises:
        Truncated: it is not complete.
        ParseError: it is none, or not strictly what RFC 9112 allows a sender to send.
    """
    line = read_request_line(data)
    # From the request line's own end: there may be no header at all.
    end = data.find(b"\r\n\r\n", line.length - 2)
    if end < 0:
        raise Truncated
    headers: dict[str, list[str]] = {}
    if end >= line.length:
        for text in data[line.length : end].split(b"\r\n"):
            header = _HEADER.fullmatch(text)
            if not header:
                raise ParseError("a header line that is none")
            value = header[2].rstrip(b" \t")
            name = header[1].decode("ascii").lower()
            headers.setdefault(name, []).append(value.decode("latin-1"))
    return RequestHead(line.method, line.target, headers, end + 4)


def path_of(target: bytes) -> str:
    """The path in a request target, without the query; empty if the target has none."""
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute:
        target = absolute[2] or b"/"
    if not target.startswith(b"/"):
        return ""
    return target.partition(b"?")[0].decode("latin-1")


def host_of(head: RequestHead) -> str | None:
    """The host that the request is for, in lower case without port; None: it does not say.

    A host in the target counts before the Host header (RFC 9112 section 3.2.2).

    Raises:
        ParseError: more than one Host, or one that is no host.
    """
    hosts = head.values("host")
    if len(hosts) > 1:
        raise ParseError("more than one Host")
    absolute = _ABSOLUTE.fullmatch(head.target)
    if head.method == "CONNECT":
        text = head.target
    elif absolute:
        text = absolute[1]
    elif hosts:
        text = hosts[0].encode("latin-1")
    else:
        return None
    host = _HOST.fullmatch(text)
    if not host:
        raise ParseError("a host that is none")
    return host[1].decode("ascii").lower().removesuffix(".")


# One each: the rules of a listener are asked in turn about the same bytes.  With a hundred hosts
# a request with 16 KiB of headers took 83 ms.
@functools.lru_cache(maxsize=1)
def _line_or_outcome(data: bytes) -> tuple[str, str] | Outcome:
    """The method and the path, or what the lack of them means."""
    try:
        line = read_request_line(data)
    except Truncated:
        return NEED_MORE
    except ParseError:
        return NO_MATCH
    return line.method, path_of(line.target)


@functools.lru_cache(maxsize=1)
def _head_or_outcome(data: bytes) -> tuple[RequestHead, str | None] | Outcome:
    """The head and its host (None: none that all servers agree on), or what their lack means."""
    try:
        head = read_head(data)
    except Truncated:
        return NEED_MORE
    except ParseError:
        return NO_MATCH
    try:
        return head, host_of(head)
    except ParseError:
        return head, None


class PlainRequest(NamedTuple):
    """What rules ask for most of a whole head that is as usual."""

    method: str
    path: str
    host: str


@functools.lru_cache(maxsize=1)
def _read_plain_request(data: bytes) -> PlainRequest | None:
    """What `_line_or_outcome` and `_head_or_outcome` say, found in two looks: of most requests.

    None: it is not as usual (not whole, not for a path, without one host), and they say what it is.
    """
    head = _PLAIN_HEAD.match(data)
    if head is None:
        return None
    method, target, headers = head.groups()
    hosts = _HOST_HEADER.findall(headers)
    if len(hosts) != 1 or method == b"CONNECT":
        return None
    host = _HOST.fullmatch(hosts[0].strip(b" \t"))
    if host is None:
        return None
    return PlainRequest(
        method.decode("ascii"),
        target.partition(b"?")[0].decode("latin-1"),
        host[1].decode("ascii").lower().removesuffix("."),
    )


def host_in(data: bytes) -> str | Outcome:
    """The host that a request is for; NEED_MORE while it may come, NO_MATCH if there is none."""
    plain = _read_plain_request(data)
    if plain is not None:
        return plain.host or NO_MATCH
    read = _head_or_outcome(data)
    if isinstance(read, Outcome):
        return read
    return read[1] or NO_MATCH


def _header_patterns(written: object) -> dict[str, FieldPatterns]:
    """What stands after `header:`, by the names in lower case."""
    if written is None:
        return {}
    if not isinstance(written, Mapping):
        raise OptionError("wants {name: value}", "header")
    wanted = Options(written)
    patterns: dict[str, FieldPatterns] = {}
    try:
        for key in map(str, written):
            name = alphabet.header_name(key)
            if name in patterns:
                raise OptionError(f"{name!r} stands here twice: write its values as a list", key)
            texts = alphabet.latin1_texts(wanted, key)
            if not texts:
                raise OptionError('says no value; "*" takes any', key)
            patterns[name] = FieldPatterns(name, texts)
    except OptionError as error:
        raise OptionError(error.reason, f"header.{error.key}") from None
    return patterns


class Http(Matcher):
    """Matches a request for which all given conditions hold."""

    has_facts = True

    def __init__(
        self,
        *,
        methods: frozenset[str] = frozenset(),
        hosts: Globs | None = None,
        paths: Globs | None = None,
        headers: Mapping[str, FieldPatterns] | None = None,
    ) -> None:
        self._methods = methods
        self._hosts = hosts
        self._paths = paths
        self._headers = dict(headers or {})

    @classmethod
    def from_options(cls, options: Options) -> Http:
        """The matcher for what stands after `http:`.

        Raises:
            OptionError: an unknown option, headers that are no mapping, or a pattern that no
                request can match.
        """
        methods = alphabet.methods(options, "method")
        hosts = alphabet.http_hosts(options, "host")
        paths = alphabet.paths(options, "path")
        headers = options.take("header")
        options.finish()
        return cls(
            methods=frozenset(methods),
            hosts=Globs(hosts, ignore_case=True) if hosts else None,
            paths=Globs(paths, ignore_case=False) if paths else None,
            headers=_header_patterns(headers),
        )

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        plain = _read_plain_request(data) if self._hosts is not None else None
        line = _line_or_outcome(data) if plain is None else (plain.method, plain.path)
        if isinstance(line, Outcome):
            return line
        method, path = line
        if self._methods and method not in self._methods:
            return NO_MATCH
        if self._paths is not None and not self._paths.include(path):
            return NO_MATCH
        if self._hosts is None and not self._headers:
            return MATCH
        host = plain.host if plain is not None else None
        if plain is None or self._headers:
            read = _head_or_outcome(data)
            if isinstance(read, Outcome):
                return read
            head, host = read
            for name, values in self._headers.items():
                if not values.include(head.values(name)):
                    return NO_MATCH
        if self._hosts is not None and (host is None or not self._hosts.include(host)):
            return NO_MATCH
        return MATCH

    def in_kernel(self, local_port: int) -> Condition:
        if self._paths is not None or self._headers:
            raise UserspaceOnly("userspace alone compares `path` and `header`")
        request = HttpRequest(frozenset(method.encode() for method in self._methods))
        if self._hosts is None:
            return request
        return Every((request, HttpHost(name_patterns(self._hosts))))

    def facts(self, data: bytes) -> Facts:
        if self._hosts is None and not self._headers:
            return ()
        host = host_in(data)
        return () if isinstance(host, Outcome) else (("host", host),)

    def describe(self, data: bytes) -> str:
        try:
            line = read_request_line(data)
        except (Truncated, ParseError):
            return ""
        said = f"{line.method} {path_of(line.target) or line.target.decode('latin-1')}"
        try:
            host = host_of(read_head(data))
        except Truncated:
            return said
        except ParseError as error:
            return f"{said}, {error}"
        return f"{said}, host {host}" if host else f"{said}, no host"

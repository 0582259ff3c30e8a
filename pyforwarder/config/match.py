"""What may stand under a rule's `match`, checked in shape and brought into one form.

A match is a protocol's name, or a mapping of conditions that must all hold; a list anywhere
means alternatives.  The grammar, and the one form that `parse_match` gives for it:

    ssh                                     "ssh"
    {tls: {sni: "*.example.com"}}           {"tls": {"sni": ["*.example.com"]}}
    {tls: {}, client: 10.0.0.0/8}           {"tls": {}, "client": ["10.0.0.0/8"]}
    {http: {header: {x-env: [a, b]}}}       {"http": {"header": {"x-env": ["a", "b"]}}}
    {bytes: {prefix: "hex:0016"}}           {"bytes": {"prefix": ["hex:0016"]}}
    {bytes: "hex:0016"}                     the same
    {regex: "^EHLO "}                       {"regex": ["^EHLO "]}
    {port: [80, 8000-8999]}                 {"port": ["80", "8000-8999"]}
    {not: ssh}                              {"not": "ssh"}
    {all: [ssh, {client: loopback}]}        {"all": ["ssh", {"client": ["loopback"]}]}
    {any_of: [ssh, tls]}, or [ssh, tls]     {"any_of": ["ssh", "tls"]}

Nothing here compiles a match: `pyforwarder.routing` does.
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, Final, TypeAlias

import re2
from pydantic import PlainValidator

from pyforwarder import policy
from pyforwarder.config.problems import problem
from pyforwarder.config.values import as_list, describe, suggestion

Match: TypeAlias = str | dict[str, object]

# Protocol -> its options, each a list of alternatives.
PROTOCOLS: Final[dict[str, tuple[str, ...]]] = {
    "instruction": (),
    "any": (),
    "silence": (),
    "ssh": (),
    "tls": ("sni", "alpn", "version"),
    "http": ("host", "path", "method", "header"),
    "http2": (),
    "http_connect": (),
    "socks": ("version",),
    "bytes": ("prefix", "offset"),
    "regex": (),
    "rdp": ("cookie",),
    "postgres": ("user", "database"),
    "mysql": (),
    "smtp": (),
    "redis": (),
    "mqtt": ("client_id",),
    "dns": ("qname",),
    "openvpn": (),
    "xmpp": ("to",),
    "adb": (),
}
COMBINATORS: Final = ("all", "any_of", "not")
CONDITIONS: Final = ("client", "port")  # of the connection, not of its bytes

# Here the client says where it wants to go, and the rule must say what it `allow`s.
CLIENT_NAMED: Final = frozenset({"instruction", "socks", "http_connect"})

# These wait for a client that stays silent or for a dialogue; a datagram offers neither.
STREAM_ONLY: Final = frozenset({"silence", "mysql", "smtp", "socks", "http_connect"})

MAX_NESTING: Final = 8

_VERSIONS: Final = {"tls": ("1.0", "1.1", "1.2", "1.3"), "socks": ("4", "5")}
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2


class Naming(enum.Enum):
    """Whether the client of a matching connection has named its destination."""

    ALWAYS = "always"
    NEVER = "never"
    SOMETIMES = "sometimes"


def parse_match(value: object) -> Match:
    """A match in the form the module describes.

    Raises:
        PydanticCustomError: a condition that does not exist or has the wrong shape; it says where.
    """
    return _match(value, (), MAX_NESTING)


MatchField = Annotated[Match, PlainValidator(parse_match)]


def naming(match: Match) -> Naming:
    """Whether connections that this match takes have a destination named by their client."""
    if isinstance(match, str):
        return Naming.ALWAYS if match in CLIENT_NAMED else Naming.NEVER
    found = {_naming_of_condition(key, value) for key, value in match.items()}
    # All conditions hold together, so one that names is enough.
    for answer in (Naming.ALWAYS, Naming.SOMETIMES):
        if answer in found:
            return answer
    return Naming.NEVER


def _naming_of_condition(key: str, value: object) -> Naming:
    if key in CLIENT_NAMED:
        return Naming.ALWAYS
    if key == "any_of" and isinstance(value, list):
        found = {naming(part) for part in value}
        return found.pop() if len(found) == 1 else Naming.SOMETIMES
    if key == "all" and isinstance(value, list):
        found = {naming(part) for part in value}
        for answer in (Naming.ALWAYS, Naming.SOMETIMES):
            if answer in found:
                return answer
    return Naming.NEVER  # `not` included: what is absent names nothing


def protocols(match: Match) -> list[str]:
    """The protocols a match may take, in the order written; what stands under `not` is left out."""
    if isinstance(match, str):
        return [match]
    result = []
    for key, value in match.items():
        if key in PROTOCOLS:
            result.append(key)
        elif key in ("all", "any_of") and isinstance(value, list):
            for part in value:
                result += protocols(part)
    return result


def _match(value: object, at: tuple[str | int, ...], depth: int) -> Match:
    if depth == 0:
        raise problem(f"matches are nested more than {MAX_NESTING} deep", *at)
    match value:
        case str():
            _check_known(value, at)
            if value in PROTOCOLS and value not in ("bytes", "regex"):
                return value
            raise problem(f"{value} wants a value: write {{{value}: ...}}", *at)
        case list():
            return {"any_of": _matches(value, at, depth)}
        case dict():
            if not value:
                raise problem("no condition: write `any` for every first packet", *at)
            conditions = {key: _condition(key, value[key], at, depth) for key in value}
            if len(conditions) == 1:
                (key,) = conditions
                if conditions[key] == {}:
                    return str(key)
            return conditions
        case _:
            raise problem(f"must be a protocol or conditions, not {describe(value)}", *at)


def _check_known(key: object, at: tuple[str | int, ...]) -> None:
    known = (*PROTOCOLS, *COMBINATORS, *CONDITIONS)
    if key in known:
        return
    word = str(key)
    owners = [protocol for protocol, options in PROTOCOLS.items() if word in options]
    if owners:
        raise problem(
            f"{word!r} belongs to a protocol: write {{{owners[0]}: {{{word}: ...}}}}", *at
        )
    raise problem(f"unknown match {word!r}, {suggestion(word, known)}", *at)


def _matches(value: object, at: tuple[str | int, ...], depth: int) -> list[Match]:
    if not isinstance(value, list) or not value:
        raise problem(f"must be a list of matches, not {describe(value)}", *at)
    return [_match(part, (*at, index), depth - 1) for index, part in enumerate(value)]


def _condition(key: object, value: object, at: tuple[str | int, ...], depth: int) -> object:
    at = (*at, str(key))
    _check_known(key, at)
    match key:
        case "all" | "any_of":
            return _matches(value, at, depth)
        case "not":
            return _match(value, at, depth - 1)
        case "client":
            texts = _texts(value, at)
            try:
                policy.Networks.parse(texts)
            except ValueError as error:
                raise problem(str(error), *at) from error
            return texts
        case "port":
            texts = _texts(value, at)
            for text in texts:
                _check(policy.parse_port_ranges, text, at)
            return texts
        case "regex":
            texts = _texts(value, at)
            for text in texts:
                _check_regex(text, at)
            return texts
        case "bytes" if isinstance(value, (str, list)):
            return _options("bytes", {"prefix": value}, at, shorthand=True)
        case _:
            return _options(str(key), value, at)


def _options(
    protocol: str, value: object, at: tuple[str | int, ...], *, shorthand: bool = False
) -> dict[str, object]:
    known = PROTOCOLS[protocol]
    if value is None:
        value = {}
    if not isinstance(value, dict):
        what = f"options ({', '.join(known)})" if known else "nothing"
        raise problem(f"{protocol} takes {what}, not {describe(value)}", *at)
    result: dict[str, object] = {}
    for option, wanted in value.items():
        place = at if shorthand else (*at, option)
        if option not in known:
            hint = suggestion(option, known) or "it takes none"
            raise problem(f"unknown option {option!r} of {protocol}, {hint}", *place)
        if option == "header":
            result[option] = _headers(wanted, place)
            continue
        texts = _texts(wanted, place)
        _check_option(protocol, option, texts, place)
        result[option] = texts
    if protocol == "bytes" and "prefix" not in result:
        raise problem("bytes wants a prefix: {bytes: {prefix: ...}}", *at)
    return result


def _check_option(protocol: str, option: str, texts: list[str], at: tuple[str | int, ...]) -> None:
    if option == "version":
        for text in texts:
            if text not in _VERSIONS[protocol]:
                raise problem(f"{text!r} is not one of {', '.join(_VERSIONS[protocol])}", *at)
    elif option == "prefix":
        for text in texts:
            _check(parse_prefix, text, at)
    elif option == "offset" and not (
        len(texts) == 1 and texts[0].isascii() and texts[0].isdigit() and len(texts[0]) <= 5
    ):
        raise problem("an offset is one number of bytes", *at)


def _headers(value: object, at: tuple[str | int, ...]) -> dict[str, list[str]]:
    if not isinstance(value, dict) or not value:
        raise problem(f"must be headers and what they must be, not {describe(value)}", *at)
    for name in value:
        if not _HEADER_NAME.fullmatch(name):
            raise problem(f"{name!r} is no header's name", *at, name)
    return {name.lower(): _texts(wanted, (*at, name)) for name, wanted in value.items()}


def _texts(value: object, at: tuple[str | int, ...]) -> list[str]:
    items = as_list(value)
    if not items:
        raise problem("an empty list matches nothing", *at)
    texts = []
    for index, item in enumerate(items):
        if isinstance(item, int) and not isinstance(item, bool):
            texts.append(str(item))
        elif isinstance(item, str) and item:
            texts.append(item)
        else:
            place = (*at, index) if isinstance(value, list) else at
            raise problem(f"must be text, not {describe(item)}", *place)
    return texts


def parse_prefix(text: str) -> bytes:
    """The bytes that `hex:0016` or a plain text (as UTF-8) stands for.

    Raises:
        ValueError: nothing, or not pairs of hexadecimal digits after `hex:`.
    """
    if not text.startswith("hex:"):
        return text.encode()
    try:
        prefix = bytes.fromhex(text.removeprefix("hex:"))
    except ValueError:
        raise ValueError(f"{text!r} is not hexadecimal digits in pairs") from None
    if not prefix:
        raise ValueError("an empty prefix matches everything: write `any`")
    return prefix


def _check(parse: object, text: str, at: tuple[str | int, ...]) -> None:
    if callable(parse):
        try:
            parse(text)
        except ValueError as error:
            raise problem(str(error), *at) from error


def _check_regex(text: str, at: tuple[str | int, ...]) -> None:
    options = re2.Options()
    options.log_errors = False  # else RE2 writes to stderr by itself
    try:
        re2.compile(text, options)
    except re2.error as error:
        reason = error.args[0] if error.args else "not a regular expression"
        if isinstance(reason, bytes):
            reason = reason.decode(errors="replace")
        raise problem(f"{text!r}: {reason} (syntax: RE2)", *at) from error

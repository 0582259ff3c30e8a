"""Every word a rule's `match` may use, and the matcher behind it.

match: ssh                                     a word alone
match: {tls: {sni: ["*.example.com"]}}         a word with options
match: {ssh: {}, client: [10.0.0.0/8]}         several words: all must hold
match: [ssh, {tls: {}}]                        a list: alternatives
match: {all: [...]}, {any_of: [...]}, {not: ...}
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder.first_packet.adb import Adb
from pyforwarder.first_packet.anything import Anything
from pyforwarder.first_packet.combine import All, AnyOf, Not
from pyforwarder.first_packet.conditions import ClientIn, ListenerPort
from pyforwarder.first_packet.dns import Dns
from pyforwarder.first_packet.http import Http
from pyforwarder.first_packet.http2 import http2
from pyforwarder.first_packet.http_connect import HttpConnect
from pyforwarder.first_packet.instruction import Instruction, TokenUse
from pyforwarder.first_packet.literal import Literal
from pyforwarder.first_packet.mqtt import Mqtt
from pyforwarder.first_packet.openvpn import OpenVpn
from pyforwarder.first_packet.options import OptionError, Options
from pyforwarder.first_packet.pattern import Pattern
from pyforwarder.first_packet.postgres import Postgres
from pyforwarder.first_packet.rdp import Rdp
from pyforwarder.first_packet.redis import redis
from pyforwarder.first_packet.silence import Silence
from pyforwarder.first_packet.socks import Socks
from pyforwarder.first_packet.ssh import ssh
from pyforwarder.first_packet.tls import Tls
from pyforwarder.first_packet.xmpp import Xmpp

if TYPE_CHECKING:
    from pyforwarder.first_packet.credentials import Users
    from pyforwarder.first_packet.matcher import Matcher
    from pyforwarder.token import TokenKeys

# Deeper than any rule a person writes, far from Python's recursion limit.
MAX_DEPTH: Final = 20


@dataclass(frozen=True, slots=True)
class Terms:
    """What a rule says outside its `match` about the protocols it takes."""

    acknowledged: bool = True
    checksum_required: bool = False
    tokens: TokenUse = TokenUse.OFF
    keys: TokenKeys | None = None
    users: Users | None = None  # None: nobody is asked who they are


def _instruction(value: object, terms: Terms) -> Matcher:
    Options(value).finish()
    return Instruction(
        checksum_required=terms.checksum_required,
        tokens=terms.tokens,
        keys=terms.keys,
        acknowledged=terms.acknowledged,
    )


def _plain(make: Callable[[], Matcher]) -> Callable[[object, Terms], Matcher]:
    """A protocol without options."""

    def build(value: object, terms: Terms) -> Matcher:
        Options(value).finish()
        return make()

    return build


def _with_options(
    make: Callable[[Options], Matcher], shorthand: str | None = None
) -> Callable[[object, Terms], Matcher]:
    def build(value: object, terms: Terms) -> Matcher:
        return make(Options(value, shorthand=shorthand))

    return build


def _socks(value: object, terms: Terms) -> Matcher:
    return Socks.from_options(Options(value), terms.users)


def _http_connect(value: object, terms: Terms) -> Matcher:
    Options(value).finish()
    return HttpConnect(terms.users)


PROTOCOLS: Final[dict[str, Callable[[object, Terms], Matcher]]] = {
    "instruction": _instruction,
    "any": _plain(Anything),
    "silence": _plain(Silence),
    "bytes": _with_options(Literal.from_options, "prefix"),
    "regex": _with_options(Pattern.from_options, "pattern"),
    "tls": _with_options(Tls.from_options),
    "http": _with_options(Http.from_options),
    "http2": _plain(http2),
    "http_connect": _http_connect,
    "socks": _socks,
    "ssh": _plain(ssh),
    "rdp": _with_options(Rdp.from_options),
    "postgres": _with_options(Postgres.from_options),
    "redis": _plain(redis),
    "mqtt": _with_options(Mqtt.from_options),
    "dns": _with_options(Dns.from_options),
    "openvpn": _plain(OpenVpn),
    "xmpp": _with_options(Xmpp.from_options),
    "adb": _plain(Adb),
    # In these the server speaks first, so all there is to see of a client is that it waits.
    "mysql": _plain(Silence),
    "smtp": _plain(Silence),
}
CONDITIONS: Final[dict[str, Callable[[object, Terms], Matcher]]] = {
    "client": _with_options(ClientIn.from_options, "networks"),
    "port": _with_options(ListenerPort.from_options, "ports"),
}
COMBINATORS: Final = ("all", "any_of", "not")


def build(match: object, terms: Terms, depth: int = 0) -> Matcher:
    """The matcher for what stands after `match:`.

    Raises:
        OptionError: it cannot be used; its `key` is the place below `match`.
    """
    if depth > MAX_DEPTH:
        raise OptionError(f"is nested more than {MAX_DEPTH} deep")
    if isinstance(match, str):
        return _build_word(match, None, terms, depth)
    if isinstance(match, list | tuple):
        return AnyOf(_build_list(match, terms, depth))
    if isinstance(match, Mapping) and match:
        words = tuple(_build_word(str(key), value, terms, depth) for key, value in match.items())
        return words[0] if len(words) == 1 else All(words)
    raise OptionError(f"wants a protocol's name, or conditions in braces, not {match!r}")


def _build_list(items: object, terms: Terms, depth: int) -> tuple[Matcher, ...]:
    if not isinstance(items, list | tuple) or not items:
        raise OptionError("wants a list of conditions with at least one in it")
    built = []
    for position, item in enumerate(items):
        try:
            built.append(build(item, terms, depth + 1))
        except OptionError as error:
            raise OptionError(error.reason, f"[{position}]{_below(error.key)}") from None
    return tuple(built)


def _build_word(word: str, value: object, terms: Terms, depth: int) -> Matcher:
    try:
        if word == "not":
            return Not(build(value, terms, depth + 1))
        if word == "any_of":
            return AnyOf(_build_list(value, terms, depth))
        if word == "all":
            if isinstance(value, Mapping):
                return build(value, terms, depth + 1)
            return All(_build_list(value, terms, depth))
        maker = PROTOCOLS.get(word) or CONDITIONS.get(word)
        if maker is not None:
            return maker(value, terms)
    except OptionError as error:
        raise OptionError(error.reason, f"{word}{_below(error.key)}") from None
    known = [*PROTOCOLS, *CONDITIONS, *COMBINATORS]
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    raise OptionError(f"unknown match {word!r}; {hint}")


def _below(key: str) -> str:
    return key if not key or key.startswith("[") else f".{key}"

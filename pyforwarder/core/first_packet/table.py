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

from pyforwarder.core.first_packet.adb import Adb
from pyforwarder.core.first_packet.anything import Anything
from pyforwarder.core.first_packet.combine import All, AnyOf, Not
from pyforwarder.core.first_packet.conditions import ClientIn, ListenerPort
from pyforwarder.core.first_packet.datagrams import Whole
from pyforwarder.core.first_packet.dns import Dns
from pyforwarder.core.first_packet.dtls import Dtls
from pyforwarder.core.first_packet.http import Http
from pyforwarder.core.first_packet.http2 import http2
from pyforwarder.core.first_packet.http_connect import HttpConnect
from pyforwarder.core.first_packet.instruction import Instruction, TokenUse
from pyforwarder.core.first_packet.literal import Literal
from pyforwarder.core.first_packet.matcher import Speaker
from pyforwarder.core.first_packet.mqtt import Mqtt
from pyforwarder.core.first_packet.openvpn import OpenVpn
from pyforwarder.core.first_packet.options import OptionError, Options
from pyforwarder.core.first_packet.pattern import Pattern
from pyforwarder.core.first_packet.postgres import Postgres
from pyforwarder.core.first_packet.quic import Quic
from pyforwarder.core.first_packet.rdp import Rdp
from pyforwarder.core.first_packet.redis import redis
from pyforwarder.core.first_packet.silence import Silence
from pyforwarder.core.first_packet.socks import Socks
from pyforwarder.core.first_packet.ssh import ssh
from pyforwarder.core.first_packet.stun import Stun
from pyforwarder.core.first_packet.tls import Tls
from pyforwarder.core.first_packet.wireguard import WireGuard
from pyforwarder.core.first_packet.xmpp import Xmpp

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.credentials import Users
    from pyforwarder.core.first_packet.matcher import Matcher
    from pyforwarder.core.token import TokenKeys

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
    # Whether the first packet is a datagram, which is whole and has no frame around it; None: not
    # known yet.
    datagrams: bool | None = None


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


def _dns(value: object, terms: Terms) -> Matcher:
    return Dns.from_options(Options(value), datagrams=bool(terms.datagrams))


def _openvpn(value: object, terms: Terms) -> Matcher:
    Options(value).finish()
    return OpenVpn(datagrams=bool(terms.datagrams))


def _stun(value: object, terms: Terms) -> Matcher:
    Options(value).finish()
    return Stun(datagrams=bool(terms.datagrams))


@dataclass(frozen=True, slots=True)
class Protocol:
    """One word of `match`: how its matcher is made, and what the protocol is spoken over."""

    build: Callable[[object, Terms], Matcher]
    in_datagrams: bool = False
    in_streams: bool = True


PROTOCOLS: Final[dict[str, Protocol]] = {
    "instruction": Protocol(_instruction, in_datagrams=True),
    "any": Protocol(_plain(Anything), in_datagrams=True),
    "silence": Protocol(_plain(Silence)),
    "bytes": Protocol(_with_options(Literal.from_options, "prefix"), in_datagrams=True),
    "regex": Protocol(_with_options(Pattern.from_options, "pattern"), in_datagrams=True),
    "tls": Protocol(_with_options(Tls.from_options)),
    "http": Protocol(_with_options(Http.from_options)),
    "http2": Protocol(_plain(http2)),
    "http_connect": Protocol(_http_connect),
    "socks": Protocol(_socks),
    "ssh": Protocol(_plain(ssh)),
    "rdp": Protocol(_with_options(Rdp.from_options)),
    "postgres": Protocol(_with_options(Postgres.from_options)),
    "redis": Protocol(_plain(redis)),
    "mqtt": Protocol(_with_options(Mqtt.from_options)),
    "dns": Protocol(_dns, in_datagrams=True),
    "openvpn": Protocol(_openvpn, in_datagrams=True),
    "stun": Protocol(_stun, in_datagrams=True),
    "quic": Protocol(_with_options(Quic.from_options), in_datagrams=True, in_streams=False),
    "dtls": Protocol(_with_options(Dtls.from_options), in_datagrams=True, in_streams=False),
    "wireguard": Protocol(_plain(WireGuard), in_datagrams=True, in_streams=False),
    "xmpp": Protocol(_with_options(Xmpp.from_options)),
    "adb": Protocol(_plain(Adb)),
    # In these the server speaks first, so all there is to see of a client is that it waits.
    "mysql": Protocol(_plain(Silence)),
    "smtp": Protocol(_plain(Silence)),
}
CONDITIONS: Final[dict[str, Protocol]] = {
    "client": Protocol(_with_options(ClientIn.from_options, "networks"), in_datagrams=True),
    "port": Protocol(_with_options(ListenerPort.from_options, "ports"), in_datagrams=True),
}
# What people write for protocols that have another name here, or are recognised by another word.
OTHER_NAMES: Final = {
    "https": "tls",
    "ssl": "tls",
    "sni": "tls: {sni: [NAME]}",
    "host": "http: {host: [NAME]}",
    "alpn": "tls: {alpn: [NAME]}",
    "path": "http: {path: [/PATH]}",
    "h2": "tls: {alpn: [h2]}, or http2 for HTTP/2 without TLS",
    "h2c": "http2",
    "websocket": "http: {header: {upgrade: websocket}}",
    "connect": "http_connect",
    "socks4": 'socks: {version: ["4"]}',
    "socks5": 'socks: {version: ["5"]}',
    "postgresql": "postgres",
    "pgsql": "postgres",
    "mariadb": "mysql",
    "ftp": "silence",
    "imap": "silence",
    "pop3": "silence",
    "timeout": "silence",
    "prefix": "bytes: {prefix: TEXT}",
    "regexp": "regex",
    "jabber": "xmpp",
    "http3": "quic: {alpn: [h3]}",
    "h3": "quic: {alpn: [h3]}",
    "turn": "stun",
    "wg": "wireguard",
    "qname": "dns: {qname: [NAME]}",
    "qtype": "dns: {qtype: [TYPE]}",
    "src": "client: [NETWORK]",
    "source": "client: [NETWORK]",
    "default": "any",
    "anyprot": "any",
    "*": "any",
    "or": "any_of",
    "and": "all",
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
        protocol = PROTOCOLS.get(word) or CONDITIONS.get(word)
        if protocol is not None:
            return _build_leaf(word, protocol, value, terms)
    except OptionError as error:
        raise OptionError(error.reason, f"{word}{_below(error.key)}") from None
    known_words = [*PROTOCOLS, *CONDITIONS, *COMBINATORS]
    near = difflib.get_close_matches(word.lower(), known_words, n=1)
    hint = (
        f"write {OTHER_NAMES[word.lower()]}"
        if word.lower() in OTHER_NAMES
        else f"did you mean {near[0]}?"
        if near
        else f"known: {', '.join(known_words)}"
    )
    raise OptionError(f"unknown match {word!r}; {hint}")


def _build_leaf(word: str, protocol: Protocol, value: object, terms: Terms) -> Matcher:
    if terms.datagrams and not protocol.in_datagrams:
        known = ", ".join(name for name, each in PROTOCOLS.items() if each.in_datagrams)
        raise OptionError(f"{word} needs a stream; datagrams can be: {known}")
    if terms.datagrams is False and not protocol.in_streams:
        raise OptionError(f"{word} comes in datagrams: it wants `protocol: udp`")
    matcher = protocol.build(value, terms)
    # A speaker tells its client that a request breaks off.
    if terms.datagrams and matcher.reads and not isinstance(matcher, Speaker):
        return matcher if matcher.spans_datagrams else Whole(matcher)
    return matcher


def _below(key: str) -> str:
    return key if not key or key.startswith("[") else f".{key}"

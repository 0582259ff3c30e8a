"""The smaller protocols: what their first packets may be, byte by byte."""

from __future__ import annotations

import pytest

from pyforwarder.core.first_packet.options import OptionError
from pyforwarder.core.first_packet.outcome import (
    MATCH,
    NEED_MORE,
    NO_MATCH,
    Outcome,
    Refuse,
    Route,
    Send,
)
from tests.helpers.dialogue import talk
from tests.helpers.first_packets import CLIENTS, TURNS, decided_after, matcher
from tests.helpers.rules import ruleset

SSL_REQUEST = bytes.fromhex("0000000804d2162f")
GSS_REQUEST = bytes.fromhex("0000000804d21630")
CANCEL = bytes.fromhex("0000001004d2162e") + bytes(8)


def startup(*words: bytes, version: int = 3 << 16) -> bytes:
    body = version.to_bytes(4, "big") + b"".join(word + b"\0" for word in words) + b"\0"
    return (len(body) + 4).to_bytes(4, "big") + body


def query(name: bytes, *, flags: int = 0x0100, counts: str = "0001000000000000") -> bytes:
    body = b"\x12\x34" + flags.to_bytes(2, "big") + bytes.fromhex(counts) + name + b"\0\1\0\1"
    return len(body).to_bytes(2, "big") + body


def connection_request(rest: bytes, *, code: int = 0xE0) -> bytes:
    return (
        b"\x03\x00"
        + (len(rest) + 11).to_bytes(2, "big")
        + bytes([len(rest) + 6, code, 0, 0, 0, 0, 0])
        + rest
    )


COOKIE = b"Cookie: mstshash=Alice\r\n"
XMPP = b"<?xml version='1.0'?>\n<stream:stream xmlns='jabber:client' to=\"chat.example\" id='1'>"

# What stands after `match:`, the bytes, the outcome, and after how many bytes it is known.
CASES: list[tuple[object, bytes, Outcome, int]] = [
    ("ssh", b"SSH-2.0-x\r\n", MATCH, 4),
    ("ssh", b"SSL", NO_MATCH, 3),
    ("http2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0", MATCH, 24),
    ("http2", b"PRI * HTTP/1.1\r\n", NO_MATCH, 12),
    ("redis", b"*2\r\n$4\r\nPING", MATCH, 8),
    ("redis", b"*0\r\n", NO_MATCH, 2),
    ("redis", b"*12345678", NO_MATCH, 9),
    ("redis", b"*1\n", NO_MATCH, 3),
    ("redis", b"PING\r\n", NO_MATCH, 1),
    ("adb", b"CNXN" + bytes(16) + bytes([0xBC, 0xB1, 0xA7, 0xB1]), MATCH, 24),
    ("adb", b"CNXN" + bytes(16) + bytes([0xBC, 0xB1, 0xA7, 0xB0]), NO_MATCH, 24),
    ("adb", b"CNXX", NO_MATCH, 4),
    ("openvpn", bytes.fromhex("000e38"), MATCH, 3),
    ("openvpn", bytes.fromhex("010050"), MATCH, 3),
    ("openvpn", bytes.fromhex("000d38"), NO_MATCH, 2),
    ("openvpn", bytes.fromhex("09"), NO_MATCH, 1),
    ("openvpn", bytes.fromhex("000e39"), NO_MATCH, 3),
    ("mqtt", bytes.fromhex("101000044d51545404"), MATCH, 9),
    ("mqtt", bytes.fromhex("101000044d51545484"), MATCH, 9),
    ("mqtt", bytes.fromhex("101000044d51545406"), NO_MATCH, 9),
    ("mqtt", bytes.fromhex("101000044d51545403"), NO_MATCH, 9),
    ("mqtt", bytes.fromhex("100600044d51545404"), NO_MATCH, 9),
    ("mqtt", bytes.fromhex("10ffffffff7f"), NO_MATCH, 5),
    ("mqtt", bytes.fromhex("101000044d51580404"), NO_MATCH, 7),
    ({"mqtt": {"client_id": "a"}}, bytes.fromhex("100d00044d5154540402003c000161"), MATCH, 15),
    ({"mqtt": {"client_id": "a"}}, bytes.fromhex("100d00044d5154540402003c000162"), NO_MATCH, 15),
    ({"mqtt": {"client_id": "*"}}, bytes.fromhex("100d00044d5154540402003c0001ff"), NO_MATCH, 15),
    ({"mqtt": {"client_id": "*"}}, bytes.fromhex("100d00044d5154540403003c000161"), NO_MATCH, 10),
    ({"mqtt": {"client_id": "*"}}, bytes.fromhex("100d00044d5154540402003c00026161"), NO_MATCH, 16),
    ("dns", query(b"\1a\0"), MATCH, 21),
    ("dns", query(b"\0"), MATCH, 19),
    ("dns", query(b"\1a\0", flags=0x8100), NO_MATCH, 5),
    ("dns", query(b"\1a\0", flags=0x0102), NO_MATCH, 6),
    ("dns", query(b"\1a\0", flags=0x0120), MATCH, 21),
    ("dns", query(b"\1a\0", counts="0002000000000000"), NO_MATCH, 8),
    ("dns", query(b"\1a\0", counts="0001000100000000"), NO_MATCH, 10),
    ("dns", query(b"\1a\0", counts="0001000000000001"), MATCH, 21),
    ("dns", query(b"\xc0\x0c"), NO_MATCH, 15),
    ("dns", query(b"\x3f" + b"a" * 63 + (b"\x3f" + b"a" * 63) * 3 + b"\0"), NO_MATCH, 207),
    ("dns", b"\x05", NO_MATCH, 1),
    ("dns", b"\x04\x01", NO_MATCH, 2),
    ("dns", b"\x00\x10", NO_MATCH, 2),
    ({"dns": {"qname": "A.b."}}, query(b"\1a\1B\0"), MATCH, 23),
    ({"dns": {"qname": "a.b"}}, query(b"\3a.b\0"), MATCH, 23),
    ({"dns": {"qname": "a"}}, query(b"\1a\1b\0"), NO_MATCH, 23),
    ("rdp", connection_request(b""), MATCH, 11),
    ("rdp", connection_request(COOKIE), MATCH, 11),
    ("rdp", connection_request(b"", code=0xF0), NO_MATCH, 6),
    ("rdp", b"\x03\x00\x00\x0b\x07", NO_MATCH, 5),
    ("rdp", b"\x03\x00\x01\x04\xff", NO_MATCH, 5),
    ("rdp", b"\x02", NO_MATCH, 1),
    ({"rdp": {"cookie": "alice"}}, connection_request(COOKIE), MATCH, 35),
    ({"rdp": {"cookie": "bob"}}, connection_request(COOKIE), NO_MATCH, 35),
    ({"rdp": {"cookie": "*"}}, connection_request(b"Cookie: msts=1.2.3\r\n"), NO_MATCH, 31),
    ({"rdp": {"cookie": "*"}}, connection_request(COOKIE[:-2]), NO_MATCH, 33),
    ({"rdp": {"cookie": "*"}}, connection_request(b""), NO_MATCH, 11),
    ("postgres", SSL_REQUEST, MATCH, 8),
    ("postgres", GSS_REQUEST, MATCH, 8),
    ("postgres", CANCEL, MATCH, 8),
    ("postgres", startup(b"user", b"a"), MATCH, 8),
    ("postgres", startup(b"user", b"a", version=2 << 16), NO_MATCH, 8),
    ("postgres", b"\0\0\0\x09\x04\xd2\x16\x2f", NO_MATCH, 8),
    ("postgres", b"\0\0\x27\x11", NO_MATCH, 4),
    ("postgres", b"\0\1", NO_MATCH, 2),
    ({"postgres": {"user": "a"}}, startup(b"user", b"a"), MATCH, 16),
    ({"postgres": {"database": "a"}}, startup(b"user", b"a"), MATCH, 16),
    ({"postgres": {"database": "b"}}, startup(b"database", b"b", b"user", b"a"), MATCH, 27),
    ({"postgres": {"user": "a"}}, startup(b"user", b"b"), NO_MATCH, 16),
    ({"postgres": {"user": "*"}}, startup(b"database", b"a"), NO_MATCH, 20),
    ({"postgres": {"user": "a"}}, startup(b"user", b"a", b"user", b"b"), NO_MATCH, 23),
    ({"postgres": {"user": "a"}}, startup(b"user"), NO_MATCH, 14),
    ({"postgres": {"user": "*"}}, CANCEL, NO_MATCH, 8),
    ("xmpp", XMPP, MATCH, 37),
    ("xmpp", b"<stream:stream to='a'>", MATCH, 15),
    ("xmpp", b"<stream:streams", NO_MATCH, 15),
    ("xmpp", b"<?xml <", NO_MATCH, 7),
    ({"xmpp": {"to": "CHAT.example"}}, XMPP, MATCH, len(XMPP)),
    ({"xmpp": {"to": "chat"}}, XMPP, NO_MATCH, len(XMPP)),
    ({"xmpp": {"to": "a"}}, b"<stream:stream not-to='a'>", NO_MATCH, 26),
    ({"xmpp": {"to": "a"}}, b"<stream:stream " + b"x" * 4081, NO_MATCH, 4096),
    ({"bytes": "GET "}, b"GET /", MATCH, 4),
    ({"bytes": {"prefix": "hex:00 16"}}, b"\0\x17", NO_MATCH, 2),
    ({"bytes": {"prefix": ["a", "ab", "xyz"]}}, b"ab", MATCH, 1),
    ({"bytes": {"prefix": ["xyz", "xw"]}}, b"xw", MATCH, 2),
    ({"bytes": {"prefix": "b", "offset": 2}}, b"aab", MATCH, 3),
    ({"bytes": {"prefix": "b", "offset": 2}}, b"aaa", NO_MATCH, 3),
    ({"bytes": {"prefix": "ü"}}, "ü".encode(), MATCH, 2),
    ("any", b"", MATCH, 0),
]


@pytest.mark.parametrize(("match", "data", "outcome", "after"), CASES)
def test_a_first_packet_byte_by_byte(
    match: object, data: bytes, outcome: Outcome, after: int
) -> None:
    assert decided_after(match, data) == (outcome, after)
    assert decided_after(match, data + b"\0\xfftrailing\r\n") == (outcome, after)


MISTAKES: list[tuple[object, str, str]] = [
    ({"bytes": {"prefx": "x"}}, "bytes.prefx", "did you mean prefix?"),
    ({"bytes": {}}, "bytes.prefix", "says no prefix"),
    ({"bytes": "hex:0"}, "bytes", "pairs of hexadecimal digits"),
    ({"bytes": ""}, "bytes", "empty"),
    ({"bytes": {"prefix": "a", "offset": -1}}, "bytes.offset", "0 to 65535"),
    ({"tls": {"snii": "x"}}, "tls.snii", "did you mean sni?"),
    ({"tls": {"version": "1.4"}}, "tls.version", "1.3"),
    ({"tls": {"sni": []}}, "tls.sni", "empty list"),
    ({"tls": {"sni": [True]}}, "tls.sni", "wants text"),
    ({"tls": "x"}, "tls", "wants options in braces"),
    ({"http": {"header": "x"}}, "http.header", "{name: value}"),
    ({"http": {"Host": "x"}}, "http.Host", "did you mean host?"),
    ({"socks": {"version": 6}}, "socks.version", "not one of 4, 5"),
    ({"ssh": {"version": 2}}, "ssh.version", "known options: none"),
    ({"client": "10.0.0.0/33"}, "client", "10.0.0.0/33"),
    ({"client": None}, "client", "says no network"),
    ({"port": "1-70000"}, "port", "70000"),
    ({"regex": "a("}, "regex", "never closed"),
    ({"regex": "a$"}, "regex", "a first packet has no end"),
    ({"regex": r"\bx"}, "regex", "looks at what follows"),
    ({"regex": "(?=a)"}, "regex", "not understood"),
    ({"regex": "ü"}, "regex", r"\xHH"),
    ({"regex": "a" * 501}, "regex", "500 characters"),
    ({"regex": "(a{1000}){1000}"}, "regex", "1000000 steps"),
    ({"regex": "^a{0,9999}b"}, "regex", "10001 steps"),
    ({"regex": "^" + ".{0,900}" * 40 + "x"}, "regex", "36002 steps"),
    ({"regex": "^[a-zA-Z0-9._-]{1,400}@"}, "regex", "steps"),
    ({"regex": "(" * 249 + ")" * 249}, "regex", "nested more than 50"),
    ({"tsl": {}}, "", "did you mean tls?"),
    ({"any_of": []}, "any_of", "at least one"),
    ({"any_of": ["tls", {"bytes": {}}]}, "any_of[1].bytes.prefix", "says no prefix"),
    ({"all": ["tls", "tsl"]}, "all[1]", "did you mean tls?"),
    ({"not": {}}, "not", "wants a protocol's name"),
    ({}, "", "wants a protocol's name"),
    (7, "", "wants a protocol's name"),
]


@pytest.mark.parametrize(("match", "key", "reason"), MISTAKES)
def test_a_mistake_in_a_match_is_named(match: object, key: str, reason: str) -> None:
    with pytest.raises(OptionError) as caught:
        matcher(match)
    assert caught.value.key == key
    assert reason in caught.value.reason


def test_conditions_nest_only_so_deep() -> None:
    match: object = "tls"
    for _ in range(40):
        match = {"not": match}
    with pytest.raises(OptionError, match="nested more than"):
        matcher(match)


# PostgreSQL asks for encryption before it says who it is.

APP = ruleset({"match": {"postgres": {"user": "app", "database": "app_*"}}, "to": "127.0.0.1:1"})


@pytest.mark.parametrize("name", ["postgres-psql", "postgres-psql-gss"])
def test_a_postgres_client_is_asked_for_its_user(name: str) -> None:
    ended = talk(APP, TURNS[name])
    assert isinstance(ended.decision, Route)
    assert (ended.said, ended.rest) == (b"N", TURNS[name][1])
    ended = talk(APP, [GSS_REQUEST, *(bytes([byte]) for byte in b"".join(TURNS[name]))])
    assert isinstance(ended.decision, Route)
    assert (ended.said, ended.rest) == (b"NN", TURNS[name][1])


def test_a_postgres_client_that_asks_for_ever_is_refused() -> None:
    ended = talk(APP, [SSL_REQUEST] * 5)
    assert isinstance(ended.decision, Refuse)
    assert ended.said == b"NNNN"


def test_rules_before_the_one_that_asked_are_not_asked_again() -> None:
    # They said no match to bytes that are gone; what comes now is another message.
    rules = ruleset(
        {"match": {"bytes": TURNS["postgres-psql"][1][:4].decode("ascii")}, "reject": "close"},
        {"match": {"postgres": {"user": "app"}}, "to": "127.0.0.1:1"},
        {"match": "any", "to": "127.0.0.1:2"},
    )
    ended = talk(rules, TURNS["postgres-psql"])
    assert isinstance(ended.decision, Route)
    assert ended.decision.rule.index == 1


def test_without_conditions_encryption_is_between_client_and_server() -> None:
    rules = ruleset({"match": "postgres", "to": "127.0.0.1:1"})
    ended = talk(rules, [SSL_REQUEST])
    assert isinstance(ended.decision, Route)
    assert (ended.said, ended.rest) == (b"", SSL_REQUEST)


def test_a_question_is_only_asked_while_it_can_be_answered() -> None:
    state = APP.begin()
    assert APP.decide(SSL_REQUEST[:7], client=None, local_port=0, state=state) is NEED_MORE
    decision = APP.decide(SSL_REQUEST, client=None, local_port=0, state=state)
    assert decision == Send(b"N", 8)


def test_found_says_what_was_read() -> None:
    for name, match, words in (
        ("mqtt-mosquitto", "mqtt", "client id 'sensor-7'"),
        ("dns-dig", "dns", "asks for host.internal.example"),
        ("postgres-psql-plain", "postgres", "user 'app', database 'app'"),
        ("xmpp-slixmpp", "xmpp", "to 'chat.example.com'"),
        ("tls-openssl-1.2", "tls", "server name old.example.org, version 1.2"),
    ):
        assert matcher(match).describe(CLIENTS[name]) == words
    assert matcher("rdp").describe(connection_request(COOKIE)) == "cookie 'Alice'"

"""Protocols whose first word is a datagram, or several: `dtls`, `stun`, `wireguard`, `dns`."""

from __future__ import annotations

import random
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.first_packet.datagrams import Datagrams
from pyforwarder.core.first_packet.dtls import MOST_RECORDS
from pyforwarder.core.first_packet.options import OptionError
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, End, Outcome
from pyforwarder.core.first_packet.table import PROTOCOLS, Terms, build
from pyforwarder.core.routing import Refuse, Route, Ruleset
from pyforwarder.core.rule_compiling import compile_rules
from tests.helpers.quic import hello, split_hello

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMED = {"dtls": {"sni": "*.example.com"}}

# `openssl s_client -dtls1_2 -alpn h2,coap -servername dtls.example.com`, OpenSSL 3.0.
OPENSSL = bytes.fromhex(
    "16feff000000000000000000e7010000db00000000000000dbfefdba4aed2704c51062b805d456cf01d4fb57644d17"
    "83333b51873280577899e63100000038c02cc030009fcca9cca8ccaac02bc02f009ec024c028006bc023c0270067c0"
    "0ac0140039c009c0130033009d009c003d003c0035002f00ff0100007900000015001300001064746c732e6578616d"
    "706c652e636f6d000b000403000102000a000c000a001d0017001e00190018002300000010000a000802683204636f"
    "61700016000000170000000d002a0028040305030603080708080809080a080b080408050806040105010601030303"
    "010302040205020602"
)
# RFC 5769 section 2.1.
STUN = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae8022001053545554207465737420636c69656e74002400046e0001"
    "ff80290008932ff9b151263b36000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3"
    "f249c1b571a280280004e57a3bcf"
)


def said(match: object, datagrams: Sequence[bytes] | bytes) -> Outcome:
    first = [datagrams] if isinstance(datagrams, bytes) else datagrams
    matcher = build(match, Terms(datagrams=True))
    return matcher.match(Datagrams(first), End.OPEN, None, 0)


# DTLS


def record(content: bytes, *, version: int = 0xFEFD, epoch: int = 0, kind: int = 22) -> bytes:
    head = bytes([kind]) + version.to_bytes(2, "big") + epoch.to_bytes(2, "big") + bytes(6)
    return head + len(content).to_bytes(2, "big") + content


def fragment(
    body: bytes, start: int = 0, stop: int | None = None, *, sequence: int = 0, kind: int = 1
) -> bytes:
    part = body[start:stop]
    return (
        bytes([kind])
        + len(body).to_bytes(3, "big")
        + sequence.to_bytes(2, "big")
        + start.to_bytes(3, "big")
        + len(part).to_bytes(3, "big")
        + part
    )


BODY = hello("d.example.com", cookie=b"", alpn=[b"webrtc"])


def test_client_of_openssl_is_read() -> None:
    matcher = build({"dtls": {"sni": "dtls.example.com"}}, Terms(datagrams=True))
    assert matcher.match(OPENSSL, End.FULL, None, 0) is MATCH
    assert matcher.facts(OPENSSL) == (("sni", "dtls.example.com"),)
    assert matcher.describe(OPENSSL) == "server name dtls.example.com, alpn h2 coap"
    assert said({"dtls": {"alpn": "coap"}}, OPENSSL) is MATCH
    assert said({"dtls": {"alpn": "webrtc"}}, OPENSSL) is NO_MATCH
    assert said("dtls", OPENSSL) is MATCH


@pytest.mark.parametrize("version", [0xFEFF, 0xFEFD])
@pytest.mark.parametrize("cookie", [b"", b"c" * 20, b"c" * 255])
def test_hello_with_and_without_a_cookie(version: int, cookie: bytes) -> None:
    body = hello("d.example.com", cookie=cookie)
    sequence = 1 if cookie else 0
    assert said(NAMED, record(fragment(body, sequence=sequence), version=version)) is MATCH


def test_fragments_come_in_any_order_and_arrangement() -> None:
    parts = [fragment(BODY, start, start + 30) for start in range(0, len(BODY), 25)]
    for order in permutations(range(3)):
        datagrams = [b"".join(record(part) for part in parts[which::3]) for which in order]
        assert said(NAMED, datagrams) is MATCH
        assert said(NAMED, datagrams[:2]) is NEED_MORE
        assert said(NAMED, [datagrams[0], datagrams[0], b"", b"\x17", *datagrams[1:]]) is MATCH
    assert said(NAMED, record(b"".join(parts))) is MATCH


def test_bare_word_takes_the_first_fragment() -> None:
    assert said("dtls", record(fragment(BODY, 0, 10))) is MATCH
    assert said(NAMED, record(fragment(BODY, 0, 10))) is NEED_MORE


def test_fragments_of_another_hello_are_left_out() -> None:
    other = hello("x.example.com", cookie=b"c" * 20, alpn=[b"webrtc"])
    first = record(fragment(BODY, 0, 40))
    assert said(NAMED, [first, record(fragment(other, sequence=1))]) is NEED_MORE
    assert said(NAMED, [first, record(fragment(BODY, 40))]) is MATCH


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        OPENSSL[:-1],
        record(fragment(BODY), version=0x0303),
        record(fragment(BODY), epoch=1),
        record(fragment(BODY), kind=23),
        record(fragment(BODY, kind=2)),
        record(b""),
        record(fragment(BODY)[:-1]),
        record(fragment(hello("d.example.com")[4:])),  # without the cookie's length
        record(
            fragment(BODY, 0, 60) + fragment(BODY[:55] + b"\xff" + BODY[56:], 50)
        ),  # contradicts
        record(fragment(BODY, 0, 40) + fragment(BODY + b"x", 40)),  # another length
        record(fragment(b"")),
        b"".join(record(fragment(BODY, 0, 1)) for _ in range(MOST_RECORDS + 1)),
    ],
    ids=range(13),
)
def test_what_is_no_hello_is_no_match(datagram: bytes) -> None:
    assert said(NAMED, datagram) is NO_MATCH


@given(st.data())
def test_hostile_datagrams_have_three_outcomes(data: st.DataObject) -> None:
    parts = [record(fragment(BODY, 0, 50)), record(fragment(BODY, 50)), STUN, OPENSSL]
    datagrams = []
    for _ in range(data.draw(st.integers(1, 3))):
        one = bytearray(data.draw(st.sampled_from(parts)))
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(one)))
            one[at : at + 1] = data.draw(st.binary(max_size=3))
        datagrams.append(bytes(one))
    for match in ("dtls", NAMED, {"not": NAMED}, "stun", "wireguard", "dns", "openvpn"):
        matcher = build(match, Terms(datagrams=True))
        assert isinstance(matcher.match(Datagrams(datagrams), End.OPEN, None, 0), Outcome)
        assert isinstance(matcher.describe(Datagrams(datagrams)), str)


# STUN


def test_stun_request_of_the_rfc_is_taken_from_datagrams_and_streams() -> None:
    assert said("stun", STUN) is MATCH
    assert said("stun", bytes.fromhex("001100002112a442") + bytes(12)) is MATCH  # an indication
    assert said("stun", bytes.fromhex("000300002112a442") + bytes(12)) is MATCH  # TURN's Allocate
    stream = build("stun", Terms(datagrams=False))
    answers = [stream.match(STUN[:size], End.OPEN, None, 0) for size in range(len(STUN) + 1)]
    assert answers == [NEED_MORE] * 8 + [MATCH] * (len(STUN) - 7)


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        STUN[:-4],
        STUN + bytes(4),
        STUN[:19],
        b"\x01\x01" + STUN[2:],  # a response
        b"\x01\x11" + STUN[2:],  # an error
        b"\x40\x01" + STUN[2:],  # TURN's ChannelData
        STUN[:4] + bytes(4) + STUN[8:],  # RFC 3489
        STUN[:3] + b"\x57" + STUN[4:-1],
    ],
    ids=repr,
)
def test_what_is_no_stun_request_is_no_match(datagram: bytes) -> None:
    assert said("stun", datagram) is NO_MATCH


# WireGuard


@pytest.mark.parametrize(
    ("kind", "size", "outcome"),
    [
        (1, 148, MATCH),
        (1, 147, NO_MATCH),
        (1, 149, NO_MATCH),
        (2, 92, NO_MATCH),
        (3, 64, NO_MATCH),
        (4, 32, MATCH),
        (4, 1456, MATCH),
        (4, 16, NO_MATCH),
        (4, 33, NO_MATCH),
        (0, 148, NO_MATCH),
        (5, 148, NO_MATCH),
    ],
)
def test_wireguard_is_known_by_type_and_size(kind: int, size: int, outcome: Outcome) -> None:
    datagram = bytes([kind, 0, 0, 0]) + random.Random(1).randbytes(size - 4)
    assert said("wireguard", datagram) is outcome
    assert said("wireguard", datagram[:1] + b"\x01" + datagram[2:]) is NO_MATCH


# DNS


def query(name: bytes, kind: int) -> bytes:
    labels = b"".join(bytes([len(label)]) + label for label in name.split(b"."))
    return (
        b"\x12\x34\x01\x00"
        + b"\0\1"
        + bytes(6)
        + labels
        + b"\0"
        + kind.to_bytes(2, "big")
        + b"\0\1"
    )


@pytest.mark.parametrize("written", ["TXT", "txt", "TYPE16", "16", 16, ["A", "TXT"]])
def test_type_of_a_query_is_asked_for(written: object) -> None:
    match = {"dns": {"qtype": written}}
    assert said(match, query(b"a.test", 16)) is MATCH
    assert said(match, query(b"a.test", 28)) is NO_MATCH
    framed = len(query(b"a.test", 16)).to_bytes(2, "big") + query(b"a.test", 16)
    assert build(match, Terms(datagrams=False)).match(framed, End.OPEN, None, 0) is MATCH


def test_name_and_type_must_both_hold() -> None:
    match = {"dns": {"qname": "*.test", "qtype": "AAAA"}}
    assert said(match, query(b"a.test", 28)) is MATCH
    assert said(match, query(b"a.test", 1)) is NO_MATCH
    assert said(match, query(b"a.other", 28)) is NO_MATCH
    describe = build(match, Terms(datagrams=True)).describe
    assert describe(query(b"a.test", 28)) == "asks for a.test, type AAAA"
    assert describe(query(b"a.test", 65280)) == "asks for a.test, type 65280"


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("AAAAA", "did you mean AAAA?"),
        ("TYPE0", "TYPE65280"),
        ("TYPE65536", "TYPE65280"),
        ("*", "ANY is a type"),
        ("", "no type of record"),
    ],
)
def test_type_that_no_query_has_is_an_error(written: str, reason: str) -> None:
    with pytest.raises(OptionError) as caught:
        build({"dns": {"qtype": written}}, Terms(datagrams=True))
    assert caught.value.key == "dns.qtype"
    assert reason in caught.value.reason


# Rules


def rules(*matches: object, **more: object) -> Ruleset:
    from pyforwarder.config import Listener

    listener = Listener.model_validate(
        {
            "bind": "127.0.0.1:9999",
            "protocol": "udp",
            "rules": [
                {"name": f"r{number}", "match": match, "to": f"127.0.0.1:{number + 1}", **more}
                for number, match in enumerate(matches)
            ],
        }
    )
    return compile_rules(listener)


def taken(ruleset: Ruleset, datagrams: Sequence[bytes], end: End = End.OPEN) -> str:
    decision = ruleset.decide(Datagrams(datagrams), client=None, local_port=9999, end=end)
    if decision is NEED_MORE:
        return "more"
    assert isinstance(decision, Route | Refuse)
    if isinstance(decision, Route) or decision.rule is not None:
        assert decision.rule is not None
        return decision.rule.name
    return decision.reason.value


def test_only_rules_that_another_datagram_may_help_are_waited_for() -> None:
    first, second = split_hello(hello(size=1800), 1000)
    ruleset = rules({"regex": "^never.{200}"}, {"quic": {"sni": "a.*"}}, "any")
    assert taken(ruleset, [first]) == "more"
    assert taken(ruleset, [first, second]) == "r1"
    assert taken(ruleset, [first], End.FULL) == "r2"
    assert taken(ruleset, [first], End.TIMEOUT) == "r2"
    assert taken(ruleset, [b"neverx"]) == "r2"
    assert taken(ruleset, [b""]) == "r2"


def test_rule_before_takes_what_it_matches_at_once() -> None:
    first, _ = split_hello(hello(size=1800), 1000)
    assert taken(rules("quic", {"quic": {"sni": "a.*"}}), [first]) == "r0"
    assert taken(rules({"bytes": "hex:c1"}, {"bytes": first[:1].decode("latin-1")}), [b"x"]) == (
        "no_match"
    )


def test_undecided_without_another_rule_is_refused() -> None:
    first, _ = split_hello(hello(size=1800), 1000)
    ruleset = rules({"quic": {"sni": "a.*"}})
    assert taken(ruleset, [first], End.TIMEOUT) == "timeout"
    assert taken(ruleset, [first], End.FULL) == "no_match"
    assert not rules("quic", "dns").spans_datagrams
    assert ruleset.spans_datagrams


def test_condition_that_would_need_more_bytes_does_not_hold() -> None:
    # Under `not`, too: a datagram that is shorter than a prefix does not begin with it.
    match = {"bytes": {"prefix": "hex:01020304"}}
    assert taken(rules(match), [b"\x01\x02"]) == "no_match"
    assert taken(rules({"not": match}), [b"\x01\x02"]) == "r0"
    assert taken(rules({"not": match}), [b"\x01\x02\x03\x04"]) == "no_match"


def test_server_name_is_the_destination() -> None:
    first, second = split_hello(hello(size=1800), 1000)
    for match in ("quic", {"quic": {"alpn": "h3"}}, ["quic", "dtls"]):
        ruleset = rules(match, to="sni", allow=["any"])
        decision = ruleset.decide(
            Datagrams([first, second]), client=None, local_port=1, end=End.OPEN
        )
        assert isinstance(decision, Route)
        assert (str(decision.to), decision.named_by_client) == ("a.example.com:443", True)
    assert taken(rules("quic", to="sni", allow=["any"]), [first]) == "more"
    ruleset = rules("dtls", to="sni", port=5684, allow=["any"])
    decision = ruleset.decide(OPENSSL, client=None, local_port=1, end=End.OPEN)
    assert isinstance(decision, Route)
    assert str(decision.to) == "dtls.example.com:5684"
    nameless = record(fragment(hello(None, cookie=b"")))
    assert taken(ruleset, [nameless]) == "no_match"


def test_words_that_datagrams_may_be() -> None:
    words = {word for word, protocol in PROTOCOLS.items() if protocol.in_datagrams}
    assert words == {
        *("instruction", "any", "bytes", "regex", "dns", "openvpn"),
        *("stun", "quic", "dtls", "wireguard"),
    }

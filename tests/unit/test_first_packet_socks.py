"""SOCKS 4, 4a and 5 as dialogues, however the client's bytes are cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.address import Address
from pyforwarder.core.explaining import explain
from pyforwarder.core.first_packet.outcome import NEED_MORE, End, Refuse, Route, Send
from pyforwarder.core.reasons import CloseReason, RefusalCode
from tests.helpers.dialogue import Ended, talk
from tests.helpers.first_packets import TURNS
from tests.helpers.rules import ruleset

if TYPE_CHECKING:
    from pyforwarder.core.routing import Ruleset

RULE = {"name": "proxy", "match": "socks", "allow": ["any"]}
OPEN = ruleset(RULE)
USERS = ruleset({**RULE, "users": ["alice"]}, passwords={"alice": b"secret"})
GREETING = b"\x05\x01\x00"
NAMED = b"\x05\x01\x00\x03\x09a.example\x01\xbb"


def route(ended: Ended) -> Route:
    assert isinstance(ended.decision, Route), ended
    return ended.decision


def refusal(ended: Ended) -> Refuse:
    assert isinstance(ended.decision, Refuse), ended
    return ended.decision


CLIENTS = {
    "socks4-curl": (OPEN, "127.0.0.2:8080", b""),
    "socks4a-curl": (OPEN, "www.example.com:80", b""),
    "socks5-curl": (OPEN, "www.example.com:80", b"\x05\x00"),
    "socks5-curl-user": (USERS, "127.0.0.2:8080", b"\x05\x02\x01\x00"),
    "socks5-nc": (OPEN, "192.0.2.1:22", b"\x05\x00"),
    "socks5-ncat": (OPEN, "192.0.2.1:22", b"\x05\x00"),
}


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("cut", ["turns", "bytes", "at once", "with payload"])
def test_a_real_client_gets_to_its_destination(name: str, cut: str) -> None:
    rules, destination, answers = CLIENTS[name]
    # A GET is what the client sends on to the server.
    turns = [turn for turn in TURNS[name] if not turn.startswith(b"GET ")]
    whole = b"".join(turns)
    pieces = {
        "turns": turns,
        "bytes": [bytes([byte]) for byte in whole],
        "at once": [whole],
        "with payload": [whole + b"\x05payload"],
    }[cut]
    ended = talk(rules, pieces)
    assert str(route(ended).to) == destination
    assert ended.said == answers
    assert ended.rest == (b"\x05payload" if cut == "with payload" else b"")
    assert route(ended).named_by_client


@given(st.data())
def test_any_cut_gives_the_same_route(data: st.DataObject) -> None:
    whole = b"".join(TURNS["socks5-curl-user"][:3]) + b"payload"
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    ended = talk(USERS, pieces)
    assert (str(route(ended).to), ended.said) == ("127.0.0.2:8080", b"\x05\x02\x01\x00")
    assert b"payload".startswith(ended.rest)


def test_explain_follows_a_dialogue() -> None:
    whole = b"".join(TURNS["socks5-curl-user"][:3])
    told = explain(USERS, whole + b"payload")
    assert isinstance(told.decision, Route)
    assert (told.after_bytes, told.said) == (len(whole), (b"\x05\x02", b"\x01\x00"))


@pytest.mark.parametrize(
    ("request_", "destination"),
    [
        (b"\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x16", "192.0.2.1:22"),
        (b"\x05\x01\x00\x04" + bytes(15) + b"\x01\x00\x16", "[::1]:22"),
        (b"\x05\x01\x00\x04" + bytes(10) + b"\xff\xff\xc0\x00\x02\x01\x00\x16", "192.0.2.1:22"),
        (b"\x05\x01\x00\x03\x09192.0.2.1\x00\x16", "192.0.2.1:22"),
        (b"\x05\x01\x00\x03\x03::1\x00\x16", "[::1]:22"),
        (b"\x05\x01\x00\x03\x05[::1]\x00\x16", "[::1]:22"),
        (b"\x05\x01\xff\x03\x0aA.Example.\x00\x16", "a.example:22"),
    ],
)
def test_a_socks_5_destination(request_: bytes, destination: str) -> None:
    assert str(route(talk(OPEN, [GREETING, request_])).to) == destination


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"\x05\x02\x00\x01\xc0\x00\x02\x01\x00\x16", 7),  # BIND
        (b"\x05\x03\x00\x01\xc0\x00\x02\x01\x00\x16", 7),  # UDP ASSOCIATE
        (b"\x05\x01\x00\x02", 8),
        (b"\x04\x01\x00\x01", 1),
        (b"\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x00", 1),  # port 0
        (b"\x05\x01\x00\x03\x00\x00\x16", 1),  # no name
        (b"\x05\x01\x00\x03\x04a b\x00\x00\x16", 1),
        (b"\x05\x01\x00\x03\x0b192.0.2.1:5\x00\x16", 1),  # would be another destination
    ],
)
def test_a_socks_5_request_that_cannot_be_served(request_: bytes, code: int) -> None:
    decision = refusal(talk(OPEN, [GREETING, request_]))
    assert decision.reply == bytes([5, code, 0, 1]) + bytes(6)
    assert not decision.reset


@pytest.mark.parametrize(
    ("request_", "destination"),
    [
        (b"\x04\x01\x00\x16\xc0\x00\x02\x01\0", "192.0.2.1:22"),
        (b"\x04\x01\x00\x16\xc0\x00\x02\x01someone\0", "192.0.2.1:22"),
        (b"\x04\x01\x00\x16\0\0\0\x07me\0a.example\0", "a.example:22"),
        (b"\x04\x01\x00\x16\0\0\x01\x07\0", "0.0.1.7:22"),
    ],
)
def test_a_socks_4_destination(request_: bytes, destination: str) -> None:
    ended = talk(OPEN, [request_ + b"payload"])
    assert (str(route(ended).to), ended.rest) == (destination, b"payload")


@pytest.mark.parametrize(
    "request_",
    [
        b"\x04\x02\x00\x16\xc0\x00\x02\x01\0",  # BIND
        b"\x04\x01\x00\x00\xc0\x00\x02\x01\0",
        b"\x04\x01\x00\x16\0\0\0\x07\0\0",
        b"\x04\x01\x00\x16\xc0\x00\x02\x01" + b"u" * 256,
    ],
)
def test_a_socks_4_request_that_cannot_be_served(request_: bytes) -> None:
    assert refusal(talk(OPEN, [request_])).reply == b"\x00\x5b" + bytes(6)


def test_with_users_nobody_comes_in_without_a_password() -> None:
    decision = refusal(talk(USERS, [GREETING]))
    assert (decision.reply, decision.reason) == (b"\x05\xff", CloseReason.DENIED)
    decision = refusal(talk(USERS, [b"\x04\x01\x00\x16\xc0\x00\x02\x01\0"]))
    assert (decision.reply, decision.reason) == (b"\x00\x5d" + bytes(6), CloseReason.DENIED)
    for wrong in (b"\x01\x05alice\x06Secret", b"\x01\x03bob\x06secret", b"\x01\x05alice\x00"):
        decision = refusal(talk(USERS, [b"\x05\x02\x00\x02", wrong]))
        assert (decision.reply, decision.reason) == (b"\x01\x01", CloseReason.DENIED)
    assert refusal(talk(USERS, [b"\x05\x01\x02", b"\x05\x01\x00"])).reason is CloseReason.MALFORMED


@pytest.mark.parametrize("code", RefusalCode)
def test_every_refusal_is_a_reply_of_the_clients_version(code: RefusalCode) -> None:
    five = route(talk(OPEN, [GREETING, NAMED])).negotiation
    four = route(talk(OPEN, [b"\x04\x01\x00\x16\xc0\x00\x02\x01\0"])).negotiation
    assert five is not None
    assert four is not None
    assert five.refused(code)[:2] in {bytes([5, n]) for n in range(1, 9)}
    assert len(five.refused(code)) == 10
    assert four.refused(code) == b"\x00\x5b" + bytes(6)


def test_the_source_is_told_to_a_socks_5_client() -> None:
    negotiation = route(talk(OPEN, [GREETING, NAMED])).negotiation
    assert negotiation is not None
    assert negotiation.granted(Address("192.0.2.9", 258)) == b"\x05\0\0\x01\xc0\0\x02\x09\x01\x02"
    assert negotiation.granted(Address("::1", 258)) == b"\x05\0\0\x04" + bytes(15) + b"\x01\x01\x02"
    assert negotiation.granted(None) == b"\x05\0\0\x01" + bytes(6)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (End.TIMEOUT, CloseReason.TIMEOUT),
        (End.FULL, CloseReason.MALFORMED),
        (End.EOF, CloseReason.CLIENT_GONE),
    ],
)
def test_a_dialogue_that_breaks_off(end: End, reason: CloseReason) -> None:
    state = OPEN.begin()
    assert isinstance(OPEN.decide(GREETING, client=None, local_port=0, state=state), Send)
    assert OPEN.decide(b"\x05\x01", client=None, local_port=0, state=state) is NEED_MORE
    decision = OPEN.decide(b"\x05\x01", client=None, local_port=0, state=state, end=end)
    assert isinstance(decision, Refuse)
    assert decision.reason is reason
    assert decision.rule is not None
    assert decision.rule.name == "proxy"


def test_once_a_dialogue_has_begun_no_other_rule_is_asked() -> None:
    rules: Ruleset = ruleset(RULE, {"match": "tls", "to": "127.0.0.1:1"})
    ended = talk(rules, [GREETING, b"\x16\x03\x01\x00\x05\x01"])
    assert refusal(ended).reply == b"\x05\x01\x00\x01" + bytes(6)


@given(st.lists(st.binary(max_size=30), max_size=6), st.booleans())
def test_random_talk_ends_in_a_decision_or_waits(pieces: list[bytes], asks_users: bool) -> None:
    ended = talk(USERS if asks_users else OPEN, [b"\x05\x02\x00\x02", *pieces])
    assert ended.decision is NEED_MORE or isinstance(ended.decision, Route | Refuse)

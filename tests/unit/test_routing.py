"""Which rule takes a connection, when that is known, and what `explain` says about it."""

from __future__ import annotations

import base64
import functools
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.address import Address, HostPort
from pyforwarder.core.explaining import explain
from pyforwarder.core.first_packet import http, tls
from pyforwarder.core.first_packet.outcome import (
    MATCH,
    NEED_MORE,
    NO_MATCH,
    End,
    Refuse,
    Route,
    Send,
)
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.rule_compiling import compile_rules
from pyforwarder.core.token import TokenKeys, make
from pyforwarder.errors import ConfigError
from tests.helpers.first_packets import CLIENTS, client_hello, mutated_clients
from tests.helpers.instruction import instruction
from tests.helpers.rules import ruleset

if TYPE_CHECKING:
    from types import FrameType

    from pyforwarder.core.routing import Decision, Ruleset

CLIENT = Address("192.0.2.7", 40000)
# Steps of CPython 3.11 (0.25 and 14 us): other versions count a little otherwise.
STEPS_OF_AN_INSTRUCTION: Final = 87
STEPS_OF_A_SERVER_NAME: Final = 5350


def decide(rules: Ruleset, data: bytes, end: End = End.OPEN) -> Decision:
    return rules.decide(data, client=CLIENT, local_port=9999, end=end, state=rules.begin())


def taken_by(decision: Decision) -> str:
    """The rule's name, or the outcome's."""
    if isinstance(decision, Route):
        return decision.rule.name
    if isinstance(decision, Refuse):
        return decision.rule.name if decision.rule else decision.reason.value
    return "says" if isinstance(decision, Send) else "need more"


def to(match: object, name: str) -> dict[str, object]:
    return {"name": name, "match": match, "to": "127.0.0.1:1"}


SHARED = ruleset(
    {"name": "named", "match": "instruction", "allow": ["loopback"]},
    to({"tls": {"sni": "*.example.com"}}, "web"),
    to("tls", "tls"),
    to({"http": {"host": "api.example.com"}}, "api"),
    to("ssh", "ssh"),
    {"name": "socks", "match": "socks", "allow": ["any"]},
    {"name": "connect", "match": "http_connect", "allow": ["any"]},
    to({"postgres": {"user": "app"}}, "app"),
    to("postgres", "postgres"),
    to({"regex": "^EHLO "}, "ehlo"),
    to("silence", "smtp"),
    {"name": "rest", "match": "any", "reject": "reset"},
)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (instruction("127.0.0.1:80"), "named"),
        (CLIENTS["tls-chrome"], "web"),
        (CLIENTS["tls-openssl-1.2"], "tls"),
        (CLIENTS["tls-openssl-no-name"], "tls"),
        (CLIENTS["http-curl"], "api"),
        (CLIENTS["ssh-openssh"], "ssh"),
        (CLIENTS["socks4a-curl"], "socks"),
        (CLIENTS["socks5-nc"], "says"),
        (CLIENTS["http-connect-ncat"], "connect"),
        (CLIENTS["postgres-psql-plain"], "app"),
        (CLIENTS["postgres-psql"], "says"),
        (b"EHLO x\r\n", "ehlo"),
        (CLIENTS["http-curl-post"], "rest"),
        (CLIENTS["mqtt-curl"], "rest"),
        (CLIENTS["openvpn"], "rest"),
    ],
)
def test_one_port_serves_them_all(data: bytes, name: str) -> None:
    assert taken_by(decide(SHARED, data)) == name
    answers = [taken_by(decide(SHARED, data[:n])) for n in range(len(data) + 1)]
    after = next(n for n, answer in enumerate(answers) if answer != "need more")
    assert answers[after:] == [name] * (len(answers) - after)


@pytest.mark.parametrize(
    ("data", "end", "name"),
    [
        (b"", End.TIMEOUT, "smtp"),
        (b"", End.EOF, "client_gone"),
        (CLIENTS["tls-chrome"][:900], End.TIMEOUT, "tls"),
        (CLIENTS["tls-chrome"][:5], End.TIMEOUT, "rest"),
        (CLIENTS["tls-chrome"][:5], End.FULL, "rest"),
        (b"EHLO", End.EOF, "rest"),
        (b"1", End.TIMEOUT, "rest"),
    ],
)
def test_when_no_more_can_come_a_matcher_that_needs_more_has_not_matched(
    data: bytes, end: End, name: str
) -> None:
    assert decide(SHARED, data) is NEED_MORE
    assert taken_by(decide(SHARED, data, end)) == name


LATE = "first_packet.timeout is over"
FEW = ruleset(to("ssh", "ssh"), {"name": "named", "match": "instruction", "allow": ["loopback"]})


@pytest.mark.parametrize(
    ("data", "end", "decision"),
    [
        (b"x", End.OPEN, Refuse(None, CloseReason.NO_MATCH, b"", True, "no rule matches")),
        (b"SS", End.FULL, Refuse(None, CloseReason.NO_MATCH, b"", True, "no rule matches")),
        (b"SS", End.EOF, Refuse(None, CloseReason.NO_MATCH, b"", True, "no rule matches")),
        (b"SS", End.TIMEOUT, Refuse(None, CloseReason.TIMEOUT, b"", True, LATE)),
        (b"", End.TIMEOUT, Refuse(None, CloseReason.TIMEOUT, b"", True, LATE)),
        (b"", End.EOF, Refuse(None, CloseReason.CLIENT_GONE, b"", reset=False)),
    ],
)
def test_nobody_takes_it(data: bytes, end: End, decision: Refuse) -> None:
    assert decide(FEW, data, end) == decision


TRUSTING = ruleset(
    {"match": {"tls": {"sni": "*.test"}}, "name": "sni", "to": "127.0.0.1:1"},
    {"match": "tls", "name": "any-tls", "to": "127.0.0.1:1"},
    {"match": {"http": {"host": "a.test"}}, "name": "host", "to": "127.0.0.1:1"},
    {"match": "http_connect", "allow": ["any"], "users": ["alice"]},
    {"match": "socks", "allow": ["any"], "users": ["alice"]},
    {"match": "instruction", "allow": ["any"], "token": "optional", "checksum": "required"},
    {"match": "any", "reject": "reset"},
    keys=TokenKeys({"ops": b"k" * 16}),
    passwords={"alice": b"secret"},
)


def basic(text: bytes) -> bytes:
    return b"Proxy-Authorization: Basic %b\r\n" % base64.b64encode(text)


def signed(key: bytes = b"k" * 16, expires_unix_s: int = 100) -> bytes:
    to = Address("192.0.2.9", 7)
    return make(to, expires_unix_s=expires_unix_s, key_id="ops", key=key)


def all_facts(data: bytes) -> tuple[dict[str, str], str]:
    """What the log is told of a decision, and the cause of a refusal."""
    state = TRUSTING.begin()
    while True:
        decision = TRUSTING.decide(data, client=CLIENT, local_port=1, now_unix_s=50.0, state=state)
        if not isinstance(decision, Send):
            break
        data = data[decision.skip :]
    assert isinstance(decision, Route | Refuse)
    facts = dict(decision.facts)
    if decision.rule is not None:
        facts |= dict(TRUSTING.facts(decision.rule, data))
    return facts, decision.cause if isinstance(decision, Refuse) else ""


CONNECT = b"CONNECT b.test:443 HTTP/1.1\r\n%b\r\n"
SOCKS = b"\5\1\2\1\5alice\6%b\5\1\0\1\x7f\0\0\1\0\7"


@pytest.mark.parametrize(
    ("data", "facts", "cause"),
    [
        (client_hello(b"A.test"), {"sni": "a.test"}, ""),
        (client_hello(b"b.other"), {}, ""),  # no name had to be read
        (b"GET / HTTP/1.1\r\nHost: A.test:80\r\n\r\n", {"host": "a.test"}, ""),
        (CONNECT % basic(b"alice:secret"), {"user": "alice"}, ""),
        (
            CONNECT % basic(b"alice:x"),
            {"user": "alice", "asked": "b.test:443"},
            "wrong user or password",
        ),
        (CONNECT % b"", {"asked": "b.test:443"}, "no password"),
        (b"CONNECT b.test HTTP/1.1\r\n\r\n", {}, "'b.test' has no :port: write b.test:PORT"),
        (SOCKS % b"secret", {"user": "alice"}, ""),
        (SOCKS % b"wrong!", {"user": "alice"}, "wrong user or password"),
        (b"\5\1\0", {}, "the client offers no method with a password"),
        (b"\4\1\0\7\x7f\0\0\1\0", {}, "SOCKS 4 has no password"),
        (b"\4\2\0\7\x7f\0\0\1\0", {}, "only CONNECT is served"),
        (signed(), {"key": "ops"}, ""),
        (
            signed(b"x" * 16),
            {"key": "ops", "asked": "192.0.2.9:7"},
            "token: wrong signature",
        ),
        (signed(expires_unix_s=49), {"key": "ops", "asked": "192.0.2.9:7"}, "token: expired"),
        (b"18127.0.0.1:900100", {}, "the check is '00', not '02'"),
        (b"18127.0.0.1:9001xx", {}, "an instruction that breaks off"),
        (b"18127.0.0.1:90 ", {}, "an instruction that breaks off"),
        (b"x", {}, "the rule says `reject: reset`"),
    ],
)
def test_a_decision_says_what_it_was_made_on(
    data: bytes, facts: dict[str, str], cause: str
) -> None:
    found, why = all_facts(data)
    assert found == facts
    assert why.startswith(cause) if cause.startswith("token") else why == cause


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (client_hello(b"B.other"), {"sni": "b.other"}),
        (b"GET / HTTP/1.1\r\nHost: b.other:80\r\n\r\n", {"host": "b.other"}),
        (b"SSH-2.0-x\r\n", {}),
        (client_hello(b"b.other")[:-1], {}),
    ],
)
def test_the_facts_of_a_first_packet_that_no_rule_takes_are_known(
    data: bytes, facts: dict[str, str]
) -> None:
    rules = ruleset(
        {"match": {"any_of": [{"tls": {"sni": "a.test"}}, {"not": "any"}]}, "to": "127.0.0.1:1"},
        {"match": {"http": {"host": "a.test"}}, "to": "127.0.0.1:2"},
        {"match": "any", "reject": "reset"},
    )
    assert dict(rules.read(data)) == facts


def test_an_unfinished_instruction_is_told_though_another_rule_waits_too() -> None:
    rules = ruleset(
        to({"bytes": {"prefix": "x", "offset": 50}}, "late"),
        {"name": "named", "match": "instruction", "allow": ["loopback"]},
    )
    decision = decide(rules, b"18127", End.TIMEOUT)
    assert isinstance(decision, Refuse)
    assert (taken_by(decision), decision.reason) == ("named", CloseReason.TIMEOUT)
    assert decision.reply.startswith(b"15ERR timeout")


def test_a_later_rule_waits_for_the_earlier_ones() -> None:
    rules = ruleset(to({"bytes": {"prefix": "b", "offset": 9}}, "first"), to("ssh", "second"))
    assert decide(rules, b"SSH-2.0-x") is NEED_MORE
    assert taken_by(decide(rules, b"SSH-2.0-xy")) == "second"
    assert taken_by(decide(rules, b"SSH-2.0-xb")) == "first"


def test_a_rule_about_the_client_only_needs_no_byte() -> None:
    rules = ruleset(to({"client": "192.0.2.0/24", "port": 9999}, "here"), to("any", "else"))
    assert taken_by(decide(rules, b"")) == "here"
    other = rules.decide(b"", client=Address("203.0.113.1", 1), local_port=9999)
    assert taken_by(other) == "else"


def test_rejections_say_how_to_end() -> None:
    for word, resets in (("reset", True), ("close", False)):
        decision = decide(ruleset({"match": "any", "reject": word}), b"")
        assert isinstance(decision, Refuse)
        assert (decision.reason, decision.reply) == (CloseReason.REJECTED, b"")
        assert decision.reset is resets


def test_of_combined_conditions_the_one_that_speaks_answers() -> None:
    rules = ruleset(
        {"name": "near", "match": {"client": "192.0.2.0/24", "any_of": ["instruction", "socks"]},
         "allow": ["any"]},
        to("any", "far"),
    )  # fmt: skip
    assert taken_by(decide(rules, instruction("10.0.0.1:5"))) == "near"
    assert taken_by(decide(rules, CLIENTS["socks4-curl"])) == "near"
    assert taken_by(decide(rules, CLIENTS["socks5-nc"])) == "says"
    assert taken_by(decide(rules, b"x")) == "far"
    away = rules.decide(instruction("10.0.0.1:5"), client=None, local_port=0, state=rules.begin())
    assert taken_by(away) == "far"


def test_rules_that_cannot_be_compiled_name_their_place() -> None:
    class Rule:
        name, match, allow, ack, checksum, token = "x", "tls", None, True, "lenient", "off"
        users: tuple[str, ...] = ()
        to = reject = datapath = None

    class Listener:
        protocol = "tcp"
        rules = (Rule(),)

    with pytest.raises(ConfigError, match="the client cannot say it") as caught:
        compile_rules(Listener(), path="listeners[3]")
    assert caught.value.path == "listeners[3].rules[0]"
    Rule.match, Rule.users = "socks", ("alice",)
    with pytest.raises(ConfigError, match="alice"):
        compile_rules(Listener())


@given(mutated_clients(), st.sampled_from(list(End)))
def test_hostile_bytes_are_decided_once_and_for_all(data: bytes, end: End) -> None:
    settled: str | None = None
    for length in range(len(data) + 1):
        answer = taken_by(decide(SHARED, data[:length]))
        if settled is None and answer != "need more":
            settled = answer
        if settled is not None:
            assert answer == settled
    final = decide(SHARED, data, end)
    assert end is End.OPEN or final is not NEED_MORE
    # A question is acted on when it comes up; a client that has gone is asked nothing any more.
    if settled is not None and not (settled == "says" and end in (End.EOF, End.TIMEOUT)):
        assert taken_by(final) == settled


@given(st.binary(max_size=80))
def test_explain_decides_what_decide_decides(data: bytes) -> None:
    told = explain(SHARED, data, client=CLIENT, local_port=9999)
    first = decide(SHARED, data)
    if isinstance(first, Send):
        assert told.said[0] == first.data
    else:
        assert told.decision == first
    assert 0 <= told.after_bytes <= len(data)


def test_explain_says_why_not_the_others() -> None:
    data = CLIENTS["tls-openssl-1.2"] + b"more"
    told = explain(SHARED, data, client=CLIENT, local_port=9999)
    assert taken_by(told.decision) == "tls"
    assert told.after_bytes == len(data) - 4
    reports = {report.rule.name: report for report in told.rules}
    assert (reports["named"].outcome, reports["named"].after_bytes) == (NO_MATCH, 1)
    assert reports["named"].why == "ruled out by byte 1 (0x16)"
    assert reports["web"].outcome is NO_MATCH
    assert reports["web"].why == "server name old.example.org, version 1.2"
    assert (reports["tls"].outcome, reports["tls"].after_bytes) == (MATCH, 6)
    assert reports["rest"].outcome is MATCH
    assert [report.rule.index for report in told.rules] == list(range(12))


def test_explain_calls_nothing_an_instruction_that_is_none() -> None:
    told = explain(FEW, b"GET / HTTP/1.1\r\n")
    assert [report.why for report in told.rules] == ["ruled out by byte 1 (0x47)"] * 2
    told = explain(FEW, b"18127.0.0.1;9001")
    assert told.rules[1].why == "begins like an instruction of 18 bytes and then breaks"
    told = explain(FEW, instruction("127.0.0.1:9001") + b"x")
    assert told.rules[1].why == "an instruction of 18 bytes"
    told = explain(FEW, b"18127")
    assert (told.decision, told.rules[1].why) == (NEED_MORE, "cannot tell from 5 bytes")


def steps_of(rules: Ruleset, *packets: bytes) -> list[int]:
    """How many steps Python's interpreter takes for the decision of each, after others.

    They are as many on every machine, busy or not. Give packets that differ to
    parsers that remember what they read last.
    """
    found = []
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    for data in (*packets, *packets):
        count = 0
        sys.settrace(trace)
        try:
            rules.decide(data, client=CLIENT, local_port=9999)
        finally:
            sys.settrace(before)
        found.append(count)
    return found[len(packets) :]


def test_a_decision_is_cheap() -> None:
    """As it was when that was counted, and half as much again: another algorithm is more."""
    default = ruleset({"match": "instruction", "allow": ["loopback"]})
    (steps,) = steps_of(default, instruction("127.0.0.1:9001"))
    assert steps < 1.5 * STEPS_OF_AN_INSTRUCTION
    by_name = ruleset(to({"tls": {"sni": "*.example.com"}}, "web"))
    most = max(steps_of(by_name, CLIENTS["tls-chrome"], CLIENTS["tls-firefox"]))
    assert most < 1.5 * STEPS_OF_A_SERVER_NAME


@pytest.mark.parametrize(
    ("condition", "data", "read"),
    [
        ({"tls": {"sni": "*.example.net"}}, CLIENTS["tls-chrome"], tls._hello_or_outcome),
        ({"http": {"host": "*.example.net"}}, CLIENTS["http-curl"], http._read_plain_request),
        ({"http": {"header": {"x": "a"}}}, CLIENTS["http-curl"], http._head_or_outcome),
        ({"http": {"path": "/x*"}}, CLIENTS["http-curl"], http._line_or_outcome),
    ],
)
def test_many_rules_read_a_first_packet_once(
    condition: object, data: bytes, read: functools._lru_cache_wrapper[object]
) -> None:
    rules = ruleset(*(to(condition, f"rule-{number}") for number in range(101)))
    read.cache_clear()
    assert taken_by(decide(rules, data)) == "no_match"
    assert (read.cache_info().misses, read.cache_info().hits) == (1, 100)


# `to: sni` and `to: host`.

NAMED = ruleset(
    {"name": "tls", "match": "tls", "to": "sni", "port": 8443, "allow": ["public"]},
    {"name": "http", "match": {"http": {"method": "GET"}}, "to": "host", "allow": ["public"]},
    {"name": "rest", "match": "any", "reject": "close"},
)


@pytest.mark.parametrize(
    ("data", "rule", "to"),
    [
        (client_hello(b"A.test"), "tls", HostPort("a.test", 8443)),
        (client_hello(b"192.0.2.7"), "tls", Address("192.0.2.7", 8443)),
        (b"GET / HTTP/1.1\r\nHost: b.test:81\r\n\r\n", "http", HostPort("b.test", 80)),
        (b"GET http://c.test/ HTTP/1.1\r\nHost: b.test\r\n\r\n", "http", HostPort("c.test", 80)),
        (b"GET / HTTP/1.1\r\nHost: [2001:db8::7]\r\n\r\n", "http", Address("2001:db8::7", 80)),
    ],
)
def test_the_name_in_the_first_packet_is_the_destination(
    data: bytes, rule: str, to: Address | HostPort
) -> None:
    decision = decide(NAMED, data + b"more")
    assert isinstance(decision, Route)
    assert (decision.rule.name, decision.to, decision.skip) == (rule, to, 0)
    assert decision.named_by_client
    for length in range(len(data)):
        assert decide(NAMED, data[:length]) is NEED_MORE
    assert explain(NAMED, data).after_bytes == len(data)


@pytest.mark.parametrize(
    "data",
    [
        client_hello(None),
        client_hello(b"a/b"),
        client_hello(b"127.1"),  # an IPv4 address in disguise
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a%00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_a_first_packet_without_a_usable_name_is_left_to_the_next_rule(data: bytes) -> None:
    assert taken_by(decide(NAMED, data)) == "rest"


@given(mutated_clients())
def test_hostile_names_are_a_destination_or_none(data: bytes) -> None:
    decision = decide(NAMED, data, End.FULL)
    if isinstance(decision, Route):
        assert isinstance(decision.to, Address | HostPort)


BEGINNINGS = [
    b"FWD1 ",
    signed()[:-9],
    b"CONNECT b.test:443 HTTP/1.1\r\n",
    b"18127.0",
    b"\4\1\0\7",
    b"",
]
PLAIN = ruleset(
    {"match": "http_connect", "allow": ["any"], "users": ["alice"]},
    {"match": {"socks": {"version": "4"}}, "allow": ["any"]},
    {"match": "instruction", "allow": ["any"], "token": "optional", "checksum": "required"},
    {"match": "any", "reject": "reset"},
    keys=TokenKeys({"ops": b"k" * 16}),
    passwords={"alice": b"secret"},
)


@given(st.sampled_from(BEGINNINGS), st.binary(max_size=40), st.booleans())
def test_the_cause_of_a_refusal_is_as_final_as_the_refusal(
    beginning: bytes, rest: bytes, is_long: bool
) -> None:
    data = beginning + rest + (b"x" * 600 + b"\r\n" if is_long else b"\r\n\r\n")
    first: Decision | None = None
    for length in range(len(data) + 1):
        decision = PLAIN.decide(data[:length], client=CLIENT, local_port=1, now_unix_s=50.0)
        if first is not None:
            assert decision == first
        elif decision is not NEED_MORE:
            first = decision

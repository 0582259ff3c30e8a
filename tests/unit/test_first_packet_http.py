"""HTTP requests: what a rule may rely on, and what servers might read in another way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.first_packet.http import (
    _head_or_outcome,
    _line_or_outcome,
    _read_plain_request,
)
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, End, Refuse, Route
from pyforwarder.core.reasons import CloseReason, RefusalCode
from tests.helpers.first_packets import CLIENTS, decided_after, mutated_clients, said
from tests.helpers.rules import ruleset

if TYPE_CHECKING:
    from pyforwarder.core.routing import Decision

HOST = {"http": {"host": "a.example"}}


def request(*headers: str, line: str = "GET / HTTP/1.1") -> bytes:
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1")


def test_the_request_line_decides_without_headers() -> None:
    data = request("Host: a.example")
    assert decided_after("http", data) == (MATCH, len(b"GET / HTTP/1.1\r\n"))
    assert decided_after({"http": {"path": "/x*"}}, data) == (NO_MATCH, 16)
    assert decided_after(HOST, data) == (MATCH, len(data))


@pytest.mark.parametrize(
    "head",
    [
        request("Host: a.example"),
        request("host:a.example"),
        request("HOST: \t a.example:8080 \t"),
        request("Host: A.EXAMPLE."),
        request("Host: b.example", line="GET http://a.example/ HTTP/1.1"),
        request(line="GET http://a.example HTTP/1.0"),
        request("Host: b.example", line="CONNECT a.example:443 HTTP/1.1"),
    ],
)
def test_the_host_is_a_example(head: bytes) -> None:
    assert decided_after(HOST, head)[0] is MATCH


@pytest.mark.parametrize(
    "head",
    [
        request("Host: b.example"),
        request("X: Host: a.example"),
        request(),
        request("Host: a.example", "Host: a.example"),
        request("Host: a.example", "Host: b.example"),
        request("Host : a.example"),
        request(" Host: a.example"),
        request("Accept: x", " y", "Host: a.example"),
        request("Host: a.example\0"),
        request("Host: a.example\rX: b"),
        request("Host: a.example/b"),
        request("Host: user@a.example"),
        request("Host: a.example", line="GET http://user@a.example/ HTTP/1.1"),
        request("Host: a.example").replace(b"\r\n", b"\n"),
        request("Host: a.example", line="get / HTTP/1.1"),
        request("Host: a.example", line="GET  / HTTP/1.1"),
        request("Host: a.example", line="GET / HTTP/2.0"),
        request("Host: a.example", line="GET / HTTP/1.1 "),
        request("Host: a.example", line="GET /"),
        request("Host: a.example", line="GET / x HTTP/1.1"),
        request("Host: a.example", line="GET /\t HTTP/1.1"),
    ],
)
def test_no_host_or_one_that_servers_may_disagree_about(head: bytes) -> None:
    assert decided_after(HOST, head)[0] is NO_MATCH


@pytest.mark.parametrize(
    ("data", "after"),
    [(b"\0", 1), (b"Ge", 2), (b"GET\t", 4), (b"GET / HTTP/2", 12), (b"A" * 30, 25)],
)
def test_the_first_wrong_byte_is_enough(data: bytes, after: int) -> None:
    assert decided_after("http", data + b" / HTTP/1.1\r\n\r\n") == (NO_MATCH, after)


def test_headers_are_all_wanted_and_one_value_each_is_enough() -> None:
    match = {"http": {"header": {"Upgrade": ["websocket", "h2c"], "x-tenant": "a*"}}}
    assert said(match, request("upgrade: h2c", "X-Tenant: b", "X-Tenant: abc")) is MATCH
    assert said(match, request("upgrade: h2c", "X-Tenant: b")) is NO_MATCH
    assert said(match, request("upgrade: h2c")) is NO_MATCH


def test_the_path_is_compared_as_it_is_sent_and_without_the_query() -> None:
    match = {"http": {"path": "/v1/*"}}
    assert said(match, request(line="GET /v1/?/v2 HTTP/1.1")) is MATCH
    assert said(match, request(line="GET http://h/v1/x HTTP/1.1")) is MATCH
    for target in ("/%76%31/x", "/V1/x", "/?/v1/x", "v1/x", "//v1/x", "*"):
        assert said(match, request(line=f"GET {target} HTTP/1.1")) is NO_MATCH


# The short way of reading, for a head that is as usual.

HTTP_CLIENTS = ("http-curl", "http-curl-post")


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Heads of requests, well made or nearly."""
    line = draw(st.sampled_from(["GET", "M-SEARCH", "CONNECT", "get"]))
    line += " " + draw(st.sampled_from(["/", "/a?b", "/\xe4", "*", "http://b/", "a.example:1"]))
    line += " " + draw(st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0"]))
    values = st.text("aB.:/[ \t\0\x7f\xe4", max_size=6)
    name = st.sampled_from(["Host", "hOST", "X-Host", "Host ", "", "a"])
    fields = st.builds(lambda name, value: f"{name}:{value}", name, values)
    data = bytearray(request(*draw(st.lists(fields, max_size=4)), line=line))
    data += draw(st.binary(max_size=3))
    if draw(st.booleans()):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.sampled_from(b" \t\r\n:aH\0"))
    return bytes(data)


@given(st.one_of(heads(), mutated_clients(HTTP_CLIENTS)))
def test_the_short_way_reads_what_the_long_one_does(data: bytes) -> None:
    plain = _read_plain_request(data)
    if plain is not None:
        assert _line_or_outcome(data) == (plain.method, plain.path)
        read = _head_or_outcome(data)
        assert isinstance(read, tuple)
        assert read[1] == plain.host


@pytest.mark.parametrize("name", HTTP_CLIENTS)
def test_the_short_way_is_that_of_real_clients(name: str) -> None:
    assert _read_plain_request(CLIENTS[name]) is not None


# CONNECT: the client names the destination.

CONNECT = ruleset({"match": "http_connect", "allow": ["any"]})


def connect(*headers: str, to: str = "a.example:443", body: bytes = b"") -> Decision:
    head = request(*headers, line=f"CONNECT {to} HTTP/1.1")
    return CONNECT.decide(head + body, client=None, local_port=0)


def test_connect_names_the_destination() -> None:
    decision = connect("Host: other.example", body=b"\x16\x03\x01")
    assert isinstance(decision, Route)
    assert str(decision.to) == "a.example:443"
    assert decision.skip == len(
        request("Host: other.example", line="CONNECT a.example:443 HTTP/1.1")
    )
    assert decision.negotiation is not None
    assert decision.negotiation.granted(None).startswith(b"HTTP/1.1 200 ")
    assert decision.named_by_client


@pytest.mark.parametrize("code", RefusalCode)
def test_every_refusal_is_a_whole_http_response(code: RefusalCode) -> None:
    decision = connect()
    assert isinstance(decision, Route)
    assert decision.negotiation is not None
    answer = decision.negotiation.refused(code)
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
    assert answer.endswith(b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(
    "to", ["a.example", "a.example:", "a.example:0", "http://a/", "::1:80", ""]
)
def test_a_broken_connect_is_told_so(to: str) -> None:
    decision = connect(to=to)
    assert isinstance(decision, Refuse)
    assert decision.reason is CloseReason.MALFORMED
    assert decision.reply.startswith(b"HTTP/1.1 400 ")


def test_other_methods_are_for_other_rules() -> None:
    assert said("http_connect", b"GET / HTTP/1.1\r\n\r\n") is NO_MATCH
    assert said("http_connect", b"CONNECT") is NEED_MORE
    assert said("http_connect", b"CONNECTING") is NO_MATCH


@pytest.mark.parametrize(
    ("end", "status"), [(End.TIMEOUT, b"408"), (End.FULL, b"431"), (End.EOF, b"400")]
)
def test_half_a_connect_is_answered_at_its_end(end: End, status: bytes) -> None:
    decision = CONNECT.decide(b"CONNECT a.example:443 HT", client=None, local_port=0, end=end)
    assert isinstance(decision, Refuse)
    assert decision.reply.startswith(b"HTTP/1.1 " + status)


USERS = ruleset(
    {"match": "http_connect", "allow": ["any"], "users": ["alice"]}, passwords={"alice": b"a:b"}
)


@pytest.mark.parametrize(
    ("header", "good"),
    [
        ("Basic YWxpY2U6YTpi", True),
        ("basic  YWxpY2U6YTpi", True),
        ("Basic YWxpY2U6YTo=", False),
        ("Basic YWxpY2U6YTpi YWxpY2U6YTpi", False),
        ("Basic YWxpY2U", False),
        ("Basic \xe4", False),
        ("Bearer YWxpY2U6YTpi", False),
        ("Basic Ym9iOmE6Yg==", False),
        ("", False),
    ],
)
def test_users_say_who_they_are(header: str, good: bool) -> None:
    head = request(f"Proxy-Authorization: {header}", line="CONNECT a.example:443 HTTP/1.1")
    decision = USERS.decide(head, client=None, local_port=0)
    if good:
        assert isinstance(decision, Route)
    else:
        assert isinstance(decision, Refuse)
        assert decision.reply.startswith(b"HTTP/1.1 407 ")
        assert b"\r\nProxy-Authenticate: Basic " in decision.reply

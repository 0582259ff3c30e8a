"""Patterns that no first packet can fit are refused, and say what to write instead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.first_packet.options import OptionError
from pyforwarder.core.first_packet.outcome import MATCH, NO_MATCH
from pyforwarder.core.first_packet.table import PROTOCOLS, Terms, build
from tests.helpers.first_packets import CLIENTS, client_hello, matcher, said


def query(*labels: bytes) -> bytes:
    """A DNS query as it stands in a datagram."""
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return b"\0\7\1\0\0\1\0\0\0\0\0\0" + name + b"\0\1\0\1"


def request(*headers: str) -> bytes:
    """A request with these headers."""
    return "\r\n".join(["GET / HTTP/1.1", "Host: a", *headers, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    ("match", "says"),
    [
        ({"tls": {"sni": "a.test:443"}}, "write a.test "),
        ({"tls": {"sni": "*:443"}}, "without the port"),
        ({"tls": {"sni": "https://a.test"}}, "URL"),
        ({"tls": {"sni": "a.test/x"}}, "no path"),
        ({"tls": {"sni": ".a.test"}}, "write *.a.test"),
        ({"tls": {"sni": "a..test"}}, "empty label"),
        ({"tls": {"sni": "a b.test"}}, "' '"),
        ({"tls": {"sni": ""}}, "empty"),
        ({"tls": {"sni": "*bücher.test"}}, "xn--"),
        ({"tls": {"sni": "a\u2603\u200d.test"}}, "internationalized"),
        ({"tls": {"sni": "x" * 64 + ".test"}}, "63"),
        ({"tls": {"sni": "x." * 127 + "test"}}, "253"),
        ({"tls": {"alpn": "h2,http/1.1"}}, "list"),
        ({"tls": {"alpn": "H2"}}, "clients write h2"),
        ({"tls": {"alpn": "h*"}}, "whole"),
        ({"tls": {"alpn": ""}}, "1 to 255"),
        ({"http": {"host": "a.test:80"}}, "without the port"),
        ({"http": {"host": "[::1]:80"}}, "no name has"),
        ({"http": {"path": "v1/*"}}, "write /v1/*"),
        ({"http": {"path": "/v1?x=1"}}, "query"),
        ({"http": {"path": "/v1#x"}}, "fragment"),
        ({"http": {"path": "/a b"}}, "%20"),
        ({"http": {"path": "/bücher"}}, "/b%C3%BCcher"),
        ({"http": {"method": "get"}}, "write GET"),
        ({"http": {"method": "G*"}}, "leave `method` out"),
        ({"http": {"header": {"Upgrade:": "websocket"}}}, "without the colon"),
        ({"http": {"header": {"a b": "x"}}}, "no name of a header"),
        ({"http": {"header": {"cookie": " x"}}}, "blanks"),
        ({"http": {"header": {"cookie": "x\r\n"}}}, "control"),
        ({"http": {"header": {"cookie": "€"}}}, "8859-1"),
        ({"http": {"header": {"cookie": None}}}, "no value"),
        ({"http": {"header": {"Cookie": "a", "cookie": "b"}}}, "twice"),
        ({"dns": {"qname": "a.test:53"}}, "without the port"),
        ({"rdp": {"cookie": "a\r"}}, "control"),
        ({"mqtt": {"client_id": "a\0"}}, "NUL"),
        ({"postgres": {"user": "a\0"}}, "NUL"),
        ({"xmpp": {"to": "a.test:5222"}}, "without the port"),
    ],
)
def test_a_pattern_that_no_client_can_fit_is_refused(match: object, says: str) -> None:
    with pytest.raises(OptionError) as caught:
        build(match, Terms())
    assert says in caught.value.reason
    # And where it stands: the protocol, and the option in it.
    assert isinstance(match, dict)
    word, options = next(iter(match.items()))
    assert caught.value.key.startswith(f"{word}.{next(iter(options))}")


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("bücher.example", b"xn--bcher-kva.example"),
        ("BÜCHER.example.", b"xn--bcher-kva.example"),
        ("*.bücher.example", b"www.xn--bcher-kva.example"),
        ("straße.example", b"xn--strae-oqa.example"),
        ("例え.テスト", b"xn--r8jz45g.xn--zckzah"),
        ("例え。テスト", b"xn--r8jz45g.xn--zckzah"),
        ("_sip._tcp.example", b"_SIP._tcp.example"),
        ("192.0.2.7", b"192.0.2.7"),
    ],
)
def test_a_name_is_compared_in_the_form_in_which_clients_send_it(written: str, sent: bytes) -> None:
    assert said({"tls": {"sni": written}}, client_hello(sent)) is MATCH
    asked = build({"dns": {"qname": written}}, Terms(datagrams=True))
    assert said(asked, query(*sent.split(b"."))) is MATCH
    http = f"GET / HTTP/1.1\r\nHost: {sent.decode()}:80\r\n\r\n".encode()
    assert said({"http": {"host": written}}, http) is MATCH


@pytest.mark.parametrize("sent", ["xn--bcher-kva.example", "bücher.example", "Bücher.example"])
def test_an_xmpp_client_may_send_either_form_of_a_name(sent: str) -> None:
    stream = f"<stream:stream to='{sent}'>".encode()
    assert said({"xmpp": {"to": "Bücher.example"}}, stream) is MATCH
    assert said({"xmpp": {"to": "*.example"}}, stream) is MATCH


def test_an_http_host_may_be_an_ipv6_address_or_empty() -> None:
    assert said({"http": {"host": "[::1]"}}, b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n") is MATCH
    assert said({"http": {"host": ""}}, b"GET / HTTP/1.1\r\nHost: \r\n\r\n") is MATCH


@given(st.text(max_size=20))
def test_any_text_is_taken_or_refused_in_words(text: str) -> None:
    for protocol, option in (
        ("tls", "sni"),
        ("tls", "alpn"),
        ("http", "host"),
        ("http", "path"),
        ("http", "method"),
        ("dns", "qname"),
        ("rdp", "cookie"),
        ("mqtt", "client_id"),
        ("postgres", "user"),
        ("xmpp", "to"),
    ):
        reason = "taken"
        try:
            build({protocol: {option: text}}, Terms())
        except OptionError as error:
            reason = error.reason
        assert reason


# What a header's value is made of.


@pytest.mark.parametrize(
    ("name", "pattern", "value", "fits"),
    [
        ("upgrade", "websocket", "WebSocket", True),
        ("Upgrade", "WebSocket", "h2c, websocket", True),
        ("upgrade", "websocket", "websockets", False),
        ("connection", "upgrade", "keep-alive, Upgrade", True),
        ("connection", "Upgrade", "keep-alive", False),
        ("transfer-encoding", "chunked", "gzip,Chunked", True),
        ("accept", "text/html", "application/json, TEXT/HTML;q=0.5", True),
        ("accept", "text/html;q=0.5", "text/html;q=0.5", True),
        ("accept-encoding", "br", "gzip;q=1, br;q=0.5", True),
        ("expect", "100-continue", "100-Continue", True),
        ("content-type", "application/json", "Application/JSON; charset=utf-8", True),
        ("content-type", "application/json*", "application/json", True),
        ("cache-control", "no-cache", 'private="a, no-cache", max-age=0', False),
        ("cache-control", "*max-age*", 'private="a, no-cache", max-age=0', True),
        ("authorization", "Basic YWJj", "BASIC YWJj", True),
        ("authorization", "basic YWJj", "Basic YWJJ", False),
        ("authorization", "bearer *", "Bearer x.y.z", True),
        ("sec-websocket-protocol", "mqtt", "soap, mqtt", True),
        ("sec-websocket-protocol", "mqtt", "MQTT", False),
        ("x-forwarded-for", "10.0.0.1", "192.0.2.1, 10.0.0.1", True),
        ("if-none-match", '"a,b"', '"x", "a,b"', True),
        # Of other headers nothing is known: whole, and letter by letter.
        ("cookie", "a=1", "a=1", True),
        ("cookie", "a=1", "A=1", False),
        ("x-mine", "a", "a, b", False),
    ],
)
def test_a_header_is_compared_as_its_rfc_says(
    name: str, pattern: str, value: str, fits: bool
) -> None:
    http = matcher({"http": {"header": {name: pattern}}})
    assert said(http, request(f"{name.title()}: {value}")) is (MATCH if fits else NO_MATCH)


def test_a_header_that_stands_there_twice_is_one_list() -> None:
    http = matcher({"http": {"header": {"connection": "upgrade"}}})
    assert said(http, request("Connection: close", "Connection: Upgrade")) is MATCH


@given(st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=40))
def test_any_value_of_a_list_is_read(value: str) -> None:
    http = matcher({"http": {"header": {"via": "1.1 x"}}})
    assert said(http, request(f"Via: {value}")) in (MATCH, NO_MATCH)


# Datagrams.


def test_a_protocol_of_datagrams_is_read_without_a_length_in_front() -> None:
    dns = build("dns", Terms(datagrams=True))
    assert said(dns, query(b"host", b"internal", b"example")) is MATCH
    assert said(dns, CLIENTS["dns-dig"][2:]) is MATCH
    assert said(dns, CLIENTS["dns-dig"]) is not MATCH
    assert dns.describe(query(b"a", b"test")) == "asks for a.test"
    openvpn = build("openvpn", Terms(datagrams=True))
    for name in ("openvpn", "openvpn-tls-auth", "openvpn-tls-crypt"):
        assert said(openvpn, CLIENTS[name][2:]) is MATCH
        assert said(openvpn, CLIENTS[name]) is NO_MATCH
    assert said(openvpn, CLIENTS["openvpn"][2:15]) is NO_MATCH


def test_a_question_that_reaches_beyond_its_datagram_is_none() -> None:
    dns = build("dns", Terms(datagrams=True))
    whole = query(b"a", b"test")
    for length in range(len(whole)):
        assert said(dns, whole[:length]) is not MATCH


@pytest.mark.parametrize("word", sorted(PROTOCOLS))
def test_a_protocol_of_streams_is_refused_for_datagrams(word: str) -> None:
    match: object = {word: "x"} if word in ("bytes", "regex") else word
    if PROTOCOLS[word].in_datagrams:
        build(match, Terms(datagrams=True))
        return
    for nested in (match, [match], {"not": match}, {"any_of": ["any", match]}):
        with pytest.raises(OptionError, match=f"{word} needs a stream"):
            build(nested, Terms(datagrams=True))


# Words of other programs.


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("https", "write tls"),
        ("SSL", "write tls"),
        ("socks5", 'socks: {version: ["5"]}'),
        ("default", "write any"),
        ("postgresql", "write postgres"),
        ("shh", "did you mean ssh"),
        ("SSH", "did you mean ssh"),
        ("nonsense", "known: instruction"),
    ],
)
def test_a_word_of_another_program_is_answered_with_ours(word: str, says: str) -> None:
    with pytest.raises(OptionError) as caught:
        build(word, Terms())
    assert says in caught.value.reason

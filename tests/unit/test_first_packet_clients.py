"""Every protocol against what real clients sent: which it takes, after how many bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, End, Outcome
from pyforwarder.core.first_packet.table import PROTOCOLS, Terms, build
from tests.helpers.first_packets import (
    CLIENTS,
    TURNS,
    decided_after,
    matcher,
    mutated_clients,
    said,
)

# Recorded client: the protocols that take it, and how many of its bytes the first of them needs.
EXPECTED: dict[str, tuple[tuple[str, ...], int]] = {
    "adb": (("adb",), 24),
    "dns-dig": (("dns",), 41),
    "http-connect-curl": (("http_connect", "http"), 122),
    "http-connect-curl-user": (("http_connect", "http"), 167),
    "http-connect-ncat": (("http_connect", "http"), 33),
    "http-curl": (("http",), 28),
    "http-curl-post": (("http",), 21),
    "http-curl-proxy": (("http",), 42),
    "http2-curl": (("http2",), 24),
    "mqtt-curl": (("mqtt",), 9),
    "mqtt-mosquitto": (("mqtt",), 9),
    "mqtt-mosquitto-3.1": (("mqtt",), 11),
    "openvpn": (("openvpn",), 3),
    "openvpn-tls-auth": (("openvpn",), 3),
    "openvpn-tls-crypt": (("openvpn",), 3),
    "postgres-psql": (("postgres",), 8),
    "postgres-psql-gss": (("postgres",), 8),
    "postgres-psql-plain": (("postgres",), 8),
    "rdp-freerdp": (("rdp",), 11),
    "rdp-freerdp-rdp-security": (("rdp",), 11),
    "redis-cli": (("redis",), 8),
    "socks4-curl": (("socks",), 9),
    "socks4a-curl": (("socks",), 25),
    "socks5-curl": (("socks",), 4),
    "socks5-curl-user": (("socks",), 5),
    "socks5-nc": (("socks",), 3),
    "socks5-ncat": (("socks",), 3),
    "ssh-openssh": (("ssh",), 4),
    "tls-chrome": (("tls",), 6),
    "tls-curl": (("tls",), 6),
    "tls-firefox": (("tls",), 6),
    "tls-gnutls": (("tls",), 6),
    "tls-node": (("tls",), 6),
    "tls-openssl": (("tls",), 6),
    "tls-openssl-1.2": (("tls",), 6),
    "tls-openssl-no-name": (("tls",), 6),
    "xmpp-slixmpp": (("xmpp",), 15),
}
# Those that say something about the bytes: not `any`, and not what waits for silence.
SILENT = {"silence", "mysql", "smtp"}
STREAMS = {word for word, protocol in PROTOCOLS.items() if protocol.in_streams}
READING = sorted(STREAMS - SILENT - {"any", "bytes", "regex"})

# With conditions, so that the whole of a packet is read. Each line holds for the client it names.
CONDITIONS: list[tuple[str, object, object]] = [
    ("tls-chrome", {"tls": {"sni": "*.example.com"}}, {"tls": {"sni": "example.com"}}),
    ("tls-firefox", {"tls": {"alpn": "h2"}}, {"tls": {"alpn": "h3"}}),
    ("tls-curl", {"tls": {"version": ["1.2", "1.3"]}}, {"tls": {"version": "1.2"}}),
    ("tls-openssl-1.2", {"tls": {"version": "1.2"}}, {"tls": {"version": ["1.1", "1.3"]}}),
    ("tls-openssl-no-name", {"not": {"tls": {"sni": "*"}}}, {"tls": {"sni": "*"}}),
    ("tls-node", {"tls": {"sni": "NODE.example.com.", "alpn": "h2"}}, {"tls": {"sni": "x"}}),
    ("tls-gnutls", {"tls": {"sni": "gnutls.*"}}, {"tls": {"sni": "*gnutls"}}),
    ("http-curl", {"http": {"host": "API.example.com"}}, {"http": {"host": "*.api.example.com"}}),
    ("http-curl", {"http": {"path": "/v1/*"}}, {"http": {"path": "/v1"}}),
    ("http-curl", {"http": {"header": {"Accept": "*"}}}, {"http": {"header": {"cookie": "*"}}}),
    ("http-curl-post", {"http": {"method": "POST"}}, {"http": {"method": ["GET", "PUT"]}}),
    ("http-curl-proxy", {"http": {"host": "www.example.com"}}, {"http": {"host": ""}}),
    ("dns-dig", {"dns": {"qname": "*.internal.example"}}, {"dns": {"qname": "internal.example"}}),
    ("mqtt-mosquitto", {"mqtt": {"client_id": "sensor-*"}}, {"mqtt": {"client_id": "SENSOR-7"}}),
    ("mqtt-mosquitto-3.1", {"mqtt": {"client_id": "sensor-7"}}, {"mqtt": {"client_id": "7"}}),
    ("postgres-psql-plain", {"postgres": {"user": "app"}}, {"postgres": {"user": "ap"}}),
    ("postgres-psql-plain", {"postgres": {"database": "app"}}, {"postgres": {"database": "b"}}),
    ("rdp-freerdp", {"rdp": {"cookie": "ALICE"}}, {"rdp": {"cookie": "ali"}}),
    ("rdp-freerdp-rdp-security", {"rdp": {"cookie": "a*"}}, {"rdp": {"cookie": "*b*"}}),
    ("xmpp-slixmpp", {"xmpp": {"to": "*.example.com"}}, {"xmpp": {"to": "example.com"}}),
    ("socks5-curl", {"socks": {"version": "5"}}, {"socks": {"version": "4"}}),
    ("socks4-curl", {"socks": {"version": 4}}, {"socks": {"version": 5}}),
]
ALL_MATCHES: list[object] = [
    *READING,
    *(match for _, holds, fails in CONDITIONS for match in (holds, fails)),
    {"bytes": {"prefix": ["GET ", "hex:1603"], "offset": 2}},
    {"regex": ["^[A-Z]+ /", "^\\x16\\x03[\\x00-\\x04]"]},
    {"rdp": {"cookie": "alice"}},
    {"not": {"any_of": ["tls", {"http": {"host": "a"}}, {"socks": {"version": 5}}]}},
    {"all": [{"tls": {"sni": "*"}}, {"not": {"tls": {"alpn": "h2"}}}]},
]


def test_every_recorded_client_is_expected_somewhere() -> None:
    assert set(EXPECTED) == set(CLIENTS)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_client_is_taken_by_its_protocol_alone(name: str) -> None:
    protocols, _ = EXPECTED[name]
    taken = {protocol for protocol in READING if said(protocol, CLIENTS[name]) is MATCH}
    assert taken == set(protocols)
    for protocol in set(READING) - set(protocols):
        assert said(protocol, CLIENTS[name]) is NO_MATCH, protocol


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_client_byte_by_byte_is_known_as_early_as_it_can_be(name: str) -> None:
    protocols, after = EXPECTED[name]
    assert decided_after(protocols[0], CLIENTS[name]) == (MATCH, after)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_follows_a_first_packet_changes_nothing(name: str) -> None:
    for protocol in READING:
        answer = said(protocol, CLIENTS[name])
        for trailing in (b"\0", b"\r\n\r\n", bytes(range(256)), CLIENTS[name]):
            assert said(protocol, CLIENTS[name] + trailing) is answer


@pytest.mark.parametrize(("name", "holds", "fails"), CONDITIONS)
def test_a_condition_on_a_real_client(name: str, holds: object, fails: object) -> None:
    data = CLIENTS[name]
    assert decided_after(holds, data)[0] is MATCH
    assert decided_after(fails, data)[0] is NO_MATCH
    assert said(holds, data + b"trailing") is MATCH
    assert said(fails, data + b"trailing") is NO_MATCH


@pytest.mark.parametrize("protocol", sorted(SILENT))
def test_a_client_that_waits_is_silent_until_the_timeout(protocol: str) -> None:
    assert said(protocol, b"") is NEED_MORE
    assert said(protocol, b"", End.TIMEOUT) is MATCH
    assert said(protocol, b"", End.EOF) is NEED_MORE
    assert said(protocol, b"E") is NO_MATCH
    assert said(protocol, b"E", End.TIMEOUT) is NO_MATCH


def test_a_recorded_dialogue_goes_as_far_as_the_destination() -> None:
    # A capture that broke off would prove nothing.
    for name in ("socks5-curl", "socks5-curl-user", "socks5-nc", "socks5-ncat"):
        assert any(turn[:3] == b"\x05\x01\x00" and len(turn) > 9 for turn in TURNS[name]), name
    assert TURNS["postgres-psql"][1][4:8] == b"\0\3\0\0"


# Properties. What is decided stays decided: `decided_after` fails where it does not.


@pytest.mark.parametrize("match", ALL_MATCHES, ids=repr)
@given(data=st.one_of(mutated_clients(), st.binary(max_size=64)))
def test_hostile_bytes_have_three_outcomes_and_the_first_is_final(
    match: object, data: bytes
) -> None:
    answer, _ = decided_after(BUILT[repr(match)], data)
    assert isinstance(answer, Outcome)
    assert isinstance(BUILT[repr(match)].describe(data), str)


BUILT = {repr(match): matcher(match) for match in ALL_MATCHES}


@pytest.mark.parametrize("protocol", READING)
def test_nothing_sent_is_no_answer(protocol: str) -> None:
    assert said(protocol, b"") is NEED_MORE


@pytest.mark.parametrize("protocol", READING)
def test_explain_finds_nothing_in_what_is_none(protocol: str) -> None:
    built = build(protocol, Terms())
    for data in (b"", b"\xff" * 40, b"G"):
        assert built.describe(data) == ""

"""An address as text is ours: `str` of the standard library differs from version to version."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.cli.processes import _normal
from pyforwarder.config.values import parse_ip_list
from pyforwarder.core import policy, proxy_protocol, token
from pyforwarder.core.address import Address, AddressError, ip_text, network_text, parse_destination
from pyforwarder.core.first_packet.outcome import Route
from pyforwarder.datapath.ebpf.abi import Endpoint, Family, pack_endpoint, unpack_endpoint
from pyforwarder.datapath.splice.sockets import _host
from tests.helpers.dialogue import talk
from tests.helpers.rules import ruleset


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::", "::"),
        ("::1", "::1"),
        ("1::", "1::"),
        ("2001:DB8:0:0:0:0:0:1", "2001:db8::1"),
        # RFC 5952 section 4.2: not a single field, the longest run, the first of equal ones.
        ("2001:db8:0:1:1:1:1:1", "2001:db8:0:1:1:1:1:1"),
        ("2001:0:0:1:0:0:0:1", "2001:0:0:1::1"),
        ("2001:db8:0:0:1:0:0:1", "2001:db8::1:0:0:1"),
        ("1:0:0:0:0:0:0:0", "1::"),
        ("0:0:0:0:0:0:0:8", "::8"),
        # Python up to 3.12 and the PROXY protocol write it so, 3.13 and inet_ntop(3) with dots.
        ("::ffff:192.0.2.1", "::ffff:c000:201"),
        ("::192.0.2.1", "::c000:201"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_address_is_written_one_way(written: str, text: str) -> None:
    assert ip_text(ipaddress.ip_address(written)) == text


@given(st.ip_addresses())
def test_text_is_read_back_as_the_address(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    text = ip_text(ip)
    assert ipaddress.ip_address(text) == ip
    assert text == text.lower()
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    kernel = socket.inet_ntop(family, ip.packed)
    if ip.version == 4 or "." not in kernel:
        assert text == kernel


# What the versions write for an address; none of it may reach anybody.
def _as_a_later_python(ip: ipaddress.IPv6Address) -> str:
    return f"<{ip.packed.hex()}>"


@pytest.fixture(params=["3.11", "another"])
def any_python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "another":

        def of_network(network: ipaddress.IPv6Network) -> str:
            return f"{_as_a_later_python(network.network_address)}/{network.prefixlen}"

        def formatted(ip: ipaddress.IPv6Address, _: str) -> str:
            return _as_a_later_python(ip)

        monkeypatch.setattr(ipaddress.IPv6Address, "__str__", _as_a_later_python)
        monkeypatch.setattr(ipaddress.IPv6Address, "__format__", formatted)
        monkeypatch.setattr(ipaddress.IPv6Network, "__str__", of_network)


CLIENT = Address("192.0.2.1", 56324)
SERVER_6 = Address("2001:db8::2", 23)
KEY = b"0123456789abcdef"


def _refusal(allow: str, ip: str) -> str:
    return policy.AllowList.parse([allow]).refusal(ip, 80) or ""


def _error_of(text: str) -> str:
    with pytest.raises(AddressError) as caught:
        policy.parse_network(text)
    return str(caught.value)


def _socks_5(packed: bytes) -> str:
    rules = ruleset({"name": "p", "match": "socks", "allow": ["any"]})
    request = b"\x05\x01\x00" + b"\x05\x01\x00\x04" + packed + b"\x00\x50"
    decision = talk(rules, [request]).decision
    assert isinstance(decision, Route)
    return str(decision.to)


def _shown(host: str) -> str:
    return unpack_endpoint(Endpoint.from_buffer_copy(pack_endpoint(Address(host, 80))))


SAID: dict[str, tuple[Callable[[], object], object]] = {
    "PROXY header of mixed families": (
        lambda: proxy_protocol.build_v1(CLIENT, SERVER_6),
        b"PROXY TCP6 ::ffff:c000:201 2001:db8::2 56324 23\r\n",
    ),
    "PROXY header that was read": (
        lambda: proxy_protocol.read(b"PROXY TCP6 2001:DB8:0::1 2001:db8::2 1 2\r\n")[0],  # type: ignore[index]
        Address("2001:db8::1", 1),
    ),
    "signed instruction": (
        lambda: token.make(
            SERVER_6,
            expires_unix_s=1,
            key_id="k",
            key=KEY,
            source=ipaddress.ip_network("2001:db8::/32"),
        ).partition(b" sig=")[0],
        b"FWD1 [2001:db8::2]:23 exp=1 key=k from=2001:db8::/32",
    ),
    "destination": (lambda: parse_destination("[2001:DB8:0::1]:80"), Address("2001:db8::1", 80)),
    "destination by SOCKS": (
        lambda: _socks_5(ipaddress.ip_address("2001:db8::1").packed),
        "[2001:db8::1]:80",
    ),
    "source in a configuration": (lambda: parse_ip_list(["2001:DB8::1"]), ("2001:db8::1",)),
    "end in show": (lambda: _shown("2001:db8::1"), "[2001:db8::1]:80"),
    "end in the kernel's record": (
        lambda: _host(ipaddress.ip_address("2001:db8::1").packed, 6),
        "2001:db8::1",
    ),
    "end of a process": (lambda: _normal("2001:DB8::1", 80), Address("2001:db8::1", 80)),
    "refusal": (
        lambda: _refusal("10.0.0.0/8", "2001:db8::1"),
        "allow does not list 2001:db8::1 port 80",
    ),
    "refusal of a guarded address": (
        lambda: _refusal("any", "fe80::1").partition(" ")[0],
        "fe80::1",
    ),
    "hint for a network": (
        lambda: "2001:db8::/32 is meant" in _error_of("2001:db8::1/32"),
        True,
    ),
    "network": (lambda: network_text(ipaddress.ip_network("2001:db8::/32")), "2001:db8::/32"),
}


@pytest.mark.usefixtures("any_python")
@pytest.mark.parametrize("what", SAID)
def test_nothing_that_is_said_comes_from_str_of_an_address(what: str) -> None:
    say, wanted = SAID[what]
    assert say() == wanted


def test_families_of_an_endpoint_are_those_of_the_text() -> None:
    endpoint = Endpoint.from_buffer_copy(pack_endpoint(Address("::1", 80)))
    assert endpoint.family == Family.IPV6

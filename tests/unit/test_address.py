"""Addresses as users and clients write them."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.address import (
    Address,
    AddressError,
    HostPort,
    UnixAddress,
    is_name,
    parse_bind,
    parse_destination,
    parse_port,
    parse_server,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9001", Address("127.0.0.1", 9001)),
        ("[::1]:65535", Address("::1", 65535)),
        ("[2001:DB8:0::0:1]:1", Address("2001:db8::1", 1)),
        ("[::ffff:10.0.0.1]:80", Address("10.0.0.1", 80)),
        ("[::ffff:a00:1]:80", Address("10.0.0.1", 80)),
        ("Example.COM:443", HostPort("example.com", 443)),
        ("example.com.:443", HostPort("example.com", 443)),
        ("localhost:22", HostPort("localhost", 22)),
        ("_srv-1.x:22", HostPort("_srv-1.x", 22)),
        ("0x7f.example:22", HostPort("0x7f.example", 22)),
    ],
)
def test_a_destination_is_read(text: str, expected: Address | HostPort) -> None:
    assert parse_destination(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":80",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:+80",
        "127.0.0.1: 80",
        "127.0.0.1:\uff18\uff10",
        "127.0.0.1:000080",
        "::1:80",
        "[::1]",
        "[::1]80",
        "[::1:80",
        "[127.0.0.1]:80",
        "[fe80::1%eth0]:80",
        "[fe80::1%25eth0]:80",
        "a b:80",
        "-a:80",
        "a-:80",
        "a..b:80",
        ".:80",
        f"{'a' * 64}:80",
        f"{'a.' * 127}a:80",
        "ex\u00e4mple:80",
        "unix:/run/x",
    ],
)
def test_what_is_no_destination_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_destination(text)


@pytest.mark.parametrize(
    "host",
    [
        "127.1",
        "2130706433",
        "0x7f000001",
        "0X7F000001",
        "0x7f.0.0.1",
        "127.0.0.0x1",
        "0x",
        "0177.0.0.1",
        "127.0.0.01",
        "1.2.3.4.",
        "127.0.0.1.5",
        "example.0",
    ],
)
def test_an_ipv4_address_in_disguise_is_no_name(host: str) -> None:
    assert not is_name(host)
    with pytest.raises(AddressError):
        parse_destination(f"{host}:80")


def test_the_longest_name_may_have_a_final_dot() -> None:
    longest = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
    assert len(longest) == 253
    assert is_name(longest)
    assert is_name(longest + ".")
    assert not is_name("e" + longest)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_address_survives_being_written_and_read(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    mapped = getattr(ip, "ipv4_mapped", None)
    address = Address(str(mapped or ip), port)
    assert parse_destination(str(address)) == address
    assert address.is_ipv6 is ((mapped or ip).version == 6)


@given(st.text())
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    for parse in (parse_destination, parse_bind, parse_server):
        try:
            parsed = parse(text)
        except AddressError:
            continue
        assert isinstance(parsed, (Address, HostPort, UnixAddress))
        if parse is not parse_bind:
            assert parse(str(parsed)) == parsed


def test_a_bind_may_leave_the_port_to_the_kernel() -> None:
    assert parse_bind("[::]:0") == Address("::", 0)
    assert parse_bind("unix:/run/a.sock") == UnixAddress("/run/a.sock")


def test_a_bind_is_no_name() -> None:
    with pytest.raises(AddressError, match="not a name"):
        parse_bind("localhost:80")


def test_a_server_may_be_a_unix_socket() -> None:
    server = parse_server("unix:/run/a.sock")
    assert server == UnixAddress("/run/a.sock")
    assert str(server) == "unix:/run/a.sock"


@pytest.mark.parametrize(
    "path", ["", "run/a", "@abstract", "/a b", "/a\n", "/a\0", "/" + "x" * 107, "/\ud800"]
)
def test_a_unix_path_is_absolute_short_and_printable(path: str) -> None:
    with pytest.raises(AddressError):
        parse_server(f"unix:{path}")


def test_a_unix_path_is_measured_in_bytes() -> None:
    assert parse_server("unix:/" + "x" * 106) == UnixAddress("/" + "x" * 106)
    with pytest.raises(AddressError, match="107"):
        parse_server("unix:/" + "\u00fc" * 54)


def test_port_zero_must_be_asked_for() -> None:
    assert parse_port("0", allow_zero=True) == 0
    with pytest.raises(AddressError, match="out of range"):
        parse_port("0")

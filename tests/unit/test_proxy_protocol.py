"""PROXY headers: what is read, what is built, and what is refused."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core import proxy_protocol
from pyforwarder.core.address import Address
from pyforwarder.core.first_packet.cursor import ParseError
from pyforwarder.core.first_packet.outcome import NEED_MORE
from pyforwarder.core.proxy_protocol import (
    MAX_V2,
    TLV_AUTHORITY,
    TLV_UNIQUE_ID,
    Header,
    build_v1,
    build_v2,
    crc32c,
    read,
)
from tests.helpers.proxy_headers import ACCEPTED, CLIENT, REFUSED, SERVER, SERVER_6, SIGNATURE


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_header_is_read(name: str) -> None:
    data, source, destination = ACCEPTED[name]
    header = read(data)
    assert isinstance(header, Header)
    assert (header.source, header.destination, header.length) == (source, destination, len(data))
    assert header.is_local == ("local" in name)


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_header_needs_more_until_its_last_byte(name: str) -> None:
    data = ACCEPTED[name][0]
    assert [read(data[:length]) for length in range(len(data))] == [NEED_MORE] * len(data)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_follows_a_header_is_the_clients(name: str) -> None:
    data = ACCEPTED[name][0]
    for following in (b"\r\n", b"PROXY TCP4 ", SIGNATURE, b"\0", b"GET / HTTP/1.1\r\n\r\n"):
        assert read(data + following) == read(data)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_header_is_refused(name: str) -> None:
    with pytest.raises(ParseError):
        read(REFUSED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_does_not_change_with_more_bytes(name: str) -> None:
    data = REFUSED[name]
    refused_at = next(length for length in range(len(data) + 1) if is_refused(data[:length]))
    for length in range(refused_at, len(data) + 1):
        assert is_refused(data[:length])
    assert is_refused(data + b"\r\n")


def is_refused(data: bytes) -> bool:
    try:
        read(data)
    except ParseError:
        return True
    return False


@pytest.mark.parametrize(
    ("data", "length"),
    [(b"GET /", 1), (b"PROXX", 5), (b"PROXY TCP5", 10), (SIGNATURE + b"\x31", 13), (b"\r\n\n", 3)],
)
def test_the_first_wrong_byte_is_enough(data: bytes, length: int) -> None:
    assert not is_refused(data[: length - 1])
    assert is_refused(data[:length])


def test_one_changed_bit_breaks_the_checksum() -> None:
    header = build_v2(CLIENT, SERVER, [(TLV_UNIQUE_ID, b"7")], checksum=True)
    for at in (16, 20, 24, 27, 31, len(header) - 1):
        broken = bytearray(header)
        broken[at] ^= 1
        assert is_refused(bytes(broken))


def test_crc32c_of_the_known_text() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C


def test_tlvs_come_back() -> None:
    tlvs = ((TLV_UNIQUE_ID, b"17"), (TLV_AUTHORITY, b"example.org"))
    header = read(build_v2(CLIENT, SERVER, tlvs))
    assert isinstance(header, Header)
    assert header.tlvs == tlvs


def test_a_mixed_pair_of_addresses_is_written_as_ipv6() -> None:
    assert build_v1(CLIENT, SERVER_6) == b"PROXY TCP6 ::ffff:c000:201 2001:db8::2 56324 23\r\n"
    header = read(build_v2(CLIENT, SERVER_6))
    assert isinstance(header, Header)
    assert (header.source, header.destination) == (CLIENT, SERVER_6)


def test_without_addresses_a_header_says_so() -> None:
    assert build_v1(None, SERVER) == b"PROXY UNKNOWN\r\n"
    assert build_v2(None, None) == SIGNATURE + b"\x21\x00\x00\x00"
    assert build_v2(CLIENT, SERVER, is_local=True) == SIGNATURE + b"\x20\x00\x00\x00"


def test_a_header_that_would_be_refused_is_not_built() -> None:
    with pytest.raises(ValueError, match="longer than 4096 bytes"):
        build_v2(CLIENT, SERVER, [(TLV_AUTHORITY, b"a" * 4080)])
    with pytest.raises(ValueError, match="65,535"):
        build_v2(CLIENT, SERVER, [(TLV_AUTHORITY, bytes(65536))])


addresses = st.builds(Address, st.ip_addresses().map(str), st.integers(0, 65535))


def is_mapped(address: Address) -> bool:
    ip = ipaddress.ip_address(address.host)
    return ip.version == 6 and getattr(ip, "ipv4_mapped", None) is not None


@given(addresses, addresses, st.binary(max_size=200), st.booleans())
def test_what_is_built_is_read(
    source: Address, destination: Address, unique: bytes, checksum: bool
) -> None:
    for header in (
        build_v1(source, destination),
        build_v2(source, destination, [(TLV_AUTHORITY, unique)], checksum=checksum),
    ):
        found = read(header + b"tail")
        assert isinstance(found, Header)
        assert found.length == len(header)
        for said, meant in ((found.source, source), (found.destination, destination)):
            assert said == meant or is_mapped(meant)
        assert read(header[:-1]) is NEED_MORE


@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=300).map(lambda tail: SIGNATURE + tail),
        st.binary(max_size=120).map(lambda tail: b"PROXY " + tail),
        st.binary(max_size=120).map(lambda tail: b"PROXY TCP4 192.0.2.1 " + tail),
    )
)
def test_hostile_bytes_are_read_refused_or_awaited(data: bytes) -> None:
    settled = None
    for length in range(len(data) + 1):
        try:
            said: object = read(data[:length])
        except ParseError:
            said = "refused"
        if settled is not None:
            assert said == settled
        elif said is not NEED_MORE:
            settled = said
    if len(data) >= proxy_protocol.MAX_LENGTH:
        assert settled is not None


def test_need_more_ends_at_the_limits() -> None:
    assert read(b"PROXY UNKNOWN " + b"f" * 92) is NEED_MORE
    assert is_refused(b"PROXY UNKNOWN " + b"f" * 93)
    longest = SIGNATURE + b"\x21\x00" + (MAX_V2 - 16).to_bytes(2, "big")
    assert read(longest) is NEED_MORE
    assert read(
        longest + b"\x04" + (MAX_V2 - 19).to_bytes(2, "big") + bytes(MAX_V2 - 19)
    ) == Header(None, None, False, ((4, bytes(MAX_V2 - 19)),), MAX_V2)

"""PROXY headers that every reader takes, and such that none may take."""

from __future__ import annotations

from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.core.proxy_protocol import (
    MAX_V2,
    TLV_AUTHORITY,
    TLV_NOOP,
    TLV_UNIQUE_ID,
    build_v1,
    build_v2,
)

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


CLIENT = Address("192.0.2.1", 56324)


SERVER = Address("198.51.100.1", 443)


CLIENT_6 = Address("2001:db8::1", 4124)


SERVER_6 = Address("2001:db8::2", 23)


# What HAProxy 2.6.12 sent for a connection from 127.0.0.1:33606 to 127.0.0.1:15301 (send-proxy-v2).
HAPROXY_V2 = bytes.fromhex("0d0a0d0a000d0a515549540a2111000c7f0000017f00000183463bc5")


ACCEPTED = {
    "v1-tcp4": (b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n", CLIENT, SERVER),
    "v1-tcp6": (b"PROXY TCP6 2001:db8::1 2001:DB8::2 4124 23\r\n", CLIENT_6, SERVER_6),
    # The longest lines of the specification, section 2.1.
    "v1-worst-tcp4": (
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        Address("255.255.255.255", 65535),
        Address("255.255.255.255", 65535),
    ),
    "v1-worst-tcp6": (
        b"PROXY TCP6 "
        + b" ".join([b"ffff:f...f:ffff".replace(b"f...f", b":".join([b"ffff"] * 6))] * 2)
        + b" 65535 65535\r\n",
        Address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535),
        Address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535),
    ),
    "v1-unknown-short": (b"PROXY UNKNOWN\r\n", None, None),
    "v1-unknown-worst": (b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", None, None),
    "v1-mapped": (
        b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.1 56324 443\r\n",
        CLIENT,
        SERVER,
    ),
    "v2-tcp4": (HAPROXY_V2, Address("127.0.0.1", 33606), Address("127.0.0.1", 15301)),
    "v2-tcp6": (build_v2(CLIENT_6, SERVER_6), CLIENT_6, SERVER_6),
    "v2-unspec": (SIGNATURE + b"\x21\x00\x00\x00", None, None),
    "v2-local": (SIGNATURE + b"\x20\x00\x00\x00", None, None),
    "v2-local-with-rubbish": (SIGNATURE + b"\x20\xff\x00\x03abc", None, None),
    "v2-unix": (
        SIGNATURE + b"\x21\x31\x00\xd8" + b"/run/a".ljust(108, b"\0") + b"/run/b".ljust(108, b"\0"),
        UnixAddress("/run/a"),
        UnixAddress("/run/b"),
    ),
    "v2-tlvs": (
        build_v2(CLIENT, SERVER, [(TLV_AUTHORITY, b"example.org")], checksum=True),
        CLIENT,
        SERVER,
    ),
}


REFUSED = {
    # Section 2.1: exactly one blank, upper case, decimal ports, no leading zeroes, \r\n.
    "lower-case": b"proxy TCP4 192.0.2.1 198.51.100.1 1 2\r\n",
    "two-blanks": b"PROXY  TCP4 192.0.2.1 198.51.100.1 1 2\r\n",
    "two-blanks-later": b"PROXY TCP4 192.0.2.1  198.51.100.1 1 2\r\n",
    "trailing-blank": b"PROXY TCP4 192.0.2.1 198.51.100.1 1 2 \r\n",
    "tab": b"PROXY TCP4\t192.0.2.1 198.51.100.1 1 2\r\n",
    "line-feed-only": b"PROXY TCP4 192.0.2.1 198.51.100.1 1 2\n" + b"x" * 80,
    "leading-zero-port": b"PROXY TCP4 192.0.2.1 198.51.100.1 01 2\r\n",
    "leading-zero-address": b"PROXY TCP4 192.0.2.010 198.51.100.1 1 2\r\n",
    "port-too-large": b"PROXY TCP4 192.0.2.1 198.51.100.1 65536 2\r\n",
    "signed-port": b"PROXY TCP4 192.0.2.1 198.51.100.1 +1 2\r\n",
    "address-too-large": b"PROXY TCP4 192.0.2.256 198.51.100.1 1 2\r\n",
    "other-family": b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
    "other-family-6": b"PROXY TCP6 192.0.2.1 198.51.100.1 1 2\r\n",
    "no-ports": b"PROXY TCP4 192.0.2.1 198.51.100.1\r\n",
    "udp": b"PROXY UDP4 192.0.2.1 198.51.100.1 1 2\r\n",
    "unknown-word": b"PROXY UNKNOWNS\r\n",
    "too-long": b"PROXY UNKNOWN " + b"f" * 92 + b"\r\n",
    "no-header": b"GET / HTTP/1.1\r\n",
    "empty-line": b"\r\n\r\n\0\r\nQUIT\r",
    "v2-version-1": SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
    "v2-command": SIGNATURE + b"\x22\x11\x00\x0c" + bytes(12),
    "v2-udp": SIGNATURE + b"\x21\x12\x00\x0c" + bytes(12),
    "v2-family": SIGNATURE + b"\x21\x41\x00\x0c" + bytes(12),
    "v2-short-tcp4": SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11),
    "v2-short-tcp6": SIGNATURE + b"\x21\x21\x00\x0c" + bytes(12),
    "v2-too-long": SIGNATURE + b"\x21\x11" + (MAX_V2 - 15).to_bytes(2, "big"),
    "v2-tlv-beyond": SIGNATURE + b"\x21\x11\x00\x10" + bytes(12) + b"\x02\x00\x02a",
    "v2-tlv-half": SIGNATURE + b"\x21\x11\x00\x0e" + bytes(12) + b"\x02\x00",
    "v2-crc-length": SIGNATURE + b"\x21\x11\x00\x10" + bytes(12) + b"\x03\x00\x01a",
    "v2-unique-id": build_v2(CLIENT, SERVER, [(TLV_UNIQUE_ID, b"i" * 129)]),
}


# What a proxy in front of the forwarder declares, for tests that send it.
DECLARED_CLIENT = Address("192.0.2.7", 4711)


DECLARED_SERVER = Address("198.51.100.9", 443)


DECLARED = {
    "v1": build_v1(DECLARED_CLIENT, DECLARED_SERVER),
    "v2": build_v2(DECLARED_CLIENT, DECLARED_SERVER, [(TLV_NOOP, bytes(100))]),
}

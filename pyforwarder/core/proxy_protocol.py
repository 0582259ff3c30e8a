r"""The PROXY protocol, versions 1 and 2: who the client is, said by the proxy before us.

    PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n          version 1: text
    \r\n\r\n\0\r\nQUIT\n  ver/cmd  family  length  addresses  TLVs     version 2: binary

Pure.  A header is only ever read where the configuration says that one comes: what a client sends
itself must never be taken for one.

Source: the PROXY protocol, versions 1 and 2 (HAProxy's doc/proxy-protocol.txt), sections 2 and 4.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pyforwarder.core.address import Address, UnixAddress, ip_text
from pyforwarder.core.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.core.first_packet.outcome import NEED_MORE, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_V1: Final = 107  # section 2.1: two IPv6 addresses of 39 characters, ports, \r\n
# Section 2.2 allows 65,535 bytes after the fixed part. Addresses take 216 at most; what proxies
# send beside them (certificate names, VPC ids, padding to 128 or 256 bytes) stays far below this.
MAX_V2: Final = 4096
MAX_LENGTH: Final = max(MAX_V1, MAX_V2)

_V1: Final = b"PROXY "
_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED: Final = len(_SIGNATURE) + 4

_VERSION_2: Final = 0x20
_LOCAL: Final = 0
_PROXY: Final = 1
_UNSPEC: Final = 0x00
_TCP4: Final = 0x11
_TCP6: Final = 0x21
_UDP: Final = {_TCP4: 0x12, _TCP6: 0x22}
_UNIX: Final = 0x31
_SUN_PATH: Final = 108
# Bytes of addresses by family and transport; section 2.2. UDP and datagrams have a size, and are
# refused for what they are: this is TCP.
_SIZES: Final = {_UNSPEC: 0, _TCP4: 12, _TCP6: 36, _UNIX: 2 * _SUN_PATH}

TLV_ALPN: Final = 0x01
TLV_AUTHORITY: Final = 0x02
TLV_CRC32C: Final = 0x03
TLV_NOOP: Final = 0x04
TLV_UNIQUE_ID: Final = 0x05
_MAX_UNIQUE_ID: Final = 128

_LINE_V1: Final = re.compile(
    rb"PROXY (TCP4|TCP6) ([0-9a-fA-F.:]{2,39}) ([0-9a-fA-F.:]{2,39}) "
    rb"(0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})"
)
_BEGINS_V1: Final = re.compile(rb"PROXY (?:TCP[46]|UNKNOWN)")


class Header(NamedTuple):
    """What a PROXY header says.

    `source` and `destination` are the ends of the connection that the first proxy accepted; both
    are None when it does not say: then the connection's own ends count.
    """

    source: Address | UnixAddress | None
    destination: Address | UnixAddress | None
    is_local: bool  # the proxy speaks for itself, for example in a health check
    tlvs: tuple[tuple[int, bytes], ...]
    length: int  # bytes of the header; what follows is the client's


def read(data: bytes) -> Header | Literal[Outcome.NEED_MORE]:
    """The PROXY header that `data` begins with.

    Raises:
        ParseError: it begins with none; with the first byte that rules it out.
    """
    if data.startswith(_SIGNATURE):
        return _read_v2(data)
    if data.startswith(_V1):
        return _read_v1(data)
    if _SIGNATURE.startswith(data) or _V1.startswith(data):
        return NEED_MORE
    raise ParseError("no PROXY header")


def begins(data: bytes) -> bool | None:
    """Whether `data` begins with a PROXY header, whole or not; None: too short to tell."""
    if data.startswith((_SIGNATURE, _V1)):
        return True
    return None if _SIGNATURE.startswith(data) or _V1.startswith(data) else False


def _read_v1(data: bytes) -> Header | Literal[Outcome.NEED_MORE]:
    stop = data.find(b"\r\n", 0, MAX_V1)
    if stop < 0:
        if len(data) >= MAX_V1:
            raise ParseError(f"no end within {MAX_V1} bytes")
        begins = data[:13]
        if not (_BEGINS_V1.match(data) or any(w.startswith(begins) for w in _WORDS_V1)):
            raise ParseError("neither TCP4, TCP6 nor UNKNOWN")
        return NEED_MORE
    line = data[:stop]
    length = stop + 2
    if line == b"PROXY UNKNOWN" or line.startswith(b"PROXY UNKNOWN "):
        # Section 2.1: the text between that and the end of the line is to be ignored.
        return Header(None, None, False, (), length)
    fields = _LINE_V1.fullmatch(line)
    if fields is None:
        raise ParseError("not PROXY TCP4|TCP6 SOURCE DESTINATION PORT PORT")
    version = 4 if fields[1] == b"TCP4" else 6
    source, destination = (
        Address(_parse_ip(fields[n].decode("ascii"), version), _port(fields[n + 2])) for n in (2, 3)
    )
    return Header(source, destination, False, (), length)


_WORDS_V1: Final = (b"PROXY TCP4", b"PROXY TCP6", b"PROXY UNKNOWN")


def _parse_ip(text: str, version: int) -> str:
    try:
        ip = ipaddress.ip_address(text)
    except ValueError as error:
        raise ParseError(f"{text!r} is no address") from error
    if ip.version != version:
        raise ParseError(f"{text!r} is not of the family that is said")
    return _canonical(ip)


def _port(digits: bytes) -> int:
    port = int(digits)
    if port > 65535:
        raise ParseError(f"{port} is no port")
    return port


def _canonical(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    # As everywhere: no rule is passed by writing an IPv4 address as IPv6.
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip_text(ip)


def _read_v2(data: bytes) -> Header | Literal[Outcome.NEED_MORE]:
    cursor = Cursor(data, len(_SIGNATURE))
    try:
        version_command = cursor.get_uint8()
        command = version_command & 0x0F
        if version_command & 0xF0 != _VERSION_2 or command not in (_LOCAL, _PROXY):
            raise ParseError("neither LOCAL nor PROXY of version 2")
        family = cursor.get_uint8()
        if command == _PROXY and family not in _SIZES:
            raise ParseError(f"a family that is no stream (0x{family:02x})")
        size = cursor.get_uint16()
        if size < _SIZES.get(family, 0) and command == _PROXY:
            raise ParseError("too short for its addresses")
        if _FIXED + size > MAX_V2:
            raise ParseError(f"longer than {MAX_V2} bytes")
        block = cursor.get_bytes(size)
    except Truncated:
        return NEED_MORE
    if command == _LOCAL:
        # Section 2.2: everything that a LOCAL header carries is to be passed over.
        return Header(None, None, True, (), cursor.position)
    source, destination = _addresses(family, block)
    tlvs = _read_tlvs(data, cursor.position - size + _SIZES[family], cursor.position)
    return Header(source, destination, False, tlvs, cursor.position)


def _addresses(
    family: int, block: bytes
) -> tuple[Address | UnixAddress | None, Address | UnixAddress | None]:
    if family == _UNSPEC:
        return None, None
    if family == _UNIX:
        return _unix(block[:_SUN_PATH]), _unix(block[_SUN_PATH : 2 * _SUN_PATH])
    width = 4 if family == _TCP4 else 16
    source_port, destination_port = struct.unpack_from(">HH", block, 2 * width)
    return (
        Address(_canonical(ipaddress.ip_address(block[:width])), source_port),
        Address(_canonical(ipaddress.ip_address(block[width : 2 * width])), destination_port),
    )


def _unix(path: bytes) -> UnixAddress:
    return UnixAddress(path.partition(b"\0")[0].decode("utf-8", "backslashreplace"))


def _read_tlvs(data: bytes, start: int, end: int) -> tuple[tuple[int, bytes], ...]:
    """The TLVs between two offsets; checks a checksum among them (section 2.2.3)."""
    cursor = Cursor(data, start, end)
    tlvs = []
    while cursor.remaining:
        kind = cursor.get_uint8()
        value = cursor.get_bytes(cursor.get_uint16())
        if kind == TLV_CRC32C:
            if len(value) != 4:
                raise ParseError("a checksum of other than four bytes")
            at = cursor.position - 4
            if crc32c(data[:at] + bytes(4) + data[at + 4 : end]) != int.from_bytes(value, "big"):
                raise ParseError("wrong checksum")
        elif kind == TLV_UNIQUE_ID and len(value) > _MAX_UNIQUE_ID:
            raise ParseError(f"a unique id of more than {_MAX_UNIQUE_ID} bytes")
        tlvs.append((kind, value))
    return tuple(tlvs)


def build_v1(source: Address | None, destination: Address | None) -> bytes:
    """A header of version 1; without both addresses it says UNKNOWN."""
    if source is None or destination is None:
        return b"PROXY UNKNOWN\r\n"
    family, first, second = _one_family(source, destination)
    name = "TCP4" if family == _TCP4 else "TCP6"
    ends = f"{ip_text(first)} {ip_text(second)} {source.port} {destination.port}"
    return f"PROXY {name} {ends}\r\n".encode("ascii")


def build_v2(
    source: Address | None,
    destination: Address | None,
    tlvs: Sequence[tuple[int, bytes]] = (),
    *,
    is_local: bool = False,
    checksum: bool = False,
    datagrams: bool = False,
) -> bytes:
    """A header of version 2; without both addresses it says nothing about them.

    With `is_local` we speak for ourselves.  `checksum` adds a CRC-32C over the whole header.
    With `datagrams` it says UDP.

    Raises:
        ValueError: a TLV has more than 65,535 bytes, or the whole is longer than 4,096.
    """
    if source is None or destination is None or is_local:
        family, block = _UNSPEC, b""
    else:
        family, first, second = _one_family(source, destination)
        family = _UDP[family] if datagrams else family
        ports = struct.pack(">HH", source.port, destination.port)
        block = first.packed + second.packed + ports
    for kind, value in tlvs:
        if len(value) > 0xFFFF:
            raise ValueError("a TLV has 65,535 bytes at most")
        block += struct.pack(">BH", kind, len(value)) + value
    if checksum:
        block += struct.pack(">BHL", TLV_CRC32C, 4, 0)
    if _FIXED + len(block) > MAX_V2:
        raise ValueError(f"longer than {MAX_V2} bytes")
    command = _VERSION_2 | (_LOCAL if is_local else _PROXY)
    header = _SIGNATURE + struct.pack(">BBH", command, family, len(block)) + block
    return header[:-4] + crc32c(header).to_bytes(4, "big") if checksum else header


_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


def _one_family(source: Address, destination: Address) -> tuple[int, _Ip, _Ip]:
    """The family that can say both addresses; a header has room for one family only."""
    first, second = (
        ipaddress.ip_address(_canonical(ipaddress.ip_address(address.host)))
        for address in (source, destination)
    )
    if first.version == second.version:
        return (_TCP4 if first.version == 4 else _TCP6), first, second
    return _TCP6, _as_ipv6(first), _as_ipv6(second)


def _as_ipv6(ip: _Ip) -> ipaddress.IPv6Address:
    if isinstance(ip, ipaddress.IPv6Address):
        return ip
    return ipaddress.IPv6Address(bytes(10) + b"\xff\xff" + ip.packed)


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), RFC 3309 appendix B; `zlib.crc32` is another polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF

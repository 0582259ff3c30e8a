"""Addresses as users write them: `ip:port`, `[ip6]:port`, `name:port`, `unix:/path`.

Pure text and numbers: nothing here opens a socket or asks a resolver.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from typing import NamedTuple

MAX_NAME_LENGTH = 253  # RFC 1035 section 2.3.4: 255 octets on the wire, 253 as text
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


class AddressError(ValueError):
    """A text that is no address; the message says which part is wrong."""


class Address(NamedTuple):
    """An IP address in canonical text form and a port in host order."""

    host: str
    port: int

    @property
    def is_ipv6(self) -> bool:
        """Whether the host is an IPv6 address."""
        return ":" in self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class HostPort(NamedTuple):
    """A name that still has to be resolved, and a port in host order."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"{self.name}:{self.port}"


class UnixAddress(NamedTuple):
    """A unix stream socket's path."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


def parse_port(text: str, *, allow_zero: bool = False) -> int:
    """A port number from decimal digits.

    Raises:
        AddressError: not one to five ASCII digits, above 65535, or 0 without `allow_zero`.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        raise AddressError(f"{text!r} is not a port number")
    port = int(text)
    if port > 65535 or (port == 0 and not allow_zero):
        raise AddressError(f"port {port} is out of range")
    return port


def is_name(text: str) -> bool:
    """Whether this could be a host name: dot-separated labels, and not an IPv4 address in disguise.

    A last label that is a number makes an address of it for inet_aton(3), and so for resolvers:
    `127.1`, `0x7f000001` and `017700000001` all are 127.0.0.1.  No top-level domain is a number.
    """
    text = text.removesuffix(".")
    if not text or len(text) > MAX_NAME_LENGTH:
        return False
    labels = text.split(".")
    return all(_LABEL.fullmatch(label) for label in labels) and not _NUMBER.fullmatch(labels[-1])


def parse_destination(text: str) -> Address | HostPort:
    """An `ip:port`, `[ip6]:port` or `name:port` that a client or a rule may name.

    An IPv4-mapped IPv6 address becomes the IPv4 address it stands for, so that no policy can be
    passed by writing an address another way; a zone (`%eth0`) is refused.

    Raises:
        AddressError: the text is none of the three forms.
    """
    return _parse_host_port(text, allow_zero=False)


@functools.lru_cache(maxsize=1024)
def _parse_host_port(text: str, *, allow_zero: bool) -> Address | HostPort:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise AddressError(f"{text!r} is not [ip6]:port")
        return Address(_ipv6(host), parse_port(rest[1:], allow_zero=allow_zero))
    host, colon, port_text = text.rpartition(":")
    if not colon:
        raise AddressError(f"{text!r} has no :port")
    if ":" in host:
        raise AddressError(f"{text!r}: write an IPv6 address in brackets, [ip6]:port")
    port = parse_port(port_text, allow_zero=allow_zero)
    try:
        return Address(str(ipaddress.IPv4Address(host)), port)
    except ValueError:
        pass
    if not is_name(host):
        raise AddressError(f"{host!r} is neither an IP address nor a host name")
    return HostPort(host.lower().removesuffix("."), port)


def _ipv6(host: str) -> str:
    if "%" in host:
        raise AddressError(f"{host!r}: an address with a zone is not accepted")
    try:
        ip = ipaddress.IPv6Address(host)
    except ValueError as error:
        raise AddressError(f"{host!r} is not an IPv6 address") from error
    return str(ip.ipv4_mapped or ip)


def parse_bind(text: str) -> Address | UnixAddress:
    """What a listener binds: `ip:port`, `[ip6]:port` (port 0: the kernel chooses) or `unix:/path`.

    Raises:
        AddressError: a name, or none of these forms.
    """
    if text.startswith("unix:"):
        return _unix(text)
    parsed = _parse_host_port(text, allow_zero=True)
    if isinstance(parsed, HostPort):
        raise AddressError(f"{text!r}: a listener binds an IP address, not a name")
    return parsed


def parse_server(text: str) -> Address | HostPort | UnixAddress:
    """Where a rule or an upstream connects to: what `parse_destination` takes, or `unix:/path`.

    Raises:
        AddressError: none of these forms.
    """
    return _unix(text) if text.startswith("unix:") else parse_destination(text)


def _unix(text: str) -> UnixAddress:
    path = text.removeprefix("unix:")
    # Blanks would tear the columns of `show`, and what cannot be printed cannot be encoded either.
    if not path.startswith("/") or not path.isprintable() or " " in path:
        raise AddressError(f"{text!r}: unix: wants an absolute, printable path without blanks")
    # 107 bytes and the final NUL: sizeof(sun_path) in unix(7)
    if len(path.encode()) > 107:
        raise AddressError(f"{text!r}: a unix socket's path has at most 107 bytes")
    return UnixAddress(path)

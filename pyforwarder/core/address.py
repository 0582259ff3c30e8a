"""Addresses as users write them: `ip:port`, `[ip6]:port`, `name:port`, `unix:/path`.

A listener may also bind `ip:first-last` and `systemd:NAME`, a server be `host:same`.

Pure text and numbers: nothing here opens a socket or asks a resolver.
"""

from __future__ import annotations

import functools
import ipaddress
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

ANY_IPV4 = "0.0.0.0"
ANY_IPV6 = "::"
MAX_NAME_LENGTH = 253  # RFC 1035 section 2.3.4: 255 octets on the wire, 253 as text
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


class AddressError(ValueError):
    """A text that is no address; the message says which part is wrong."""


# What people write for the number of a port, or mean by the scheme of a URL (RFC 7605).
_SERVICES = {
    "ssh": 22,
    "smtp": 25,
    "domain": 53,
    "dns": 53,
    "http": 80,
    "https": 443,
    "postgres": 5432,
    "postgresql": 5432,
    "redis": 6379,
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)
_BARE_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%[^\]:]*)?")


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


def is_this_host(address: Address | HostPort | UnixAddress | SamePort) -> bool:
    """Whether it is another server at each host: a path, loopback, or good on one link alone."""
    if isinstance(address, UnixAddress):
        return True
    name = address.name if isinstance(address, HostPort) else address.host
    host, _, zone = name.rstrip(".").lower().partition("%")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return bool(zone) or host == "localhost" or host.endswith(".localhost")
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    ip = mapped or ip
    return bool(zone) or ip.is_loopback or ip.is_link_local or ip.is_unspecified


class PortRange(NamedTuple):
    """Consecutive ports of one IP address, both ends included."""

    host: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{Address(self.host, self.first)}-{self.last}"

    def addresses(self) -> tuple[Address, ...]:
        """Each of them."""
        return tuple(Address(self.host, port) for port in range(self.first, self.last + 1))


class SystemdSockets(NamedTuple):
    """The listening sockets that systemd passes under a name (sd_listen_fds_with_names(3))."""

    name: str

    def __str__(self) -> str:
        return f"systemd:{self.name}"


class SamePort(NamedTuple):
    """A server's host, an address or a name; its port is the one that the client connected to."""

    host: str
    is_name: bool

    def __str__(self) -> str:
        return f"[{self.host}]:same" if ":" in self.host else f"{self.host}:same"

    def at(self, port: int) -> Address | HostPort:
        """The server for a client that has connected to this port."""
        return HostPort(self.host, port) if self.is_name else Address(self.host, port)


class NameIn(NamedTuple):
    """The name that stands in the first packet (`sni`, `host`), and a port in host order."""

    where: str
    port: int

    def __str__(self) -> str:
        return f"{self.where}:{self.port}"


IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
# What a listener binds, as it is written, and what it comes to.
Bind = Address | UnixAddress | SystemdSockets
BindEntry = Bind | PortRange
# Where a rule or an upstream connects to.
ServerAddress = Address | HostPort | UnixAddress | SamePort

_PORTS = re.compile(r"(.*:)([0-9]{1,5})-([0-9]{1,5})", re.DOTALL)
_OTHER_RANGE = re.compile(r"(.*:)?([0-9]{1,5})( *(?:-|\.\.|,) *)([0-9]{0,5})", re.DOTALL)
_LINK_LOCAL = ipaddress.IPv6Network("fe80::/10")
# dev_valid_name() in net/core/dev.c, and what would end the address.
_ZONE = re.compile(r"[^\s/:%\]]{1,15}")
# What systemd takes for FileDescriptorName= (fdname_is_valid() in src/basic/fd-util.c), without
# what would tear the columns of `show`.
_FD_NAME = re.compile(r"[!-9;-~]{1,255}")


def ip_text(ip: IpAddress) -> str:
    """An address as text, the same under every version of Python, whose `str` changes.

    IPv6 is hexadecimal and shortened as in RFC 5952 section 4, with no dotted part: the PROXY
    protocol takes none (section 2.1), and 3.13's `str` writes one. A zone stays.
    """
    if isinstance(ip, ipaddress.IPv4Address):
        return ".".join(str(byte) for byte in ip.packed)
    words = [f"{high << 8 | low:x}" for high, low in zip(*[iter(ip.packed)] * 2, strict=True)]
    at, length = _longest_zeros(words)
    if length > 1:
        text = f"{':'.join(words[:at])}::{':'.join(words[at + length :])}"
    else:
        text = ":".join(words)
    return f"{text}%{ip.scope_id}" if ip.scope_id is not None else text


def _longest_zeros(words: list[str]) -> tuple[int, int]:
    """Where the longest run of zeros is (the first of several), and its length."""
    best = (0, 0)
    at = 0
    for word, run in itertools.groupby(words):
        length = len(list(run))
        if word == "0" and length > best[1]:
            best = (at, length)
        at += length
    return best


def network_text(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    """A network as text: its address as `ip_text` writes it, and its prefix length."""
    return f"{ip_text(network.network_address)}/{network.prefixlen}"


def parse_port(text: str, *, allow_zero: bool = False) -> int:
    """A port number from decimal digits.

    Raises:
        AddressError: not one to five ASCII digits, above 65535, or 0 without `allow_zero`.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        service = _SERVICES.get(text.lower())
        hint = f": write {service}" if service else ""
        raise AddressError(f"{text!r} is not a port number{hint}")
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
def _parse_host_port(text: str, *, allow_zero: bool, with_zone: bool = False) -> Address | HostPort:
    url = _URL.fullmatch(text)
    if url:
        raise AddressError(f"{text!r} is a URL: write {_without_scheme(url)}")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            hint = f", but has no port: write {text}:PORT" if bracket and not rest else ""
            raise AddressError(f"{text!r} is not [ip6]:port{hint}")
        ip = _ipv6_with_zone(host) if with_zone else _ipv6(host)
        return Address(ip, parse_port(rest[1:], allow_zero=allow_zero))
    host, colon, port_text = text.rpartition(":")
    if not colon:
        missing = f"127.0.0.1:{text}" if text.isdigit() else f"{text or 'HOST'}:PORT"
        raise AddressError(f"{text!r} has no :port: write {missing}")
    if ":" in host:
        raise AddressError(
            f"{text!r}: write an IPv6 address in brackets, {_in_brackets(text, host, port_text)}"
        )
    if host in ("", "*"):
        raise AddressError(
            f"{text!r} names no address: write 127.0.0.1:{port_text} for this host, "
            f"0.0.0.0:{port_text} for all its IPv4 addresses, [::]:{port_text} for IPv6"
        )
    port = parse_port(port_text, allow_zero=allow_zero)
    try:
        return Address(ip_text(ipaddress.IPv4Address(host)), port)
    except ValueError:
        pass
    if not is_name(host):
        raise AddressError(f"{host!r} is neither an IP address nor a host name")
    return HostPort(host.lower().removesuffix("."), port)


def _without_scheme(url: re.Match[str]) -> str:
    """The host and port that a URL means."""
    scheme, place, path = url.groups()
    place = place.rpartition("@")[2] or "HOST"
    if re.search(r":[0-9]*$", place) and not place.endswith("]"):
        with_port = place
    else:
        with_port = f"{place}:{_SERVICES.get(scheme.lower(), 'PORT')}"
    return f"{with_port} (a path is matched by a rule)" if path.strip("/") else with_port


def _in_brackets(text: str, host: str, port_text: str) -> str:
    if not _BARE_IPV6.fullmatch(text):
        return "[ip6]:port"
    # `::1:80` may be meant either way: the last group is a port, or there is none.
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return f"[{text}]:PORT"
    return f"[{host}]:{port_text} or [{text}]:PORT"


def _ipv6(host: str) -> str:
    if "%" in host:
        raise AddressError(f"{host!r}: an address with a zone is not accepted")
    try:
        ip = ipaddress.IPv6Address(host)
    except ValueError as error:
        raise AddressError(f"{host!r} is not an IPv6 address") from error
    return ip_text(ip.ipv4_mapped or ip)


def _ipv6_with_zone(host: str) -> str:
    """An address of this host's networks: a link-local one says on which of them."""
    plain, percent, zone = host.partition("%")
    ip = _ipv6(plain)
    is_link_local = ":" in ip and ipaddress.IPv6Address(ip) in _LINK_LOCAL
    if not percent:
        if is_link_local:
            raise AddressError(
                f"{host!r} is on every link: say on which interface, for example [{ip}%eth0]:PORT"
            )
        return ip
    if not is_link_local:
        raise AddressError(f"{host!r}: only a link-local address has a zone: write [{ip}]:PORT")
    if not _ZONE.fullmatch(zone):
        raise AddressError(f"{host!r}: {zone!r} is no name of an interface, like eth0")
    return f"{ip}%{zone}"


def parse_bind_entry(text: str) -> BindEntry:
    """What may stand in a listener's `bind`.

    What `parse_bind` takes, `ip:first-last` for consecutive ports, or `systemd:NAME`.

    Raises:
        AddressError: none of these forms.
    """
    if text.partition(":")[0] == "systemd":
        name = text.removeprefix("systemd").removeprefix(":")
        if not _FD_NAME.fullmatch(name):
            raise AddressError(
                f"{text!r}: write systemd:NAME, the FileDescriptorName= of a .socket unit"
            )
        return SystemdSockets(name)
    ports = _PORTS.fullmatch(text)
    if ports is None or text.startswith("unix:"):
        _refuse_other_ranges(text)
        return parse_bind(text)
    first, last = parse_bind(ports[1] + ports[2]), parse_port(ports[3])
    assert isinstance(first, Address)  # it begins with no unix:
    if not 0 < first.port < last:
        raise AddressError(
            f"{text!r}: a range of ports goes upwards, like {Address(first.host, 9200)}-9210"
        )
    return PortRange(first.host, first.port, last)


def _refuse_other_ranges(text: str) -> None:
    """Explain how several ports are written here, if they were written in another way."""
    meant = _OTHER_RANGE.fullmatch(text)
    if meant is None or text.startswith("unix:"):
        return
    host, first, between, last = meant.groups()
    if between.strip() == ",":
        raise AddressError(
            f"{text!r}: write several addresses in a list, like [{host or '0.0.0.0:'}{first}, "
            f"{host or '0.0.0.0:'}{last or 'PORT'}]"
        )
    ports = f"{first}-{last or 'PORT'}"
    if host:
        raise AddressError(f"{text!r}: write a range of ports as {host}{ports}")
    raise AddressError(
        f"{text!r} names no address: write 127.0.0.1:{ports} for this host, 0.0.0.0:{ports} for "
        "all its IPv4 addresses"
    )


def parse_bind(text: str) -> Address | UnixAddress:
    """One address to bind: `ip:port`, `[ip6]:port` (port 0: the kernel chooses) or `unix:/path`.

    Raises:
        AddressError: a name, or none of these forms.
    """
    if text.startswith("unix:"):
        return _unix(text)
    parsed = _parse_host_port(text, allow_zero=True, with_zone=True)
    if isinstance(parsed, HostPort):
        hint = ""
        if parsed.name == "localhost":
            hint = f": write 127.0.0.1:{parsed.port} or [::1]:{parsed.port}"
        raise AddressError(f"{text!r}: a listener binds an IP address, not a name{hint}")
    return parsed


def parse_server(text: str) -> Address | HostPort | UnixAddress:
    """Where we connect to: what `parse_destination` takes, with a zone too, or `unix:/path`.

    Raises:
        AddressError: none of these forms.
    """
    if text.startswith("unix:"):
        return _unix(text)
    return _parse_host_port(text, allow_zero=False, with_zone=True)


def parse_configured_server(text: str) -> ServerAddress:
    """A server in a configuration: what `parse_server` takes, or `host:same`.

    Raises:
        AddressError: none of these forms.
    """
    host, _, port = text.rpartition(":")
    if port.lower() == "same" and port != "same":
        raise AddressError(f"{text!r}: write {host}:same")
    if re.fullmatch("[0-9]{1,5}-[0-9]{1,5}", port):
        raise AddressError(
            f"{text!r}: a server has one port; {host}:same is the one that the client came to"
        )
    if port != "same" or host in ("", "unix"):
        return parse_server(text)
    # Any port does: the host is judged.
    parsed = _parse_host_port(f"{host}:1", allow_zero=False, with_zone=True)
    return SamePort(parsed[0], isinstance(parsed, HostPort))


def _unix(text: str) -> UnixAddress:
    path = text.removeprefix("unix:")
    # Blanks would tear the columns of `show`, and what cannot be printed cannot be encoded either.
    if not path.startswith("/") or not path.isprintable() or " " in path:
        raise AddressError(f"{text!r}: unix: wants an absolute, printable path without blanks")
    # 107 bytes and the final NUL: sizeof(sun_path) in unix(7)
    if len(path.encode()) > 107:
        raise AddressError(f"{text!r}: a unix socket's path has at most 107 bytes")
    return UnixAddress(path)


def bind_text(binds: Sequence[Bind]) -> str:
    """Addresses as one word, as `show` has them: separated by commas, consecutive ports as one."""
    return ",".join(map(str, bind_entries(binds)))


def bind_entries(binds: Sequence[Bind]) -> list[BindEntry]:
    """The same addresses, with consecutive ports as ranges."""
    entries: list[BindEntry] = []
    for bind in binds:
        before = entries[-1] if entries else None
        if isinstance(bind, Address) and bind.port > 1:
            if isinstance(before, Address) and bind == (before.host, before.port + 1):
                entries[-1] = PortRange(bind.host, before.port, bind.port)
                continue
            if isinstance(before, PortRange) and bind == (before.host, before.last + 1):
                entries[-1] = before._replace(last=bind.port)
                continue
        entries.append(bind)
    return entries

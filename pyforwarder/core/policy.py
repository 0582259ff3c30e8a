"""Which destinations a client may name: judged by address and port, after names are resolved.

Only decisions live here: no resolver, no socket, no clock. A caller asks about *every* address a
name resolved to and connects to the very address it asked about, so that a second DNS answer
cannot slip past the first one's check.

What makes an address dangerous is not its text but where the kernel or a gateway takes it, so:

- an address is judged as a number, never as text: `127.1`, `0x7f000001` or `::ffff:7f00:1` are
  either refused as malformed or judged as what they mean;
- an IPv6 address that carries an IPv4 address (NAT64, 6to4, Teredo, ISATAP, ...) reaches that
  IPv4 address at some gateway, so both must be allowed;
- guarded addresses (link-local, cloud metadata, unspecified, multicast, broadcast) are refused
  even by `any` and by every network wider than the guarded block: a rule that wants one names it.
"""

from __future__ import annotations

import functools
import ipaddress
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.core.address import (
    Address,
    AddressError,
    UnixAddress,
    ip_text,
    network_text,
    parse_port,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
IP = ipaddress.IPv4Address | ipaddress.IPv6Address

# One destination costs about 250 bytes here; a client that cycles through more than this many
# only makes the next question as slow as an uncached one.
CACHE_SIZE: Final = 4096

ANY_PORT: Final = ((1, 65535),)


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


LOOPBACK: Final = _networks("127.0.0.0/8", "::1/128")
PRIVATE: Final = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
ANY: Final = _networks("0.0.0.0/0", "::/0")

# The IANA special-purpose registries (RFC 6890 and its updates) without what is globally
# reachable in them. 64:ff9b::/96 stays public: behind DNS64 it is how the public IPv4 internet
# looks, and the IPv4 address it carries is judged as well.
_NOT_PUBLIC: Final = _networks(
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",  # shared by carriers' NATs, RFC 6598
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
_PUBLIC_V6: Final = _networks("2000::/3", "64:ff9b::/96")
_NOT_PUBLIC_V6: Final = _networks("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")


class Guard(NamedTuple):
    """A block that only an entry within the block itself can allow."""

    network: Network
    what: str


GUARDS: Final = tuple(
    Guard(ipaddress.ip_network(text), what)
    for text, what in (
        ("0.0.0.0/8", "unspecified"),  # Linux connects 0.0.0.0 to loopback
        ("::/128", "unspecified"),
        ("169.254.0.0/16", "link-local"),
        ("fe80::/10", "link-local"),
        ("224.0.0.0/4", "multicast"),
        ("ff00::/8", "multicast"),
        ("255.255.255.255/32", "broadcast"),
        # RFC 8215: where in such an address the IPv4 address stands is the operator's choice, so
        # it cannot be judged; the operator of such a gateway names the block.
        ("64:ff9b:1::/48", "local NAT64"),
        # Instance metadata: credentials for any program that can connect. An address of its own
        # inside link-local, so that allowing a link-local network does not give them away.
        ("169.254.169.254/32", "cloud metadata"),  # AWS, Azure, Google, OpenStack and others
        ("169.254.170.2/32", "cloud metadata"),  # AWS ECS task credentials
        ("169.254.170.23/32", "cloud metadata"),  # AWS EKS pod identity
        ("100.100.100.200/32", "cloud metadata"),  # Alibaba
        ("168.63.129.16/32", "cloud metadata"),  # Azure's wire server, a public address
        ("192.0.0.192/32", "cloud metadata"),  # Oracle, classic
        ("fd00:ec2::254/128", "cloud metadata"),  # AWS
        ("fd00:ec2::23/128", "cloud metadata"),  # AWS EKS pod identity
        ("fd20:ce::254/128", "cloud metadata"),  # Google
        ("fd00:c1::a9fe:a9fe/128", "cloud metadata"),  # Oracle
        ("fd00:42::42/128", "cloud metadata"),  # Scaleway
    )
)


def _is_public(ip: IP) -> bool:
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _NOT_PUBLIC)
    return any(ip in n for n in _PUBLIC_V6) and not any(ip in n for n in _NOT_PUBLIC_V6)


def _in_networks(networks: Sequence[Network]) -> Callable[[IP], bool]:
    return lambda ip: any(ip in network for network in networks)


_WORD_NETWORKS: Final = {"loopback": LOOPBACK, "private": PRIVATE, "any": ANY}
# What a word stands for. A word is never "exact": no guarded address is reached through it.
WORDS: Final[dict[str, Callable[[IP], bool]]] = {
    "loopback": _in_networks(LOOPBACK),
    "private": _in_networks(PRIVATE),
    "public": _is_public,
    "any": _in_networks(ANY),
}


def parse_ip(text: str) -> IP:
    """An address in the form the kernel will use it: IPv4-mapped IPv6 is IPv4, zones are dropped.

    Raises:
        ValueError: not a numeric address in the standard form.
    """
    ip = ipaddress.ip_address(text)
    if isinstance(ip, ipaddress.IPv6Address):
        return ip.ipv4_mapped or ipaddress.IPv6Address(int(ip))
    return ip


def carried_ipv4(ip: IP) -> tuple[ipaddress.IPv4Address, ...]:
    """The IPv4 addresses that a translator or a tunnel would read out of this IPv6 address."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ()
    number = int(ip)
    low = ipaddress.IPv4Address(number & 0xFFFF_FFFF)
    top = number >> 32
    if top == 0:
        # ::a.b.c.d, IPv4-compatible (RFC 4291 2.5.5.1); :: and ::1 are no such addresses.
        return (low,) if number > 1 else ()
    if top == 0xFFFF_0000:  # ::ffff:0:a.b.c.d, IPv4-translated (RFC 2765)
        return (low,)
    if top == 0x0064_FF9B << 64:  # 64:ff9b::a.b.c.d, NAT64 (RFC 6052)
        return (low,)
    if number >> 112 == 0x2002:  # 6to4 (RFC 3056)
        return (ipaddress.IPv4Address((number >> 80) & 0xFFFF_FFFF),)
    if number >> 96 == 0x2001_0000:  # Teredo (RFC 4380): the server, and the client inverted
        return (
            ipaddress.IPv4Address((number >> 64) & 0xFFFF_FFFF),
            ipaddress.IPv4Address(~number & 0xFFFF_FFFF),
        )
    if (number >> 32) & 0xFDFF_FFFF == 0x0000_5EFE:  # ISATAP (RFC 5214 section 6.1)
        return (low,)
    return ()


def parse_network(text: str) -> Network:
    """A CIDR or a single address; an IPv4-mapped IPv6 network is the IPv4 network it means.

    Raises:
        AddressError: no such thing, or bits are set behind the prefix.
    """
    if "%" in text:
        raise AddressError(f"{text!r}: an address with a zone is not accepted")
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        try:
            meant = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise AddressError(f"{text!r} is neither an address nor a network") from error
        raise AddressError(
            f"{text!r} has bits set behind its prefix: {network_text(meant)} is meant?"
        ) from error
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def parse_port_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """Inclusive ranges from `80`, `80,443` or `22,8000-8999`.

    Raises:
        AddressError: empty, out of 1 to 65535, or a range that runs backwards.
    """
    ranges = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low = parse_port(first)
        high = parse_port(last) if dash else low
        if high < low:
            raise AddressError(f"port range {part} runs backwards")
        ranges.append((low, high))
    return tuple(ranges)


class _Entry(NamedTuple):
    """One line of `allow`: a word (no network) or a network, and ports."""

    word: str
    network: Network | None
    ports: tuple[tuple[int, int], ...]

    def covers(self, ip: IP, port: int) -> bool:
        if not any(low <= port <= high for low, high in self.ports):
            return False
        return WORDS[self.word](ip) if self.network is None else ip in self.network

    def names(self, guard: Guard) -> bool:
        """Whether this entry asks for the guarded block, or a part of it, and nothing else."""
        network = self.network
        if isinstance(network, ipaddress.IPv4Network):
            return isinstance(guard.network, ipaddress.IPv4Network) and network.subnet_of(
                guard.network
            )
        if isinstance(network, ipaddress.IPv6Network):
            return isinstance(guard.network, ipaddress.IPv6Network) and network.subnet_of(
                guard.network
            )
        return False

    @property
    def is_single(self) -> bool:
        return self.network is not None and self.network.num_addresses == 1


def _parse_entry(text: str) -> _Entry:
    host, colon, ports = _split_ports(text)
    ranges = parse_port_ranges(ports) if colon else ANY_PORT
    if host in WORDS:
        return _Entry(host, None, ranges)
    try:
        return _Entry("", parse_network(host), ranges)
    except AddressError as error:
        if host.isascii() and host.isdigit():
            raise AddressError(
                f"{text!r} is no address; ports go behind one, and in a list such an entry needs "
                'quotes: "10.0.0.0/8:80,443"'
            ) from error
        if host and not any(character in host for character in ":/[]%") and not host[-1].isdigit():
            words = ", ".join(WORDS)
            raise AddressError(
                f"{host!r} is not one of {words}, and names are resolved before they are "
                "judged: write addresses or networks"
            ) from error
        raise


def _split_ports(text: str) -> tuple[str, str, str]:
    """The host part, a colon if ports follow, the ports."""
    if text.startswith("["):
        inside, bracket, rest = text[1:].partition("]")
        host, colon, ports = rest.partition(":")
        if not bracket or ":" not in inside or (host and not host.startswith("/")):
            raise AddressError(f"{text!r} is not [ip6], [ip6/bits]:ports or [ip6]/bits:ports")
        return inside + host, colon, ports
    if "/" in text:
        address, _, rest = text.partition("/")
        bits, colon, ports = rest.partition(":")
        return f"{address}/{bits}", colon, ports
    if text.count(":") > 1:
        # `fd00::1:80` is an address, and its writer may have meant port 80 of fd00::1.
        shorter, _, tail = text.rpartition(":")
        if tail.isdigit() and _is_ipv6(shorter):
            raise AddressError(
                f"{text!r} can be read in two ways: write [{shorter}]:{tail} or [{text}]"
            )
        return text, "", ""
    return text.partition(":")


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


class AllowList:
    """The destinations a rule lets its clients name; what is not listed is refused."""

    __slots__ = ("_entries", "_refusal", "entries")

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries: Final = tuple(entries)
        self._entries: Final = tuple(_parse_entry(entry) for entry in self.entries)
        # One cache per list, not lru_cache on the method: that would keep every list of every
        # reload alive.
        self._refusal = functools.lru_cache(maxsize=CACHE_SIZE)(self._judge)

    @classmethod
    def parse(cls, entries: Iterable[str]) -> AllowList:
        """A list from `loopback`, `private`, `public`, `any`, addresses and networks.

        Each may be followed by ports: `10.0.0.0/8:80,443,8000-8999`, `[fd00::/8]:443`, `any:22`.

        Raises:
            AddressError: an entry is none of these.
        """
        return cls(entries)

    def permits(self, ip: str, port: int) -> bool:
        """Whether a client may be connected to this numeric address and port.

        Anything that is not a numeric address in the standard form is refused.
        """
        return self._refusal(ip, port) is None

    def permits_port(self, port: int) -> bool:
        """Whether there is any address at all of which `permits` may say yes with this port.

        To be asked before a name is resolved: what is denied anyway costs no question.
        """
        return any(low <= port <= high for entry in self._entries for low, high in entry.ports)

    def refusal(self, ip: str, port: int) -> str | None:
        """Why `permits` says no, in words for `explain` and the log; None when it says yes."""
        return self._refusal(ip, port)

    def _judge(self, ip: str, port: int) -> str | None:
        try:
            parsed = parse_ip(ip)
        except ValueError:
            return f"{ip!r} is not a numeric address"
        return self._judge_parsed(parsed, port)

    def _judge_parsed(self, ip: IP, port: int) -> str | None:
        covering = [entry for entry in self._entries if entry.covers(ip, port)]
        if not covering:
            return f"allow does not list {ip_text(ip)} port {port}"
        guards = [guard for guard in GUARDS if ip in guard.network]
        covering = [entry for entry in covering if all(entry.names(guard) for guard in guards)]
        if not covering:
            return (
                f"{ip_text(ip)} is guarded ({guards[-1].what}), and allow does not name it exactly"
            )
        if any(entry.is_single for entry in covering):
            return None  # written out in full: the address that it carries was meant
        for carried in carried_ipv4(ip):
            reason = self._judge_parsed(carried, port)
            if reason is not None:
                return f"{ip_text(ip)} carries {ip_text(carried)}: {reason}"
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AllowList) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)

    def __repr__(self) -> str:
        return f"AllowList({list(self.entries)!r})"


class Networks:
    """A set of addresses without ports: who may send a PROXY header, which clients a rule takes."""

    __slots__ = ("_contains", "_entries", "entries")

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries: Final = tuple(entries)
        parsed = [_parse_entry(entry) for entry in self.entries]
        for text, entry in zip(self.entries, parsed, strict=True):
            if entry.ports is not ANY_PORT:
                raise AddressError(f"{text!r}: ports mean nothing here")
        self._entries: Final = tuple(parsed)
        self._contains = functools.lru_cache(maxsize=CACHE_SIZE)(self._judge)

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Networks:
        """A set from addresses, networks and the words of `AllowList`.

        Raises:
            AddressError: an entry is none of these, or has ports.
        """
        return cls(entries)

    def contains(self, ip: str) -> bool:
        """Whether this numeric address is in the set; text that is no address is not."""
        return self._contains(ip)

    def as_networks(self) -> tuple[Network, ...] | None:
        """The same set as networks alone; None: a word in it is no list of networks."""
        networks: list[Network] = []
        for entry in self._entries:
            if entry.network is not None:
                networks.append(entry.network)
            elif entry.word in _WORD_NETWORKS:
                networks += _WORD_NETWORKS[entry.word]
            else:
                return None
        return tuple(networks)

    def _judge(self, ip: str) -> bool:
        try:
            parsed = parse_ip(ip)
        except ValueError:
            return False
        return any(entry.covers(parsed, 1) for entry in self._entries)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Networks) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)

    def __repr__(self) -> str:
        return f"Networks({list(self.entries)!r})"


class OwnListeners:
    """The addresses this forwarder itself listens on: no destination may be one of them.

    `binds` are the addresses in force, port 0 already replaced by what the kernel chose.
    """

    __slots__ = ("_exact", "_paths", "_ports", "_wildcard_ports")

    def __init__(self, binds: Iterable[Address | UnixAddress]) -> None:
        exact = set()
        wildcard_ports = set()
        paths = set()
        for bind in binds:
            if isinstance(bind, UnixAddress):
                paths.add(bind.path)
            elif _parse_own(bind.host).is_unspecified:
                wildcard_ports.add(bind.port)
            else:
                exact.add((_parse_own(bind.host), bind.port))
        self._exact: Final = frozenset(exact)
        self._wildcard_ports: Final = frozenset(wildcard_ports)
        self._paths: Final = frozenset(paths)
        self._ports: Final = self._wildcard_ports | {port for _, port in exact}

    def includes(
        self, destination: Address | UnixAddress, *, is_local: Callable[[str], bool]
    ) -> bool:
        """Whether connecting there would come back to us.

        `is_local` is asked only about the port of a wildcard listener: does this host answer
        for that address (loopback and unspecified addresses are known to be local without it)?
        """
        if isinstance(destination, UnixAddress):
            return destination.path in self._paths
        if destination.port not in self._ports:
            return False
        try:
            ip = _parse_own(destination.host)
        except ValueError:
            return False
        if (ip, destination.port) in self._exact:
            return True
        if ip.is_unspecified:
            # connect(2) to 0.0.0.0 or :: goes to loopback, where any listener of this port may be.
            return destination.port in self._wildcard_ports or any(
                listener.is_loopback and port == destination.port for listener, port in self._exact
            )
        if destination.port in self._wildcard_ports:
            return ip.is_loopback or is_local(destination.host)
        return False


def _parse_own(host: str) -> IP:
    """An address whose zone does not matter: on whichever link, it may be this host's own."""
    return parse_ip(host.partition("%")[0])

"""Which part of an address counts as one client: its network, for limits."""

from __future__ import annotations

import ipaddress
from typing import Final, NamedTuple

# Addresses of IPv4 clients as IPv6 writes them: on a socket for both (RFC 4291 2.5.5.2), and behind
# a translator of the well-known prefix (RFC 6052 2.1). As one prefix of 64 bits they would all be
# one client.
_CARRY_IPV4: Final = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))


class ClientNetwork(NamedTuple):
    """What of an address counts as one client."""

    version: int  # of IP
    bits: int
    number: int  # these leading bits

    def __str__(self) -> str:
        width = 32 if self.version == 4 else 128
        make = ipaddress.IPv4Network if self.version == 4 else ipaddress.IPv6Network
        return str(make((self.number << (width - self.bits), self.bits)))

    @classmethod
    def parse(cls, text: str) -> ClientNetwork:
        """The network that `str` gives.

        Raises:
            ValueError: it is written in another way, or is none.
        """
        network = ipaddress.ip_network(text)
        if str(network) != text or "%" in text:
            raise ValueError(f"{text!r} is {network}")
        bits = network.prefixlen
        number = int(network.network_address) >> (network.max_prefixlen - bits)
        return cls(network.version, bits, number)


def network_of(host: str, *, ipv4_bits: int, ipv6_bits: int) -> bytes:
    """What of a client's address counts as one client.

    IPv4 inside of IPv6 counts as IPv4. Link-local addresses count whole, with their zone: a whole
    network has one prefix there.
    """
    address = _counted_address(host)
    if address.version == 6 and address.is_link_local:
        return host.encode()
    network = _network(address, ipv4_bits, ipv6_bits)
    return b"%d %x" % (network.version, network.number)


def fleet_network_of(host: str, *, ipv4_bits: int, ipv6_bits: int) -> ClientNetwork | None:
    """Return the network of an address for other machines; None where the address means somebody
    else there.
    """
    address = _counted_address(host)
    if address.is_link_local or address.is_loopback or address.is_unspecified:
        return None
    return _network(address, ipv4_bits, ipv6_bits)


def _counted_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 4 or not any(address in network for network in _CARRY_IPV4):
        return address
    return ipaddress.IPv4Address(address.packed[12:])


def _network(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, ipv4_bits: int, ipv6_bits: int
) -> ClientNetwork:
    bits = ipv4_bits if address.version == 4 else ipv6_bits
    return ClientNetwork(address.version, bits, int(address) >> (address.max_prefixlen - bits))

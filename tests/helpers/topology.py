"""Client, forwarder and server on three hosts: namespaces, and the wires between them.

    client c0 ---- f0 forwarder f1 ---- s0 server
                                f1 ---- r0 router r1 ---- s0 server       with a router

Every end has IPv4 and IPv6 addresses. On each of these topologies a client or a server may also be
local, which is to say on the forwarder's host and speaking to it over `lo`: see `Topology.way`.
Nothing is forwarded by routing, unless `direct` is asked for: then the client reaches the server
through the forwarder's host as through a router.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.helpers.netns import Network

_SIOCETHTOOL: Final = 0x8946  # linux/sockios.h
_ETHTOOL_STXCSUM, _ETHTOOL_SGRO = 0x17, 0x2C  # linux/ethtool.h
_LOCAL: Final = {4: "127.0.0.1", 6: "::1"}


@dataclass(frozen=True, slots=True)
class Way:
    """From a client to a server, each of them remote or local; addresses by version of IP."""

    name: str
    client: Network
    server: Network
    listener: dict[int, str]  # what the client connects to
    destination: dict[int, str]  # where the server listens
    # Where packets come in: (network, interface) at the client, the forwarder's both, the server.
    doors: tuple[tuple[Network, str], ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """Where everything is."""

    client: Network
    forwarder: Network
    server: Network
    router: Network | None

    def way(self, *, client_local: bool = False, server_local: bool = False) -> Way:
        """Between these two."""
        far = 2 if self.router is None else 3
        doors = (
            (self.forwarder, "lo") if client_local else (self.client, "c0"),
            (self.forwarder, "lo" if client_local else "f0"),
            (self.forwarder, "lo" if server_local else "f1"),
            (self.forwarder, "lo") if server_local else (self.server, "s0"),
        )
        where = {False: "remote", True: "local"}
        return Way(
            name=f"{where[client_local]} to {where[server_local]}",
            client=self.forwarder if client_local else self.client,
            server=self.forwarder if server_local else self.server,
            listener=_LOCAL if client_local else {4: "10.1.0.1", 6: "fd01::1"},
            destination=_LOCAL if server_local else {4: f"10.{far}.0.2", 6: f"fd{far:02}::2"},
            doors=tuple(dict.fromkeys(doors)),
        )

    def set(self, **settings: object) -> None:
        """Write settings on all three hosts (see `Network.set`)."""
        for network in (self.client, self.forwarder, self.server):
            network.set(**settings)

    def wire(self, kind: str) -> None:
        """wide: packets of 64 KiB, as veth has them, with checksums that nobody looks at.

        plain: every sender makes its segments and its checksums itself, and they are looked at.

        merged: likewise, but by the interface that gets them, which puts segments together (GRO).

        guest: the client's checksums are made when what they are of leaves the forwarder's host,
        as those of a virtual machine's guest.
        """
        for network, interface in self.way().doors:
            with network.entered():
                is_later = kind == "wide" or (kind == "guest" and interface == "c0")
                _offload(interface, _ETHTOOL_STXCSUM, on=is_later)
                _offload(interface, _ETHTOOL_SGRO, on=kind == "merged")

    def limit_path(self, mtu: int) -> None:
        """From now on the router passes nothing longer, and says so (RFC 1191, RFC 8201)."""
        assert self.router is not None
        self.router.ip(
            f"route replace 10.2.0.0/24 dev r0 mtu {mtu}",
            f"route replace 10.3.0.0/24 dev r1 mtu {mtu}",
            f"route replace fd02::/64 dev r0 mtu {mtu}",
            f"route replace fd03::/64 dev r1 mtu {mtu}",
        )

    def checksum_errors(self) -> int:
        """Segments that a TCP of these hosts has thrown away for that."""
        return sum(
            network.counters()["TcpInCsumErrors"]
            for network in (self.client, self.forwarder, self.server)
        )

    def segments_sent_again(self) -> int:
        """By a TCP of these hosts, until now."""
        return sum(
            network.counters()["TcpRetransSegs"]
            for network in (self.client, self.forwarder, self.server)
        )


@contextlib.contextmanager
def topology(
    *, client_mtu: int = 1500, server_mtu: int = 1500, router: bool = False, direct: bool = False
) -> Iterator[Topology]:
    """The hosts and wires, until the end of the block."""
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(contextlib.closing(Network())) for _ in range(3 + router)]
        client, forwarder, server = hosts[:3]
        for host in hosts:
            # A connection that lost its SYN would hand its round trip of a second down to all that
            # come after it: their first timeout would be three of these, with any datapath.
            host.set(ipv4__tcp_no_metrics_save=1)
        forwarder.set(ipv4__ip_forward=int(direct), ipv6__conf__all__forwarding=int(direct))
        lay_wire(client, "c0", forwarder, "f0", mtu=client_mtu, net=1)
        _route_by(client, "c0", net=1)
        if not router:
            lay_wire(server, "s0", forwarder, "f1", mtu=server_mtu, net=2)
            _route_by(server, "s0", net=2)
            yield Topology(client, forwarder, server, None)
            return
        between = hosts[3]
        between.set(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        lay_wire(between, "r0", forwarder, "f1", mtu=server_mtu, net=2)
        lay_wire(server, "s0", between, "r1", mtu=server_mtu, net=3)
        _route_by(server, "s0", net=3)
        between.ip("route add default via 10.2.0.1 dev r0", "route add ::/0 via fd02::1 dev r0")
        forwarder.ip(
            "route add 10.3.0.0/24 via 10.2.0.2 dev f1", "route add fd03::/64 via fd02::2 dev f1"
        )
        yield Topology(client, forwarder, server, between)


def _route_by(host: Network, interface: str, *, net: int) -> None:
    host.ip(
        f"route add default via 10.{net}.0.1 dev {interface}",
        f"route add ::/0 via fd{net:02}::1 dev {interface}",
    )


def lay_wire(far: Network, far_name: str, near: Network, name: str, *, mtu: int, net: int) -> None:
    """A pair of veths; the near end gets .1, the far end .2, of that net."""
    near.ip(f"link add {name} mtu {mtu} type veth peer name {far_name} mtu {mtu} netns {far.path}")
    for network, interface, number in ((near, name, 1), (far, far_name, 2)):
        network.ip(
            f"address add 10.{net}.0.{number}/24 dev {interface}",
            f"address add fd{net:02}::{number}/64 dev {interface} nodad",
            f"link set {interface} up",
        )


def _offload(interface: str, feature: int, *, on: bool) -> None:
    value = ctypes.create_string_buffer(struct.pack("=II", feature, on), 8)
    request = struct.pack("=16sQ16x", interface.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, request)

"""Where client, forwarder and server stand: network namespaces that belong to this run alone.

Every target gets a site of its own, so that none pays for what another left behind: connections in
TIME_WAIT, taken ports, programs attached to an interface.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.runtime.children import surroundings

if TYPE_CHECKING:
    from collections.abc import Iterator

FORWARDER_PORT: Final = 7000
SERVER_PORT: Final = 7001
INSTRUCTION_PORT: Final = 7002
DATAGRAM_PORT: Final = 7003
SNI_PORT: Final = 7004
HOST_PORT: Final = 7005
# One destination has about 28,000 source ports and each is taken for a minute after a close: at
# 10,000 connections a second one server address would be used up in three seconds.
SERVERS: Final = 32
SOURCES: Final = 200

_PREFIX: Final = "pfbench"
_NETNS: Final = Path("/run/netns")


@dataclass(frozen=True, slots=True)
class Range:
    """`count` IPv4 addresses from `first` on."""

    first: str
    count: int

    def addresses(self) -> list[str]:
        """Each of them as text."""
        start = ipaddress.IPv4Address(self.first)
        return [str(start + n) for n in range(self.count)]

    def __str__(self) -> str:
        return f"{self.first}+{self.count}"


@dataclass(frozen=True, slots=True)
class Site:
    """The places of one target: paths of namespaces, and the addresses there."""

    client_ns: Path
    forwarder_ns: Path
    server_ns: Path
    listen_ip: str
    sources: Range
    servers: Range


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, stdin=subprocess.DEVNULL, **surroundings())


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[Path]:
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield _NETNS / name
    finally:
        _ip("netns", "delete", name)


def _set(namespace: Path, setting: str) -> None:
    subprocess.run(
        ["nsenter", f"--net={namespace}", "sysctl", "-q", "-w", setting],
        check=True,
        stdin=subprocess.DEVNULL,
        **surroundings(),
    )


@contextlib.contextmanager
def loopback_site(target: str) -> Iterator[Site]:
    """Client, forwarder and server on one loopback interface."""
    with _namespace(f"{_PREFIX}-{os.getpid()}-{target}") as namespace:
        yield Site(
            client_ns=namespace,
            forwarder_ns=namespace,
            server_ns=namespace,
            listen_ip="127.0.0.1",
            sources=Range("127.1.0.1", SOURCES),
            servers=Range("127.2.0.1", SERVERS),
        )


@contextlib.contextmanager
def veth_site(target: str) -> Iterator[Site]:
    """Client, forwarder and server in three namespaces; the middle one can route as well.

    A direct connection is routed through the forwarder's namespace: what a gateway would do
    without a forwarder, over the same two links.
    """
    base = f"{_PREFIX}-{os.getpid()}-{target}"
    with (
        _namespace(f"{base}-c") as client,
        _namespace(f"{base}-f") as forwarder,
        _namespace(f"{base}-s") as server,
    ):
        for namespace, far, net in ((client, "c", 201), (server, "s", 202)):
            end, near = f"{far}0", f"f{far}0"
            # fmt: off
            _ip("-n", forwarder.name, "link", "add", near, "type", "veth",
                "peer", "name", end, "netns", namespace.name)
            # fmt: on
            _ip("-n", forwarder.name, "address", "add", f"10.{net}.0.1/24", "dev", near)
            _ip("-n", namespace.name, "address", "add", f"10.{net}.0.2/24", "dev", end)
            _ip("-n", forwarder.name, "link", "set", near, "up")
            _ip("-n", namespace.name, "link", "set", end, "up")
            # Hundreds of addresses by one local route, reached through one neighbour: as
            # addresses of the link they would overflow the kernel's neighbour table.
            _ip("-n", namespace.name, "route", "add", "local", f"10.{net}.1.0/24", "dev", "lo")
            # fmt: off
            _ip("-n", forwarder.name, "route", "add", f"10.{net}.1.0/24",
                "via", f"10.{net}.0.2", "dev", near)
            _ip("-n", namespace.name, "route", "add", "default", "via", f"10.{net}.0.1")
            # fmt: on
        _set(forwarder, "net.ipv4.ip_forward=1")
        yield Site(
            client_ns=client,
            forwarder_ns=forwarder,
            server_ns=server,
            listen_ip="10.201.0.1",
            sources=Range("10.201.1.1", SOURCES),
            servers=Range("10.202.1.1", SERVERS),
        )


SITES: Final = {"lo": loopback_site, "veth": veth_site}


def remove_leftovers() -> None:
    """Delete the namespaces of runs that were killed; those of living ones stay."""
    for path in _NETNS.glob(f"{_PREFIX}-*"):
        pid = path.name.split("-")[1]
        if not Path("/proc", pid).exists():
            _ip("netns", "delete", path.name)

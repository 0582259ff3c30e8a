"""Which local process is behind a loopback end of a pair."""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING, Final

import psutil

from pyforwarder.core.address import Address, AddressError, ip_text, parse_destination

if TYPE_CHECKING:
    from collections.abc import Callable

# Looking means reading every process's descriptors.  At most this part of the time goes into it,
# however many there are.
_SHARE_OF_TIME: Final = 0.05
_AT_MOST_EVERY_S: Final = 2.0


class LocalProcesses:
    """Names of processes by the socket they hold; looks anew now and then by itself."""

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._next_look_s = float("-inf")
        self._pids: dict[tuple[Address, Address], int] = {}
        self._names: dict[int, str] = {}

    def name_of(self, own: str, peer: str) -> str:
        """`name[pid]` of the process whose socket is bound to `own` and connected to `peer`.

        Empty if `own` is no loopback address, or if the process is not known (another network
        namespace, gone, or not for us to see).
        """
        key = _address(own), _address(peer)
        if key[0] is None or key[1] is None or not ipaddress.ip_address(key[0].host).is_loopback:
            return ""
        self._scan()
        pid = self._pids.get((key[0], key[1]))
        return "" if pid is None else f"{self._name(pid)}[{pid}]"

    def _scan(self) -> None:
        began_s = self._monotonic_s()
        if began_s < self._next_look_s:
            return
        self._names.clear()  # a pid may be another process's by now
        try:
            connections = psutil.net_connections(kind="tcp")
        except (psutil.Error, OSError):  # no permission: pairs are shown without names
            connections = []
        self._pids = {
            (
                _normal(found.laddr.ip, found.laddr.port),
                _normal(found.raddr.ip, found.raddr.port),
            ): (found.pid)
            for found in connections
            if found.pid is not None and found.laddr and found.raddr
        }
        took_s = self._monotonic_s() - began_s
        self._next_look_s = began_s + max(_AT_MOST_EVERY_S, took_s / _SHARE_OF_TIME)

    def _name(self, pid: int) -> str:
        if pid not in self._names:
            try:
                self._names[pid] = psutil.Process(pid).name()
            except psutil.Error:
                self._names[pid] = "?"
        return self._names[pid]


def _address(text: str) -> Address | None:
    try:
        parsed = parse_destination(text)
    except AddressError:  # "-", unix:/path
        return None
    return parsed if isinstance(parsed, Address) else None


def _normal(host: str, port: int) -> Address:
    """As `parse_destination` writes it: an IPv4-mapped address is the IPv4 one."""
    ip = ipaddress.ip_address(host)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return Address(ip_text(mapped or ip), port)

"""The addresses of this host that move from machine to machine: given to it, announced, taken.

Each is put on the interface whose own network it is in, as the only one of its network (/32, /128):
no route comes or goes with it. Needs CAP_NET_ADMIN and CAP_NET_RAW.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

from pyforwarder.errors import ControlError
from pyforwarder.runtime.interface_addresses import interface_addresses

_MESSAGE: Final = struct.Struct("=IHHII")  # linux/netlink.h: struct nlmsghdr
_ADDRESS: Final = struct.Struct("=BBBBI")  # linux/if_addr.h: struct ifaddrmsg
_NEW_ADDRESS, _DELETE_ADDRESS, _ERROR = 20, 21, 2  # linux/rtnetlink.h
_REQUEST_WITH_ACK: Final = 5
_CREATE_NEW: Final = 0x600  # it must not be there
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_NODAD: Final = 2  # IFA_F_NODAD
_TIMEOUT_S: Final = 5.0
_BROADCAST: Final = b"\xff" * 6
_ETHERTYPE_ARP: Final = 0x0806
_ARP: Final = struct.Struct("!HHBBH6s4s6s4s")
_REQUEST, _REPLY = 1, 2
_SOLICITATION, _ADVERTISEMENT = 135, 136
_OVERRIDE: Final = 0x20
_ALL_NODES: Final = "ff02::1"


def here(wanted: Sequence[str]) -> list[str]:
    """Return those of the addresses that this host has, in their order."""
    own = {one.address for one in interface_addresses()}
    return [text for text in wanted if ipaddress.ip_address(text) in own]


def interface_of(text: str) -> str:
    """Where this address belongs: the interface with an address of the same network.

    Raises:
        ControlError: there is none.
    """
    address = ipaddress.ip_address(text)
    for own in interface_addresses():
        if own.address != address and address in own.network:
            return own.interface
    raise ControlError(
        f"{text} is in the network of no interface of this machine: give it an address of its own "
        "there"
    )


def add(wanted: Sequence[str]) -> None:
    """Give this host the addresses; nobody is told.

    Raises:
        ControlError: it cannot have them. Then it has none of them.
    """
    places = {text: interface_of(text) for text in wanted}
    done: list[str] = []
    try:
        for text, interface in places.items():
            _change(_NEW_ADDRESS, text, ipaddress.ip_address(text).max_prefixlen, interface)
            done.append(text)
    except ControlError:
        for text in done:
            with contextlib.suppress(ControlError):
                bits = ipaddress.ip_address(text).max_prefixlen
                _change(_DELETE_ADDRESS, text, bits, places[text])
        raise


def remove(wanted: Sequence[str]) -> None:
    """Take the addresses from this host, with any length of prefix.

    Raises:
        ControlError: one is left.
    """
    addresses = {ipaddress.ip_address(text) for text in wanted}
    for own in list(interface_addresses()):
        if own.address in addresses:
            _change(_DELETE_ADDRESS, str(own.address), own.network.prefixlen, own.interface)


def announce(wanted: Sequence[str]) -> None:
    """Tell the neighbours that these are here (RFC 5227, 3; RFC 4861, 7.2.6).

    Raises:
        ControlError: this host has not one of them.
        OSError: that cannot be sent.
    """
    places = {str(own.address): own.interface for own in interface_addresses()}
    for text in wanted:
        interface = places.get(str(ipaddress.ip_address(text)))
        if interface is None:
            raise ControlError(f"{text} is no address of this machine")
        if ":" in text:
            _advertise(interface, text)
        else:
            packed = socket.inet_aton(text)
            with _packets(interface) as sock:
                mac = _mac(sock)
                for operation, target in ((_REQUEST, bytes(6)), (_REPLY, _BROADCAST)):
                    sock.send(arp(operation, mac, packed, target, packed))


def in_use(wanted: Sequence[str], *, wait_s: float) -> dict[str, str]:
    """Return, by address, the Ethernet address of another host that says it has it; waits `wait_s`
    for answers.

    This host must have none of them.

    Raises:
        ControlError: one of them is in none of our networks.
        OSError: there is no socket to ask with.
    """
    found: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        asked: dict[socket.socket, str] = {}
        for text in wanted:
            interface = interface_of(text)
            if ":" in text:
                sock = stack.enter_context(_icmp6(interface))
                group = _solicited_node(text)
                packet = struct.pack("!BBHI", _SOLICITATION, 0, 0, 0)
                packet += socket.inet_pton(socket.AF_INET6, text)
                packet += b"\x01\x01" + _mac_of(interface)
                sock.sendto(packet, (group, 0, 0, socket.if_nametoindex(interface)))
            else:
                sock = stack.enter_context(_packets(interface))
                # A probe (RFC 5227, 2.1.1): nobody learns anything from it.
                sock.send(arp(_REQUEST, _mac(sock), bytes(4), bytes(6), socket.inet_aton(text)))
            asked[sock] = text
        until_s = time.monotonic() + wait_s
        while len(found) < len(asked) and (left_s := until_s - time.monotonic()) > 0:
            for sock in select.select(list(asked), [], [], left_s)[0]:
                if who := said_by(sock.recv(2048), asked[sock]):
                    found[asked[sock]] = who
    return found


def arp(operation: int, mac: bytes, sender: bytes, target_mac: bytes, target: bytes) -> bytes:
    """A frame to everybody (RFC 826); IPv4 addresses in wire order."""
    head = _BROADCAST + mac + struct.pack("!H", _ETHERTYPE_ARP)
    return head + _ARP.pack(1, 0x0800, 6, 4, operation, mac, sender, target_mac, target)


def said_by(data: bytes, text: str) -> str:
    """Whose address it is, by this packet; empty: it does not say."""
    if ":" in text:
        wanted = socket.inet_pton(socket.AF_INET6, text)
        if len(data) < 24 or data[0] != _ADVERTISEMENT or data[8:24] != wanted:
            return ""
        return data[26:32].hex(":") if len(data) >= 32 and data[24] == 2 else "another host"
    if len(data) < 14 + _ARP.size or data[12:14] != struct.pack("!H", _ETHERTYPE_ARP):
        return ""
    _, _, _, _, _, mac, sender, _, _ = _ARP.unpack_from(data, 14)
    return mac.hex(":") if sender == socket.inet_aton(text) else ""


def _change(kind: int, text: str, prefix_bits: int, interface: str) -> None:
    """Add or remove an address (rtnetlink(7)).

    Raises:
        ControlError: the kernel says no.
    """
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    packed = socket.inet_pton(family, text)
    # No doubt about IPv6 addresses for a second (RFC 4862): packets are on their way.
    flags = _NODAD if family == socket.AF_INET6 else 0
    try:
        index = socket.if_nametoindex(interface)
        body = _ADDRESS.pack(family, prefix_bits, flags, 0, index)
        for attribute in (_IFA_LOCAL, _IFA_ADDRESS):
            body += struct.pack("=HH", 4 + len(packed), attribute) + packed
        options = _REQUEST_WITH_ACK | (_CREATE_NEW if kind == _NEW_ADDRESS else 0)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.settimeout(_TIMEOUT_S)
            sock.send(_MESSAGE.pack(_MESSAGE.size + len(body), kind, options, 1, 0) + body)
            answer = sock.recv(4096)
        _, answers, _, _, _ = _MESSAGE.unpack_from(answer)
        (error,) = struct.unpack_from("=i", answer, _MESSAGE.size)
        if answers != _ERROR:
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
        if error:
            raise OSError(-error, os.strerror(-error))
    except (OSError, struct.error) as error:
        what = "give" if kind == _NEW_ADDRESS else "take"
        reason = getattr(error, "strerror", None) or str(error)
        raise ControlError(f"cannot {what} {interface} the address {text}: {reason}") from error


def _packets(interface: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    try:
        sock.bind((interface, _ETHERTYPE_ARP))
    except OSError:
        sock.close()
        raise
    return sock


def _mac(sock: socket.socket) -> bytes:
    return bytes(sock.getsockname()[4])


def _mac_of(interface: str) -> bytes:
    with _packets(interface) as sock:
        return _mac(sock)


def _icmp6(interface: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    try:
        # Neighbours believe what came over no router (RFC 4861, 7.1).
        for option in (socket.IPV6_MULTICAST_HOPS, socket.IPV6_UNICAST_HOPS):
            sock.setsockopt(socket.IPPROTO_IPV6, option, 255)
        sock.setsockopt(
            socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex(interface)
        )
    except OSError:
        sock.close()
        raise
    return sock


def _advertise(interface: str, text: str) -> None:
    with _icmp6(interface) as sock:
        sock.bind((text, 0))
        packet = struct.pack("!BBHB3x", _ADVERTISEMENT, 0, 0, _OVERRIDE)
        packet += socket.inet_pton(socket.AF_INET6, text) + b"\x02\x01" + _mac_of(interface)
        sock.sendto(packet, (_ALL_NODES, 0, 0, socket.if_nametoindex(interface)))


def _solicited_node(text: str) -> str:
    """The group that an address's host listens to (RFC 4291, 2.7.1)."""
    packed = socket.inet_pton(socket.AF_INET6, text)
    return socket.inet_ntop(
        socket.AF_INET6, socket.inet_pton(socket.AF_INET6, "ff02::1:ff00:0")[:13] + packed[13:]
    )

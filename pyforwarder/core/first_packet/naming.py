"""`to: sni` and `to: host`: the name in the first packet is the destination.

A rule with it takes only connections in which such a name stands, one that can be a host's: the
others are left to the rules behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.core.address import Address, AddressError, HostPort, NameIn, parse_destination
from pyforwarder.core.first_packet import dtls, quic, tls
from pyforwarder.core.first_packet.http import host_in
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.outcome import MATCH, NO_MATCH, Outcome

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.outcome import End, Facts


_Reader = Callable[[bytes], str | Outcome]


class Source(NamedTuple):
    """Where a name is read from; it is the field of the log, too."""

    protocols: tuple[str, ...]  # the words of `match` whose connections carry it
    default_port: int
    # Each says NEED_MORE, or NO_MATCH where there is none.
    in_streams: tuple[_Reader, ...]
    in_datagrams: tuple[_Reader, ...] = ()


SOURCES: Final = {
    "sni": Source(
        ("tls", "quic", "dtls"),
        443,
        (tls.server_name_in,),
        (quic.server_name_in, dtls.server_name_in),
    ),
    "host": Source(("http",), 80, (host_in,)),
}


class Named(Matcher):
    """Matches connections whose first packet has a destination's name in it."""

    def __init__(self, name: NameIn, *, datagrams: bool) -> None:
        source = SOURCES[name.where]
        self._where = name.where
        self._port = name.port
        self._readers = source.in_datagrams if datagrams else source.in_streams
        self.spans_datagrams = datagrams

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        destination = self.destination(data)
        return destination if isinstance(destination, Outcome) else MATCH

    def facts(self, data: bytes) -> Facts:
        name = self._name(data)
        return () if isinstance(name, Outcome) else ((self._where, name),)

    def destination(self, data: bytes) -> Address | HostPort | Outcome:
        """Where these first bytes want to go; NEED_MORE or NO_MATCH while or if they do not say."""
        name = self._name(data)
        if isinstance(name, Outcome):
            return name
        try:
            return parse_destination(f"{name}:{self._port}")
        except AddressError:
            return NO_MATCH

    def _name(self, data: bytes) -> str | Outcome:
        for read in self._readers:
            name = read(data)
            if name is not NO_MATCH:
                return name
        return NO_MATCH

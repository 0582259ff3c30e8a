"""Conditions on the connection itself: where it comes from, and to which port it came.

client: [10.0.0.0/8, 192.0.2.7, "2001:db8::/32", loopback]
port: [443, "8000-8999"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.core.express.conditions import ClientNetworks, Constant, UserspaceOnly
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.options import OptionError, Options
from pyforwarder.core.first_packet.outcome import MATCH, NO_MATCH, Outcome
from pyforwarder.core.policy import Networks, parse_port_ranges

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.express.conditions import Condition
    from pyforwarder.core.first_packet.matcher import ListenerFacts
    from pyforwarder.core.first_packet.outcome import End


class ClientIn(Matcher):
    """Matches clients in one of `networks`; a client on a unix socket is in none."""

    reads = False

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    @classmethod
    def from_options(cls, options: Options) -> ClientIn:
        """The condition for what stands after `client:`.

        Raises:
            OptionError: one of them is no address, no network and no name for some.
        """
        texts = options.texts("networks")
        if not texts:
            raise OptionError("says no network")
        options.finish()
        try:
            return cls(Networks.parse(texts))
        except ValueError as error:
            raise OptionError(str(error)) from None

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        return MATCH if client is not None and self._networks.contains(client.host) else NO_MATCH

    def never(self, listener: ListenerFacts) -> str:
        return "clients of a unix socket have no address" if listener.is_unix else ""

    def in_kernel(self, local_port: int) -> Condition:
        networks = self._networks.as_networks()
        if networks is None:
            raise UserspaceOnly("`public` is a list of exceptions, which userspace alone knows")
        return ClientNetworks(networks)


class ListenerPort(Matcher):
    """Matches connections that came to one of `ranges` (both ends included)."""

    reads = False

    def __init__(self, ranges: tuple[tuple[int, int], ...]) -> None:
        self._ranges = ranges

    @classmethod
    def from_options(cls, options: Options) -> ListenerPort:
        """The condition for what stands after `port:`.

        Raises:
            OptionError: one of them is no port and no range of ports.
        """
        texts = options.texts("ports")
        if not texts:
            raise OptionError("says no port")
        options.finish()
        try:
            return cls(tuple(pair for text in texts for pair in parse_port_ranges(text)))
        except ValueError as error:
            raise OptionError(str(error)) from None

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        for first, last in self._ranges:
            if first <= local_port <= last:
                return MATCH
        return NO_MATCH

    def never(self, listener: ListenerFacts) -> str:
        ports = listener.ports
        if ports is None or any(
            first <= port <= last for port in ports for first, last in self._ranges
        ):
            return ""
        if listener.is_unix:
            return "a unix socket has no port"
        one, *others = sorted(ports)
        return "the listener has no such port" if others else f"the listener's port is {one}"

    def in_kernel(self, local_port: int) -> Condition:
        return Constant(any(first <= local_port <= last for first, last in self._ranges))

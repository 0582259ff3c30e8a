"""`xmpp`: XMPP, by the client's stream header.

    xmpp: {to: ["*.example.com"]}        the domain the client wants

Source: RFC 6120 section 4.7.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet import alphabet
from pyforwarder.core.first_packet.glob import Globs
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome
from pyforwarder.core.first_packet.pattern import Pattern

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.first_packet.options import Options
    from pyforwarder.core.first_packet.outcome import End

_DECLARATION: Final = r"(?:<\?xml[ \t\r\n][^<>]{0,100}>)?[ \t\r\n]{0,8}"
_BEGINS: Final = rf"^{_DECLARATION}<stream:stream[ \t\r\n]"
# Domains have 1023 bytes at most (RFC 7622 section 3.2); namespaces and versions are short.
_MAX_HEADER: Final = 4096
_TO: Final = re.compile(rb"[ \t\r\n]to[ \t\r\n]*=[ \t\r\n]*(?:\"([^\"<]*)\"|'([^'<]*)')")


class Xmpp(Matcher):
    """Matches a stream header, for one of `domains` if they are given."""

    def __init__(self, domains: Globs | None = None) -> None:
        self._domains = domains
        self._begins = Pattern((_BEGINS,))

    @classmethod
    def from_options(cls, options: Options) -> Xmpp:
        """The matcher for what stands after `xmpp:`.

        Raises:
            OptionError: an unknown option, or a name that no client can send.
        """
        domains = alphabet.xmpp_domains(options, "to")
        options.finish()
        return cls(Globs(domains, ignore_case=True) if domains else None)

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        outcome = self._begins.match(data, end, client, local_port)
        if outcome is not MATCH or self._domains is None:
            return outcome
        start = data.find(b"<stream:stream")
        stop = data.find(b">", start, start + _MAX_HEADER)
        if stop < 0:
            return NO_MATCH if len(data) - start >= _MAX_HEADER else NEED_MORE
        return MATCH if self._domains.include(_domain(data[start:stop])) else NO_MATCH

    def describe(self, data: bytes) -> str:
        start = data.find(b"<stream:stream")
        stop = data.find(b">", start)
        return f"to {_domain(data[start:stop])!r}" if 0 <= start < stop else ""


def _domain(header: bytes) -> str:
    to = _TO.search(header)
    return (to[1] or to[2] or b"").decode("utf-8", "replace") if to else ""

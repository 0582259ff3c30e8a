"""`quic`: the first datagrams of a QUIC client, and the ClientHello in them.

    quic: {sni: ["*.example.com"]}       the server name, as under `tls`
    quic: {alpn: [h3]}                   a protocol that the client offers
    quic: {version: ["1", "2"]}          the version of QUIC that the client begins with

Version 1 (RFC 9000) and 2 (RFC 9369); other versions are no match, and so are clients whose hello
is not whole after a few datagrams.  Without `sni` and `alpn` the first header decides.  With them
the Initial packets are decrypted, and as many datagrams are waited for as the hello takes (a
post-quantum key takes two); its pieces may come in any order.  With Encrypted Client Hello the
name seen here is the outer one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pyforwarder.core.first_packet import quic_initial
from pyforwarder.core.first_packet.client_hello import (
    MESSAGE_HEADER,
    ClientHello,
    HelloConditions,
    in_datagrams,
    message_length,
    name_or_outcome,
    read_body,
)
from pyforwarder.core.first_packet.cursor import Cursor, ParseError
from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.options import OptionError, Options
from pyforwarder.core.first_packet.outcome import MATCH, NO_MATCH, Outcome
from pyforwarder.core.first_packet.pieces import Piece, beginning

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.first_packet.outcome import End, Facts

_VERSION_NAMES = {number: name for name, number in quic_initial.VERSIONS.items()}


class Quic(Matcher):
    """Matches a client's first datagrams for which all given conditions hold."""

    has_connection_ids = True
    has_facts = True

    def __init__(
        self,
        conditions: HelloConditions | None = None,
        versions: frozenset[int] = frozenset(_VERSION_NAMES),
    ) -> None:
        self._conditions = conditions
        self._versions = versions
        self.spans_datagrams = conditions is not None

    @classmethod
    def from_options(cls, options: Options) -> Quic:
        """The matcher for what stands after `quic:`.

        Raises:
            OptionError: an unknown option or version, or a name that no client can send.
        """
        conditions = HelloConditions.from_options(options)
        versions = options.texts("version")
        options.finish()
        for version in versions:
            if version not in quic_initial.VERSIONS:
                known = ", ".join(quic_initial.VERSIONS)
                raise OptionError(f"{version!r} is not one of {known}", "version")
        numbers = (quic_initial.VERSIONS[version] for version in versions or quic_initial.VERSIONS)
        return cls(conditions or None, frozenset(numbers))

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        version = _version_of(data)
        if version not in self._versions:
            return NO_MATCH
        if self._conditions is None:
            return MATCH
        hello = _hello_or_outcome(data)
        if isinstance(hello, Outcome):
            return hello
        return MATCH if self._conditions.accept(hello) else NO_MATCH

    def describe(self, data: bytes) -> str:
        version = _version_of(data)
        if version is None:
            return ""
        name = _VERSION_NAMES[version]
        hello = _hello_or_outcome(data)
        said = [f"version {name}"] if isinstance(hello, Outcome) else hello.words(name)
        return ", ".join(said)

    def facts(self, data: bytes) -> Facts:
        hello = _hello_or_outcome(data) if self._conditions else NO_MATCH
        return () if isinstance(hello, Outcome) else hello.facts()


def server_name_in(data: bytes) -> str | Outcome:
    """The server name of a QUIC client; NEED_MORE while it may come, NO_MATCH if there is none."""
    return name_or_outcome(_hello_or_outcome(data))


def read_client_hello(datagrams: tuple[bytes, ...]) -> ClientHello | None:
    """The ClientHello in a client's first datagrams; None: not whole yet.

    Raises:
        ParseError: no QUIC client, one of an unknown version, or one that no server would answer.
    """
    begun = quic_initial.beginning_of(datagrams[0])
    pieces: list[Piece] = []
    for position, datagram in enumerate(datagrams):
        found = quic_initial.crypto_in(datagram, begun.version, begun.destination_id)
        if found is not None:
            pieces += found
        elif position == 0 and begun.is_initial:
            # The keys are others: a client that has been answered already, or none at all.
            raise ParseError("does not decrypt")
    message = beginning(pieces)
    if message[:1] not in (b"", b"\x01"):
        raise ParseError("not a ClientHello")
    if len(message) < MESSAGE_HEADER:
        return None
    end = MESSAGE_HEADER + message_length(message, 0)
    return read_body(Cursor(message, MESSAGE_HEADER, end)) if len(message) >= end else None


# One: the rules of a listener are asked in turn about the same datagrams.
@functools.lru_cache(maxsize=1)
def _version_of(data: bytes) -> int | None:
    """The version that a client begins with; None: this is no beginning."""
    try:
        return quic_initial.beginning_of(data).version
    except ParseError:
        return None


_hello_or_outcome = in_datagrams(read_client_hello)

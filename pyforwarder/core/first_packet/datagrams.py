"""A first packet of datagrams: the first of them, and those behind it that a rule waited for.

To most matchers a datagram is all there is: they see the first one, as bytes.  Those whose first
word may not fit into one (`Matcher.spans_datagrams`) look at the others, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.outcome import NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyforwarder.core.address import Address
    from pyforwarder.core.first_packet.matcher import ListenerFacts
    from pyforwarder.core.first_packet.outcome import End, Facts

# What may be waited for.  A ClientHello with a post-quantum key takes two datagrams, one with
# certificates in its extensions four; each may come twice.
MOST_DATAGRAMS: Final = 8


class Datagrams(bytes):
    """A client's first datagrams; as bytes it is the first of them."""

    all: tuple[bytes, ...]  # in the order in which they came, never empty

    def __new__(cls, datagrams: Sequence[bytes]) -> Datagrams:
        made = super().__new__(cls, datagrams[0])
        made.all = tuple(datagrams)
        return made


def datagrams_in(data: bytes) -> tuple[bytes, ...]:
    """All datagrams of a first packet: one, where it is not known to have more."""
    return data.all if isinstance(data, Datagrams) else (data,)


class Whole(Matcher):
    """A condition on one datagram: what would need more bytes than it has does not match."""

    def __init__(self, inner: Matcher) -> None:
        self._inner = inner
        self.reads = inner.reads

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        outcome = self._inner.match(data, end, client, local_port)
        return NO_MATCH if outcome is NEED_MORE else outcome

    def describe(self, data: bytes) -> str:
        return self._inner.describe(data)

    def facts(self, data: bytes) -> Facts:
        return self._inner.facts(data)

    @property
    def always(self) -> bool:
        return self._inner.always

    def never(self, listener: ListenerFacts) -> str:
        return self._inner.never(listener)

    def parts(self) -> Iterator[Matcher]:
        yield self
        yield from self._inner.parts()

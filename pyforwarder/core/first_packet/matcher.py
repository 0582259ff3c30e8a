"""The contract of every parser, and of those that go on to talk to the client.

A matcher looks at the first bytes of a connection and returns MATCH, NO_MATCH or NEED_MORE;
no bytes make it raise anything.  It is pure: the same arguments give the same answer, it
keeps nothing between calls, and it never looks at anything but its arguments.  MATCH and
NO_MATCH are final: no bytes that follow may change them.  NO_MATCH comes with the first byte
that rules the protocol out, MATCH as soon as every condition is known to hold.

A speaker is a matcher for a protocol in which the client names its destination.  It turns a
match into an answer: a route, a refusal in the protocol's own words, or something to send before
the client says more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from pyforwarder.core.express.conditions import UserspaceOnly
from pyforwarder.core.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyforwarder.core.address import Address
    from pyforwarder.core.express.conditions import Condition
    from pyforwarder.core.first_packet.outcome import Answer, Decision, End, Facts, Rule, Send


class Turn(ABC):
    """The next step of a dialogue that a speaker has begun: what comes is for it alone."""

    @abstractmethod
    def decide(self, data: bytes, conversation: Conversation) -> Decision:
        """The decision about the bytes that followed what we sent last."""


class Conversation:
    """What one connection's dialogue remembers from one decision to the next."""

    __slots__ = ("asked", "first_rule", "rule", "turn")

    def __init__(self) -> None:
        self.asked = 0  # how often a rule had to ask before it could tell
        self.first_rule = 0  # rules before this one said no match to bytes that are gone now
        self.rule: Rule | None = None  # the rule whose speaker has the floor
        self.turn: Turn | None = None


class ListenerFacts(NamedTuple):
    """What a listener's configuration says of every connection to it."""

    ports: frozenset[int] | None  # None: not known yet; empty: it has none
    is_unix: bool
    max_bytes: int  # of the first packet that rules look at


class Matcher(ABC):
    """One condition on a connection's first bytes."""

    # Whether `ask` may ever return something: such a rule needs a Conversation.
    asks = False
    # Whether NEED_MORE may be answered by another datagram: see datagrams.py.
    spans_datagrams = False
    # Whether its clients' datagrams say connection ids that stay when their address changes.
    has_connection_ids = False
    # Whether `facts` may ever say something of its own.
    has_facts = False
    # Whether `match` looks at the bytes, or at the end of them; where it does not, its answer is
    # known when the connection is accepted.
    reads = True
    # Whether it may look at where the connection comes from.
    asks_client = True

    @abstractmethod
    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        """What these first bytes are.

        `data` is everything received so far, `client` where the connection comes from (None: a
        unix socket), `local_port` the listener's port (0: a unix socket).  `end` matters only to
        `silence`; a parser that lacks bytes says NEED_MORE with any `end`.
        """

    def ask(self, data: bytes) -> Send | None:
        """What to send to a client that waits for it; called only after `match` said NEED_MORE."""
        return None

    def speaker(
        self, data: bytes, end: End, client: Address | None, local_port: int
    ) -> Speaker | None:
        """The speaker inside this condition that the bytes belong to."""
        return None

    @property
    def names_destination(self) -> bool:
        """Whether every match of this condition has a speaker."""
        return False

    def describe(self, data: bytes) -> str:
        """What was read from these bytes, in words for `explain`; empty: nothing worth saying."""
        return ""

    def facts(self, data: bytes) -> Facts:
        """What was read of a first packet that it has matched, as fields for the log.

        Only what had to be read for the match: then it is known already.
        """
        return ()

    @property
    def always(self) -> bool:
        """Whether it matches every connection, with any bytes."""
        return False

    def never(self, listener: ListenerFacts) -> str:
        """Why no connection to such a listener can match; empty: some can, as far as is known."""
        return ""

    def in_kernel(self, local_port: int) -> Condition:
        """The same condition in the words of a program that sees the first packet in the kernel.

        For connections to this port, once they have sent a byte. Where the program says that it
        holds or does not hold, `match` says so, too.

        Raises:
            UserspaceOnly: such a program cannot tell.
        """
        raise UserspaceOnly("userspace alone reads this protocol")

    def parts(self) -> Iterator[Matcher]:
        """This condition and all those inside it."""
        yield self


class Speaker(Matcher):
    """A protocol in which the client names the destination."""

    # Whether `answer` may return Send: such a rule needs a Conversation.
    converses = False

    @abstractmethod
    def answer(
        self,
        rule: Rule,
        data: bytes,
        client: Address | None,
        now_unix_s: float | None,
        conversation: Conversation | None,
    ) -> Answer:
        """Match and act in one step; NO_MATCH and NEED_MORE exactly when `match` says so."""

    def cut_short(self, end: End) -> bytes:
        """The reply to a client whose request never became whole; empty: none."""
        return b""

    def speaker(
        self, data: bytes, end: End, client: Address | None, local_port: int
    ) -> Speaker | None:
        return self

    @property
    def names_destination(self) -> bool:
        return True


def match_prefix(data: bytes, wanted: bytes) -> Outcome | None:
    """NO_MATCH or NEED_MORE for bytes that differ from `wanted` or stop inside it, else None."""
    if data.startswith(wanted):
        return None
    return NEED_MORE if wanted.startswith(data) else NO_MATCH


class Parsed(Matcher):
    """A protocol that is read with a cursor: too few bytes mean NEED_MORE, wrong ones NO_MATCH."""

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        try:
            return MATCH if self._holds(Cursor(data)) else NO_MATCH
        except Truncated:
            return NEED_MORE
        except ParseError:
            return NO_MATCH

    @abstractmethod
    def _holds(self, cursor: Cursor) -> bool:
        """Whether the conditions hold.

        Raises:
            Truncated: it takes more bytes to know.
            ParseError: this is another protocol.
        """

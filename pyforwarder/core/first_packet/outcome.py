"""What reading a first packet can lead to: the words that parsers, routing and the server share.

Values only.  Those that are made once per connection are named tuples, not frozen dataclasses:
building one costs a third, and a decision is on the path of every connection.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.core.address import Address, NameIn, ServerAddress
    from pyforwarder.core.policy import AllowList
    from pyforwarder.core.reasons import CloseReason, RefusalCode


class End(enum.Enum):
    """Whether more first bytes may come, and if not, why not."""

    OPEN = "open"
    FULL = "full"  # first_packet.max_bytes are there
    TIMEOUT = "timeout"
    EOF = "eof"  # the client closed its side


class Outcome(enum.Enum):
    """What a parser says about the bytes so far.

    MATCH and NO_MATCH are final: more bytes never turn one into anything else.
    """

    NO_MATCH = "no match"
    NEED_MORE = "need more"
    MATCH = "match"


NO_MATCH: Final = Outcome.NO_MATCH
NEED_MORE: Final = Outcome.NEED_MORE
MATCH: Final = Outcome.MATCH


class Negotiation(Protocol):
    """What a client that named its destination is told about it."""

    tells_source: bool  # else `granted` needs no address, and the kernel need not be asked for it

    def granted(self, source: Address | None) -> bytes:
        """The answer once the server is connected; `source` is the address we connected from."""
        ...

    def refused(self, code: RefusalCode) -> bytes:
        """The answer when there will be no server; the connection is closed after it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A rule as the server needs it once it has decided; one object per rule and load."""

    name: str
    index: int  # position in the listener, from 0
    allow: AllowList | None  # where the client may send us; None: the rule says where
    to: ServerAddress | NameIn | str | None  # str: an upstream's name
    reject: str | None  # "reset", "close" or None
    datapath: str | None  # None: as the listener says


# What a decision was made on, for the log: names of fields and what the client has said.
Facts = tuple[tuple[str, str], ...]


class Route(NamedTuple):
    """Connect to `to`, then send it everything after the first `skip` bytes."""

    rule: Rule
    to: ServerAddress | str  # str: an upstream's name
    skip: int
    negotiation: Negotiation | None
    named_by_client: bool  # then rule.allow has to permit every address `to` resolves to
    facts: Facts = ()  # who the client is, as far as its protocol has proven that


class Refuse(NamedTuple):
    """Send `reply`, then end the connection: by a reset, or orderly."""

    rule: Rule | None  # None: no rule took it
    reason: CloseReason
    reply: bytes
    reset: bool
    cause: str = ""  # in words for logs and `explain`; the client is told no more than `reply`
    facts: Facts = ()


class Send(NamedTuple):
    """Send `data`, drop the first `skip` bytes of what was read, and go on reading."""

    data: bytes
    skip: int


class Verify(NamedTuple):
    """Find out whether `password` is that of the hash `stored`, which takes long; `then` decides.

    Nothing that the client sends meanwhile changes the decision. `busy` is the decision if nobody
    can find it out.
    """

    stored: bytes
    password: bytes
    then: Callable[[bool], Decision]
    busy: Refuse


class Claim(NamedTuple):
    """Find out whether a token is used for the first time in a whole fleet; `then` decides.

    It is told None if that is not known within `wait_s`. `digest` is of the token, which is good
    until `until_unix_s`. Nothing that the client sends meanwhile changes the decision.
    """

    digest: bytes
    until_unix_s: float
    wait_s: float
    then: Callable[[bool | None], Route | Refuse]


Decision = Literal[Outcome.NEED_MORE] | Route | Refuse | Send | Verify | Claim
Answer = Literal[Outcome.NEED_MORE, Outcome.NO_MATCH] | Route | Refuse | Send | Verify | Claim

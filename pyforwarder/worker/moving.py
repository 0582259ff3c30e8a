"""The messages in which pairs go from a worker to one of the daemon that takes its daemon's place.

pair_sender.py sends them, pair_receiver.py receives them:

    sessions   UDP, each with its socket to the server, or of one that the kernel has what is known
               of it; then a word that these were all
    pairs      TCP, each with both sockets and what is known of them: bytes that were read and not
               written yet, which ends have been said, what was carried

One process owns a pair at any time: its sender releases it with the message in which it goes. The
kernel keeps the sockets meanwhile, and what arrives waits in their queues. A message that is never
received closes them, and their peers see resets.

What moves is what is copied, what is spliced, and what is in a sockmap, out of which it is taken
first (datapath/sockmap/exit.py). A pair that has no server yet follows as soon as it has.

The receiver trusts the sender no more than a stranger: it may have been taken over. Each message is
compared with a table, and a pair whose message does not make sense is reset.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from pyforwarder.datapath.copying import BULK_READ_BYTES
from pyforwarder.worker.moving_facts import Audit, Message, Number, SessionFacts

# So many go in one turn of the loop: the pairs that stay have theirs in between.
BATCH: Final = 32
# Bytes of two directions, each at most one read, in base64, and some words.
MOST_MESSAGE_BYTES: Final = 4 * BULK_READ_BYTES

# Characters, two for a byte: more than a record has in any version.
_MOST_RECORD: Final = 1 << 14

_Name = Annotated[str, Field(max_length=1024)]
_Carried = Annotated[int, Field(gt=-(1 << 20), lt=1 << 50)]
_Port = Annotated[int, Field(ge=0, le=65535)]


class FlowMessage(Message):
    """What is known of one direction of a pair."""

    is_closed: bool  # its FIN has been sent on
    pending: Annotated[str, Field(max_length=2 * BULK_READ_BYTES)]  # read, not written; base64
    read_bytes: Number
    written_bytes: Number
    carried_bytes: _Carried
    carried_packets: Number


class SplicedMessage(Message):
    """What the kernel has of a spliced pair."""

    index: Annotated[int, Field(ge=0, lt=(1 << 32) - 1)]
    left_bytes: Annotated[
        list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=2, max_length=2)
    ]
    is_mute: bool


class AddressMessage(Message):
    """The address of one end."""

    host: Annotated[str, Field(max_length=64)]
    port: _Port


class PairMessage(Message):
    """A pair; its client's socket and its server's come with it.

    Where these are connected to they may not say any more: both FINs may be there, to be read.
    """

    id: Annotated[int, Field(ge=1, lt=1 << 62)]
    listener: _Name
    port: _Port  # which of its addresses
    rule: _Name
    upstream: _Name
    server: _Name
    started_s: Annotated[float, Field(ge=0, lt=1e12)]
    active_s: Annotated[float, Field(ge=0, lt=1e12)]
    peer: AddressMessage | None  # the rest are unix sockets
    destination: AddressMessage | None
    source: AddressMessage | None
    # The word that daemons of earlier versions say, too.
    is_foreign: bool = Field(alias="is_adopted")
    flows: Annotated[list[FlowMessage], Field(min_length=2, max_length=2)]
    spliced: SplicedMessage | None
    audit: Audit = Field(default_factory=dict)


class ShownMessage(Message):
    """What the pair table says of a UDP session, whatever its layout."""

    listener: _Name
    rule: _Name
    started_s: Annotated[float, Field(ge=0, lt=1e12)]
    # Bytes and datagrams, up and down.
    carried: Annotated[
        list[Annotated[list[Number], Field(min_length=2, max_length=2)]],
        Field(min_length=2, max_length=2),
    ]


class SessionMessage(SessionFacts):
    """A UDP session that is copied; its socket to the server comes with it."""

    client: Annotated[str, Field(max_length=64)]
    client_port: _Port
    local: Annotated[str, Field(max_length=64)]
    local_port: _Port
    record: Annotated[str, Field(max_length=_MOST_RECORD, pattern=r"^([0-9a-f][0-9a-f])*$")]
    layout: Number | None = None  # of that; None: an earlier version, which has ours
    shown: ShownMessage | None = None  # the same in words


class KernelSessionsMessage(Message):
    """UDP sessions that the kernel has, and that come by the keeper."""

    known: Annotated[list[SessionFacts], Field(max_length=BATCH)]

"""What moves with the sockets: by what a pair was decided, how well a UDP client is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from pyforwarder.worker.log import AUDIT_FIELDS, audit_of
from pyforwarder.worker.udp.eviction import Assurance

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.outcome import Facts
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.udp.session import Session

_MOST_CHARACTERS: Final = 512  # of a value: names of hosts and users have 255 at most

Number = Annotated[int, Field(ge=0, lt=1 << 62)]
Audit = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=4096)]],
    Field(max_length=32),
]


class Message(BaseModel):
    """A record without conversion of types; fields of other versions are left out."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def audit_message(client: Client | Session) -> dict[str, str]:
    """What the log line of its end says of its decision, for another worker."""
    # Names may have any bytes; a message is text.
    return {
        name: value[:_MOST_CHARACTERS].encode(errors="replace").decode()
        for name, value in audit_of(client).items()
        if name in AUDIT_FIELDS
    }


def facts_of(audit: dict[str, str]) -> Facts:
    """Return the facts in a message; more than the log has fields for is left out."""
    return tuple(
        (name, value[:_MOST_CHARACTERS]) for name, value in audit.items() if name in AUDIT_FIELDS
    )


class SessionFacts(Message):
    """What the pair table does not have of a UDP session, copied or in the kernel."""

    id: Annotated[int, Field(ge=1, lt=1 << 62)]
    # How well its client is known, and of one that has sent one datagram how many bytes it has sent
    # and been sent; None: an earlier version does not say. It is called `standing` between daemons.
    assurance: Annotated[int, Field(ge=min(Assurance), le=max(Assurance))] | None = Field(
        default=None, alias="standing"
    )
    heard_bytes: Number = 0
    told_bytes: Number = 0
    active_s: Annotated[float, Field(ge=0, lt=1e12)] | None = None
    audit: Audit = Field(default_factory=dict)


def session_facts(session: Session) -> dict[str, Any]:
    """The fields of `SessionFacts`."""
    return {
        "id": session.id,
        "standing": int(session.assurance),
        "heard_bytes": session.heard_bytes,
        "told_bytes": session.told_bytes,
        "active_s": session.active_s,
        "audit": audit_message(session),
    }

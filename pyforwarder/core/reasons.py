"""Why a connection ended, and what a client may be told about it."""

from __future__ import annotations

import enum


class CloseReason(enum.Enum):
    """Every way a connection can end; each is counted and shown under its value."""

    FINISHED = "finished"  # both sides closed, every byte delivered
    CLIENT_RESET = "client_reset"
    SERVER_RESET = "server_reset"
    CLIENT_GONE = "client_gone"  # the client closed before anything was decided
    CLIENT_TIMEOUT = "client_timeout"  # it did not answer any more: `keepalive`, or TCP gave it up
    SERVER_TIMEOUT = "server_timeout"
    NO_ROUTE = "no_route"  # a spliced pair, and no way led to one of its ends any more
    MOVED = "moved"  # a spliced pair that goes on through another machine of the fleet
    IDLE = "idle"
    HALF_CLOSED = "half_closed"  # one direction closed, the other silent for too long
    REFUSED = "refused"  # the server refused the connection
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    UNRESOLVED = "unresolved"
    DENIED = "denied"
    MALFORMED = "malformed"
    NO_MATCH = "no_match"
    REJECTED = "rejected"  # a rule says reject
    TOKEN = "token"
    BUSY = "busy"
    EVICTED = "evicted"  # a UDP session that another needed the room of
    FLUSHED = "flushed"
    SHUTDOWN = "shutdown"
    BACKLOG = "backlog"
    INTERNAL = "internal"

    # Members are unique, so their identity will do; Enum hashes their names, in Python. Every
    # connection's end looks something up by its reason.
    __hash__ = object.__hash__


class RefusalCode(enum.Enum):
    """What a refused client is told, in the word its protocol has for it."""

    MALFORMED = "malformed"
    DENIED = "denied"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    UNRESOLVED = "unresolved"
    BUSY = "busy"
    TOKEN = "token"


def refusal_code(reason: CloseReason) -> RefusalCode:
    """What a client is told about this reason; `unreachable` where there is no word for it."""
    try:
        return RefusalCode(reason.value)
    except ValueError:
        return RefusalCode.UNREACHABLE

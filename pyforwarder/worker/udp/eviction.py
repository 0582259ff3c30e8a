"""Which UDP session is evicted when another needs its room: by how well its client is known.

An address in a datagram proves nothing: a host that makes up addresses opens a session with every
packet. One that goes on speaking costs the sender more, as for netfilter's connection tracking
(nf_conntrack_proto_udp.c: a flow that lasts two seconds is a stream, ASSURED, and never dropped
early).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

# How long a client has to go on speaking to be known; as in netfilter.
STEADY_AFTER_S: Final = 2.0
# How long a session may wait for its client's second datagram, silent.
UNCONFIRMED_IDLE_S: Final = 10.0


class Assurance(enum.IntEnum):
    """What a client has done so far (conntrack(8) has UNREPLIED and ASSURED)."""

    NEW = 0  # it has sent one datagram
    BRIEF = 1  # it has sent more, within two seconds
    STEADY = 2  # it has gone on speaking: its session makes room for nobody


_NEW: Final = Assurance.NEW
_STEADY: Final = Assurance.STEADY


class Member(Protocol):
    """A session as `EvictionQueues` knows it."""

    assurance: Assurance

    @property
    def groups(self) -> Sequence[Hashable]: ...
    @property
    def accepted_s(self) -> float: ...
    def __hash__(self) -> int: ...


M = TypeVar("M", bound=Member)


class EvictionQueues(Generic[M]):
    """The sessions that may have to make room, by the groups in which room may be wanted."""

    def __init__(self) -> None:
        # The new and the brief ones of each group, the oldest first.
        self._groups: dict[Hashable, tuple[dict[M, None], dict[M, None]]] = {}

    def add(self, member: M) -> None:
        """A session has begun, or goes on here as the worker before has known its client."""
        if member.assurance is _STEADY:
            return
        for group in member.groups:
            self._groups.setdefault(group, ({}, {}))[member.assurance][member] = None

    def confirm(self, member: M, now_s: float) -> None:
        """Note that the member's client has sent another datagram."""
        if now_s - member.accepted_s >= STEADY_AFTER_S:
            self.leave(member)
            member.assurance = Assurance.STEADY
        elif member.assurance is _NEW:
            for group in member.groups:
                new, brief = self._groups[group]
                del new[member]
                brief[member] = None
            member.assurance = Assurance.BRIEF

    def leave(self, member: M) -> None:
        """Take the member out of the queues: it has ended, or makes room for nobody any more."""
        if member.assurance is _STEADY:
            return
        for group in member.groups:
            both = self._groups[group]
            del both[member.assurance][member]
            if not both[0] and not both[1]:
                del self._groups[group]

    def first(self, group: Hashable) -> M | None:
        """Whose room in the group another may have; None: all of them are known."""
        for members in self._groups.get(group, ()):
            if members:
                return next(iter(members))
        return None

"""Connections that stay with their machine: nobody can go on with them, so their peers are reset.

All that another machine must know for that is between whom they are. A machine writes them in
groups, each one key of the store, and a group a few times in a second: so connections that begin
and end quickly cost no more than others.

Pure: it is told what there is and what the store has, and says what is to be done.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pyforwarder.fleet.failover.record import Endpoint, RecordFault

SCHEMA: Final = "1"
# Pairs of one group, each of which has two connections.
GROUP_PAIRS: Final = 64
MOST_TEXT: Final = 7168  # it fits into one message to the keeper
MOST_GROUPS: Final = 2048  # of all machines
# A group is written so often at most.
EVERY_S: Final = 0.2

_IPV6: Final = 1
_PEER_CONNECTED: Final = 2
_KEY: Final = re.compile(r"([A-Za-z0-9_-]{8})\.(0|[1-9][0-9]{0,4})")
_BASE64: Final = re.compile(r"[A-Za-z0-9_-]*")
_ENDS: Final = {4: struct.Struct("!B4sH4sH"), 16: struct.Struct("!B16sH16sH")}


class Connection(NamedTuple):
    """One of the two connections of a pair."""

    own: Endpoint  # an address that moves
    peer: Endpoint
    peer_connected: bool  # it is the client; else we have connected to it

    def encode(self) -> bytes:
        """The bytes that `decode` reads."""
        bits = _IPV6 * (len(self.own.ip) == 16) | _PEER_CONNECTED * self.peer_connected
        return _ENDS[len(self.own.ip)].pack(bits, *self.own, *self.peer)


def encode(group: Iterable[Connection]) -> str:
    """The text that `decode` reads."""
    data = b"".join(one.encode() for one in group)
    return f"{SCHEMA} {base64.urlsafe_b64encode(data).decode().rstrip('=')}"


def decode(text: bytes | str) -> list[Connection]:
    """What `encode` has written.

    Raises:
        RecordFault: it is none.
    """
    if len(text) > MOST_TEXT:
        raise RecordFault("too long")
    if isinstance(text, bytes):
        try:
            text = text.decode("ascii")
        except UnicodeDecodeError as error:
            raise RecordFault("no ASCII") from error
    schema, _, said = text.partition(" ")
    if schema != SCHEMA:
        raise RecordFault("of another version")
    if not _BASE64.fullmatch(said):
        raise RecordFault("no base64")
    try:
        data = base64.urlsafe_b64decode(said + "=" * (-len(said) % 4))
    except (ValueError, binascii.Error) as error:
        raise RecordFault("no base64") from error
    found = []
    at = 0
    while at < len(data):
        bits = data[at]
        if bits & ~(_IPV6 | _PEER_CONNECTED):
            raise RecordFault("bits of a later version")
        form = _ENDS[16 if bits & _IPV6 else 4]
        if at + form.size > len(data):
            raise RecordFault("too short")
        _, ip, port, peer_ip, peer_port = form.unpack_from(data, at)
        if not port or not peer_port:
            raise RecordFault("port 0")
        own, peer = Endpoint(ip, port), Endpoint(peer_ip, peer_port)
        found.append(Connection(own, peer, bool(bits & _PEER_CONNECTED)))
        at += form.size
    return found


def is_key(key: str) -> bool:
    """Whether a group may have this key."""
    return bool(_KEY.fullmatch(key))


@dataclass(slots=True)
class Turn:
    """What is to be done now; keys are those of groups."""

    puts: dict[str, str] = field(default_factory=dict)
    deletes: list[str] = field(default_factory=list)
    tell: dict[str, str] = field(default_factory=dict)  # the keeper, of others'; empty: no more


class Stays:
    """Knows the connections in the store that stay with their machine, for one machine."""

    def __init__(self, tag: str) -> None:
        """`tag` is what this machine is called in keys."""
        self._prefix = f"{tag}."
        self._own: dict[str, str] = {}  # as the store has them
        self._others: dict[str, str] = {}
        self._told: dict[str, str] = {}
        self._written_s: dict[str, float] = {}
        self.faults = 0

    def saw_all(self, found: Iterable[tuple[str, bytes]]) -> None:
        """All groups that are in the store."""
        self._own.clear()
        self._others.clear()
        for key, value in found:
            self.saw(key, value)

    def saw(self, key: str, value: bytes | None) -> None:
        """Note that a key of the store has changed, or has gone (None)."""
        is_own = key.startswith(self._prefix)
        known = self._own if is_own else self._others
        if value is None:
            known.pop(key, None)
            return
        is_one_too_many = key not in known and len(known) >= MOST_GROUPS
        try:
            if not is_key(key) or (is_one_too_many and not is_own):
                raise RecordFault("a key")
            decode(value)
        except RecordFault:
            self.faults += 1
            known.pop(key, None)
            return
        # For our own keys it is enough to know that they are there, to remove or to write them.
        known[key] = "" if is_one_too_many else value.decode()

    def wrote(self, puts: Mapping[str, str], deletes: Iterable[str], now_s: float) -> None:
        """The store has that now."""
        for key, text in puts.items():
            self._own[key], self._written_s[key] = text, now_s
        for key in deletes:
            self._own.pop(key, None)
            self._written_s.pop(key, None)

    def lost_lease(self) -> None:
        """What we had written is gone, or will be: write all of it again."""
        self._own.clear()
        self._written_s.clear()

    def turn(self, own: Mapping[int, Iterable[Connection]], now_s: float) -> Turn:
        """What follows from the groups that this machine has now."""
        turn = Turn()
        there = {f"{self._prefix}{number}": group for number, group in own.items()}
        for key, group in there.items():
            if now_s < self._written_s.get(key, -EVERY_S) + EVERY_S:
                continue
            text = encode(group)
            if self._own.get(key) != text:
                turn.puts[key] = text
        turn.deletes = [key for key in self._own if key not in there]
        for key, text in self._others.items():
            if self._told.get(key) != text:
                turn.tell[key] = text
        for key in self._told.keys() - self._others.keys():
            turn.tell[key] = ""
        return turn

    def mark_known(self, key: str, text: str) -> None:
        """The keeper knows that now."""
        if text:
            self._told[key] = text
        else:
            self._told.pop(key, None)

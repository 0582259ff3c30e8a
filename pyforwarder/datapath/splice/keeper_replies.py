"""What the keeper answers to a worker's request: records, and the words in which they are sent.

The keeper's parts make a record; `words` is what goes over the channel, beside the request's
number. A worker reads the words with the function for its request. Both ends are one build: an
answer needs no checks.

Any request may be answered by `Late` or `Failed` as well. `{}` means that it was done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyforwarder.datapath.base import PairReason

Words = dict[str, object]

NOT_YOURS: Final = "not_yours"


class NotYoursError(Exception):
    """A request is about a pair or session that is not, or no longer, the worker's."""


@dataclass(frozen=True, slots=True)
class Late:
    """The request was read too late, and nothing was begun."""

    def words(self) -> Words:
        """As they are sent."""
        return {"late": True}


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed, and it is not known how far it came."""

    what: str  # NOT_YOURS, or an error's text

    @classmethod
    def by(cls, error: Exception) -> Failed:
        """The answer that says this error."""
        return cls(NOT_YOURS if isinstance(error, NotYoursError) else repr(error))

    def words(self) -> Words:
        """As they are sent."""
        return {"error": self.what}


@dataclass(frozen=True, slots=True)
class Declined:
    """The kernel never gets this pair or session."""

    reason: PairReason

    def words(self) -> Words:
        """As they are sent."""
        return {"refused": int(self.reason)}


@dataclass(frozen=True, slots=True)
class NotNow:
    """The pair cannot begin now: the kernel's sockets have something to finish first."""

    busy: int  # `Busy`

    def words(self) -> Words:
        """As they are sent."""
        return {"busy": int(self.busy)}


@dataclass(frozen=True, slots=True)
class Begun:
    """The pair is spliced."""

    index: int
    unread_bytes: list[int]  # by direction: what the worker has still to read, and to write
    is_mute: bool

    def words(self) -> Words:
        """As they are sent."""
        return {
            "busy": 0,
            "index": self.index,
            "unread": self.unread_bytes,
            "mute": self.is_mute,
        }


@dataclass(frozen=True, slots=True)
class Opened:
    """The kernel forwards the session."""

    index: int

    def words(self) -> Words:
        """As they are sent."""
        return {"index": self.index}


@dataclass(frozen=True, slots=True)
class Given:
    """An orphan is the worker's now; sockets come with it."""

    index: int
    id: int
    record: bytes  # what `show` said of it; b"": nothing

    def words(self) -> Words:
        """As they are sent."""
        return {"index": self.index, "id": self.id, "record": self.record.hex()}


@dataclass(frozen=True, slots=True)
class GivenSession:
    """An orphaned session is the worker's now; its socket to the server comes with it."""

    index: int
    id: int
    record: bytes
    client: tuple[str, int]
    local: tuple[str, int]

    def words(self) -> Words:
        """As they are sent."""
        return {
            "index": self.index,
            "id": self.id,
            "record": self.record.hex(),
            "client": self.client[0],
            "client_port": self.client[1],
            "local": self.local[0],
            "local_port": self.local[1],
        }


@dataclass(frozen=True, slots=True)
class NoneLeft:
    """No orphan is the worker's."""

    later: bool = False  # there will be some, when their old sockets are closed

    def words(self) -> Words:
        """As they are sent."""
        return {"later": True} if self.later else {}


@dataclass(frozen=True, slots=True)
class AskAgain:
    """The keeper has tried some orphans in vain; others may be available."""

    def words(self) -> Words:
        """As they are sent."""
        return {"more": True}


JoinReply = Begun | NotNow | Declined | Late | Failed
OpenReply = Opened | Declined | Late | Failed
AdoptReply = Given | NoneLeft | AskAgain


def join_reply(answer: Mapping[str, Any]) -> JoinReply:
    """Read the answer to `join`."""
    if (other := _late_or_failed(answer)) is not None:
        return other
    if "refused" in answer:
        return Declined(PairReason(answer["refused"]))
    if answer["busy"]:
        return NotNow(answer["busy"])
    return Begun(answer["index"], answer["unread"], answer["mute"])


def open_reply(answer: Mapping[str, Any]) -> OpenReply:
    """Read the answer to `open_session`."""
    if (other := _late_or_failed(answer)) is not None:
        return other
    if "index" in answer:
        return Opened(answer["index"])
    return Declined(PairReason(answer["refused"]))


def adopt_reply(answer: Mapping[str, Any]) -> AdoptReply:
    """Read the answer to `adopt` and `take_over`; what failed leaves no orphan to adopt."""
    if "more" in answer:
        return AskAgain()
    if "index" not in answer:
        return NoneLeft(later="later" in answer)
    return Given(answer["index"], answer["id"], bytes.fromhex(answer["record"]))


def adopt_session_reply(answer: Mapping[str, Any]) -> GivenSession | NoneLeft:
    """Read the answer to `adopt_session`; what failed leaves no orphan to adopt."""
    if "index" not in answer:
        return NoneLeft()
    return GivenSession(
        answer["index"],
        answer["id"],
        bytes.fromhex(answer["record"]),
        (answer["client"], answer["client_port"]),
        (answer["local"], answer["local_port"]),
    )


def is_late(answer: Mapping[str, Any]) -> bool:
    """Whether the request was read too late, whatever it was."""
    return "late" in answer


def has_failed(answer: Mapping[str, Any]) -> bool:
    """Whether the request has failed, whatever it was."""
    return "error" in answer


def _late_or_failed(answer: Mapping[str, Any]) -> Late | Failed | None:
    if is_late(answer):
        return Late()
    return Failed(answer["error"]) if has_failed(answer) else None

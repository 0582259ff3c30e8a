"""What the keeper answers is read as it was meant, after it has been JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.splice import keeper_replies
from pyforwarder.datapath.splice.keeper_replies import (
    NOT_YOURS,
    AskAgain,
    Begun,
    Declined,
    Failed,
    Given,
    GivenSession,
    Late,
    NoneLeft,
    NotNow,
    NotYoursError,
    Opened,
    Words,
    adopt_reply,
    adopt_session_reply,
    has_failed,
    is_late,
    join_reply,
    open_reply,
)


class Reply(Protocol):
    def words(self) -> Words: ...


SESSION = GivenSession(7, 1 << 50, b"said", ("2001:db8::1", 1), ("10.0.0.1", 65535))
READ: list[tuple[Callable[[Mapping[str, Any]], object], Reply]] = [
    (join_reply, Begun(0, [0, 70_000], is_mute=False)),
    (join_reply, Begun(3, [5, 0], is_mute=True)),
    (join_reply, NotNow(2)),
    (join_reply, Declined(PairReason.CHAINED)),
    (join_reply, Late()),
    (join_reply, Failed("OSError(11)")),
    (open_reply, Opened(0)),
    (open_reply, Declined(PairReason.OTHER_SOCKET)),
    (open_reply, Late()),
    (open_reply, Failed("OSError(11)")),
    (adopt_reply, Given(0, 1 << 52, b"")),
    (adopt_reply, Given(9, 5, bytes(range(256)))),
    (adopt_reply, NoneLeft()),
    (adopt_reply, NoneLeft(later=True)),
    (adopt_reply, AskAgain()),
    (adopt_session_reply, SESSION),
    (adopt_session_reply, NoneLeft()),
]


@pytest.mark.parametrize(("read", "reply"), READ)
def test_a_reply_is_read_as_it_was_written(
    read: Callable[[Mapping[str, Any]], object], reply: Reply
) -> None:
    """The request's number is sent beside it."""
    assert read(json.loads(json.dumps({"n": 5, **reply.words()}))) == reply


def test_every_reply_has_been_read() -> None:
    written = {
        one
        for one in vars(keeper_replies).values()
        if isinstance(one, type) and hasattr(one, "words")
    }
    assert {type(reply) for _, reply in READ} == written


@pytest.mark.parametrize("read", [adopt_reply, adopt_session_reply])
@pytest.mark.parametrize("reply", [Late(), Failed("OSError(11)")])
def test_a_failed_request_gives_no_orphan(
    read: Callable[[Mapping[str, Any]], object], reply: Reply
) -> None:
    assert read(reply.words()) == NoneLeft()


def test_what_is_late_and_what_has_failed_is_so_for_every_request() -> None:
    late, failed = Late().words(), Failed("x").words()
    assert (is_late(late), has_failed(late)) == (True, False)
    assert (is_late(failed), has_failed(failed)) == (False, True)
    assert not is_late({})
    assert not has_failed({})


def test_an_error_is_told_by_its_kind() -> None:
    assert Failed.by(NotYoursError()) == Failed(NOT_YOURS)
    assert Failed.by(OSError(11, "again")) == Failed("BlockingIOError(11, 'again')")

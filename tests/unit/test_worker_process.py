"""When a worker's process ends of its own accord."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import Counter
from pyforwarder.worker.adoption import Adoption
from pyforwarder.worker.obeying import Worker
from pyforwarder.worker.udp.endings import ENDS_AT_ONCE


def adoption(server: object, splice: object, sessions: object) -> Adoption:
    """Of a worker with these parts, which play the real ones."""
    parts: dict[str, Any] = {"splice": splice, "sessions": sessions}
    of: Any = server
    return Adoption(of, worker=0, keeper=None, **parts)


LEFT: Final = (
    "a pair",
    "a request",
    "a message",
    "what another keeper is to say",
    "a session of a worker that died",
    "a pair whose old sockets are there",
)


@pytest.mark.parametrize("left", LEFT)
def test_a_worker_that_drains_ends_when_nothing_is_left_and_nothing_is_on_its_way(
    left: str,
) -> None:
    """What the kernel has opened is its own once the keeper has given it, a moment later."""
    counters = [0] * (max(Counter) + 1)
    counters[Counter.OPEN] = int(left == "a pair")
    keeper = SimpleNamespace(unsettled=int(left == "a request"))
    messages = ["adopt"] if left == "a message" else []
    later: list[Any] = []
    ended: list[bool] = []

    def receive() -> None:
        keeper.unsettled += len(messages)  # it asks for each
        messages.clear()

    worker: Any = object.__new__(Worker)
    server = SimpleNamespace(counters=counters)
    splice = SimpleNamespace(adopts_later=left == "a pair whose old sockets are there")
    taken_in = adoption(server, splice, None)
    taken_in._ends_sessions = True
    orphans: list[Any] = ["one"] if left == "a session of a worker that died" else []
    taken_in._orphans = orphans
    worker._gets_more = left == "what another keeper is to say"
    worker._parts = SimpleNamespace(
        server=server,
        adoption=taken_in,
        keeper=keeper,
        opened=SimpleNamespace(receive=receive),
    )
    worker.loop = SimpleNamespace(
        after=lambda _s, action: later.append(action), stop=lambda: ended.append(True)
    )
    worker._stop_when_empty()
    assert not ended
    counters[Counter.OPEN] = keeper.unsettled = 0
    worker._gets_more = splice.adopts_later = False
    orphans.clear()
    later.pop()()
    assert (ended, later) == ([True], [])


def test_sessions_that_come_after_settings_are_taken_in_as_those_before() -> None:
    """What is to be adopted comes one by one, and may come slowly."""
    taken: list[str] = []

    def take_in(orphans: list[str]) -> int:
        taken.extend(orphans)
        return 0

    given: list[Any] = []
    datagrams: Any = SimpleNamespace(adoption=SimpleNamespace(take_in=take_in))
    sessions = SimpleNamespace(adopt=lambda take, done: given.extend((take, done)))
    worker = adoption(None, None, sessions)
    worker.take_in_sessions(datagrams)
    done: list[bool] = []
    worker.adopt(lambda: done.append(True))
    take, all_are_given = given
    take("before")
    worker.take_in_sessions(datagrams)  # as with every reload
    take("after")
    all_are_given()
    assert (taken, done) == (["before", "after"], [True])


def test_sessions_of_a_worker_that_died_in_a_drain_end_with_its_successor() -> None:
    """Those that come before it is told to drain, and those that come later; a few in a turn."""
    ended: list[int] = []
    turns: list[Any] = []

    def end(some: list[int], _generation: object, reason: CloseReason) -> None:
        assert len(some) <= ENDS_AT_ONCE
        assert reason is CloseReason.SHUTDOWN
        ended.extend(some)

    given: list[Any] = []
    sessions = SimpleNamespace(adopt=lambda take, done: given.extend((take, done)))
    loop = SimpleNamespace(defer=lambda action, owner: turns.append(action))
    server = SimpleNamespace(generation=None, loop=loop)
    taken_in = adoption(server, None, sessions)
    before: list[Any] = list(range(40))
    taken_in._orphans = before
    worker: Any = object.__new__(Worker)
    worker._draining = True
    worker._sockets = []
    worker._parts = SimpleNamespace(
        server=server,
        datagrams=SimpleNamespace(adoption=SimpleNamespace(end=end), drain=lambda _reason: None),
        adoption=taken_in,
        opened=None,
    )
    taken_in.adopt(lambda: None)
    take, all_are_given = given
    worker._drain(gets_more=False)
    while turns:
        turns.pop()(None)
    assert ended == list(range(40))
    take(40)
    all_are_given()
    assert ended == list(range(41))

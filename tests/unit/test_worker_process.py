"""When a worker's process ends of its own accord."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import Counter
from pyforwarder.worker.process import _Worker
from pyforwarder.worker.udp.endings import ENDS_AT_ONCE

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

    worker: Any = object.__new__(_Worker)
    worker._server = SimpleNamespace(counters=counters)
    worker._gets_more = left == "what another keeper is to say"
    worker._ends_sessions = True
    worker._orphans = ["one"] if left == "a session of a worker that died" else []
    worker._splice = SimpleNamespace(adopts_later=left == "a pair whose old sockets are there")
    worker._keeper = keeper
    worker._opened = SimpleNamespace(receive=receive)
    worker.loop = SimpleNamespace(
        after=lambda _s, action: later.append(action), stop=lambda: ended.append(True)
    )
    worker._stop_when_empty()
    assert not ended
    counters[Counter.OPEN] = keeper.unsettled = 0
    worker._gets_more = worker._splice.adopts_later = False
    worker._orphans.clear()
    later.pop()()
    assert (ended, later) == ([True], [])


def test_sessions_that_come_after_settings_are_taken_in_as_those_before() -> None:
    """What is to be adopted comes one by one, and may come slowly."""
    taken: list[str] = []

    def take_in(orphans: list[str]) -> int:
        taken.extend(orphans)
        return 0

    given: list[Any] = []
    worker: Any = object.__new__(_Worker)
    worker._orphans, worker._adopting, worker._listens = [], 0, True
    worker._ends_sessions = False
    worker._datagrams = SimpleNamespace(adoption=SimpleNamespace(take_in=take_in))
    worker._server = worker._splice = None
    worker._serving = lambda: None
    worker._sessions = SimpleNamespace(adopt=lambda take, done: given.extend((take, done)))
    done: list[bool] = []
    worker._adopt(lambda: done.append(True))
    take, all_are_given = given
    take("before")
    worker._take_in_sessions()  # as with every reload
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

    worker: Any = object.__new__(_Worker)
    worker._orphans, worker._adopting, worker._listens = list(range(40)), 0, False
    worker._draining, worker._ends_sessions = True, False
    worker._opened = None
    worker._sockets = []
    worker._server = SimpleNamespace(generation=None)
    worker._datagrams = SimpleNamespace(
        adoption=SimpleNamespace(end=end), drain=lambda _reason: None
    )
    worker.loop = SimpleNamespace(defer=lambda action, owner: turns.append(action))
    given: list[Any] = []
    worker._sessions = SimpleNamespace(adopt=lambda take, done: given.extend((take, done)))
    worker._splice = None
    worker._adopt(lambda: None)
    take, all_are_given = given
    worker._drain(gets_more=False)
    while turns:
        turns.pop()(None)
    assert ended == list(range(40))
    take(40)
    all_are_given()
    assert ended == list(range(41))

"""When a worker's process ends of its own accord."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pyforwarder.runtime.counters import Counter
from pyforwarder.worker.process import _Worker


@pytest.mark.parametrize("left", ["a pair", "a request", "a message"])
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
    worker._keeper = keeper
    worker._opened = SimpleNamespace(receive=receive)
    worker.loop = SimpleNamespace(
        after=lambda _s, action: later.append(action), stop=lambda: ended.append(True)
    )
    worker._stop_when_empty()
    assert not ended
    counters[Counter.OPEN] = keeper.unsettled = 0
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

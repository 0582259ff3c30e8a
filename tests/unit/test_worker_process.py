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

    def hear() -> None:
        keeper.unsettled += len(messages)  # it asks for each
        messages.clear()

    worker: Any = object.__new__(_Worker)
    worker._server = SimpleNamespace(counters=counters)
    worker._keeper = keeper
    worker._opened = SimpleNamespace(hear=hear)
    worker.loop = SimpleNamespace(
        after=lambda _s, action: later.append(action), stop=lambda: ended.append(True)
    )
    worker._stop_when_empty()
    assert not ended
    counters[Counter.OPEN] = keeper.unsettled = 0
    later.pop()()
    assert (ended, later) == ([True], [])

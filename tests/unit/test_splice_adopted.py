"""A pair that has changed hands, and a keeper that has no time yet to hear of it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.splice import datapath as module
from pyforwarder.datapath.splice.datapath import SpliceDatapath
from pyforwarder.datapath.splice.keeper_client import KeeperError


class Stage:
    """A splice datapath with a keeper that refuses `silent` questions, and a pair of it."""

    def __init__(self, silent: int) -> None:
        self.silent = silent
        self.asked: list[dict[str, object]] = []
        self.later: list[Callable[[], None]] = []
        self.broken: list[CloseReason] = []
        splice: Any = object.__new__(SpliceDatapath)
        splice._keeper = SimpleNamespace(ask=self._ask)
        splice._loop = SimpleNamespace(after=lambda _s, call: self.later.append(call))
        splice._host = SimpleNamespace(broken=lambda _pair, why: self.broken.append(why))
        splice._window = SimpleNamespace(first_slot=100)
        self.splice = splice
        self.state = module._Spliced(7, [0, 0], is_mute=True)
        self.pair: Any = SimpleNamespace(datapath=self.splice, state=self.state, slot=3)

    def _ask(self, do: str, **fields: object) -> dict[str, object]:
        self.asked.append({"do": do, **fields})
        if len(self.asked) <= self.silent:
            raise KeeperError("ask the splice keeper", errno.ETIMEDOUT)
        return {}

    def say(self, tries: int) -> None:
        self.splice._say_adopted(self.pair, self.state, tries)

    def turn(self) -> None:
        later, self.later = self.later, []
        for call in later:
            call()


@pytest.mark.parametrize("silent", [0, 1, 3])
def test_it_is_asked_again_until_it_answers(silent: int) -> None:
    stage = Stage(silent)
    stage.say(3)
    for _ in range(silent):
        assert stage.later
        stage.turn()
    assert stage.asked == [{"do": "adopted", "index": 7, "slot": 103}] * (silent + 1)
    assert not stage.later
    assert not stage.broken


def test_a_pair_that_nobody_would_see_idle_is_reset() -> None:
    stage = Stage(silent=9)
    stage.say(1)
    stage.turn()
    assert len(stage.asked) == 2
    assert not stage.later
    assert stage.broken == [CloseReason.INTERNAL]


def test_one_that_has_ended_meanwhile_is_not_asked_about() -> None:
    stage = Stage(silent=1)
    stage.say(1)
    stage.pair.state = None  # and its slot another's
    stage.turn()
    assert len(stage.asked) == 1
    assert not stage.broken

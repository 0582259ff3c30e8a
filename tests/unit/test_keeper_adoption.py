"""Which orphans the keeper gives a worker, and what becomes of those whose sockets are there."""

from __future__ import annotations

import errno
import socket
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pyforwarder.datapath.splice import keeper_adoption as module
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import Splice
from pyforwarder.datapath.splice.keeper_adoption import KeeperAdoption
from pyforwarder.datapath.splice.keeper_replies import AdoptReply, AskAgain, Given, NoneLeft
from pyforwarder.worker.orphans import adopt_orphans

if TYPE_CHECKING:
    from collections.abc import Callable


class Site:
    """A keeper that has orphans, and a host on which some addresses are in use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, orphans: int) -> None:
        self.owners = dict.fromkeys(range(orphans), 0)
        self.when_forgotten: list[Callable[[int], None]] = []
        pairs: Any = SimpleNamespace(
            owners=self.owners,
            when_forgotten=self.when_forgotten,
            record=self._record,
            forget=self._forget,
            remember_joined=lambda _index, _sockets: None,
        )
        unused: Any = None
        self.adoption = KeeperAdoption(
            pairs, unused, unused, workers=2, sockets_of=lambda _index: None
        )
        for index in range(orphans):
            self.adoption.orphan(index, b"")
        self.in_use: set[int] = set()
        self.error = errno.EADDRNOTAVAIL
        self.forgotten: list[int] = []
        self.tried: list[int] = []
        self.now_s = 1000.0
        monkeypatch.setattr(splice_sockets, "revive", self._revive)
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)

    def _record(self, index: int) -> Splice:
        record = Splice()
        record.id = 100 + index
        for direction in record.direction:
            direction.dport = index
        return record

    def _forget(self, index: int) -> None:
        self.forgotten.append(index)
        for told in self.when_forgotten:
            told(index)
        self.owners.pop(index, None)

    def _revive(self, direction: Any, _family: int) -> socket.socket:
        self.tried.append(direction.dport)
        if direction.dport in self.in_use:
            raise OSError(self.error, "made up")
        made: Any = SimpleNamespace(close=lambda: None)
        return made  # type: ignore[no-any-return]

    def adopt(self) -> AdoptReply:
        return self.adoption.adopt(0, [])

    def adopt_all(self) -> tuple[list[int], NoneLeft]:
        """All that can be had now, and the last answer."""
        found = []
        for _ in range(1000):
            answer = self.adopt()
            if isinstance(answer, Given):
                found.append(answer.index)
            elif not isinstance(answer, AskAgain):
                return found, answer
        raise AssertionError("no end of it")


@pytest.mark.parametrize("error", [errno.EADDRNOTAVAIL, errno.EADDRINUSE])
def test_pairs_whose_old_sockets_are_there_stay_and_are_had_later(
    monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    site = Site(monkeypatch, 100)
    site.error = error
    site.in_use = set(range(0, 100, 2))
    found, answer = site.adopt_all()
    assert found == list(range(1, 100, 2))
    assert answer == NoneLeft(later=True)
    assert site.forgotten == []
    # They are not tried without end.
    site.tried.clear()
    assert site.adopt() == NoneLeft(later=True)
    assert site.tried == []
    site.in_use.clear()
    site.now_s += 5.0
    found, answer = site.adopt_all()
    assert found == list(range(0, 100, 2))
    assert answer == NoneLeft()


def test_one_request_tries_few(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, 1000)
    site.in_use = set(range(1000))
    assert site.adopt() == AskAgain()
    assert len(site.tried) == module._TRIED_AT_ONCE


def test_one_whose_addresses_are_another_s_for_good_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, 1)
    site.in_use = {0}
    assert site.adopt() == NoneLeft(later=True)
    site.now_s += module._IN_USE_S - 1.0
    assert site.adopt() == NoneLeft(later=True)
    site.now_s += 2.0
    assert site.adopt() == NoneLeft()
    assert site.forgotten == [0]


def test_one_that_cannot_be_had_at_all_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, 2)
    site.in_use, site.error = {0}, errno.ENETUNREACH
    assert site.adopt_all() == ([1], NoneLeft())
    assert site.forgotten == [0]


def test_other_workers_orphans_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, 4)
    site.owners.update({0: 1, 1: 1})
    site.in_use = {0, 1}
    assert site.adopt_all() == ([2, 3], NoneLeft())


def test_sockets_that_are_not_the_pair_s_cost_the_worker_nothing_that_hands_them_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker of the daemon before may have been taken over: it sent them, not this one."""
    site = Site(monkeypatch, 1)
    monkeypatch.setattr(splice_sockets.SocketEnd, "of", lambda sock: sock)

    def describe(record: Splice, *_: object) -> None:
        record.direction[0].from_.sport = 9

    monkeypatch.setattr(splice_sockets, "describe", describe)
    monkeypatch.setattr(splice_sockets, "is_of_our_network", lambda _sock: True)
    sockets: Any = [object(), object()]
    assert site.adoption.take_over(0, 0, sockets) == NoneLeft()
    assert site.adoption.is_orphan(0)


def test_a_worker_asks_again_once_a_second_however_often_it_was_told_of_orphans() -> None:
    timers: list[Callable[[], None]] = []
    asked: list[Callable[[], None]] = []

    def adopt(_take: object, done: Callable[[], None], later: Callable[[], None]) -> None:
        asked.append(later)
        later()
        done()

    server: Any = SimpleNamespace(
        loop=SimpleNamespace(after=lambda _s, call: timers.append(call)),
    )
    splice: Any = SimpleNamespace(adopt=adopt, adopts_later=False)
    adopted: list[int] = []
    for _ in range(5):
        adopt_orphans(server, splice, adopted.append)
    assert (len(asked), len(timers), adopted) == (5, 1, [0] * 5)
    timers.pop()()
    assert (len(asked), len(timers), adopted) == (6, 1, [0] * 5)

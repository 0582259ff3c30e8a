"""What becomes of a UDP session in the kernel whose keeper does not answer, or dies."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import pytest

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import pair_table as table
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.ebpf.pair_table import PairWindow
from pyforwarder.datapath.splice.session_abi import SESSION_BYTES, SessionRecord, SessionState
from pyforwarder.datapath.splice.sessions import (
    Carried,
    KernelSession,
    PendingSession,
    SessionOrphan,
    SpliceSessions,
)
from pyforwarder.runtime.loop import Deadlines
from tests.helpers.fake_asker import FakeAsker

ENTRIES: Final = 8
SLOT: Final = 3
NUMBER: Final = 42
INDEX: Final = 5


class Stage:
    """The kernel's sessions as a test says that they are."""

    def __init__(self) -> None:
        self.asker = FakeAsker()
        self.faults: list[Exception] = []
        self.memory = mmap.mmap(-1, ENTRIES * SESSION_BYTES)
        self.window = PairWindow(mmap.mmap(-1, 16 * PAIR_BYTES), first_slot=100, worker_index=0)
        self.window.words64[SLOT * self.window.WORDS64 + table.ID] = NUMBER
        made: Any = object.__new__(SpliceSessions)
        made._keeper = self.asker
        self.deadlines = Deadlines()
        made._loop = SimpleNamespace(
            deadlines=self.deadlines, on_error=lambda _owner, error: self.faults.append(error)
        )
        made._window = self.window
        made._memory = self.memory
        made._keeper_from_s = 0.0
        made._abandoned = 0
        made._uncounted = {}
        self.sessions: SpliceSessions = made
        self.heard: list[KernelSession | PairReason] = []
        self.counted: list[list[Carried]] = []
        self.now_s = 1e6

    def write(
        self, index: int, state: SessionState, *, number: int = NUMBER, sent: int = 0
    ) -> None:
        record = SessionRecord()
        record.id, record.slot, record.state = number, 100 + SLOT, state
        for direction in record.direction:
            direction.bytes, direction.packets = 100 * sent, sent
        at = index * SESSION_BYTES
        self.memory[at : at + SESSION_BYTES] = bytes(record)

    def open(self) -> PendingSession | PairReason:
        sock: Any = SimpleNamespace(fileno=lambda: 9)
        self.now_s += 1e9
        return self.sessions.open(
            session_id=NUMBER,
            slot=SLOT,
            client=("192.0.2.1", 5),
            local="192.0.2.2",
            sockets=(sock, sock),
            any_interface=False,
            idle_s=60.0,
            now_s=self.now_s,
            then=self.heard.append,
        )

    def close(self, *places: KernelSession) -> None:
        self.sessions.close(places, self.counted.append)

    def pass_time(self) -> None:
        def fails(_owner: object, error: Exception) -> None:
            raise error

        self.deadlines.run_expired(time.monotonic() + 3600.0, fails)

    def word(self, at: int) -> int:
        return self.window.words64[SLOT * self.window.WORDS64 + at]


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    assert made.asker.asked == []
    assert made.faults == []
    assert made.deadlines.next_s() is None


PLACE: Final = {"places": [[INDEX, NUMBER]]}


# Its beginning


def test_a_session_has_a_place_when_the_keeper_says_so(stage: Stage) -> None:
    assert isinstance(stage.open(), PendingSession)
    do, fields = stage.asker.take()
    assert (do, fields["id"], fields["slot"]) == ("open_session", NUMBER, 100 + SLOT)
    assert stage.heard == []
    stage.asker.answer(index=INDEX)
    (session,) = stage.heard
    assert isinstance(session, KernelSession)
    assert (session.index, session.id, session.slot) == (INDEX, NUMBER, SLOT)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"refused": int(PairReason.OTHER_SOCKET)}, PairReason.OTHER_SOCKET),
        ({"error": "no"}, PairReason.REFUSED_BY_KERNEL),
        ({"late": True}, PairReason.NO_KEEPER),
    ],
)
def test_a_session_without_a_place_says_why(
    stage: Stage, words: dict[str, Any], reason: PairReason
) -> None:
    stage.open()
    stage.asker.answer(**words)
    assert stage.heard == [reason]


def test_the_record_says_whether_a_keeper_that_died_has_begun_it(stage: Stage) -> None:
    stage.open()
    stage.write(INDEX, SessionState.ACTIVE)
    stage.asker.lose()
    (session,) = stage.heard
    assert isinstance(session, KernelSession)
    assert session.index == INDEX


@pytest.mark.parametrize("state", [SessionState.PREPARED, SessionState.FREE])
def test_one_that_had_not_begun_will_not(stage: Stage, state: SessionState) -> None:
    stage.open()
    stage.write(INDEX, state)
    stage.write(1, SessionState.ACTIVE, number=NUMBER + 1)  # another's
    stage.asker.lose()
    assert stage.heard == [PairReason.NO_KEEPER]


def test_a_keeper_that_does_not_read_is_not_asked(stage: Stage) -> None:
    stage.asker.has_room = False
    assert stage.open() is PairReason.NO_KEEPER


@pytest.mark.parametrize("is_lost", [True, False])
def test_one_that_ends_before_it_is_known_to_have_begun_ends_there_too(
    stage: Stage, *, is_lost: bool
) -> None:
    """And as long as the kernel may have its addresses, no other session is begun."""
    opening = stage.open()
    assert isinstance(opening, PendingSession)
    for _ in range(2):
        stage.sessions.abandon(opening)
    assert stage.open() is PairReason.NO_KEEPER
    stage.write(INDEX, SessionState.ACTIVE)
    if is_lost:
        stage.asker.lose()
    else:
        stage.asker.answer(index=INDEX)
    assert stage.heard == []
    assert stage.asker.take() == ("close_sessions", PLACE)
    stage.asker.lose()
    assert stage.asker.take() == ("close_sessions", PLACE)
    assert isinstance(stage.open(), PendingSession)  # behind it
    stage.asker.answer()
    stage.asker.answer(index=INDEX)
    assert len(stage.heard) == 1


# Its end


def test_the_keeper_has_the_last_word_of_what_was_carried(stage: Stage) -> None:
    stage.write(INDEX, SessionState.ACTIVE, sent=1)
    stage.write(INDEX + 1, SessionState.ACTIVE, number=NUMBER + 1, sent=2)
    stage.close(KernelSession(INDEX, NUMBER, SLOT), KernelSession(INDEX + 1, NUMBER + 1, SLOT))
    assert stage.counted == []
    stage.asker.answer(carried=[[[700, 7], [800, 8]], None])
    assert stage.counted == [[((700, 7), (800, 8)), ((200, 2), (200, 2))]]
    stage.pass_time()
    assert len(stage.counted) == 1


def test_records_say_what_was_carried_if_the_keeper_does_not_in_time(stage: Stage) -> None:
    stage.write(INDEX, SessionState.ACTIVE, sent=1)
    stage.close(KernelSession(INDEX, NUMBER, SLOT))
    stage.write(INDEX, SessionState.ACTIVE, sent=3)  # it is still there
    stage.pass_time()
    assert stage.counted == [[((300, 3), (300, 3))]]
    stage.asker.answer(carried=[[[400, 4], [400, 4]]])
    assert len(stage.counted) == 1


def test_an_end_that_is_lost_is_asked_for_again_and_another_s_record_is_not_counted(
    stage: Stage,
) -> None:
    stage.write(INDEX, SessionState.ACTIVE, sent=1)
    stage.close(KernelSession(INDEX, NUMBER, SLOT))
    for _ in range(2):
        stage.asker.lose()
        assert stage.asker.take() == ("close_sessions", PLACE)
    stage.write(INDEX, SessionState.ACTIVE, number=NUMBER + 9, sent=50)
    stage.pass_time()
    assert stage.counted == [[((100, 1), (100, 1))]]
    stage.asker.answer(carried=[None])


def test_a_worker_that_ends_counts_what_it_knows(stage: Stage) -> None:
    stage.write(INDEX, SessionState.ACTIVE, sent=2)
    for _ in range(3):
        stage.close(KernelSession(INDEX, NUMBER, SLOT))
    stage.sessions.count_now()
    assert stage.counted == 3 * [[((200, 2), (200, 2))]]
    for _ in range(3):
        stage.asker.answer(carried=[None])
    assert len(stage.counted) == 3


def test_a_fault_over_a_count_costs_no_other(stage: Stage) -> None:
    def fails(_carried: list[Carried]) -> None:
        raise RuntimeError("ours")

    for _ in range(2):
        stage.sessions.close([KernelSession(INDEX, NUMBER, SLOT)], fails)
    stage.close(KernelSession(INDEX, NUMBER, SLOT))
    stage.asker.answer(carried=[None])
    stage.pass_time()
    assert len(stage.counted) == 1
    assert [str(error) for error in stage.faults] == ["ours", "ours"]
    stage.faults.clear()
    for _ in range(2):
        stage.asker.answer(carried=[None])


def test_without_a_keeper_for_ever_nobody_waits_for_a_count(stage: Stage) -> None:
    stage.asker.is_over = True
    stage.close(KernelSession(INDEX, NUMBER, SLOT))
    assert stage.counted == [[((0, 0), (0, 0))]]
    stage.asker.asked.clear()


# Going on


def go_on(stage: Stage) -> list[int]:
    lost: list[int] = []
    sock: Any = None
    orphan = SessionOrphan(INDEX, NUMBER, sock, ("192.0.2.1", 5), ("192.0.2.2", 6), None)
    stage.write(INDEX, SessionState.ACTIVE, sent=1)
    session = stage.sessions.resume(orphan, SLOT, 60.0, lambda: lost.append(1))
    assert (session.index, session.id, session.slot) == (INDEX, NUMBER, SLOT)
    assert stage.word(table.REDIRECTED[0]) == 100
    return lost


def test_a_new_worker_s_slot_is_told_until_that_is_answered(stage: Stage) -> None:
    lost = go_on(stage)
    for _ in range(3):
        stage.asker.lose()
        do, fields = stage.asker.take()
        assert (do, fields["slot"], fields["id"]) == ("session_adopted", 100 + SLOT, NUMBER)
    stage.write(INDEX, SessionState.ACTIVE, sent=4)
    stage.asker.answer()
    assert stage.word(table.REDIRECTED[1]) == 400
    assert not lost


def test_one_that_the_keeper_does_not_know_is_lost(stage: Stage) -> None:
    lost = go_on(stage)
    stage.asker.answer(error="not yours")
    assert lost == [1]


@pytest.mark.parametrize("is_lost", [True, False])
def test_one_that_has_ended_meanwhile_is_not_shown(stage: Stage, *, is_lost: bool) -> None:
    """Its slot may be another's."""
    lost = go_on(stage)
    stage.window.words64[SLOT * stage.window.WORDS64 + table.ID] = NUMBER + 1
    stage.window.words64[SLOT * stage.window.WORDS64 + table.REDIRECTED[0]] = 7
    if is_lost:
        stage.asker.lose()
    else:
        stage.asker.answer(error="not yours")
    assert stage.word(table.REDIRECTED[0]) == 7
    assert not lost


@pytest.mark.parametrize("comes", [False, True], ids=["no socket", "a fault of ours"])
def test_a_session_that_cannot_be_taken_in_is_let_go_of_and_the_next_one_adopted(
    stage: Stage, *, comes: bool
) -> None:
    """It would be nobody's."""
    done: list[bool] = []

    def take(_orphan: SessionOrphan) -> None:
        raise RuntimeError("ours")

    stage.sessions.adopt(take, lambda: done.append(True))
    fds = [os.open(os.devnull, os.O_RDONLY)] if comes else []
    session = {"index": INDEX, "id": NUMBER, "record": ""}
    ends = {"client": "192.0.2.1", "client_port": 5, "local": "192.0.2.2", "local_port": 6}
    stage.asker.asked.pop(0)[2].then({"n": 1, **session, **ends}, fds)
    for fd in fds:
        os.close(fd)
    assert [(do, fields) for do, fields, _ in stage.asker.asked] == [
        ("close_sessions", {"places": [[INDEX, NUMBER]]}),
        ("adopt_session", {}),
    ]
    stage.asker.answer(carried=[None])
    assert not done
    stage.asker.answer()
    assert done == [True]
    assert len(stage.faults) == 1
    stage.faults.clear()


def test_sessions_are_adopted_also_over_the_death_of_a_keeper(stage: Stage) -> None:
    done: list[bool] = []
    stage.sessions.adopt(lambda _orphan: None, lambda: done.append(True))
    for _ in range(3):
        stage.asker.lose()
        assert stage.asker.take() == ("adopt_session", {})
    stage.asker.answer()
    assert done == [True]

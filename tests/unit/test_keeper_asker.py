"""A worker's requests to the splice keeper, which the test plays itself: nobody waits for any.

Each is heard of once: answered, or lost, when a keeper has died over it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyforwarder.datapath.splice.keeper_asker import (
    MOST_HELD,
    MOST_UNDER_WAY,
    Answered,
    KeeperAsker,
)
from pyforwarder.runtime.loop import Loop

# Longer than a test may take: what waits for it is ended with its test.
FOR_EVER_S: Final = 3600.0


class Play:
    """A worker's asker, and the keeper's end of its socket."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.ours, self.keeper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.keeper.setblocking(False)
        self.asker = KeeperAsker(self.loop, self.ours)
        self.heard: list[tuple[object, dict[str, Any] | None]] = []
        self.faults: list[Exception] = []
        self.loop.on_error = lambda _owner, error: self.faults.append(error)

    def then(self, name: object) -> Answered:
        return lambda answer, _fds: self.heard.append((name, answer))

    def ask(self, name: object, fds: tuple[int, ...] = ()) -> bool:
        return self.asker.ask("leave", self.then(name), fds, name=name)

    def read(self) -> tuple[dict[str, Any], list[int]] | None:
        """The keeper reads one; None: there is none."""
        try:
            data, fds, _, _ = socket.recv_fds(self.keeper, 8192, 4)
        except BlockingIOError:
            return None
        return json.loads(data), fds

    def answer(self, request: dict[str, Any], **words: object) -> None:
        self.keeper.send(json.dumps({"n": request["n"], **words}).encode())

    def obey(self) -> list[object]:
        """The keeper does all that it has been asked; the names of it."""
        names: list[object] = []
        while (got := self.read()) is not None:
            request, fds = got
            for fd in fds:
                os.close(fd)
            self.answer(request, done=True)
            names.append(request.get("name", request["do"]))
            self.turn()
        return names

    def turn(self) -> None:
        self.loop.run_once(0)

    def pass_time(self, seconds: float) -> None:
        """All that is under way is so much older, and so are the timers."""
        for asked in self.asker._under_way.values():
            asked.sent_s -= seconds
        timers = self.loop._timers
        for number, (due_s, call) in list(timers.items()):
            timers[number] = due_s - seconds, call
        self.loop._timers_from_s -= seconds
        self.turn()

    def close(self) -> None:
        self.asker.close()
        self.keeper.close()
        self.ours.close()
        self.loop.dispose()


@pytest.fixture
def play() -> Iterator[Play]:
    made = Play()
    yield made
    made.close()
    assert made.faults == []


def names(play: Play) -> list[object]:
    return [name for name, _ in play.heard]


def lost(play: Play) -> list[object]:
    return [name for name, answer in play.heard if answer is None]


def test_answers_are_heard_in_the_order_in_which_was_asked(play: Play) -> None:
    for name in range(5):
        assert play.ask(name)
    assert play.heard == []
    assert play.asker.unsettled == 5
    assert play.obey() == list(range(5))
    assert names(play) == list(range(5))
    assert lost(play) == []
    assert play.asker.unsettled == 0


def test_an_answer_tells_of_what_was_asked_before_that_it_is_lost(play: Play) -> None:
    for name in range(4):
        play.ask(name)
    for _ in range(2):
        assert play.read() is not None  # by a keeper that dies over the second
    assert play.obey() == [2, 3]  # by the one in its place
    assert names(play) == [0, 1, 2, 3]
    assert lost(play) == [0, 1]


def test_one_more_request_finds_out_that_the_last_one_is_lost(play: Play) -> None:
    play.ask("last")
    assert play.read() is not None
    play.pass_time(0.5)
    assert play.read() is None  # it may be busy
    play.pass_time(1.0)
    play.pass_time(1.0)  # and is asked once
    assert play.heard == []
    assert play.obey() == ["here"]
    assert play.heard == [("last", None)]
    play.pass_time(5.0)
    assert play.read() is None


def test_that_request_may_be_lost_itself(play: Play) -> None:
    play.ask("last")
    assert play.read() is not None
    for _ in range(3):
        play.pass_time(1.0)
        assert play.heard == []
        assert play.read() is not None  # by a keeper that dies over it
    play.pass_time(1.0)
    assert play.obey() == ["here"]
    assert play.heard == [("last", None)]


def test_a_keeper_that_hangs_loses_nothing_however_long(play: Play) -> None:
    for name in range(3):
        play.ask(name)
    for _ in range(10):
        play.pass_time(60.0)
    assert play.heard == []
    assert play.obey() == [0, 1, 2]
    assert names(play) == [0, 1, 2]
    assert lost(play) == []


def test_a_late_answer_of_a_keeper_that_had_hung_counts(play: Play) -> None:
    """It was asked whether it is there meanwhile, and says so behind it."""
    play.ask("slow")
    got = play.read()
    assert got is not None
    for _ in range(3):
        play.pass_time(5.0)
    play.answer(got[0], done=True)
    play.obey()
    assert lost(play) == []
    assert names(play) == ["slow"]


def test_nothing_waits_for_a_keeper_that_reads_nothing(play: Play) -> None:
    # One that waits for the keeper does so for a quarter of a second, all of them longer than a
    # test may take.
    for name in range(2_000):
        assert play.ask(name)
    assert len(play.asker._under_way) == MOST_UNDER_WAY
    assert play.obey() == list(range(2_000))
    assert names(play) == list(range(2_000))


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_sockets_of_what_waits_are_held_until_it_is_sent(play: Play) -> None:
    """The worker closes its own at once."""
    before = count_fds()
    taken = 0
    for name in range(MOST_UNDER_WAY + MOST_HELD + 5):
        pipe = os.pipe()
        os.write(pipe[1], str(name).encode())
        taken += play.ask(name, pipe)
        for fd in pipe:
            os.close(fd)
    assert taken == MOST_UNDER_WAY + MOST_HELD  # those that are too many are not asked
    assert count_fds() == before + 2 * MOST_HELD
    assert play.ask("without")  # there is room for one without descriptors
    got = []
    while (one := play.read()) is not None:
        request, fds = one
        if fds:
            assert os.read(fds[0], 10) == str(request["name"]).encode()
        for fd in fds:
            os.close(fd)
        got.append(request["name"])
        play.answer(request)
        play.turn()
    assert got == [*range(taken), "without"]
    assert count_fds() == before


def test_what_is_asked_at_once_passes_what_waits_or_is_not_asked_at_all(play: Play) -> None:
    for name in range(MOST_UNDER_WAY + 10):
        play.ask(name)
    asked = play.asker.ask_now("join", [], name="join")
    assert asked is not None
    asked.then = play.then("join")
    while play.asker.ask_now("join", [], name="more") is not None:
        assert len(play.asker._under_way) < 2 * MOST_UNDER_WAY
    order = play.obey()
    assert order.index("join") == MOST_UNDER_WAY
    assert order[-1] == MOST_UNDER_WAY + 9
    assert "join" in names(play)


def test_a_keeper_that_has_not_read_what_was_given_up_is_asked_nothing_at_once(play: Play) -> None:
    asked = play.asker.ask_now("join")
    assert asked is not None
    asked.then = play.then("join")
    play.asker.give_up(asked)
    assert play.asker.ask_now("join") is None
    assert play.ask("leave")  # that must be heard of, some time
    assert play.obey() == ["join", "leave"]
    assert names(play) == ["leave"]  # nobody wants to know of the other
    assert play.asker.ask_now("join") is not None


def test_what_was_read_too_late_says_so(play: Play) -> None:
    asked = play.asker.ask_now("join")
    assert asked is not None
    asked.then = play.then("join")
    got = play.read()
    assert got is not None
    assert got[0]["until"] < time.monotonic() + 5.0
    play.answer(got[0], late=True)
    play.turn()
    assert play.heard == [("join", {"n": got[0]["n"], "late": True})]
    play.ask("leave")
    got = play.read()
    assert got is not None
    assert got[0]["until"] > time.monotonic() + 1e6  # never too late


def test_answers_to_another_worker_s_questions_are_nobody_s(play: Play) -> None:
    play.ask("mine")
    read_fd, write_fd = os.pipe()
    before = count_fds()
    socket.send_fds(play.keeper, [b'{"n": 5, "index": 3}'], [read_fd])
    play.turn()
    assert play.heard == []
    assert count_fds() == before
    os.close(read_fd)
    os.close(write_fd)
    assert play.obey() == ["mine"]
    play.keeper.send(b'{"n": 6}')  # nobody reads what nobody has asked
    play.turn()
    assert play.ours.recv(100) == b'{"n": 6}'


def test_descriptors_of_an_answer_are_closed_but_those_that_are_taken(play: Play) -> None:
    taken: list[int] = []
    play.asker.ask("adopt", lambda _, fds: taken.append(fds.pop(0)))
    got = play.read()
    assert got is not None
    read_fd, write_fd = os.pipe()
    before = count_fds()
    data = json.dumps({"n": got[0]["n"]}).encode()
    socket.send_fds(play.keeper, [data], [read_fd, write_fd])
    play.turn()
    assert count_fds() == before + 1
    assert not os.get_inheritable(taken[0])
    for fd in (read_fd, write_fd, *taken):
        os.close(fd)


def test_a_fault_over_an_answer_costs_no_other(play: Play) -> None:
    def fails(_answer: dict[str, Any] | None, _fds: list[int]) -> None:
        raise RuntimeError("ours")

    play.asker.ask("leave", fails)
    play.ask("next")
    play.obey()
    assert names(play) == ["next"]
    assert [str(error) for error in play.faults] == ["ours"]
    play.faults.clear()


def test_what_is_asked_over_an_answer_comes_behind_what_waits(play: Play) -> None:
    def again(_answer: dict[str, Any] | None, _fds: list[int]) -> None:
        play.ask("again")

    play.asker.ask("leave", again, name="first")
    for name in range(MOST_UNDER_WAY + 5):
        play.ask(name)
    assert play.obey() == ["first", *range(MOST_UNDER_WAY + 5), "again"]


def test_without_a_keeper_for_ever_all_is_lost_and_nothing_waits(play: Play) -> None:
    for name in range(MOST_UNDER_WAY + 5):
        play.ask(name)
    play.keeper.close()
    play.turn()
    assert lost(play) == list(range(MOST_UNDER_WAY + 5))
    assert play.asker.is_over
    assert not play.ask("more")
    assert play.asker.ask_now("join") is None
    assert play.asker.unsettled == 0
    assert play.asker.finish(5.0)
    assert not play.asker.wait_until(lambda: False, FOR_EVER_S)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS])
def test_what_cannot_be_sent_just_now_is_sent_later(
    play: Play, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Nothing of ours is under way whose answer could say that there is room again."""
    before = count_fds()

    def refuses(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(socket, "send_fds", refuses)
        with open(os.devnull) as file:
            assert play.ask("held", (file.fileno(), file.fileno()))
        assert play.asker.ask_now("mute") is None
        play.pass_time(1.0)
        assert play.heard == []
    play.pass_time(1.0)
    assert play.obey() == ["held"]
    assert count_fds() == before


def test_what_can_never_be_sent_is_lost_and_holds_nothing_up(play: Play) -> None:
    assert not play.ask("never", (-1, -1))
    for name in range(MOST_UNDER_WAY):
        play.ask(name)
    assert not play.ask("never", (-1, -1))
    play.asker.ask("leave", play.then("too long"), name="x" * (1 << 20))
    play.ask("next")
    assert play.obey() == [*range(MOST_UNDER_WAY), "next"]
    assert lost(play) == ["too long"]


def test_a_request_without_room_is_called_when_there_may_be_room(play: Play) -> None:
    pipe = os.pipe()
    name = 0
    while play.ask(name, pipe):
        name += 1
    assert play.asker.lacks_room
    assert name == MOST_UNDER_WAY + MOST_HELD
    told: list[int] = []

    def action() -> bool:
        if len(told) < 5 and play.ask(name + len(told), pipe):
            told.append(name)
        return len(told) < 5

    play.asker.when_there_is_room(action)
    play.turn()
    assert told == []
    assert play.obey() == list(range(name + 5))
    assert len(told) == 5
    assert play.asker.finish(1.0)
    for fd in pipe:
        os.close(fd)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_room_for_a_descriptor_may_come_without_an_answer(
    play: Play, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with open(os.devnull) as file, monkeypatch.context() as patched:
        patched.setattr(socket, "send_fds", lambda *_: refuses_now())
        patched.setattr(os, "dup", refuses)
        assert not play.ask("held", (file.fileno(),))
        assert play.asker.lacks_room
        calls: list[bool] = []

        def action() -> bool:
            calls.append(True)
            return True

        play.asker.when_there_is_room(action)
        for number in range(1, 4):
            play.pass_time(1.0)
            assert len(calls) == number


def refuses_now() -> None:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_a_request_that_waits_for_room_is_called_when_there_never_will_be(play: Play) -> None:
    calls: list[bool] = []

    def action() -> bool:
        calls.append(play.asker.is_over)
        return True

    play.asker.when_there_is_room(action)
    play.ask("one")
    play.keeper.close()
    play.turn()
    assert calls[-1]
    count = len(calls)
    play.pass_time(5.0)
    assert len(calls) == count


def test_a_worker_that_ends_waits_as_long_as_answers_come(play: Play) -> None:
    """And until a last moment."""

    def answer_one(_answer: object, _fds: object) -> None:
        got = play.read()
        if got is not None:
            play.answer(got[0], done=True)

    for _ in range(20):
        play.asker.ask("leave", answer_one)
    assert not play.asker.finish_while_heard(0.05, FOR_EVER_S)
    answer_one(None, [])
    assert play.asker.finish_while_heard(FOR_EVER_S, FOR_EVER_S)  # each brings the next one
    play.ask("never")
    assert not play.asker.finish_while_heard(FOR_EVER_S, 0.05)


def test_finish_waits_for_the_last_answer_and_no_longer(play: Play) -> None:
    play.ask("one")
    assert not play.asker.finish(0.05)
    play.obey()
    assert play.asker.finish(60.0)


class Talk(RuleBasedStateMachine):
    """Any order of questions, answers, deaths of the keeper and time that passes."""

    @initialize()
    def begin(self) -> None:
        self.play = Play()
        self.next = 0
        self.accepted: list[int] = []
        self.given_up: set[int] = set()
        self.reading: deque[dict[str, Any]] = deque()  # read by the keeper, not answered
        self.answered: set[int] = set()
        self.died_over: set[int] = set()
        self.seen: list[object] = []
        self.fds_before = count_fds()

    def _new(self) -> int:
        self.next += 1
        return self.next

    @rule(sockets=st.booleans(), count=st.integers(1, 40))
    def ask(self, sockets: bool, count: int) -> None:
        for _ in range(count):
            name = self._new()
            pipe = os.pipe() if sockets else ()
            if self.play.ask(name, pipe):
                self.accepted.append(name)
            for fd in pipe:
                os.close(fd)

    @rule()
    def ask_now(self) -> None:
        name = self._new()
        asked = self.play.asker.ask_now("join", (), name=name)
        if asked is not None:
            asked.then = self.play.then(name)
            self.accepted.append(name)

    @rule(count=st.integers(1, 50))
    def read(self, count: int) -> None:
        for _ in range(count):
            got = self.play.read()
            if got is None:
                return
            for fd in got[1]:
                os.close(fd)
            self.reading.append(got[0])
            if "name" in got[0]:
                self.seen.append(got[0]["name"])

    @precondition(lambda self: self.reading)
    @rule(count=st.integers(1, 50))
    def answer(self, count: int) -> None:
        for _ in range(min(count, len(self.reading))):
            request = self.reading.popleft()
            self.answered.add(request.get("name", 0))
            self.play.answer(request, done=True)

    @rule()
    def die(self) -> None:
        self.died_over |= {request.get("name", 0) for request in self.reading}
        self.reading.clear()

    @rule(seconds=st.sampled_from([0.1, 1.5, 60.0]))
    def pass_time(self, seconds: float) -> None:
        self.play.pass_time(seconds)

    @invariant()
    def each_is_heard_of_once_and_rightly(self) -> None:
        if not hasattr(self, "play"):
            return
        heard = self.play.heard
        assert len({name for name, _ in heard}) == len(heard)
        for name, answer in heard:
            assert name in (self.answered if answer is not None else self.died_over)
        assert len(self.play.asker._under_way) <= 2 * MOST_UNDER_WAY
        assert self.play.asker._held <= MOST_HELD

    def teardown(self) -> None:
        if not hasattr(self, "play"):
            return
        play = self.play
        try:
            self.die()
            for _ in range(10):  # another keeper, which does its work
                play.obey()
                play.pass_time(2.0)
            assert sorted(map(str, names(play))) == sorted(map(str, self.accepted))
            assert set(lost(play)) == self.died_over - {0}
            assert play.asker.unsettled == 0
            assert play.asker._held == 0
            assert count_fds() == self.fds_before
        finally:
            play.close()


TestTalk = Talk.TestCase


def test_the_order_of_what_is_told_is_kept(play: Play) -> None:
    """Also where some of it waits: `leave` comes behind all that was said of that pair before."""
    told = []
    for name in range(3 * MOST_UNDER_WAY):
        if name % 7 == 3:
            play.asker.ask_now("mute", (), name="mute")
        play.ask(name)
        told.append(name)
        if name % 50 == 49:
            told_so_far = [one for one in play.obey() if one != "mute"]
            assert told_so_far == told
            told.clear()
    assert [one for one in play.obey() if one not in ("mute", "here")] == told

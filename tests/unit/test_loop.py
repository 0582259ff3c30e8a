"""The event loop: what is called, when, and how a connection is kept from another's events."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyforwarder.runtime import loop as loop_module
from pyforwarder.runtime.loop import EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, Deadlines, Loop, Timed
from tests.helpers.clock import Clock


class Call(Timed):
    """A deadline that tells a list."""

    __slots__ = ("_action", "_calls", "name")

    def __init__(self, name: str, calls: list[str], action: Callable[[], None] | None = None):
        super().__init__()
        self.name = name
        self._action = action or (lambda: None)
        self._calls = calls

    def expired(self) -> None:
        self._calls.append(self.name)
        self._action()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.dispose()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of every loop: it goes on when the test says so."""
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", clock)
    return clock


@pytest.fixture
def event_fds() -> Iterator[Callable[[], int]]:
    """Makes descriptors that are readable from the start."""
    with contextlib.ExitStack() as stack:

        def make() -> int:
            fd = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(close_if_open, fd)
            return fd

        yield make


def close_if_open(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


MakeFd = Callable[[], int]

# Descriptors


def test_callback_gets_owner_descriptor_and_events(loop: Loop, event_fds: MakeFd) -> None:
    fd, owner, seen = event_fds(), object(), []
    loop.watch(fd, EPOLLIN | EPOLLET, lambda *args: seen.append(args), owner)
    loop.run_once(0)
    assert seen == [(owner, fd, EPOLLIN)]


def test_edge_is_reported_once_and_a_level_again(loop: Loop, event_fds: MakeFd) -> None:
    edge, level, seen = event_fds(), event_fds(), []
    loop.watch(edge, EPOLLIN | EPOLLET, lambda _o, fd, _m: seen.append(fd), None)
    loop.watch(level, EPOLLIN, lambda _o, fd, _m: seen.append(fd), None)
    loop.run_once(0)
    assert sorted(seen) == sorted([edge, level])
    loop.run_once(0)
    assert seen[2:] == [level]


def test_change_reports_an_edge_that_is_already_there(loop: Loop, event_fds: MakeFd) -> None:
    # What the datapaths rely on when they wait for room: the room may be there already.
    fd, seen = event_fds(), []
    loop.watch(fd, EPOLLIN | EPOLLET, lambda _o, _fd, mask: seen.append(mask), None)
    loop.run_once(0)
    loop.run_once(0)
    assert seen == [EPOLLIN]
    loop.change(fd, EPOLLIN | EPOLLOUT | EPOLLET)
    loop.run_once(0)
    assert seen == [EPOLLIN, EPOLLIN | EPOLLOUT]


def test_redirected_descriptor_calls_the_new_callback(loop: Loop, event_fds: MakeFd) -> None:
    fd, seen = event_fds(), []
    loop.watch(fd, EPOLLIN, lambda *_: seen.append("old"), None)
    loop.redirect(fd, lambda *_: seen.append("new"))
    loop.run_once(0)
    assert seen == ["new"]


def test_forgotten_descriptor_gets_no_event_of_the_running_batch(
    loop: Loop, event_fds: MakeFd
) -> None:
    fds, seen = [event_fds() for _ in range(3)], []

    def first_come(_owner: object, fd: int, _mask: int) -> None:
        seen.append(fd)
        for other in fds:
            if other != fd:
                loop.forget(other)

    for fd in fds:
        loop.watch(fd, EPOLLIN, first_come, None)
    loop.run_once(0)
    loop.run_once(0)
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_closed_descriptor_stays_open_until_the_batch_is_over(
    loop: Loop, event_fds: MakeFd
) -> None:
    # Its number must not be given to a new connection while events of the old one are due.
    victim, others = event_fds(), [event_fds() for _ in range(5)]
    opened: list[int] = []

    def close_victim(_owner: object, _fd: int, _mask: int) -> None:
        if not opened:
            loop.close(victim)
        assert is_open(victim)
        opened.append(event_fds())

    loop.watch(victim, EPOLLIN, lambda *_: close_victim(None, 0, 0), None)
    for fd in others:
        loop.watch(fd, EPOLLIN, close_victim, None)
    loop.run_once(0)
    assert victim not in opened
    assert not is_open(victim)


def test_deadline_behind_one_that_was_stopped_is_not_missed(loop: Loop, clock: Clock) -> None:
    calls: list[str] = []
    early, late = Call("early", calls), Call("late", calls)
    for item, length_s in ((late, 0.75), (early, 0.25)):
        loop.deadlines.start(item, length_s, clock.now_s)
    loop.deadlines.stop(early)
    for wait_s in (0.25, 0.5):
        assert calls == []
        assert loop._timeout_s() == pytest.approx(wait_s)
        clock.pass_time(wait_s)
        loop.run_once(0)
    assert calls == ["late"]
    assert loop.deadlines.soonest_s == math.inf


def test_closed_socket_stays_open_until_the_batch_is_over(loop: Loop, event_fds: MakeFd) -> None:
    sock = socket.socket()
    with sock:
        fd = sock.fileno()
        loop.close_socket(fd, sock)
        loop.watch(trigger := event_fds(), EPOLLIN, lambda *_: seen.append(is_open(fd)), None)
        seen: list[bool] = []
        assert trigger != fd
        loop.run_once(0)
        assert seen == [True]
        assert sock.fileno() == -1
        assert not is_open(fd)


def test_descriptor_that_reuses_a_number_gets_only_its_own_events(
    loop: Loop, event_fds: MakeFd
) -> None:
    old, seen = event_fds(), []
    loop.watch(old, EPOLLIN, lambda *_: seen.append("old"), None)
    loop.close(old)
    loop.run_once(0)
    read_fd, write_fd = os.pipe()
    try:
        new = os.dup2(read_fd, old)
        loop.watch(new, EPOLLIN, lambda *_: seen.append("new"), None)
        loop.run_once(0)
        assert seen == []
        os.write(write_fd, b"x")
        loop.run_once(0)
        assert seen == ["new"]
        loop.forget(new)
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_descriptors_of_any_number_are_watched(loop: Loop, event_fds: MakeFd) -> None:
    fd, seen = event_fds(), []
    high = os.dup2(fd, 1000)
    try:
        loop.watch(high, EPOLLIN, lambda _o, fd, _m: seen.append(fd), None)
        loop.run_once(0)
        assert seen == [1000]
        loop.forget(high)
    finally:
        os.close(high)


# Work put off


def test_soon_calls_once_more_with_mask_0(loop: Loop, event_fds: MakeFd) -> None:
    fd, owner, seen = event_fds(), object(), []

    def serve(who: object, _fd: int, mask: int) -> None:
        seen.append((who, mask))
        if mask:
            loop.soon(owner, fd)

    loop.watch(fd, EPOLLIN | EPOLLET, serve, owner)
    loop.run_once(0)
    assert seen == [(owner, EPOLLIN), (owner, 0)]
    loop.run_once(0)
    assert len(seen) == 2


def test_soon_reaches_nobody_once_the_descriptor_has_another_owner(
    loop: Loop, event_fds: MakeFd
) -> None:
    fd, seen = event_fds(), []
    loop.watch(fd, 0, lambda owner, _fd, _mask: seen.append(owner), "first")
    loop.soon("first", fd)
    loop.forget(fd)
    loop.watch(fd, 0, lambda owner, _fd, _mask: seen.append(owner), "second")
    loop.run_once(0)
    assert seen == []


def test_soon_after_close_reaches_nobody(loop: Loop, event_fds: MakeFd) -> None:
    fd, seen = event_fds(), []
    loop.watch(fd, 0, lambda owner, _fd, _mask: seen.append(owner), "owner")
    loop.soon("owner", fd)
    loop.close(fd)
    loop.run_once(0)
    assert seen == []


def test_work_that_puts_itself_off_again_lets_the_others_have_a_turn(
    loop: Loop, event_fds: MakeFd
) -> None:
    busy, other, turns = event_fds(), event_fds(), []

    def again(owner: object, fd: int, _mask: int) -> None:
        turns.append("busy")
        loop.soon(owner, fd)

    loop.watch(busy, 0, again, "busy")
    loop.watch(other, EPOLLIN, lambda *_: turns.append("other"), "other")
    loop.soon("busy", busy)
    for _ in range(3):
        loop.run_once(0)
    assert turns == ["other", "busy"] * 3


def test_deferred_action_runs_after_the_batch(loop: Loop, event_fds: MakeFd) -> None:
    seen = []

    def serve(owner: str, _fd: int, _mask: int) -> None:
        loop.defer(lambda who: seen.append(f"deferred by {who}"), owner)
        seen.append(owner)

    for name in ("a", "b"):
        loop.watch(event_fds(), EPOLLIN | EPOLLET, serve, name)
    loop.run_once(0)
    assert sorted(seen[:2]) == ["a", "b"]
    assert sorted(seen[2:]) == ["deferred by a", "deferred by b"]


def test_put_off_work_keeps_the_loop_from_waiting(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_LONGEST_WAIT_S", 3600.0)  # of an empty loop

    def stop(_owner: object) -> None:
        loop.stop()

    loop.defer(lambda _: loop.defer(stop, None), None)
    loop.run()


def test_timer_runs_once_and_not_before_its_time(loop: Loop, clock: Clock) -> None:
    ran_s: list[float] = []
    began_s = clock.now_s
    loop.after(3.0, lambda: ran_s.append(clock.now_s - began_s))
    for _ in range(8):
        loop.run_once(0)
        clock.pass_time(1.0)
    assert ran_s == [pytest.approx(3.0)]


def test_cancelled_timer_does_not_run(loop: Loop) -> None:
    ran: list[str] = []
    number = loop.after(0.0, lambda: ran.append("cancelled"))
    loop.after(0.001, loop.stop)
    loop.cancel(number)
    loop.run()
    loop.cancel(number)
    assert ran == []


def test_timer_cancelled_by_another_of_the_same_moment_does_not_run(loop: Loop) -> None:
    ran: list[str] = []
    numbers: list[int] = []

    def first() -> None:
        ran.append("first")
        loop.cancel(numbers[1])

    numbers.append(loop.after(0.0, first))
    numbers.append(loop.after(0.0, lambda: ran.append("second")))
    select.select([], [], [], 0.001)
    loop.run_once(0)
    loop.run_once(0)
    assert ran == ["first"]


# Sums of tenths of a second and a host's uptime are rounded, and may be less than they should be.
_ROUNDING_S: Final = 1e-6


def test_the_loop_waits_for_the_soonest_timer_that_is_left(loop: Loop, clock: Clock) -> None:
    ran: list[str] = []
    soonest = loop.after(0.2, lambda: ran.append("cancelled"))
    loop.after(0.5, lambda: ran.append("second"))

    def first() -> None:
        ran.append("first")
        loop.after(0.3, lambda: ran.append("third"))

    loop.after(0.4, first)
    assert loop._timeout_s() == pytest.approx(0.2)
    loop.cancel(soonest)
    clock.pass_time(0.2)
    loop.run_once(0)  # it may look in vain, once
    assert loop._timeout_s() == pytest.approx(0.2)
    for wait_s in (0.1, 0.2):
        clock.pass_time(loop._timeout_s() + _ROUNDING_S)
        loop.run_once(0)
        assert loop._timeout_s() == pytest.approx(wait_s, abs=1e-3)
    clock.pass_time(0.2 + _ROUNDING_S)
    loop.run_once(0)
    assert ran == ["first", "second", "third"]
    assert loop._timeout_s() == 1.0  # none is left


# Faults of ours


def test_exception_of_a_callback_goes_to_on_error_with_its_owner(
    loop: Loop, event_fds: MakeFd
) -> None:
    errors, seen = [], []
    loop.on_error = lambda owner, error: errors.append((owner, str(error)))

    def fail(owner: str, _fd: int, mask: int) -> None:
        raise ValueError(f"{owner} {mask}")

    bad, good = event_fds(), event_fds()
    loop.watch(bad, EPOLLIN | EPOLLET, fail, "bad")
    loop.watch(good, EPOLLIN | EPOLLET, lambda *_: seen.append("good"), "good")
    loop.soon("bad", bad)
    loop.defer(lambda owner: fail(owner, 0, 7), "deferred")
    loop.deadlines.start(Call("late", [], lambda: fail("deadline", 0, 9)), 0.0, 0.0)
    loop.run_once(0)
    assert seen == ["good"]
    assert [text for _, text in errors] == ["bad 1", "bad 0", "deferred 7", "deadline 9"]
    assert [owner for owner, _ in errors[:3]] == ["bad", "bad", "deferred"]


def test_exception_of_a_timer_goes_to_on_error_and_the_next_one_runs(loop: Loop) -> None:
    errors, ran = [], []
    loop.on_error = lambda owner, error: errors.append((owner, str(error)))

    def fail() -> None:
        raise ValueError("late")

    loop.after(0.0, fail)
    loop.after(0.0, lambda: ran.append("next"))
    select.select([], [], [], 0.001)
    loop.run_once(0)
    assert errors == [(fail, "late")]
    assert ran == ["next"]


def test_exception_without_on_error_leaves_the_loop(loop: Loop, event_fds: MakeFd) -> None:
    def fail(*_: object) -> None:
        raise ValueError("not mine")

    loop.watch(event_fds(), EPOLLIN, fail, None)
    with pytest.raises(ValueError, match="not mine"):
        loop.run()


def test_hang_up_is_reported_without_being_asked_for(loop: Loop) -> None:
    read_fd, write_fd = os.pipe()
    seen: list[int] = []
    try:
        loop.watch(read_fd, EPOLLET, lambda _o, _fd, mask: seen.append(mask), None)
        os.close(write_fd)
        loop.run_once(0)
        assert seen == [EPOLLHUP]
        loop.forget(read_fd)
    finally:
        os.close(read_fd)


# Deadlines


def expire(deadlines: Deadlines, now_s: float) -> None:
    def fail(_item: object, error: Exception) -> None:
        raise error

    deadlines.run_expired(now_s, fail)


def test_deadline_passes_at_its_time_and_once() -> None:
    deadlines, calls = Deadlines(), list[str]()
    deadlines.start(Call("a", calls), 5.0, 100.0)
    expire(deadlines, 104.999)
    assert calls == []
    expire(deadlines, 105.0)
    expire(deadlines, 106.0)
    assert calls == ["a"]


def test_deadline_started_again_replaces_the_one_before() -> None:
    deadlines, calls = Deadlines(), list[str]()
    item = Call("a", calls)
    deadlines.start(item, 5.0, 100.0)
    deadlines.start(item, 50.0, 101.0)
    assert deadlines.next_s() == 151.0
    expire(deadlines, 150.0)
    assert calls == []
    deadlines.start(item, 5.0, 150.0)
    expire(deadlines, 155.0)
    assert calls == ["a"]


def test_stopped_deadline_does_not_pass() -> None:
    deadlines, calls = Deadlines(), list[str]()
    item = Call("a", calls)
    deadlines.stop(item)
    deadlines.start(item, 5.0, 100.0)
    deadlines.stop(item)
    deadlines.stop(item)
    expire(deadlines, 200.0)
    assert calls == []
    assert deadlines.next_s() is None


def test_next_deadline_is_the_earliest_of_all_lengths() -> None:
    deadlines, calls = Deadlines(), list[str]()
    deadlines.start(Call("long", calls), 60.0, 100.0)
    deadlines.start(Call("short", calls), 5.0, 102.0)
    deadlines.start(Call("short and later", calls), 5.0, 103.0)
    assert deadlines.next_s() == 107.0
    expire(deadlines, 107.0)
    assert calls == ["short"]
    assert deadlines.next_s() == 108.0
    expire(deadlines, 160.0)
    assert deadlines.next_s() is None


def test_deadline_stopped_by_another_that_passes_with_it_does_not_pass() -> None:
    # A pair's idle deadline ends the pair while the retry timer of its datapath is due as well.
    deadlines, calls = Deadlines(), list[str]()
    second = Call("second", calls)
    first = Call("first", calls, lambda: deadlines.stop(second))
    deadlines.start(first, 5.0, 100.0)
    deadlines.start(second, 1.0, 104.0)
    third = Call("third", calls)
    deadlines.start(third, 5.0, 100.0)
    expire(deadlines, 105.0)
    assert calls == ["first", "third"]


def test_deadline_started_again_by_another_that_passes_with_it_waits_anew() -> None:
    deadlines, calls = Deadlines(), list[str]()
    second = Call("second", calls)
    first = Call("first", calls, lambda: deadlines.start(second, 5.0, 105.0))
    deadlines.start(first, 5.0, 100.0)
    deadlines.start(second, 5.0, 100.0)
    expire(deadlines, 105.0)
    assert calls == ["first"]
    expire(deadlines, 110.0)
    assert calls == ["first", "second"]


def test_deadline_that_starts_itself_again_passes_once_per_turn() -> None:
    deadlines, calls = Deadlines(), list[str]()
    item = Call("a", calls, lambda: deadlines.start(item, 0.0, 100.0))
    deadlines.start(item, 0.0, 100.0)
    expire(deadlines, 100.0)
    assert calls == ["a"]


def test_loop_wakes_for_a_deadline(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "_LONGEST_WAIT_S", 3600.0)  # without one
    calls: list[str] = []
    started_s = time.monotonic()
    loop.deadlines.start(Call("a", calls, loop.stop), 0.03, started_s)
    loop.run()
    assert calls == ["a"]
    assert time.monotonic() - started_s >= 0.03


class DeadlinesModel(RuleBasedStateMachine):
    """Deadlines started, stopped and passing in any order, against a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.deadlines = Deadlines()
        self.calls: list[str] = []
        self.items = [Call(str(n), self.calls) for n in range(7)]
        self.model: dict[str, float] = {}
        self.now_s = 1000.0

    @rule(n=st.integers(0, 6), length_s=st.sampled_from((0.5, 1.0, 3.0, 10.0)))
    def start(self, n: int, length_s: float) -> None:
        self.deadlines.start(self.items[n], length_s, self.now_s)
        self.model[str(n)] = self.now_s + length_s

    @rule(n=st.integers(0, 6))
    def stop(self, n: int) -> None:
        self.deadlines.stop(self.items[n])
        self.model.pop(str(n), None)

    @rule(by_s=st.sampled_from((0.25, 1.0, 2.5)))
    def time_passes(self, by_s: float) -> None:
        self.now_s += by_s
        self.calls.clear()
        expire(self.deadlines, self.now_s)
        due = {name for name, at_s in self.model.items() if at_s <= self.now_s}
        assert sorted(self.calls) == sorted(due)
        for name in due:
            del self.model[name]

    @invariant()
    def next_is_the_earliest(self) -> None:
        assert self.deadlines.next_s() == min(self.model.values(), default=None)


TestDeadlinesModel = DeadlinesModel.TestCase

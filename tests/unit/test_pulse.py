"""A process that hangs is told from one that works, and from one that gets no processor."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from pyforwarder.runtime import pulse
from pyforwarder.runtime.pulse import Activity, Pulse, PulseWatch, activity
from tests.helpers.waiting import wait_for


class Child:
    """What is watched, with a clock and a kernel of this test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pulse = Pulse()
        self.watch = PulseWatch(self.pulse, 1)
        self.now_s = 1000.0
        self.state, self.busy_s = "S", 5.0
        monkeypatch.setattr(pulse, "activity", lambda _pid: Activity(self.state, self.busy_s))

    def looks(self, count: int, *, busy_each_s: float = 0.0) -> list[str]:
        said = []
        for _ in range(count):
            self.now_s += pulse.PULSE_S
            self.busy_s += busy_each_s
            said.append(self.watch.why_stuck(self.now_s))
        return said


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    child = Child(monkeypatch)
    child.pulse.beat()
    assert child.looks(1) == [""]
    yield child
    child.pulse.close()


def test_stopped_process_hangs_after_three_looks(child: Child) -> None:
    child.state = "T"
    assert child.looks(3) == ["", "", "it is stopped"]


def test_process_that_runs_in_circles_hangs_once_it_has_used_its_time(child: Child) -> None:
    child.state = "R"
    said = child.looks(5, busy_each_s=0.75)
    assert said == ["", "", "", "it is busy with one thing for 2.2 s", said[4]]


def test_process_that_gets_no_processor_does_not_hang(child: Child) -> None:
    child.state = "R"
    assert child.looks(60, busy_each_s=0.02) == [""] * 60


def test_process_that_waits_for_one_thing_hangs_after_a_while(child: Child) -> None:
    said = child.looks(10)
    assert said == [""] * 9 + ["it waits for something for 10 s"]


@pytest.mark.parametrize("state", ["T", "R", "S"])
def test_every_beat_begins_anew(child: Child, state: str) -> None:
    child.state = state
    for _ in range(9):
        assert child.looks(2, busy_each_s=1.5) == ["", ""]
        child.pulse.beat()


def test_process_that_has_not_begun_yet_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch)
    child.state = "T"
    assert child.looks(60) == [""] * 60
    child.pulse.close()


def test_a_caller_that_asks_often_causes_few_looks(child: Child) -> None:
    child.state = "T"
    for _ in range(99):
        assert child.watch.why_stuck(child.now_s + pulse.PULSE_S / 2) == ""
    assert child.looks(3)[-1] == "it is stopped"


def loops() -> None:
    while True:
        pass


def sleeps() -> None:
    signal.pause()


@pytest.mark.parametrize(
    ("act", "number", "state"),
    [(loops, None, "R"), (sleeps, None, "S"), (loops, signal.SIGSTOP, "T")],
)
def test_kernel_says_what_a_process_does(
    act: Callable[[], None], number: int | None, state: str
) -> None:
    pid = os.fork()
    if not pid:
        act()
    try:
        if number is not None:
            os.kill(pid, number)
        wait_for(lambda: (a := activity(pid)) is not None and a.state == state, state)
        before = activity(pid)
        assert before is not None
        if state == "R":
            wait_for(lambda: (a := activity(pid)) is not None and a.busy_s > before.busy_s, "busy")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert activity(pid) is None


def test_the_other_process_sees_the_beats() -> None:
    shared = Pulse()
    pid = os.fork()
    if not pid:
        shared.beat()
        shared.beat()
        os._exit(0)
    os.waitpid(pid, 0)
    assert shared.count == 2
    shared.close()

"""What the supervisor knows of when a fleet's store has answered a process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

from pyforwarder.supervisor.fleet.failover_process import FailoverProcess
from pyforwarder.supervisor.fleet.store_process import StoreProcess
from pyforwarder.supervisor.messages import StoreAnswered

if TYPE_CHECKING:
    import pytest

    from pyforwarder.supervisor.processes.child import Serving


class Process(StoreProcess[StoreAnswered]):
    """One that is never forked."""

    name = part = "health"
    is_wanted = False

    @property
    def _is_wanted(self) -> bool:
        return self.is_wanted

    def _prepare(self, channel: Any) -> Serving:
        raise NotImplementedError

    def _handle(self, said: StoreAnswered) -> None:
        self._note(said)


def test_a_store_that_has_never_answered_is_silent_since_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    log, loop = cast("Any", mock.Mock()), cast("Any", mock.Mock())
    process = Process(loop, log, user=None, close_in_child=lambda: None)
    told: list[object] = []
    process.answered = lambda: told.append(process.exchange())
    assert process.exchange() is None
    process.is_wanted = True
    silent = {"part": "health", "answered_s": 100.0, "unusable": 0}
    assert process.exchange() == silent
    now_s = 110.0
    assert process.exchange() == silent
    process._handle(StoreAnswered(answered_ago_ms=500, unusable=2))
    assert told == [{"part": "health", "answered_s": 109.5, "unusable": 2}]
    process.is_wanted = False
    assert process.exchange() is None
    process.is_wanted, now_s = True, 120.0
    assert process.exchange() == silent | {"answered_s": 120.0}


def test_values_of_no_use_are_a_line_a_minute_and_a_process_that_comes_again_adds_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    log = cast("Any", mock.Mock())
    process = Process(mock.Mock(), log, user=None, close_in_child=lambda: None)
    process.is_wanted = True

    def found(*counts: int) -> int:
        """What is told of all when a process has found so many, one count 5 s after the other."""
        nonlocal now_s
        for unusable in counts:
            process._handle(StoreAnswered(answered_ago_ms=500, unusable=unusable))
            now_s += 5.0
        exchange = process.exchange()
        assert exchange is not None
        unusable = exchange["unusable"]
        assert isinstance(unusable, int)
        return unusable

    def logged() -> list[int]:
        calls = log.write.call_args_list
        values = [call.kwargs.pop("values") for call in calls]
        assert calls == [mock.call("warning", "fleet_values_unusable", part="health")] * len(calls)
        log.write.reset_mock()
        return values

    process.exchange()
    assert (found(0, 2, 5, 5, 6), logged()) == (6, [2])
    process._hang_up()
    assert (found(6), logged()) == (12, [])
    assert (found(*[7] * 12), logged()) == (13, [11])
    assert (found(*[7] * 30), logged()) == (13, [])


def test_a_store_that_never_answers_failover_is_told_of_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    monkeypatch.setattr(FailoverProcess, "start", lambda _: None)
    given: dict[str, Any] = {"user": None, "close_in_child": mock.Mock(), "adopt": mock.Mock()}
    process = FailoverProcess(mock.Mock(), mock.Mock(), splicing=mock.Mock(), **given)
    told: list[object] = []
    process.answered = lambda: told.append(process.exchange())
    process.change_to(cast("Any", SimpleNamespace(failover=object())))
    assert process.exchange() is None
    process.begin()
    assert told == [{"part": "failover", "answered_s": 100.0, "unusable": 0}]

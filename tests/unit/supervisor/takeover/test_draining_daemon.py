"""A daemon that drains gives way to the next one; every other one does not."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pyforwarder.errors import AlreadyRunningError, ControlError, NotRunningError
from pyforwarder.runtime.instance import Instance, InstanceLock, LockWatch, acquire, is_running
from pyforwarder.supervisor.takeover import draining_daemon
from pyforwarder.supervisor.takeover.draining_daemon import find_draining
from tests.helpers.fake_control import make_instance


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return make_instance(tmp_path)


@pytest.fixture
def lock(instance: Instance) -> Iterator[InstanceLock]:
    """A daemon runs."""
    with acquire(instance) as held:
        yield held


class Asked:
    """A running daemon: what it answers, in turn; the last answer again and again."""

    def __init__(self, *answers: object) -> None:
        self._answers = list(answers)
        self.requests: list[str] = []

    def __call__(self, do: str, _fds: Sequence[int]) -> object:
        self.requests.append(do)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_where_nobody_runs_nobody_is_asked(instance: Instance) -> None:
    ask = Asked({"state": "draining"})
    assert find_draining(instance, ask) is None
    assert ask.requests == []


@pytest.mark.parametrize("answer", [{"state": "serving"}, {}, {"state": 5}, [], None])
@pytest.mark.usefixtures("lock")
def test_a_daemon_that_serves_or_is_another_version_keeps_its_place(
    instance: Instance, answer: object
) -> None:
    ask = Asked(answer)
    assert find_draining(instance, ask) is None
    assert ask.requests == ["ping"]


@pytest.mark.usefixtures("lock")
def test_a_daemon_that_is_about_to_drain_is_asked_again(instance: Instance) -> None:
    ask = Asked({"state": "stopping"}, {"state": "stopping"}, {"state": "serving"})
    assert find_draining(instance, ask) is None
    assert ask.requests == ["ping"] * 3


def test_a_daemon_that_ends_is_waited_for(instance: Instance, lock: InstanceLock) -> None:
    def ask(_do: str, _fds: Sequence[int]) -> object:
        lock.remove()
        raise NotRunningError("nobody listens")

    assert find_draining(instance, ask) is None
    assert not is_running(instance)


@pytest.mark.usefixtures("lock")
@pytest.mark.parametrize("key", ["state", "standing"])
def test_a_daemon_that_drains_and_does_not_give_way_says_why(
    instance: Instance, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """By either name that builds of 0.2 have for its state."""
    monkeypatch.setattr(draining_daemon, "_WAIT_S", 0.0)
    ask = Asked({key: "draining"}, ControlError("another upgrade is under way"))
    with pytest.raises(ControlError, match="under way"):
        find_draining(instance, ask)
    assert ask.requests == ["ping", "succeed"]


def test_a_lock_that_is_renewed_is_nobody_elses_at_any_time(
    instance: Instance, lock: InstanceLock
) -> None:
    ours = InstanceLock(instance, os.dup(lock.fileno()))
    with LockWatch(instance) as old:
        ours.renew()
        with pytest.raises(AlreadyRunningError):
            acquire(instance)
        # An `up` that waits for the one that ends waits for it alone.
        assert old.is_held()
        lock.remove()
        assert not old.is_held()
    assert instance.lock_file.exists(), "what the one that ends removes is not its successor's"
    assert is_running(instance)
    assert sorted(path.name for path in instance.run_dir.iterdir()) == ["lock"]
    ours.remove()
    assert not instance.lock_file.exists()


def test_a_lock_that_cannot_be_renewed_is_still_held(
    instance: Instance, lock: InstanceLock
) -> None:
    fd = os.open(instance.run_dir / "lock.new", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        lock.renew()
    os.close(fd)
    assert is_running(instance)
    assert lock.fileno() >= 0

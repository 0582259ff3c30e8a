"""A worker that gives no answer: whether it ends by itself, or is stuck."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final
from unittest import mock

from pyforwarder.errors import ControlError
from pyforwarder.runtime.channel import Channel
from pyforwarder.supervisor.workers import process as process_module
from pyforwarder.supervisor.workers.process import WorkerProcess, ask_all
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    import pytest

EXIT_CODE: Final = 7


@contextlib.contextmanager
def worker(child: Callable[[Channel], None]) -> Iterator[WorkerProcess]:
    """A process that does this with its end of the channel, and then ends."""
    ours, theirs = Channel.pair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        child(theirs)
        os._exit(EXIT_CODE)
    theirs.close()
    process = object.__new__(WorkerProcess)
    process.pid, process.channel, process.exit_code = pid, ours, None
    try:
        yield process
    finally:
        process.kill()
        ours.close()


def closes_and_ends(channel: Channel) -> None:
    channel.close()
    time.sleep(0.2)


def closes_and_stays(channel: Channel) -> None:
    channel.close()
    signal.pause()


def stays(_channel: Channel) -> None:
    signal.pause()


def wait_until_closed(process: WorkerProcess) -> None:
    wait_for(lambda: process_module._is_closed(process.channel), "its channel is closed")


def test_one_that_has_closed_its_channel_is_waited_for() -> None:
    with worker(closes_and_ends) as process:
        wait_until_closed(process)
        assert process.is_ending()
        assert process.exit_code == EXIT_CODE


def test_one_that_stays_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "_ENDS_WITHIN_S", 0.01)
    with worker(closes_and_stays) as process:
        wait_until_closed(process)
        assert not process.is_ending()


def test_one_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "_ENDS_WITHIN_S", 3600.0)
    with worker(stays) as process:
        assert not process.is_ending()


def test_one_that_ends_while_all_are_asked_is_left_out() -> None:
    with worker(closes_and_ends) as process:
        wait_until_closed(process)
        error = ControlError("Connection reset by peer")
        with mock.patch.object(WorkerProcess, "ask", side_effect=error):
            assert ask_all([process], "spliced_left") == []

"""Processes that the supervisor keeps: how soon another one comes in the place of one that died."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pyforwarder.errors import ForwarderError
from pyforwarder.runtime.loop import Loop
from pyforwarder.supervisor.processes.child import ChildProcess, Serving
from pyforwarder.worker.log import Log
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from pyforwarder.runtime.channel import Channel


class Kept(ChildProcess[None]):
    """One that fails as it begins, or waits to be killed."""

    name = "kept"
    fails = True
    prepares: Callable[[], object] = staticmethod(lambda: None)

    @property
    def _is_wanted(self) -> bool:
        return True

    def _prepare(self, channel: Channel) -> Serving:
        del channel
        self.prepares()
        if self.fails:
            raise ForwarderError("a file")
        return Serving(lambda: time.sleep(60))

    def _understand(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        raise AssertionError("it says nothing")

    def _handle(self, said: None) -> None:
        raise AssertionError("it says nothing")

    def dies(self) -> float:
        """Start it and wait for its end; for how long it is not started again then."""
        self.start()
        if not self.fails:
            os.kill(self._pid, signal.SIGKILL)
        wait_for(self.has_died, "it has ended")
        return self.rest_s


@pytest.fixture
def kept(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    del capfd
    monkeypatch.setattr(
        "pyforwarder.supervisor.processes.child._SOON_S", 1e9
    )  # however slow the machine
    loop = Loop()
    kept = Kept(loop, Log(level="info", form="text"), user=None, close_in_child=lambda: None)
    yield kept
    kept.close()
    loop.dispose()


def test_one_that_fails_as_it_begins_comes_again_less_and_less_often(
    kept: Kept, capfd: pytest.CaptureFixture[str]
) -> None:
    assert [kept.dies() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert "kept_failed" in capfd.readouterr().err
    # What has changed may help: at once, and as if it had never failed.
    kept.renew()
    wait_for(kept.has_died, "it has ended")
    assert kept.rest_s == 1
    assert kept.dies() == 2
    kept.fails = False  # one that was killed has not failed
    assert [kept.dies() for _ in range(3)] == [1, 1, 1]


def test_a_port_of_the_supervisor_is_its_own_to_close_while_a_child_still_reads_and_imports(
    kept: Kept,
) -> None:
    begun, child_begun = os.pipe()
    listener = socket.create_server(("127.0.0.1", 0))

    def prepare() -> None:
        os.write(child_begun, b"x")
        signal.pause()

    kept.fails, kept.prepares = False, prepare
    kept._close_in_child = listener.close
    with listener:
        address = listener.getsockname()
        kept.start()
        assert os.read(begun, 1) == b"x"
    with socket.socket() as other:  # without SO_REUSEADDR: nobody else may have it
        other.bind(address)
    for fd in (begun, child_begun):
        os.close(fd)

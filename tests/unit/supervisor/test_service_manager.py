"""What the service manager is told, also where it does not read."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyforwarder.runtime import loop as loop_module
from pyforwarder.runtime.loop import Loop
from pyforwarder.supervisor import service_manager
from pyforwarder.supervisor.listeners import stored_sockets
from pyforwarder.supervisor.service_manager import ServiceManager
from tests.helpers.clock import Clock

if TYPE_CHECKING:
    from pyforwarder.supervisor.listeners.binding import BoundSocket


class Lines:
    """A log that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[tuple[str, str, dict[str, object]]] = []

    def write(self, level: str, event: str, **fields: object) -> None:
        self.written.append((level, event, fields))


class Told:
    """A manager's socket, and the part of the daemon that speaks to it; time passes as told."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **environ: str) -> None:
        self.path = str(path)
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(self.path)
        self.manager.setblocking(False)
        self.clock = Clock()
        monkeypatch.setattr(loop_module, "time", self.clock)
        self.loop = Loop()
        self.lines = Lines()
        log: Any = self.lines
        self.ours = ServiceManager(self.loop, log, {"NOTIFY_SOCKET": self.path, **environ})

    def heard(self) -> list[bytes]:
        """All that waits in its queue."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.manager.recv(100))
        return found

    def fill(self) -> int:
        """Somebody leaves no room in its queue; how many messages that took."""
        count = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.sendto(b"X=1", self.path)
                    count += 1
        return count

    def later(self, seconds: float) -> None:
        self.clock.pass_time(seconds)
        self.loop.run_once(0.0)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    one = Told(tmp_path / "notify", monkeypatch)
    with one.manager:
        yield one
    one.loop.dispose()


def test_what_is_said_is_heard_at_once_and_in_order(told: Told) -> None:
    for state in ("RELOADING=1", "READY=1", "MAINPID=7"):
        told.ours.notify(state)
    assert told.heard() == [b"RELOADING=1", b"READY=1", b"MAINPID=7"]


def test_what_there_is_no_room_for_is_said_when_there_is(told: Told) -> None:
    count = told.fill()
    told.ours.notify("READY=1")
    told.ours.notify("WATCHDOG=1")
    told.ours.notify("MAINPID=7")
    told.later(service_manager._AGAIN_S)
    assert told.heard() == [b"X=1"] * count
    told.ours.notify("WATCHDOG=1")  # it would go before what was said earlier
    told.later(service_manager._AGAIN_S)
    assert told.heard() == [b"READY=1", b"MAINPID=7"]
    told.ours.notify("WATCHDOG=1")
    assert told.heard() == [b"WATCHDOG=1"]
    assert told.lines.written == []


def test_a_manager_that_never_reads_is_given_up_and_the_log_says_so(told: Told) -> None:
    told.fill()
    told.ours.notify("READY=1")
    told.ours.notify("MAINPID=7")
    for _ in range(service_manager._MOST_TRIES - 1):
        told.later(service_manager._AGAIN_S)
    said_of_the_first = list(told.lines.written)
    for _ in range(service_manager._MOST_TRIES - 1):
        told.later(service_manager._AGAIN_S)
    assert len(said_of_the_first) == 1  # the second has as long
    said = ("warning", "sd_notify", {"error": "Resource temporarily unavailable"})
    assert told.lines.written == [said, said]
    told.heard()
    told.ours.notify("STATUS=x")
    assert told.heard() == [b"STATUS=x"]


def test_a_process_that_ends_says_first_who_comes_after_it(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = told.fill()
    told.ours.notify("MAINPID=7")
    heard: list[bytes] = []
    reader = threading.Thread(
        target=lambda: heard.extend(told.manager.recv(100) for _ in range(count + 1))
    )
    told.manager.settimeout(10.0)
    reader.start()
    told.ours.finish()
    reader.join()
    assert heard[-1] == b"MAINPID=7"
    told.manager.setblocking(False)
    told.fill()
    monkeypatch.setattr(service_manager, "_LAST_S", 0.01)
    told.ours.notify("STATUS=x")
    told.ours.finish()
    assert told.lines.written == [("warning", "sd_notify", {"error": "timed out"})]


def test_a_manager_that_is_gone_is_a_line_of_the_log(told: Told, tmp_path: Path) -> None:
    (tmp_path / "notify").unlink()
    told.ours.notify("READY=1")
    assert told.lines.written == [("warning", "sd_notify", {"error": "No such file or directory"})]


def test_sockets_that_it_has_no_room_for_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_sockets, "_ROOM_S", 0.01)
    told = Told(tmp_path / "notify", monkeypatch, FDSTORE="10")
    with told.manager:
        told.fill()
        none: list[BoundSocket] = []
        told.ours.keep_sockets(none)
        assert told.lines.written == [("warning", "sd_notify", {"error": "timed out"})]
    told.loop.dispose()

"""`up --detach`: when the command returns, and with what."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pyforwarder.errors import ConfigError
from pyforwarder.runtime.environment import Environment
from pyforwarder.supervisor import UpOptions
from pyforwarder.supervisor.detaching import DetachedError, detached

OPTIONS = UpOptions(
    instance="default", config_path=None, listen=None, datapath=None, detach=True, verbosity=0
)


def environment() -> Environment:
    return replace(Environment.of_process(), stdout=io.StringIO(), stderr=io.StringIO())


class Daemon:
    """What `detached` starts; `life` is what it does in the background."""

    def __init__(self, life: Callable[[Callable[[str], None]], int]) -> None:
        self._life = life

    def run(self, on_ready: Callable[[str], None] | None = None) -> int:
        assert on_ready is not None
        return self._life(on_ready)


def test_command_returns_while_the_daemon_and_its_workers_live() -> None:
    """Workers are forked before the daemon is ready and keep what was open then."""
    end_read, end_write = os.pipe()
    gone_read, gone_write = os.pipe()

    def life(on_ready: Callable[[str], None]) -> int:
        os.close(end_write)
        os.close(gone_read)
        if os.fork():  # the other one is a worker
            on_ready("two pairs stay")
        os.read(end_read, 1)  # both live until the test closes its end
        os._exit(0)

    assert detached(environment(), OPTIONS, lambda *_: Daemon(life)) == "two pairs stay"
    os.close(gone_write)
    os.set_blocking(gone_read, False)
    with pytest.raises(BlockingIOError):  # somebody still holds the other end
        os.read(gone_read, 1)
    os.close(end_write)
    os.set_blocking(gone_read, True)
    assert os.read(gone_read, 1) == b""  # now they are gone
    for fd in (end_read, gone_read):
        os.close(fd)


def test_daemon_that_cannot_start_gives_its_error_and_exit_code() -> None:
    def life(_: Callable[[str], None]) -> int:
        raise ConfigError("no such key", path="listenrs", line=3)

    with pytest.raises(DetachedError, match="line 3, listenrs: no such key") as caught:
        detached(environment(), OPTIONS, lambda *_: Daemon(life))
    assert caught.value.exit_code == 2


def test_unexpected_error_does_not_run_the_callers_code_twice(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def life(_: Callable[[str], None]) -> int:
        raise ZeroDivisionError("by nothing")

    caller = os.getpid()
    with pytest.raises(DetachedError, match="internal error: ZeroDivisionError: by nothing"):
        detached(environment(), OPTIONS, lambda *_: Daemon(life))
    assert os.getpid() == caller
    assert "Traceback" in capfd.readouterr().err


def test_daemon_that_dies_without_a_word_is_a_failure() -> None:
    def life(_: Callable[[str], None]) -> int:
        os._exit(9)

    with pytest.raises(DetachedError, match="without a word") as caught:
        detached(environment(), OPTIONS, lambda *_: Daemon(life))
    assert caught.value.exit_code == 1


def test_daemon_is_told_that_it_is_detached(tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def make(_: Environment, options: UpOptions) -> Daemon:
        def life(on_ready: Callable[[str], None]) -> int:
            seen.write_text(f"{options.detach} {os.getsid(0) != os.getpid()}")
            on_ready("two pairs stay")
            return 0

        return Daemon(life)

    assert detached(environment(), OPTIONS, make) == "two pairs stay"
    assert seen.read_text() == "True True"  # and it leads no session: it cannot get a terminal

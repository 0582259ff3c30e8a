"""Active health checks: what one check holds, how it ends, what it says of a server."""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from pyforwarder.config import parse_config
from pyforwarder.core.address import UnixAddress
from pyforwarder.runtime.loop import EPOLLOUT, Loop
from pyforwarder.runtime.resolver import Bounds, Resolver
from pyforwarder.supervisor.processes import health_checker
from pyforwarder.supervisor.processes.health_checker import Checker, HealthResult

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.runtime.askers import Mailbox

CONFIG = """
upstreams:
  web:
    servers: [{address: "web.example:80"}]
    resolve_every: 30s
    health: {interval: 5s, timeout: 2s, rise: 2, fall: 2}
listeners:
  - {name: main, bind: "127.0.0.1:0", rules: [{name: r, match: any, to: web}]}
"""
SERVER = ("web", "web.example:80")
HOSTS = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]


class FakeAsker:
    """Answers when the test does."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.put = mailbox.put

    def ask(self, name: str) -> None:
        assert name == "web.example"

    def forget(self, name: str) -> bool:
        del name
        return False

    def close(self) -> None:
        pass


class Play:
    """The checks of one server in virtual time, and the sockets that they open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.code = errno.EINPROGRESS  # what connect says: nobody answers
        self.sockets: list[_socket.socket] = []
        self.verdicts: list[HealthResult] = []
        self.rounds = 0
        self.asker: FakeAsker
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        # A full backlog drops SYNs: a connect then waits.
        self._silent = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._fill = [self._connect() for _ in range(2)]
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(
            health_checker._Check, "dial", lambda _check, address: self._dial(address)
        )
        self.loop = Loop()
        monkeypatch.setattr(health_checker, "configured_names", self._names)
        self.begin()

    def begin(self, *, known: dict[tuple[str, str], bool] | None = None) -> None:
        """Check, as a new process does."""
        self.checker = Checker(
            self.loop,
            parse_config(CONFIG, source="test").upstreams,
            self.verdicts.append,
            known=known,
            finished=self._finished,
        )

    def _finished(self) -> None:
        self.rounds += 1

    def _names(self, loop: Loop, *, stale_wait_s: float) -> Resolver:
        def make(mailbox: Mailbox) -> FakeAsker:
            self.asker = FakeAsker(mailbox)
            return self.asker

        bounds = Bounds(total=9, client=9, network=9)
        return Resolver(loop, make, bounds, stale_wait_s=stale_wait_s)

    def _connect(self) -> _socket.socket:
        sock = _socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        assert sock.connect_ex(self._silent.getsockname()) == errno.EINPROGRESS
        return sock

    def _dial(self, address: Address) -> tuple[_socket.socket, int]:
        assert address.host in HOSTS
        if self.code == errno.EMFILE:
            raise OSError(self.code, os.strerror(self.code))
        sock = self._connect()
        self.sockets.append(sock)
        return sock, errno.EINPROGRESS

    def answers(self, sock: _socket.socket) -> None:
        """The silent server accepts this one."""
        connected = _socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        connected.connect_ex(self._listening.getsockname())
        os.dup2(connected.fileno(), sock.fileno(), inheritable=False)
        connected.close()
        self.loop._epoll.register(sock.fileno(), EPOLLOUT)  # what dup2 closed has left epoll

    def answers_next(self) -> None:
        """As `answers`, for the check that runs."""
        self.answers(self.open[0])
        self.pass_time(0.0)

    @property
    def open(self) -> list[_socket.socket]:
        return [sock for sock in self.sockets if sock.fileno() >= 0]

    @property
    def server(self) -> health_checker._Server:
        return self.checker._checked[0].servers["web.example:80"]

    def pass_time(self, by_s: float) -> None:
        self.now_s += by_s
        self.loop.run_once(0.0)

    def until_busy(self) -> None:
        """Until the next check begins."""
        for _ in range(60):
            if self.server.is_busy:
                return
            self.pass_time(0.1)
        pytest.fail("no check within an interval")

    def close(self) -> None:
        self.checker.names.close()
        for sock in (*self._fill, self._silent, self._listening, *self.sockets):
            sock.close()
        self.loop.run_once(0.0)
        self.loop.dispose()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    play = Play(monkeypatch)
    with contextlib.closing(play):
        yield play


def test_a_check_by_a_known_name_closes_its_sockets_at_the_timeout(play: Play) -> None:
    play.until_busy()
    play.asker.put("web.example", HOSTS)
    play.pass_time(0.0)
    for check in range(3):
        assert len(play.open) == 1
        play.pass_time(0.25)
        assert len(play.open) == 2
        play.pass_time(2.0)
        assert (play.open, play.server.is_busy) == ([], False), f"check {check}"
        # The next ones find the answer known.
        play.until_busy()


def test_a_server_that_answers_after_the_timeout_has_not_passed(play: Play) -> None:
    play.until_busy()
    play.asker.put("web.example", HOSTS)
    play.pass_time(0.0)
    play.pass_time(2.0)
    assert [verdict.up for verdict in play.verdicts] == [False]
    play.until_busy()
    (late,) = play.open
    play.pass_time(0.1)
    play.pass_time(2.0)
    assert not play.server.is_busy
    assert late.fileno() == -1
    for _ in range(2):
        play.until_busy()
        play.answers(play.open[0])
        play.pass_time(0.0)
        assert not play.server.is_busy
    assert [verdict.up for verdict in play.verdicts] == [False, True]


def test_a_check_has_one_result(play: Play) -> None:
    play.until_busy()
    observed: list[bool] = []
    play.checker.ended = (  # type: ignore[method-assign]
        lambda upstream, server, *, passed, why: observed.append(passed)
    )
    check = health_checker._Check(play.checker, play.loop, play.checker._checked[0], play.server)
    check._end(passed=True, why="connected")
    check.lost(errno.ECONNREFUSED)
    check.expired()
    assert observed == [True]


def test_a_check_that_cannot_be_made_says_nothing_of_the_server(play: Play) -> None:
    play.until_busy()
    play.code = errno.EMFILE
    play.asker.put("web.example", HOSTS)
    play.pass_time(0.0)
    assert (play.server.is_busy, play.verdicts) == (False, [])
    assert play.rounds == 0  # nothing was checked
    play.code = errno.EINPROGRESS
    play.until_busy()
    play.answers(play.open[0])
    play.pass_time(0.0)
    assert [verdict.up for verdict in play.verdicts] == [True]
    assert play.rounds == 1


def test_a_path_for_which_there_is_no_descriptor_stops_no_other_check(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    play.until_busy()
    play.asker.put("web.example", HOSTS)
    play.pass_time(2.0)
    play.server.address = UnixAddress("/run/web")
    monkeypatch.setattr("_socket.socket", Mock(side_effect=OSError(errno.EMFILE, "none")))
    play.verdicts.clear()
    for _ in range(60):
        play.pass_time(0.1)
    assert (play.server.is_busy, play.verdicts) == (False, [])


def fail_once(play: Play) -> None:
    play.until_busy()
    play.asker.put("web.example", HOSTS)
    play.pass_time(0.0)
    play.pass_time(2.0)
    assert not play.server.is_busy


def test_a_new_process_goes_on_with_what_the_last_one_has_found(play: Play) -> None:
    play.checker.check_only(())  # the first one
    first = play.checker
    play.begin(known={SERVER: True})
    fail_once(play)
    assert [verdict.up for verdict in play.verdicts] == [True]  # one of two that must fail
    fail_once(play)
    assert [verdict.up for verdict in play.verdicts] == [True, False]
    first.names.close()


def test_a_server_that_stays_is_counted_on_and_one_that_comes_back_is_on_trial(play: Play) -> None:
    fail_once(play)
    play.until_busy()
    play.answers_next()
    play.until_busy()
    play.answers_next()
    assert [verdict.up for verdict in play.verdicts] == [False, True]
    for _ in range(3):
        play.checker.check_only({SERVER})
        assert [verdict.up for verdict in play.verdicts] == [False, True]
    fail_once(play)
    play.checker.check_only({SERVER})
    assert [verdict.up for verdict in play.verdicts] == [False, True]
    fail_once(play)
    assert [verdict.up for verdict in play.verdicts] == [False, True, False]
    play.checker.check_only(())
    for _ in range(60):
        play.pass_time(0.1)
        assert not play.server.is_busy
    play.checker.check_only({SERVER})
    fail_once(play)
    assert [verdict.up for verdict in play.verdicts][3:] == [False]

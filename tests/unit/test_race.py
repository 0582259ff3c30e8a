"""Several addresses of one server at once: when each is tried, which wins, what is left open."""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator

import pytest

from pyforwarder.core.address import Address
from pyforwarder.core.eyeballs import ATTEMPT_DELAY_S, Liveness
from pyforwarder.runtime.loop import EPOLLOUT, Loop
from pyforwarder.worker import race as race_module
from pyforwarder.worker.race import SHORTAGES, Race

ONE, TWO, THREE = (Address(f"192.0.2.{number}", 80) for number in (1, 2, 3))


class Dialer:
    """Opens what the test says for each address: silence, an errno, or a connection."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.says: dict[Address, int] = {}
        self.dialed: list[Address] = []
        self.sockets: dict[Address, _socket.socket] = {}
        self.fds: dict[Address, int] = {}
        self.winner: tuple[_socket.socket, Address] | None = None
        self.code: int | None = None
        self._silent = socket.create_server(("127.0.0.1", 0), backlog=0)
        # A full backlog drops SYNs: a connect then waits.
        self._fill = [self._connecting() for _ in range(2)]
        self._open = socket.create_server(("127.0.0.1", 0), backlog=64)

    def _connecting(self) -> _socket.socket:
        sock = _socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        assert sock.connect_ex(self._silent.getsockname()) == errno.EINPROGRESS
        return sock

    def dial(self, address: Address) -> tuple[_socket.socket, int]:
        self.dialed.append(address)
        code = self.says.get(address, errno.EINPROGRESS)
        if code in SHORTAGES:
            raise OSError(code, os.strerror(code))
        if code == errno.EINPROGRESS:
            sock = self._connecting()
        else:
            sock = _socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            if code == 0:
                assert sock.connect_ex(self._open.getsockname()) in (0, errno.EINPROGRESS)
        self.sockets[address], self.fds[address] = sock, sock.fileno()
        return sock, code

    def connected(self, sock: _socket.socket, address: Address) -> None:
        assert self.winner is None
        self.winner = sock, address

    def lost(self, code: int) -> None:
        assert self.code is None
        self.code = code

    def answers(self, address: Address) -> None:
        """The silent server accepts this one."""
        sock = self.sockets[address]
        connected = _socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        connected.connect_ex(self._open.getsockname())
        os.dup2(connected.fileno(), sock.fileno(), inheritable=False)
        connected.close()
        # What dup2 closed has left epoll.
        self.loop._epoll.register(sock.fileno(), EPOLLOUT)

    def is_open(self, address: Address) -> bool:
        return self.sockets[address].fileno() >= 0

    @staticmethod
    def lowest_free() -> int:
        fd = os.open("/dev/null", os.O_RDONLY)
        os.close(fd)
        return fd

    def close(self) -> None:
        for sock in (*self._fill, self._silent, self._open, *self.sockets.values()):
            sock.close()


class Play:
    """A race in virtual time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        self.loop = Loop()
        self.dialer = Dialer(self.loop)
        self.liveness = Liveness()

    def race(self, *addresses: Address, within_s: float = 5.0) -> Race:
        race = Race(self.loop, self.dialer, addresses, self.liveness, within_s=within_s, pair=None)
        race.begin()
        return race

    def pass_time(self, by_s: float) -> None:
        self.now_s += by_s
        self.loop.run_once(0.0)

    def order(self, *addresses: Address) -> list[Address]:
        return self.liveness.order(addresses, self.now_s)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    before = sorted(os.listdir("/proc/self/fd"))
    play = Play(monkeypatch)
    with contextlib.closing(play.dialer):
        yield play
    assert play.loop.deadlines.next_s() is None
    play.loop.run_once(0.0)
    play.loop.dispose()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_next_address_is_tried_after_a_quarter_of_a_second(play: Play) -> None:
    race = play.race(ONE, TWO, THREE)
    assert play.dialer.dialed == [ONE]
    play.pass_time(ATTEMPT_DELAY_S - 0.125)
    assert play.dialer.dialed == [ONE]
    play.pass_time(0.125)
    assert play.dialer.dialed == [ONE, TWO]
    play.pass_time(ATTEMPT_DELAY_S)
    assert play.dialer.dialed == [ONE, TWO, THREE]
    play.pass_time(ATTEMPT_DELAY_S)
    assert play.dialer.code is None
    race.stop()
    assert [play.dialer.is_open(address) for address in (ONE, TWO, THREE)] == [False] * 3
    # The caller, which ended it, is told nothing of them.
    assert play.order(ONE, TWO, THREE) == [ONE, TWO, THREE]


def test_the_delay_is_shorter_where_there_is_little_time(play: Play) -> None:
    race = play.race(ONE, TWO, THREE, within_s=0.5)
    play.pass_time(0.125)
    play.pass_time(0.125)
    assert play.dialer.dialed == [ONE, TWO, THREE]
    race.stop()


def test_the_first_to_connect_wins_and_the_rest_are_closed(play: Play) -> None:
    play.dialer.says[TWO] = 0
    play.race(ONE, TWO, THREE)
    play.pass_time(ATTEMPT_DELAY_S)
    assert play.dialer.winner is not None
    sock, address = play.dialer.winner
    assert (sock, address) == (play.dialer.sockets[TWO], TWO)
    assert play.dialer.dialed == [ONE, TWO]
    assert not play.dialer.is_open(ONE)
    assert play.dialer.is_open(TWO)
    # The next connection does not wait for the one that did not answer.
    assert play.order(ONE, TWO, THREE) == [TWO, THREE, ONE]


def test_an_early_one_that_wins_late_says_nothing_against_those_after_it(play: Play) -> None:
    play.race(ONE, TWO)
    play.pass_time(ATTEMPT_DELAY_S)
    assert play.dialer.dialed == [ONE, TWO]
    play.dialer.answers(ONE)
    play.pass_time(0.0)
    assert play.dialer.winner == (play.dialer.sockets[ONE], ONE)
    assert not play.dialer.is_open(TWO)
    assert play.order(TWO, ONE) == [TWO, ONE]


def test_an_address_that_fails_is_followed_by_the_next_at_once(play: Play) -> None:
    play.dialer.says = {ONE: errno.EHOSTUNREACH, TWO: errno.EMFILE, THREE: 0}
    play.race(ONE, TWO, THREE)
    assert play.dialer.winner is not None
    assert play.dialer.winner[1] == THREE
    # That there was no descriptor for it says nothing of the second.
    assert play.order(ONE, TWO, THREE) == [TWO, THREE, ONE]


@pytest.mark.parametrize("code", sorted(SHORTAGES))
def test_a_shortage_of_ours_is_no_news_of_an_address(play: Play, code: int) -> None:
    play.dialer.says = {ONE: code, TWO: errno.ECONNREFUSED}
    play.race(ONE, TWO)
    # It is told: not all of them have been asked.
    assert play.dialer.code == code
    assert play.order(ONE, TWO, THREE) == [ONE, THREE, TWO]


@pytest.mark.parametrize(
    ("said", "of_datagrams", "means"),
    [
        (errno.EADDRNOTAVAIL, 0, errno.EADDRINUSE),
        (errno.EADDRNOTAVAIL, errno.EAGAIN, errno.EADDRINUSE),
        # IPv6 is disabled: a server that cannot be reached is not spared for that.
        (errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL),
        (errno.ECONNREFUSED, 0, errno.ECONNREFUSED),
        (errno.EINPROGRESS, 0, errno.EINPROGRESS),
        (0, 0, 0),
    ],
)
def test_no_port_and_no_address_to_connect_from_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, said: int, of_datagrams: int, means: int
) -> None:
    monkeypatch.setattr(socket.socket, "connect_ex", lambda _sock, _address: of_datagrams)
    assert race_module.outcome_of(said, ONE) == means
    assert errno.EADDRNOTAVAIL not in SHORTAGES


def test_where_descriptors_are_short_connections_are_made_one_at_a_time(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_module, "_descriptors", lambda: 2 * play.dialer.lowest_free())
    race = play.race(ONE, TWO, THREE, within_s=8.0)
    assert play.dialer.dialed == [ONE]
    for seen in ([ONE], [ONE, TWO], [ONE, TWO, THREE]):
        assert play.dialer.dialed == seen
        assert [address for address in seen if play.dialer.is_open(address)] == seen[-1:]
        play.pass_time(1.875)
        assert play.dialer.dialed == seen
        play.pass_time(0.125)
    # The last has what is left.
    play.dialer.answers(THREE)
    play.pass_time(1.0)
    assert play.dialer.winner == (play.dialer.sockets[THREE], THREE)
    race.stop()


def test_where_none_answers_the_last_error_is_told(play: Play) -> None:
    play.dialer.says = {ONE: errno.ENETUNREACH, TWO: errno.ECONNREFUSED}
    play.race(ONE, TWO)
    assert play.dialer.code == errno.ECONNREFUSED
    assert play.dialer.winner is None


def test_those_that_had_their_time_are_remembered_when_it_is_over(play: Play) -> None:
    race = play.race(ONE, TWO)
    race.stop(timed_out=True)
    assert play.order(ONE, TWO) == [TWO, ONE]


def test_a_connection_to_itself_is_none(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    play.dialer.says = {ONE: 0}
    monkeypatch.setattr(Race, "_is_own", staticmethod(lambda _attempt: True))
    play.race(ONE)
    assert play.dialer.code == errno.ECONNREFUSED
    assert not play.dialer.is_open(ONE)

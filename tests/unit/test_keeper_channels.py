"""Which channels the keeper reads, as workers die and have successors, or close theirs."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator

import pytest

from pyforwarder.datapath.splice.keeper_channels import RENEWAL, Channels


class Play:
    """The keeper's channels, with the supervisor's ends and workers' ends."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        also: Callable[[int, socket.socket], object] | None = None,
    ) -> None:
        self._stack = stack
        self.poll = select.poll()
        self.ours: list[socket.socket] = []
        theirs = [self._pair() for _ in range(2)]
        self.renewals, ends = self._stack_pair()
        for sock in (self.renewals, ends):
            sock.setblocking(False)
        self.channels = Channels(self.poll, [[one] for one in theirs], ends, also)
        stack.callback(self._close)

    def _stack_pair(self) -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in pair:
            self._stack.callback(sock.close)
        return pair

    def _pair(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stack.callback(ours.close)
        self.ours.append(ours)
        return theirs

    def _close(self) -> None:
        for socks in self.channels._socks:
            for sock in socks:
                sock.close()

    def renew(self, worker: int) -> socket.socket:
        """The supervisor says it; the successor's end."""
        theirs = self._pair()
        socket.send_fds(self.renewals, [RENEWAL.pack(worker)], [theirs.fileno()])
        theirs.close()
        return self.ours[-1]

    def readable(self) -> list[int]:
        """Of which workers something is to be read."""
        found = (self.channels.worker_of(fd) for fd, _ in self.poll.poll(0))
        return sorted(worker for worker in found if worker is not None)

    def end(self, worker: int) -> bool:
        """The keeper has found the end of what that channel says."""
        return self.channels.ended(self.channels.sock(worker).fileno())


@pytest.fixture
def play() -> Iterator[Play]:
    with contextlib.ExitStack() as stack:
        yield Play(stack)


def test_a_successor_is_heard_when_all_before_it_is_read(play: Play) -> None:
    successor = play.renew(0)
    successor.send(b"second")
    play.ours[0].send(b"first")
    play.channels.renew()
    assert play.readable() == [0]
    assert play.channels.sock(0).recv(10) == b"first"
    assert play.readable() == []
    assert play.end(0)
    assert play.channels.sock(0).recv(10) == b"second"


def test_a_successor_that_is_said_and_not_read_yet_is_found_at_the_end(play: Play) -> None:
    successor = play.renew(1)
    play.ours[1].close()
    assert play.end(1)
    successor.send(b"x")
    assert play.readable() == [1]


def test_a_worker_that_closes_its_channel_is_accused_and_its_successor_is_heard(
    play: Play,
) -> None:
    """Once the supervisor has replaced it: as if there had been no gap."""
    play.ours[0].shutdown(socket.SHUT_RDWR)
    assert not play.end(0)
    assert not play.channels.is_over
    assert play.readable() == []
    successor = play.renew(0)
    successor.send(b"x")
    play.channels.renew()
    assert play.readable() == [0]


def test_a_channel_that_was_known_at_the_start_is_taken_once(play: Play) -> None:
    """The supervisor keeps it for the next keeper, and had said it to this one, too."""
    known = play.channels.sock(0)
    socket.send_fds(play.renewals, [RENEWAL.pack(0)], [known.fileno()])
    play.channels.renew()
    play.ours[0].close()
    assert not play.end(0)


def test_a_renewal_that_has_lost_its_descriptor_is_said_again(play: Play) -> None:
    play.renewals.send(RENEWAL.pack(0))
    play.ours[0].close()
    assert not play.end(0)
    play.renew(0).send(b"x")
    play.channels.renew()
    assert play.readable() == [0]


def test_it_is_over_when_no_worker_is_left(play: Play) -> None:
    play.renewals.close()
    for worker in range(2):
        play.ours[worker].close()
        assert not play.end(worker)
    assert play.channels.is_over


def test_another_socket_comes_with_each_renewal() -> None:
    """Or none of them, where there are no descriptors for both."""
    more: list[tuple[int, socket.socket]] = []
    with contextlib.ExitStack() as stack:
        play = Play(stack, lambda worker, sock: more.append((worker, sock)))
        play.renew(1)
        play.channels.renew()
        assert (more, len(play.channels._socks[1])) == ([], 1)
        theirs = play._pair()
        ours, told = play._stack_pair()
        with theirs:
            fds = [theirs.fileno(), told.fileno()]
            socket.send_fds(play.renewals, [RENEWAL.pack(1)], fds)
        play.channels.renew()
        ((worker, sock),) = more
        with sock:
            assert (worker, len(play.channels._socks[1])) == (1, 2)
            ours.send(b"also")
            assert sock.recv(10) == b"also"

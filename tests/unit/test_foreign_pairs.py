"""Sockets of other programs that are joined to a pair, or refused (`forward`)."""

from __future__ import annotations

import os
import socket

import pytest

from pyforwarder.core.connection import Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.proof.rig import loopback_pair
from pyforwarder.errors import ControlError
from pyforwarder.runtime.socket_options import cookie_of
from tests.helpers.instruction import instruction
from tests.helpers.peers import reset
from tests.helpers.stream_play import (
    EAGER,
    Servers,
    StartPlay,
    named,
)


def adopted_ends() -> tuple[socket.socket, socket.socket, socket.socket, socket.socket]:
    client, accepted = loopback_pair()
    outgoing, server = loopback_pair()
    return client, accepted, outgoing, server


def test_sockets_of_another_program_are_joined(start: StartPlay) -> None:
    play = start(named())
    client, accepted, outgoing, server = adopted_ends()
    play.own(client)
    play.own(server)
    client.sendall(b"queued")
    pair_id = play.server.foreign_pairs.join_sockets(accepted.detach(), outgoing.detach())
    assert play.read(server, 6) == b"queued"
    server.sendall(b"answer")
    assert play.read(client, 6) == b"answer"
    assert play.only_client().id == pair_id
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)


def test_sockets_that_cannot_be_joined_are_closed_and_refused(start: StartPlay) -> None:
    play = start(named())
    for kind in ("datagram", "unconnected"):
        client, accepted, outgoing, server = adopted_ends()
        with client, server, outgoing:
            other = socket.socket(
                socket.AF_INET,
                socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM,
            )
            first, second = accepted.detach(), other.detach()
            with pytest.raises(ControlError, match="cannot join"):
                play.server.foreign_pairs.join_sockets(first, second)
            for fd in (first, second):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(fd)
    assert play.server.clients == {}


def test_sockets_that_are_refused_are_what_they_were(start: StartPlay) -> None:
    # The sender keeps them, and would not expect a reset at their close.
    play = start(named())
    client, accepted, outgoing, server = adopted_ends()
    kept = play.own(accepted.dup())
    kept.setblocking(True)
    with client, server, outgoing, pytest.raises(ControlError, match="not connected"):
        play.server.foreign_pairs.join_sockets(
            accepted.detach(), socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()
        )
    assert kept.getblocking()
    assert kept.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8)


def test_socket_that_a_pair_has_is_not_joined_again(start: StartPlay) -> None:
    play = start(named())
    client, accepted, outgoing, server = adopted_ends()
    play.own(client)
    play.own(server)
    again = [play.own(end.dup()) for end in (accepted, outgoing)]
    pair_id = play.server.foreign_pairs.join_sockets(accepted.detach(), outgoing.detach())
    for end in again:
        other, ours = loopback_pair()
        play.own(other)
        for fds in ((end.dup(), ours.dup()), (ours.dup(), end.dup())):
            with pytest.raises(ControlError, match=f"pair {pair_id} has that socket already"):
                play.server.foreign_pairs.join_sockets(*(fd.detach() for fd in fds))
        play.own(ours)
    client.sendall(b"whole")
    assert play.read(server, 5) == b"whole"
    # Once that pair has ended, nobody has them.
    cookies = [cookie_of(end) for end in again]
    assert play.server.foreign_pairs.pair_with(cookies) == pair_id
    play.server.reset_all(CloseReason.FLUSHED)
    assert play.server.foreign_pairs.pair_with(cookies) is None
    assert play.server.foreign_pairs._by_cookie == {}


def test_socket_is_not_joined_to_itself(start: StartPlay) -> None:
    play = start(named())
    client, accepted = loopback_pair()
    play.own(client)
    with pytest.raises(ControlError, match="the two are the same socket"):
        play.server.foreign_pairs.join_sockets(accepted.dup().detach(), accepted.detach())
    assert play.server.clients == {}


def test_no_more_sockets_are_joined_than_there_may_be_pairs(start: StartPlay) -> None:
    play = start(named("limits: {pairs: 1}\n"))
    client, accepted, outgoing, server = adopted_ends()
    for end in (client, server):
        play.own(end)
    play.server.foreign_pairs.join_sockets(accepted.detach(), outgoing.detach())
    client, accepted, outgoing, server = adopted_ends()
    for end in (client, server):
        play.own(end)
    with pytest.raises(ControlError, match=r"limits.pairs: 1"):
        play.server.foreign_pairs.join_sockets(accepted.detach(), outgoing.detach())


def test_mptcp_socket_is_copied_and_says_why(start: StartPlay) -> None:
    play = start(named(EAGER))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = play.own(socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP))
        client.setblocking(True)
        client.connect(listener.getsockname())
        client.setblocking(False)
        accepted, _ = listener.accept()
    outgoing, server = loopback_pair()
    play.own(server)
    play.server.foreign_pairs.join_sockets(accepted.detach(), outgoing.detach())
    assert play.only_client().pair_reason is PairReason.NOT_PLAIN_TCP
    client.sendall(b"over many paths")
    assert play.read(server, 15) == b"over many paths"
    server.sendall(b"and back")
    assert play.read(client, 8) == b"and back"


def test_unix_socket_is_copied_and_says_why(start: StartPlay) -> None:
    play = start(named(EAGER))
    client, accepted = socket.socketpair()
    outgoing, server = loopback_pair()
    play.own(client)
    play.own(server)
    play.server.foreign_pairs.join_sockets(accepted.detach(), outgoing.detach())
    assert play.only_client().pair_reason is PairReason.UNIX_SOCKET
    client.sendall(b"local")
    assert play.read(server, 5) == b"local"


def test_descriptor_that_another_program_keeps_disturbs_nobody_later(
    start: StartPlay, servers: Servers
) -> None:
    # epoll knows open files, not descriptors: what another process holds stays registered when we
    # close it, and reports under a number that belongs to another client by then.
    _, address = servers()
    play = start(named())
    client, accepted, outgoing, server = adopted_ends()
    play.own(accepted.dup())
    play.own(client)
    play.own(server)
    number = accepted.fileno()
    play.server.foreign_pairs.join_sockets(accepted.detach(), outgoing.detach())
    play.loop.run_once(0)
    # The next client waits to be accepted while the number becomes free.
    play.server.accepting.unlisten(play.listener)
    play.dial().sendall(instruction(address)[:5])
    play.server.reset_all(CloseReason.FLUSHED)
    play.loop.run_once(0)
    play.server.accepting.listen(play.listener, play.state)
    play.run_until(lambda: play.server.clients, "client")
    assert list(play.server.clients) == [number]
    reset(client)
    for _ in range(5):
        play.loop.run_once(0.01)
    assert play.closed(CloseReason.CLIENT_RESET) == 0
    assert play.only_client().life is Life.SNIFFING


@pytest.mark.parametrize("more", ["", EAGER], ids=["copy", "sockmap"])
@pytest.mark.parametrize("by", ["supervisor", "program"])
def test_no_end_waits_for_another_process_that_has_the_sockets(
    start: StartPlay, by: str, more: str
) -> None:
    """It hangs, and never closes them: the last close would tell the peers."""
    play = start(named(more))

    def joined() -> tuple[socket.socket, socket.socket]:
        client, accepted, outgoing, server = adopted_ends()
        if by == "program":
            play.lent += [os.dup(end.fileno()) for end in (accepted, outgoing)]
        pair_id = play.server.foreign_pairs.join_sockets(accepted.detach(), outgoing.detach())
        (pair,) = [one for one in play.server.clients.values() if one.id == pair_id]
        play.run_until(lambda: play.fake.joined or not more, "handover")
        if by == "supervisor":
            pair.is_foreign = False
            assert pair.server is not None
            for sock in (pair.client, pair.server):
                play.server.enlarge(pair, sock, 1)
        return play.own(client), play.own(server)

    for turn in (1, -1):
        one, other = joined()[::turn]
        for sender, receiver in ((one, other), (other, one)):
            sender.sendall(b"last")
            sender.shutdown(socket.SHUT_WR)
            assert play.read_end(receiver) == (b"last", "eof")
        one, other = joined()[::turn]
        reset(one)
        assert play.read_end(other) == (b"", "reset")
    ends = joined()
    play.server.reset_all(CloseReason.FLUSHED)
    assert [play.read_end(end) for end in ends] == [(b"", "reset")] * 2

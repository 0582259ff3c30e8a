"""Reading first packets: what a client gains by sending little, late, in pieces, or nothing."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import Counter
from pyforwarder.worker import sniffer
from tests.helpers.instruction import instruction, refusal
from tests.helpers.peers import reset
from tests.helpers.stream_play import (
    DEADLINE_S,
    Servers,
    StartPlay,
    named,
)

if TYPE_CHECKING:
    import pytest


def test_client_whose_pieces_cost_too_much_is_decided_by_what_has_come(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every piece is one more look at all that has come.
    monkeypatch.setattr(sniffer, "DECIDING_S", 0.0)
    _, address = servers()
    play = start(
        "listeners: [{name: main, bind: '127.0.0.1:0', first_packet: {timeout: 1h},"
        f" rules: [{{match: {{regex: '^a*b'}}, to: '{address}'}}, {{match: any, reject: reset}}]}}]"
    )
    whole, dripping = play.dial(), play.dial()
    whole.sendall(b"a")
    dripping.sendall(b"a")
    play.run_until(
        lambda: [c.received for c in play.server.clients.values()] == [b"a", b"a"], "first pieces"
    )
    # What comes in one piece costs one look, and is not measured.
    assert play.closed(CloseReason.REJECTED) == 0
    dripping.sendall(b"a")
    assert play.read_end(dripping) == (b"", "reset")
    assert play.counters[Counter.FIRST_PACKET_FULL] == 0  # a rule has taken it
    whole.sendall(b"b")
    play.run_until(lambda: play.counters[Counter.PAIRS_OPENED] == 1, "pair")


DRIPPED: Final = (
    "listeners: [{name: main, bind: '127.0.0.1:0', first_packet: {timeout: 1h},"
    " rules: [{match: {regex: '^a*b'}, to: 'ADDRESS'}, {match: any, reject: reset}]}]"
)


def test_second_looks_wait_once_they_have_had_their_share(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address = servers()
    play = start(DRIPPED.replace("ADDRESS", address))
    decisions = play.server._sniffer
    clients = [play.dial() for _ in range(3)]
    for client in clients:
        client.sendall(b"a")
    play.run_until(
        lambda: [c.received for c in play.server.clients.values()] == [b"a"] * 3, "first pieces"
    )
    monkeypatch.setattr(sniffer, "AGAIN_SHARE", 0.0)
    decisions._again_s = 0.0
    for client in clients:
        client.sendall(b"b")
    play.run_until(
        lambda: [c.received for c in play.server.clients.values()] == [b"ab"] * 3, "second pieces"
    )
    assert len(decisions.put_off) == 3
    # A first look costs each connection one, and none waits.
    play.dial().sendall(b"b")
    play.run_until(lambda: play.counters[Counter.PAIRS_OPENED] == 1, "pair")
    # Nobody waits any more for a client that has ended.
    reset(clients[0])
    play.wait_for_end(CloseReason.CLIENT_RESET)
    assert len(decisions.put_off) == 2
    monkeypatch.setattr(sniffer, "AGAIN_SHARE", 1.0)
    play.run_until(lambda: play.counters[Counter.PAIRS_OPENED] == 3, "pairs")
    assert not decisions.put_off


def test_first_packet_whose_second_look_waits_is_decided_in_time(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address = servers()
    play = start(DRIPPED.replace("ADDRESS", address).replace("1h", "100ms"))
    monkeypatch.setattr(sniffer, "AGAIN_SHARE", 0.0)
    play.server._sniffer._again_s = 0.0
    client = play.dial()
    client.sendall(b"a")
    play.run_until(
        lambda: [c.received for c in play.server.clients.values()] == [b"a"], "first piece"
    )
    client.sendall(b"b")
    play.run_until(lambda: play.counters[Counter.PAIRS_OPENED] == 1, "pair")


def test_garbage_matches_nothing_and_is_reset(start: StartPlay) -> None:
    play = start(named())
    client = play.dial()
    client.sendall(b"GET / HTTP/1.1")
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.NO_MATCH)


def test_half_an_instruction_times_out_with_an_answer(start: StartPlay) -> None:
    play = start(named().replace("timeout: 5s", "timeout: 50ms"))
    client = play.dial()
    client.sendall(instruction("127.0.0.1:80")[:7])
    assert play.read_end(client) == (refusal("timeout"), "eof")
    client.close()
    play.wait_for_end(CloseReason.TIMEOUT)
    assert play.counters[Counter.FIRST_PACKET_TIMEOUT] == 1


def test_client_that_trickles_gains_no_time(start: StartPlay) -> None:
    play = start(named().replace("timeout: 5s", "timeout: 1h"))
    client = play.dial()
    play.run_until(lambda: play.server.clients, "client")
    # Each byte comes well within the time, the tenth right before its end.
    for byte in b"99" + b"a" * 8:
        client.send(bytes([byte]))
        play.pass_time((3600.0 - DEADLINE_S) / 10)
        assert play.only_client().life is Life.SNIFFING
    play.pass_time(DEADLINE_S)
    assert play.only_client().life is Life.REFUSING


def test_client_that_says_nothing_and_leaves_is_gone(start: StartPlay) -> None:
    play = start(named())
    client = play.dial()
    client.shutdown(socket.SHUT_WR)
    assert play.read_end(client) == (b"", "eof")
    play.wait_for_end(CloseReason.CLIENT_GONE)


def test_client_that_resets_while_sniffing_is_counted(start: StartPlay) -> None:
    play = start(named())
    client = play.dial()
    client.sendall(b"18")
    play.run_until(lambda: play.server.clients, "client")
    play.loop.run_once(0.01)
    reset(client)
    play.wait_for_end(CloseReason.CLIENT_RESET)

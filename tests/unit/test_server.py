"""The server's side of a connection's life: real loopback sockets, a fake datapath, one process.

Each play is a script: what a peer does, and what the others see of it. The event loop runs only
while a play waits for something, so what happens between two waits is the play's choice.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyforwarder.core.connection import Life
from pyforwarder.core.keepalive import OFF
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath import copying
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.copying import CopyDatapath
from pyforwarder.datapath.ebpf.abi import DatapathKind, PairState
from pyforwarder.datapath.ebpf.pair_table import read_records
from pyforwarder.datapath.proof.rig import loopback_pair
from pyforwarder.datapath.splice.keeper_asker import Asked
from pyforwarder.datapath.splice.question import Question
from pyforwarder.errors import ControlError
from pyforwarder.runtime import loop as loop_module
from pyforwarder.runtime.counters import (
    Counter,
    ListenerCounter,
    RuleCounter,
)
from pyforwarder.runtime.raw_sockets import accept, write_last
from pyforwarder.worker import accepting, handover, plain, refusing, sniffer
from pyforwarder.worker.adopting import cookie_of
from pyforwarder.worker.handover import Handover
from pyforwarder.worker.udp.session import Session
from tests.helpers.clock import Clock
from tests.helpers.fake_datapath import FakeDatapath
from tests.helpers.instruction import ACK, instruction, refusal
from tests.helpers.netns import blackhole
from tests.helpers.peers import pattern, unused_port
from tests.helpers.stream_play import (
    DEADLINE_S,
    LINGER_RESET,
    Play,
    Servers,
    SlowNames,
    StartPlay,
    listening_socket,
    named,
    to,
)

if TYPE_CHECKING:
    from pyforwarder.datapath.base import Pair, PairHost
    from pyforwarder.datapath.sockmap import SockmapDatapath
    from pyforwarder.datapath.splice.datapath import SpliceDatapath
    from pyforwarder.datapath.splice.question import Then


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    sock.close()


# Bytes before, between and after


def test_bytes_behind_the_instruction_come_first_and_once(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named())
    listening, address = servers()
    client = play.dial()
    client.sendall(instruction(address) + b"first")
    server = play.accept(listening)
    assert play.read(client, 6) == ACK
    assert play.read(server, 5) == b"first"
    client.sendall(b" second")
    assert play.read(server, 7) == b" second"
    server.sendall(b"answer")
    assert play.read(client, 6) == b"answer"


def test_receive_data_before_server_connected(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch)
    play = start(named())
    listening, address = servers()
    client = play.dial()
    port = address.rpartition(":")[2]
    client.sendall(instruction(f"server.test:{port}") + b"one ")
    play.run_until(lambda: names.asked == ["server.test"], "question")
    client.sendall(b"two ")
    play.loop.run_once(0.01)
    client.sendall(b"three")
    play.loop.run_once(0.01)
    assert play.only_client().life is Life.CONNECTING
    names.release()
    server = play.accept(listening)
    assert play.read(server, 13) == b"one two three"
    assert play.read(client, 6) == ACK


def test_receive_fin_before_server_connected(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch)
    play = start(named())
    listening, address = servers()
    client = play.dial()
    port = address.rpartition(":")[2]
    client.sendall(instruction(f"server.test:{port}") + b"all I have to say")
    client.shutdown(socket.SHUT_WR)
    play.run_until(lambda: names.asked, "question")
    names.release()
    server = play.accept(listening)
    assert play.read_end(server) == (b"all I have to say", "eof")
    server.sendall(b"and the answer")
    server.close()
    assert play.read_end(client) == (ACK + b"and the answer", "eof")
    play.wait_for_end(CloseReason.FINISHED)


def test_receive_data_after_half_close(start: StartPlay, servers: Servers) -> None:
    play = start(named())
    client, server = play.joined(*servers())
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    assert play.read_end(server) == (b"request", "eof")
    for number in range(5):
        server.sendall(b"part %d" % number)
        assert play.read(client, 6) == b"part %d" % number
    assert play.closed(CloseReason.FINISHED) == 0
    server.shutdown(socket.SHUT_WR)
    assert play.read_end(client) == (b"", "eof")
    play.wait_for_end(CloseReason.FINISHED)


def written_last(
    monkeypatch: pytest.MonkeyPatch, outcome: Callable[[int, bytes], int] = write_last
) -> list[bytes]:
    """What is written for FIN to go with it; `outcome` writes instead."""
    seen: list[bytes] = []

    def write(fd: int, last: bytes) -> int:
        seen.append(last)
        return outcome(fd, last)

    monkeypatch.setattr(copying, "write_last", write)
    return seen


def answered_and_ended(play: Play, servers: Servers) -> tuple[socket.socket, socket.socket]:
    """A pair whose server has sent an answer and FIN, before the forwarder sees any of it."""
    client, server = play.joined(*servers())
    server.sendall(b"answer")
    server.shutdown(socket.SHUT_WR)
    return client, server


def test_fin_that_has_come_behind_a_message_goes_on_with_it(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = written_last(monkeypatch)
    play = start(named())
    client, server = answered_and_ended(play, servers)
    pair = play.only_client()
    assert play.read_end(client) == (b"answer", "eof")
    assert written == [b"answer"]
    assert (pair.down.carried_bytes, pair.down.carried_packets) == (6, 1)
    client.sendall(b"thanks")  # the other direction goes on
    client.close()
    assert play.read_end(server) == (b"thanks", "eof")
    assert written == [b"answer", b"thanks"]
    play.wait_for_end(CloseReason.FINISHED)


@pytest.mark.parametrize("takes", [0, 2])
def test_what_has_no_room_in_front_of_fin_is_written_before_it(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, takes: int
) -> None:
    def take_some(fd: int, last: bytes) -> int:
        return os.write(fd, last[:takes]) or -errno.EAGAIN

    written_last(monkeypatch, take_some)
    play = start(named())
    client, server = answered_and_ended(play, servers)
    assert play.read_end(client) == (b"answer", "eof")
    client.close()
    assert play.read_end(server) == (b"", "eof")
    play.wait_for_end(CloseReason.FINISHED)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ECONNRESET, CloseReason.CLIENT_RESET),
        (errno.ETIMEDOUT, CloseReason.CLIENT_TIMEOUT),
    ],
)
def test_a_client_that_is_gone_as_the_last_bytes_are_written_ends_the_pair(
    start: StartPlay,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    reason: CloseReason,
) -> None:
    written_last(monkeypatch, lambda _fd, _last: -code)
    play = start(named())
    client, server = answered_and_ended(play, servers)
    assert play.read_end(client) == (b"", "reset")
    assert play.read_end(server) == (b"", "reset")
    play.wait_for_end(reason)


@pytest.mark.parametrize(
    ("behind", "end"),
    [
        (b" and more", (b"answer and more", "eof")),
        (BlockingIOError(errno.EAGAIN, "nothing"), (b"answer", "eof")),
        (ConnectionResetError(errno.ECONNRESET, "reset"), (b"answer", "reset")),
    ],
)
def test_what_a_second_read_finds_in_place_of_the_end_is_carried_on(
    start: StartPlay,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    behind: bytes | OSError,
    end: tuple[bytes, str],
) -> None:
    """More of it (a read stops at an urgent byte), nothing after all, or that all is over."""
    reads: list[bytes | OSError] = []

    def read(fd: int, most: int) -> bytes:
        if not reads:
            data = os.read(fd, most)
            if data == b"answer":
                reads.append(behind)
            return data
        found = reads.pop()
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(copying, "_read", read)
    written = written_last(monkeypatch)
    play = start(named())
    client, server = answered_and_ended(play, servers)
    if isinstance(behind, BlockingIOError):
        assert play.read(client, 6) == b"answer"
        server.close()
        client.close()
        play.wait_for_end(CloseReason.FINISHED)
    else:
        assert play.read_end(client) == end
    assert written == []
    if end[1] == "reset":
        play.wait_for_end(CloseReason.SERVER_RESET)


def test_server_that_speaks_first_is_heard_behind_the_answer(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named())
    listening, address = servers()
    client = play.dial()
    client.sendall(instruction(address))
    server = play.accept(listening)
    server.sendall(b"banner")
    server.shutdown(socket.SHUT_WR)
    assert play.read_end(client) == (ACK + b"banner", "eof")
    client.shutdown(socket.SHUT_WR)
    assert play.read_end(server) == (b"", "eof")


def test_bytes_that_are_carried_are_counted_without_what_is_ours(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named())
    listening, address = servers()
    client = play.dial()
    client.sendall(instruction(address) + b"x" * 23)
    server = play.accept(listening)
    server.sendall(b"y" * 7)
    assert play.read(client, 6 + 7) == ACK + b"y" * 7
    assert play.read(server, 23) == b"x" * 23
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    assert (play.counters[Counter.UP_BYTES], play.counters[Counter.DOWN_BYTES]) == (23, 7)


@pytest.mark.parametrize("named_first", [False, True])
def test_urgent_byte_stays_in_its_place_and_holds_nothing_up(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, named_first: bool
) -> None:
    # A read stops in front of it: what is behind it must not wait for the next segment.
    listening, address = servers()
    names = SlowNames(monkeypatch)
    play = start(named("datapath: copy"))
    client = play.dial()
    port = address.rpartition(":")[2]
    head = instruction(f"server.test:{port}")
    if named_first:
        # The urgent byte comes while the server is being connected.
        client.sendall(head)
        play.run_until(lambda: names.asked, "question")
        client.sendall(b"abc")
    else:
        client.sendall(head[:9])
        client.send(head[9:10], socket.MSG_OOB)
        client.sendall(head[10:] + b"abc")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"def")
    play.loop.run_once(0.01)
    names.release()
    server = play.accept(listening)
    assert play.read(server, 7) == b"abc!def"
    server.sendall(b"xyz")
    server.send(b"?", socket.MSG_OOB)
    server.sendall(b"uvw")
    assert play.read(client, 6 + 7) == ACK + b"xyz?uvw"


# Connecting


def dead_server() -> str:
    return f"127.0.0.1:{unused_port()}"


@pytest.mark.parametrize(
    "rules",
    [
        "{match: any, to: '%s'}",
        "{match: {not: {client: 10.0.0.0/8}}, to: '%s'}",
        "{match: [{client: 10.0.0.0/8}, {client: 127.0.0.0/8}], to: '%s'}",
        "{match: {client: 10.0.0.0/8, tls: {}}, reject: reset}, {match: any, to: '%s'}",
    ],
)
def test_server_that_speaks_first_is_heard_where_no_byte_is_needed_to_decide(
    rules: str, start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    play = start(
        "listeners: [{name: main, bind: '127.0.0.1:0', first_packet: {timeout: 1h},"
        f" rules: [{rules % address}]}}]"
    )
    client = play.dial()
    play.accept(listening).sendall(b"220 hello")
    assert play.read(client, 9) == b"220 hello"


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


def test_open_connection_error_tries_the_next_server(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    dead = dead_server()
    backup = f"{{address: '{address}', backup: true}}"
    play = start(to("web", f"upstreams: {{web: {{servers: ['{dead}', {backup}]}}}}"))
    client = play.dial()
    client.sendall(b"hello")
    server = play.accept(listening)
    assert play.read(server, 5) == b"hello"
    state = play.server.servers.rows()["web"]
    assert (state[dead]["connects"], state[dead]["failures"], state[dead]["pairs"]) == (0, 1, 0)
    assert (state[address]["connects"], state[address]["pairs"]) == (1, 1)
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    assert play.server.servers.rows()["web"][address]["pairs"] == 0


def test_open_connection_error_without_a_next_server_is_told(
    start: StartPlay, servers: Servers
) -> None:
    del servers
    play = start(named())
    client = play.dial()
    client.sendall(instruction(dead_server()))
    assert play.read_end(client) == (refusal("refused"), "eof")
    client.close()
    play.wait_for_end(CloseReason.REFUSED)


def test_client_without_words_for_it_is_reset(start: StartPlay) -> None:
    play = start(to(dead_server()))
    client = play.dial()
    client.sendall(b"hello")
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.REFUSED)


def test_nothing_is_held_of_a_server_that_a_client_is_through_with(
    start: StartPlay, servers: Servers
) -> None:
    listening, address = servers()
    with blackhole() as (host, port):
        listed = f"'{dead_server()}', '{host}:{port}', {{address: '{address}', backup: true}}"
        play = start(
            to(
                "web",
                f"upstreams: {{web: {{servers: [{listed}], balance: least_pairs,"
                " eject: {failures: 0}, connect_timeout: 200ms}}",
            )
        )

        def held() -> list[int]:
            return [server.held.total() for server in play.generation.balancers["web"].servers]

        client = play.dial()
        client.sendall(b"hello")
        # Already while it is being connected, and by one server at a time.
        play.run_until(lambda: held() == [0, 1, 0], "attempt")
        served = play.accept(listening)
        play.run_until(lambda: held() == [0, 0, 1], "pair")
        served.close()
        client.close()
        play.run_until(lambda: held() == [0, 0, 0], "end of the pair")
        gone = play.dial()
        gone.sendall(b"hello")
        play.run_until(lambda: held() == [0, 1, 0], "attempt")
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        gone.close()
        play.run_until(lambda: held() == [0, 0, 0], "end of the client")


def test_very_many_dead_servers_are_only_dead_servers(start: StartPlay, tmp_path: Path) -> None:
    # Each fails at once, within connect(2): nothing may be stacked up by that.
    listed = ", ".join(f"'unix:{tmp_path}/{n}'" for n in range(400))
    play = start(to("web", f"upstreams: {{web: {{servers: [{listed}]}}}}"))
    client = play.dial()
    client.sendall(b"hello")
    assert play.read_end(client) == (b"", "reset")
    assert play.closed(CloseReason.INTERNAL) == 0
    play.wait_for_end(CloseReason.REFUSED)


def test_server_that_does_not_answer_is_given_up_in_time(start: StartPlay) -> None:
    with blackhole() as (host, port):
        play = start(named("timeouts: {connect: 1h}"))
        client = play.dial()
        client.sendall(instruction(f"{host}:{port}"))
        play.run_until(lambda: play.server.clients, "client")
        play.run_until(lambda: play.only_client().life is Life.CONNECTING, "attempt")
        play.pass_time(3600.0 - DEADLINE_S)
        assert play.only_client().life is Life.CONNECTING
        play.pass_time(DEADLINE_S)
        assert play.read_end(client) == (refusal("timeout"), "eof")
        client.close()
        play.wait_for_end(CloseReason.TIMEOUT)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_server_that_answers_late_is_waited_for(start: StartPlay, family: int) -> None:
    # A server of this host answers within connect(2), unless it has no room: then its kernel does
    # not answer, and is asked again after a second.
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        listening.listen(0)
        listening.setblocking(False)
        host, port, *_ = listening.getsockname()
        play = start(named())
        with socket.create_connection((host, port), timeout=DEADLINE_S):
            client = play.dial()
            address = f"{host}:{port}" if family == socket.AF_INET else f"[{host}]:{port}"
            client.sendall(instruction(address) + b"first")
            play.run_until(lambda: play.server.clients, "client")
            play.loop.run_once(0.01)
            assert play.only_client().life is Life.CONNECTING
            client.sendall(b" second")
            play.loop.run_once(0.01)
            play.own(listening.accept()[0])
            server = play.accept(listening)
            assert play.read(client, 6) == ACK
            assert play.read(server, 12) == b"first second"
            server.sendall(b"answer")
            assert play.read(client, 6) == b"answer"


def test_server_that_resets_at_once_resets_the_client(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    play = start(named())
    client, server = play.joined(listening, address)
    reset(server)
    assert play.read_end(client) == (b"", "reset")
    play.wait_for_end(CloseReason.SERVER_RESET)


@pytest.mark.parametrize("gone", ["reset", "closed"])
def test_client_gone_while_connecting_costs_nothing_later(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    names = SlowNames(monkeypatch)
    listening, address = servers()
    play = start(named("limits: {pairs: 1}"))
    client = play.dial()
    client.sendall(instruction(f"server.test:{address.rpartition(':')[2]}"))
    play.run_until(lambda: names.asked, "question")
    assert play.limits.pairs == 1
    if gone == "reset":
        reset(client)
        play.wait_for_end(CloseReason.CLIENT_RESET)
        # The answer comes to nobody.
        names.release()
        play.loop.run_once(0.05)
    else:
        client.close()
        names.release()
        # It is connected all the same; then its acknowledgement meets a closed socket.
        play.accept(listening)
        play.wait_for_end(CloseReason.CLIENT_RESET)
    play.run_until(lambda: play.limits.pairs == 0, "place")
    play.joined(listening, address)


def test_name_that_nobody_knows_is_told(start: StartPlay, monkeypatch: pytest.MonkeyPatch) -> None:
    names = SlowNames(monkeypatch, hosts=[])
    names.release()
    play = start(named())
    client = play.dial()
    client.sendall(instruction("nowhere.test:80"))
    assert play.read_end(client) == (refusal("unresolved"), "eof")
    client.close()
    play.wait_for_end(CloseReason.UNRESOLVED)


def test_name_with_one_forbidden_address_is_denied(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch, hosts=["127.0.0.1", "192.0.2.1"])
    names.release()
    play = start(named())
    client = play.dial()
    client.sendall(instruction("mixed.test:80"))
    assert play.read_end(client) == (refusal("denied"), "eof")
    client.close()
    play.wait_for_end(CloseReason.DENIED)


def test_name_that_takes_too_long_is_given_up(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch)
    play = start(named("timeouts: {connect: 50ms}"))
    client = play.dial()
    client.sendall(instruction("slow.test:80"))
    assert play.read_end(client) == (refusal("timeout"), "eof")
    client.close()
    play.wait_for_end(CloseReason.TIMEOUT)
    names.release()
    play.loop.run_once(0.05)


# Refusals


@pytest.mark.parametrize(
    ("sent", "code", "reason"),
    [
        (instruction("192.0.2.1:80"), "denied", CloseReason.DENIED),
        (instruction("169.254.169.254:80"), "denied", CloseReason.DENIED),
        (instruction("127.0.0.1:80")[:-2] + b"01", "malformed", CloseReason.MALFORMED),
    ],
)
def test_refused_client_is_told_why(
    start: StartPlay, sent: bytes, code: str, reason: CloseReason
) -> None:
    play = start(named())
    client = play.dial()
    client.sendall(sent + b"and payload that nobody reads")
    assert play.read_end(client) == (refusal(code), "eof")
    assert play.only_client().life is Life.REFUSING
    client.close()
    play.wait_for_end(reason)
    assert play.counters[play.state.counter + ListenerCounter.REFUSED] == 1


def test_refused_client_that_stays_is_ended(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusing, "REFUSAL_LINGER_S", 3600.0)
    play = start(named())
    client = play.dial()
    client.sendall(instruction("192.0.2.1:80"))
    assert play.read_end(client)[1] == "eof"
    play.pass_time(3600.0 - DEADLINE_S)
    assert play.closed(CloseReason.DENIED) == 0
    play.pass_time(DEADLINE_S)
    assert play.closed(CloseReason.DENIED) == 1


def test_refused_client_that_goes_on_sending_is_not_read_for_ever(
    start: StartPlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusing, "REFUSAL_LINGER_S", 3600.0)
    play = start(named())
    client = play.dial()
    client.sendall(instruction("192.0.2.1:80"))

    def push() -> bool:
        with contextlib.suppress(BlockingIOError, ConnectionResetError, BrokenPipeError):
            client.send(bytes(1 << 16))
        return play.closed(CloseReason.DENIED) == 1

    play.run_until(push, "end")


def test_own_listener_is_denied(start: StartPlay) -> None:
    play = start(named())
    client = play.dial()
    host, port = play.address
    client.sendall(instruction(f"{host}:{port}"))
    assert play.read_end(client) == (refusal("denied"), "eof")


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


# Limits


def test_pair_beyond_the_limit_is_told_busy(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    play = start(named("limits: {pairs: 1}"))
    client, server = play.joined(listening, address)
    second = play.dial()
    second.sendall(instruction(address))
    assert play.read_end(second) == (refusal("busy"), "eof")
    second.close()
    play.wait_for_end(CloseReason.BUSY)
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    play.joined(listening, address)
    rule = play.state.rule_counters[0]
    assert play.counters[rule + RuleCounter.TAKEN] == 2
    assert play.counters[rule + RuleCounter.REFUSED] == 1


def test_client_beyond_its_limit_is_told_busy(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    play = start(named("limits: {pairs_per_client: 2}"))
    play.joined(listening, address)
    client, server = play.joined(listening, address)
    third = play.dial()
    third.sendall(instruction(address))
    assert play.read_end(third) == (refusal("busy"), "eof")
    third.close()
    play.wait_for_end(CloseReason.BUSY)
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    play.joined(listening, address)


def test_flood_beyond_the_rate_is_reset_once_too_many_listen(start: StartPlay) -> None:
    play = start(named("limits: {new_per_second: 1}"))
    clients = [play.dial() for _ in range(80)]
    play.run_until(lambda: play.counters[Counter.ACCEPTED] == 80, "clients")
    # One is admitted per second, 64 may ask and be told; the second may change meanwhile.
    assert 80 - 64 - 3 <= play.closed(CloseReason.BUSY) <= 80 - 64 - 1
    assert play.counters[Counter.OPEN] + play.closed(CloseReason.BUSY) == 80
    del clients


# Accepting


class Failing:
    """accept(2) of one listener, which fails as told before it works again."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.errors: list[int] = []

    def __call__(self, fd: int) -> int:
        if fd == self.listener.fileno() and self.errors:
            return -self.errors.pop(0)
        return accept(fd)


@pytest.fixture
def failing(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Play, Failing, str]]:
    """A play with another listener, which fails; and where it listens."""
    _, address = servers()
    play = start(named())
    with listening_socket() as listener:
        fails = Failing(listener)
        monkeypatch.setattr(accepting, "accept", fails)
        play.address = listener.getsockname()
        play.server.accepting.listen(listener, play.state)
        yield play, fails, address
        play.server.accepting.unlisten(listener)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_accept_without_descriptors_pauses_and_goes_on(
    failing: tuple[Play, Failing, str], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    play, fails, _ = failing
    fails.errors = [error]
    monkeypatch.setattr(accepting, "ACCEPT_PAUSE_S", 3600.0)
    play.dial()
    play.run_until(lambda: play.counters[Counter.ACCEPT_PAUSED], "pause")
    # Not tried again and again, although the listener is readable all the time.
    for _ in range(3):
        play.pass_time((3600.0 - DEADLINE_S) / 3)
        assert play.counters[Counter.ACCEPT_PAUSED] == 1
        assert not play.server.clients
    play.pass_time(DEADLINE_S)
    play.run_until(lambda: play.server.clients, "client")
    assert play.counters[Counter.ACCEPT_PAUSED] == 1


def test_connection_that_was_aborted_before_accept_is_passed_over(
    failing: tuple[Play, Failing, str],
) -> None:
    play, fails, _ = failing
    fails.errors = [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN]
    play.dial()
    play.run_until(lambda: play.server.clients, "client")
    assert fails.errors == []
    assert play.counters[Counter.ACCEPT_PAUSED] == 0


def test_accept_error_that_nobody_expects_is_a_fault(failing: tuple[Play, Failing, str]) -> None:
    play, fails, _ = failing
    fails.errors = [errno.EBADF]
    play.dial()
    with pytest.raises(OSError, match="Bad file descriptor"):
        play.run_until(lambda: not fails.errors, "error")


def test_listener_closed_during_its_pause_stays_closed(
    failing: tuple[Play, Failing, str],
) -> None:
    play, fails, _ = failing
    fails.errors = [errno.EMFILE]
    play.dial()
    play.run_until(lambda: play.counters[Counter.ACCEPT_PAUSED], "pause")
    play.server.accepting.unlisten(fails.listener)
    ran: list[int] = []
    play.loop.after(0.15, lambda: ran.append(1))
    play.run_until(lambda: ran, "end of the pause")
    assert play.counters[Counter.ACCEPTED] == 0


def test_clients_that_wait_at_a_listener_that_goes_are_served(
    start: StartPlay, servers: Servers
) -> None:
    server, address = servers()
    play = start(named())
    clients = [play.dial() for _ in range(5)]
    for client in clients:
        client.sendall(instruction(address))
    assert play.counters[Counter.ACCEPTED] == 0
    play.server.accepting.accept_rest(play.listener)
    play.server.accepting.unlisten(play.listener)
    play.listener.close()
    assert play.counters[Counter.ACCEPTED] == 5
    for client in clients:
        assert play.read(client, len(ACK)) == ACK
    del server


def test_clients_are_accepted_in_batches(start: StartPlay) -> None:
    play = start(named())
    clients = [play.dial() for _ in range(23)]
    play.loop.run_once(0.01)
    assert play.counters[Counter.ACCEPTED] == 16
    play.loop.run_once(0.01)
    assert play.counters[Counter.ACCEPTED] == 23
    del clients


# Handover


EAGER: Final = "handover: {after_bytes: 0}"


def test_handed_over_pair_goes_on_where_copy_left_off(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    play = start(named(EAGER))
    client = play.dial()
    client.sendall(instruction(address) + b"copied, ")
    server = play.accept(listening)
    play.run_until(lambda: play.fake.joined == 1, "handover")
    pair = play.only_client()
    assert (pair.kind, pair.pair_reason) == (DatapathKind.SOCKMAP, PairReason.BEST)
    client.sendall(b"moved")
    assert play.read(server, 13) == b"copied, moved"
    assert play.read(client, 6) == ACK
    assert play.counters[Counter.JOINED_SOCKMAP] == 1
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    assert play.counters[Counter.UP_BYTES] == 13


def test_pair_that_ends_right_after_its_handover_is_not_shown_later(
    start: StartPlay, servers: Servers
) -> None:
    # The handover has made its record, before the clock would have.
    play = start(named(EAGER))
    listening, address = servers()
    client, server = play.joined(listening, address)
    play.run_until(lambda: play.fake.joined, "handover")
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    passed: list[int] = []
    play.loop.after(0.05, lambda: passed.append(1))
    play.run_until(lambda: passed, "end of the time after which a connection is shown")
    assert list(read_records(play._memory)) == []


def test_stalled_datapath_keeps_every_byte_in_order(start: StartPlay, servers: Servers) -> None:
    play = start(named(EAGER))
    client, server = play.joined(*servers())
    play.run_until(lambda: play.fake.joined == 1, "handover")
    play.fake.pause()
    client.sendall(b"one ")
    server.sendall(b"three ")
    client.shutdown(socket.SHUT_WR)
    play.loop.run_once(0.01)
    with pytest.raises(BlockingIOError):
        server.recv(1)
    play.fake.resume()
    assert play.read_end(server) == (b"one ", "eof")
    assert play.read(client, 6) == b"three "


def test_reset_is_noticed_while_the_datapath_stands_still(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    client, server = play.joined(*servers())
    play.run_until(lambda: play.fake.joined == 1, "handover")
    play.fake.pause()
    reset(client)
    assert play.read_end(server) == (b"", "reset")
    play.wait_for_end(CloseReason.CLIENT_RESET)


@pytest.mark.parametrize("reason", [PairReason.MAP_FULL, PairReason.REFUSED_BY_KERNEL])
def test_pair_that_the_datapath_refuses_is_copied_and_says_why(
    start: StartPlay, servers: Servers, reason: PairReason
) -> None:
    play = start(named(EAGER))
    play.fake.refuse_with = reason
    client, server = play.joined(*servers())
    play.run_until(lambda: play.only_client().pair_reason is reason, "refusal")
    assert play.only_client().kind is DatapathKind.COPY
    client.sendall(b"still moving")
    assert play.read(server, 12) == b"still moving"


def test_pair_earns_its_handover_by_round_trips(start: StartPlay, servers: Servers) -> None:
    play = start(named("handover: {after_round_trips: 2, after: 1h}"))
    client, server = play.joined(*servers())
    for _ in range(2):
        assert play.fake.joined == 0
        client.sendall(b"ask")
        assert play.read(server, 3) == b"ask"
        server.sendall(b"answer")
        assert play.read(client, 6) == b"answer"
    play.run_until(lambda: play.fake.joined == 1, "handover")


def test_pair_earns_its_handover_by_age(start: StartPlay, servers: Servers) -> None:
    play = start(named("handover: {after: 50ms}"))
    play.joined(*servers())
    play.run_until(lambda: play.fake.joined == 1, "handover")
    assert play.counters[Counter.JOINED_SOCKMAP] == 1


def test_handover_that_is_put_off_does_not_keep_the_loop_busy(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `after: 0s` hands over at once, but bytes that the server does not take stand in the way.
    play = start(named("handover: {after: 0s}"))
    play.fake.refuse_with = PairReason.UNREAD_BYTES
    play.joined(*servers())
    with monkeypatch.context() as patched:
        clock = Clock()
        patched.setattr(loop_module, "time", clock)
        end_s = clock.now_s + 0.3
        for _ in range(60):
            clock.pass_time(play.loop._timeout_s())  # nothing happens meanwhile
            play.loop.run_once(0)
    assert clock.now_s >= end_s
    play.fake.refuse_with = None
    play.run_until(lambda: play.fake.joined == 1, "handover")


def test_pair_waits_for_what_is_not_proven_yet(start: StartPlay, servers: Servers) -> None:
    play = start(named(EAGER))
    play.server.handover = Handover(play.server, cast("SockmapDatapath", play.fake))
    client, server = play.joined(*servers())
    client.sendall(b"copied, ")
    assert play.read(server, 8) == b"copied, "
    assert play.fake.joined == 0
    assert play.only_client().waits_for_handover
    play.server.handover.settle(sockmap=True, splice=False)
    play.run_until(lambda: play.fake.joined == 1, "handover")
    client.sendall(b"moved")
    assert play.read(server, 5) == b"moved"


def test_pairs_that_waited_for_what_is_proven_are_handed_over_a_few_at_a_time(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an upgrade these may be thousands, and all others would stand still meanwhile."""
    monkeypatch.setattr(handover, "_MOST_IN_A_TURN", 2)
    play = start(named(EAGER))
    play.server.handover = Handover(play.server, cast("SockmapDatapath", play.fake))
    listening, address = servers()
    for _ in range(7):
        play.joined(listening, address)
    turns = [0]
    play.server.handover.settle(sockmap=True, splice=False)
    while play.fake.joined < 7:
        play.loop.run_once(0.002)
        turns.append(play.fake.joined)
    assert max(after - before for before, after in itertools.pairwise(turns)) <= 2


def test_pair_that_has_waited_in_vain_is_copied_for_good(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    play.server.handover = Handover(play.server, cast("SockmapDatapath", play.fake))
    client, server = play.joined(*servers())
    client.sendall(b"copied, ")
    assert play.read(server, 8) == b"copied, "
    play.server.handover.settle(sockmap=False, splice=False)
    play.run_until(lambda: not play.only_client().waits_for_handover, "the answer")
    assert play.only_client().pair_reason is PairReason.NOT_AVAILABLE
    client.sendall(b"as before")
    assert play.read(server, 9) == b"as before"


class FakeSplice(FakeDatapath):
    """The same in splice's place; its keeper is what refuses, or is silent until `answer`."""

    kind = DatapathKind.SPLICE

    def __init__(self, host: PairHost) -> None:
        super().__init__(host)
        self.asked: list[Pair] = []
        self.is_silent = False
        self.open: dict[Pair, Question] = {}
        self.lesson: Question | None = None
        self.takes_any_interface = False
        self.keepalive = OFF

    @property
    def is_busy(self) -> bool:
        """Two at once are enough."""
        return len(self.open) >= 2

    def expect(self, pair: Pair) -> None:
        """Nothing is to be locked."""

    def ask(self, pair: Pair, then: Then) -> PairReason | None:
        """Ask the keeper; counts how often."""
        self.asked.append(pair)
        if self.refuse_with is not None and not self.is_silent:
            return self.refuse_with
        assert isinstance(pair.datapath, CopyDatapath)
        question = Question(
            self._loop, pair, pair.datapath, Asked(lambda *_: None), then, self.answer_one
        )
        self.open[pair] = question
        if not self.is_silent:
            self._loop.defer(self.answer_one, question)
        return None

    @property
    def can_teach(self) -> bool:
        """One at a time is enough."""
        return self.lesson is None

    def teach(self, pair: Pair, then: Callable[[Pair], None]) -> bool:
        """Have the keeper look at the pair's server, until `look`."""
        if not self.can_teach:
            return False
        assert isinstance(pair.datapath, CopyDatapath)
        asked = Asked(lambda *_: None)
        self.lesson = Question(
            self._loop, pair, pair.datapath, asked, lambda pair, _: then(pair), lambda _: None
        )
        return True

    def look(self) -> None:
        """As SpliceDatapath does when the keeper has."""
        lesson, self.lesson = self.lesson, None
        assert lesson is not None
        assert lesson.pair is not None
        lesson.release(lesson.pair)
        lesson.resume_copy(lesson.pair)
        if lesson.ends_with is not None:
            self._host.broken(lesson.pair, lesson.ends_with)
        lesson.then(lesson.pair, None)

    def answer_one(self, question: Question) -> None:
        """As SpliceDatapath does."""
        pair = question.pair
        if pair is None:
            return
        del self.open[pair]
        question.release(pair)
        reason = self.join(pair)
        if reason is not None:
            question.resume_copy(pair)
        if question.ends_with is not None:
            self._host.broken(pair, question.ends_with)
        question.then(pair, reason)

    def finish_questions(self) -> None:
        """Answer all that are open."""
        while self.open:
            self.answer_one(next(iter(self.open.values())))

    def finish_ends(self) -> bool:
        """The keeper hears of all of them."""
        while self.ends:
            self.ends.pop(0)()
        return True


def splicing(play: Play, *, sockmap: bool = True) -> FakeSplice:
    """The play has a splice from now on, whose keeper does not answer."""
    splice = FakeSplice(play.server)
    splice.refuse_with = PairReason.NO_KEEPER
    play.server.handover = Handover(
        play.server, cast("SockmapDatapath", play.fake), cast("SpliceDatapath", splice)
    )
    play.server.handover.settle(sockmap=sockmap, splice=True)
    return splice


@pytest.mark.parametrize("datapath", ["auto", "splice"])
def test_pair_whose_keeper_did_not_answer_is_asked_for_again(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, datapath: str
) -> None:
    hour_s = 3600.0
    monkeypatch.setattr(handover, "_KEEPER_PAUSES_S", (hour_s, hour_s))
    play = start(named(f"{EAGER}\ntimeouts: {{idle: 1d}}\ndatapath: {datapath}"))
    splice = splicing(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.asked, "question")
    pair = play.only_client()
    assert (pair.kind, pair.pair_reason) == (DatapathKind.COPY, PairReason.NO_KEEPER)
    asked = len(splice.asked)
    for _ in range(20):  # bytes do not ask earlier
        client.sendall(b"copied")
        assert play.read(server, 6) == b"copied"
    assert len(splice.asked) == asked == 1

    def pass_time() -> None:
        play.loop.deadlines.run_expired(time.monotonic() + 2 * hour_s, play.loop.on_error)

    pass_time()
    play.run_until(lambda: len(splice.asked) == 2, "second question")
    assert pair.kind is DatapathKind.COPY
    splice.refuse_with = None
    pass_time()
    play.run_until(lambda: splice.joined == 1, "handover")
    assert play.only_client().kind is DatapathKind.SPLICE
    assert pair.pair_reason is (PairReason.FORCED if datapath == "splice" else PairReason.BEST)
    assert play.counters[Counter.JOINED_SPLICE] == 1
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)


def test_pair_whose_keeper_never_answers_goes_the_next_best_way(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s = (0.01, 0.02, 0.03)
    monkeypatch.setattr(handover, "_KEEPER_PAUSES_S", pauses_s)
    play = start(named(EAGER))
    splice = splicing(play)
    play.joined(*servers())
    play.run_until(lambda: play.fake.joined == 1, "handover")
    pair = play.only_client()
    assert (pair.kind, pair.pair_reason) == (DatapathKind.SOCKMAP, PairReason.NO_KEEPER)
    assert len(splice.asked) == 1 + len(pauses_s)


def test_pair_that_ends_while_it_waits_for_the_keeper_is_forgotten(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = splicing(play)
    client, _ = play.joined(*servers())
    play.run_until(lambda: splice.asked, "question")
    reset(client)
    play.wait_for_end(CloseReason.CLIENT_RESET)
    assert play.loop.deadlines.next_s() is None


def test_pairs_that_waited_for_the_keeper_are_asked_for_a_few_at_a_time(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_KEEPER_PAUSES_S", (0.01,))
    monkeypatch.setattr(handover, "_MOST_IN_A_TURN", 2)
    play = start(named(EAGER))
    splice = splicing(play)
    listening, address = servers()
    for _ in range(7):
        play.joined(listening, address)
    play.run_until(lambda: len(splice.asked) >= 7, "questions")
    turns = [len(splice.asked)]
    while len(splice.asked) < 14:
        play.loop.run_once(0.002)
        turns.append(len(splice.asked))
    assert max(after - before for before, after in itertools.pairwise(turns)) <= 2
    play.run_until(lambda: play.fake.joined == 7, "handovers")


# While the keeper is asked


def silent(play: Play) -> FakeSplice:
    """The play's keeper has nothing against a pair, and does not answer by itself.

    Pairs that it refuses are copied: a sockmap would look at their sockets anew.
    """
    splice = splicing(play, sockmap=False)
    splice.is_silent = True
    splice.refuse_with = None
    return splice


@pytest.mark.parametrize("refusal", [None, PairReason.MAP_FULL, PairReason.UNREAD_BYTES])
def test_what_comes_while_the_keeper_is_asked_waits_for_its_answer(
    start: StartPlay, servers: Servers, refusal: PairReason | None
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.open, "question")
    splice.refuse_with = refusal
    client.sendall(b"up")
    server.sendall(b"down")
    if refusal is not None:  # a spliced pair's FIN is not ours to carry on
        client.shutdown(socket.SHUT_WR)
    for _ in range(5):
        play.loop.run_once(0.01)
    pair = play.only_client()
    assert pair.kind is DatapathKind.COPY
    assert (pair.up.carried_bytes, pair.down.carried_bytes) == (0, 0)
    splice.finish_questions()
    splice.refuse_with = refusal and PairReason.MAP_FULL
    splice.is_silent = False
    if refusal is None:
        assert (play.read(server, 2), play.read(client, 4)) == (b"up", b"down")
        return
    assert play.read_end(server) == (b"up", "eof")
    server.shutdown(socket.SHUT_WR)
    assert play.read_end(client) == (b"down", "eof")
    play.wait_for_end(CloseReason.FINISHED)


EXPRESS: Final = "datapath: express"


def taught(play: Play) -> FakeSplice:
    """The play's kernel may open connections, and its keeper looks at each server once."""
    splice = silent(play)
    play.server.handover.settle(sockmap=False, splice=True, express=True)
    return splice


def test_a_pair_stands_still_while_the_keeper_looks_how_its_server_is_reached(
    start: StartPlay, servers: Servers
) -> None:
    """Were it over by then, nobody could see how: a service of short connections never would be."""
    play = start(named(EXPRESS))
    splice = taught(play)
    listening, address = servers()
    client, server = play.joined(listening, address)
    assert splice.lesson is not None
    client.sendall(b"up")
    server.sendall(b"down")
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    for _ in range(5):
        play.loop.run_once(0.01)
    assert play.only_client().kind is DatapathKind.COPY
    splice.look()
    assert play.read_end(server) == (b"up", "eof")
    assert play.read_end(client) == (b"down", "eof")
    play.wait_for_end(CloseReason.FINISHED)
    # A second later at the earliest it is looked at again.
    client, server = play.joined(listening, address)
    assert splice.lesson is None
    client.sendall(b"again")
    assert play.read(server, 5) == b"again"


def test_a_server_for_which_the_keeper_had_no_time_is_looked_at_with_its_next_connection(
    start: StartPlay, servers: Servers
) -> None:
    """Of a burst to many servers the others would be a worker's for a second."""
    play = start(named(EXPRESS))
    splice = taught(play)
    play.joined(*servers())
    first = splice.lesson
    listening, address = servers()
    client, server = play.joined(listening, address)
    assert splice.lesson is first
    client.sendall(b"meanwhile")
    assert play.read(server, 9) == b"meanwhile"
    splice.look()
    play.joined(listening, address)
    assert splice.lesson is not None
    splice.look()
    play.joined(listening, address)
    assert splice.lesson is None


def test_a_pair_whose_server_is_looked_at_earns_its_handover_afterwards(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(f"{EXPRESS}\nhandover: {{after_bytes: 0}}"))
    splice = taught(play)
    play.joined(*servers())
    pair = play.only_client()
    play.server.handover.aged(pair)
    play.loop.run_once(0.01)
    assert splice.asked == []
    splice.look()
    play.run_until(lambda: splice.open, "question")
    splice.finish_questions()
    assert splice.joined == 1


@pytest.mark.parametrize("how", ["reset", "flushed", "fault"])
def test_a_pair_that_ends_while_its_server_is_looked_at_ends_once(
    start: StartPlay, servers: Servers, how: str
) -> None:
    play = start(named(EXPRESS))
    splice = taught(play)
    client, server = play.joined(*servers())
    if how == "reset":
        reset(client)
    elif how == "flushed":
        play.server.flush_ids(None)
    else:
        play.server.failed(play.only_client(), ValueError("made up"))
        assert splice.lesson is not None
        assert splice.lesson.pair is None
        assert play.read_end(server) == (b"", "reset")
        return
    for _ in range(5):
        play.loop.run_once(0.01)
    splice.look()
    assert play.read_end(server) == (b"", "reset")
    play.wait_for_end(CloseReason.CLIENT_RESET if how == "reset" else CloseReason.FLUSHED)
    assert splice.asked == []


def test_nothing_of_a_pair_moves_while_the_keeper_is_asked_for_it(
    start: StartPlay, servers: Servers
) -> None:
    """In the middle of a conversation, with a turn of it due."""
    play = start(named("handover: {after_bytes: 8, after_round_trips: 1000, after: 1h}"))
    splice = silent(play)
    client, server = play.joined(*servers())
    client.sendall(b"x" * 100)
    assert play.read(server, 100) == b"x" * 100
    play.run_until(lambda: splice.open, "question")
    pair = play.only_client()
    play.loop.soon(pair, pair.client_fd)
    client.sendall(b"y" * 100)
    server.sendall(b"z" * 100)
    for _ in range(5):
        play.loop.run_once(0.01)
    assert (pair.up.carried_bytes, pair.down.carried_bytes) == (100, 0)
    splice.refuse_with = PairReason.MAP_FULL
    splice.finish_questions()
    assert play.read(server, 100) == b"y" * 100
    assert play.read(client, 100) == b"z" * 100


def test_a_turn_that_was_due_as_the_keeper_was_asked_is_taken_after_its_answer(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is unread has told its edge before: no event tells it again."""
    monkeypatch.setattr(copying, "FAIR_SHARE_BYTES", 1)
    monkeypatch.setattr(copying, "READ_BYTES", 1000)
    play = start(named("handover: {after_bytes: 8, after_round_trips: 1000, after: 1h}"))
    play.server.copying.may_take_much = False
    splice = silent(play)
    client, server = play.joined(*servers())
    data = pattern(10 * copying.READ_BYTES)
    assert client.send(data) == len(data)
    play.run_until(lambda: splice.open, "question")
    play.loop.run_once(0.002)  # that turn comes
    splice.refuse_with = PairReason.MAP_FULL
    splice.finish_questions()
    assert play.read(server, len(data)) == data


@pytest.mark.parametrize("refusal", [None, PairReason.MAP_FULL])
def test_a_reset_while_the_keeper_is_asked_is_carried_on_after_its_answer(
    start: StartPlay, servers: Servers, refusal: PairReason | None
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.open, "question")
    splice.refuse_with = refusal
    reset(client)
    for _ in range(5):
        play.loop.run_once(0.01)
    assert play.closed(CloseReason.CLIENT_RESET) == 0
    splice.finish_questions()
    assert play.read_end(server) == (b"", "reset")
    play.wait_for_end(CloseReason.CLIENT_RESET)


@pytest.mark.parametrize("refusal", [None, PairReason.MAP_FULL])
def test_a_pair_that_is_flushed_while_the_keeper_is_asked_ends_after_its_answer(
    start: StartPlay, servers: Servers, refusal: PairReason | None
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.open, "question")
    splice.refuse_with = refusal
    assert play.server.flush_ids(None) == [play.only_client().id]
    assert play.server.flush_ids(None) == [play.only_client().id]
    play.loop.run_once(0.01)
    assert play.closed(CloseReason.FLUSHED) == 0
    splice.finish_questions()
    assert play.closed(CloseReason.FLUSHED) == 1
    for end in (client, server):
        assert play.read_end(end) == (b"", "reset")
    assert splice.joined == splice.left == (refusal is None)


def test_a_fault_of_ours_while_the_keeper_is_asked_ends_the_pair_at_once(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.open, "question")
    play.server.failed(play.only_client(), ValueError("made up"))
    for end in (client, server):
        assert play.read_end(end) == (b"", "reset")
    ((_, question),) = splice.open.items()
    assert question.pair is None
    splice.open.clear()


def test_pairs_wait_copied_while_the_keeper_is_asked_for_others(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    listening, address = servers()
    pairs = [play.joined(listening, address) for _ in range(5)]
    assert len(splice.open) == 2
    client, server = pairs[-1]
    client.sendall(b"copied")
    assert play.read(server, 6) == b"copied"
    gone, _ = pairs[3]
    reset(gone)
    play.wait_for_end(CloseReason.CLIENT_RESET)
    splice.is_silent = False
    splice.finish_questions()
    play.run_until(lambda: splice.joined == 4, "all that are left")
    assert play.counters[Counter.JOINED_SPLICE] == 4


def test_a_worker_that_stops_knows_first_where_its_pairs_are(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    listening, address = servers()
    for _ in range(4):
        play.joined(listening, address)
    play.server.handover.finish()
    assert not splice.open
    assert (splice.joined, play.fake.joined) == (2, 0)
    play.server.reset_all(CloseReason.SHUTDOWN)
    assert splice.left == 2


@pytest.mark.parametrize("finishes", [False, True], ids=["flushed", "finished"])
def test_a_pair_whose_end_the_keeper_has_no_room_for_waits_for_it_with_its_sockets(
    start: StartPlay, servers: Servers, *, finishes: bool
) -> None:
    play = start(named(EAGER))
    splice = splicing(play, sockmap=False)
    splice.refuse_with = None
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.joined, "handover")
    splice.is_room = False
    if finishes:
        pair = play.only_client()
        for flow in (pair.up, pair.down):
            play.server.fin_seen(pair, flow)
            play.server.delivered(pair, flow)
    else:
        play.server.flush_ids(None)
    # With other orders meanwhile it ends once, for the first one's reason.
    assert play.server.flush_ids(None) == [play.only_client().id]
    play.server.reset_all(CloseReason.SHUTDOWN)
    play.server.expired(play.only_client())
    play.loop.run_once(0.01)
    pair = play.only_client()
    assert pair.life is Life.ENDING
    assert (splice.left, len(splice.ends)) == (0, 1)
    reason = CloseReason.FINISHED if finishes else CloseReason.FLUSHED
    assert play.closed(reason) == 0
    splice.finish_ends()
    assert splice.left == 1
    play.wait_for_end(reason)
    if not finishes:
        for end in (client, server):
            assert play.read_end(end) == (b"", "reset")


def test_a_fault_of_ours_ends_a_pair_that_waits_for_its_end(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = splicing(play, sockmap=False)
    splice.refuse_with = None
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.joined, "handover")
    splice.is_room = False
    play.server.flush_ids(None)
    play.server.failed(play.only_client(), ValueError("made up"))
    for end in (client, server):
        assert play.read_end(end) == (b"", "reset")
    assert splice.left == 1


# What may happen to a pair whose keeper answers late, in any order.
STEPS: Final = ("up", "down", "much up", "turn", "taken", "refused", "busy", "silent")
MUCH_BYTES: Final = 300_001


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    when=st.sampled_from([EAGER, "handover: {after_bytes: 8, after_round_trips: 1000, after: 1h}"]),
    steps=st.lists(st.sampled_from(STEPS), max_size=14),
    end=st.sampled_from(["close", "reset", "flush"]),
)
def test_no_byte_is_lost_or_comes_twice_whenever_the_keeper_answers(
    servers: Servers, when: str, steps: list[str], end: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handover, "_KEEPER_PAUSES_S", (0.001,) * 4)
        patch.setattr(handover, "_AGAIN_S", 0.001)
        play = Play(named(when))
        try:
            played_with_late_answers(play, servers(), steps, end)
        finally:
            play.close()


def played_with_late_answers(
    play: Play, server_at: tuple[socket.socket, str], steps: list[str], end: str
) -> None:
    splice = silent(play)
    client, server = play.joined(*server_at)
    sent = {"up": 0, "down": 0}
    answers = {
        "taken": None,
        "refused": PairReason.MAP_FULL,
        "busy": PairReason.UNREAD_BYTES,
        "silent": PairReason.NO_KEEPER,
    }
    for step in steps:
        if step in answers:
            splice.refuse_with = answers[step]
            splice.finish_questions()
        elif step == "turn":
            play.loop.run_once(0.002)
        else:
            sock, way = (server, "down") if step == "down" else (client, "up")
            size = MUCH_BYTES if step == "much up" else 7
            with contextlib.suppress(BlockingIOError):
                sent[way] += sock.send(pattern(size, start=sent[way]))
    if end == "flush":
        play.server.flush_ids(None)
    elif end == "reset":
        reset(client)
    splice.refuse_with = None
    splice.is_silent = False
    splice.finish_questions()
    pair = next(iter(play.server.clients.values()), None)
    assert pair is None or not isinstance(pair.datapath, Question)
    if end == "close":
        for sock, size in ((server, sent["up"]), (client, sent["down"])):
            assert not size or play.read(sock, size) == pattern(size)
        return
    got, ended = play.read_end(server)
    assert ended == "reset"
    assert got == pattern(sent["up"])[: len(got)]
    play.wait_for_end(CloseReason.FLUSHED if end == "flush" else CloseReason.CLIENT_RESET)


def test_copy_that_was_asked_for_is_not_handed_over(start: StartPlay, servers: Servers) -> None:
    play = start(named(EAGER + "\ndatapath: copy"))
    client, server = play.joined(*servers())
    client.sendall(b"x" * 1000)
    assert play.read(server, 1000) == b"x" * 1000
    assert play.only_client().pair_reason is PairReason.FORCED
    assert play.fake.joined == 0


# Faults of ours


@pytest.mark.parametrize("before", ["policy", "connect"])
def test_internal_error_at_accept_costs_one_connection_only(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    # Clients that have spoken by then are served from the listener's event.
    play = start(named())
    listening, address = servers()

    def fail(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        if before == "policy":
            patch.setattr(play.generation, "permits", fail)
        else:
            patch.setattr(plain, "reset_at_close", fail)
        unlucky = play.dial()
        unlucky.sendall(instruction(address))
        play.wait_for_end(CloseReason.INTERNAL)
        assert play.read_end(unlucky) == (b"", "reset")
    play.joined(listening, address)


def test_internal_error_costs_one_connection_only(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = start(named())
    listening, address = servers()
    client, server = play.joined(listening, address)
    moved = play.server.moved

    def fail_once(*args: object) -> None:
        monkeypatch.setattr(play.server, "moved", moved)
        raise ZeroDivisionError("a bug")

    unlucky, its_server = play.joined(listening, address)
    monkeypatch.setattr(play.server, "moved", fail_once)
    unlucky.sendall(b"x")
    assert play.read_end(unlucky) == (b"", "reset")
    assert play.read_end(its_server)[1] == "reset"
    play.wait_for_end(CloseReason.INTERNAL)
    client.sendall(b"alive")
    assert play.read(server, 5) == b"alive"


def test_internal_error_after_a_name_was_found_costs_one_connection_only(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SlowNames(monkeypatch)
    play = start(named())
    listening, address = servers()
    unlucky = play.dial()
    unlucky.sendall(instruction(f"server.test:{address.rpartition(':')[2]}"))
    play.run_until(lambda: names.asked, "question")

    def fail(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(play.server._connector, "_connect", fail)
        names.release()
        play.wait_for_end(CloseReason.INTERNAL)
    play.joined(listening, address)


def test_internal_error_of_a_datapaths_timer_costs_one_connection_only(
    start: StartPlay, servers: Servers
) -> None:
    from pyforwarder.datapath.sockmap import Half

    play = start(named())
    listening, address = servers()
    client, server = play.joined(listening, address)
    pair = play.only_client()

    class Broken:
        def advance(self, *args: object) -> None:
            raise ZeroDivisionError("a bug")

    timer = Half(cast("SockmapDatapath", Broken()), pair, pair.up, bytes(8))
    play.loop.deadlines.start(timer, 0.0, play.loop.now_s)
    play.wait_for_end(CloseReason.INTERNAL)
    assert play.read_end(client)[1] == "reset"
    assert play.read_end(server)[1] == "reset"
    play.joined(listening, address)


# What the supervisor asks


def test_flushed_pair_is_reset_and_the_others_are_not(start: StartPlay, servers: Servers) -> None:
    play = start(named())
    listening, address = servers()
    client, server = play.joined(listening, address)
    other, its_server = play.joined(listening, address)
    first, second = sorted(c.id for c in play.server.clients.values())
    assert play.server.flush_ids([first, 4711]) == [first]
    assert play.read_end(client) == (b"", "reset")
    assert play.read_end(server) == (b"", "reset")
    other.sendall(b"alive")
    assert play.read(its_server, 5) == b"alive"
    assert play.server.flush_ids(None) == [second]
    assert play.closed(CloseReason.FLUSHED) == 2


def test_record_shows_the_pair(start: StartPlay, servers: Servers) -> None:
    play = start(named())
    _, address = (found := servers())
    client, server = play.joined(*found)
    play.run_until(lambda: list(read_records(play._memory)), "record")
    client.sendall(b"x" * 23)
    assert play.read(server, 23) == b"x" * 23
    (record,) = read_records(play._memory)
    assert (record.state, record.datapath) == (PairState.JOINED, DatapathKind.COPY)
    assert record.client.port == client.getsockname()[1]
    assert record.listener.port == play.address[1]
    assert record.source.port == server.getpeername()[1]
    assert record.server.port == int(address.rpartition(":")[2])
    assert (record.rule, record.listener_name) == (b"named", b"main")
    assert record.worker[0].carried_bytes == 23
    client.shutdown(socket.SHUT_WR)
    assert play.read_end(server)[1] == "eof"
    (record,) = read_records(play._memory)
    assert record.state == PairState.HALF_CLOSED


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
    pair_id = play.server.joining.join_sockets(accepted.detach(), outgoing.detach())
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
                play.server.joining.join_sockets(first, second)
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
        play.server.joining.join_sockets(
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
    pair_id = play.server.joining.join_sockets(accepted.detach(), outgoing.detach())
    for end in again:
        other, ours = loopback_pair()
        play.own(other)
        for fds in ((end.dup(), ours.dup()), (ours.dup(), end.dup())):
            with pytest.raises(ControlError, match=f"pair {pair_id} has that socket already"):
                play.server.joining.join_sockets(*(fd.detach() for fd in fds))
        play.own(ours)
    client.sendall(b"whole")
    assert play.read(server, 5) == b"whole"
    # Once that pair has ended, nobody has them.
    cookies = [cookie_of(end) for end in again]
    assert play.server.joining.pair_with(cookies) == pair_id
    play.server.reset_all(CloseReason.FLUSHED)
    assert play.server.joining.pair_with(cookies) is None
    assert play.server.joining._adopted == {}


def test_socket_is_not_joined_to_itself(start: StartPlay) -> None:
    play = start(named())
    client, accepted = loopback_pair()
    play.own(client)
    with pytest.raises(ControlError, match="the two are the same socket"):
        play.server.joining.join_sockets(accepted.dup().detach(), accepted.detach())
    assert play.server.clients == {}


def test_no_more_sockets_are_joined_than_there_may_be_pairs(start: StartPlay) -> None:
    play = start(named("limits: {pairs: 1}\n"))
    client, accepted, outgoing, server = adopted_ends()
    for end in (client, server):
        play.own(end)
    play.server.joining.join_sockets(accepted.detach(), outgoing.detach())
    client, accepted, outgoing, server = adopted_ends()
    for end in (client, server):
        play.own(end)
    with pytest.raises(ControlError, match=r"limits.pairs: 1"):
        play.server.joining.join_sockets(accepted.detach(), outgoing.detach())


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
    play.server.joining.join_sockets(accepted.detach(), outgoing.detach())
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
    play.server.joining.join_sockets(accepted.detach(), outgoing.detach())
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
    play.server.joining.join_sockets(accepted.detach(), outgoing.detach())
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


def test_internal_error_that_is_no_connection_s_costs_none(
    start: StartPlay, servers: Servers
) -> None:
    """Of a timer, of work that was put off, of a ring; one of a session costs that session."""
    del servers
    play = start(named())
    ended: list[tuple[Session, CloseReason]] = []
    session = Session.__new__(Session)
    session.owner = SimpleNamespace(end=lambda one, reason: ended.append((one, reason)))
    for owner in (None, lambda: None, session):
        play.server.failed(owner, ValueError("ours"))
    assert ended == [(session, CloseReason.INTERNAL)]
    # Without a listener, or the supervisor's channel, a worker is of no use.
    with pytest.raises(ValueError, match="ours"):
        play.server.failed(object(), ValueError("ours"))


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
        pair_id = play.server.joining.join_sockets(accepted.detach(), outgoing.detach())
        (pair,) = [one for one in play.server.clients.values() if one.id == pair_id]
        play.run_until(lambda: play.fake.joined or not more, "handover")
        if by == "supervisor":
            pair.is_adopted = False
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

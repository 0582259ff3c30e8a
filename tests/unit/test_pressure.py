"""Memory that pairs hold for peers that do not read: measured, shared out, and given back."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import LIMITED_INDEX, Counter
from pyforwarder.runtime.limits import TCP, Limit
from tests.helpers.instruction import instruction, refusal
from tests.helpers.stream_play import Play, Servers, named

if TYPE_CHECKING:
    from pyforwarder.worker.client import Client

MIB = 1 << 20


@pytest.fixture
def play(servers: Servers) -> Iterator[tuple[Play, socket.socket, str]]:
    listening, address = servers()
    made = Play(named("limits: {memory: 8MiB}"))
    yield made, listening, address
    made.close()


@pytest.fixture
def descriptors() -> None:
    """Counted by the plays of a worker."""


def fill(play: Play, client: socket.socket) -> None:
    """All that the client can send to a server that does not read."""
    idle = 0
    while idle < 20:
        try:
            client.send(bytes(1 << 16))
            idle = 0
        except BlockingIOError:
            idle += 1
        play.loop.run_once(0.001)


def test_what_a_stalled_pair_holds_is_measured_and_forgotten_at_its_end(
    play: tuple[Play, socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, listening, address = play
    monkeypatch.setattr(made.server.pressure, "is_needed", lambda: True)
    client, server = made.joined(listening, address)
    made.server.pressure._begin_round()
    assert made.counters[Counter.HELD_BYTES] == 0
    fill(made, client)
    made.server.pressure._begin_round()
    held = int(made.counters[Counter.HELD_BYTES])
    assert held > 100_000
    assert made.limits.held(TCP) == held
    assert made.limits.held(made.state.counter) == held
    server.close()
    made.wait_for_end(CloseReason.SERVER_RESET)
    made.server.pressure._begin_round()
    assert (made.counters[Counter.HELD_BYTES], made.limits.held(TCP)) == (0, 0)


def test_pairs_are_looked_at_in_slices_and_the_loop_serves_in_between(
    play: tuple[Play, socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, listening, address = play
    pressure = made.server.pressure
    ends = [made.joined(listening, address) for _ in range(5)]
    seen: list[int] = []
    monkeypatch.setattr("pyforwarder.worker.pressure.SLICE", 2)
    monkeypatch.setattr(pressure, "is_needed", lambda: True)

    def held(client: Client) -> int:
        seen.append(client.id)
        return 50_000

    monkeypatch.setattr(pressure, "_held_by_pair", held)
    pressure._begin_round()
    assert seen == [4, 5]
    ends[0][0].close()  # the first, which has not been looked at
    ends[0][1].close()
    made.wait_for_end(CloseReason.FINISHED)
    made.run_until(lambda: made.counters[Counter.HELD_BYTES], "end of the look")
    assert sorted(seen) == [2, 3, 4, 5]
    assert made.limits.held(TCP) == made.limits.held(made.state.counter) == 200_000


@pytest.mark.parametrize("fails", ["is_needed", "_measure_pair", "_finish", "_conclude"])
def test_a_fault_over_one_look_does_not_end_the_looking(
    play: tuple[Play, socket.socket, str], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    made, listening, address = play
    pressure = made.server.pressure
    made.joined(listening, address)
    planned: list[object] = []
    monkeypatch.setattr(made.server.loop, "after", lambda _, action: planned.append(action))
    monkeypatch.setattr(pressure, "is_needed", lambda: fails not in ("is_needed", "_conclude"))

    def fail(*_: object) -> bool:
        raise OSError("a fault of ours")

    monkeypatch.setattr(pressure, fails, fail)
    with pytest.raises(OSError, match="a fault of ours"):
        pressure._begin_round()
    assert planned == [pressure._begin_round]


def test_new_pairs_are_refused_while_all_is_held(play: tuple[Play, socket.socket, str]) -> None:
    made, listening, address = play
    made.limits.set_held(TCP, 8 * MIB)  # as another worker would tell
    made.server.pressure._conclude([], {})
    client = made.dial()
    client.sendall(instruction(address))
    assert made.read_end(client) == (refusal("busy"), "eof")
    client.close()
    made.wait_for_end(CloseReason.BUSY)
    assert made.counters[LIMITED_INDEX[Limit.MEMORY]] == 1
    made.limits.set_held(TCP, 8 * MIB - 1)
    made.server.pressure._conclude([], {})
    made.joined(listening, address)


def test_network_that_holds_a_quarter_gets_no_more_and_others_do(
    play: tuple[Play, socket.socket, str],
) -> None:
    made, listening, address = play
    pressure = made.server.pressure
    client, _ = made.joined(listening, address)
    (pair,) = made.server.clients.values()
    pressure._conclude([], {pressure._network(pair): 2 * MIB})
    assert pressure.is_full
    assert pressure.forbids(pair)
    assert not pressure.is_all_held()
    pressure._conclude([], {b"4 c0000201": 2 * MIB})
    assert not pressure.forbids(pair)
    del client


def test_pairs_get_small_buffers_while_memory_is_tight_and_lose_nothing(
    play: tuple[Play, socket.socket, str],
) -> None:
    made, listening, address = play
    client, server = made.joined(listening, address)
    (pair,) = made.server.clients.values()
    assert pair.server is not None
    made.limits.set_held(TCP, 5 * MIB)
    made.server.pressure._conclude([(5 * MIB, pair)], {})
    assert made.counters[Counter.PAIRS_SLOWED] == 1
    assert not made.server.copying.may_take_much
    sent = bytearray()
    block = bytes(range(256)) * 200
    stuck = 0
    while stuck < 20:
        try:
            size = client.send(block)
            sent += block[:size]
            stuck = 0
        except BlockingIOError:
            stuck += 1
        made.loop.run_once(0.001)
    assert made.read(server, len(sent)) == sent
    made.limits.set_held(TCP, MIB)
    made.server.pressure._conclude([], {})
    assert made.server.copying.may_take_much
    assert made.server.pressure._clamped == {}


def test_pair_that_stays_too_large_makes_room_after_a_while(
    play: tuple[Play, socket.socket, str],
) -> None:
    made, listening, address = play
    pressure = made.server.pressure
    pairs = []
    for _ in range(3):
        ends = made.joined(listening, address)
        pairs.append((ends, list(made.server.clients.values())[-1]))
    sizes = [2 * MIB, 5 * MIB, 3 * MIB]
    seen = [(size, pair) for size, (_, pair) in zip(sizes, pairs, strict=True)]
    made.limits.set_held(TCP, 10 * MIB)
    pressure._conclude(seen, {})
    made.loop.now_s += 9
    pressure._conclude(seen, {})
    assert made.closed(CloseReason.BACKLOG) == 0
    made.loop.now_s += 2
    pressure._conclude(seen, {})  # the largest, and no other
    assert [pair.reason for _, pair in seen] == [None, CloseReason.BACKLOG, None]
    # 8 MiB among two: only one of them holds more than its share, and it is not all held.
    made.limits.set_held(TCP, 5 * MIB)
    pressure._conclude([seen[0], seen[2]], {})
    assert made.closed(CloseReason.BACKLOG) == 1
    del pairs


def test_pairs_are_not_looked_at_while_tcp_holds_little(
    play: tuple[Play, socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, listening, address = play
    pressure = made.server.pressure
    assert not pressure.is_needed()  # no clients
    made.joined(listening, address)
    pages = [0]
    monkeypatch.setattr("pyforwarder.worker.pressure.tcp_pages", lambda _text: pages[0])
    assert not pressure.is_needed()
    pages[0] = 8 * MIB // 16 // 4096
    assert pressure.is_needed()

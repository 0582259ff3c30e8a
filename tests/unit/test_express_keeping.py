"""The keeper's part of express: restarts, bounds, and workers or keepers that die between."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import pytest

from pyforwarder.datapath.ebpf import syscall
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, DatapathKind, PairRecord
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express import connection_maps, keeping, ports, telling
from pyforwarder.datapath.express.connection_maps import LEAST_REST_S, REST_S, Gone
from pyforwarder.datapath.express.keeping import _Known
from pyforwarder.datapath.express.numbering import Server
from pyforwarder.datapath.express.places import ANSWER_TIMEOUT_S, Places
from pyforwarder.datapath.express.sharing import _LABELS_AT, Express, Label, _Written
from pyforwarder.datapath.splice.abi import NO_SLOT, SPLICE_BYTES, Splice, SpliceState
from pyforwarder.datapath.splice.keeper_adoption import KeeperAdoption
from pyforwarder.datapath.splice.keeper_pairs import KeeperPairs
from pyforwarder.datapath.splice.records import LAST_SLOT_AT, set_state
from pyforwarder.datapath.splice.rerouting import Rerouting
from pyforwarder.runtime import one_store
from tests.helpers.express_keeper import FIRST_PORT, FIRST_SPLICE, AtOnce, Stage

pytestmark = pytest.mark.usefixtures("still_clock")


@pytest.fixture
def taken_ports(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Ports that another program has."""
    taken: set[int] = set()

    def hold_port(port: int) -> Any:
        return None if port in taken else SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(ports, "hold_port", hold_port)
    return taken


@pytest.fixture
def stage(taken_ports: set[int]) -> Iterator[Stage]:
    del taken_ports
    with contextlib.closing(Stage()) as made:
        yield made


@pytest.fixture
def crowd(taken_ports: set[int]) -> Iterator[Stage]:
    """The same with many places."""
    del taken_ports
    with contextlib.closing(Stage(places=4096)) as made:
        yield made


def go_on(stage: Stage) -> None:
    """One turn."""
    stage.keeper._next_s = 0.0
    stage.keeper.go_on()


def go_on_later(stage: Stage, by_s: float = LEAST_REST_S) -> None:
    """So much later, in two rounds: the first one has it found no more."""
    for _ in range(2):
        stage.keeper._places.look(time.monotonic() + by_s)


def free(stage: Stage, place: int) -> None:
    """As `Keeper` does it."""
    stage.connections.store(place, state=SpliceState.FREE)
    stage.keeper.freed(FIRST_SPLICE + place)


def heard(stage: Stage, worker: int) -> list[dict[str, Any]]:
    """All that a worker has been told since."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(json.loads(stage.express.workers[worker].recv(1 << 16)))
    return found


# ------------------------------------------------------------------------------- restarts


def test_a_place_whose_connection_ends_while_a_keeper_begins_is_offered_once(stage: Stage) -> None:
    """Its record was in use when that keeper looked, and is free when it comes to it."""
    stage.start()
    connections = stage.connections
    connections.join(3)
    record = Splice.from_buffer_copy(connections.record(3))
    connections.end(3)
    keeper = stage.start()
    assert keeper.owns(FIRST_SPLICE + 3, record)
    keeper.freed(FIRST_SPLICE + 3)  # with any record
    assert sorted(connections.queue) == list(range(8))


def test_an_earlier_daemon_s_pair_is_the_keeper_s_and_its_place_is_offered_behind_it(
    stage: Stage,
) -> None:
    connections = stage.connections
    connections.store(3, state=SpliceState.ACTIVE, id=7, worker=0)
    keeper = stage.start()
    assert 3 not in connections.queue
    assert not keeper.owns(FIRST_SPLICE + 3, connections.record(3))
    connections.store(3, state=SpliceState.FREE)
    for _ in range(2):
        keeper.freed(FIRST_SPLICE + 3)
    assert sorted(connections.queue) == list(range(8))


def test_an_adopted_pair_that_lingers_is_the_next_keeper_s_to_free(stage: Stage) -> None:
    stage.start()
    stage.connections.join(3)
    stage.connections.store(3, worker=1, id=0)
    keeper = stage.start()
    assert not keeper.owns(FIRST_SPLICE + 3, stage.connections.record(3))
    free(stage, 3)
    go_on_later(stage)
    assert 3 in stage.connections.queue


def test_one_that_is_told_of_and_lingers_is_freed_by_the_next_keeper(stage: Stage) -> None:
    stage.start()
    stage.connections.join(3)
    stage.connections.store(3, id=0)
    keeper = stage.start()
    assert keeper.owns(FIRST_SPLICE + 3, stage.connections.record(3))
    now_s = time.monotonic()
    keeper._places.look(now_s)
    for by_s in (1, 2):
        keeper._places.look(now_s + REST_S + by_s)
    assert 3 in stage.connections.queue


def test_a_place_that_a_dying_keeper_has_not_freed_yet_is_freed(stage: Stage) -> None:
    """Between the record and the place."""
    stage.start()
    stage.connections.join(3)
    stage.connections.store(3, worker=1, state=SpliceState.FREE)
    stage.start()
    go_on(stage)
    assert 3 not in stage.connections.queue
    go_on_later(stage)
    assert 3 in stage.connections.queue


def test_a_keeper_that_begins_changes_nothing_of_a_server_but_that_there_is_a_way(
    stage: Stage,
) -> None:
    """A program that reads it meanwhile would ask 0.0.0.0."""
    before = abi.Target(port=7, mss=1460, out=3, not_before_ns=99)
    before.source[:], before.server[:] = (1, 2, 3, 4), (5, 6, 7, 8)
    stage.connections.targets[1] = before
    stage.start()
    before.out = 0
    assert bytes(stage.connections.targets[1]) == bytes(before)


@pytest.mark.parametrize("state", [abi.AskState.ASKED, abi.AskState.FILLING])
def test_a_number_that_is_given_back_has_no_way_and_is_not_another_s_while_a_server_is_asked(
    stage: Stage, state: abi.AskState
) -> None:
    stage.start()
    keeper, connections = stage.keeper, stage.connections
    for number in (1, 2):
        connections.targets[number] = abi.Target(out=3, mss=1460)
        keeper._known[number] = _Known(connections.targets[number], time.monotonic() + 60)
    connections.queue.remove(3)
    connections.asks[3].word = 1 << abi.STATE_BITS | state
    connections.asks[3].begun_ns = time.monotonic_ns()
    connections.asks[3].target = 2
    stage.express.back = [1, 2]
    go_on(stage)
    assert stage.express.back == [2]
    assert not any(target.out for target in connections.targets.values())
    assert not keeper._known
    connections.asks[3].word = 1 << abi.STATE_BITS | abi.AskState.JOINED
    go_on(stage)
    assert stage.express.back == []


SERVER: Final = b"\0" * 10 + b"\xff\xff" + bytes([192, 0, 2, 9])
SOURCE: Final = b"\0" * 10 + b"\xff\xff" + bytes([192, 0, 2, 1])


@pytest.mark.parametrize("has_source", [False, True])
def test_a_way_is_learned_for_upstreams_that_name_its_source_or_for_those_that_name_none(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, *, has_source: bool
) -> None:
    plain = Server(SERVER, socket.htons(80), 4)
    shown = abi.Target(port=socket.htons(80), mss=1460, out=3)
    shown.server[:] = memoryview(SERVER).cast("I").tolist()
    shown.source[:] = memoryview(SOURCE).cast("I").tolist()
    here = {"192.0.2.1"}
    numbers = {plain: 1, plain._replace(source=SOURCE): 2}
    monkeypatch.setattr(keeping, "shown_route", lambda *_: (plain, shown))
    monkeypatch.setattr(keeping, "this_host_has", lambda ip: str(ip) in here)
    monkeypatch.setattr(stage.express, "number_of", lambda server: numbers.get(server, 0))
    keeper = stage.start()
    nothing: Any = None

    def learn() -> dict[int, int]:
        keeper.learn(nothing, nothing, nothing, has_source=has_source)
        return {number: target.out for number, target in stage.connections.targets.items()}

    number = 2 if has_source else 1
    assert learn() == {number: 3}
    keeper.routes_changed()  # as when the address has gone
    assert stage.connections.targets[number].out == 0
    here.clear()
    assert learn() == {number: 0}  # the worker has connected before it went
    here.add("192.0.2.1")
    assert learn() == {number: 3}


# ---------------------------------------------------------------------------------- ports


def later(stage: Stage) -> None:
    """Ports are asked for again."""
    stage.keeper._ports._hold_s = 0.0
    go_on(stage)


def test_a_place_whose_port_another_program_has_is_offered_when_that_has_let_go(
    stage: Stage, taken_ports: set[int]
) -> None:
    taken_ports.add(FIRST_PORT + 2)
    stage.start()
    assert sorted(stage.connections.queue) == [0, 1, 3, 4, 5, 6, 7]
    later(stage)
    assert 2 not in stage.connections.queue
    taken_ports.clear()
    for _ in range(2):
        later(stage)
    assert sorted(stage.connections.queue) == list(range(8))


def test_what_was_offered_and_is_another_program_s_port_by_now_is_taken_back(
    stage: Stage, taken_ports: set[int]
) -> None:
    stage.start()
    taken_ports.add(FIRST_PORT + 2)
    stage.start()
    assert sorted(stage.connections.queue) == [0, 1, 3, 4, 5, 6, 7]
    taken_ports.clear()
    later(stage)
    assert sorted(stage.connections.queue) == list(range(8))


def test_a_place_that_a_keeper_was_moving_when_it_died_is_not_lost(stage: Stage) -> None:
    """Between the queue and what is said of it; others are given back and taken meanwhile."""
    stage.start()
    connections = stage.connections
    for place in (2, 3, 4):
        connections.queue.remove(place)
    keeper = stage.start()
    connections.queue.append(3)  # a program has given it back in that moment
    connections.queue.append(4)
    connections.join(4)  # and has taken this one
    keeper._ports.go_on(time.monotonic())
    assert 2 not in connections.queue
    later_s = time.monotonic() + 2
    keeper._ports.go_on(later_s)
    assert sorted(connections.queue) == [0, 1, 3, 5, 6, 7]  # a program may just have taken it
    for by_s in (2, 4):
        keeper._ports.go_on(later_s + by_s)
        assert sorted(connections.queue) == [0, 1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("how", ["ended", "refused", "given back"])
def test_one_in_use_whose_port_is_not_held_is_not_used_again(
    stage: Stage, taken_ports: set[int], how: str
) -> None:
    """The program that took the port meanwhile may speak to the same server."""
    stage.start()
    word = stage.connections.join(2)
    taken_ports.add(FIRST_PORT + 2)
    keeper = stage.start()
    assert keeper.owns(FIRST_SPLICE + 2, stage.connections.record(2))
    if how == "ended":
        free(stage, 2)
        go_on_later(stage)
    elif how == "refused":
        stage.connections.leave(2, time.monotonic())
        go_on_later(stage)
    else:
        stage.connections.end(2)  # no packet has found it
        go_on(stage)
    assert 2 not in stage.connections.queue
    later(stage)
    assert 2 not in stage.connections.queue
    taken_ports.clear()
    for _ in range(3):
        later(stage)
        go_on_later(stage)
    assert sorted(stage.connections.queue) == list(range(8))
    assert stage.connections.word(2) == word & ~abi.STATE_MASK


def test_a_place_that_the_kernel_could_not_free_is_freed_later(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.start()
    stage.connections.join(2)

    def fail(_now_s: float, **_: object) -> Any:
        raise OSError(errno.ENOMEM, "made up")

    with monkeypatch.context() as patched:
        patched.setattr(stage.connections, "go_round", fail)
        free(stage, 2)
        go_on_later(stage)
    assert 2 not in stage.connections.queue
    go_on_later(stage)
    assert 2 in stage.connections.queue


# -------------------------------------------------------------------------------- lingering


def test_a_place_lingers_from_when_its_worker_knows_of_the_end(
    crowd: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then only we know of it, and the place: the next keeper reads it there."""
    keeper = crowd.start()
    for place in range(4096):
        crowd.connections.join(place, has_ended=True)
    with monkeypatch.context() as patched:
        # Its worker reads nothing.
        patched.setattr(keeper._telling, "_tell", lambda _worker: False)
        go_on(crowd)
    for by_s in (LEAST_REST_S, REST_S, 2 * REST_S):
        go_on_later(crowd, by_s)
    assert not crowd.connections.queue
    keeper._telling.go_on()
    go_on_later(crowd)
    assert crowd.connections.queue


def test_a_place_whose_server_does_not_answer_is_another_s_when_no_program_knows_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = stage.start()._places
    word = stage.connections.begin_asking(3, age_s=ANSWER_TIMEOUT_S + 1)
    now_s = time.monotonic()
    assert places.look(now_s).asked == [3]
    with monkeypatch.context() as held_up:
        held_up.setattr(places._grace, "pass_by", lambda _wanted_ns: None)
        for by_s in (0.5, 1.0, 60.0):
            assert places.look(now_s + by_s).asked == []
            leaving = word & ~abi.STATE_MASK | abi.AskState.LEAVING
            assert (stage.connections.word(3), places.used) == (leaving, 1)
    for by_s, used in ((60.5, 1), (61.0, 0)):
        places.look(now_s + by_s)
        assert (places.used, 3 in stage.connections.queue) == (used, not used)


def test_what_the_kernel_does_not_see_any_more_keeps_its_place_a_little(stage: Stage) -> None:
    """Programs that have looked at it may run; also if its worker has broken it off just now."""
    stage.start()
    stage.connections.join(3)
    go_on_later(stage, 5.0)
    free(stage, 3)
    go_on_later(stage, LEAST_REST_S / 2)
    assert stage.connections.word(3) & abi.STATE_MASK == abi.AskState.RESTING
    go_on_later(stage)
    assert 3 in stage.connections.queue


@pytest.mark.parametrize(
    ("ahead_ms", "sent_bytes", "is_soon"),
    [(0, 0, True), (500, 1 << 20, True), (1 << 30, 0, False), (0, 1 << 30, False)],
)
def test_only_what_was_slower_than_our_numbers_is_followed_soon(
    crowd: Stage, ahead_ms: int, sent_bytes: int, *, is_soon: bool
) -> None:
    """The server would take the next connection of that port for the old one's packets."""
    crowd.start()
    for place in range(4096):
        crowd.connections.join(place, has_ended=True)
        # It was asked twice: what counts is what the server has been told first.
        ask = crowd.connections.asks[place]
        ask.first_client_tsval, ask.client_tsval = 0xFFFFFF00, (0xFFFFFF00 + ahead_ms) & 0xFFFFFFFF
        direction = crowd.connections.record(place).direction[0]
        direction.ts_recent, direction.bytes = ask.client_tsval, sent_bytes
    for _ in range(100):
        go_on(crowd)
        heard(crowd, 0), heard(crowd, 1)
    for _ in range(100):
        go_on_later(crowd, 1.0)
    assert bool(crowd.connections.queue) is is_soon
    for _ in range(100):
        go_on_later(crowd, REST_S + 1)
    assert len(crowd.connections.queue) == 4096


def test_places_are_never_used_again_for_want_of_other_records() -> None:
    pairs: Any = object.__new__(KeeperPairs)
    pairs._first_place, pairs._free = 8, deque()
    pairs._lingering, pairs._lingering_places = deque(), deque()
    pairs.word_of_place = lambda _index: 0
    pairs.forget = pairs._free.append
    for index in (9, 3, 8):
        pairs.linger(index)
    assert pairs.allocate() == 3
    assert pairs.allocate() == -1
    assert [one.record for one in pairs._lingering_places] == [9, 8]


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_place_that_came_back_is_not_forgotten_for_what_lingered_there(*, is_reset: bool) -> None:
    pairs: Any = object.__new__(KeeperPairs)
    pairs._first_place = 8
    pairs._lingering, pairs._lingering_places, pairs._resetting = deque(), deque(), deque()
    words = {8: 11, 9: 12}
    forgotten: list[int] = []
    pairs.word_of_place, pairs.forget = words.__getitem__, forgotten.append
    linger = pairs.linger_reset if is_reset else pairs.linger
    for index in (3, 8, 9):
        linger(index)
    words[8] += 1 << abi.STATE_BITS
    pairs.forget_due(time.monotonic() + 100.0)
    assert forgotten == [3, 9]
    assert not any((pairs._lingering, pairs._lingering_places, pairs._resetting))


def test_a_state_is_changed_in_place() -> None:
    memory = bytearray(b"\xee" * 3 * SPLICE_BYTES)
    set_state(memory, 1, SpliceState.RESET)
    at = SPLICE_BYTES + Splice.state.offset
    assert memory[at : at + 4] == struct.pack("=I", SpliceState.RESET)
    assert memory.count(0xEE) == len(memory) - 4


def test_a_place_comes_to_rest_by_a_store_that_leaves_it_joined_or_resting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time first; and the state is a byte."""
    made: Any = object.__new__(connection_maps.ConnectionMaps)
    made.memory = bytearray(2 * connection_maps._stride())
    word = 0x123456789A << abi.STATE_BITS | abi.AskState.JOINED
    at = connection_maps._stride()
    made.memory[at : at + 8] = word.to_bytes(8, "little")

    def store64(memory: bytearray, offset: int, number: int) -> None:
        assert offset - at == abi.Ask.resting_since_ns.offset
        assert made.word(1) == word
        one_store.store64(memory, offset, number)

    monkeypatch.setattr(connection_maps, "store64", store64)
    made.rest(1, word, 5.0)
    assert made.word(1) == word & ~abi.STATE_MASK | abi.AskState.RESTING
    assert made.ask(1).resting_since_ns == 5_000_000_000
    assert made.word(0) == 0


def test_what_a_keeper_says_of_a_place_is_one_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """`struct.pack_into` writes zeros first: not counted, or its port not lost, if killed there."""
    made: Any = object.__new__(connection_maps.ConnectionMaps)
    made.memory = bytearray(2 * connection_maps._stride())
    at = connection_maps._stride()
    word = 0x123456789A << abi.STATE_BITS | abi.AskState.JOINED
    made.memory[at : at + 8] = word.to_bytes(8, "little")
    monkeypatch.setattr(connection_maps, "struct", None)
    monkeypatch.setattr(connection_maps, "_NUMBER", None)
    made.mark_counted(1)
    made.set_port_lost(1, is_lost=True)
    assert made.is_counted(made.ask(1))
    assert (made.ask(1).counted_number, made.ask(1).port_lost) == (0x3456789A, 1)
    made.set_port_lost(1, is_lost=False)
    assert (made.ask(1).counted_number, made.ask(1).port_lost) == (0x3456789A, 0)
    assert made.memory[:at] == bytes(at)


def test_a_round_that_a_signal_cuts_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = object.__new__(connection_maps.ConnectionMaps)
    made.places, made._own = 64, connection_maps.OwnPrograms(-1, -1)
    made._round = bytearray(ctypes.sizeof(abi.Round))
    came_to = 64

    def run_program(*_: object, times: int) -> None:
        assert times == 4
        made._round[:] = bytes(abi.Round(next=came_to, unused=came_to - 2, counted=1))
        if came_to < 64:
            raise InterruptedError

    monkeypatch.setattr(syscall, "run_program", run_program)
    assert made.go_round(1.0, is_short=False) == (1, 0, 62, True, 0)
    came_to = 16
    assert made.go_round(1.0, is_short=False) == (1, 0, 14, False, 0)


def test_after_a_round_that_was_cut_short_places_are_as_many_as_before(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = stage.start()._places
    stage.connections.join(0)
    go_on(stage)
    assert (places.used, places.is_short, places.is_counting) == (1, False, True)
    with monkeypatch.context() as patched:
        patched.setattr(
            stage.connections, "go_round", lambda *_, **__: Gone(0, 0, 2, is_whole=False)
        )
        go_on(stage)
        assert (places.used, places.is_short, places.is_counting) == (1, False, False)
    go_on(stage)
    assert (places.used, places.is_counting) == (1, True)


# ---------------------------------------------------------------------------- who is told


def test_an_end_is_told_of_once_also_by_the_next_keeper(stage: Stage) -> None:
    stage.start()
    stage.connections.join(2, has_ended=True)
    go_on(stage)
    (message,) = heard(stage, 0)
    assert [one[:2] for one in message["ended"]] == [["main", "rest"]]
    stage.start()
    go_on(stage)
    assert heard(stage, 0) == heard(stage, 1) == []


def test_a_keeper_that_dies_while_it_tells_has_the_next_one_say_of_which(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = stage.start()
    words = [stage.connections.join(place, has_ended=True) for place in (2, 4)]
    with monkeypatch.context() as patched:
        patched.setattr(keeper._telling, "_told", lambda _place, _word: None)
        go_on(stage)
    stage.start()
    go_on(stage)
    go_on(stage)
    (one, other) = heard(stage, 0)
    assert one["of"] == other["of"] == [[2, words[0]], [4, words[1]]]
    assert one["ended"] == other["ended"]


def test_a_worker_that_reads_nothing_keeps_no_other_waiting(
    crowd: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ends wait, in bounds; those of the other are told of, round after round."""
    monkeypatch.setattr(telling, "MOST_UNREPORTED", 300)
    crowd.start()
    told = 0
    for _ in range(3):
        for place in range(2000):
            if place in crowd.connections.queue:
                crowd.connections.join(place, has_ended=True)
        for _ in range(40):
            go_on(crowd)
            told += sum(len(message["ended"]) for message in heard(crowd, 1))
        unreported = crowd.keeper._telling._unreported
        assert len(unreported[0]) <= 300 + keeping._LOOKS_AT_ONCE
        assert not unreported[1]
        for _ in range(20):
            for ask in crowd.connections.asks:
                ask.resting_since_ns = 0  # its time has passed, in each of the two rounds
            go_on(crowd)
    assert told == 3000


def test_a_message_is_no_longer_than_a_worker_reads(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = stage.start()
    long = Label("m" * 5000, ("r" * 5000,), (0, 0, 0))
    monkeypatch.setattr(stage.express, "label", lambda *_: long)
    for place in (0, 2, 4, 6):
        stage.connections.join(place, has_ended=True)
    go_on(stage)
    messages = heard(stage, 0)
    assert [len(message["ended"]) for message in messages] == [3, 1]
    assert keeper._telling.is_done


# -------------------------------------------------------------------- those that go on


def test_pairs_that_last_are_given_in_turns_and_no_more_than_a_worker_takes(
    crowd: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MOST_WAITING", 500)
    keeper = crowd.start()
    for place in range(4096):
        crowd.connections.join(place, age_s=5.0)
    turns = 0
    while len(crowd.taken) < 1000:
        before = len(crowd.taken)
        go_on(crowd)
        turns += 1
        assert len(crowd.taken) - before <= keeping._TAKEN_AT_ONCE
        assert turns < 100
    for _ in range(50):
        go_on(crowd)
    assert len(crowd.taken) == 1000
    assert list(map(len, keeper._waiting)) == [500, 500]
    assert all(place % 2 == worker for place, worker, _ in crowd.taken)
    assert keeper._next_s > time.monotonic()  # it does not turn without end
    # One of the two adopts; the other is stuck, and gets no more.
    for place, worker, _ in crowd.taken[:]:
        if worker == 1:
            keeper.had(FIRST_SPLICE + place)
    for _ in range(50):
        go_on(crowd)
    assert [worker for _, worker, _ in crowd.taken[1000:]] == [1] * 500
    assert len({place for place, _, _ in crowd.taken}) == 1500
    # They go on meanwhile; and nothing is looked at that is known.
    assert keeper._places.look(time.monotonic()) == ([], [], [])


def test_a_place_that_comes_back_while_its_pair_waits_is_taken_in_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was to be given has ended, as have others there: the last one lasts."""
    keeper, connections = stage.start(), stage.connections
    with monkeypatch.context() as patched:
        patched.setattr(keeping, "MOST_WAITING", 0)  # its worker is behind
        for _ in range(5):
            connections.join(2, age_s=5.0)
            go_on(stage)
            assert len(keeper._lasting[0]) == 1
            connections.end(2)
        word = connections.join(2, age_s=5.0)
        go_on(stage)
        assert keeper._lasting[0] == {2: word}
    for _ in range(3):
        go_on(stage)
    assert [place for place, _, _ in stage.taken] == [2]
    # With any word in its record: a worker has it.
    keeper._lasting[0][2] = word
    go_on(stage)
    assert [place for place, _, _ in stage.taken] == [2]


def test_a_connection_that_has_the_place_of_one_that_was_to_be_given_is_not(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, connections = stage.start(), stage.connections
    with monkeypatch.context() as patched:
        patched.setattr(keeping, "MOST_WAITING", 0)
        connections.join(2, age_s=5.0)
        go_on(stage)
        connections.end(2)
        connections.join(2)
    go_on(stage)
    assert (stage.taken, list(keeper._lasting[0])) == ([], [])


def test_what_fails_for_one_place_costs_no_other(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keeper = stage.start()
    for place in range(4):
        stage.connections.join(place, age_s=5.0)
    take_in = keeper._owner.take_in

    def fail(index: int, said: bytes, worker: int | None = None) -> int:
        if index == FIRST_SPLICE + 1:
            raise ValueError("made up")
        return take_in(index, said, worker)

    with monkeypatch.context() as patched:
        patched.setattr(keeper._owner, "take_in", fail)
        for _ in range(3):
            go_on(stage)
    assert "made up" in capsys.readouterr().err
    assert sorted(place for place, _, _ in stage.taken) == [0, 2, 3]
    go_on(stage)
    assert sorted(place for place, _, _ in stage.taken) == [0, 1, 2, 3]


def test_one_turn_looks_at_some_places_alone(crowd: Stage) -> None:
    crowd.start()
    for place in range(4096):
        crowd.connections.join(place)
    places = crowd.keeper._places
    now_s = time.monotonic()
    looks = 0
    while True:
        places.look(now_s, at_once=128)
        looks += 1
        if places.is_through:
            break
    assert looks == 32


def test_the_keeper_looks_more_often_while_places_are_short(
    crowd: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd.start()
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)  # no matter how long the looks take

    def pause_s() -> float:
        go_on(crowd)
        while not crowd.keeper._places.is_through:
            go_on(crowd)
        found_s = crowd.keeper._next_s - now_s
        # Sooner for a glance.
        assert crowd.keeper.wait_s(60.0) == pytest.approx(min(0.2, found_s))
        return found_s

    for place in range(1024):
        crowd.connections.join(place)
    assert pause_s() == pytest.approx(0.5)
    crowd.connections.join(1024)
    assert pause_s() == pytest.approx(0.1)
    for place in range(1025):
        crowd.connections.end_connection(place, crowd.connections.word(place))
    assert pause_s() == pytest.approx(0.1)  # programs may know of their connections
    assert pause_s() == pytest.approx(0.5)


@pytest.mark.parametrize("has_counted", [False, True])
def test_the_next_keeper_knows_whether_a_worker_has_counted_a_pair(
    stage: Stage, *, has_counted: bool
) -> None:
    keeper = stage.start()
    stage.connections.join(2, age_s=5.0)
    go_on(stage)
    ((_, worker, said),) = stage.taken
    assert PairRecord.from_buffer_copy(said).datapath == DatapathKind.NONE
    if has_counted:
        keeper.had(FIRST_SPLICE + 2)
    heard(stage, worker)
    keeper = stage.start()
    assert not keeper.owns(FIRST_SPLICE + 2, stage.connections.record(2))
    keeper.adopted(FIRST_SPLICE + 2, worker, has_it=has_counted)
    found = PairRecord.from_buffer_copy(keeper.said(FIRST_SPLICE + 2))
    assert found.datapath == (DatapathKind.SPLICE if has_counted else DatapathKind.NONE)
    assert (found.listener_name, found.rule) == (b"main", b"rest")
    go_on(stage)
    # Nobody else would tell the worker that there is one to adopt.
    assert [one["adopt"] for one in heard(stage, worker)] == ([] if has_counted else [1])
    # The next connection there is another.
    keeper.freed(FIRST_SPLICE + 2)
    stage.connections.join(2)
    found = PairRecord.from_buffer_copy(keeper.said(FIRST_SPLICE + 2))
    assert found.datapath == DatapathKind.NONE


def test_a_worker_that_dies_before_it_adopts_a_pair_loses_nothing_of_it() -> None:
    """Twice: the second one dies of the same, before it was given anything."""
    record = Splice(id=7, state=SpliceState.ACTIVE, slot=NO_SLOT)
    had = Splice(id=8, state=SpliceState.ACTIVE, slot=2)
    told: list[int] = []
    pairs: Any = SimpleNamespace(
        of=lambda _worker: [1, 2, 3],
        record={1: record, 2: record, 3: had}.__getitem__,
        store=lambda index, at, number: (
            last.append((index, number)) if at == LAST_SLOT_AT else told.append(index)
        ),
        when_forgotten=[],
    )
    shown = bytes(PairRecord(id=8, started_ns=9))
    table: Any = bytes(2 * PAIR_BYTES) + shown
    last: list[tuple[int, int]] = []
    unused: Any = None
    adoption: Any = KeeperAdoption(pairs, table, unused, workers=1, sockets_of=lambda _index: None)
    adoption._orphans, adoption._given = {1: b"waits"}, {2: b"given"}
    for _ in range(2):
        adoption.worker_died(0)
        had.slot = NO_SLOT
        assert adoption._orphans == {1: b"waits", 2: b"given", 3: shown}
    assert told == [1, 2, 3] * 2
    assert last == [(3, 2)]  # for a keeper that has only the maps


# ------------------------------------------------------------------ what is said of them


def an_express() -> Any:
    express: Any = object.__new__(Express)
    express._memory = bytearray(_LABELS_AT + (4 << 14))
    express._labels = {}
    express._written = _Written()
    express.connections = SimpleNamespace(
        tables=SimpleNamespace(write=lambda *_: None, forget=lambda _: None)
    )
    return express


def test_a_label_that_is_just_being_written_is_none_and_costs_nothing() -> None:
    express = an_express()
    label = Label("main", ["a", "b"], [1, 2, 3], [])
    decided: Any = SimpleNamespace(label=label, table="rules")
    number = express._number_of(decided, 0.0)
    now_ns = time.monotonic_ns()
    assert express.label(number, now_ns) == label
    assert express.label(number, now_ns) is express.label(number, now_ns)  # it is read once
    at = _LABELS_AT + number * (1 << 14)
    for length, torn in ((0xFFFFFFFF, b""), (3, b"[]]"), (2, b"[]")):
        express._memory[at : at + 12 + len(torn)] = struct.pack("=IQ", length, 0) + torn
        assert express.label(number, now_ns) == Label("-", (), (0, 0, 0))


def test_what_is_older_than_its_table_s_number_is_not_called_by_another_s_name() -> None:
    """It has lasted while more than a hundred other tables came and went."""
    express = an_express()
    decided: Any = SimpleNamespace(label=Label("other", [], [0, 0, 0]), table="other")
    before_ns = time.monotonic_ns()
    number = express._number_of(decided, 0.0)
    assert express.label(number, before_ns).listener == "-"
    assert express.label(number, time.monotonic_ns()).listener == "other"


def test_a_table_s_number_rests_as_long_as_others_are_free() -> None:
    """What lasts may still refer to it."""
    express = an_express()

    def number(now_s: float, name: str) -> int:
        decided: Any = SimpleNamespace(label=Label(name, [], [0, 0, 0]), table=name)
        found = express._number_of(decided, now_s)
        assert isinstance(found, int)
        return found

    used = [number(0.0, str(n)) for n in range(3)]
    for place, one in enumerate(used[:2]):
        del express._written.numbers[one]
        express._written.resting[one] = 1.0 + place
    assert number(100.0, "another") not in used


# ------------------------------------------------------------------------------ routes that change


def test_a_pair_that_is_taken_in_leaves_news_of_routes_to_others_that_wait_for_them() -> None:
    rerouting: Any = object.__new__(Rerouting)
    drained: list[int] = []
    rerouting._watch = SimpleNamespace(drain=lambda: drained.append(1))
    rerouting._since_s, rerouting._last_s = None, 0.0
    pairs: Any = SimpleNamespace(owners={}, store=lambda *_: None, when_forgotten=[])
    unused: Any = None
    adoption = KeeperAdoption(pairs, unused, rerouting, workers=2, sockets_of=lambda _index: None)
    assert adoption.take_in(5, b"said", 1) == 1
    assert rerouting._since_s is not None
    assert not drained
    rerouting.changed()
    assert drained


def test_ports_are_held_from_all_addresses() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        assert ports.hold_port(port) is None
    held = ports.hold_port(port)
    assert held is not None
    with held, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_places_alone_use_the_programs_to_free() -> None:
    """As tests without a keeper have it."""
    stage = Stage()
    with contextlib.closing(stage):
        connections: Any = stage.connections
        places = Places(connections, lambda index: connections.record(index - FIRST_SPLICE))
        places._grace = AtOnce(connections.wait_for_programs)
        stage.connections.join(1, has_ended=True)
        now_s = time.monotonic()
        (ended,) = places.look(now_s).ended
        places.told(ended.place, ended.ask.word, now_s)
        for by_s in (1, 2):
            places.look(now_s + REST_S + by_s)
        assert 1 in stage.connections.queue

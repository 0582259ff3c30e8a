"""Limits on clients that hold in a fleet: what machines report, and what follows."""

from __future__ import annotations

import json
import mmap
import queue
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyforwarder.config import parse_config
from pyforwarder.config.warnings import config_warnings
from pyforwarder.errors import ConfigError
from pyforwarder.fleet.layout import Keys
from pyforwarder.fleet.limits import (
    MOST_REPORTED,
    Board,
    LimitsReport,
    LimitsSharing,
    rows_of,
)
from pyforwarder.fleet.reporting import LEASE_S, LOST_AFTER_S
from pyforwarder.fleet.store import Change, StoreError
from pyforwarder.fleet.watching import All, Lost, Watcher
from pyforwarder.runtime.client_network import ClientNetwork
from pyforwarder.runtime.fleet_counts import (
    ClientCount,
    ClientCounts,
    FleetScope,
    OtherMachines,
    fleet_key,
)
from pyforwarder.runtime.limits import TCP, UDP, Bounds, Limit, SharedLimits, shared_memory
from pyforwarder.runtime.limits_memory import MOST_OTHERS, OTHERS_BYTES, share_of
from pyforwarder.supervisor.fleet.failover_process import FailoverProcess
from pyforwarder.supervisor.fleet.limits_process import LimitsProcess
from pyforwarder.supervisor.messages import FROM_LIMITS, FaultyMessageError, understand
from pyforwarder.worker.generation import fleet_scopes

KEYS: Final = Keys("edge")
SECRET: Final = b"s" * 16
WEB: Final = 200  # the scope of a listener
ALL: Final = Bounds(TCP, per_client=12, in_fleet=True)
HERE: Final = Bounds(WEB, per_client=6, ipv4_bits=24, in_fleet=True)
SCOPES: Final = [
    FleetScope("tcp", "", ALL),
    FleetScope("udp", "", Bounds(UDP, per_client=4, is_udp=True, in_fleet=True)),
    FleetScope("listener", "web", HERE),
]
HOST: Final = "192.0.2.7"
CLIENT: Final = ClientNetwork.parse("192.0.2.7/32")


def board(name: str = "one") -> Board:
    return Board(name, SCOPES, secret=SECRET)


def value(**said: object) -> bytes:
    return json.dumps({"schema": 1, **said}).encode()


def key_of(text: str, scope: int = TCP) -> int:
    return fleet_key(scope, ClientNetwork.parse(text), SECRET)


# What is reported, and what is believed of it


def test_clients_with_more_than_a_share_are_reported() -> None:
    one = board()
    one.saw("two", value())
    assert (one.machines, share_of(12, 2), one.least) == (2, 3, 1)
    network = ClientNetwork.parse("192.0.2.0/24")
    report = one.report(
        [
            ClientCount(TCP, CLIENT, 4),
            ClientCount(TCP, ClientNetwork.parse("192.0.2.8/32"), 3),
            ClientCount(WEB, network, 2),
            ClientCount(WEB, CLIENT, 6),  # it is no client there: those are networks of 24 bits
            ClientCount(9, CLIENT, 100),  # of a listener that is there no more
            ClientCount(UDP, ClientNetwork.parse("2001:db8::/64"), 1 << 60),
        ]
    )
    assert report == LimitsReport(
        tcp={"192.0.2.7/32": 4},
        udp={"2001:db8::/64": 1_000_000},
        listeners={"web": {"192.0.2.0/24": 2}},
    )
    assert LimitsReport.decode(report.encode()) == report


def test_of_too_many_clients_those_are_reported_that_are_nearest_to_their_limits() -> None:
    one = board()
    nets = [ClientNetwork(4, 32, number) for number in range(MOST_REPORTED + 10)]
    counts = [ClientCount(TCP, net, 12 if n % 2 else 7) for n, net in enumerate(nets)]
    report = one.report([*counts, ClientCount(UDP, CLIENT, 4)])
    assert len(report.tcp) == MOST_REPORTED - 1
    assert list(report.tcp.values()).count(12) == len(nets) // 2
    assert report.udp == {"192.0.2.7/32": 4}
    two = board("two")
    two.saw("one", report.encode().encode())
    assert two.faults == {}
    assert len(two.others()) == MOST_REPORTED


def test_what_other_machines_have_is_added_up_by_the_keys_of_our_workers() -> None:
    one = board()
    one.saw_all(
        [
            ("one", value(tcp={"192.0.2.9/32": 7})),  # in our name
            ("two", value(tcp={"192.0.2.7/32": 3}, listeners={"web": {"192.0.2.0/24": 2}})),
            ("three", value(tcp={"192.0.2.7/32": 4}, udp={"2001:db8::/64": 1})),
        ]
    )
    assert one.machines == 3
    assert one.others() == {
        key_of("192.0.2.7/32"): 7,
        key_of("192.0.2.0/24", WEB): 2,
        key_of("2001:db8::/64", UDP): 1,
    }
    one.has_changed = False
    one.saw("two", value(tcp={"192.0.2.7/32": 1}))
    assert one.has_changed
    assert one.others()[key_of("192.0.2.7/32")] == 5
    one.saw("three", None)
    assert (one.machines, one.others()) == (2, {key_of("192.0.2.7/32"): 1})
    one.saw("two", b"?")
    assert (one.machines, one.others(), list(one.faults)) == (1, {}, ["two"])


BAD_COUNTS: Final = [0, -1, 1.5, 1_000_001, 1 << 70, "7", None, True, [7], {"n": 7}]


@pytest.mark.parametrize(
    "said",
    [
        *(value(tcp={"192.0.2.7/32": count}) for count in BAD_COUNTS),
        b'{"schema":1,"tcp":{"192.0.2.7/32":NaN}}',
        b'{"schema":1,"tcp":{"192.0.2.7/32":Infinity}}',
        b'{"schema":1,"tcp":{"192.0.2.7/32":1e3}}',
        value(tcp=[["192.0.2.7/32", 7]]),
        value(listeners={"web": 7}),
        value(listeners={"w" * 300: {}}),
        value(tcp={"x" * 65: 7}),
        value(tcp={f"10.{n >> 8}.{n & 255}.1/32": 7 for n in range(MOST_REPORTED + 1)}),
        value(listeners={f"l{n}": {"192.0.2.0/24": 7} for n in range(MOST_REPORTED + 1)}),
        value(tcp={f"10.0.{n >> 8}.{n & 255}/32": 7 for n in range(MOST_REPORTED)}, udp={"x": 1}),
        b"[" * 100_000,
        b" " * 300_000 + value(),
        json.dumps({"schema": 2}).encode(),
        b"\xff\xfe",
        b"",
    ],
)
def test_what_is_no_report_counts_for_nothing(said: bytes) -> None:
    one = board()
    one.saw("two", said)
    assert (list(one.faults), one.machines, one.others()) == (["two"], 1, {})


@pytest.mark.parametrize(
    "client",
    [
        *("192.0.2.7", "192.0.2.7/24", "192.0.2.0/24", "192.0.2.07/32", "::ffff:192.0.2.7/128"),
        *("2001:DB8::/64", "2001:db8::/48", "fe80::%lo/64", "x", "", "192.0.2.7/32 ", "٣.0.2.7/32"),
    ],
)
def test_client_that_we_would_not_call_so_is_left_out(client: str) -> None:
    one = board()
    one.saw("two", value(tcp={client: 7, "192.0.2.8/32": 2}, listeners={"none": {client: 7}}))
    assert one.others() == {key_of("192.0.2.8/32"): 2}
    # The last of two that have one name counts, and nothing is added up.
    one.saw("two", b'{"schema":1,"tcp":{"192.0.2.7/32":3,"192.0.2.7/32":2}}')
    assert one.others() == {key_of("192.0.2.7/32"): 2}


@pytest.mark.parametrize("name", ["", "a/b", "x" * 129, "a b", "ä"])
def test_foreign_keys_are_no_machines(name: str) -> None:
    one = board()
    one.saw(name, value(tcp={"192.0.2.7/32": 3}))
    assert (one.machines, one.others()) == (1, {})
    assert list(one.faults.values()) == ["no machine's key"]
    one.saw(name, None)
    assert one.faults == {}


@pytest.mark.parametrize("name", ["dc1/lb-1", "lb:1", "web@fra", "lb-1.fra_2", "x" * 63])
def test_machine_may_have_any_name_that_the_configuration_takes(name: str) -> None:
    text = f"fleet: {{endpoints: ['http://127.0.0.1:1'], name: edge, instance: '{name}'}}"
    try:
        parse_config(text, source="x")
    except ConfigError:
        is_taken = False
    else:
        is_taken = True
    one = board()
    one.saw(name, value(tcp={"192.0.2.7/32": 3}))
    assert (one.machines == 2) is is_taken
    assert (one.faults == {}) is is_taken


def test_machines_are_bounded() -> None:
    one = board()
    one.saw_all([(f"m{n}", value(tcp={"192.0.2.7/32": 1})) for n in range(400)])
    assert one.machines == 256
    assert len(one.faults) == 16
    assert one.others() == {key_of("192.0.2.7/32"): 255}
    assert one.least == 0


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
CLIENTS: Final = st.dictionaries(
    st.sampled_from(["192.0.2.7/32", "192.0.2.0/24", "2001:db8::/64", "10.0.0.1/32"]) | st.text(),
    st.integers(min_value=-3, max_value=1 << 65) | JSON,
)
REPORTS: Final = st.fixed_dictionaries(
    {},
    optional={
        "schema": st.integers(0, 2),
        "tcp": CLIENTS,
        "udp": CLIENTS | JSON,
        "listeners": st.dictionaries(st.sampled_from(["web", "none"]) | st.text(), CLIENTS) | JSON,
        "more": JSON,
    },
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text() | st.just("two"), st.binary() | REPORTS | JSON)))
def test_workers_are_shown_bounded_numbers_with_anything_in_the_store(
    found: list[tuple[str, Any]],
) -> None:
    one = board()
    values = [
        (name, said if isinstance(said, bytes) else json.dumps(said).encode())
        for name, said in found
    ]
    one.saw_all(values)
    for name, said in values:
        one.saw(name, said)
    memory = mmap.mmap(-1, OTHERS_BYTES)
    OtherMachines(memory).write(one.others(), one.machines)
    assert 1 <= one.machines <= 256
    assert all(0 < count <= 256_000_000 for count in one.others().values())
    worker = SharedLimits(shared_memory(1), worker=0, secret=SECRET, others=memory)
    assert worker.admit(HOST, [ALL], 1000.0)


# Workers


class Worker(SharedLimits):
    """Which is asked for what it counts itself."""

    def has_own(self, key: int) -> bool:
        at = self._find(self._own, key)
        return at is not None and self._own[at + 1] > 0


class Machine:
    """Two workers of one machine, and what its process sees and shows."""

    def __init__(self, name: str = "one") -> None:
        self.memory = shared_memory(2)
        self.block = mmap.mmap(-1, OTHERS_BYTES)
        self.workers = [
            Worker(self.memory, worker=n, secret=SECRET, others=self.block) for n in range(2)
        ]
        self.counts = ClientCounts(self.memory, secret=SECRET)
        self.shown = OtherMachines(self.block)
        self.board = board(name)

    def show(self, until_s: float = 1006.0) -> None:
        self.shown.write(self.board.others(), self.board.machines)
        self.shown.hold_until(until_s)


def test_counts_of_all_workers_are_seen_by_their_networks() -> None:
    one = Machine()
    scopes = [Bounds(WEB, per_client=20, ipv4_bits=24, in_fleet=True), ALL]
    for worker in one.workers:
        for host in (HOST, HOST, "192.0.2.8", "::ffff:192.0.2.8", "2001:db8::1", "2001:db8::2"):
            assert isinstance(worker.admit(host, scopes, 1000.0), tuple)
        for host in ("127.0.0.1", "::1", "fe80::1%lo", "169.254.1.1"):  # others elsewhere
            assert isinstance(worker.admit(host, scopes, 1000.0), tuple)
        assert isinstance(worker.admit("192.0.2.9", [Bounds(TCP, per_client=9)], 1000.0), tuple)
    seen = {(c.scope, str(c.network)): c.connections for c in one.counts.more_than(0)}
    assert seen == {
        (TCP, "192.0.2.7/32"): 4,
        (TCP, "192.0.2.8/32"): 4,
        (TCP, "192.0.2.9/32"): 2,
        (TCP, "2001:db8::/64"): 4,
        (WEB, "192.0.2.0/24"): 8,
        (WEB, "2001:db8::/64"): 4,
    }
    assert one.counts.more_than(4) == [
        ClientCount(WEB, ClientNetwork.parse("192.0.2.0/24"), 8),
    ]


def test_client_that_was_counted_before_limits_were_the_fleets_is_known() -> None:
    one = Machine()
    alone = Bounds(TCP, per_client=12)
    for _ in range(12):
        assert isinstance(one.workers[0].admit(HOST, [alone], 1000.0), tuple)
    assert one.workers[0].admit(HOST, [ALL], 1000.0) is Limit.PAIRS_PER_CLIENT
    assert one.counts.more_than(3) == [ClientCount(TCP, CLIENT, 12)]


@pytest.mark.parametrize("named", [0, 1])
def test_client_is_known_if_one_worker_has_named_it(named: int) -> None:
    one = Machine()
    for n in range(2):
        others = one.block if n == named else None
        worker = SharedLimits(one.memory, worker=n, secret=SECRET, others=others)
        for _ in range(3):
            assert isinstance(worker.admit(HOST, [ALL], 1000.0), tuple)
    assert one.counts.more_than(3) == [ClientCount(TCP, CLIENT, 6)]


def test_place_of_a_client_that_has_gone_is_named_anew() -> None:
    one = Machine()
    worker = one.workers[0]
    for n in range(500):
        keys = worker.admit(f"10.0.{n >> 8}.{n & 255}", [ALL], 1000.0)
        assert isinstance(keys, tuple)
        (seen,) = one.counts.more_than(0)
        assert str(seen.network) == f"10.0.{n >> 8}.{n & 255}/32"
        worker.give_back(keys)
    assert one.counts.more_than(0) == []


def test_name_that_does_not_fit_the_key_is_no_client() -> None:
    one = Machine()
    assert isinstance(one.workers[0].admit(HOST, [ALL], 1000.0), tuple)
    words = memoryview(one.memory[0]).cast("Q")
    (at,) = (n for n, word in enumerate(words) if word == TCP << 16 | 4 << 8 | 32)
    words[at + 2] = int.from_bytes(b"\x0a\x00\x00\x01", "big")
    assert one.counts.more_than(0) == []


def test_client_is_refused_by_what_others_have_but_for_its_share() -> None:
    one = Machine()
    worker = one.workers[0]
    one.board.saw("two", value(tcp={"192.0.2.7/32": 12}))
    one.show()
    admitted = [one.workers[n % 2].admit(HOST, [ALL], 1000.0) for n in range(4)]
    assert all(isinstance(answer, tuple) for answer in admitted[:3])
    assert admitted[3] is Limit.PAIRS_PER_CLIENT_IN_FLEET
    assert worker.client_count(key_of("192.0.2.7/32")) == 3  # nothing is left of what was refused
    assert isinstance(worker.admit("192.0.2.8", [ALL], 1000.0), tuple)
    one.board.saw("two", value(tcp={"192.0.2.7/32": 7}))
    one.show()
    answers = [worker.admit(HOST, [ALL], 1001.0) for _ in range(3)]
    assert [isinstance(answer, tuple) for answer in answers] == [True, True, False]
    # What goes on from elsewhere is no new connection.
    assert isinstance(worker.admit(HOST, [ALL], 1001.0, is_new=False), tuple)
    # A machine holds its own limit, with any reports of others.
    one.board.saw("two", None)
    one.show()
    answers = [worker.admit(HOST, [ALL], 1002.0) for _ in range(7)]
    assert isinstance(answers[5], tuple)
    assert answers[6] is Limit.PAIRS_PER_CLIENT


def test_sessions_have_a_limit_of_their_own_and_room_is_known() -> None:
    one = Machine()
    worker, udp = one.workers[0], SCOPES[1].bounds
    one.board.saw("two", value(udp={"192.0.2.7/32": 4}))
    one.show()
    key = worker.key(HOST, udp)
    assert worker.has_room(key, udp, 1000.0)
    assert isinstance(worker.admit(HOST, [udp], 1000.0), tuple)
    assert not worker.has_room(key, udp, 1000.0)
    assert worker.admit(HOST, [udp], 1000.0) is Limit.SESSIONS_PER_CLIENT_IN_FLEET
    assert Limit.SESSIONS_PER_CLIENT_IN_FLEET.counted_as is Limit.SESSIONS_PER_CLIENT
    assert worker.has_room(key, Bounds(UDP, per_client=2), 1000.0)
    assert not worker.has_room(key, Bounds(UDP, per_client=1), 1000.0)


def test_what_was_reported_ages_out() -> None:
    one = Machine()
    one.board.saw("two", value(tcp={"192.0.2.7/32": 12}))
    one.show(until_s=1006.0)
    answers = [one.workers[0].admit(HOST, [ALL], 1005.9) for _ in range(4)]
    assert answers[3] is Limit.PAIRS_PER_CLIENT_IN_FLEET
    answers = [one.workers[0].admit(HOST, [ALL], 1006.0) for _ in range(10)]
    assert [isinstance(answer, tuple) for answer in answers] == [True] * 9 + [False]


@pytest.mark.parametrize("until_us", [1 << 63, (1 << 64) - 1, 1_007_000_001])
def test_nothing_is_good_for_longer_than_its_process_could_say(until_us: int) -> None:
    one = Machine()
    one.board.saw("two", value(tcp={"192.0.2.7/32": 12}))
    one.show()
    memoryview(one.block).cast("Q")[1] = until_us
    assert all(isinstance(one.workers[0].admit(HOST, [ALL], 1000.0), tuple) for _ in range(12))
    one.show(1000.0 + LOST_AFTER_S)
    assert one.workers[1].admit(HOST, [ALL], 1000.0) is Limit.PAIRS_PER_CLIENT
    assert not one.workers[1].has_room(key_of("192.0.2.7/32"), ALL, 1000.0)


def test_process_replaces_what_one_before_it_has_left() -> None:
    one = Machine()
    one.board.saw("two", value(tcp={"192.0.2.7/32": 12}))
    one.show()
    OtherMachines(one.block)
    assert all(isinstance(one.workers[0].admit(HOST, [ALL], 1000.0), tuple) for _ in range(12))


def test_limits_that_are_not_the_fleets_ask_nobody() -> None:
    one = Machine()
    one.board.saw("two", value(tcp={"192.0.2.7/32": 12}))
    one.show()
    alone = Bounds(TCP, per_client=12)
    assert all(isinstance(one.workers[0].admit(HOST, [alone], 1000.0), tuple) for _ in range(12))


def test_of_more_clients_than_there_is_room_for_those_with_most_are_shown() -> None:
    one = Machine()
    counts = {n + 1: 1 + n % 2 for n in range(MOST_OTHERS + 100)}
    one.shown.write(counts, 2)
    one.shown.hold_until(1006.0)
    worker = one.workers[0]
    assert worker.has_room(1, ALL, 1000.0)
    assert len(worker._others) == MOST_OTHERS
    assert sum(count == 2 for count in worker._others.values()) == len(counts) // 2


@pytest.mark.parametrize("word", [0, 1, 2, (1 << 64) - 1, (1 << 64) - 2])
@pytest.mark.parametrize("at", range(6))
def test_memory_that_makes_no_sense_hurts_no_worker(word: int, at: int) -> None:
    one = Machine()
    one.board.saw("two", value(tcp={"192.0.2.7/32": 1}))
    one.show()
    words = memoryview(one.block).cast("Q")
    words[at] = word
    for second in range(3):
        assert isinstance(one.workers[0].admit(HOST, [ALL], 1000.0 + second), tuple)
    # And the next one that is right counts.
    one.board.saw("two", value(tcp={"192.0.2.7/32": 12}))
    one.show(1015.0)
    answers = [one.workers[0].admit(HOST, [ALL], 1010.0) for _ in range(2)]
    assert answers[-1] is Limit.PAIRS_PER_CLIENT_IN_FLEET


def test_worker_does_not_look_at_what_is_being_written_and_not_too_often() -> None:
    one = Machine()
    worker = one.workers[0]
    key = key_of("192.0.2.7/32")
    words = memoryview(one.block).cast("Q")
    one.shown.write({key: 12}, 2)
    one.shown.hold_until(1006.0)
    for _ in range(3):
        assert isinstance(worker.admit(HOST, [ALL], 1000.0), tuple)
    assert not worker.has_room(key, ALL, 1000.0)
    one.shown.write({}, 2)
    assert not worker.has_room(key, ALL, 1000.04)
    words[0] += 1  # the writer has died meanwhile
    assert not worker.has_room(key, ALL, 1000.06)
    one.shown.write({key: 5}, 2)
    assert words[0] % 2 == 0
    assert worker.has_room(key, ALL, 1000.12)


# The bound


class Fleet(RuleBasedStateMachine):
    """Machines report when they like; a client opens and closes where it likes."""

    @initialize(machines=st.integers(1, 4))
    def begin(self, machines: int) -> None:
        self.machines = [Machine(f"m{n}") for n in range(machines)]
        self.open: list[list[tuple[int, ...]]] = [[] for _ in self.machines]
        self.unreported = [0] * machines  # opened since the machine has reported
        self.most_unreported = 0
        self.now_s = 1000.0
        for n in range(machines):
            self.report(n)

    @rule(n=st.integers(0, 3), times=st.integers(1, 8))
    def connect(self, n: int, times: int) -> None:
        n %= len(self.machines)
        for _ in range(times):
            self.now_s += 0.1
            self.machines[n].shown.hold_until(self.now_s + LOST_AFTER_S)
            keys = self.machines[n].workers[times % 2].admit(HOST, [ALL], self.now_s)
            if isinstance(keys, tuple):
                self.open[n].append(keys)
                self.unreported[n] += 1
        self.most_unreported = max(self.most_unreported, sum(self.unreported))

    @rule(n=st.integers(0, 3), times=st.integers(1, 8))
    def close(self, n: int, times: int) -> None:
        n %= len(self.machines)
        for keys in self.open[n][:times]:
            counting = (one for one in self.machines[n].workers if one.has_own(keys[0]))
            next(counting).give_back(keys)
        del self.open[n][:times]

    @rule(n=st.integers(0, 3))
    def report(self, n: int) -> None:
        n %= len(self.machines)
        machine = self.machines[n]
        for _ in range(2):  # once the number of machines is known
            told = machine.board.report(machine.counts.more_than(machine.board.least)).encode()
            for other in self.machines:
                other.board.saw(f"m{n}", told.encode())
                other.show(self.now_s + LOST_AFTER_S)
        self.unreported[n] = 0

    @invariant()
    def is_bounded(self) -> None:
        if not hasattr(self, "open"):
            return
        machines = len(self.machines)
        total = sum(map(len, self.open))
        bound = 12 + (machines - 1) * share_of(12, machines) + self.most_unreported
        assert total <= min(bound, machines * 12)
        assert all(len(some) <= 12 for some in self.open)


TestFleet = Fleet.TestCase
TestFleet.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def test_who_has_most_is_listed_first_with_what_it_has_at_each_machine() -> None:
    reports = {
        "two": LimitsReport(tcp={"192.0.2.7/32": 5, "192.0.2.8/32": 60}),
        "one": LimitsReport(
            tcp={"192.0.2.7/32": 6}, udp={"192.0.2.7/32": 9}, listeners={"web": {"::/64": 11}}
        ),
    }
    assert [tuple(row.values()) for row in rows_of(reports)] == [
        ("192.0.2.8/32", 60, "tcp", None, {"two": 60}),
        ("192.0.2.7/32", 11, "tcp", None, {"one": 6, "two": 5}),
        ("::/64", 11, None, "web", {"one": 11}),
        ("192.0.2.7/32", 9, "udp", None, {"one": 9}),
    ]


# The process


class Store:
    """Keys with a lease, as one machine writes them."""

    endpoint = "http://etcd"

    def __init__(self) -> None:
        self.is_there = True
        self.puts: list[LimitsReport] = []
        self.written = 0
        self.until_s = 0.0

    def _ask(self) -> None:
        if not self.is_there:
            raise StoreError("etcd is away")

    def grant(self, ttl_s: int) -> int:
        self._ask()
        assert ttl_s == LEASE_S
        return 7

    def renew(self, lease: int) -> bool:
        self._ask()
        return lease == 7

    def put(self, key: str, text: str, *, lease: int) -> None:
        self._ask()
        assert (key, lease) == (f"{KEYS.limits}one", 7)
        self.puts.append(LimitsReport.decode(text))


class Process:
    """That of machine "one", in virtual time."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.machine = Machine()
        self.store = Store()
        watcher = Watcher(cast("Any", None), KEYS.limits)
        self.received: queue.Queue[Any] = watcher.received
        self.said: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []  # when the store had
        self.compactions: list[int] = []

        def compact(_now_s: float, *, lease: int) -> None:
            self.compactions.append(lease)

        self.process = LimitsSharing(
            cast("Any", self.store),
            watcher,
            KEYS,
            "one",
            self.machine.board,
            self.machine.counts,
            self.machine.shown,
            cast("Any", SimpleNamespace(send=self.said.append)),
            compaction=cast("Any", SimpleNamespace(run_due=compact)),
            clock=lambda: self.now_s,
        )

    def turns(self, for_s: float = 0.05) -> list[dict[str, Any]]:
        """What the supervisor is told in that time."""
        self.said.clear()
        for _ in range(max(1, round(for_s / 0.05))):
            self.now_s += 0.05
            self.process.turn()
        self.answered += [said for said in self.said if "answered_ago_ms" in said]
        return [said for said in self.said if "answered_ago_ms" not in said]

    def admits(self) -> bool:
        return isinstance(self.machine.workers[0].admit(HOST, [ALL], self.now_s), tuple)


def test_process_reports_what_workers_count_and_shows_them_what_others_report() -> None:
    one = Process()
    assert one.turns() == []
    assert one.store.puts == []  # it does not know yet whether the store is there
    one.received.put(All([(f"{KEYS.limits}two", value(tcp={"192.0.2.7/32": 12}))]))
    assert one.turns() == [{"store": "connected", "endpoint": "http://etcd"}]
    assert one.store.puts == [LimitsReport()]
    assert [one.admits() for _ in range(4)] == [True] * 3 + [False]
    one.received.put(Change(7, f"{KEYS.limits}two", value(tcp={"192.0.2.7/32": 6})))
    one.turns()
    assert [one.admits() for _ in range(4)] == [True] * 3 + [False]
    one.turns(0.5)
    assert one.store.puts[1:] == [LimitsReport(tcp={"192.0.2.7/32": 6})]
    one.turns(1.0)
    assert len(one.store.puts) == 2  # nothing is written twice
    assert one.compactions
    assert set(one.compactions) == {7}
    # The room of a machine that has died is free again.
    one.received.put(Change(8, f"{KEYS.limits}two", None))
    one.turns()
    assert [one.admits() for _ in range(7)] == [True] * 6 + [False]


def test_store_that_is_silent_is_lost_and_the_machine_is_alone() -> None:
    one = Process()
    one.received.put(All([(f"{KEYS.limits}two", value(tcp={"192.0.2.7/32": 12}))]))
    one.turns()
    assert [one.admits() for _ in range(4)] == [True] * 3 + [False]
    one.store.is_there = False
    one.received.put(Lost("the watch has ended"))
    told = one.turns(LOST_AFTER_S + 3.0)
    assert told == [{"store": "lost", "endpoint": "etcd is away"}]
    assert [one.admits() for _ in range(10)] == [True] * 9 + [False]
    one.store.is_there = True
    assert one.turns(6.0) == [{"store": "connected", "endpoint": "http://etcd"}]
    assert not one.admits()


def test_process_that_stands_still_is_not_believed_for_long() -> None:
    one = Process()
    one.received.put(All([(f"{KEYS.limits}two", value(tcp={"192.0.2.7/32": 12}))]))
    one.turns()
    assert [one.admits() for _ in range(4)] == [True] * 3 + [False]
    one.now_s += LOST_AFTER_S
    assert one.admits()


def test_what_is_no_report_is_told_of_once() -> None:
    one = Process()
    one.received.put(All([(f"{KEYS.limits}two", b"?"), (f"{KEYS.limits}a/b", value())]))
    connected, said = one.turns()
    assert connected["store"] == "connected"
    first, second = said["faults"]
    assert first.startswith(f"{KEYS.limits}two: ")
    assert "Invalid JSON" in first
    assert second == f"{KEYS.limits}a/b: no machine's key"
    understand(said, [], FROM_LIMITS)
    one.received.put(Change(7, f"{KEYS.limits}two", b"??"))
    assert one.turns(61.0) == []
    # However often another one comes and goes.
    told = []
    for n in range(60):
        one.received.put(Change(8 + n, f"{KEYS.limits}three", None if n % 2 else b"?"))
        told += one.turns(0.5)
    assert [list(message) for message in told] == [["faults"]]
    assert len(told[0]["faults"]) == 1
    one.received.put(All([(f"{KEYS.limits}two", value())]))
    assert one.turns(100.0) == []
    one.received.put(Change(99, f"{KEYS.limits}two", b"?" * 300_000))
    assert one.turns(1.0) == [{"faults": [f"{KEYS.limits}two: too long"]}]
    one.turns(6.0)
    assert one.answered[-1]["unusable"] == 34
    understand(one.answered[-1], [], FROM_LIMITS)


def test_much_that_changes_all_the_time_is_written_seldom() -> None:
    one = Process()
    one.received.put(All([]))
    few = [ClientNetwork(4, 32, number) for number in range(10)]
    many = [ClientNetwork(4, 32, number) for number in range(MOST_REPORTED)]

    def writes(networks: list[ClientNetwork]) -> int:
        one.store.puts.clear()
        for n in range(100):
            counts = [ClientCount(TCP, network, 8 + n % 2) for network in networks]
            one.process._counts = cast("Any", SimpleNamespace(more_than=lambda _, c=counts: c))
            one.turns(0.1)
        return len(one.store.puts)

    assert 30 <= writes(few) <= 41  # in ten seconds
    assert 5 <= writes(many) <= 11


class Sent(NamedTuple):
    """What a process was made with."""

    limits: bool
    failover: bool


@pytest.fixture
def compacts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Sent]:
    """Whether these two processes of such a fleet make the store forget its history."""
    made: dict[str, Any] = {}

    def replicator(*_: Any, compacts: bool) -> Any:
        made["failover"] = compacts
        return SimpleNamespace(run=None)

    def sharing(*_: Any, compaction: Any) -> Any:
        made["limits"] = compaction is not None
        return SimpleNamespace(run=None)

    monkeypatch.setattr("pyforwarder.fleet.failover.replicator.Replicator", replicator)
    monkeypatch.setattr("pyforwarder.fleet.limits.LimitsSharing", sharing)
    for name in ("splice.own_pairs.OwnPairs", "splice.staying.Staying"):
        monkeypatch.setattr(f"pyforwarder.datapath.{name}", mock.MagicMock())
    monkeypatch.setattr(
        "pyforwarder.supervisor.fleet.failover_process.KeeperClient", mock.MagicMock()
    )

    def look(text: str) -> Sent:
        fleet = parse_config(f"{text}\n{LISTENERS}", source="x").fleet
        given: dict[str, Any] = {"user": None, "close_in_child": mock.Mock()}
        machine = Machine()
        above, below = socket.socketpair()
        channel = cast("Any", below)
        with above, below:
            memory = SimpleNamespace(
                limits_secret=SECRET, share_limits=lambda: (machine.memory, machine.block)
            )
            limits = LimitsProcess(mock.Mock(), mock.Mock(), cast("Any", memory), **given)
            limits._fleet = fleet
            limits._prepare(channel)
            splicing = mock.MagicMock()
            failover = FailoverProcess(
                mock.Mock(), mock.Mock(), splicing=lambda: splicing, adopt=mock.Mock(), **given
            )
            failover._fleet = fleet
            failover._in_force = fleet.failover if fleet is not None else None
            failover._prepare(channel)
        return Sent(**made)

    return look


@pytest.mark.parametrize(
    ("limits", "failover", "expected"),
    [("", "", True), ("false", "", False), ("", "false", False), ("true", "true", True)],
)
def test_one_false_keeps_both_processes_from_compacting_the_store(
    compacts: Callable[[str], Sent], limits: str, failover: str, expected: bool
) -> None:
    limits, failover = (f", compact: {one}" if one else "" for one in (limits, failover))
    found = compacts(
        "fleet: {endpoints: ['http://127.0.0.1:1'], name: edge,"
        f" limits: {{scope: fleet{limits}}}, failover: {{addresses: [192.0.2.1]{failover}}}}}"
    )
    assert found == Sent(limits=expected, failover=expected)


def test_process_says_nothing_but_what_is_in_its_table() -> None:
    given: dict[str, Any] = {"user": None, "close_in_child": mock.Mock()}
    log = mock.Mock()
    process = LimitsProcess(mock.Mock(), log, mock.Mock(), **given)
    assert process.may_say is FROM_LIMITS
    process._handle(process._understand({"faults": ["a key: no report"]}, []))
    log.write.assert_called_once_with("warning", "fleet_value", error="a key: no report")
    bad: list[dict[str, Any]] = [{"faults": ["x"] * 17}, {"faults": "x"}, {"servers": {}}, {}]
    for message in bad:
        with pytest.raises(FaultyMessageError):
            process._understand(message, [])


# The configuration

FLEET: Final = "fleet: {endpoints: ['http://127.0.0.1:1'], name: edge, limits: {scope: fleet}}\n"
LISTENERS: Final = """
listeners:
- {name: web, bind: '127.0.0.1:1', limits: {pairs_per_client: 5, client_prefix: {ipv4: 24}},
   rules: [&rule {match: any, to: '127.0.0.1:9'}]}
- {name: dns, bind: '127.0.0.1:1', protocol: udp, limits: {sessions_per_client: 3}, rules: [*rule]}
- {name: none, bind: '127.0.0.1:2', rules: [*rule]}
"""
INDEXES: Final = {"web": 200, "dns": 210, "none": 220}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ("{}", {("listener", "web"): 5, ("listener", "dns"): 3}),
        (
            "{pairs_per_client: 7}",
            {("tcp", ""): 7, ("udp", ""): 7, ("listener", "web"): 5, ("listener", "dns"): 3},
        ),
        (
            "{sessions_per_client: 7}",
            {("udp", ""): 7, ("listener", "web"): 5, ("listener", "dns"): 3},
        ),
    ],
)
def test_scopes_that_are_shared(limits: str, expected: dict[tuple[str, str], int]) -> None:
    config = parse_config(f"{FLEET}limits: {limits}\n{LISTENERS}", source="x")
    found = fleet_scopes(config, INDEXES)
    assert {(one.kind, one.name): one.bounds.per_client for one in found} == expected
    by_name = {one.name: one.bounds for one in found if one.kind == "listener"}
    assert (by_name["web"].scope, by_name["web"].ipv4_bits, by_name["web"].is_udp) == (
        200,
        24,
        False,
    )
    assert (by_name["dns"].scope, by_name["dns"].ipv4_bits, by_name["dns"].is_udp) == (
        210,
        32,
        True,
    )


def test_nothing_is_shared_without_a_word() -> None:
    more = f"limits: {{pairs_per_client: 7}}\n{LISTENERS}"
    for fleet in (
        "",
        FLEET.replace("limits: {scope: fleet}", "limits: {}"),
        FLEET.replace(", limits: {scope: fleet}", ""),
    ):
        assert fleet_scopes(parse_config(f"{fleet}{more}", source="x"), INDEXES) == []


def test_sharing_of_nothing_is_hardly_meant() -> None:
    def warnings(more: str) -> list[str]:
        text = f"{FLEET}{more}"
        return config_warnings(parse_config(text, source="x"), text, source="x")

    listener = "listeners: [{bind: '127.0.0.1:2', rules: [{match: any, to: '127.0.0.1:9'}]}]\n"
    (warning,) = warnings(listener)
    assert "fleet.limits.scope" in warning
    assert warnings(f"{listener}limits: {{pairs_per_client: 7}}\n") == []
    assert warnings("") == []  # the store may have listeners with limits
    assert warnings(LISTENERS) == []

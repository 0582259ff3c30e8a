"""Which server takes the next pair.  Time is a number here, and every count is exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyforwarder.config import parse_config
from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.core.upstreams import (
    LONGEST_EJECTION,
    SLOW_START_FLOOR,
    Balancer,
    Condition,
    ServerState,
)
from pyforwarder.runtime.counters import Counters, SharedHeld

if TYPE_CHECKING:
    from collections.abc import Iterator

Balance = Literal["round_robin", "least_pairs", "source_hash"]
BALANCES: tuple[Balance, ...] = ("round_robin", "least_pairs", "source_hash")


@dataclass(frozen=True)
class FakeServer:
    address: Address | UnixAddress
    weight: int = 1
    backup: bool = False


@dataclass(frozen=True)
class FakeEjection:
    failures: int = 3
    for_s: float = 10.0


@dataclass(frozen=True)
class FakeUpstream:
    servers: tuple[FakeServer, ...]
    balance: Balance = "round_robin"
    eject: FakeEjection = FakeEjection()
    slow_start_s: float = 0.0


def server(number: int, weight: int = 1, *, backup: bool = False) -> FakeServer:
    return FakeServer(Address(f"10.0.0.{number}", 80), weight, backup)


def upstream(
    *servers: FakeServer | int, balance: Balance = "round_robin", slow_start_s: float = 0.0
) -> FakeUpstream:
    members = tuple(server(s) if isinstance(s, int) else s for s in servers)
    return FakeUpstream(members, balance, slow_start_s=slow_start_s)


def last_byte(chosen: ServerState | None) -> int:
    assert chosen is not None
    assert isinstance(chosen.address, Address)
    return int(chosen.address.host.rpartition(".")[2])


def turns(balancer: Balancer, count: int, now_s: float = 0.0) -> list[int]:
    return [last_byte(balancer.choose("1.1.1.1", now_s)) for _ in range(count)]


def clients(count: int) -> Iterator[str]:
    for number in range(count):
        yield f"192.0.{number // 256}.{number % 256}"


def homes(balancer: Balancer, count: int, now_s: float = 0.0) -> dict[str, int]:
    return {client: last_byte(balancer.choose(client, now_s)) for client in clients(count)}


def state(balancer: Balancer, number: int) -> ServerState:
    (found,) = [s for s in balancer.servers if s.name == f"10.0.0.{number}:80"]
    return found


def eject(balancer: Balancer, number: int, now_s: float) -> None:
    for _ in range(3):
        balancer.failed(state(balancer, number), now_s)


def test_a_config_section_is_what_a_balancer_wants() -> None:
    config = parse_config(
        "upstreams: {web: {servers: ['10.0.0.1:80', 'unix:/run/a'], eject: {failures: 1}}}",
        source="x",
    )
    balancer = Balancer(config.upstreams["web"])
    assert [s.name for s in balancer.servers] == ["10.0.0.1:80", "unix:/run/a"]
    assert [s.address for s in balancer.servers] == [
        Address("10.0.0.1", 80),
        UnixAddress("/run/a"),
    ]


def test_why_no_server_is_left_is_told_by_what_keeps_pairs_from_each() -> None:
    balancer = Balancer(upstream(1, 2, 3, server(4, weight=0)))
    balancer.mark_down(
        "10.0.0.1:80",
    )
    balancer.drain(["10.0.0.2:80", "10.0.0.3:80"])
    assert balancer.choose("1.1.1.1", 0.0) is None
    assert balancer.why_none(0.0) == "1 down, 3 drained"
    assert Balancer(upstream()).why_none(0.0) == "it has none"


# --- round robin


def test_round_robin_takes_turns() -> None:
    assert turns(Balancer(upstream(1, 2, 3)), 7) == [1, 2, 3, 1, 2, 3, 1]


def test_workers_begin_with_different_servers() -> None:
    firsts = [turns(Balancer(upstream(1, 2, 3), worker=worker), 3) for worker in range(4)]
    assert firsts == [[1, 2, 3], [2, 3, 1], [3, 1, 2], [1, 2, 3]]


def test_weighted_turns_are_spread() -> None:
    balancer = Balancer(upstream(server(1, 5), 2, 3))
    assert turns(balancer, 7) == [1, 1, 2, 1, 3, 1, 1]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 7))
def test_over_one_round_each_server_gets_exactly_its_weight(
    weights: list[int], worker: int
) -> None:
    servers = [server(number, weight) for number, weight in enumerate(weights, 1)]
    balancer = Balancer(upstream(*servers), worker=worker)
    assert Counter(turns(balancer, sum(weights))) == dict(enumerate(weights, 1))


def test_a_round_that_is_too_long_to_be_laid_out_is_as_fair() -> None:
    weights = range(248, 257)  # 2268 turns
    servers = [server(number, weight) for number, weight in enumerate(weights, 1)]
    balancer = Balancer(upstream(*servers))
    taken = turns(balancer, sum(weights))
    assert balancer._round == []
    assert Counter(taken) == dict(enumerate(weights, 1))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_a_round_that_is_laid_out_is_the_one_that_is_weighed(weights: list[int]) -> None:
    servers = [server(number, weight) for number, weight in enumerate(weights, 1)]
    laid_out, weighed = Balancer(upstream(*servers)), Balancer(upstream(*servers))
    candidates = [(state, float(state.weight)) for state in weighed.servers]
    for _ in range(2 * sum(weights) + 1):
        expected = weighed._round_robin(candidates, None)
        assert last_byte(laid_out.choose("1.1.1.1", 0.0)) == last_byte(expected)


def test_retries_do_not_shift_the_turns() -> None:
    # A dead server that is never ejected must not make its neighbour the first choice of all.
    balancer = Balancer(upstream(1, 2, 3))
    firsts = []
    for _ in range(6):
        first = balancer.choose("1.1.1.1", 0.0)
        assert first is not None
        firsts.append(last_byte(first))
        if firsts[-1] == 2:
            assert balancer.choose("1.1.1.1", 0.0, [first]) is not first
    assert firsts == [1, 2, 3, 1, 2, 3]


# --- least pairs


def hold(balancer: Balancer, count: int) -> list[int]:
    """Choose that many times, and keep what was chosen."""
    chosen = []
    for _ in range(count):
        best = balancer.choose("1.1.1.1", 0.0)
        assert best is not None
        balancer.hold(best)
        chosen.append(last_byte(best))
    return chosen


def test_least_pairs_fills_the_emptiest() -> None:
    balancer = Balancer(upstream(1, 2, 3, balance="least_pairs"))
    one, two, three = balancer.servers
    for busy, pairs in ((one, 5), (two, 2), (three, 3)):
        for _ in range(pairs):
            balancer.hold(busy)
    assert sorted(hold(balancer, 5)) == [2, 2, 2, 3, 3]
    assert [s.held.total() for s in balancer.servers] == [5, 5, 5]
    balancer.release(one)
    assert turns(balancer, 1) == [1]


def test_least_pairs_counts_connections_that_do_not_stand_yet() -> None:
    # Of many that come at once none is `opened` before the last has chosen.
    balancer = Balancer(upstream(1, 2, balance="least_pairs"))
    for _ in range(7):
        balancer.hold(balancer.servers[0])
    assert hold(balancer, 9) == [2] * 7 + [1, 2]


def test_least_pairs_counts_in_proportion_to_weight() -> None:
    balancer = Balancer(upstream(server(1, 3), 2, balance="least_pairs"))
    assert Counter(hold(balancer, 40)) == {1: 30, 2: 10}


def test_least_pairs_takes_turns_among_equals() -> None:
    assert turns(Balancer(upstream(1, 2, 3, balance="least_pairs")), 4) == [1, 2, 3, 1]


def test_least_pairs_counts_what_all_workers_hold() -> None:
    counters = Counters(Counters.memory(3))
    settings = upstream(1, 2, balance="least_pairs")
    workers = [
        Balancer(
            settings,
            worker=worker,
            shared={f"10.0.0.{n}:80": SharedHeld(counters, worker, 200 + n) for n in (1, 2)},
        )
        for worker in range(3)
    ]
    for worker, pairs in zip(workers, (4, 2, 1), strict=True):
        for _ in range(pairs):
            worker.hold(worker.servers[0])
    chosen = [hold(workers[n % 3], 1)[0] for n in range(9)]
    assert chosen[:7] == [2] * 7
    assert sorted(chosen[7:]) == [1, 2]
    # A server that was taken out and put back has the pairs it had.
    workers[1].reconfigure(upstream(1, balance="least_pairs"))
    gone = {f"10.0.0.{n}:80": SharedHeld(counters, 1, 200 + n) for n in (1, 2)}
    workers[1].reconfigure(settings, shared=gone)
    assert [s.held.total() for s in workers[1].servers] == [8, 8]


# --- source hash


def test_source_hash_keeps_a_client_on_its_server_in_every_worker() -> None:
    settings = upstream(1, 2, 3, 4, balance="source_hash")
    first = homes(Balancer(settings), 200)
    assert homes(Balancer(settings, worker=3), 200) == first
    assert homes(Balancer(upstream(4, 2, 1, 3, balance="source_hash")), 200) == first


def test_source_hash_does_not_move_between_releases() -> None:
    # Two daemons of different age in front of the same servers must agree.
    balancer = Balancer(upstream(1, 2, 3, 4, balance="source_hash"))
    assert list(homes(balancer, 12).values()) == [3, 1, 2, 2, 3, 1, 4, 4, 2, 3, 2, 1]


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 3, 4), (10, 1, 1, 1)])
def test_source_hash_spreads_by_weight(weights: tuple[int, ...]) -> None:
    servers = [server(number, weight) for number, weight in enumerate(weights, 1)]
    count = 10_000
    found = Counter(homes(Balancer(upstream(*servers, balance="source_hash")), count).values())
    for number, weight in enumerate(weights, 1):
        share = count * weight / sum(weights)
        # Four standard deviations of a binomial distribution; the hash is fixed, so is the result.
        assert abs(found[number] - share) < 4 * (share * (1 - weight / sum(weights))) ** 0.5


def test_when_a_server_leaves_only_its_clients_move_and_they_return_with_it() -> None:
    balancer = Balancer(upstream(1, 2, 3, 4, balance="source_hash"))
    before = homes(balancer, 2000)
    balancer.mark_down("10.0.0.3:80")
    without = homes(balancer, 2000)
    assert {client for client in before if before[client] != without[client]} == {
        client for client in before if before[client] == 3
    }
    moved = Counter(without[client] for client in before if before[client] == 3)
    assert set(moved) == {1, 2, 4}
    balancer.mark_up("10.0.0.3:80", 5.0)
    assert homes(balancer, 2000, 5.0) == before


def test_when_a_server_joins_clients_move_only_to_it() -> None:
    before = homes(Balancer(upstream(1, 2, 3, balance="source_hash")), 2000)
    after = homes(Balancer(upstream(1, 2, 3, 4, balance="source_hash")), 2000)
    assert {after[client] for client in before if before[client] != after[client]} == {4}


def test_a_retry_goes_where_the_client_would_go_without_the_server() -> None:
    balancer = Balancer(upstream(1, 2, 3, balance="source_hash"))
    for client in clients(50):
        first = balancer.choose(client, 0.0)
        assert first is not None
        second = balancer.choose(client, 0.0, [first])
        balancer.mark_down(first.name)
        assert balancer.choose(client, 0.0) is second
        balancer.mark_up(first.name, 0.0)


def test_a_client_is_the_same_in_every_spelling_of_its_address() -> None:
    balancer = Balancer(upstream(1, 2, 3, 4, 5, 6, 7, balance="source_hash"))
    for client in clients(30):
        assert balancer.choose(client, 0.0) is balancer.choose(f"::ffff:{client}", 0.0)
    assert balancer.choose("2001:db8::1", 0.0) is balancer.choose("2001:DB8:0::0:1", 0.0)
    assert balancer.choose(None, 0.0) is balancer.choose(None, 1.0)


# --- retries, backups, weight 0


@pytest.mark.parametrize("balance", BALANCES)
def test_each_retry_takes_another_server_and_then_there_is_none(balance: Balance) -> None:
    balancer = Balancer(upstream(1, 2, 3, server(4, backup=True), balance=balance))
    tried: list[ServerState] = []
    while (chosen := balancer.choose("1.1.1.1", 0.0, tried)) is not None:
        tried.append(chosen)
    assert sorted(map(last_byte, tried)) == [1, 2, 3, 4]
    assert last_byte(tried[-1]) == 4


@pytest.mark.parametrize("balance", BALANCES)
def test_backups_take_pairs_only_while_nobody_else_can(balance: Balance) -> None:
    balancer = Balancer(
        upstream(1, server(2, backup=True), server(3, backup=True), balance=balance)
    )
    assert set(homes(balancer, 20).values()) == {1}
    balancer.mark_down("10.0.0.1:80")
    assert set(homes(balancer, 20).values()) == {2, 3}
    balancer.mark_up("10.0.0.1:80", 0.0)
    assert set(homes(balancer, 20).values()) == {1}


@pytest.mark.parametrize("balance", BALANCES)
def test_weight_zero_takes_nothing_new(balance: Balance) -> None:
    balancer = Balancer(upstream(server(1, 0), 2, balance=balance))
    assert set(homes(balancer, 20).values()) == {2}
    assert balancer.condition(state(balancer, 1), 0.0) is Condition.DRAINED
    assert Balancer(upstream(server(1, 0), balance=balance)).choose("1.1.1.1", 0.0) is None


# --- health from outside


@pytest.mark.parametrize("balance", BALANCES)
def test_a_server_that_is_down_gets_nothing_even_if_nobody_is_left(balance: Balance) -> None:
    balancer = Balancer(upstream(1, 2, balance=balance))
    balancer.mark_down("10.0.0.1:80")
    assert set(homes(balancer, 20).values()) == {2}
    balancer.mark_down("10.0.0.2:80")
    assert balancer.choose("1.1.1.1", 0.0) is None
    assert balancer.condition(state(balancer, 2), 0.0) is Condition.DOWN
    balancer.mark_up("10.0.0.2:80", 1.0)
    assert turns(balancer, 1, 1.0) == [2]


def test_news_of_unknown_servers_is_ignored() -> None:
    balancer = Balancer(upstream(1))
    balancer.mark_down("10.9.9.9:80")
    balancer.mark_up("10.9.9.9:80", 0.0)
    assert turns(balancer, 1) == [1]


# --- ejection


@pytest.mark.parametrize("balance", BALANCES)
def test_failures_in_a_row_eject_for_a_while(balance: Balance) -> None:
    balancer = Balancer(upstream(1, 2, balance=balance))
    one = state(balancer, 1)
    balancer.failed(one, 0.0)
    balancer.failed(one, 0.0)
    assert set(homes(balancer, 20).values()) == {1, 2}
    balancer.failed(one, 0.0)
    assert balancer.condition(one, 9.9) is Condition.EJECTED
    assert set(homes(balancer, 20, 9.9).values()) == {2}
    assert balancer.condition(one, 10.0) is Condition.UP
    assert set(homes(balancer, 20, 10.0).values()) == {1, 2}
    assert one.failures == 3


def test_a_success_in_between_starts_the_count_over() -> None:
    balancer = Balancer(upstream(1, 2))
    one = state(balancer, 1)
    for _ in range(5):
        balancer.failed(one, 0.0)
        balancer.failed(one, 0.0)
        balancer.opened(one)
    assert balancer.condition(one, 0.0) is Condition.UP
    assert (one.failures, one.connects) == (10, 5)


def test_after_an_ejection_one_failure_is_enough_and_the_rest_is_twice_as_long() -> None:
    balancer = Balancer(upstream(1, 2))
    one = state(balancer, 1)
    eject(balancer, 1, 0.0)
    now_s = 10.0
    for times in (2, 4, 8, LONGEST_EJECTION, LONGEST_EJECTION):
        balancer.failed(one, now_s)
        assert one.is_ejected(now_s + 10.0 * times - 0.1)
        now_s += 10.0 * times
        assert not one.is_ejected(now_s)
    balancer.opened(one)
    balancer.failed(one, now_s)
    assert not one.is_ejected(now_s)


def test_ejection_never_empties_an_upstream() -> None:
    balancer = Balancer(upstream(1, 2, server(3, backup=True)))
    eject(balancer, 1, 0.0)
    eject(balancer, 2, 0.0)
    assert turns(balancer, 3, 1.0) == [3, 3, 3]
    eject(balancer, 3, 0.0)
    assert set(turns(balancer, 4, 1.0)) == {1, 2}
    first = [state(balancer, 1), state(balancer, 2)]
    assert last_byte(balancer.choose("1.1.1.1", 1.0, first)) == 3


def test_an_ejected_server_that_works_is_ejected_no_longer() -> None:
    balancer = Balancer(upstream(1, 2))
    eject(balancer, 1, 0.0)
    eject(balancer, 2, 0.0)
    chosen = balancer.choose("1.1.1.1", 1.0)
    assert chosen is not None
    balancer.opened(chosen)
    assert balancer.condition(chosen, 1.0) is Condition.UP
    assert turns(balancer, 3, 1.0) == [last_byte(chosen)] * 3


def test_failures_while_ejected_do_not_lengthen_the_ejection() -> None:
    balancer = Balancer(upstream(1))
    eject(balancer, 1, 0.0)
    eject(balancer, 1, 5.0)
    assert state(balancer, 1).is_ejected(9.9)
    assert not state(balancer, 1).is_ejected(10.0)
    assert state(balancer, 1).failures == 6


def test_ejection_can_be_switched_off() -> None:
    balancer = Balancer(FakeUpstream((server(1), server(2)), eject=FakeEjection(failures=0)))
    for _ in range(100):
        balancer.failed(state(balancer, 1), 0.0)
    assert balancer.condition(state(balancer, 1), 0.0) is Condition.UP


def test_a_server_seen_to_be_well_again_is_not_ejected() -> None:
    balancer = Balancer(upstream(1, 2))
    eject(balancer, 1, 0.0)
    balancer.mark_down("10.0.0.1:80")
    balancer.mark_up("10.0.0.1:80", 1.0)
    assert balancer.condition(state(balancer, 1), 1.0) is Condition.UP


# --- slow start


def test_a_server_that_comes_back_grows_into_its_share() -> None:
    balancer = Balancer(upstream(1, 2, slow_start_s=20.0))
    assert Counter(turns(balancer, 20)) == {1: 10, 2: 10}  # nobody has come back yet
    balancer.mark_down("10.0.0.1:80")
    balancer.mark_up("10.0.0.1:80", 100.0)
    one = state(balancer, 1)
    # At 110 s it has half its weight: one third of the pairs.
    for now_s, count, condition in (
        (110.0, 10, Condition.SLOW_START),
        (120.0, 15, Condition.UP),
        (500.0, 15, Condition.UP),
    ):
        assert Counter(turns(balancer, 30, now_s))[1] == count
        assert balancer.condition(one, now_s) is condition


def test_a_server_that_has_just_come_back_gets_a_little() -> None:
    balancer = Balancer(upstream(1, 2, slow_start_s=20.0))
    balancer.mark_down("10.0.0.1:80")
    balancer.mark_up("10.0.0.1:80", 100.0)
    rounds = 5
    count = round(rounds * (1 + SLOW_START_FLOOR) / SLOW_START_FLOOR)
    assert Counter(turns(balancer, count, 100.0))[1] == rounds


def test_slow_start_follows_an_ejection_too() -> None:
    balancer = Balancer(upstream(1, 2, slow_start_s=20.0))
    eject(balancer, 1, 0.0)
    assert balancer.condition(state(balancer, 1), 15.0) is Condition.SLOW_START
    assert last_byte(balancer.choose("1.1.1.1", 15.0, [state(balancer, 2)])) == 1
    balancer.opened(state(balancer, 1))
    assert Counter(turns(balancer, 30, 20.0))[1] == 10
    assert balancer.condition(state(balancer, 1), 30.0) is Condition.UP


def test_under_source_hash_clients_come_back_bit_by_bit() -> None:
    balancer = Balancer(upstream(1, 2, 3, balance="source_hash", slow_start_s=20.0))
    full = homes(balancer, 3000)
    balancer.mark_down("10.0.0.3:80")
    balancer.mark_up("10.0.0.3:80", 100.0)
    back: set[str] = set()
    for now_s in (101.0, 105.0, 110.0, 115.0, 120.0):
        now_back = {client for client, home in homes(balancer, 3000, now_s).items() if home == 3}
        assert back < now_back
        back = now_back
    assert homes(balancer, 3000, 120.0) == full


# --- reload


def test_a_reload_keeps_what_is_known_of_the_servers_that_stay() -> None:
    balancer = Balancer(upstream(1, 2, 3))
    one, two, three = balancer.servers
    balancer.opened(one)
    balancer.opened(three)
    balancer.mark_down(two.name)
    balancer.reconfigure(upstream(4, 2, server(1, 7)))
    assert [last_byte(s) for s in balancer.servers] == [4, 2, 1]
    assert balancer.servers[1] is two
    assert balancer.servers[2] is one
    assert not two.is_up
    assert (one.pairs, one.weight) == (1, 7)
    balancer.closed(three)  # its pair outlived it
    balancer.failed(three, 0.0)
    assert three.pairs == 0
    assert set(turns(balancer, 20)) == {1, 4}


def test_more_cannot_be_closed_than_was_opened() -> None:
    balancer = Balancer(upstream(1))
    with pytest.raises(ValueError, match="more pairs closed than opened"):
        balancer.closed(balancer.servers[0])


# --- any history


class AnyHistory(RuleBasedStateMachine):
    """The promises of `choose` hold with any events in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.settings = FakeUpstream(
            (server(1, 3), server(2), server(3, 0), server(4, backup=True)),
            slow_start_s=7.0,
        )
        self.balancer = Balancer(self.settings, worker=1)
        self.open: list[ServerState] = []

    @rule(
        balance=st.sampled_from(BALANCES),
        weights=st.tuples(*[st.integers(0, 3)] * 4),
        backups=st.tuples(*[st.booleans()] * 4),
    )
    def reload(self, balance: Balance, weights: tuple[int, ...], backups: tuple[bool, ...]) -> None:
        members = tuple(
            server(number, weight, backup=backup)
            for number, (weight, backup) in enumerate(zip(weights, backups, strict=True), 1)
        )
        self.settings = FakeUpstream(members, balance, slow_start_s=7.0)
        self.balancer.reconfigure(self.settings)

    @rule(seconds=st.floats(0.0, 50.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(number=st.integers(1, 4), up=st.booleans())
    def check(self, number: int, up: bool) -> None:
        name = f"10.0.0.{number}:80"
        if up:
            self.balancer.mark_up(name, self.now_s)
        else:
            self.balancer.mark_down(name)

    @rule(client=st.sampled_from(list(clients(9))), works=st.booleans())
    def connect(self, client: str, works: bool) -> None:
        chosen = self.balancer.choose(client, self.now_s)
        if chosen is None:
            return
        if works:
            self.balancer.opened(chosen)
            self.open.append(chosen)
        else:
            self.balancer.failed(chosen, self.now_s)

    @precondition(lambda self: self.open)
    @rule()
    def close(self) -> None:
        self.balancer.closed(self.open.pop())

    @invariant()
    def counts_add_up(self) -> None:
        assert sum(s.pairs for s in self.balancer.servers) == len(self.open)

    @invariant()
    def every_usable_server_is_offered_once_and_the_best_kind_first(self) -> None:
        usable = [s for s in self.balancer.servers if s.is_up and s.weight]
        tried: list[ServerState] = []
        while (chosen := self.balancer.choose("192.0.2.1", self.now_s, tried)) is not None:
            tried.append(chosen)
        assert sorted(s.name for s in tried) == sorted(s.name for s in usable)
        kinds = [(s.is_ejected(self.now_s), s.backup) for s in tried]
        assert kinds == sorted(kinds)


TestAnyHistory = AnyHistory.TestCase


def test_drained_server_is_passed_over_until_it_is_ready() -> None:
    balancer = Balancer(upstream(1, 2))
    balancer.drain({"10.0.0.1:80"})
    assert turns(balancer, 3) == [2, 2, 2]
    assert balancer.condition(state(balancer, 1), 0.0) is Condition.DRAINED
    assert balancer.choose(None, 0.0, tried=(state(balancer, 2),)) is None
    balancer.reconfigure(upstream(1, 2))
    assert turns(balancer, 3) == [2, 2, 2]
    balancer.drain(())
    assert sorted(turns(balancer, 2)) == [1, 2]

"""A server's number is another's only once nothing refers to it, or clients met a stranger."""

from __future__ import annotations

import pytest

from pyforwarder.core.address import Address
from pyforwarder.datapath.express import numbering
from pyforwarder.datapath.express.connection_maps import MOST_TARGETS
from pyforwarder.datapath.express.numbering import NUMBERS_BYTES, Numbers, Server

REST_S = numbering._REST_S


def server(n: int) -> Server:
    return Server.of(Address(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 80))


class Both:
    """The supervisor's and the keeper's, who share memory only."""

    def __init__(self) -> None:
        memory = bytearray(100 + NUMBERS_BYTES)
        self.anew: list[int] = []
        self.supervisor = Numbers(memory, 100, self.anew.append)
        self.keeper = Numbers(memory, 100, lambda _: pytest.fail("the supervisor alone gives"))

    def give_all(self) -> None:
        for n in range(1, MOST_TARGETS):
            assert self.supervisor.give(server(n)) == n


@pytest.fixture
def both() -> Both:
    return Both()


def test_the_keeper_finds_what_the_supervisor_gives(both: Both) -> None:
    assert (both.keeper.find(server(1)), both.keeper.most()) == (0, 0)
    for n in (1, 2, 1):
        assert both.supervisor.give(server(n)) == n
        assert both.keeper.find(server(n)) == n
    assert (both.keeper.find(server(3)), both.keeper.most()) == (0, 2)
    assert both.supervisor.given(server(2)) == 2
    assert both.supervisor.given(server(3)) == 0


def test_servers_that_come_under_new_addresses_for_ever_have_numbers(both: Both) -> None:
    """As pods do."""
    now_s, before = 0.0, 0
    for n in range(3 * MOST_TARGETS):
        number = both.supervisor.give(server(n))
        assert number, n
        both.supervisor.keep([server(n)], now_s)
        now_s += REST_S / 100
        for one in both.keeper.given_back():
            both.keeper.mark_forgotten(one)
        if n:
            assert both.supervisor.given(server(n - 1)) == before
        before = number
        if not n % 500:
            assert both.keeper.find(server(n)) == number
    assert both.keeper.find(server(1)) == 0


def test_no_number_is_another_s_before_it_has_rested_and_was_forgotten(both: Both) -> None:
    both.give_all()
    stranger, others = server(MOST_TARGETS), [server(n) for n in range(2, MOST_TARGETS)]
    assert both.keeper.find(server(1)) == 1
    both.supervisor.keep(others, 0.0)
    assert both.supervisor.rests_until_s(0.0) == REST_S
    both.supervisor.keep(others, REST_S - 1)
    assert both.keeper.given_back() == []
    assert both.supervisor.give(stranger) == 0
    both.supervisor.keep(others, REST_S)
    assert both.keeper.given_back() == [1]
    assert both.keeper.find(server(1)) == 0  # nothing is learned of it any more
    assert both.supervisor.give(stranger) == 0
    assert both.supervisor.give(server(1)) == 0  # nor is it its own again
    assert both.supervisor.rests_until_s(REST_S) == REST_S + 1
    both.keeper.mark_forgotten(1)
    assert both.anew == []
    assert both.supervisor.give(stranger) == 1
    assert both.anew == [1]
    assert (both.keeper.find(stranger), both.keeper.find(server(1))) == (1, 0)


def test_one_that_is_used_again_meanwhile_rests_anew(both: Both) -> None:
    """Also where the kernel has refused what it was used for, or a part of it."""
    both.supervisor.give(server(1))
    both.supervisor.keep([], 0.0)
    assert both.supervisor.give(server(1)) == 1
    both.supervisor.keep([], REST_S)
    assert both.keeper.given_back() == []
    both.supervisor.keep([server(1)], REST_S + 1)
    both.supervisor.keep([], 2 * REST_S + 2)
    assert both.keeper.given_back() == []
    both.supervisor.keep([], 3 * REST_S + 2)
    assert both.keeper.given_back() == [1]


def test_a_keeper_that_comes_later_finds_the_same(both: Both) -> None:
    both.give_all()
    both.supervisor.keep([server(2)], 0.0)
    both.supervisor.keep([server(2)], REST_S)
    later = Numbers(both.keeper._memory, 100, lambda _: None)
    assert later.most() == MOST_TARGETS - 1
    assert later.find(server(2)) == 2
    assert len(later.given_back()) == MOST_TARGETS - 2


def test_a_server_has_a_number_for_each_address_that_it_is_reached_from(both: Both) -> None:
    for host, sources in (
        ("10.0.0.1", ("", "10.0.0.9", "10.0.0.10")),
        ("fd00::1", ("", "fd00::9")),
    ):
        servers = [Server.of(Address(host, 80), source) for source in sources]
        numbers = [both.supervisor.give(one) for one in servers]
        assert len(set(numbers)) == len(sources)
        assert [both.keeper.find(one) for one in servers] == numbers
        assert both.keeper.find(Server.of(Address(host, 80), "10.9.9.9")) == 0

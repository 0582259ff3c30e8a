"""How much a client of the page may ask, and which client makes room."""

from __future__ import annotations

from http import HTTPStatus

from pyforwarder.status.allowance import (
    Allowance,
    Budget,
    PerClient,
    Rate,
    RefusedRequest,
    most_crowded,
    network_of,
)


def test_a_budget_fills_up_again_and_no_further() -> None:
    budget = Budget(3, 2.0)
    assert [budget.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert not budget.take(1.9)
    assert budget.wait_s(1.9) == 2.0 - 1.9
    assert budget.take(2.0)
    assert [budget.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_what_costs_more_than_fits_waits_until_all_is_there_and_leaves_a_debt() -> None:
    budget = Budget(3, 1.0)
    assert budget.take(0.0, 5.0)
    assert budget.wait_s(0.0) == 3.0
    assert not budget.take(4.9, 5.0)
    assert budget.take(5.0, 5.0)


def test_of_those_that_have_not_asked_for_longest_nothing_is_known() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    kept = PerClient(make, most=2)
    assert [kept.of(name) for name in "abacab"] == [0, 1, 0, 2, 0, 3]
    assert len(kept) == 2


def test_a_client_is_refused_for_itself_and_the_rest_for_all() -> None:
    one = Allowance(client=Rate(3, 1), in_all=Rate(5, 1), viewer=Rate(2, 0.5))
    too_many = RefusedRequest(HTTPStatus.TOO_MANY_REQUESTS, 1)
    busy = RefusedRequest(HTTPStatus.SERVICE_UNAVAILABLE, 1)
    assert [one.refuses("a", 0.0) for _ in range(4)] == [None, None, None, too_many]
    assert [one.refuses("b", 0.0) for _ in range(3)] == [None, None, busy]
    # A viewer has an allowance of its own, which nobody else can use up.
    assert [one.refuses("c", 0.0, is_viewer=True) for _ in range(3)] == [None, None, busy]
    # What was refused for all was not taken off the client's own.
    assert one.refuses("c", 1.0) is None


def test_a_client_is_an_address_or_a_network_of_64_bits() -> None:
    assert network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("2001:db8::1") == network_of("2001:db8::2") == "2001:db8::/64"
    assert network_of("fe80::1%eth0") == "fe80::/64"
    assert network_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert network_of("") == ""


def test_the_most_crowded_network_is_found_from_the_widest_down() -> None:
    assert most_crowded([]) == []
    assert most_crowded(["192.0.2.1"]) == [0]
    assert most_crowded(["192.0.2.1", "192.0.2.2"]) == [0, 1]
    assert most_crowded(["192.0.2.1", "192.0.2.2", "192.0.2.1"]) == [0, 2]
    # One address twice, and a whole network elsewhere: the network.
    hosts = ["198.51.100.1", "198.51.100.1", *(f"10.0.{n}.1" for n in range(3))]
    assert most_crowded(hosts) == [2, 3, 4]
    hosts = ["2001:db8:1::1", "2001:db8:1::1", *(f"2001:db8:2:{n}::1" for n in range(3))]
    assert most_crowded(hosts) == [2, 3, 4]

"""In which order a name's addresses are tried, and what is learned from one connection."""

from __future__ import annotations

from pyforwarder.core.address import Address
from pyforwarder.core.eyeballs import MOST_ATTEMPTS, REST_S, TRIAL_S, Liveness, interleave


def v4(number: int) -> Address:
    return Address(f"192.0.2.{number}", 80)


def v6(number: int) -> Address:
    return Address(f"2001:db8::{number}", 80)


def test_the_families_take_turns_from_the_first_one_on() -> None:
    assert interleave([]) == []
    assert interleave([v6(1), v6(2), v6(3), v4(1)]) == [v6(1), v4(1), v6(2), v6(3)]
    assert interleave([v4(1), v4(2), v6(1), v6(2)]) == [v4(1), v6(1), v4(2), v6(2)]
    assert interleave([v4(2), v4(1)]) == [v4(2), v4(1)]


def test_few_addresses_are_tried_and_both_families_are_among_them() -> None:
    many = [v6(number) for number in range(1, 60)] + [v4(1)]
    tried = Liveness().order(many, 0.0)
    assert len(tried) == MOST_ATTEMPTS
    assert tried[:2] == [v6(1), v4(1)]


def test_an_address_that_failed_goes_behind_until_it_is_tried_again() -> None:
    liveness = Liveness()
    both = [v6(1), v4(1)]
    liveness.failed(v6(1), 100.0)
    assert liveness.order(both, 100.0) == [v4(1), v6(1)]
    assert liveness.order(both, 100.0 + REST_S - 0.1) == [v4(1), v6(1)]
    # One connection finds out; those that come meanwhile do not pay for it.
    assert liveness.order(both, 100.0 + REST_S) == both
    assert liveness.order(both, 100.0 + REST_S) == [v4(1), v6(1)]
    liveness.worked(v6(1))
    assert liveness.order(both, 100.0 + REST_S) == both


def test_what_fails_again_rests_twice_as_long() -> None:
    liveness = Liveness()
    both = [v6(1), v4(1)]
    liveness.failed(v6(1), 0.0)
    liveness.failed(v6(1), 0.1)  # of another connection, at the same time
    at_s = REST_S + 0.1
    assert liveness.order(both, at_s) == both
    liveness.failed(v6(1), at_s + 0.25)
    assert liveness.order(both, at_s + 0.25 + 2 * REST_S - 0.1) == [v4(1), v6(1)]
    assert liveness.order(both, at_s + 0.25 + 2 * REST_S) == both
    for _ in range(9):
        at_s += 1000 * REST_S
        assert liveness.order(both, at_s) == both
        liveness.failed(v6(1), at_s)
    assert liveness.order(both, at_s + 16 * REST_S) == both


def test_a_trial_that_says_nothing_is_followed_by_another() -> None:
    liveness = Liveness()
    both = [v6(1), v4(1)]
    liveness.failed(v6(1), 0.0)
    assert liveness.order(both, REST_S) == both
    assert liveness.order(both, REST_S + TRIAL_S) == both


def test_where_all_have_failed_they_are_tried_in_their_order() -> None:
    liveness = Liveness()
    for address in (v4(1), v6(1)):
        liveness.failed(address, 0.0)
    assert liveness.order([v6(1), v4(1), v4(2)], 1.0) == [v4(2), v6(1), v4(1)]
    assert liveness.order([v6(1), v4(1)], 1.0) == [v6(1), v4(1)]


def test_an_answer_full_of_addresses_that_rest_costs_one_look_at_each() -> None:
    looks = 0

    class Counted(Address):
        def __eq__(self, other: object) -> bool:
            nonlocal looks
            looks += 1
            return Address.__eq__(self, other)

        __hash__ = Address.__hash__

    many = [Counted(f"192.0.2.{number}", 80) for number in range(256)]
    liveness = Liveness()
    for address in many:
        liveness.failed(address, 0.0)
    looks = 0
    assert liveness.order(many, 1.0) == many[:MOST_ATTEMPTS]
    assert looks < 4 * len(many)


def test_what_is_remembered_is_bounded() -> None:
    liveness = Liveness()
    for number in range(5000):
        liveness.failed(Address("192.0.2.1", number), 0.0)
    assert len(liveness._resting) == 4096

"""Pairs that were another machine's: whom the keeper asks, and what it tells them."""

from __future__ import annotations

import itertools
import mmap
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from pyforwarder.datapath.ebpf.abi import Direction
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, ResetBy, Splice
from pyforwarder.datapath.splice.replicas import Interfaces, splice_of
from pyforwarder.datapath.splice.settling import Settling
from tests.helpers.failover_records import a_pair

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.abi import SpliceDirection

INDEX: Final = 1
ID: Final = 77


class World:
    """A clock, records, and everything that is said to anybody."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.memory = mmap.mmap(-1, 4 * SPLICE_BYTES)
        self.asked: list[tuple[float, Direction]] = []
        self.told: list[tuple[float, bytes, int]] = []
        self.ended: list[ResetBy] = []
        self.watched: list[int] = []
        self.settling = Settling(
            self.memory,
            cast("Any", self),
            lambda _index, why: self.ended.append(why),
            clock=lambda: self.now_s,
            tell=self.tell,
        )

    def ask(self, _index: int, _record: Splice, direction: Direction) -> bool:
        self.asked.append((self.now_s, direction))
        return True

    def watch(self, indexes: list[int]) -> None:
        self.watched += indexes

    def tell(self, direction: SpliceDirection, _family: int, seq: int, _times: int) -> None:
        self.told.append((self.now_s, bytes(direction.from_), seq))

    @property
    def record(self) -> Splice:
        """In place: what is stored there is seen at once."""
        return Splice.from_buffer(self.memory, INDEX * SPLICE_BYTES)

    def begin(self) -> None:
        """A pair of which both ends have heard of all that was sent."""
        made = splice_of(a_pair(), ID, Interfaces(2, 3), claim=1, slack=1 << 20)
        self.memory[INDEX * SPLICE_BYTES : (INDEX + 1) * SPLICE_BYTES] = bytes(made)
        for direction in Direction:
            self.acknowledges(direction)
            self.record.direction[direction].ts_recent_s = int(self.now_s)
        self.settling.begin(INDEX, ID)

    def acknowledges(self, direction: Direction, missing: int = 0) -> None:
        """This end, all that the other has sent but for so many bytes."""
        from_peer, back = self.record.direction[direction], self.record.direction[1 - direction]
        from_peer.last_ack = (int(back.last_end) - from_peer.ack_delta - missing) & 0xFFFFFFFF

    def run(self, seconds: float) -> None:
        """So long, as the keeper does."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.settling.run_due()
            self.now_s += max(0.001, self.settling.wait_s(0.01))


@pytest.fixture
def world() -> World:
    world = World()
    world.begin()
    return world


def test_both_ends_are_asked_at_once_and_more_and_more_seldom_until_one_is_given_up(
    world: World,
) -> None:
    world.run(29)
    at_s = [round(when_s - 1000, 1) for when_s, who in world.asked if who is Direction.UP]
    assert at_s[0] == 0.0
    pauses = [later - earlier for earlier, later in itertools.pairwise(at_s)]
    assert pauses == pytest.approx(
        [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, *[4.0] * (len(pauses) - 6)], abs=0.2
    )
    assert len(pauses) > 8
    assert len(world.asked) == 2 * len(at_s)
    assert world.ended == []
    world.record.direction[Direction.UP].last_received_s = 1
    world.run(2)
    assert world.ended == [ResetBy.SERVER_TIMEOUT]
    assert (world.watched, world.told) == ([], [])


def test_an_end_that_lacks_nothing_is_told_nothing(world: World) -> None:
    for direction in Direction:
        world.record.direction[direction].last_received_s = 1
    world.run(1)
    assert (world.asked, world.told, world.watched) == ([], [], [INDEX])
    assert world.settling.wait_s(5.0) == 5.0


def test_an_end_whose_bytes_were_lost_is_told_where_they_begin_until_they_have_come(
    world: World,
) -> None:
    for direction in Direction:
        world.record.direction[direction].last_received_s = 1
    world.acknowledges(Direction.DOWN, missing=700)  # of what the client has sent
    world.run(0.01)
    up = world.record.direction[Direction.UP]
    lost_at = (int(up.last_end) - 700) & 0xFFFFFFFF
    assert [said[1:] for said in world.told] == [(bytes(up.from_), lost_at)]
    world.run(0.1)
    told = len(world.told)
    assert told > 1
    world.acknowledges(Direction.DOWN, missing=100)
    world.run(1)
    assert len(world.told) == told
    assert world.settling.wait_s(5.0) == 5.0


def test_one_that_does_not_care_is_not_told_for_ever(world: World) -> None:
    for direction in Direction:
        world.record.direction[direction].last_received_s = 1
        world.acknowledges(direction, missing=1)
    world.run(60)
    assert 2 < len(world.told) <= 20
    assert world.ended == []


def test_a_question_is_newer_than_what_its_peer_can_have_heard(world: World) -> None:
    up, down = world.record.direction
    up.ts_recent, down.ts_recent = 0xFFFFFF00, 0
    world.now_s += 4
    world.run(0.01)
    clock = (0xFFFFFF00 + up.tsval_delta + 4000) & 0xFFFFFFFF
    assert down.has_last_tsval == 1
    assert 0 <= (down.last_tsval - clock) & 0xFFFFFFFF < 10_000
    assert up.has_last_tsval == 0  # the server has none


def test_what_was_idle_for_long_is_asked_with_the_stamp_that_it_knows_first(world: World) -> None:
    world.record.direction[Direction.UP].ts_recent = 5
    world.record.direction[Direction.UP].ts_recent_s = 400
    world.run(0.05)
    assert world.record.direction[Direction.DOWN].has_last_tsval == 0
    world.run(2)
    assert world.record.direction[Direction.DOWN].has_last_tsval == 1


def test_a_pair_that_has_ended_is_left_alone(world: World) -> None:
    world.record.id = 0
    world.run(1)
    assert (world.asked, world.told, world.ended) == ([], [], [])

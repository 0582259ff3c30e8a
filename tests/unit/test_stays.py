"""Connections that end with their machine: what is written of them, and which machines are told."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.splice import challenging
from pyforwarder.datapath.splice.challenging import Challenges, packet
from pyforwarder.datapath.splice.keepalive import checksum
from pyforwarder.fleet.failover.record import Endpoint, RecordFault, tag_of
from pyforwarder.fleet.failover.stays import (
    EVERY_S,
    GROUP_PAIRS,
    MOST_GROUPS,
    MOST_TEXT,
    Connection,
    Stays,
    Turn,
    decode,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

A, B = tag_of("a"), tag_of("b")
CLIENT = Connection(Endpoint(b"\x0a\x01\0\1", 9000), Endpoint(b"\x0a\x01\0\x64", 40001), True)
SERVER = Connection(Endpoint(bytes(15) + b"\1", 50000), Endpoint(bytes(15) + b"\2", 443), False)


def ends(size: int) -> st.SearchStrategy[Endpoint]:
    return st.builds(Endpoint, st.binary(min_size=size, max_size=size), st.integers(1, 65535))


CONNECTIONS = st.one_of(
    *(st.builds(Connection, ends(size), ends(size), st.booleans()) for size in (4, 16))
)


@given(st.lists(CONNECTIONS, max_size=2 * GROUP_PAIRS))
def test_a_group_is_read_as_it_was_written_and_fits(group: list[Connection]) -> None:
    text = encode(group)
    assert len(text) <= MOST_TEXT
    assert decode(text) == decode(text.encode()) == group


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_what_is_no_group_is_a_fault_and_nothing_else(data: bytes) -> None:
    for said in (data, b"1 " + data):
        with contextlib.suppress(RecordFault):
            decode(said)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one ",
        "2 ",
        "1 =",
        "1 A",
        encode([CLIENT])[:-4],
        encode([CLIENT._replace(own=Endpoint(b"\1\2\3\4", 0))]),
        encode([CLIENT]) + "A" * MOST_TEXT,
        "1 BAAA",  # bits that are not known
    ],
)
def test_groups_with_faults_are_refused(text: str) -> None:
    with pytest.raises(RecordFault):
        decode(text)


def exchange(turn: Turn, writer: Stays, *others: Stays, now_s: float) -> None:
    """As the store brings it to everybody."""
    writer.wrote(turn.puts, turn.deletes, now_s)
    for each in (writer, *others):
        for key, text in turn.puts.items():
            each.saw(key, text.encode())
        for key in turn.deletes:
            each.saw(key, None)


def test_a_group_is_written_when_it_changes_and_others_are_told() -> None:
    a, b = Stays(A), Stays(B)
    turn = a.turn({0: [CLIENT], 7: [SERVER]}, 0.0)
    assert turn.puts == {f"{A}.0": encode([CLIENT]), f"{A}.7": encode([SERVER])}
    exchange(turn, a, b, now_s=0.0)
    assert b.turn({}, 0.0).tell == turn.puts
    assert a.turn({0: [CLIENT], 7: [SERVER]}, 9.0) == Turn()  # nothing of its own is told to it
    for key, text in turn.puts.items():
        b.mark_known(key, text)
    assert b.turn({}, 0.0) == Turn()
    turn = a.turn({0: [CLIENT, SERVER]}, 9.0)
    assert turn == Turn(puts={f"{A}.0": encode([CLIENT, SERVER])}, deletes=[f"{A}.7"])
    exchange(turn, a, b, now_s=9.0)
    assert b.turn({}, 9.0).tell == {f"{A}.0": encode([CLIENT, SERVER]), f"{A}.7": ""}
    # It changes again in a moment: that is written later.
    assert a.turn({0: [CLIENT]}, 9.0 + EVERY_S / 2) == Turn()
    assert a.turn({0: [CLIENT]}, 9.0 + EVERY_S).puts == {f"{A}.0": encode([CLIENT])}


def test_what_an_earlier_process_has_written_is_removed_and_a_lost_lease_writes_all_again() -> None:
    a = Stays(A)
    a.saw_all([(f"{A}.3", encode([CLIENT]).encode()), (f"{B}.3", encode([SERVER]).encode())])
    turn = a.turn({0: [CLIENT]}, 0.0)
    assert turn == Turn(
        puts={f"{A}.0": encode([CLIENT])},
        deletes=[f"{A}.3"],
        tell={f"{B}.3": encode([SERVER])},
    )
    exchange(turn, a, now_s=0.0)
    a.lost_lease()
    assert a.turn({0: [CLIENT]}, 0.1).puts == {f"{A}.0": encode([CLIENT])}


def test_faults_in_the_store_are_counted_and_told_to_nobody() -> None:
    a = Stays(A)
    for key, value in ((f"{B}.0", b"x"), ("x", b"1 "), (f"{B}.00", b"1 "), (f"{B}.1", b"\xff ")):
        a.saw(key, value)
    assert (a.faults, a.turn({}, 0.0)) == (4, Turn())
    for number in range(MOST_GROUPS + 5):
        a.saw(f"{B}.{number}", b"1 ")
    assert a.faults == 9
    assert len(a.turn({}, 0.0).tell) == MOST_GROUPS
    a.saw(f"{B}.1", encode([CLIENT]).encode())  # one of those that it knows
    assert (a.faults, a.turn({}, 0.0).tell[f"{B}.1"]) == (9, encode([CLIENT]))


def test_groups_that_others_have_written_in_a_machines_name_are_removed_and_not_remembered() -> (
    None
):
    a = Stays(A)
    long = encode([CLIENT] * 100)
    for number in range(MOST_GROUPS + 5):
        a.saw(f"{A}.{number}", long.encode())
    assert sum(map(len, a._own.values())) == MOST_GROUPS * len(long)
    turn = a.turn({MOST_GROUPS + 2: [CLIENT]}, 0.0)
    assert turn.puts == {f"{A}.{MOST_GROUPS + 2}": encode([CLIENT])}
    assert len(turn.deletes) == MOST_GROUPS + 4


# The machines that have the addresses then


class Sent:
    """A clock, and what was sent when."""

    def __init__(self, ours: Sequence[Connection] = ()) -> None:
        self.now_s = 50.0
        self.sent: list[tuple[float, Connection]] = []
        self.challenges = Challenges(
            lambda one: one in ours,
            clock=lambda: self.now_s,
            send=lambda one: self.sent.append((round(self.now_s - 50.0, 2), one)),
        )


def test_each_peer_is_asked_soon_again_and_then_ever_more_seldom() -> None:
    world = Sent(ours=[SERVER])
    assert world.challenges.wait_s(100.0) == 100.0
    world.challenges.begin([CLIENT, SERVER])
    while (wait_s := world.challenges.wait_s(100.0)) < 100.0:
        world.now_s += wait_s
        world.challenges.run_due()
    assert world.sent == [(when_s, CLIENT) for when_s in (0.0, 0.25, 1.0, 3.0, 9.0, 27.0)]


def test_those_that_wait_for_any_try_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenging, "_MOST", 5)
    world = Sent()
    world.challenges.begin([CLIENT] * 3)
    world.challenges.run_due()  # they wait for the second one
    world.challenges.begin([SERVER] * 3)
    world.challenges.begin([SERVER] * 3)
    world.challenges.run_due()
    assert world.sent == [(0.0, CLIENT)] * 3 + [(0.0, SERVER)] * 2


def test_many_do_not_keep_the_keeper_from_its_work() -> None:
    world = Sent()
    world.challenges.begin([CLIENT] * 1000)
    world.challenges.run_due()
    assert 0 < len(world.sent) < 100
    assert world.challenges.wait_s(7.0) == 0.0


@pytest.mark.parametrize("one", [CLIENT, SERVER])
def test_a_challenge_is_a_syn_and_to_a_client_an_answer_to_one(one: Connection) -> None:
    data = packet(one, 0x01020304)
    size = len(one.own.ip)
    head, segment = (data[:20], data[20:]) if size == 4 else (data[:40], data[40:])
    assert head[-2 * size :] == one.own.ip + one.peer.ip
    assert struct.unpack("!HHI", segment[:8]) == (one.own.port, one.peer.port, 0x01020304)
    assert segment[13] == (0x12 if one.peer_connected else 0x02)
    pseudo = one.own.ip + one.peer.ip + struct.pack("!II", len(segment), 6)
    assert checksum(pseudo + segment) == 0
    assert len(segment) == 20

"""What the keeper believes of the process that tells it of other machines' pairs."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.splice import standby as standby_module
from pyforwarder.datapath.splice.challenging import Challenges
from pyforwarder.datapath.splice.standby import Standby
from pyforwarder.datapath.splice.standby_requests import MOST_AT_ONCE, FaultyStandbyError
from pyforwarder.fleet.failover.record import Entry, tag_of
from pyforwarder.fleet.failover.stays import Connection, encode
from pyforwarder.runtime import moving_addresses
from tests.helpers.failover_records import a_pair

if TYPE_CHECKING:
    import socket

    from pyforwarder.datapath.splice.abi import ResetBy, Splice

PAIR: Final = a_pair()
ENTRY: Final = Entry(tag_of("other"), 1, PAIR.encode()).encode()
FIELDS: Final[dict[str, object]] = {"n": 1, "until": 1e12}


class Nobody:
    """A keeper that must not be asked for anything."""

    def allocate(self) -> int:
        raise AssertionError

    def take_in(self, index: int, said: bytes) -> int:
        raise AssertionError

    def owns(self, index: int) -> bool:
        raise AssertionError

    def release(self, index: int) -> None:
        raise AssertionError

    def show(self, index: int, record: Splice) -> None:
        raise AssertionError

    def forget(self, index: int) -> None:
        raise AssertionError

    def end(self, index: int, why: ResetBy) -> None:
        raise AssertionError

    def remember_joined(self, index: int, sockets: Sequence[socket.socket]) -> None:
        raise AssertionError


class NoFlows:
    """A map without entries."""

    def lookup(self, key: bytes) -> bytes:
        raise FileNotFoundError


def standby() -> Standby:
    """Of a machine to which no address moves."""
    flows, nothing = cast("Any", NoFlows()), cast("Any", None)
    return Standby(Nobody(), mmap.mmap(-1, 4096), flows, nothing, nothing, addresses=(), most=10)


def ask(**request: object) -> dict[str, object]:
    return standby().answer(json.dumps({**FIELDS, **request}).encode())


def test_a_pair_of_other_addresses_is_refused() -> None:
    assert ask(do="hold", pairs=[[PAIR.key, ENTRY]])["refused"] == [PAIR.key]


def test_requests_are_answered_by_their_number() -> None:
    assert ask(do="look") == {"n": 1, "waiting": [], "taken": 0, "held": 0}
    assert ask(do="begin") == {"n": 1}
    assert ask(do="release", keys=[PAIR.key]) == {"n": 1}
    assert ask(do="let_go", pairs=[PAIR.encode()]) == {"n": 1}
    assert ask(do="stay", group=[f"{tag_of('other')}.7", "1 "]) == {"n": 1}
    assert ask(do="stay", group=[f"{tag_of('other')}.7", ""]) == {"n": 1}


def test_a_late_request_is_not_obeyed() -> None:
    assert ask(do="hold", pairs=[[PAIR.key, ENTRY]], until=0) == {"n": 1, "late": True}


@pytest.mark.parametrize(
    "request_",
    [
        {"do": "steal"},
        {"do": ["look"]},
        {"do": "look", "more": 1},
        {"do": "look", "n": -1},
        {"do": "look", "n": True},
        {"do": "look", "until": "1"},
        {"do": "look", "until": -1},
        {"do": "hold"},
        {"do": "hold", "pairs": {}},
        {"do": "hold", "pairs": [[PAIR.key]]},
        {"do": "hold", "pairs": [[PAIR.key, 1]]},
        {"do": "hold", "pairs": [["x", ENTRY]]},
        {"do": "hold", "pairs": [[PAIR.key, "1 2 3 4"]]},
        {"do": "hold", "pairs": [[PAIR.key, ENTRY]] * (MOST_AT_ONCE + 1)},
        {"do": "release", "keys": ["x"]},
        {"do": "release", "keys": [1]},
        {"do": "let_go", "pairs": ["x"]},
        {"do": "let_go", "pairs": [None]},
        {"do": "stay", "group": []},
        {"do": "stay", "group": ["x", "1 "]},
        {"do": "stay", "group": [f"{tag_of('other')}.7", None]},
        {"do": "stay", "group": [f"{tag_of('other')}.7", "2 "]},
        {"do": "stay", "group": [f"{tag_of('other')}.7", "1 AAAA"]},
    ],
)
def test_what_is_not_in_the_table_is_a_fault(request_: dict[str, object]) -> None:
    with pytest.raises(FaultyStandbyError):
        ask(**request_)


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["do", "n", "until", "pairs", "keys", "group"])
                | st.text(max_size=5),
                inner,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_request_raises_anything_else(data: bytes) -> None:
    with contextlib.suppress(FaultyStandbyError):
        standby().answer(data)
    with pytest.raises(FaultyStandbyError):
        standby().answer(b"[" * 5000)


class NoRoutes:
    """Nobody can be reached."""

    def interface(self, _: object) -> int:
        return 0


class Coming:
    """The keeper's part at a machine to which the pair's two addresses move, one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here: set[bytes] = set()
        self.announced: list[str] = []
        self.challenged: list[Connection] = []
        monkeypatch.setattr(standby_module, "Routes", NoRoutes)
        monkeypatch.setattr(standby_module, "_addresses_here", lambda: set(self.here))
        monkeypatch.setattr(moving_addresses, "announce", self.announced.extend)
        monkeypatch.setattr(Challenges, "begin", lambda _, some: self.challenged.extend(some))
        listener, source = PAIR.ends.listener, PAIR.ends.source
        self.ours = listener.ip, source.ip
        self.both = [
            Connection(listener, PAIR.ends.client, True),
            Connection(source, PAIR.ends.server, False),
        ]
        self.addresses = [str(ipaddress.ip_address(ip)) for ip in self.ours]
        nothing = cast("Any", None)
        self._standby = Standby(
            Nobody(),
            mmap.mmap(-1, 4096),
            cast("Any", NoFlows()),
            nothing,
            nothing,
            addresses=self.addresses,
            most=10,
        )

    def ask(self, **request: object) -> dict[str, object]:
        """What is answered; the addresses have been looked at afterwards."""
        answer = self._standby.answer(json.dumps({**FIELDS, **request}).encode())
        self._standby.routes_changed()
        self._standby.run_due()
        return answer


def test_ends_of_a_pair_that_could_not_be_held_are_reset_when_its_addresses_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = Coming(monkeypatch)
    assert world.ask(do="hold", pairs=[[PAIR.key, ENTRY]])["refused"] == [PAIR.key]
    assert (world.announced, world.challenged) == ([], [])
    world.here |= set(world.ours)
    world.ask(do="look")
    assert world.challenged == world.both
    assert sorted(world.announced) == sorted(world.addresses)
    world.ask(do="look")
    assert world.challenged == world.both  # not again


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", ["of a group", "not held"])
def test_ends_are_reset_as_their_addresses_come_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, kind: str, first: int
) -> None:
    world = Coming(monkeypatch)
    world.ask(do="look")  # none of them is here
    if kind == "of a group":
        world.ask(do="stay", group=[f"{tag_of('other')}.7", encode(world.both)])
    else:
        world.ask(do="hold", pairs=[[PAIR.key, ENTRY]])
    for count, number in enumerate((first, 1 - first), 1):
        world.here.add(world.ours[number])
        world.ask(do="look")
        assert len(world.challenged) == count
        assert world.challenged[-1] == world.both[number]
    world.ask(do="look")
    assert len(world.challenged) == 2  # none of them again

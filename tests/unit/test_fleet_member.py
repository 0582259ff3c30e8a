"""A machine of a fleet: what it hears from the store and from its supervisor, and what it tells."""

from __future__ import annotations

from typing import Any

import pytest

from pyforwarder.core.address import Address
from pyforwarder.fleet.layout import Edition, InstanceReport, Keys, Server, instances_in
from pyforwarder.fleet.member import Member
from pyforwarder.fleet.store import Found
from pyforwarder.supervisor.messages import FROM_FLEET, understand

KEYS = Keys("edge")


class Store:
    """Keys in memory."""

    endpoint = "here"

    def __init__(self) -> None:
        self.answered_s = 0.0
        self.keys: dict[str, str] = {}
        self.lists: list[str] = []
        self.watched: list[tuple[str, float]] = []

    def list(self, prefix: str) -> Found:
        self.lists.append(prefix)
        found = [(key, value.encode()) for key, value in self.keys.items()]
        return Found(1, [one for one in found if one[0].startswith(prefix)])

    def put(self, key: str, value: str, *, lease: int = 0) -> None:
        assert lease == 7
        self.keys[key] = value

    def grant(self, _ttl_s: int) -> int:
        return 7

    def changes(self, prefix: str, *, after: int, until_s: float) -> tuple[int, ...]:
        del after
        self.watched.append((prefix, until_s))
        return ()

    def renew(self, lease: int) -> bool:
        assert lease == 7
        return True


class Above:
    """A supervisor that has said some things."""

    def __init__(self) -> None:
        self.says: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        del timeout_s
        return self.says.pop(0) if self.says else None


def make() -> tuple[Member, Store, Above, list[float]]:
    store, above, now_s = Store(), Above(), [1000.0]
    member = Member(store, KEYS, "one", above, clock=lambda: now_s[0])  # type: ignore[arg-type]
    return member, store, above, now_s


def test_what_is_said_by_the_way_is_not_taken_for_the_answer() -> None:
    member, store, above, _ = make()
    store.keys[KEYS.config] = Edition(serial=3, text="x").encode()
    above.says = [
        {"version": "1", "serial": 0, "answers": False},
        {"version": "1", "serial": 3, "answers": True},
        {"version": "1", "serial": 3, "pairs": 9, "answers": False},
    ]
    member._read_edition()
    assert [message["serial"] for message in above.told] == [3]
    assert above.says == []
    member._write_report()
    said = InstanceReport.decode(store.keys[KEYS.instance("one")])
    assert (said.serial, said.pairs) == (3, 9)


def test_other_machines_are_looked_at_now_and_then_and_told_of() -> None:
    member, store, above, now_s = make()
    store.keys[KEYS.instance("two")] = InstanceReport(version="2", pairs=5).encode()
    member._list_machines()
    ((message, instances),) = [*above.told[0].items()]
    assert (message, [one["instance"] for one in instances]) == ("instances", ["two"])
    store.keys.clear()
    member._list_machines()  # too soon
    assert store.lists == [KEYS.instances]
    now_s[0] += 5
    member._list_machines()
    assert above.told[1:] == [{"instances": []}]


def test_two_machines_of_one_name_say_so_and_one_that_was_alone_for_a_minute_does_not() -> None:
    store, now_s = Store(), [1000.0]
    above = [Above(), Above()]
    members = [
        Member(store, KEYS, "one", one, clock=lambda: now_s[0])  # type: ignore[arg-type]
        for one in above
    ]
    key = KEYS.instance("one")

    def turn(member: Member, supervisor: Above, pairs: int) -> None:
        supervisor.says = [{"version": "1", "pairs": pairs}]
        member._stay(1)
        now_s[0] += 2.5

    def warned() -> list[int]:
        return [one.told.count({"overwritten": key}) for one in above]

    def why() -> str:
        (row,) = instances_in(KEYS, store.list(KEYS.instances).entries)
        said: str = row["why"]
        return said

    # In an upgrade a report or two are the other daemon's.
    for _ in range(3):
        for member, supervisor in zip(members, above, strict=True):
            turn(member, supervisor, 1)
    assert (warned(), why()) == ([0, 0], "")
    for pairs in range(2, 5):
        for member, supervisor in zip(members, above, strict=True):
            turn(member, supervisor, pairs)
    assert (warned(), why()) == ([1, 1], "another machine has this name, too (fleet.instance)")
    # The other has got a name of its own.
    for _ in range(30):
        turn(members[0], above[0], 9)
    assert (warned(), why()) == ([1, 1], "")


def test_a_report_that_is_gone_is_written_again() -> None:
    member, store, above, now_s = make()
    above.says = [{"version": "1"}]
    member._receive(0)
    member._write_report()
    for _ in range(5):
        del store.keys[KEYS.instance("one")]
        now_s[0] += 5
        member._list_machines()
        member._write_report()
        assert InstanceReport.decode(store.keys[KEYS.instance("one")]).version == "1"
    assert [one for one in above.told if "overwritten" in one] == []


def test_it_tells_when_the_store_has_answered_and_what_there_was_of_no_use() -> None:
    member, store, above, now_s = make()
    store.keys[KEYS.config] = "?"
    store.keys[f"{KEYS.servers}web/name:80"] = "{}"
    member._read_edition()
    store.answered_s = now_s[0] - 0.25
    member._list_machines()
    answered = [one for one in above.told if "answered_ago_ms" in one]
    assert answered == [{"answered_ago_ms": 250, "unusable": 2}]
    understand(answered[0], [], FROM_FLEET)
    # One that stays is not counted again when something else changes.
    for weight in range(3):
        store.keys[KEYS.server("web", Address("10.0.0.1", 80))] = Server(weight=weight).encode()
        member._read_edition()
    assert member._unusable == 2
    store.keys[f"{KEYS.servers}web/other:80"] = "{}"
    member._read_edition()
    assert member._unusable == 3


def test_a_server_that_changes_all_the_time_has_the_configuration_made_anew_seldom() -> None:
    member, store, above, now_s = make()
    key = KEYS.server("web", Address("10.0.0.1", 80))
    store.keys[KEYS.config] = Edition(serial=1, text="x").encode()
    member._read_edition()
    began_s, weights = now_s[0], []

    def change(weight: int) -> None:
        store.keys[key] = Server(weight=weight).encode()
        member._read_edition()

    for turn in range(200):  # ten seconds
        change(turn % 256)
        now_s[0] += 0.05
    weights = [one["servers"]["web"]["10.0.0.1:80"] for one in above.told if one.get("servers")]
    assert weights[:10] == [*range(10)]
    assert 25 <= len(weights) <= 10 + 2 * (now_s[0] - began_s)
    # The last change comes in a moment, a new edition at once, and after a rest all do.
    change(77)
    assert member._is_waiting
    waits_s = member._tell_s - now_s[0]
    assert 0 < waits_s <= 0.5
    store.keys[KEYS.config] = Edition(serial=2, text="y").encode()
    member._read_edition()
    assert (above.told[-1]["serial"], above.told[-1]["servers"]["web"]) == (2, {"10.0.0.1:80": 77})
    assert not member._is_waiting
    change(78)
    now_s[0] = member._tell_s
    member._read_edition()
    assert above.told[-1]["servers"] == {"web": {"10.0.0.1:80": 78}}
    now_s[0] += 6
    before = len(above.told)
    for weight in range(10):
        change(weight)
    assert len(above.told) == before + 10


class SlowAbove(Above):
    """A supervisor that needs time for what it is told."""

    def __init__(self, now_s: list[float], takes_s: float) -> None:
        super().__init__()
        self.now_s = now_s
        self.takes_s = takes_s

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        if not timeout_s:
            return None
        self.now_s[0] += self.takes_s
        return {"version": "1", "answers": True}


@pytest.mark.parametrize(("takes_s", "share"), [(0.02, 0.2), (0.6, 0.2), (2.0, 0.2), (6.0, 0.4)])
def test_where_a_change_is_dear_the_supervisor_has_time_for_other_things(
    takes_s: float, share: float
) -> None:
    store, now_s = Store(), [1000.0]
    above = SlowAbove(now_s, takes_s)
    member = Member(store, KEYS, "one", above, clock=lambda: now_s[0])  # type: ignore[arg-type]
    key = KEYS.server("web", Address("10.0.0.1", 80))

    def change_for(seconds: float) -> float:
        """Which part of that time the supervisor has worked."""
        began_s, before, turn = now_s[0], len(above.told), 0
        while now_s[0] < began_s + seconds:
            turn += 1
            store.keys[key] = Server(weight=turn % 256).encode()
            member._read_edition()
            now_s[0] += 0.05
        return (len(above.told) - before) * takes_s / (now_s[0] - began_s)

    change_for(20)  # what may be done at once
    assert change_for(200) <= share
    assert member._tell_s <= now_s[0] + 10


def test_an_edition_that_comes_while_servers_wait_is_watched_for() -> None:
    member, store, _, now_s = make()
    key = KEYS.server("web", Address("10.0.0.1", 80))
    for weight in range(12):
        store.keys[key] = Server(weight=weight).encode()
        member._read_edition()
    assert member._is_waiting
    member._stay(1)
    assert store.watched == [(KEYS.config, member._tell_s)]
    now_s[0] = member._tell_s
    member._read_edition()
    member._stay(1)
    assert store.watched[1:] == [(KEYS.current, member._renew_at_s)]

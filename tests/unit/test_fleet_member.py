"""A machine of a fleet: what it hears from the store and from its supervisor, and what it tells."""

from __future__ import annotations

from typing import Any

from pyforwarder.fleet.layout import Edition, InstanceReport, Keys
from pyforwarder.fleet.member import Member
from pyforwarder.fleet.store import Found

KEYS = Keys("edge")


class Store:
    """Keys in memory."""

    endpoint = "here"

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.lists: list[str] = []

    def list(self, prefix: str) -> Found:
        self.lists.append(prefix)
        found = [(key, value.encode()) for key, value in self.keys.items()]
        return Found(1, [one for one in found if one[0].startswith(prefix)])

    def put(self, key: str, value: str, *, lease: int = 0) -> None:
        assert lease == 7
        self.keys[key] = value

    def grant(self, _ttl_s: int) -> int:
        return 7


class Above:
    """A supervisor that has said some things."""

    def __init__(self) -> None:
        self.says: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []

    def tell(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
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
    member._look()
    assert [message["serial"] for message in above.told] == [3]
    assert above.says == []
    member._say_how_we_fare()
    said = InstanceReport.decode(store.keys[KEYS.instance("one")])
    assert (said.serial, said.pairs) == (3, 9)


def test_other_machines_are_looked_at_now_and_then_and_told_of() -> None:
    member, store, above, now_s = make()
    store.keys[KEYS.instance("two")] = InstanceReport(version="2", pairs=5).encode()
    member._look_around()
    ((message, instances),) = [*above.told[0].items()]
    assert (message, [one["instance"] for one in instances]) == ("instances", ["two"])
    store.keys.clear()
    member._look_around()  # too soon
    assert store.lists == [KEYS.instances]
    now_s[0] += 5
    member._look_around()
    assert above.told[1:] == [{"instances": []}]

"""Tokens that are used up in a store: the creator of a key has the token; few leases."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pyforwarder.fleet.claims import CLOCKS_APART_S, MOST_AT_ONCE, Claim, Claims
from pyforwarder.fleet.layout import Keys
from pyforwarder.fleet.store import NoSuchLeaseError, StoreError
from pyforwarder.supervisor.messages import FROM_TOKENS, understand


class Store:
    """Keys in memory."""

    endpoint = "here"
    answered_s = 0.0
    timeout_s = 0.5
    until_s = math.inf

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.leases: dict[int, int] = {}
        self.calls: list[int] = []
        self.fails: list[StoreError] = []

    def grant(self, ttl_s: int) -> int:
        self.leases[len(self.leases) + 1] = ttl_s
        return len(self.leases)

    def get(self, key: str) -> None:
        assert key == Keys("edge").tokens
        self.looked_until_s = self.until_s
        self.calls.append(0)
        if self.fails:
            raise self.fails.pop(0)
        self.answered_s += 10.0

    def create_each(self, entries: list[tuple[str, str, int]]) -> list[bool]:
        self.calls.append(len(entries))
        assert self.until_s == math.inf
        assert len({key for key, _, _ in entries}) == len(entries)
        if self.fails:
            raise self.fails.pop(0)
        return [self.keys.setdefault(key, value) == value for key, value, _ in entries]


class Above:
    """A supervisor that asks and then goes."""

    def __init__(self, *claims: Claim) -> None:
        self.claims = list(claims)
        self.quiet = 0  # so often nobody asks for long
        self.told: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    def receive(self, timeout_s: float) -> Claim | None:
        if self.claims:
            return self.claims.pop(0)
        if timeout_s:
            if not self.quiet:
                raise EOFError
            self.quiet -= 1
        return None


class Play:
    def __init__(self) -> None:
        self.store = Store()
        self.now_s = 0.0
        self.unix_s = 1_000_000.0
        self.above = Above()
        self.claims = Claims(
            self.store,  # type: ignore[arg-type]
            Keys("edge"),
            "one",
            self.above,
            clock=lambda: self.now_s,
            unix_time_s=lambda: self.unix_s,
        )

    def ask(self, *claims: tuple[str, float]) -> list[dict[str, Any]]:
        """What is told when these are asked: digests, and how long they are good."""
        self.above.claims = [
            Claim(number, digest, int(self.unix_s + left_s))
            for number, (digest, left_s) in enumerate(claims, 1)
        ]
        self.above.told.clear()
        with pytest.raises(EOFError):
            self.claims.run()
        return list(self.above.told)


def test_the_first_has_it_and_claims_that_came_meanwhile_go_together() -> None:
    play = Play()
    assert play.ask(("a", 60), ("b", 60), ("a", 60)) == [
        {"claimed": [1, 2], "used": [3], "unknown": []}
    ]
    assert play.ask(("b", 60), ("c", 60)) == [{"claimed": [2], "used": [1], "unknown": []}]
    assert play.store.calls == [2, 2]
    assert set(play.store.keys) == {f"/pyforwarder/edge/tokens/{name}" for name in "abc"}
    many = [(str(n), 60.0) for n in range(MOST_AT_ONCE + 1)]
    assert [len(told["claimed"]) for told in play.ask(*many)] == [MOST_AT_ONCE, 1]


def test_a_store_that_does_not_answer_is_told_of_once_and_claims_are_unknown() -> None:
    play = Play()
    play.store.fails = [StoreError("gone"), StoreError("gone")]
    unknown = {"claimed": [], "used": [], "unknown": [1]}
    assert play.ask(("a", 60)) == [{"store": "lost", "endpoint": "gone"}, unknown]
    assert play.ask(("a", 60)) == [unknown]
    assert play.ask(("a", 60)) == [
        {"store": "connected", "endpoint": "here"},
        {"claimed": [1], "used": [], "unknown": []},
    ]


def test_tokens_that_expire_together_share_a_lease_that_is_long_enough() -> None:
    play = Play()
    for second in range(0, 600, 7):
        play.now_s, play.unix_s = float(second), 1_000_000.0 + second
        left_s = 300
        play.ask((f"t{second}", left_s))
        lease = play.claims._leases[max(play.claims._leases)]
        assert lease.ends_s >= second + left_s + CLOCKS_APART_S
    assert len(play.store.leases) <= 600 // 60 + 1
    # Also where the time of day is set back meanwhile, and for tokens that live for years.
    play.unix_s -= 1800
    play.ask(("back", 2100))
    assert any(
        lease.ends_s >= play.now_s + 2100 + CLOCKS_APART_S for lease in play.claims._leases.values()
    )
    play.ask(("long", 1e12), ("gone", -5.0))
    assert max(play.store.leases.values()) < 3651 * 86400


def test_a_lease_that_is_gone_is_made_anew() -> None:
    play = Play()
    play.ask(("a", 60))
    play.store.fails = [NoSuchLeaseError("gone")]
    assert play.ask(("b", 60))[-1]["claimed"] == [1]
    assert len(play.store.leases) == 2


def test_where_no_token_is_used_the_store_is_looked_for_now_and_then() -> None:
    """So the first client that has one need not find out that it is lost, nor an operator."""
    play = Play()
    play.above.quiet = 3
    play.store.fails = [StoreError("no answer")] * 2
    assert play.ask() == [
        {"store": "lost", "endpoint": "no answer"},
        {"store": "connected", "endpoint": "here"},
    ]
    assert play.store.calls == [0, 0, 0]
    play.above.quiet, play.now_s = 1, 12.5
    assert play.ask() == [{"answered_ago_ms": 2500, "unusable": 0}]
    play.above.quiet = 1
    assert play.ask() == []  # that was told a moment ago
    understand({"answered_ago_ms": 2500, "unusable": 0}, [], FROM_TOKENS)


def test_a_claim_waits_no_longer_for_a_look_than_one_member_is_waited_for() -> None:
    """The worker waits until all members were asked by its claim, and one before."""
    play = Play()
    play.now_s, play.above.quiet = 7.0, 1
    play.store.fails = [StoreError("no answer")]
    assert play.ask() == []  # the next member may answer
    assert play.store.looked_until_s == 7.5
    assert play.ask(("a", 60))[-1]["claimed"] == [1]
    play.above.quiet = 1
    play.store.fails = [StoreError("no answer")]
    assert play.ask() == []

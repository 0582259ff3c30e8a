"""Single-use tokens, used up in the store of a fleet: the machine that creates a token's key has
it.

    /pyforwarder/FLEET/tokens/DIGEST      a `UsedToken`, with a lease for as long as it may be good

Runs in a process of its own without privileges, apart from the one that watches the store, so that
neither waits for the other. Claims that have come meanwhile go to the store in one transaction.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pyforwarder.fleet.exchanges import Exchanges
from pyforwarder.fleet.layout import Keys, UsedToken
from pyforwarder.fleet.store import NoSuchLeaseError, StoreError
from pyforwarder.fleet.supervisor import Listening

if TYPE_CHECKING:
    from pyforwarder.fleet.store import Store

# In one transaction: etcd takes 128 operations by default.
MOST_AT_ONCE: Final = 64
# Where no token is used, the store is asked so often whether it is there: the first client that has
# one need not find out. A claim that comes meanwhile waits: one member alone is asked then, if it
# does not answer, the next one in the next look.
_LOOK_S: Final = 5.0
_FAILED_LOOKS: Final = 2  # in a row: the store is lost
# The clocks of two machines may be apart by this much, and a token is not good again on one of them
# because the store has forgotten it.
CLOCKS_APART_S: Final = 60
# A lease is for all tokens that expire within the same time, the shortest of these that is at least
# an eighth of what they have left: few leases, and few keys that stay longer than they must.
_STEPS_S: Final = (60, 3600, 86400)
_LONGEST_S: Final = 3650 * 86400
_MOST_LEASES: Final = 256
# A token that nobody needs to remember: it has expired on its way here.
_SHORTEST_S: Final = 1
_ANSWERS: Final = {True: "claimed", False: "used", None: "unknown"}


class Claim(NamedTuple):
    """What the supervisor asks: whether this is the token's first use."""

    number: int
    digest: str
    until_unix_s: int


class ClaimingSupervisor(Listening, Protocol):
    """The supervisor, which asks for tokens to be used up, and is told what came of it."""

    def receive(self, timeout_s: float) -> Claim | None:
        """The next claim; None if there is none within that time.

        Raises:
            EOFError: the supervisor is gone.
        """


class _Lease(NamedTuple):
    id: int
    ends_s: float  # by our clock that goes on steadily


class Claims:
    """Asks the store for as long as the supervisor lives."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        name: str,
        supervisor: ClaimingSupervisor,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_time_s: Callable[[], float],
    ) -> None:
        """`name` is what this machine is called in the fleet."""
        self._store = store
        self._keys = keys
        self._name = name
        self._supervisor = supervisor
        self._clock = clock
        self._unix_time_s = unix_time_s
        self._exchanges = Exchanges(supervisor)
        self._leases: OrderedDict[int, _Lease] = OrderedDict()
        self._is_lost = False
        self._failed_looks = 0  # in a row

    def run(self) -> None:
        """Use up tokens as the supervisor asks, until it is gone.

        Raises:
            EOFError, OSError: it is.
        """
        while True:
            claims = self._next()
            self._exchanges.tell(self._store.answered_s, self._clock())
            if not claims:
                self._look()
                continue
            try:
                found: list[bool | None] = [*self._claim(claims)]
            except StoreError as error:
                found = [None] * len(claims)
                self._report_lost(str(error))
            else:
                self._report_found()
            answers: dict[str, list[int]] = {"claimed": [], "used": [], "unknown": []}
            for claim, is_first in zip(claims, found, strict=True):
                answers[_ANSWERS[is_first]].append(claim.number)
            self._supervisor.send(answers)

    def _next(self) -> list[Claim]:
        first = self._supervisor.receive(_LOOK_S)
        if first is None:
            return []
        claims = [first]
        while len(claims) < MOST_AT_ONCE:
            more = self._supervisor.receive(0.0)
            if more is None:
                break
            claims.append(more)
        return claims

    def _look(self) -> None:
        self._store.until_s = self._clock() + self._store.timeout_s
        try:
            self._store.get(self._keys.tokens)  # no token has this key
        except StoreError as error:
            self._failed_looks += 1
            if self._failed_looks >= _FAILED_LOOKS:
                self._report_lost(str(error))
        else:
            self._report_found()
        finally:
            self._store.until_s = math.inf

    def _claim(self, claims: Sequence[Claim]) -> Sequence[bool]:
        """Whether each is the first.

        Raises:
            StoreError: the store does not answer; some of them may be used up there all the same.
        """
        # Each token once: etcd takes no transaction that sets a key twice.
        once = {claim.digest: claim for claim in reversed(claims)}
        # Only we can have written it: if the answer to a first try was lost, it is ours.
        value = UsedToken(by=self._name, claim=secrets.token_hex(16)).encode()
        try:
            created = self._create(once, value)
        except NoSuchLeaseError:
            # The store was put back to an earlier time, or an operator has removed the lease.
            self._leases.clear()
            created = self._create(once, value)
        return [once[one.digest] is one and created[one.digest] for one in claims]

    def _create(self, claims: dict[str, Claim], value: str) -> dict[str, bool]:
        entries = [
            (self._keys.token(digest), value, self._lease_for(claim.until_unix_s))
            for digest, claim in claims.items()
        ]
        return dict(zip(claims, self._store.create_each(entries), strict=True))

    def _lease_for(self, until_unix_s: int) -> int:
        now_s, now_unix_s = self._clock(), self._unix_time_s()
        left_s = min(max(until_unix_s - now_unix_s, _SHORTEST_S), _LONGEST_S)
        step_s = next((step for step in _STEPS_S if 8 * step >= left_s), _STEPS_S[-1])
        end_unix_s = (int(now_unix_s + left_s) // step_s + 1) * step_s
        lease = self._leases.get(end_unix_s)
        # The time of day may have been set meanwhile; the lease goes by a clock that is not.
        if lease is None or lease.ends_s < now_s + left_s + CLOCKS_APART_S:
            ttl_s = int(end_unix_s - now_unix_s) + 1 + CLOCKS_APART_S
            lease = _Lease(self._store.grant(ttl_s), now_s + ttl_s)
            self._leases[end_unix_s] = lease
            while len(self._leases) > _MOST_LEASES:
                self._leases.popitem(last=False)
        return lease.id

    def _report_lost(self, why: str) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._supervisor.send({"store": "lost", "endpoint": why[:500]})

    def _report_found(self) -> None:
        self._failed_looks = 0
        if self._is_lost:
            self._is_lost = False
            self._supervisor.send({"store": "connected", "endpoint": self._store.endpoint})

"""One machine of a fleet: hears what is to be in force, and says how it fares.

Runs in a process of its own, which has no privileges: what the store says is a stranger's word
until the supervisor has checked it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from pyforwarder.fleet.layout import (
    Edition,
    InstanceReport,
    Keys,
    ValueFault,
    instances_in,
    registered_servers,
)
from pyforwarder.fleet.store import StoreError

if TYPE_CHECKING:
    from pyforwarder.fleet.store import Store

# A machine that is dead is not listed any more after this long.
LEASE_S: Final = 30
_RENEW_S: Final = 10.0
# How often the other machines are looked at; a watch ends as often anyway.
_LOOK_AROUND_S: Final = 4.0
# Pauses before the store is asked again, after it did not answer.
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
# Servers come and go in groups: so long others are waited for.
_GATHER_S: Final = 0.02
# The supervisor binds listeners and tells its workers before it answers.
_ANSWER_S: Final = 10.0
_MOST_FAULTS: Final = 10


class Supervisor(Protocol):
    """The process above us."""

    def tell(self, message: dict[str, Any]) -> None:
        """Send it a message.

        Raises:
            OSError: it is gone.
        """

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """What it says within that time.

        Raises:
            EOFError: it is gone.
        """


class Member:
    """Watches the store for as long as the supervisor lives."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        name: str,
        supervisor: Supervisor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is what this machine is called in the fleet."""
        self._store = store
        self._keys = keys
        self._name = name
        self._supervisor = supervisor
        self._clock = clock
        self._told: dict[str, Any] | None = None
        self._report: InstanceReport | None = None
        self._reported: InstanceReport | None = None
        self._lease = 0
        self._renew_at_s = 0.0
        self._look_around_at_s = 0.0

    def run(self) -> None:
        """Until the supervisor is gone.

        Raises:
            EOFError, OSError: it is.
        """
        pause_s = _FIRST_PAUSE_S
        is_lost = True
        while True:
            try:
                revision = self._look()
                if is_lost:
                    self._supervisor.tell({"store": "connected", "endpoint": self._store.endpoint})
                is_lost, pause_s = False, _FIRST_PAUSE_S
                self._stay(revision)
            except StoreError as error:
                if not is_lost or pause_s == _FIRST_PAUSE_S:
                    self._supervisor.tell({"store": "lost", "endpoint": str(error)[:500]})
                is_lost = True
                self._hear(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _look(self) -> int:
        """Tell the supervisor what is in the store, if that has changed; the store's revision."""
        found = self._store.list(self._keys.current)
        entries = dict(found.entries)
        edition, faults = None, []
        if (value := entries.pop(self._keys.config, None)) is not None:
            try:
                edition = Edition.decode(value)
            except ValueFault as fault:
                faults.append(f"{self._keys.config}: {fault}")
        servers, more = registered_servers(
            self._keys,
            [entry for entry in entries.items() if entry[0].startswith(self._keys.servers)],
        )
        said = {
            "servers": servers,
            "serial": edition.serial if edition else 0,
            "text": edition.text if edition else "",
            "faults": [*faults, *more][:_MOST_FAULTS],
        }
        if said != self._told:
            self._supervisor.tell(said)
            self._told = said
            self._hear(_ANSWER_S, for_answer=True)
        return found.revision

    def _stay(self, revision: int) -> None:
        """Until something changes, or it is time to look whether the store is still there."""
        self._hear(0)
        self._say_how_we_fare()
        self._look_around()
        for _ in self._store.changes(self._keys.current, after=revision, until_s=self._renew_at_s):
            self._hear(_GATHER_S)
            return

    def _hear(self, timeout_s: float, *, for_answer: bool = False) -> None:
        """Take what the supervisor says of this machine; wait so long for it.

        It says so again and again, and marks what is its answer to what we have told.
        """
        deadline_s = self._clock() + timeout_s
        while True:
            said = self._supervisor.hear(max(0.0, deadline_s - self._clock()))
            if said is None:
                return
            self._report = InstanceReport.model_validate(said)
            if not for_answer or said.get("answers"):
                deadline_s = 0.0

    def _look_around(self) -> None:
        """Tell of the machines that there are, now and then."""
        now_s = self._clock()
        if now_s < self._look_around_at_s:
            return
        self._look_around_at_s = now_s + _LOOK_AROUND_S
        found = self._store.list(self._keys.instances)
        self._supervisor.tell({"instances": instances_in(self._keys, found.entries)})

    def _say_how_we_fare(self) -> None:
        now_s = self._clock()
        if self._lease and now_s < self._renew_at_s and self._report == self._reported:
            return
        if not self._lease or not self._store.renew(self._lease):
            self._lease, self._reported = self._store.grant(LEASE_S), None
        self._renew_at_s = now_s + _RENEW_S
        if self._report is not None and self._report != self._reported:
            key = self._keys.instance(self._name)
            self._store.put(key, self._report.encode(), lease=self._lease)
            self._reported = self._report

"""Learns what a fleet has in force, for one machine, and reports how the machine fares.

Runs in a process of its own, which has no privileges: what the store says is a stranger's word
until the supervisor has checked it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from pyforwarder.fleet.exchanges import Exchanges
from pyforwarder.fleet.layout import (
    Edition,
    InstanceReport,
    Keys,
    ValueFault,
    instances_in,
    registered_servers,
)
from pyforwarder.fleet.store import StoreError
from pyforwarder.fleet.supervisor import Listening
from pyforwarder.fleet.watching import Pause

if TYPE_CHECKING:
    from pyforwarder.fleet.store import Store

# A machine that is dead is not listed any more after this long.
LEASE_S: Final = 30
_RENEW_S: Final = 10.0
# How often the other machines are looked at; a watch ends as often anyway.
_LIST_S: Final = 4.0
# Servers come and go in groups: so long others are waited for.
_GATHER_S: Final = 0.02
# The supervisor binds listeners and tells its workers before it answers.
_ANSWER_S: Final = 10.0
_MOST_FAULTS: Final = 10
# A server that changes all the time has the configuration made anew each time, at all machines. So
# many changes within this time are put in force at once, or as many as take so long together; then
# a fifth of the supervisor's time is for them (more where one takes longer than a quarter of the
# longest rest), and two in a second at most.
_AT_ONCE: Final = 10
_SPENT_S: Final = 1.0
_PACE_S: Final = 5.0
_REST: Final = 4
_LEAST_REST_S: Final = 0.5
_LONGEST_REST_S: Final = 10.0
# In an upgrade two daemons have the same name for a moment: so often in this time is no moment.
_OFTEN: Final = 3
_OFTEN_S: Final = 60.0
# A machine that ends waits no longer for the store.
LEAVE_S: Final = 0.8


class MachineSupervisor(Listening, Protocol):
    """The supervisor, which says what this machine reports."""

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return what the supervisor says within that time; None: nothing.

        Raises:
            EOFError: the supervisor is gone.
        """


class _Told(NamedTuple):
    """Servers had changed, and the supervisor has answered."""

    end_s: float
    took_s: float


class Member:
    """Watches the store for as long as the supervisor lives."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        name: str,
        supervisor: MachineSupervisor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is what this machine is called in the fleet."""
        self._store = store
        self._keys = keys
        self._name = name
        self._supervisor = supervisor
        self._clock = clock
        self._exchanges = Exchanges(supervisor)
        self._unusable = 0
        self._faults: set[str] = set()  # as read last
        self._told: dict[str, Any] | None = None
        self._lately: list[_Told] = []  # within `_PACE_S`
        self._tell_s = 0.0  # not before, if servers alone have changed
        self._is_waiting = False  # for that time
        self._report: InstanceReport | None = None
        self._reported: InstanceReport | None = None
        self._lease = 0
        self._renew_at_s = 0.0
        self._list_machines_at_s = 0.0
        self._writer = secrets.token_hex(8)
        self._overwritten: list[float] = []  # when others had written in our place
        self._warn_at_s = 0.0  # not before

    def run(self) -> None:
        """Follow the store until the supervisor is gone.

        Raises:
            EOFError, OSError: it is.
        """
        pause = Pause()
        is_lost = True
        while True:
            try:
                revision = self._read_edition()
                if is_lost:
                    self._supervisor.send({"store": "connected", "endpoint": self._store.endpoint})
                is_lost = False
                pause.end()
                self._stay(revision)
            except StoreError as error:
                if not is_lost or pause.is_first:
                    self._supervisor.send({"store": "lost", "endpoint": str(error)[:500]})
                is_lost = True
                self._receive(pause.next_s())

    def leave(self) -> None:
        """Take this machine's report away; if the store does not answer, its lease ends it."""
        if self._lease:
            self._store.until_s = self._clock() + LEAVE_S
            self._store.revoke(self._lease)

    def _read_edition(self) -> int:
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
        faults += more
        message = {
            "servers": servers,
            "serial": edition.serial if edition else 0,
            "text": edition.text if edition else "",
            "faults": faults[:_MOST_FAULTS],
        }
        self._unusable += len(set(faults) - self._faults)
        self._faults = set(faults)
        self._is_waiting = False
        if message != self._told:
            self._tell(message)
        return found.revision

    def _tell(self, message: dict[str, Any]) -> None:
        """Have what the store says put in force, now or when there is time for it again."""
        now_s = self._clock()
        edition = ("serial", "text")
        is_new = self._told is None or any(message[key] != self._told[key] for key in edition)
        self._is_waiting = not is_new and now_s < self._tell_s
        if self._is_waiting:
            return
        self._supervisor.send(message)
        self._told = message
        self._receive(_ANSWER_S, for_answer=True)
        if not is_new:
            end_s = self._clock()
            took_s = end_s - now_s
            lately = [one for one in self._lately if end_s < one.end_s + _PACE_S]
            self._lately = [*lately, _Told(end_s, took_s)]
            spent_s = sum(one.took_s for one in self._lately)
            if len(self._lately) >= _AT_ONCE or spent_s >= _SPENT_S:
                self._tell_s = end_s + min(max(_LEAST_REST_S, _REST * took_s), _LONGEST_REST_S)

    def _stay(self, revision: int) -> None:
        """Wait until something changes, or it is time to look whether the store is still there."""
        self._receive(0)
        if self._reported is not None:
            self._list_machines()  # else one that wrote in our place is not seen
        self._write_report()
        self._list_machines()
        keys, until_s = self._keys.current, self._renew_at_s
        if self._is_waiting:  # servers may change meanwhile; a new edition is not to wait
            keys, until_s = self._keys.config, self._tell_s
        for _ in self._store.changes(keys, after=revision, until_s=until_s):
            self._receive(_GATHER_S)
            return

    def _receive(self, timeout_s: float, *, for_answer: bool = False) -> None:
        """Take what the supervisor says of this machine; wait so long for it.

        It says so again and again, and marks what is its answer to what we have told.
        """
        deadline_s = self._clock() + timeout_s
        while True:
            message = self._supervisor.receive(max(0.0, deadline_s - self._clock()))
            if message is None:
                return
            report = InstanceReport.model_validate(message)
            self._report = report.model_copy(update={"writer": self._writer})
            if not for_answer or message.get("answers"):
                deadline_s = 0.0

    def _list_machines(self) -> None:
        """Tell of the machines that there are, now and then."""
        now_s = self._clock()
        if now_s < self._list_machines_at_s:
            return
        self._list_machines_at_s = now_s + _LIST_S
        found = self._store.list(self._keys.instances)
        if self._reported is not None:
            self._check_own(dict(found.entries).get(self._keys.instance(self._name)), now_s)
        self._supervisor.send({"instances": instances_in(self._keys, found.entries)})
        self._exchanges.tell(self._store.answered_s, self._clock(), unusable=self._unusable)

    def _check_own(self, value: bytes | None, now_s: float) -> None:
        """What stands in our report's place, if that is not ours, is written over."""
        if value is not None:
            try:
                if InstanceReport.decode(value).writer == self._writer:
                    return
            except ValueFault:
                pass  # others have put it there
            self._overwritten = [*self._overwritten, now_s][-_OFTEN:]
        self._reported = None
        if self._is_shared(now_s) and now_s >= self._warn_at_s:
            self._warn_at_s = now_s + _OFTEN_S
            self._supervisor.send({"overwritten": self._keys.instance(self._name)})

    def _is_shared(self, now_s: float) -> bool:
        """Whether another machine writes in our place again and again."""
        return sum(now_s < then_s + _OFTEN_S for then_s in self._overwritten) == _OFTEN

    def _write_report(self) -> None:
        now_s = self._clock()
        if self._report is not None:
            is_shared = self._is_shared(now_s)
            self._report = self._report.model_copy(update={"is_shared": is_shared})
        if self._lease and now_s < self._renew_at_s and self._report == self._reported:
            return
        if not self._lease or not self._store.renew(self._lease):
            self._lease, self._reported = self._store.grant(LEASE_S), None
        self._renew_at_s = now_s + _RENEW_S
        if self._report is not None and self._report != self._reported:
            key = self._keys.instance(self._name)
            self._store.put(key, self._report.encode(), lease=self._lease)
            self._reported = self._report

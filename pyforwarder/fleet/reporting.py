"""What one machine of a fleet tells all others: a value at a key of its own, with a lease.

It is renewed for as long as the process lives; what a dead machine has said is gone a few seconds
later. What others make of the key (two machines have the same name, say) is mended, and logged.
A store that is silent for long is lost: a machine is alone then, before its own lease ends, so that
no other counts on a machine that no longer counts on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from pyforwarder.fleet.store import Change, Store, StoreError
from pyforwarder.fleet.watching import UNHEARD, All, Lost, Pause

if TYPE_CHECKING:
    from pyforwarder.fleet.layout import Value
    from pyforwarder.fleet.supervisor import Supervisor
    from pyforwarder.fleet.watching import Watcher

# What a machine has said is gone so long after its death.
LEASE_S: Final = 8
_RENEW_S: Final = 2.5
LOST_AFTER_S: Final = 6.0
# All requests of one turn together.
_REQUESTS_S: Final = 3.0
# What others have made of our report is mended once in this time; they may do it again.
_MENDED_EVERY_S: Final = 1.0
# In an upgrade two daemons have the same name for a moment. In this time there is one line at most.
_SAID_EVERY_S: Final = 60.0
_OFTEN: Final = 3


class Reports(Protocol):
    """What a machine makes of the values at all machines' keys."""

    def saw_all(self, found: Iterable[tuple[str, bytes]]) -> None:
        """All values that are in the store, by machine."""
        ...

    def saw(self, machine: str, value: bytes | None) -> None:
        """Note that a machine's report has changed, or has gone (None)."""
        ...


class Reporter:
    """Writes one report, receives the others', and knows whether the store is there.

    In each turn: `receive`, then `write`, then `check_store`.
    """

    def __init__(
        self,
        store: Store,
        watcher: Watcher,
        prefix: str,
        machine: str,
        supervisor: Supervisor,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`watcher` is of `prefix`, which all machines' keys have, with a store of its own."""
        self._store = store
        self._watcher = watcher
        self._prefix = prefix
        self._key = prefix + machine
        self._supervisor = supervisor
        self._clock = clock
        self.is_lost: bool | None = None  # the store, as the supervisor was told; None: it was not
        self._has_received = False  # what is in the store
        self._ok_s = 0.0  # when it was there last
        self._error = ""
        self.lease = 0
        self._renew_s = 0.0
        self._write_s = 0.0  # not before
        self._pause = Pause()
        self._written: Value | None = None
        self._is_out = False  # there is no report, on purpose
        self._text = b""  # of what was written
        self._rewrite_s = math.inf  # when it is to be written again as it is
        self._say_s = 0.0  # not before
        self._overwritten: list[float] = []  # when others have written in our place

    def receive(self, reports: Reports, now_s: float) -> None:
        """Tell `reports` what the watching thread has received."""
        for change in self._changes(now_s):
            if isinstance(change, All):
                reports.saw_all(
                    (key.removeprefix(self._prefix), value) for key, value in change.entries
                )
            else:
                reports.saw(change.key.removeprefix(self._prefix), change.value)

    def _changes(self, now_s: float) -> Iterator[All | Change]:
        for change in self._watcher.changes():
            match change:
                case All(entries=entries, revision=revision):
                    own = dict(entries).get(self._key)
                    is_ours = self._written is not None and own == self._text
                    if revision >= self._store.written and not is_ours:
                        self._rewrite(own, now_s)
                    self._has_received = True
                    yield change
                case Change(revision=revision, key=key, value=value):
                    if key == self._key and revision > self._store.written:
                        self._rewrite(value, now_s)
                    yield change
                case Lost(error):
                    self._error = error

    def write(self, now_s: float, write: Callable[[float], bool]) -> None:
        """Have `write` ask the store (by `put` or `withdraw`), unless that has just failed.

        It returns whether it did; it may raise StoreError.
        """
        if not self._has_received or now_s < self._write_s:
            return
        lost_s = self.alone_s
        until_s = now_s + _REQUESTS_S
        self._store.until_s = min(until_s, lost_s) if now_s < lost_s else until_s
        try:
            if write(now_s):
                self._ok_s = now_s
                self._pause.end()
        except StoreError as error:
            self._error = str(error)
            self._write_s = now_s + self._pause.next_s()

    def put(self, report: Value, now_s: float) -> bool:
        """Have this report in the store; whether that had to be asked.

        Raises:
            StoreError: the store has not taken it.
        """
        has_asked, self._is_out = False, False
        if not self.lease or now_s >= self._renew_s:
            if not self.lease or not self._store.renew(self.lease):
                self.lease, self._written = 0, None
                self.lease = self._store.grant(LEASE_S)
            self._renew_s = now_s + _RENEW_S
            has_asked = True
        if report != self._written or now_s >= self._rewrite_s:
            text = report.encode()
            self._store.put(self._key, text, lease=self.lease)
            self._written, self._text, self._rewrite_s = report, text.encode(), math.inf
            has_asked = True
        return has_asked

    def withdraw(self, now_s: float) -> bool:
        """Have no report there; as `put`."""
        if now_s < self._renew_s:
            return False
        self._written, self._is_out = None, True
        if self.lease:
            self._store.delete(self._key)
            self._store.revoke(self.lease)
            self.lease = 0
        else:
            self._store.get(self._key)  # whether it is there
        self._renew_s = now_s + _RENEW_S
        return True

    def renew_soon(self) -> None:
        """Ask the store in the next turn, whether that is due or not."""
        self._renew_s = 0.0

    @property
    def answered_s(self) -> float:
        """When the store was there last; 0: never."""
        return self._ok_s

    @property
    def alone_s(self) -> float:
        """When this machine is alone, if the store is silent until then."""
        return self._ok_s + LOST_AFTER_S

    def check_store(self) -> bool:
        """Whether reports go both ways; the supervisor is sent a message when that changes."""
        now_s = self._clock()  # the store may have let us wait
        self._watcher.expect(self._store.written, now_s)
        is_known = self._written is not None or (self._is_out and not self.lease)
        if self._watcher.is_lost(now_s):
            is_known, self._error = False, UNHEARD
        if is_known and now_s < self.alone_s:
            self._report_store(None)
            return True
        if self._error:
            self._report_store(self._error)
        return False

    def _rewrite(self, value: bytes | None, now_s: float) -> None:
        """Others have put this in our report's place, or have removed it."""
        if self._written is None:
            return
        self._rewrite_s = min(self._rewrite_s, now_s + _MENDED_EVERY_S)
        if value is None:
            self._renew_s = 0.0  # with its lease, maybe
            return
        often = [then_s for then_s in self._overwritten if now_s < then_s + _SAID_EVERY_S]
        self._overwritten = [*often, now_s][-_OFTEN:]
        if len(self._overwritten) == _OFTEN and now_s >= self._say_s:
            self._say_s = now_s + _SAID_EVERY_S
            self._supervisor.send({"overwritten": self._key})

    def _report_store(self, error: str | None) -> None:
        is_lost = error is not None
        if is_lost != self.is_lost:
            self.is_lost = is_lost
            message = {"store": "lost", "endpoint": (error or "")[:500]}
            if not is_lost:
                message = {"store": "connected", "endpoint": self._store.endpoint}
            self._supervisor.send(message)

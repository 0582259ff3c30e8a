"""A server says that it is there, again and again.

The key that says so belongs to who has written it last, which its lease tells. A registration
takes it once, when it begins; from then on it writes it only where nobody has it, and removes
nothing but what has its own lease.
"""

from __future__ import annotations

import enum
import select
import socket
from typing import TYPE_CHECKING, Final

from pyforwarder.fleet.store import NoSuchLeaseError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.fleet.store import Store

# How often within its lease.
_RENEWALS: Final = 3
# A key that is gone is seen so soon, however long its lease.
_LONGEST_PAUSE_S: Final = 5.0
# How often the store is asked while the server is not in it by our word.
_SHORT_PAUSE_S: Final = 1.0


class _State(enum.Enum):
    NEW = "not yet in the store"
    OURS = "the key has our lease"
    ANOTHERS = "the key has another lease, or none"
    LOST = "the store does not answer"


class Registration:
    """A key with a lease, which goes with this process."""

    def __init__(
        self,
        store: Store,
        key: str,
        value: str,
        *,
        ttl_s: int,
        say: Callable[[str], None],
        registered: Callable[[], None],
    ) -> None:
        """`registered` is called when the server is in the store, after it was not.

        `say` is told when the server is in the store, when another has its key, when the key
        was gone, and when the store is lost and found again.
        """
        self._store = store
        self._key = key
        self._value = value
        self._ttl_s = ttl_s
        self._say = say
        self._registered = registered
        self._lease = 0
        self._has_begun = False  # the key was ours once
        self._state = _State.NEW
        self._ended, self._end = socket.socketpair()

    def run(self) -> None:
        """Be there until `end`."""
        try:
            while True:
                self._look()
                pause_s = min(self._ttl_s / _RENEWALS, _LONGEST_PAUSE_S)
                if self._state is not _State.OURS:
                    pause_s = min(pause_s, _SHORT_PAUSE_S)
                if select.select([self._ended], [], [], pause_s)[0]:
                    return
        finally:
            if self._lease:
                # With it goes the key if that has it still; another's has another lease.
                self._store.revoke(self._lease)
            self._ended.close()
            self._end.close()

    def end(self) -> None:
        """Let `run` return; may be called by a signal handler."""
        self._end.send(b"\0")

    def _look(self) -> None:
        try:
            if not self._lease or not self._store.renew(self._lease):
                self._lease = self._store.grant(self._ttl_s)
            self._write()
        except NoSuchLeaseError:
            # It has ended since it was renewed; the next turn begins with another one.
            self._lease = 0
        except StoreError as error:
            if self._state is not _State.LOST:
                self._say(str(error))
            self._state = _State.LOST

    def _write(self) -> None:
        """Have the key there, with our lease if nobody else has it."""
        if not self._has_begun:
            self._store.put(self._key, self._value, lease=self._lease)
            self._has_begun = True
            self._report(_State.OURS, "registered")
            return
        standing = self._store.standing(self._key)
        if standing is None:
            # Else another was quicker: the next turn finds whose it is.
            if self._store.create(self._key, self._value, lease=self._lease):
                self._state = _State.OURS
                self._say("registered again: the key was gone from the store")
                self._registered()
            return
        if standing.lease == self._lease:
            self._report(_State.OURS, "registered")
        else:
            self._report(
                _State.ANOTHERS,
                "another has registered this server: what it says holds until its key is gone, "
                "then this one's again",
            )

    def _report(self, state: _State, words: str) -> None:
        is_new, self._state = state is not self._state, state
        if is_new:
            self._say(words)
            if state is _State.OURS:
                self._registered()

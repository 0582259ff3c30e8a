"""A server says that it is there, again and again."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyforwarder.fleet.store import StoreError

if TYPE_CHECKING:
    from pyforwarder.fleet.store import Store

# How often within its lease.
_RENEWALS = 3


class Registration:
    """A key with a lease, which goes with this process."""

    def __init__(
        self, store: Store, key: str, value: str, *, ttl_s: int, say: Callable[[str], None]
    ) -> None:
        """`say` is told when the store is lost and found again."""
        self._store = store
        self._key = key
        self._value = value
        self._ttl_s = ttl_s
        self._say = say
        self._lease = 0
        self._is_there: bool | None = None
        self._ended, self._end = socket.socketpair()

    def run(self) -> None:
        """Be there until `end`."""
        try:
            while True:
                self._renew()
                pause_s = self._ttl_s / _RENEWALS if self._is_there else 1.0
                if select.select([self._ended], [], [], pause_s)[0]:
                    return
        finally:
            if self._lease:
                self._store.revoke(self._lease)
            self._ended.close()
            self._end.close()

    def end(self) -> None:
        """Let `run` return; may be called by a signal handler."""
        self._end.send(b"\0")

    def _renew(self) -> None:
        try:
            if not self._lease or not self._store.renew(self._lease):
                self._lease = self._store.grant(self._ttl_s)
                self._store.put(self._key, self._value, lease=self._lease)
        except StoreError as error:
            self._report(str(error), is_there=False)
        else:
            self._report("registered", is_there=True)

    def _report(self, words: str, *, is_there: bool) -> None:
        if is_there != self._is_there:
            self._is_there = is_there
            self._say(words)

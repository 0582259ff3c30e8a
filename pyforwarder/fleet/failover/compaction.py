"""Has the store drop its history, which would fill it: numbers of pairs are written every second.

etcd keeps every value that a key ever had until it is told not to, and refuses all writes at 2 GB
by default. As Kubernetes does, some machine of the fleet has it forget what is older than one to
two periods; which one, a key of the store says. What keys have now is not touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyforwarder.fleet.store import Store

PERIOD_S: Final = 300.0


class Compaction:
    """Has the store drop its history, when it is this machine's turn."""

    def __init__(self, store: Store, key: str, name: str) -> None:
        """`key` is the fleet's, `name` this machine's."""
        self._store, self._key, self._name = store, key, name
        self._due_s = 0.0
        self._seen = -1  # the key's revision a period ago; -1: it is not known

    def run_due(self, now_s: float, *, lease: int) -> None:
        """Do what is due; the key goes with the lease.

        Raises:
            StoreError: it was not done; it is due again after a period.
        """
        if now_s < self._due_s:
            return
        self._due_s = now_s + PERIOD_S
        seen, self._seen = self._seen, -1
        found = self._store.get(self._key)
        was = found[1] if found is not None else 0
        # Nobody has, for a period; and nobody else does just now.
        if seen == was and self._store.change(self._key, self._name, was=was, lease=lease):
            if was:
                self._store.compact(was)
            found = self._store.get(self._key)
            was = found[1] if found is not None else 0
        self._seen = was

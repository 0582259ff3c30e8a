"""What a watch tells a process of the process's own writing: that need not be read again.

etcd tells of all that became so at one revision in one message. So a message is an echo if its
revision is that of something that we wrote, and nothing in it is news; which revision that was the
answer to our request says, perhaps after the watch has told of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyforwarder.fleet.store import Change

# Writings whose echo has not come. Of an older one it is read, as if another had written that.
_MOST: Final = 256


class Echoes:
    """Knows what this process has written and has not heard of yet.

    The thread that writes calls everything but `may_be`, which the one that watches calls.
    """

    def __init__(self) -> None:
        self._is_writing = False
        self._keys: dict[int, frozenset[str]] = {}  # by revision, in order

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Note that something is being written; call `wrote` inside, once its revision is known."""
        self._is_writing = True
        try:
            yield
        finally:
            self._is_writing = False

    def wrote(self, revision: int, keys: Iterable[str]) -> None:
        """We have written these keys, and nothing else, at this revision."""
        if self._keys and revision <= next(reversed(self._keys)):
            self._keys.clear()  # the store was set up anew, and counts from the beginning
        self._keys[revision] = frozenset(keys)
        if len(self._keys) > _MOST:
            del self._keys[next(iter(self._keys))]

    def forget(self) -> None:
        """What comes by the watch from now on is read: all was listed anew."""
        self._keys.clear()

    def may_be(self, revision: int) -> bool:
        """Whether we may have written that."""
        # In this order: once nothing is being written, the revision of what was is known.
        return self._is_writing or revision in self._keys

    def is_ours(self, revision: int) -> bool:
        """Whether we have written that, of which the watch tells now."""
        self._drop_before(revision)
        return self._keys.pop(revision, None) is not None

    def is_past(self, change: Change) -> bool:
        """Whether we have written the same key later, so that this is not there any more."""
        self._drop_before(change.revision)
        return any(
            revision > change.revision and change.key in keys
            for revision, keys in self._keys.items()
        )

    def _drop_before(self, revision: int) -> None:
        while self._keys and (first := next(iter(self._keys))) < revision:
            del self._keys[first]

"""How soon the keeper runs the next round over all places: the faster, the faster places are taken.

A glance at one counter of the programs tells how many places are free, and how long they will last.
It costs nearly nothing, so that a burst is noticed long before it has taken all places.
"""

from __future__ import annotations

from typing import Final

# While no connection begins. In this time the clients on this host take some thousands at most.
_IDLE_S: Final = 0.2
# A round takes a tenth of a millisecond.
_LEAST_S: Final = 0.02
# At the present rate this part of the free places is taken until the next round.
_PART: Final = 8


class Pace:
    """The pace of one keeper's rounds."""

    def __init__(self, places: int, taken: int) -> None:
        """All `places` are assumed to be free at first; `taken` as for `glance`."""
        self._places = places
        self._unused = places  # when the last round was complete
        self._taken_then = self._taken = taken  # at that time, and at the last glance
        self._glanced_s = 0.0
        self._rate = 0.0  # places per second, between the last two glances

    def glance(self, now_s: float, taken: int) -> None:
        """Note that `taken` places were taken since the programs were loaded."""
        took_s = now_s - self._glanced_s
        if took_s > 0:
            self._rate = (taken - self._taken) / took_s
        self._taken, self._glanced_s = taken, now_s

    def went_round(self, unused: int) -> None:
        """Note that `unused` places were free in the round that began with the last glance."""
        self._unused, self._taken_then = unused, self._taken

    @property
    def left(self) -> int:
        """How many places are free, by the last glance: only a round frees some."""
        return max(0, self._unused - (self._taken - self._taken_then))

    @property
    def is_short(self) -> bool:
        """The others are for connections until the next round, which may be late on a busy host."""
        return self.left < self._places * 3 // 4

    @property
    def pause_s(self) -> float:
        """Seconds until the next glance."""
        if self._rate <= 0:
            return _IDLE_S
        return min(_IDLE_S, max(_LEAST_S, self.left / self._rate / _PART))

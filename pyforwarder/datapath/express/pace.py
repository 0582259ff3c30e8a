"""How soon the keeper goes round all places again: as quickly as connections take them.

A glance at what the programs have counted tells how many places are left, and how long they last.
It costs next to nothing, so that a burst is known long before it has taken them all.
"""

from __future__ import annotations

from typing import Final

# While nothing begins. In so long a host's own clients take some thousands at most.
_IDLE_S: Final = 0.2
# A round takes a tenth of a millisecond.
_LEAST_S: Final = 0.02
# Of what is left so much is gone by the next one, at the rate of the last ones.
_PART: Final = 8


class Pace:
    """Of one keeper's rounds."""

    def __init__(self, places: int, taken: int) -> None:
        """All are free now, as far as anybody knows; see `glance`."""
        self._places = places
        self._unused = places  # when the last round was through
        self._taken_then = self._taken = taken  # then, and at the last glance
        self._glanced_s = 0.0
        self._rate = 0.0  # places per second, between the last two glances

    def glance(self, now_s: float, taken: int) -> None:
        """So many places were taken by connections since the programs began."""
        took_s = now_s - self._glanced_s
        if took_s > 0:
            self._rate = (taken - self._taken) / took_s
        self._taken, self._glanced_s = taken, now_s

    def went_round(self, unused: int) -> None:
        """So many places were free in a round that began with the last glance."""
        self._unused, self._taken_then = unused, self._taken

    @property
    def left(self) -> int:
        """Places that are free, as far as is known: only a round frees some."""
        return max(0, self._unused - (self._taken - self._taken_then))

    @property
    def is_short(self) -> bool:
        """Whether more than a quarter of the places are taken.

        The others are for those that come until the next round, which may be late on a busy host.
        """
        return self.left < self._places * 3 // 4

    @property
    def pause_s(self) -> float:
        """How long the next glance need not come."""
        if self._rate <= 0:
            return _IDLE_S
        return min(_IDLE_S, max(_LEAST_S, self.left / self._rate / _PART))

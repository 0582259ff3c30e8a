"""Happy Eyeballs (RFC 8305): in which order a name's addresses are tried, and what is learned.

Pure: addresses and times in, addresses out. `worker/race.py` makes the connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyforwarder.core.address import Address

# RFC 8305 section 5, Connection Attempt Delay.
ATTEMPT_DELAY_S: Final = 0.25
# So many addresses of one name are tried for one connection, and no more, however many there are.
MOST_ATTEMPTS: Final = 6
# An address that did not answer goes behind the others for so long, twice that when it happens
# again, and so on.
REST_S: Final = 30.0
_LONGEST_REST_S: Final = 16 * REST_S
# Then one connection tries it in its old place; the others do for so long as if it still rested.
TRIAL_S: Final = 5.0
_MOST_REMEMBERED: Final = 4096


def interleave(addresses: Sequence[Address]) -> list[Address]:
    """The families in turn, each in its own order (RFC 8305 section 4)."""
    if not addresses:
        return []
    first_family = addresses[0].is_ipv6
    first = [address for address in addresses if address.is_ipv6 is first_family]
    second = [address for address in addresses if address.is_ipv6 is not first_family]
    mixed = []
    for position in range(max(len(first), len(second))):
        mixed += first[position : position + 1] + second[position : position + 1]
    return mixed


class _Rest(NamedTuple):
    until_s: float
    length_s: float


class Liveness:
    """Which addresses did not answer, so that the next connection does not wait for them."""

    def __init__(self) -> None:
        self._resting: dict[Address, _Rest] = {}

    def order(self, addresses: Sequence[Address], now_s: float) -> list[Address]:
        """The addresses to try, best first, at most `MOST_ATTEMPTS`.

        None is left out for having failed: they go behind the others.
        """
        mixed = interleave(addresses)
        fit: list[Address] = []
        resting: list[Address] = []
        for address in mixed:
            (resting if self._is_resting(address, now_s) else fit).append(address)
        fit = interleave(fit)
        ordered = (fit + resting)[:MOST_ATTEMPTS]
        if len(fit) > 1 and (rest := self._resting.get(fit[0])) is not None:
            self._resting[fit[0]] = rest._replace(until_s=now_s + TRIAL_S)
        return ordered

    def _is_resting(self, address: Address, now_s: float) -> bool:
        rest = self._resting.get(address)
        return rest is not None and now_s < rest.until_s

    def failed(self, address: Address, now_s: float) -> None:
        """It refused, could not be reached, or had not answered when another did."""
        old = self._resting.pop(address, None)
        length_s = REST_S
        if old is not None:
            # Attempts that were made at the same time fail at the same time: that is once.
            is_new = now_s >= old.until_s - TRIAL_S
            length_s = min(2 * old.length_s, _LONGEST_REST_S) if is_new else old.length_s
        elif len(self._resting) >= _MOST_REMEMBERED:
            del self._resting[next(iter(self._resting))]
        self._resting[address] = _Rest(now_s + length_s, length_s)

    def worked(self, address: Address) -> None:
        """A connection stands."""
        self._resting.pop(address, None)

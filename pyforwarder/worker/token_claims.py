"""Single-use tokens that are used up in a whole fleet: a question to its store, and its answer.

The worker does not wait: it asks the supervisor, which has a process that speaks to the store
(`fleet/claims.py`), and gets the answer between two turns of its loop, or none in time. No
answer is no permission; what follows from it the configuration says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop

# Of one worker. A token is asked for when its signature is right, so that only who has a key gets
# here.
MOST_WAITING: Final = 1024
# The supervisor has so many of these at once: it takes no more of one worker, so that none keeps
# others from asking. What it has not answered for so long it will not answer any more.
MOST_SENT: Final = 32
_LOST_S: Final = 30.0


class Claiming:
    """A token that is being asked for; `stop` it when the answer is not needed any more."""

    __slots__ = ("_claims", "_number")
    late = "the fleet's store has not said in time whether the token was used"

    def __init__(self, claims: TokenClaims, number: int) -> None:
        self._claims = claims
        self._number = number

    def stop(self) -> None:
        """Forget the request: its answer is not needed any more."""
        self._claims.forget(self._number)


class TokenClaims:
    """Has tokens used up in a fleet, for one worker."""

    def __init__(self, loop: Loop, send: Callable[[dict[str, object]], None] | None) -> None:
        """`send` says something to the supervisor, without waiting, or raises OSError."""
        self._loop = loop
        self._send = send
        self._number = 0
        self._waiting: dict[int, tuple[Callable[[bool | None], None], int]] = {}
        self._unsent: dict[int, dict[str, object]] = {}  # in their order
        self._sent_s: dict[int, float] = {}

    def ask(
        self,
        digest: bytes,
        *,
        until_unix_s: float,
        wait_s: float,
        answer: Callable[[bool | None], None],
    ) -> Claiming | None:
        """Whether this is the first use of the token in the fleet; `answer` is called on the loop.

        With None if that is not known within `wait_s`. Returns None, and calls nothing, if it
        cannot be asked.
        """
        if self._send is None or len(self._waiting) >= MOST_WAITING:
            return None
        self._number = number = self._number + 1
        timer = self._loop.after(wait_s, lambda: self._answer(number, None))
        self._waiting[number] = (answer, timer)
        until = int(until_unix_s) + 1
        self._unsent[number] = {"claim": digest.hex(), "until": until, "number": number}
        self._send_on()
        return Claiming(self, number)

    def answered(self, number: int, is_first: bool | None) -> None:
        """The supervisor's answer."""
        self._sent_s.pop(number, None)
        self._answer(number, is_first)
        self._send_on()

    def _send_on(self) -> None:
        assert self._send is not None
        if len(self._sent_s) >= MOST_SENT:
            lost_s = self._loop.now_s - _LOST_S
            self._sent_s = {number: at_s for number, at_s in self._sent_s.items() if at_s > lost_s}
        while self._unsent and len(self._sent_s) < MOST_SENT:
            number = next(iter(self._unsent))
            try:
                self._send(self._unsent[number])
            except OSError:
                return  # it has no room just now; with its next answer, or in vain
            del self._unsent[number]
            self._sent_s[number] = self._loop.now_s

    def _answer(self, number: int, is_first: bool | None) -> None:
        self._unsent.pop(number, None)
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            answer, timer = waiting
            self._loop.cancel(timer)
            answer(is_first)

    def forget(self, number: int) -> None:
        """Nobody wants to know any more."""
        self._unsent.pop(number, None)
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._loop.cancel(waiting[1])

"""The process that uses up tokens in a fleet's store, and the workers' questions to it."""

from __future__ import annotations

import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.supervisor.fleet.store_process import StoreProcess
from pyforwarder.supervisor.messages import (
    FROM_TOKENS,
    FaultyMessageError,
    FleetStore,
    StoreAnswered,
    TokensClaimed,
)
from pyforwarder.supervisor.processes.child import Above, Serving

if TYPE_CHECKING:
    from pyforwarder.config import Config, Fleet
    from pyforwarder.fleet.claims import Claim
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.messages import TokenClaim
    from pyforwarder.worker.log import Log

# Questions of all workers; beyond that the oldest ones are not answered any more.
_MOST_WAITING: Final = 4096


class TokenProcess(StoreProcess["TokensClaimed | FleetStore | StoreAnswered"]):
    """Has tokens used up in the store; answers the worker None where it is not known whether that
    worked.
    """

    name = "fleet_tokens"
    part = "tokens"
    may_say = FROM_TOKENS

    def __init__(
        self, loop: Loop, log: Log, *, user: str | None, close_in_child: Callable[[], None]
    ) -> None:
        super().__init__(loop, log, user=user, close_in_child=close_in_child)
        self._fleet: Fleet | None = None
        self._is_lost = False  # the store, says the process
        self._number = 0
        self._waiting: OrderedDict[int, Callable[[bool | None], None]] = OrderedDict()

    def change_to(self, config: Config) -> None:
        """Use the store of this configuration from now on, if tokens are good once in the whole
        fleet.
        """
        fleet = config.fleet if config.claims_tokens else None
        if fleet == self._fleet and not self._is_lost:
            self.start()
            return
        self._fleet, self._is_lost = fleet, False
        self.renew()

    def claim(self, asked: TokenClaim, answer: Callable[[bool | None], None]) -> None:
        """Have a token used up; `answer` may be called before this returns."""
        if self._channel is None:
            answer(None)
            return
        self._number += 1
        try:
            self._channel.send(
                {"claim": asked.claim, "until": asked.until, "number": self._number}, wait=False
            )
        except OSError:  # it has more than it can read, or is about to be replaced
            answer(None)
            return
        self._waiting[self._number] = answer
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popitem(last=False)[1](None)

    @property
    def _is_wanted(self) -> bool:
        return self._fleet is not None

    def _prepare(self, channel: Channel) -> Serving:
        # Files may be readable by root alone, these modules, too.
        from pyforwarder.fleet.claims import Claims
        from pyforwarder.fleet.layout import Keys
        from pyforwarder.fleet.opening import open_store

        fleet = self._fleet
        assert fleet is not None
        # All members are asked within the time that a worker waits.
        store = open_store(fleet, timeout_s=fleet.tokens.wait_s / (len(fleet.endpoints) + 1))
        claims = Claims(
            store,
            Keys(fleet.name),
            fleet.instance or socket.gethostname(),
            _ClaimsAbove(channel),
            unix_time_s=time.time,  # noqa: TID251 - expiry
        )
        return Serving(claims.run)

    def _understand(
        self, message: dict[str, Any], fds: Sequence[int]
    ) -> TokensClaimed | FleetStore | StoreAnswered:
        understood = super()._understand(message, fds)
        if isinstance(understood, TokensClaimed):
            numbers = [*understood.claimed, *understood.used, *understood.unknown]
            if any(number > self._number for number in numbers):
                raise FaultyMessageError("an answer to what was not asked")
        return understood

    def _handle(self, message: TokensClaimed | FleetStore | StoreAnswered) -> None:
        if isinstance(message, StoreAnswered):
            self._note(message)
            return
        if isinstance(message, FleetStore):
            self._is_lost = message.store == "lost"
            level = "warning" if self._is_lost else "info"
            name = "error" if self._is_lost else "endpoint"
            self._log.write(level, f"fleet_tokens_{message.store}", **{name: message.endpoint})
            return
        for numbers, is_first in (
            (message.claimed, True),
            (message.used, False),
            (message.unknown, None),
        ):
            for number in numbers:
                answer = self._waiting.pop(number, None)
                if answer is not None:
                    answer(is_first)

    def _hang_up(self) -> None:
        super()._hang_up()
        waiting, self._waiting = self._waiting, OrderedDict()
        for answer in waiting.values():
            answer(None)


class _ClaimsAbove(Above):
    """The supervisor, which asks for tokens to be used up."""

    def receive(self, timeout_s: float) -> Claim | None:
        from pyforwarder.fleet.claims import Claim

        message = self.wait(timeout_s)
        if message is None:
            return None
        return Claim(message["number"], message["claim"], message["until"])

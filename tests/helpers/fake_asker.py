"""A keeper that a test plays: each request is answered, or lost with a keeper that died over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyforwarder.datapath.splice.keeper_asker import Answered, PendingRequest


class FakeAsker:
    """Keeps what is asked; `answer` and `lose` say what becomes of the oldest."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, object], PendingRequest]] = []
        self.has_room = True
        self.lacks_room = False
        self.for_room: Callable[[], bool] | None = None
        self.is_over = False

    def ask(
        self, do: str, then: Answered = lambda *_: None, fds: Sequence[int] = (), **fields: object
    ) -> bool:
        self.lacks_room = bool(fds) and not self.has_room and not self.is_over
        if self.lacks_room or self.is_over:
            return False
        self.asked.append(
            (do, {**fields, **({"fds": list(fds)} if fds else {})}, PendingRequest(then))
        )
        return True

    @property
    def unsettled(self) -> int:
        return len(self.asked)

    def when_there_is_room(self, action: Callable[[], bool]) -> None:
        self.for_room = action

    def make_room(self) -> bool:
        """Some of it; whether more is wanted."""
        assert self.for_room is not None
        return self.for_room()

    def ask_now(self, do: str, fds: Sequence[int] = (), **fields: object) -> PendingRequest | None:
        if not self.has_room:
            return None
        self.ask(do, lambda *_: None, fds, **fields)
        return self.asked[-1][2]

    def answer(self, **words: object) -> None:
        self.asked.pop(0)[2].then({"n": 1, **words}, [])

    def lose(self) -> None:
        self.asked.pop(0)[2].then(None, [])

    def take(self) -> tuple[str, dict[str, object]]:
        """What is asked for now, alone."""
        ((do, fields, _),) = self.asked
        return do, fields

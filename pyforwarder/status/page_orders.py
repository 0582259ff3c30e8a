"""What viewers of the page may order, where the configuration lets them: flush, drain, ready."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

from pyforwarder.status.answers import BUSY, failed, ok, secured, texts_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.status.http import Answer, Request
    from pyforwarder.status.pair_rows import PairRows
    from pyforwarder.status.plan import Plan
    from pyforwarder.status.server import Visitor

MOST_FLUSHED: Final = 10_000


class Done(Protocol):
    """Takes what became of an order: how many pairs or servers it changed, or why none."""

    def __call__(self, count: int, error: str = "") -> None: ...


class Steering(Protocol):
    """What the supervisor does for viewers."""

    def set_server(self, user: str, server: str, state: str, answer: Done) -> bool:
        """Ask the supervisor to `drain` a server, UPSTREAM/ADDRESS, or to have it `ready`; see
        `flush`.
        """
        ...

    def flush(self, user: str, ids: Sequence[int], answer: Done) -> bool:
        """Ask the supervisor to reset these pairs; False if it takes no request just now."""
        ...


class PageOrders:
    """Obeys viewers, by way of the supervisor."""

    def __init__(self, steering: Steering | None, plan: Plan, rows: Callable[[], PairRows]) -> None:
        """Without `steering` viewers can only read. `rows` takes a sample, and has its pairs."""
        self._steering = steering
        self._plan = plan
        self._rows = rows

    @property
    def may_be_given(self) -> bool:
        """Whether viewers may order anything."""
        return self._steering is not None

    def flush(self, request: Request, visitor: Visitor, user: str) -> Answer | None:
        """Reset pairs; None: the visitor is answered later."""
        steering = self._steering
        if steering is None:
            return failed(HTTPStatus.FORBIDDEN, "`status: {control: true}` is not set")
        ids = self._wanted(request.body)
        if ids is None:
            return failed(HTTPStatus.BAD_REQUEST, "say which: ids, listener, or listener and rule")
        if not ids:
            return ok({"flushed": 0})
        done = self._then(visitor, lambda count: {"flushed": count})
        return None if steering.flush(user, ids[:MOST_FLUSHED], done) else BUSY

    def set_server(self, request: Request, visitor: Visitor, user: str) -> Answer | None:
        """Drain a server, or have it ready again; None: the visitor is answered later."""
        steering = self._steering
        if steering is None:
            return failed(HTTPStatus.FORBIDDEN, "`status: {control: true}` is not set")
        asked = texts_in(request.body, {"upstream", "server", "state"}) or {}
        known = {(one.upstream, one.server) for one in self._plan.servers}
        upstream, server = asked.get("upstream", ""), asked.get("server", "")
        if (upstream, server) not in known:
            return failed(HTTPStatus.BAD_REQUEST, "there is no such server")
        state = asked.get("state", "")
        if state not in ("drain", "ready"):
            return failed(HTTPStatus.BAD_REQUEST, "say `drain` or `ready`")
        done = self._then(visitor, lambda _: {"state": state})
        return None if steering.set_server(user, f"{upstream}/{server}", state, done) else BUSY

    @staticmethod
    def _then(visitor: Visitor, answer_of: Callable[[int], object]) -> Done:
        """Answers the visitor once it is known what has become of an order."""

        def answer(count: int, error: str = "") -> None:
            result = failed(HTTPStatus.CONFLICT, error) if error else ok(answer_of(count))
            visitor.finish(secured(result))

        return answer

    def _wanted(self, body: bytes) -> list[int] | None:
        """The ids of the pairs that a request names; None if it is none."""
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return None
        match asked:
            case {"ids": list(ids), **others} if not others:
                if all(type(one) is int and 0 <= one < 1 << 64 for one in ids):
                    return ids
            case {"listener": str(listener), "rule": str(rule), **others} if not others:
                return self._rows().pair_ids(listener=listener, rule=rule)
            case {"listener": str(listener), **others} if not others:
                return self._rows().pair_ids(listener=listener)
        return None

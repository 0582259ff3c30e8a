"""The page in a browser: its files, what it shows as events, and what it may ask.

    GET  /            the page, and its files by name
    GET  /live        events: `hello` once, `tick` every second, `point` every five, `health`
    GET  /pairs       some rows of the pairs as of the last sample: sort order filter first count
    POST /explain     which rule would take some first bytes
    POST /flush       reset pairs, if the configuration lets viewers
    POST /server      drain a server, or have it ready again, likewise

There is one sample of the tables a second for all viewers, and none without viewers. What is sent
to a viewer is the same for all, so it is encoded once; rows are asked for, a screen at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

from pyforwarder.status.allowance import Allowance, Rate, most_crowded, network_of
from pyforwarder.status.answers import (
    SECURITY_HEADERS,
    SOON,
    event,
    failed,
    is_number,
    not_allowed,
    ok,
    secured,
)
from pyforwarder.status.gate import Doubt, Gate
from pyforwarder.status.history import KEPT_S, History
from pyforwarder.status.http import Answer, Request
from pyforwarder.status.logins import LoginQueue
from pyforwarder.status.page_data import hello, tick
from pyforwarder.status.page_explain import explain
from pyforwarder.status.page_orders import PageOrders
from pyforwarder.status.pair_rows import SORTS

if TYPE_CHECKING:
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.status.page_data import About, HealthChange
    from pyforwarder.status.page_orders import Steering
    from pyforwarder.status.pair_rows import PairRows
    from pyforwarder.status.sampling import Sampler
    from pyforwarder.status.server import Visitor

# Each gets a few kilobytes a second; a viewer above that is told so.
MOST_VIEWERS: Final = 16
TICK_S: Final = 1.0
# Hex of 32 KiB: more than any first packet that is judged by its bytes.
MOST_BODY_BYTES: Final = 65536
MOST_QUERY_BYTES: Final = 2048
MOST_VERDICTS: Final = 50
# Explaining and flushing cost others something: so many at once, and then so many a second.
_ORDERS: Final = {
    "client": Rate(20, 10),
    "in_all": Rate(60, 30),
    "viewer": Rate(5, 2),
}
# What is read costs about a millisecond of the processor for each: a screen of rows, or five
# hundred pairs that are put in order. A page that is scrolled without a pause asks for fewer than a
# hundred a second, one that is open for fewer than the part of a viewer. All together a
# third of a processor, and for viewers, of which there are few, a third more.
_QUESTIONS: Final = {
    "client": Rate(300, 100),
    "in_all": Rate(600, 300),
    "viewer": Rate(100, 25),
}
_PAIRS_ORDERED: Final = 500
_HELLO_COST: Final = 10
_FILES: Final = Path(__file__).parent / "page"
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def read_files() -> dict[str, Answer]:
    """The page's files by path, as they are answered."""
    files = {}
    for path in sorted(_FILES.iterdir()):
        kind = _TYPES.get(path.suffix)
        if kind is not None:
            name = "/" if path.name == "index.html" else f"/{path.name}"
            files[name] = Answer(HTTPStatus.OK, (("Content-Type", kind),), path.read_bytes())
    return files


class PageSite:
    """Serves the page of one daemon."""

    most_body_bytes = MOST_BODY_BYTES

    def __init__(
        self,
        loop: Loop,
        about: About,
        sampler: Sampler,
        history: History,
        gate: Gate,
        steering: Steering | None,
        *,
        files: Mapping[str, Answer],
        health: Sequence[HealthChange] = (),
        down: Collection[tuple[str, str]] = (),
        unix_time_s: Callable[[], float],
    ) -> None:
        """Serve nobody yet. Without `steering` viewers can only read.

        `health` is what has changed so far, oldest first, `down` which servers (upstream, server)
        are down now.
        """
        self._loop = loop
        self._about = about
        self._sampler = sampler
        self._history = history
        self._gate = gate
        self._page_orders = PageOrders(
            steering if about.control else None, sampler.plan, self._rows_now
        )
        self._files = files
        self._health = deque(health, maxlen=MOST_VERDICTS)
        self._down = set(down)
        self._unix_time_s = unix_time_s
        self._viewers: dict[Visitor, None] = {}
        self._logins = LoginQueue(loop, gate.is_right)
        self._orders = Allowance(**_ORDERS)
        self._questions = Allowance(**_QUESTIONS)
        self._sampled_s: float | None = None
        self._tick = b""
        self._timer = 0
        self._routes: Mapping[str, tuple[str, Callable[[Request, Visitor, str], Answer | None]]] = {
            "/live": ("GET", self._begin),
            "/pairs": ("GET", self._page),
            "/explain": ("POST", self._explain),
            "/flush": ("POST", self._page_orders.flush),
            "/server": ("POST", self._page_orders.set_server),
        }

    # ---------------------------------------------------------------- requests

    def answer(self, request: Request, visitor: Visitor) -> Answer | None:
        """See `server.Site`."""
        answer = self._answer(request, visitor)
        return None if answer is None else secured(answer)

    def _answer(self, request: Request, visitor: Visitor) -> Answer | None:
        refused = self._gate.refuses_browser(request)
        if refused is not None:
            return refused
        user = self._gate.who(request, visitor.host, self._loop.now_s)
        if isinstance(user, Doubt):
            return self._verify(user, request, visitor)
        return user if isinstance(user, Answer) else self._serve(request, visitor, user)

    def _verify(self, doubt: Doubt, request: Request, visitor: Visitor) -> Answer | None:
        """Have the password compared with its hash beside the loop, and answer then."""

        def serve_user(is_right: bool) -> Answer | None:
            user = doubt.settle(is_right)
            return user if isinstance(user, Answer) else self._serve(request, visitor, user)

        def later(is_right: bool) -> None:
            answer = serve_user(is_right)
            if answer is not None:
                visitor.finish(secured(answer))

        def pushed_out() -> None:
            visitor.finish(secured(_TOO_MANY_LOGINS))

        check = self._logins.ask(doubt, later, pushed_out)
        if check is None:
            return _TOO_MANY_LOGINS
        if check is True:
            return serve_user(True)
        number = int(check)
        visitor.wait(lambda: self._logins.forget(number))
        return None

    def _serve(self, request: Request, visitor: Visitor, user: str) -> Answer | None:
        """What a viewer who may ask gets."""
        file = self._files.get(request.path)
        if file is not None:
            return file if request.method in ("GET", "HEAD") else not_allowed("GET, HEAD")
        method, act = self._routes.get(request.path, ("", None))
        if act is None:
            return Answer.words(HTTPStatus.NOT_FOUND, "There is no such page.")
        if request.method != method:
            return not_allowed(method)
        if method == "POST":
            refused = self._gate.refuses_order(request)
            if refused is not None:
                return refused
            refused = self._too_much(self._orders, visitor)
            if refused is not None:
                return refused
        return act(request, visitor, user)

    def _too_much(self, allowance: Allowance, visitor: Visitor, cost: float = 1.0) -> Answer | None:
        """What to answer a client that asks too much; None: it does not."""
        client = network_of(visitor.host)
        is_viewer = any(network_of(viewer.host) == client for viewer in self._viewers)
        refused = allowance.refuses(client, self._loop.now_s, cost=cost, is_viewer=is_viewer)
        if refused is None:
            return None
        return failed(
            refused.status,
            "too much at once: try again",
            ("Retry-After", str(refused.retry_after_s)),
        )

    # ---------------------------------------------------------------- events

    def _begin(self, request: Request, visitor: Visitor, user: str) -> Answer | None:
        del request
        refused = self._too_much(self._questions, visitor, _HELLO_COST)
        if refused is not None:
            return refused
        if len(self._viewers) >= MOST_VIEWERS and not self._make_room(visitor):
            return _TOO_MANY_VIEWERS
        if not self._viewers:
            if self._sampled_s is None or time.monotonic() - self._sampled_s >= TICK_S:
                self._take_sample()
            self._come_again(TICK_S)
        self._viewers[visitor] = None
        first = event("hello", self._first(user)) + self._tick
        headers = (("Content-Type", "text/event-stream"), *SECURITY_HEADERS)
        visitor.stream(headers, b"retry: 3000\n\n" + first, lambda: self._left(visitor))
        return None

    def _make_room(self, newcomer: Visitor) -> bool:
        """End the oldest of the client with most viewers, if that is not the newcomer's."""
        viewers = list(self._viewers)
        crowd = most_crowded([*(viewer.host for viewer in viewers), newcomer.host])
        if len(viewers) in crowd:
            return False
        viewers[crowd[0]].end()
        return True

    def _left(self, visitor: Visitor) -> None:
        self._viewers.pop(visitor, None)

    def _come_again(self, delay_s: float) -> None:
        self._loop.cancel(self._timer)
        self._timer = self._loop.after(delay_s, self._again)

    def _again(self) -> None:
        """Take a sample once a second while there are viewers; some time after the last has gone,
        forget the pairs.
        """
        if self._viewers:
            self._take_sample()
            self._come_again(TICK_S)
        elif self._sampled_s is not None and time.monotonic() - self._sampled_s < KEPT_S:
            self._come_again(KEPT_S)
        else:
            self._sampler.forget()

    def _take_sample(self) -> None:
        now_s, now_unix_s = time.monotonic(), self._unix_time_s()
        sample = self._sampler.sample(now_s)
        self._sampled_s = now_s
        point = self._history.add(sample, now_unix_s)
        self._tick = event("tick", tick(sample, self._sampler.plan, self._down, now_unix_s))
        self._broadcast(self._tick + (event("point", point) if point is not None else b""))

    def _rows_now(self) -> PairRows:
        self._take_sample()
        return self._sampler.rows

    def _broadcast(self, piece: bytes) -> None:
        for viewer in list(self._viewers):
            viewer.send(piece)  # one that is behind misses this, and gets the next whole

    def _first(self, user: str) -> dict[str, object]:
        now_unix_s = self._unix_time_s()
        return hello(
            self._about,
            self._sampler.plan,
            now_unix_s,
            user=user,
            control=self._page_orders.may_be_given,
            token=self._gate.token,
            history=self._history.as_json(now_unix_s),
            health=self._health,
        )

    def health_changed(self, change: HealthChange) -> None:
        """A server went up or down: remember it, and tell the viewers."""
        self._health.append(change)
        if change.up:
            self._down.discard((change.upstream, change.server))
        else:
            self._down.add((change.upstream, change.server))
        self._broadcast(event("health", change.as_json()))

    # ---------------------------------------------------------------- questions

    def _page(self, request: Request, visitor: Visitor, user: str) -> Answer:
        del user
        if len(request.query) > MOST_QUERY_BYTES:
            return failed(HTTPStatus.REQUEST_URI_TOO_LONG, "too long")
        asked = dict(parse_qsl(request.query))
        sort, order = asked.get("sort", "rate"), asked.get("order", "falling")
        first, count = asked.get("first", "0"), asked.get("count", "50")
        if sort not in SORTS or order not in ("rising", "falling"):
            return failed(HTTPStatus.BAD_REQUEST, "there is no such order")
        if not (is_number(first) and is_number(count)):
            return failed(HTTPStatus.BAD_REQUEST, "first and count are numbers")
        rising, words = order == "rising", asked.get("filter", "")
        refused = self._too_much(
            self._questions,
            visitor,
            1 + self._sampler.rows.pairs_to_order(sort, rising, words) / _PAIRS_ORDERED,
        )
        if refused is not None:
            return refused
        # For those who ask and are no viewers: not more often than for viewers.
        if self._sampled_s is None or time.monotonic() - self._sampled_s > 2 * TICK_S:
            self._take_sample()
            if not self._viewers:
                self._come_again(KEPT_S)
        return ok(
            self._sampler.rows.page(
                sort=sort,
                rising=rising,
                filter=words,
                first=int(first),
                count=int(count),
                now_ns=time.monotonic_ns(),
            )
        )

    def _explain(self, request: Request, visitor: Visitor, user: str) -> Answer:
        del visitor, user
        return explain(self._about.config, request.body, self._unix_time_s())


_TOO_MANY_LOGINS: Final = Answer.words(
    HTTPStatus.SERVICE_UNAVAILABLE, "Too many log in: try again.", SOON
)
_TOO_MANY_VIEWERS: Final = Answer.words(
    HTTPStatus.SERVICE_UNAVAILABLE, "Too many look already.", SOON
)

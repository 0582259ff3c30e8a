"""What the page's site answers: files, events for viewers, rows, explanations, orders."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyforwarder.core.password import make_hash
from pyforwarder.runtime.channel import Channel
from pyforwarder.runtime.loop import Loop
from pyforwarder.status import site as site_module
from pyforwarder.status.answers import SECURITY_HEADERS
from pyforwarder.status.gate import TOKEN_HEADER, Gate
from pyforwarder.status.history import KEPT_S, History
from pyforwarder.status.http import Answer
from pyforwarder.status.page_data import About, HealthChange
from pyforwarder.status.sampling import Sampler
from pyforwarder.status.site import MOST_VIEWERS, PageSite, read_files
from pyforwarder.status.steering import SupervisorLink
from tests.helpers.first_packets import client_hello
from tests.helpers.status import CONFIG, FakeVisitor, Memory, ok, request

if TYPE_CHECKING:
    from pyforwarder.status.page_orders import Done


class Orders:
    """A supervisor that is told what to flush."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int], Done]] = []
        self.servers: list[tuple[str, str, str, Done]] = []
        self.is_busy = False

    def flush(self, user: str, ids: Sequence[int], answer: Done) -> bool:
        if not self.is_busy:
            self.asked.append((user, list(ids), answer))
        return not self.is_busy

    def set_server(self, user: str, server: str, state: str, answer: Done) -> bool:
        if not self.is_busy:
            self.servers.append((user, server, state, answer))
        return not self.is_busy


class Play:
    """A site in virtual time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        self.loop = Loop()
        self.memory = Memory()
        self.orders = Orders()
        self.samples = 0
        self.site = self.make()

    def make(self, **changes: Any) -> PageSite:
        sampler = Sampler(self.memory.plan, self.memory.counters, self.memory.windows)
        sampled = sampler.sample

        def sample(now_s: float) -> Any:
            self.samples += 1
            return sampled(now_s)

        sampler.sample = sample  # type: ignore[method-assign]
        wanted: dict[str, Any] = {
            "control": True,
            "users": (),
            "steering": self.orders,
            "health": (),
            "down": (),
            **changes,
        }
        users = dict.fromkeys(wanted["users"], wanted.get("stored", b"secret"))
        return PageSite(
            self.loop,
            About("edge", "0.2.0", 900.0, 2, {"copy": "available"}, CONFIG, wanted["control"]),
            sampler,
            History(self.memory.plan),
            Gate(passwords=users),
            wanted["steering"],
            files=read_files(),
            health=wanted["health"],
            down=wanted["down"],
            unix_time_s=lambda: self.now_s + 1e9,
        )

    def pass_time(self, by_s: float) -> None:
        for _ in range(round(by_s * 2)):
            self.now_s += 0.5
            self.loop.run_once(0.0)

    def get(self, target: str, **headers: str) -> Answer:
        answer = self.site.answer(request("GET", target, b"", **headers), FakeVisitor())
        assert answer is not None
        return answer

    def view(self, host: str = "127.0.0.1") -> FakeVisitor:
        """A viewer opens the page."""
        visitor = FakeVisitor(host)
        answer = self.site.answer(request("GET", "/live"), visitor)
        if answer is not None:
            visitor.finish(answer)
        return visitor

    def post(
        self, path: str, body: object, visitor: FakeVisitor | None = None, **headers: str
    ) -> Answer | None:
        good = {
            "Content_Type": "application/json",
            TOKEN_HEADER: self.site._gate.token,
            "Origin": "http://127.0.0.1:9997",
        }
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        asked = request("POST", path, text, **{**good, **headers})
        return self.site.answer(asked, visitor or FakeVisitor())


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    play = Play(monkeypatch)
    yield play
    play.loop.dispose()


def events(told: bytes) -> list[tuple[str, Any]]:
    """Names and data, in order."""
    found = re.findall(rb"event: (\w+)\ndata: (.*)\n\n", told)
    return [(name.decode(), json.loads(data)) for name, data in found]


def said(answer: Answer | None) -> tuple[int, Any]:
    assert answer is not None
    return answer.status.value, json.loads(answer.body)


# ---------------------------------------------------------------- files


def test_every_file_of_the_page_is_served_with_its_type(play: Play) -> None:
    folder = Path(site_module.__file__).parent / "page"
    names = {path.name for path in folder.iterdir()}
    assert {"index.html", "app.js", "style.css", "icon.svg"} <= names
    for name in names:
        answer = ok(play.get("/" if name == "index.html" else f"/{name}"))
        assert answer.body == (folder / name).read_bytes()
        kind = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
        expected = kind.get(name.rpartition(".")[2], "image/svg+xml")
        assert dict(answer.headers)["Content-Type"].startswith(expected)


def test_what_the_page_loads_is_there_and_nothing_else_is_loaded(play: Play) -> None:
    html = ok(play.get("/")).body.decode()
    for name in re.findall(r'(?:src|href)="([^"#]+)"', html):
        ok(play.get(f"/{name}"))
    for path in (Path(site_module.__file__).parent / "page").glob("*.js"):
        text = path.read_text()
        for name in re.findall(r'from "\./([^"]+)"', text):
            ok(play.get(f"/{name}"))
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "eval(",
            "document.write",
            "http:",
        ):
            rest = text.replace("http://www.w3.org/2000/svg", "")
            assert word not in rest, (path.name, word)
    assert not re.search(r"<script[^>]*>[^<]", html)
    assert not re.search(r"\son\w+=|style=", html)


def test_every_answer_has_the_headers_that_keep_others_out(play: Play) -> None:
    visitor = play.view()
    assert set(SECURITY_HEADERS) <= set(visitor.headers.items())
    play.site = play.make(users=("ann",))
    answers = [play.get(path) for path in ("/", "/live", "/nothing", "/pairs?sort=x")]
    play.site = play.make()
    answers += [play.get(path) for path in ("/", "/nothing", "/pairs?sort=x", "/explain", "/pairs")]
    answers += [play.get("/", Host="evil.example"), play.get("/x", Sec_Fetch_Site="cross-site")]
    for answer in answers:
        assert set(SECURITY_HEADERS) <= set(answer.headers), answer
    policy = dict(SECURITY_HEADERS)["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_there_is_nothing_else(play: Play) -> None:
    for path in ("/index.html", "/metrics", "/../site.py", "/site.py", "//", "/page/", "/app.js/"):
        assert play.get(path).status == 404, path
    for path, allowed in (("/", "GET, HEAD"), ("/live", "GET"), ("/flush", "POST")):
        answer = play.site.answer(request("DELETE", path), FakeVisitor())
        assert answer is not None
        assert (answer.status, dict(answer.headers)["Allow"]) == (405, allowed)


def test_a_viewer_without_a_password_gets_nothing_at_all(play: Play) -> None:
    play.site = play.make(users=("ann",))
    for path in ("/", "/app.js", "/style.css", "/live", "/pairs", "/nothing"):
        assert play.get(path).status == 401, path
    for path in ("/explain", "/flush"):
        answer = play.post(path, {})
        assert answer is not None
        assert answer.status == 401
    assert play.samples == 0
    word = "Basic YW5uOnNlY3JldA=="  # ann:secret
    ok(play.get("/", Authorization=word))
    visitor = FakeVisitor()
    assert play.site.answer(request("GET", "/live", Authorization=word), visitor) is None
    assert events(visitor.told)[0][1]["user"] == "ann"


def wait_for_answer(play: Play, visitor: FakeVisitor) -> Answer:
    """What the site answers later, in real time: a thread computes meanwhile."""
    ends = 500
    while not visitor.answers and not visitor.told and ends:
        play.loop.run_once(0.02)
        ends -= 1
    return visitor.answers[-1] if visitor.answers else Answer(HTTPStatus.OK)


def test_a_password_that_is_kept_as_a_hash_is_compared_beside_the_loop(play: Play) -> None:
    play.site = play.make(users=("ann",), stored=make_hash(b"secret").encode())
    wrong, unknown, right, again = (FakeVisitor() for _ in range(4))
    for visitor, word in ((wrong, "YW5uOng="), (unknown, "Ym9iOm90aGVy")):  # ann:x, bob:other
        asked = request("GET", "/", b"", Authorization=f"Basic {word}")
        assert play.site.answer(asked, visitor) is None
        answer = wait_for_answer(play, visitor)
        assert (answer.status, set(SECURITY_HEADERS) <= set(answer.headers)) == (401, True)
    good = request("GET", "/live", b"", Authorization="Basic YW5uOnNlY3JldA==")
    assert play.site.answer(good, right) is None
    assert right.told == b""
    wait_for_answer(play, right)
    assert events(right.told)[0][1]["user"] == "ann"
    assert play.site.answer(good, again) is None
    assert events(again.told)[0][0] == "hello"  # at once


# ---------------------------------------------------------------- events


def test_a_viewer_is_told_everything_once_and_then_what_changes(play: Play) -> None:
    slot = play.memory.pair(1)
    visitor = play.view()
    (name, hello), (second, tick) = events(visitor.told)
    assert (name, second) == ("hello", "tick")
    assert (hello["instance"], hello["control"], hello["user"]) == ("edge", True, "")
    assert hello["lanes"][:3] == ["copy", "sockmap", "splice"]
    assert [one["rule"] for one in hello["rules"]] == ["tls", "rest", "all"]
    assert hello["listeners"][0] == {"name": "web", "bind": "0.0.0.0:443", "protocol": "tcp"}
    backup = {"upstream": "pool", "server": "10.0.0.2:443", "weight": 7, "backup": True}
    assert hello["servers"][1] == backup
    assert tick["totals"]["pairs"] == 1
    visitor.told = b""
    for number in range(1, 6):
        play.memory.carry(slot, 1000 * number, 0)
        play.pass_time(1.0)
    names = [name for name, _ in events(visitor.told)]
    assert names == ["tick"] * 5 + ["point"]
    ticks = [data for name, data in events(visitor.told) if name == "tick"]
    assert [data["totals"]["up"] for data in ticks] == [1000.0] * 5
    assert [data["lanes"][1] for data in ticks] == [[1, 1000.0, 0.0]] * 5
    assert events(visitor.told)[-1][1]["series"]["l0"] == [1000, 0, 0]


def test_all_viewers_share_one_look_and_nobody_costs_nothing(play: Play) -> None:
    play.pass_time(10.0)
    assert play.samples == 0
    first = play.view()
    others = [play.view() for _ in range(5)]
    assert play.samples == 1
    play.pass_time(10.0)
    assert play.samples == 11
    assert first.told.endswith(others[4].told[-500:])
    for visitor in (first, *others):
        visitor.leave()
    play.pass_time(100.0)
    assert play.samples == 11


def test_a_viewer_that_comes_back_sees_the_history_at_once(play: Play) -> None:
    slot = play.memory.pair(1)
    visitor = play.view()
    play.pass_time(5.0)
    visitor.leave()
    play.memory.carry(slot, 30_000, 0)
    play.pass_time(300.0)
    visitor = play.view()
    hello = events(visitor.told)[0][1]
    assert hello["history"]["series"]["t"][0] == [0, 100]
    assert hello["history"]["span"][1] == 300
    visitor.told = b""
    play.pass_time(1.0)
    assert [name for name, _ in events(visitor.told)] == ["tick"]
    visitor.leave()
    play.pass_time(2 * KEPT_S + 10)
    assert play.site._sampler._at_s is None
    samples = play.samples
    play.pass_time(3 * KEPT_S)
    assert play.samples == samples


def test_a_viewer_that_does_not_read_misses_ticks_and_holds_up_nobody(play: Play) -> None:
    slow, quick = play.view(), play.view()
    slow.is_behind = True
    play.pass_time(5.0)
    assert [name for name, _ in events(slow.told)] == ["hello", "tick"]
    assert [name for name, _ in events(quick.told)].count("tick") == 6
    slow.is_behind = False
    play.pass_time(1.0)
    assert [name for name, _ in events(slow.told)].count("tick") == 2


def test_viewers_are_not_more_than_can_be_served(play: Play) -> None:
    viewers = [play.view() for _ in range(MOST_VIEWERS)]
    refused = play.get("/live")
    assert (refused.status, dict(refused.headers)["Retry-After"]) == (503, "3")
    viewers[3].leave()
    play.view()
    assert play.get("/live").status == 503


def test_the_client_that_looks_most_makes_room_for_another(play: Play) -> None:
    viewers = [play.view(f"127.0.0.{n % 2 + 1}") for n in range(MOST_VIEWERS + 1)]
    # The last is a ninth of the first's address, which has most.
    assert viewers[-1].answers
    assert [viewer.is_ended for viewer in viewers] == [False] * (MOST_VIEWERS + 1)
    elsewhere = play.view("192.0.2.1")
    assert events(elsewhere.told)[0][0] == "hello"
    assert [viewer.is_ended for viewer in viewers].index(True) == 0
    assert len(play.site._viewers) == MOST_VIEWERS
    play.site._viewers.clear()
    for number in range(MOST_VIEWERS):
        play.view(f"10.{number}.0.1")
    assert play.view("192.0.2.1").answers[0].status == 503  # all have one


def test_a_viewer_that_begins_again_and_again_causes_one_look_a_second(play: Play) -> None:
    for _ in range(10):
        play.view().leave()
    assert play.samples == 1


def test_rows_are_asked_for_within_a_budget_and_viewers_have_a_part_of_it(play: Play) -> None:
    viewer = play.view("192.0.2.9")

    def ask(host: str, target: str = "/pairs") -> Answer:
        answer = play.site.answer(request("GET", target), FakeVisitor(host))
        assert answer is not None
        return answer

    codes = [ask("192.0.2.1").status.value for _ in range(400)]
    assert codes == [200] * 300 + [429] * 100
    assert dict(ask("192.0.2.1").headers)["Retry-After"] == "1"
    # All together have one, too, and viewers have their own.
    codes = [ask(f"10.0.0.{n}").status.value for n in range(250) for _ in range(2)]
    assert codes.count(503) > 0
    assert codes[-1] == 503
    assert dict(ask("10.0.1.1").headers)["Retry-After"] == "1"
    assert [ask("192.0.2.9").status.value for _ in range(50)] == [200] * 50
    play.pass_time(1.0)
    assert ask("192.0.2.1").status == 200
    assert ask("10.0.1.1").status == 200
    assert not viewer.is_ended


def test_an_order_of_many_pairs_costs_more_than_a_page_of_it(play: Play) -> None:
    play.site._sampler.rows.pairs_to_order = lambda *_: 50_000  # type: ignore[method-assign]
    codes = [play.get("/pairs").status.value for _ in range(5)]
    assert codes == [200, 200, 429, 429, 429]  # 101 each


def test_health_is_told_at_once_and_to_later_viewers(play: Play) -> None:
    before = HealthChange(5.0, "pool", "10.0.0.2:443", False, "no answer in time")
    play.site = play.make(health=[before], down={("pool", "10.0.0.2:443")})
    visitor = play.view()
    hello, tick = (data for _, data in events(visitor.told))
    assert [one["why"] for one in hello["health"]] == ["no answer in time"]
    states = [row[3] for row in tick["servers"]]
    assert states == ["up", "down", "not checked"]
    visitor.told = b""
    play.site.health_changed(HealthChange(6.0, "pool", "10.0.0.2:443", True, "connected"))
    ((name, data),) = events(visitor.told)
    assert (name, data["up"], data["at"]) == ("health", True, 6)
    play.pass_time(1.0)
    assert events(visitor.told)[-1][1]["servers"][1][3] == "up"
    for number in range(500):
        play.site.health_changed(HealthChange(float(number), "pool", "x", True, "connected"))
    assert len(events(play.view().told)[0][1]["health"]) == 50


# ---------------------------------------------------------------- rows


def test_rows_are_those_of_the_last_look(play: Play) -> None:
    for number in range(1, 31):
        play.memory.pair(number)
    code, page = said(play.get("/pairs?sort=id&order=rising&first=3&count=2&filter=+joined++tls"))
    assert (code, page["total"], page["shown"]) == (200, 30, 30)
    assert [row["id"] for row in page["rows"]] == [4, 5]
    for _ in range(20):
        play.get("/pairs")
    assert play.samples == 1
    play.pass_time(3.0)
    play.get("/pairs")
    assert play.samples == 2


@pytest.mark.parametrize(
    "query",
    [
        *("sort=nothing", "order=up", "first=-1", "count=x", "first=1e3", "count=%D9%A1"),
        *("first=99999999999", f"filter={'x' * 3000}"),
    ],
)
def test_a_wrong_question_for_rows_is_told_so(play: Play, query: str) -> None:
    code, answer = said(play.get(f"/pairs?{query}"))
    assert code in (400, 414)
    assert answer["error"]


# ---------------------------------------------------------------- explain


def test_explain_says_what_every_rule_says(play: Play) -> None:
    hello = client_hello(b"shop.example.com")
    code, answer = said(play.post("/explain", {"listener": "web", "hex": hello.hex(" ")}))
    assert (code, answer["outcome"], answer["rule"], answer["to"]) == (200, "route", "tls", "pool")
    assert answer["bytes"] == len(hello)
    assert answer["hex"] == hello.hex()
    assert [rule["rule"] for rule in answer["rules"]] == ["tls", "rest"]
    assert answer["after_bytes"] <= len(hello)
    code, answer = said(
        play.post(
            "/explain",
            {"listener": "web", "hex": b"18127.0.0.1:999700".hex(), "client": "192.0.2.7:5000"},
        )
    )
    # What it would be told by the forwarder, too: the page itself is no destination.
    assert (answer["outcome"], answer["allowed"]) == ("route", False)
    assert answer["why"] == "127.0.0.1:9997 is the forwarder itself"
    code, answer = said(play.post("/explain", {"listener": "web", "hex": b"18a.example:80".hex()}))
    assert code == 200


def test_of_udp_each_line_is_a_datagram(play: Play) -> None:
    code, answer = said(play.post("/explain", {"listener": "dns", "hex": "0102\n\n03:04 05\n"}))
    assert (code, answer["datagrams"], answer["bytes"], answer["hex"]) == (200, 2, 5, "0102030405")
    assert (answer["outcome"], answer["rule"]) == ("route", "all")


def test_explain_resolves_no_name(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise AssertionError("somebody asks a name server")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    text = b"17localhost:99900"
    code, answer = said(play.post("/explain", {"listener": "web", "hex": text.hex()}))
    assert (code, answer["allowed"]) == (200, None)
    assert "no name is resolved" in answer["why"]


@pytest.mark.parametrize(
    "question",
    [
        *(b"", b"[]", b"{", b"null", b"[" * 100_000, b"\xff"),
        *({}, {"listener": "other", "hex": ""}, {"listener": "web", "hex": "0"}),
        *({"listener": "web", "hex": "zz"}, {"listener": "web", "hex": 1}, {"listener": ["web"]}),
        {"listener": "web", "hex": "", "client": "a name:1"},
        {"listener": "web", "hex": "", "client": "localhost:1"},
        {"listener": "web", "hex": "", "end": "never"},
        {"listener": "web", "hex": "", "more": "x"},
        {"listener": "web", "hex": "00" * 32_769},
    ],
    ids=str,
)
def test_a_wrong_question_is_told_so(play: Play, question: object) -> None:
    code, answer = said(play.post("/explain", question))
    assert code in (200, 400)
    assert list(answer) == ["error"]


def test_what_takes_long_may_be_asked_twenty_times_at_once(play: Play) -> None:
    codes = [said(play.post("/explain", {"listener": "web", "hex": ""}))[0] for _ in range(50)]
    assert codes == [200] * 20 + [429] * 30
    play.pass_time(1.0)
    assert said(play.post("/explain", {"listener": "web", "hex": ""}))[0] == 200


# ---------------------------------------------------------------- orders


def test_pairs_are_flushed_by_a_viewer_with_control(play: Play) -> None:
    visitor = FakeVisitor()
    assert play.post("/flush", {"ids": [3, 4]}, visitor) is None
    ((user, ids, answer),) = play.orders.asked
    assert (user, ids, visitor.answers) == ("", [3, 4], [])
    answer(1)
    (told,) = visitor.answers
    assert said(told) == (200, {"flushed": 1})
    assert set(SECURITY_HEADERS) <= set(told.headers)
    play.post("/flush", {"ids": [5]}, visitor)
    play.orders.asked[-1][2](0, "no worker answers")
    assert said(visitor.answers[-1]) == (409, {"error": "no worker answers"})


def test_pairs_of_a_listener_and_of_a_rule_are_flushed(play: Play) -> None:
    play.memory.pair(1)
    play.memory.pair(2, rule="rest")
    play.memory.pair(3, listener="dns", rule="all")
    for which, expected in (
        ({"listener": "web"}, [1, 2]),
        ({"listener": "web", "rule": "rest"}, [2]),
    ):
        assert play.post("/flush", which) is None
        assert play.orders.asked[-1][1] == expected
    assert said(play.post("/flush", {"listener": "other"})) == (200, {"flushed": 0})


@pytest.mark.parametrize(
    "which",
    [
        *({}, [], {"ids": "all"}, {"ids": [True]}, {"ids": [-1]}, {"ids": [1.0]}, {"ids": ["1"]}),
        *({"ids": [1], "all": True}, {"all": True}, {"rule": "tls"}, {"ids": [1 << 64]}, b"x"),
        *({"listener": "web", "user": "root"}, b"[" * 60_000),
    ],
    ids=str,
)
def test_an_order_that_names_no_pairs_does_nothing(play: Play, which: object) -> None:
    assert said(play.post("/flush", which))[0] == 400
    assert play.orders.asked == []


def test_a_server_is_drained_and_ready_again(play: Play) -> None:
    which = {"upstream": "pool", "server": "10.0.0.2:443"}
    visitor = FakeVisitor()
    for state in ("drain", "ready"):
        assert play.post("/server", {**which, "state": state}, visitor) is None
        user, server, asked, answer = play.orders.servers[-1]
        assert (user, server, asked) == ("", "pool/10.0.0.2:443", state)
        answer(1)
        assert said(visitor.answers[-1]) == (200, {"state": state})
    for wrong in ({}, {"state": "down"}, {"server": "x"}, {"upstream": "x"}, {"more": "x"}):
        code = said(play.post("/server", {**which, "state": "drain", **wrong} if wrong else {}))[0]
        assert code == 400
    play.site = play.make(control=False)
    assert said(play.post("/server", {**which, "state": "drain"}))[0] == 403
    assert len(play.orders.servers) == 2


def test_a_viewer_without_control_orders_nothing(play: Play) -> None:
    for changes in ({"control": False}, {"steering": None}):
        play.site = play.make(**changes)
        assert said(play.post("/flush", {"ids": [1]}))[0] == 403
        assert events(play.view().told)[0][1]["control"] is False
    assert play.orders.asked == []


def test_no_other_page_orders(play: Play) -> None:
    for headers in (
        {TOKEN_HEADER: "guess"},
        {"Origin": "http://evil.example"},
        {"Content_Type": "text/plain"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Host": "evil.example"},
    ):
        answer = play.post("/flush", {"ids": [1]}, None, **headers)
        assert answer is not None
        assert answer.status in (403, 415, 421), headers
    assert play.orders.asked == []


def test_a_busy_forwarder_is_told_of(play: Play) -> None:
    play.orders.is_busy = True
    assert said(play.post("/flush", {"ids": [1]}))[0] == 503


# ---------------------------------------------------------------- the channel to the supervisor


def test_the_channel_carries_orders_out_and_answers_and_health_in(play: Play) -> None:
    ours, theirs = Channel.pair()
    heard: list[HealthChange] = []
    link = SupervisorLink(play.loop, theirs, heard.append)
    answers: list[tuple[int, str]] = []

    def answer(count: int, error: str = "") -> None:
        answers.append((count, error))

    def received() -> Any:
        told = ours.receive()
        assert told is not None
        return told[0]

    assert link.flush("ann", [1, 2], answer)
    assert link.flush("", [1 << 63] * 10_000, answer)
    assert received() == {"n": 1, "flush": [1, 2], "user": "ann"}
    assert received()["n"] == 2
    for message in (
        {"n": 2, "error": "busy"},
        {"n": 1, "done": 2},
        {"n": 1, "done": 3},
        {"n": 7, "done": 3},
        {"at": 5.0, "upstream": "u", "server": "s", "up": False, "why": "w"},
    ):
        ours.send(message)
        play.loop.run_once(0.0)
    assert answers == [(0, "busy"), (2, "")]
    assert heard == [HealthChange(5.0, "u", "s", False, "w")]
    sent = sum(link.flush("", [1], answer) for _ in range(100))
    assert sent == 32
    ours.close()
    play.loop.run_once(0.0)
    assert not play.loop.running
    theirs.close()

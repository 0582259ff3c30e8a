"""Health checks that machines share: which one checks a server, and whether it is up."""

from __future__ import annotations

import queue
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from pyforwarder.config import Fleet, parse_config
from pyforwarder.core.wording import counted
from pyforwarder.fleet import health, reporting
from pyforwarder.fleet.health import Board, HealthReport, HealthSharing, State
from pyforwarder.fleet.layout import MOST_SERVERS, Keys
from pyforwarder.fleet.opening import open_store
from pyforwarder.fleet.store import Change, Found, StoreError
from pyforwarder.fleet.watching import All, Lost, Watcher
from pyforwarder.runtime.channel import Channel
from pyforwarder.supervisor.fleet.shared_health import FleetHealth
from pyforwarder.supervisor.messages import FROM_HEALTH, FleetStates, FleetStore, understand
from pyforwarder.supervisor.processes.health_checker import HealthResult
from pyforwarder.supervisor.processes.health_process import report_rounds

KEYS: Final = Keys("edge")
WEB: Final = ("web", "10.0.0.1:80")
MANY: Final = [("web", f"10.0.0.{n}:80") for n in range(200)]
PROGRESS: Final = {"turn": 0, "rounds": 0, "within_s": 1000.0}
UP, DOWN = State(up=True), State(up=False, why="refused")


def value_of(**states: str) -> bytes:
    """A machine's report: of one server in each upstream."""
    return (
        HealthReport(servers={name: {WEB[1]: text} for name, text in states.items()})
        .encode()
        .encode()
    )


def tell_each_other(boards: dict[str, Board]) -> None:
    for name, board in boards.items():
        for other in boards.values():
            other.saw(name, board.report().encode().encode())


def boards(*names: str, checks: Any = "one", quorum: Any = "majority") -> dict[str, Board]:
    """Of machines that have all of `MANY`, and have heard of each other."""
    made = {name: Board(name, checks, quorum) for name in names}
    for board in made.values():
        board.know(dict.fromkeys(MANY))
    tell_each_other(made)
    return made


def test_each_server_is_checked_by_one_machine_and_few_change_hands_when_one_is_gone() -> None:
    three = boards("a", "b", "c")
    mine = {name: board.mine() for name, board in three.items()}
    assert Counter(server for some in mine.values() for server in some) == Counter(MANY)
    assert min(len(some) for some in mine.values()) > len(MANY) // 5
    for name in ("a", "b"):
        three[name].saw("c", None)
        assert mine[name] < three[name].mine() <= mine[name] | mine["c"]
    assert three["a"].mine() | three["b"].mine() == set(MANY)


def test_a_server_that_one_machine_alone_has_is_checked_by_that() -> None:
    two = boards("a", "b")
    two["a"].know({**dict.fromkeys(MANY), ("own", "10.9.9.9:80"): None})
    tell_each_other(two)
    assert ("own", "10.9.9.9:80") in two["a"].mine()
    assert two["b"].mine() <= set(MANY)


def test_what_the_checker_has_found_holds_at_all_machines() -> None:
    two = boards("a", "b")
    theirs = next(iter(two["b"].mine()))
    assert two["a"].states() == {}  # nobody has looked yet
    two["b"].know({**dict.fromkeys(MANY), theirs: DOWN})
    # What another one has found before, and checks no more, does not count.
    two["a"].know({**dict.fromkeys(MANY), theirs: UP})
    tell_each_other(two)
    assert two["a"].states() == two["b"].states() == {theirs: DOWN}


def test_the_checking_machine_of_a_server_is_the_same_at_all_machines() -> None:
    three = boards("a", "b", "c")
    for name, board in three.items():
        others = board.others()
        assert set(others) == set(MANY) - board.mine()
        for server, other in others.items():
            assert other != name
            assert server in three[other].mine()
    everybody = Board("a", "all", 1)
    everybody.know({WEB: None})
    everybody.saw("b", value_of(web="up"))
    assert everybody.others() == {}


@pytest.mark.parametrize(
    ("quorum", "down", "up", "is_up"),
    [
        ("majority", 1, 1, True),
        ("majority", 2, 1, False),
        ("majority", 2, 2, True),
        ("majority", 1, 0, False),
        (1, 1, 4, False),
        (3, 2, 2, True),
        (3, 3, 9, False),
        (3, 2, 0, False),  # as many as are left
        (3, 1, 1, True),
    ],
)
def test_a_server_is_down_when_enough_machines_say_so(
    quorum: Any, down: int, up: int, *, is_up: bool
) -> None:
    board = Board("a", "all", quorum)
    board.know({WEB: None})
    assert board.mine() == {WEB}
    assert board.states() == {}
    for number in range(down):
        board.saw(f"down{number}", value_of(web="down refused"))
    for number in range(up):
        board.saw(f"up{number}", value_of(web="up"))
    board.saw("new", value_of(web=""))  # it has not looked, and has no vote
    board.saw("other", value_of(mail="down refused"))  # it has no such server
    (state,) = board.states().values()
    assert state.up is is_up
    total = down + up
    said = (
        f"reached by {up} of {counted(total, 'machine')}"
        if is_up
        else f"{down} of {counted(total, 'machine')}: refused"
    )
    assert state.why == said


def test_a_report_that_is_none_is_no_vote() -> None:
    board = Board("a", "all", 1)
    board.know({WEB: None})
    board.saw_all([("b", b"?"), ("c", value_of(web="down x").replace(b"down", b"sick"))])
    assert board.faults == 2
    assert board.states() == {}
    board.saw("a", value_of(web="down made up"))  # in our name
    assert board.states() == {}


class Store:
    """Keys with a lease, as one machine writes them."""

    endpoint = "http://etcd"

    def __init__(self) -> None:
        self.is_there = True
        self.has_lease = True
        self.puts: list[tuple[str, str, int]] = []
        self.deleted = 0
        self.written = self.revision = 0
        self.until_s = 0.0
        self.wait: Callable[[], None] = lambda: None  # in each request

    def _ask(self) -> None:
        self.wait()
        if not self.is_there:
            raise StoreError("etcd is away")

    def grant(self, ttl_s: int) -> int:
        self._ask()
        assert ttl_s == reporting.LEASE_S
        return len(self.puts) + 1

    def renew(self, lease: int) -> bool:
        assert lease
        self._ask()
        return self.has_lease

    def put(self, key: str, value: str, *, lease: int) -> None:
        self._ask()
        self.puts.append((key, value, lease))
        self.written = self.revision

    def get(self, key: str) -> None:
        assert key == f"{KEYS.health}a"
        self._ask()

    def delete(self, key: str) -> None:
        assert key == f"{KEYS.health}a"
        self._ask()
        self.deleted += 1

    def revoke(self, lease: int) -> None:
        assert lease


class Sharing:
    """The process of machine "a", in virtual time."""

    def __init__(self, checks: Any = "all") -> None:
        self.now_s = 100.0
        self.store = Store()
        self.watcher = Watcher(cast("Any", None), KEYS.health)
        self.heard: queue.Queue[Any] = self.watcher.received
        self.said: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.process = HealthSharing(
            cast("Any", self.store),
            cast("Any", self.watcher),
            KEYS,
            "a",
            Board("a", checks, "majority"),
            cast("Any", SimpleNamespace(send=self.said.append)),
            clock=lambda: self.now_s,
        )

    def turn(self, after_s: float = 0.1) -> list[dict[str, Any]]:
        """What the supervisor is told in it; when the store has answered is in `answered`."""
        self.now_s += after_s
        self.said.clear()
        self.process.turn()
        self.answered += [said for said in self.said if "answered_ago_ms" in said]
        return [said for said in self.said if "answered_ago_ms" not in said]


def test_a_machine_writes_what_it_knows_and_concludes_from_what_all_say() -> None:
    one = Sharing()
    one.process.receive({"own": [[*WEB, "down refused"]], **PROGRESS})
    assert one.turn() == []  # it does not know yet who else is there
    one.heard.put(All([(f"{KEYS.health}b", value_of(web="up"))]))
    states = {"web": {WEB[1]: "up reached by 1 of 2 machines"}}
    check = {"web": [WEB[1]]}
    assert one.turn() == [
        {"store": "connected", "endpoint": "http://etcd"},
        {"states": states, "check": check, "others": {}, "turn": 1},
    ]
    assert [(key, lease) for key, _, lease in one.store.puts] == [(f"{KEYS.health}a", 1)]
    assert HealthReport.decode(one.store.puts[0][1]).servers == {"web": {WEB[1]: "down refused"}}
    assert one.turn() == []  # nothing is said twice
    one.heard.put(Change(7, f"{KEYS.health}b", None))
    states = {"web": {WEB[1]: "down 1 of 1 machine: refused"}}
    assert one.turn() == [{"states": states, "check": check, "others": {}, "turn": 1}]
    # A lease that has ended has taken the report along.
    one.store.has_lease = False
    one.turn(reporting.LEASE_S)
    assert len(one.store.puts) == 2


def test_a_store_that_is_silent_for_long_is_lost_and_heard_again() -> None:
    one = Sharing()
    one.process.receive({"own": [[*WEB, "up"]], **PROGRESS})
    one.heard.put(All([]))
    assert len(one.turn()) == 2
    one.store.is_there = False
    one.heard.put(Lost("the watch has ended"))
    assert one.turn(3.0) == []
    told = [said for _ in range(80) for said in one.turn()]
    assert told == [{"store": "lost", "endpoint": "etcd is away"}]
    one.store.is_there = True
    told = [said for _ in range(80) for said in one.turn()]
    assert [next(iter(said)) for said in told] == ["store", "states"]
    assert told[0]["store"] == "connected"


def test_when_the_store_has_answered_is_told_every_few_seconds() -> None:
    one = Sharing()
    one.process.receive({"own": [[*WEB, "up"]], **PROGRESS})
    one.heard.put(All([(f"{KEYS.health}b", b"?")]))
    for _ in range(120):
        one.turn()
    ago_ms = [said["answered_ago_ms"] for said in one.answered]
    assert one.answered == [{"answered_ago_ms": ms, "unusable": 1} for ms in ago_ms]
    assert len(ago_ms) == 3
    assert max(ago_ms) <= 2500  # its lease is renewed as often
    understand(one.answered[0], [], FROM_HEALTH)
    one.store.is_there = False
    for _ in range(120):
        one.turn()
    assert len(one.answered) <= 4


def test_a_store_that_swallows_what_it_is_sent_is_lost_in_time() -> None:
    one = Sharing()
    one.process.receive({"own": [[*WEB, "up"]], **PROGRESS})
    one.heard.put(All([]))
    assert len(one.turn()) == 2
    began_s = one.now_s

    def swallow() -> None:
        one.now_s = one.store.until_s
        raise StoreError("no answer in time")

    one.store.wait = swallow
    told: list[dict[str, Any]] = []
    while not told:
        told = one.turn()
        assert one.store.until_s <= one.now_s + 3.0
    assert told == [{"store": "lost", "endpoint": "no answer in time"}]
    assert one.now_s <= began_s + 6.2


def test_a_watch_that_does_not_tell_what_was_written_is_lost() -> None:
    one = Sharing()
    one.store.revision = 7
    one.process.receive({"own": [[*WEB, "up"]], **PROGRESS})
    one.heard.put(All([]))
    assert len(one.turn()) == 2
    told = [said for _ in range(60) for said in one.turn()]
    assert told == [{"store": "lost", "endpoint": "the watch does not tell what was written"}]
    assert one.watcher._is_doubted
    one.watcher._revision = 7
    assert [next(iter(said)) for said in one.turn()] == ["store", "states"]


def test_another_member_is_asked_where_a_watch_does_not_tell_what_was_written() -> None:
    lists: list[str] = []
    calls: list[str] = []

    class Silent:
        def list(self, prefix: str) -> Found:
            lists.append(prefix)
            return Found(5, [])

        def events(self, prefix: str, *, after: int, until_s: float) -> Iterator[Change]:
            del prefix, until_s
            assert after == 5
            if len(lists) > 1:
                watcher._is_over = True
            else:
                watcher.expect(6, 100.0)
                watcher.received.get_nowait()
                assert not watcher.is_lost(104.9)
                assert watcher.is_lost(105.0)
            return iter(())

        def distrust(self, reason: str) -> StoreError:
            calls.append(reason)
            return StoreError(reason)

    watcher = Watcher(cast("Any", Silent()), KEYS.health)
    watcher.start()
    watcher._thread.join(10.0)
    assert not watcher._thread.is_alive()
    assert (len(lists), len(calls)) == (2, 1)


@pytest.mark.parametrize("value", [None, b"{}"])
def test_a_report_that_others_have_removed_or_overwritten_is_written_again(
    value: bytes | None,
) -> None:
    one = Sharing()
    one.store.revision = 7
    one.process.receive({"own": [[*WEB, "up"]], **PROGRESS})
    one.heard.put(All([]))
    one.turn()
    one.watcher._revision = 7
    key = f"{KEYS.health}a"
    one.heard.put(Change(7, key, one.store.puts[-1][1].encode()))  # our own
    one.heard.put(All([(key, one.store.puts[-1][1].encode())], 7))
    one.heard.put(All([], 6))  # before we have written
    assert one.turn(1.5) == []
    assert len(one.store.puts) == 1
    told = []
    for written in range(1, 5):
        gone = All([] if value is None else [(key, value)], one.store.revision + 1)
        one.heard.put(Change(one.store.revision + 1, key, value) if written % 2 else gone)
        one.store.revision += 2
        one.watcher._revision = one.store.revision
        told += one.turn()
        assert len(one.store.puts) == written  # not at once: the other writer may do it again
        told += one.turn(1.5)
        assert len(one.store.puts) == written + 1
    lines = [said for said in told if "overwritten" in said]
    assert lines == ([] if value is None else [{"overwritten": key}])


def test_a_report_of_too_many_servers_is_none() -> None:
    board = Board("a", "all", 1)
    board.know({WEB: None})
    half = dict.fromkeys(map(str, range(MOST_SERVERS // 2)), "up")
    many = {"web": half, "mail": half}
    board.saw("b", HealthReport(servers=many).encode().encode())
    assert board.faults == 0
    board.saw("b", HealthReport(servers=many | {"one": {WEB[1]: "up"}}).encode().encode())
    assert board.faults == 1
    assert board._said == {}


@pytest.mark.parametrize(
    ("machine", "value"),
    [
        ("b/c", value_of(web="up")),
        ("b" * 129, value_of(web="up")),
        ("", value_of(web="up")),
        ("b", b"[" * 100_000),
        ("b", HealthReport(servers={"web": {WEB[1]: "up"}}).encode().encode() + b" " * (1 << 20)),
        ("b", b'{"servers": {"web": {"10.0.0.1:80": "down a\\nb"}}}'),
    ],
)
def test_what_is_no_machines_report_counts_for_nothing(machine: str, value: bytes) -> None:
    board = Board("a", "one", "majority")
    board.know({WEB: UP})
    board.saw(machine, value)
    assert (board.faults, board._said, board.mine()) == (1, {}, {WEB})


def test_of_others_reports_little_is_kept_and_what_was_kept_counts_for_servers_that_come_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = HealthReport(servers={"web": {WEB[1]: "down x"}, "late": {WEB[1]: "down x"}})
    value = two.encode().encode()
    monkeypatch.setattr(health, "_MOST_KEPT_BYTES", 2 * len(value))
    board = Board("a", "all", "majority")
    board.know({WEB: UP})
    for machine in ("b", "c", "d"):
        board.saw(machine, value)
    assert [len(said) for said in board._said.values()] == [1, 1, 1]
    late = ("late", WEB[1])
    board.know({WEB: UP, late: UP})
    assert [len(said) for said in board._said.values()] == [2, 2, 1]
    assert not board.states()[late].up
    # One that has gone, or reports again, gives its room back.
    for _ in range(3):
        board.saw("b", value)
    board.saw("c", None)
    board.saw("d", value)
    assert sorted(board._values) == ["b", "d"]
    board.saw_all([("b", value)])
    assert board._kept_bytes == len(value)


def test_a_store_that_was_set_up_anew_is_not_waited_for() -> None:
    watcher = Watcher(cast("Any", None), KEYS.health)
    watcher.expect(7000, 100.0)
    watcher.expect(101, 101.0)
    assert not watcher.is_lost(105.5)
    watcher._revision = 101
    watcher.expect(101, 106.0)
    assert not watcher.is_lost(200.0)


def test_requests_end_in_time_with_silent_and_absent_members() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        fleet = Fleet.model_validate({"endpoints": [endpoint] * 3, "name": "edge"})
        store = open_store(fleet)
        began_s = time.monotonic()
        store.until_s = began_s + 0.3
        with pytest.raises(StoreError):
            store.put("/key", "value")
        assert time.monotonic() >= began_s + 0.3
        assert store._clients[0].timeout is not None
        assert store._clients[0].timeout <= 0.3
        silent.accept()[0].close()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # no other was asked
            silent.accept()
        with pytest.raises(StoreError, match="in time"):
            store.put("/key", "value")
        store.close()


def test_what_was_found_before_another_machine_checked_a_server_is_said_and_believed_no_more() -> (
    None
):
    one = Sharing("one")
    theirs = next(iter(boards("a", "b")["b"].mine()))
    one.process.receive({"own": [[*theirs, "up"]], **PROGRESS})
    one.heard.put(All([]))
    (_, said) = one.turn()
    assert said["check"] == {"web": [theirs[1]]}
    report = HealthReport(servers={"web": {theirs[1]: "down refused"}}).encode().encode()
    one.heard.put(Change(7, f"{KEYS.health}b", report))
    (said,) = one.turn()
    assert said["check"] == {}
    assert HealthReport.decode(one.store.puts[-1][1]).servers == {"web": {theirs[1]: ""}}
    # The supervisor has not heard that yet, and the other machine dies.
    one.process.receive({"own": [[*theirs, "up"]], **PROGRESS, "turn": said["turn"] - 1})
    one.heard.put(Change(8, f"{KEYS.health}b", None))
    (said,) = one.turn()
    assert said["states"] == {}
    assert said["check"] == {"web": [theirs[1]]}
    one.process.receive({"own": [[*theirs, "down timeout"]], **PROGRESS, "turn": said["turn"]})
    (said,) = one.turn()
    assert said["states"] == {"web": {theirs[1]: "down timeout"}}


@pytest.mark.parametrize("checks", ["one", "all"])
def test_a_machine_whose_checks_stand_still_takes_back_its_report_until_they_go_on(
    checks: str,
) -> None:
    one = Sharing(checks)
    mine = next(iter(boards("a", "b")["a"].mine()))
    own = {"own": [[*mine, "up"]], **PROGRESS, "within_s": 5.0}
    one.process.receive({**own, "rounds": 1})
    report = HealthReport(servers={"web": {mine[1]: "down refused"}}).encode().encode()
    one.heard.put(All([(f"{KEYS.health}b", report)]))
    one.turn()
    for rounds in range(2, 12):
        one.process.receive({"rounds": rounds, "within_s": 5.0})
        one.turn(4.0)
    assert one.store.deleted == 0
    one.process.receive(own | {"rounds": 11})  # it says more, but has checked nothing
    told = one.turn(5.5)
    assert one.store.deleted == 1
    # What the others have found holds here; it is to check what was its own all the same.
    (states,) = [said["states"] for said in told if "states" in said]
    assert states["web"][mine[1]].startswith("down ")
    assert one.process._mine == {mine}
    written = len(one.store.puts)
    for _ in range(20):
        one.turn(1.0)
    assert (one.store.deleted, len(one.store.puts)) == (1, written)
    one.process.receive({"rounds": 12, "within_s": 5.0})
    one.turn()
    assert len(one.store.puts) == written + 1


def test_a_machine_that_has_nothing_to_check_keeps_its_report() -> None:
    one = Sharing("one")
    theirs = next(iter(boards("a", "b")["b"].mine()))
    one.process.receive({"own": [[*theirs, ""]], **PROGRESS, "within_s": 5.0})
    report = HealthReport(servers={"web": {theirs[1]: "up"}}).encode().encode()
    one.heard.put(All([(f"{KEYS.health}b", report)]))
    for _ in range(20):
        one.turn(1.0)
    assert one.store.deleted == 0


CONFIG: Final = """
fleet: {endpoints: ["http://127.0.0.1:2379"], name: edge, health: {checks: CHECKS}}
upstreams:
  web: {servers: ["10.0.0.1:80", "10.0.0.2:80"], health: {interval: 1s}}
  quiet: {servers: ["10.0.0.3:80"]}
listeners: [{name: main, bind: "127.0.0.1:0", rules: [{match: any, to: web}]}]
"""
ONE, TWO = ("web", "10.0.0.1:80"), ("web", "10.0.0.2:80")


class Played(FleetHealth):
    """The supervisor's half; no process is started."""

    def __init__(self) -> None:
        self.checked: list[set[tuple[str, str]]] = []
        self.told: list[tuple[str, bool]] = []
        self.found: Any = None
        self.timers: dict[float, Any] = {}
        loop = SimpleNamespace(after=self._after)
        self.own: list[dict[str, Any]] = []

        def make_checks(found: Any, finished: Any) -> Any:
            self.found, self.finished = found, finished
            return SimpleNamespace(
                change_to=lambda _, only: self._change_checks(only),
                check_only=self._change_checks,
            )

        super().__init__(
            cast("Any", loop),
            cast("Any", SimpleNamespace(write=lambda *_, **__: None)),
            user=None,
            close_in_child=lambda: None,
            make_checks=make_checks,
            notify=lambda verdict: self.told.append((verdict.server, verdict.up)),
        )

    def _change_checks(self, only: Any) -> None:
        self.checked.append(set(only))

    def _after(self, delay_s: float, action: Any) -> int:
        self.timers[delay_s] = action
        return 1

    def pass_time(self) -> None:
        """A second."""
        for delay_s in sorted(self.timers):
            self.timers.pop(delay_s)()

    def connect(self) -> None:
        """What the fleet's process is told from now on is kept."""
        self._channel = cast(
            "Any", SimpleNamespace(send=lambda message, **_: self.own.append(dict(message)))
        )

    def start(self) -> None:
        pass

    def configure(self, checks: str, text: str = CONFIG) -> None:
        self.change_to(parse_config(text.replace("CHECKS", checks), source="test"))

    def down_at(self, server: tuple[str, str], *, up: bool = False) -> None:
        self.found(HealthResult(*server, up=up, why="refused"))

    def hear(
        self,
        states: dict[str, str],
        *check: tuple[str, str],
        turn: int = 1,
        others: dict[str, str] | None = None,
    ) -> None:
        servers = {"web": [server for _, server in check]}
        known = {"web": others or {}}
        self._handle(FleetStates(states={"web": states}, check=servers, others=known, turn=turn))

    def lose(self) -> None:
        self._handle(FleetStore(store="lost", endpoint="away"))


@pytest.mark.parametrize("checks", ["own", "one", "all"])
def test_a_machine_that_hears_of_no_other_checks_all_by_itself(checks: str) -> None:
    played = Played()
    played.configure(checks)
    assert played.checked == [{ONE, TWO}]
    played.down_at(ONE)
    played.down_at(ONE)
    played.down_at(TWO, up=True)
    assert played.told == [(ONE[1], False)]
    assert [one.server for one in played.down] == [ONE[1]]
    played.configure(checks, CONFIG.replace('"10.0.0.1:80", ', ""))
    assert played.checked[-1] == {TWO}
    assert played.told[1:] == [(ONE[1], True)]  # it is checked no more
    assert played.down == []


def test_what_the_fleet_says_counts_and_this_machine_checks_what_is_its_own() -> None:
    played = Played()
    played.configure("one")
    played.hear({TWO[1]: "down refused"}, ONE)
    assert played.checked[-1] == {ONE}
    assert played.told == [(TWO[1], False)]
    # What was found here is what all hear of first, and what was checked here does not count.
    played.down_at(ONE)
    played.down_at(TWO, up=True)
    assert played.told[1:] == []
    played.hear({ONE[1]: "down refused", TWO[1]: "up ", "10.9.9.9:80": "down no server"}, ONE)
    assert played.told[1:] == [(ONE[1], False), (TWO[1], True)]


def test_without_the_store_this_machine_s_checks_count_again() -> None:
    played = Played()
    played.configure("one")
    played.hear({ONE[1]: "up ", TWO[1]: "down refused"}, ONE)
    played.down_at(ONE)
    assert played.told == [(TWO[1], False)]
    played.lose()
    assert played.checked[-1] == {ONE, TWO}
    # Of the other one nothing is known here: it stays as it was until it is looked at.
    assert played.told[1:] == [(ONE[1], False)]
    played.down_at(TWO, up=True)
    assert played.told[2:] == [(TWO[1], True)]


def test_it_is_known_which_machine_checks_a_server() -> None:
    played = Played()
    played.configure("one")
    assert played.checkers() == {ONE: "here", TWO: "here"}
    played.hear({}, ONE, others={TWO[1]: "edge-2\x1b", "10.9.9.9:80": "edge-3"})
    assert played.checkers() == {ONE: "here", TWO: "edge-2\\033"}
    played.lose()
    assert played.checkers() == {ONE: "here", TWO: "here"}
    played.configure("all")
    played.hear({}, ONE, TWO)
    assert played.checkers() == {ONE: "all", TWO: "all"}
    played.configure("own")
    assert played.checkers() == {ONE: "here", TWO: "here"}


def test_what_is_checked_no_more_is_said_no_more() -> None:
    played = Played()
    played.configure("one")
    played.connect()
    played.hear({}, ONE, TWO)
    played.down_at(ONE)
    played.pass_time()
    assert played.own[-1]["own"] == [[*ONE, "down refused"], [*TWO, ""]]
    played.hear({}, TWO, turn=2)
    played.pass_time()
    assert (played.own[-1]["own"], played.own[-1]["turn"]) == ([[*ONE, ""], [*TWO, ""]], 2)


def test_what_is_checked_changes_once_a_second_at_most() -> None:
    played = Played()
    played.configure("one")
    played.hear({}, ONE)
    assert played.checked[1:] == [{ONE}]
    for turn in range(2, 12):  # another machine comes and goes
        played.hear({}, *(() if turn % 2 else (ONE, TWO)), turn=turn)
    assert played.checked[1:] == [{ONE}]
    played.down_at(ONE)
    assert played._own.keys() == {ONE}
    assert played._turn == 1  # what is said is about the first of them
    played.pass_time()
    assert played.checked[1:] == [{ONE}, set()]
    assert played._turn == 11
    played.hear({}, TWO, turn=12)
    played.lose()
    assert played.checked[-1] == {ONE, TWO}
    played.pass_time()
    assert played.checked[-1] == {ONE, TWO}


def test_finished_rounds_of_checks_are_passed_on() -> None:
    played = Played()
    played.configure("one")
    played.connect()
    played.finished()
    played.finished()
    # Three intervals of 1 s, and a timeout of 2 s.
    assert played.own == [{"rounds": n, "within_s": 5.0} for n in (1, 2)]
    played.configure("one", CONFIG.replace("interval: 1s", "interval: 100ms, timeout: 100ms"))
    played.finished()
    assert played.own[-1] == {"rounds": 3, "within_s": 2.0}


def test_rounds_that_nobody_reads_do_not_end_the_checks() -> None:
    ours, theirs = Channel.pair()
    tell = report_rounds(theirs)
    for _ in range(5000):
        tell()
    received = ours.receive()
    assert received is not None
    assert received[0] == {"rounds": 1}
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:80", "127.9.9.9:80", "[::1]:80", "unix:/run/web", "localhost:80"),
        *("169.254.1.1:80", "[fe80::1%eth0]:80", "[::ffff:127.0.0.1]:80"),
    ],
)
def test_a_server_of_this_host_is_checked_here_and_not_shared(address: str) -> None:
    played = Played()
    played.configure("one", CONFIG.replace("10.0.0.2:80", address))
    played.connect()
    ((_, here),) = played._servers - {ONE}
    played.hear({here: "down there"}, ONE)
    assert played.told == []
    played.hear({here: "down there"}, turn=2)
    played.pass_time()
    assert played._mine == {("web", here)}
    assert [one[1] for one in played.own[-1]["own"]] == [ONE[1]]
    played.down_at(("web", here))
    assert played.told == [(here, False)]

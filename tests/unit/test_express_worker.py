"""What a worker does about connections that the kernel has opened, as the keeper tells of them."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.runtime.counters import CLOSED_INDEX, DECISION_FIRST, NAMED_FIRST, Counter
from pyforwarder.worker import express
from pyforwarder.worker.express import Opened
from pyforwarder.worker.log import ConnectionLog, Log
from tests.helpers.first_packets import client_hello
from tests.helpers.stream_play import to

if TYPE_CHECKING:
    from types import FrameType

    from tests.helpers.stream_play import Play, StartPlay

MAPPED: Final = "00000000000000000000ffff"
CLIENT: Final = [f"{MAPPED}c0000207", 40_000]
LISTENER: Final = [f"{MAPPED}7f000001", 443]
SOURCE: Final = [f"{MAPPED}7f000001", 65_000]
SERVER: Final = [f"{MAPPED}7f000001", 9001]


def told(**changed: object) -> list[object]:
    """One that has ended, in the keeper's words."""
    said: dict[str, object] = {
        "listener": "main",
        "rule": "fixed",
        "client_side": [CLIENT, LISTENER],
        "server_side": [SOURCE, SERVER],
        "begun_ns": 1_000_000_000,
        "ended_ns": 3_500_000_000,
        "carried": [5, 1, 7, 2],
    }
    return list({**said, **changed}.values())


class Worker:
    """A worker that hears of opened connections."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.keeper, mine = (
            play.own(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        self.read_fd, write_fd = os.pipe()
        self.log_fds = (self.read_fd, write_fd)
        play.server.log = ConnectionLog(Log(level="info", form="json", fd=write_fd))
        self.done: list[str] = []
        self.told = 0
        self.opened = Opened(play.server, mine, lambda: self.done.append("adopt"))

    def tell(self, *ended: object, adopt: bool = False, again: bool = False) -> None:
        """The keeper says so, and it is heard; `again`: of the same connections as the last."""
        self.told += not again
        of = [[place, self.told << 3] for place in range(len(ended))]
        self.keeper.send(json.dumps({"adopt": int(adopt), "of": of, "ended": ended}).encode())
        self.opened.receive()

    def lines(self) -> list[dict[str, object]]:
        """What has been logged so far."""
        os.set_blocking(self.read_fd, False)
        try:
            return [json.loads(line) for line in os.read(self.read_fd, 1 << 20).splitlines()]
        except BlockingIOError:
            return []


NAMED: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules:
      - {name: named, match: {tls: {sni: a.example.com}}, to: "127.0.0.1:9001"}
      - {name: host, match: {http: {host: b.example.com}}, to: "127.0.0.1:9001"}
"""


@pytest.fixture
def worker(start: StartPlay) -> Iterator[Worker]:
    worker = Worker(start(to("127.0.0.1:9001")))
    yield worker
    for fd in worker.log_fds:
        os.close(fd)


def test_what_has_ended_is_counted_and_logged(worker: Worker) -> None:
    worker.tell(told())
    counters = worker.play.counters
    assert counters[Counter.ACCEPTED] == counters[Counter.JOINED_EXPRESS] == 1
    assert counters[CLOSED_INDEX[CloseReason.FINISHED]] == 1
    assert (counters[Counter.UP_BYTES], counters[Counter.DOWN_BYTES]) == (5, 7)
    assert counters[Counter.OPEN] == 0
    (line,) = worker.lines()
    assert (line["client"], line["server"]) == ("192.0.2.7:40000", "127.0.0.1:9001")
    assert (line["rule"], line["reason"], line["age_s"]) == ("fixed", "finished", 2.5)


def test_what_the_next_keeper_tells_again_is_counted_once(worker: Worker) -> None:
    """The one before has died when it had told it, and had not written that down."""
    worker.tell(told(), told())
    worker.tell(told(), adopt=True, again=True)
    assert worker.done == ["adopt"]
    assert worker.play.counters[CLOSED_INDEX[CloseReason.FINISHED]] == len(worker.lines()) == 2
    worker.tell(told())
    assert worker.play.counters[CLOSED_INDEX[CloseReason.FINISHED]] == 3


def test_one_that_cannot_be_counted_costs_no_other_one(worker: Worker) -> None:
    """Those that last are taken in first: they go on, also if a message of an end is wrong."""
    broken = told(client_side=[CLIENT, ["::", "no port"]])
    worker.tell(broken, told(), ["too", "short"], told(), adopt=True)
    assert worker.done == ["adopt"]
    assert worker.play.counters[CLOSED_INDEX[CloseReason.FINISHED]] == 2
    lines = worker.lines()
    assert [line["event"] for line in lines].count("closed") == 2
    assert "internal_error" in [line["event"] for line in lines]


def test_pairs_are_adopted_before_anything_is_counted(worker: Worker) -> None:
    counted = []
    adopt = lambda: counted.append(worker.play.counters[Counter.ACCEPTED])  # noqa: E731
    worker.opened._adopt = adopt
    worker.tell(told(), adopt=True)
    assert counted == [0]
    assert worker.play.counters[Counter.ACCEPTED] == 1


def test_times_of_decisions_are_those_of_workers(worker: Worker) -> None:
    """What the kernel decides takes no time of a worker's, and is no decision of its."""
    before = list(worker.play.counters[DECISION_FIRST:NAMED_FIRST])
    worker.tell(told(), told())
    assert list(worker.play.counters[DECISION_FIRST:NAMED_FIRST]) == before


def test_one_of_so_many_has_a_line_and_all_are_counted(worker: Worker) -> None:
    worker.play.server.log.change(level="info", form="json", sample=4)
    worker.tell(*[told()] * 5)
    worker.tell(*[told()] * 5)
    assert len(worker.lines()) == 3
    assert worker.play.counters[CLOSED_INDEX[CloseReason.FINISHED]] == 10
    assert worker.play.counters[Counter.UP_BYTES] == 50


@pytest.fixture
def named(start: StartPlay) -> Iterator[Worker]:
    worker = Worker(start(NAMED))
    yield worker
    for fd in worker.log_fds:
        os.close(fd)


def test_the_line_says_what_was_read_of_the_first_packet(named: Worker) -> None:
    hello = client_hello(b"a.example.com").hex()
    request = b"GET / HTTP/1.1\r\nHost: b.example.com\r\n\r\n".hex()
    named.tell(told(rule="named", first=hello), told(rule="host", first=request))
    named.tell(told(rule="named", first=""))
    one, other, unknown = named.lines()
    assert one["sni"] == "a.example.com"
    assert other["host"] == "b.example.com"
    assert "sni" not in unknown


def test_first_packets_are_known_before_their_pairs_are_adopted(
    named: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And forgotten then; not more of them are kept than there may be pairs that wait."""
    monkeypatch.setattr(express, "_MOST_REMEMBERED", 2)
    found: list[object] = []
    named.opened._adopt = lambda: found.append(named.opened.facts_of(2))
    hello = client_hello(b"a.example.com").hex()
    first = [[number, "main", "named", 443, hello] for number in (1, 2, 3)]
    message = {"adopt": 1, "of": [], "ended": [], "first": [["nonsense"], *first]}
    named.keeper.send(json.dumps(message).encode())
    named.opened.receive()
    assert found == [(("sni", "a.example.com"),)]
    assert [named.opened.facts_of(number) for number in (1, 2)] == [(), ()]
    assert named.opened.facts_of(3)
    assert next(line["event"] for line in named.lines()) == "internal_error"


def steps_of(act: Callable[[], object]) -> int:
    """How many steps Python's interpreter takes: as many on every machine, busy or not."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def test_an_end_without_a_line_costs_less_than_half(worker: Worker) -> None:
    """Of one that is not written nothing is made: it is counted, and that is all."""
    counted = worker.opened._count
    ended: Any = told()
    counted(*ended)
    with_line = steps_of(lambda: counted(*ended))
    worker.play.server.log.change(level="info", form="json", sample=1000)
    counted(*ended)
    without = steps_of(lambda: counted(*ended))
    assert len(worker.lines()) == 3
    assert without < with_line / 2, (without, with_line)


# ------------------------------------------------------------------------- sums of ends


def tell_sums(worker: Worker, *sums: object) -> None:
    """The keeper says so, and it is heard."""
    message = {"adopt": 0, "of": [], "ended": [], "counted": sums}
    worker.keeper.send(json.dumps(message).encode())
    worker.opened.receive()


def sum_of(
    *numbers: int, round_: int = 7, key: str = "k", port: int = 0, rule: str = "fixed"
) -> list[object]:
    """So many pairs, with so many bytes up and down."""
    to = ["00000000000000000000ffff7f000001", 9001]
    return [key, round_, "main", rule, port, to, list(numbers)]


def test_a_sum_counts_as_its_ends_would_one_by_one(worker: Worker, start: StartPlay) -> None:
    other = Worker(start(to("127.0.0.1:9001")))
    try:
        worker.tell(told(), told(), told())
        tell_sums(other, sum_of(3, 15, 21))
        assert list(other.play.counters) == list(worker.play.counters)
        assert other.lines() == []
    finally:
        for fd in other.log_fds:
            os.close(fd)


def test_a_round_that_is_told_again_is_counted_once(worker: Worker) -> None:
    """The keeper that told it first has died, and more has come to it since."""
    counters = worker.play.counters
    tell_sums(worker, sum_of(3, 15, 21))
    tell_sums(worker, sum_of(5, 20, 30))
    assert counters[CLOSED_INDEX[CloseReason.FINISHED]] == counters[Counter.ACCEPTED] == 5
    assert (counters[Counter.UP_BYTES], counters[Counter.DOWN_BYTES]) == (20, 30)
    tell_sums(worker, sum_of(1, 1, 1, round_=8), sum_of(1, 1, 1, key="other"), ["too", "short"])
    assert counters[CLOSED_INDEX[CloseReason.FINISHED]] == 7
    assert worker.lines()[0]["event"] == "internal_error"

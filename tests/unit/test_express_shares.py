"""Which worker the keeper gives a connection of express, and how much it holds for each."""

from __future__ import annotations

import contextlib
import json
import mmap
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, cast

import pytest

from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express import ports
from pyforwarder.datapath.express.connection_maps import Gone
from pyforwarder.datapath.express.keeping import ExpressKeeper
from pyforwarder.datapath.express.sharing import Label
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice, SpliceState

if TYPE_CHECKING:
    from pyforwarder.datapath.express.sharing import Express

WORKERS: Final = 2
PLACES: Final = 16


class FakeConnecting:
    """Places whose connections do what a test says."""

    first_splice = 0
    first_port = 60_000
    places = PLACES

    def __init__(self) -> None:
        self.asks = [abi.Ask() for _ in range(PLACES)]
        self.first_bytes = [bytes(abi.SAVED_BYTES)] * PLACES

    def words(self) -> list[int]:
        return [int(ask.word) for ask in self.asks]

    def word(self, place: int) -> int:
        return int(self.asks[place].word)

    def rest(self, place: int, word: int, now_s: float) -> None:
        del word, now_s
        self.asks[place].word = 0

    def taken(self) -> int:
        return 0

    def wait_for_programs(self) -> None:
        raise AssertionError

    def go_round(self, now_s: float, *, is_short: bool, passed_ns: int) -> Gone:
        del now_s, is_short, passed_ns
        return Gone(0, 0, sum(not word for word in self.words()), is_whole=True)

    def ask(self, place: int) -> abi.Ask:
        return abi.Ask.from_buffer_copy(bytes(self.asks[place]))

    def saved(self, place: int, word: int) -> bytes:
        ask = self.asks[place]
        return self.first_bytes[place][: ask.saved_bytes] if ask.word == word else b""

    def mark_counted(self, place: int) -> None:
        self.asks[place].counted_number = self.asks[place].word >> abi.STATE_BITS

    def counts(self) -> dict[abi.Count, int]:
        return dict.fromkeys(abi.Count, 0)


class FakeExpress:
    """What the keeper shares with others, and the workers' ends of their sockets."""

    is_to_stop = has_stopped = False
    named: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.connections = FakeConnecting()
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(WORKERS)]
        self.keepers = [keepers for keepers, _ in pairs]
        self.workers = [workers for _, workers in pairs]
        for sock in (*self.keepers, *self.workers):
            sock.setblocking(False)

    def send(self, worker: int, message: str) -> bool:
        with contextlib.suppress(OSError):
            self.keepers[worker].send(message.encode())
            return True
        return False

    def given_back(self) -> list[int]:
        return []

    def label(self, _table: int, _begun_ns: int) -> Label:
        return Label("main", ["rest"], (0, 0, 0), self.named)

    def store_counts(self, _counts: dict[abi.Count, int], **said: int) -> None:
        self.said = said

    def close(self) -> None:
        for sock in (*self.keepers, *self.workers):
            sock.close()

    def told(self, worker: int) -> list[dict[str, object]]:
        """What a worker has been told."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(json.loads(self.workers[worker].recv(1 << 20)))
        return found


class Owner:
    """Notes which worker each pair is given to."""

    def __init__(self) -> None:
        self.given: dict[int, int | None] = {}

    def take_in(self, index: int, said: bytes, worker: int | None = None) -> int:
        del said
        self.given[index] = worker
        return worker or 0

    def keep_alive(self, index: int) -> None:
        pass


class Keeper:
    """A keeper of so many places."""

    def __init__(self) -> None:
        self.express = FakeExpress()
        self.memory = mmap.mmap(-1, PLACES * SPLICE_BYTES)
        self.owner = Owner()
        self.keeper = ExpressKeeper(
            cast("Express", self.express), self.memory, self.owner, workers=WORKERS
        )

    def begin(self, place: int, *, number: int = 1, has_ended: bool) -> None:
        """A connection that goes on, or has ended."""
        ask = self.express.connections.asks[place]
        ask.word = number << 3 | abi.AskState.JOINED
        ask.begun_ns = time.monotonic_ns() - 10_000_000_000
        record = Splice(id=place + 1, worker=abi.NO_WORKER, state=SpliceState.ACTIVE, family=4)
        for direction in record.direction:
            direction.fin_acked = has_ended
        at = place * SPLICE_BYTES
        self.memory[at : at + SPLICE_BYTES] = bytes(record)

    def look(self) -> None:
        """A round."""
        self.keeper._next_s = 0.0
        self.keeper.go_on()


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    monkeypatch.setattr(ports, "hold_port", lambda _port: SimpleNamespace(close=lambda: None))
    keeper = Keeper()
    yield keeper
    keeper.express.close()


def test_a_worker_that_ends_its_pairs_at_once_gets_no_more_than_the_others(
    keeper: Keeper,
) -> None:
    for number in range(1, 5):
        for place in range(PLACES):
            keeper.begin(place, number=number, has_ended=False)
        keeper.look()
        assert keeper.owner.given == {place: place % WORKERS for place in range(PLACES)}
        # The first one resets all that it gets.
        for place in range(0, PLACES, WORKERS):
            keeper.keeper.freed(place)


def test_a_worker_gets_first_packets_before_it_is_to_adopt_their_pairs(
    keeper: Keeper,
) -> None:
    """As many at once as a message holds; and those of connections that have ended with them."""
    keeper.express.named = (0,)
    first = b"f" * abi.SAVED_BYTES
    for place in range(PLACES):
        keeper.begin(place, has_ended=place >= PLACES // 2)
        ask = keeper.express.connections.asks[place]
        ask.saved_bytes = len(first)
        keeper.express.connections.first_bytes[place] = first
    keeper.look()
    for worker in range(WORKERS):
        told = keeper.express.told(worker)
        assert len(told) > 1
        assert sum(cast("int", message["adopt"]) for message in told) == 1
        firsts = [one for message in told for one in cast("list[list[object]]", message["first"])]
        ended = [one for message in told for one in cast("list[list[object]]", message["ended"])]
        ids = [place + 1 for place in range(worker, PLACES // 2, WORKERS)]
        assert firsts == [[number, "main", "rest", 0, first.hex()] for number in ids]
        assert [one[-1] for one in ended] == [first.hex()] * (PLACES // 2 // WORKERS)
        last = next(n for n, message in enumerate(told) if message["adopt"])
        assert not any(message["first"] for message in told[last + 1 :])


def test_no_first_packet_is_told_that_the_log_does_not_want(keeper: Keeper) -> None:
    keeper.begin(0, has_ended=True)
    keeper.express.connections.asks[0].saved_bytes = 5
    keeper.look()
    (message,) = keeper.express.told(0)
    (ended,) = cast("list[list[object]]", message["ended"])
    assert (message["first"], ended[-1]) == ([], "")

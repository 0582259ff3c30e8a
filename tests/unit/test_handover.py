"""A pair's handover to its datapath: earned, refused, put off, and while the keeper is asked."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyforwarder.core.connection import Life
from pyforwarder.core.keepalive import OFF
from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath import copying
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.copying import CopyDatapath
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.datapath.ebpf.pair_table import read_records
from pyforwarder.datapath.splice.keeper_asker import PendingRequest
from pyforwarder.datapath.splice.paused_pair import PausedPair
from pyforwarder.runtime import loop as loop_module
from pyforwarder.runtime.counters import Counter
from pyforwarder.worker import handover
from pyforwarder.worker.handover import Handover
from tests.helpers.clock import Clock
from tests.helpers.fake_datapath import FakeDatapath
from tests.helpers.instruction import ACK, instruction
from tests.helpers.peers import pattern, reset
from tests.helpers.stream_play import (
    EAGER,
    Play,
    Servers,
    StartPlay,
    named,
)

if TYPE_CHECKING:
    from pyforwarder.datapath.base import Pair, PairHost
    from pyforwarder.datapath.sockmap.datapath import SockmapDatapath
    from pyforwarder.datapath.splice.datapath import SpliceDatapath
    from pyforwarder.datapath.splice.paused_pair import Then


def test_handed_over_pair_goes_on_where_copy_left_off(start: StartPlay, servers: Servers) -> None:
    listening, address = servers()
    play = start(named(EAGER))
    client = play.dial()
    client.sendall(instruction(address) + b"copied, ")
    server = play.accept(listening)
    play.run_until(lambda: play.fake.joined == 1, "handover")
    pair = play.only_client()
    assert (pair.kind, pair.pair_reason) == (DatapathKind.SOCKMAP, PairReason.BEST)
    client.sendall(b"moved")
    assert play.read(server, 13) == b"copied, moved"
    assert play.read(client, 6) == ACK
    assert play.counters[Counter.JOINED_SOCKMAP] == 1
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    assert play.counters[Counter.UP_BYTES] == 13


def test_pair_that_ends_right_after_its_handover_is_not_shown_later(
    start: StartPlay, servers: Servers
) -> None:
    # The handover has made its record, before the clock would have.
    play = start(named(EAGER))
    listening, address = servers()
    client, server = play.joined(listening, address)
    play.run_until(lambda: play.fake.joined, "handover")
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)
    passed: list[int] = []
    play.loop.after(0.05, lambda: passed.append(1))
    play.run_until(lambda: passed, "end of the time after which a connection is shown")
    assert list(read_records(play._memory)) == []


def test_stalled_datapath_keeps_every_byte_in_order(start: StartPlay, servers: Servers) -> None:
    play = start(named(EAGER))
    client, server = play.joined(*servers())
    play.run_until(lambda: play.fake.joined == 1, "handover")
    play.fake.pause()
    client.sendall(b"one ")
    server.sendall(b"three ")
    client.shutdown(socket.SHUT_WR)
    play.loop.run_once(0.01)
    with pytest.raises(BlockingIOError):
        server.recv(1)
    play.fake.resume()
    assert play.read_end(server) == (b"one ", "eof")
    assert play.read(client, 6) == b"three "


def test_reset_is_noticed_while_the_datapath_stands_still(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    client, server = play.joined(*servers())
    play.run_until(lambda: play.fake.joined == 1, "handover")
    play.fake.pause()
    reset(client)
    assert play.read_end(server) == (b"", "reset")
    play.wait_for_end(CloseReason.CLIENT_RESET)


@pytest.mark.parametrize("reason", [PairReason.MAP_FULL, PairReason.REFUSED_BY_KERNEL])
def test_pair_that_the_datapath_refuses_is_copied_and_says_why(
    start: StartPlay, servers: Servers, reason: PairReason
) -> None:
    play = start(named(EAGER))
    play.fake.refuse_with = reason
    client, server = play.joined(*servers())
    play.run_until(lambda: play.only_client().pair_reason is reason, "refusal")
    assert play.only_client().kind is DatapathKind.COPY
    client.sendall(b"still moving")
    assert play.read(server, 12) == b"still moving"


def test_pair_earns_its_handover_by_round_trips(start: StartPlay, servers: Servers) -> None:
    play = start(named("handover: {after_round_trips: 2, after: 1h}"))
    client, server = play.joined(*servers())
    for _ in range(2):
        assert play.fake.joined == 0
        client.sendall(b"ask")
        assert play.read(server, 3) == b"ask"
        server.sendall(b"answer")
        assert play.read(client, 6) == b"answer"
    play.run_until(lambda: play.fake.joined == 1, "handover")


def test_pair_earns_its_handover_by_age(start: StartPlay, servers: Servers) -> None:
    play = start(named("handover: {after: 50ms}"))
    play.joined(*servers())
    play.run_until(lambda: play.fake.joined == 1, "handover")
    assert play.counters[Counter.JOINED_SOCKMAP] == 1


def test_handover_that_is_put_off_does_not_keep_the_loop_busy(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `after: 0s` hands over at once, but bytes that the server does not take stand in the way.
    play = start(named("handover: {after: 0s}"))
    play.fake.refuse_with = PairReason.UNREAD_BYTES
    play.joined(*servers())
    with monkeypatch.context() as patched:
        clock = Clock()
        patched.setattr(loop_module, "time", clock)
        end_s = clock.now_s + 0.3
        for _ in range(60):
            clock.pass_time(play.loop._timeout_s())  # nothing happens meanwhile
            play.loop.run_once(0)
    assert clock.now_s >= end_s
    play.fake.refuse_with = None
    play.run_until(lambda: play.fake.joined == 1, "handover")


def test_pair_waits_for_what_is_not_proven_yet(start: StartPlay, servers: Servers) -> None:
    play = start(named(EAGER))
    play.server.handover = Handover(play.server, cast("SockmapDatapath", play.fake))
    client, server = play.joined(*servers())
    client.sendall(b"copied, ")
    assert play.read(server, 8) == b"copied, "
    assert play.fake.joined == 0
    assert play.only_client().waits_for_handover
    play.server.handover.settle(sockmap=True, splice=False)
    play.run_until(lambda: play.fake.joined == 1, "handover")
    client.sendall(b"moved")
    assert play.read(server, 5) == b"moved"


def test_pairs_that_waited_for_what_is_proven_are_handed_over_a_few_at_a_time(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an upgrade these may be thousands, and all others would stand still meanwhile."""
    monkeypatch.setattr(handover, "_MOST_IN_A_TURN", 2)
    play = start(named(EAGER))
    play.server.handover = Handover(play.server, cast("SockmapDatapath", play.fake))
    listening, address = servers()
    for _ in range(7):
        play.joined(listening, address)
    turns = [0]
    play.server.handover.settle(sockmap=True, splice=False)
    while play.fake.joined < 7:
        play.loop.run_once(0.002)
        turns.append(play.fake.joined)
    assert max(after - before for before, after in itertools.pairwise(turns)) <= 2


def test_pair_that_has_waited_in_vain_is_copied_for_good(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    play.server.handover = Handover(play.server, cast("SockmapDatapath", play.fake))
    client, server = play.joined(*servers())
    client.sendall(b"copied, ")
    assert play.read(server, 8) == b"copied, "
    play.server.handover.settle(sockmap=False, splice=False)
    play.run_until(lambda: not play.only_client().waits_for_handover, "the answer")
    assert play.only_client().pair_reason is PairReason.NOT_AVAILABLE
    client.sendall(b"as before")
    assert play.read(server, 9) == b"as before"


class FakeSplice(FakeDatapath):
    """The same in splice's place; its keeper is what refuses, or is silent until `answer`."""

    kind = DatapathKind.SPLICE

    def __init__(self, host: PairHost) -> None:
        super().__init__(host)
        self.asked: list[Pair] = []
        self.is_silent = False
        self.open: dict[Pair, PausedPair] = {}
        self.showing: PausedPair | None = None
        self.shown_sources: list[bool] = []  # of each that was shown, whether it has a source
        self.takes_any_interface = False
        self.keepalive = OFF

    @property
    def is_busy(self) -> bool:
        """Two at once are enough."""
        return len(self.open) >= 2

    def expect(self, pair: Pair) -> None:
        """Nothing is to be locked."""

    def ask(self, pair: Pair, then: Then) -> PairReason | None:
        """Ask the keeper; counts how often."""
        self.asked.append(pair)
        if self.refuse_with is not None and not self.is_silent:
            return self.refuse_with
        assert isinstance(pair.datapath, CopyDatapath)
        paused = PausedPair(
            self._loop, pair, pair.datapath, PendingRequest(lambda *_: None), then, self.answer_one
        )
        self.open[pair] = paused
        if not self.is_silent:
            self._loop.defer(self.answer_one, paused)
        return None

    @property
    def can_show_route(self) -> bool:
        """One at a time is enough."""
        return self.showing is None

    def show_route(self, pair: Pair, then: Callable[[Pair], None], *, has_source: bool) -> bool:
        """Have the keeper look at the pair's server, until `look`."""
        if not self.can_show_route:
            return False
        self.shown_sources.append(has_source)
        assert isinstance(pair.datapath, CopyDatapath)
        asked = PendingRequest(lambda *_: None)
        self.showing = PausedPair(
            self._loop, pair, pair.datapath, asked, lambda pair, _: then(pair), lambda _: None
        )
        return True

    def look(self) -> None:
        """As SpliceDatapath does when the keeper has."""
        showing, self.showing = self.showing, None
        assert showing is not None
        assert showing.pair is not None
        showing.release(showing.pair)
        showing.resume_copy(showing.pair)
        if showing.ends_with is not None:
            self._host.broken(showing.pair, showing.ends_with)
        showing.then(showing.pair, None)

    def answer_one(self, paused: PausedPair) -> None:
        """As SpliceDatapath does."""
        pair = paused.pair
        if pair is None:
            return
        del self.open[pair]
        paused.release(pair)
        reason = self.join(pair)
        if reason is not None:
            paused.resume_copy(pair)
        if paused.ends_with is not None:
            self._host.broken(pair, paused.ends_with)
        paused.then(pair, reason)

    def finish_paused(self) -> None:
        """Answer all that are open."""
        while self.open:
            self.answer_one(next(iter(self.open.values())))

    def finish_ends(self) -> bool:
        """The keeper hears of all of them."""
        while self.ends:
            self.ends.pop(0)()
        return True


def splicing(play: Play, *, sockmap: bool = True) -> FakeSplice:
    """The play has a splice from now on, whose keeper does not answer."""
    splice = FakeSplice(play.server)
    splice.refuse_with = PairReason.NO_KEEPER
    play.server.handover = Handover(
        play.server, cast("SockmapDatapath", play.fake), cast("SpliceDatapath", splice)
    )
    play.server.handover.settle(sockmap=sockmap, splice=True)
    return splice


@pytest.mark.parametrize("datapath", ["auto", "splice"])
def test_pair_whose_keeper_did_not_answer_is_asked_for_again(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch, datapath: str
) -> None:
    hour_s = 3600.0
    monkeypatch.setattr(handover, "_KEEPER_PAUSES_S", (hour_s, hour_s))
    play = start(named(f"{EAGER}\ntimeouts: {{idle: 1d}}\ndatapath: {datapath}"))
    splice = splicing(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.asked, "question")
    pair = play.only_client()
    assert (pair.kind, pair.pair_reason) == (DatapathKind.COPY, PairReason.NO_KEEPER)
    asked = len(splice.asked)
    for _ in range(20):  # bytes do not ask earlier
        client.sendall(b"copied")
        assert play.read(server, 6) == b"copied"
    assert len(splice.asked) == asked == 1

    def pass_time() -> None:
        play.loop.deadlines.run_expired(time.monotonic() + 2 * hour_s, play.loop.on_error)

    pass_time()
    play.run_until(lambda: len(splice.asked) == 2, "second question")
    assert pair.kind is DatapathKind.COPY
    splice.refuse_with = None
    pass_time()
    play.run_until(lambda: splice.joined == 1, "handover")
    assert play.only_client().kind is DatapathKind.SPLICE
    assert pair.pair_reason is (PairReason.FORCED if datapath == "splice" else PairReason.BEST)
    assert play.counters[Counter.JOINED_SPLICE] == 1
    client.close()
    server.close()
    play.wait_for_end(CloseReason.FINISHED)


def test_pair_whose_keeper_never_answers_goes_the_next_best_way(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s = (0.01, 0.02, 0.03)
    monkeypatch.setattr(handover, "_KEEPER_PAUSES_S", pauses_s)
    play = start(named(EAGER))
    splice = splicing(play)
    play.joined(*servers())
    play.run_until(lambda: play.fake.joined == 1, "handover")
    pair = play.only_client()
    assert (pair.kind, pair.pair_reason) == (DatapathKind.SOCKMAP, PairReason.NO_KEEPER)
    assert len(splice.asked) == 1 + len(pauses_s)


def test_pair_that_ends_while_it_waits_for_the_keeper_is_forgotten(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = splicing(play)
    client, _ = play.joined(*servers())
    play.run_until(lambda: splice.asked, "question")
    reset(client)
    play.wait_for_end(CloseReason.CLIENT_RESET)
    assert play.loop.deadlines.next_s() is None


def test_pairs_that_waited_for_the_keeper_are_asked_for_a_few_at_a_time(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_KEEPER_PAUSES_S", (0.01,))
    monkeypatch.setattr(handover, "_MOST_IN_A_TURN", 2)
    play = start(named(EAGER))
    splice = splicing(play)
    listening, address = servers()
    for _ in range(7):
        play.joined(listening, address)
    play.run_until(lambda: len(splice.asked) >= 7, "question")
    turns = [len(splice.asked)]
    while len(splice.asked) < 14:
        play.loop.run_once(0.002)
        turns.append(len(splice.asked))
    assert max(after - before for before, after in itertools.pairwise(turns)) <= 2
    play.run_until(lambda: play.fake.joined == 7, "handovers")


def silent(play: Play) -> FakeSplice:
    """The play's keeper has nothing against a pair, and does not answer by itself.

    Pairs that it refuses are copied: a sockmap would look at their sockets anew.
    """
    splice = splicing(play, sockmap=False)
    splice.is_silent = True
    splice.refuse_with = None
    return splice


@pytest.mark.parametrize("refusal", [None, PairReason.MAP_FULL, PairReason.UNREAD_BYTES])
def test_what_comes_while_the_keeper_is_asked_waits_for_its_answer(
    start: StartPlay, servers: Servers, refusal: PairReason | None
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.open, "question")
    splice.refuse_with = refusal
    client.sendall(b"up")
    server.sendall(b"down")
    if refusal is not None:  # a spliced pair's FIN is not ours to carry on
        client.shutdown(socket.SHUT_WR)
    for _ in range(5):
        play.loop.run_once(0.01)
    pair = play.only_client()
    assert pair.kind is DatapathKind.COPY
    assert (pair.up.carried_bytes, pair.down.carried_bytes) == (0, 0)
    splice.finish_paused()
    splice.refuse_with = refusal and PairReason.MAP_FULL
    splice.is_silent = False
    if refusal is None:
        assert (play.read(server, 2), play.read(client, 4)) == (b"up", b"down")
        return
    assert play.read_end(server) == (b"up", "eof")
    server.shutdown(socket.SHUT_WR)
    assert play.read_end(client) == (b"down", "eof")
    play.wait_for_end(CloseReason.FINISHED)


EXPRESS: Final = "datapath: express"


def shown_route(play: Play) -> FakeSplice:
    """The play's kernel may open connections, and its keeper looks at each server once."""
    splice = silent(play)
    play.server.handover.settle(sockmap=False, splice=True, express=True)
    return splice


def test_a_pair_stands_still_while_the_keeper_looks_how_its_server_is_reached(
    start: StartPlay, servers: Servers
) -> None:
    """Were it over by then, nobody could see how: a service of short connections never would be."""
    play = start(named(EXPRESS))
    splice = shown_route(play)
    listening, address = servers()
    client, server = play.joined(listening, address)
    assert splice.showing is not None
    client.sendall(b"up")
    server.sendall(b"down")
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    for _ in range(5):
        play.loop.run_once(0.01)
    assert play.only_client().kind is DatapathKind.COPY
    splice.look()
    assert play.read_end(server) == (b"up", "eof")
    assert play.read_end(client) == (b"down", "eof")
    play.wait_for_end(CloseReason.FINISHED)
    # A second later at the earliest it is looked at again.
    client, server = play.joined(listening, address)
    assert splice.showing is None
    client.sendall(b"again")
    assert play.read(server, 5) == b"again"


def test_a_server_for_which_the_keeper_had_no_time_is_looked_at_with_its_next_connection(
    start: StartPlay, servers: Servers
) -> None:
    """Of a burst to many servers the others would be a worker's for a second."""
    play = start(named(EXPRESS))
    splice = shown_route(play)
    play.joined(*servers())
    first = splice.showing
    listening, address = servers()
    client, server = play.joined(listening, address)
    assert splice.showing is first
    client.sendall(b"meanwhile")
    assert play.read(server, 9) == b"meanwhile"
    splice.look()
    play.joined(listening, address)
    assert splice.showing is not None
    splice.look()
    play.joined(listening, address)
    assert splice.showing is None


def test_a_server_is_looked_at_once_for_each_source(start: StartPlay, servers: Servers) -> None:
    """And it is said whether the upstream names where the worker has connected from."""
    listening, address = servers()
    ways = {"p": ("[]", False), "a": ("[127.0.0.9]", True), "b": ("[127.0.0.8, '::1']", True)}
    upstreams = ", ".join(
        f"{name}: {{servers: ['{address}'], source: {source}}}"
        for name, (source, _) in ways.items()
    )
    rules = ", ".join(f"{{match: {{bytes: {{prefix: {name}}}}}, to: {name}}}" for name in ways)
    play = start(
        f"{EXPRESS}\nupstreams: {{{upstreams}}}\n"
        f"listeners: [{{name: main, bind: '127.0.0.1:0', rules: [{rules}]}}]\n"
    )
    splice = shown_route(play)
    for name, (_, has_source) in ways.items():
        for is_first in (True, False):
            client = play.dial()
            client.sendall(name.encode())
            server = play.accept(listening)
            if is_first:
                play.run_until(lambda: splice.showing, "the keeper looks")
                splice.look()
            assert play.read(server, 1) == name.encode()
            assert splice.showing is None
        assert splice.shown_sources[-1] is has_source
    assert splice.shown_sources == [has_source for _, has_source in ways.values()]


def test_a_pair_whose_server_is_looked_at_earns_its_handover_afterwards(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(f"{EXPRESS}\nhandover: {{after_bytes: 0}}"))
    splice = shown_route(play)
    play.joined(*servers())
    pair = play.only_client()
    play.server.handover.aged(pair)
    play.loop.run_once(0.01)
    assert splice.asked == []
    splice.look()
    play.run_until(lambda: splice.open, "question")
    splice.finish_paused()
    assert splice.joined == 1


@pytest.mark.parametrize("how", ["reset", "flushed", "fault"])
def test_a_pair_that_ends_while_its_server_is_looked_at_ends_once(
    start: StartPlay, servers: Servers, how: str
) -> None:
    play = start(named(EXPRESS))
    splice = shown_route(play)
    client, server = play.joined(*servers())
    if how == "reset":
        reset(client)
    elif how == "flushed":
        play.server.flush_ids(None)
    else:
        play.server.failed(play.only_client(), ValueError("made up"))
        assert splice.showing is not None
        assert splice.showing.pair is None
        assert play.read_end(server) == (b"", "reset")
        return
    for _ in range(5):
        play.loop.run_once(0.01)
    splice.look()
    assert play.read_end(server) == (b"", "reset")
    play.wait_for_end(CloseReason.CLIENT_RESET if how == "reset" else CloseReason.FLUSHED)
    assert splice.asked == []


def test_nothing_of_a_pair_moves_while_the_keeper_is_asked_for_it(
    start: StartPlay, servers: Servers
) -> None:
    """In the middle of a conversation, with a turn of it due."""
    play = start(named("handover: {after_bytes: 8, after_round_trips: 1000, after: 1h}"))
    splice = silent(play)
    client, server = play.joined(*servers())
    client.sendall(b"x" * 100)
    assert play.read(server, 100) == b"x" * 100
    play.run_until(lambda: splice.open, "question")
    pair = play.only_client()
    play.loop.soon(pair, pair.client_fd)
    client.sendall(b"y" * 100)
    server.sendall(b"z" * 100)
    for _ in range(5):
        play.loop.run_once(0.01)
    assert (pair.up.carried_bytes, pair.down.carried_bytes) == (100, 0)
    splice.refuse_with = PairReason.MAP_FULL
    splice.finish_paused()
    assert play.read(server, 100) == b"y" * 100
    assert play.read(client, 100) == b"z" * 100


def test_a_turn_that_was_due_as_the_keeper_was_asked_is_taken_after_its_answer(
    start: StartPlay, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is unread has told its edge before: no event tells it again."""
    monkeypatch.setattr(copying, "FAIR_SHARE_BYTES", 1)
    monkeypatch.setattr(copying, "READ_BYTES", 1000)
    play = start(named("handover: {after_bytes: 8, after_round_trips: 1000, after: 1h}"))
    play.server.copying.may_take_much = False
    splice = silent(play)
    client, server = play.joined(*servers())
    data = pattern(10 * copying.READ_BYTES)
    assert client.send(data) == len(data)
    play.run_until(lambda: splice.open, "question")
    play.loop.run_once(0.002)  # that turn comes
    splice.refuse_with = PairReason.MAP_FULL
    splice.finish_paused()
    assert play.read(server, len(data)) == data


@pytest.mark.parametrize("refusal", [None, PairReason.MAP_FULL])
def test_a_reset_while_the_keeper_is_asked_is_carried_on_after_its_answer(
    start: StartPlay, servers: Servers, refusal: PairReason | None
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.open, "question")
    splice.refuse_with = refusal
    reset(client)
    for _ in range(5):
        play.loop.run_once(0.01)
    assert play.closed(CloseReason.CLIENT_RESET) == 0
    splice.finish_paused()
    assert play.read_end(server) == (b"", "reset")
    play.wait_for_end(CloseReason.CLIENT_RESET)


@pytest.mark.parametrize("refusal", [None, PairReason.MAP_FULL])
def test_a_pair_that_is_flushed_while_the_keeper_is_asked_ends_after_its_answer(
    start: StartPlay, servers: Servers, refusal: PairReason | None
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.open, "question")
    splice.refuse_with = refusal
    assert play.server.flush_ids(None) == [play.only_client().id]
    assert play.server.flush_ids(None) == [play.only_client().id]
    play.loop.run_once(0.01)
    assert play.closed(CloseReason.FLUSHED) == 0
    splice.finish_paused()
    assert play.closed(CloseReason.FLUSHED) == 1
    for end in (client, server):
        assert play.read_end(end) == (b"", "reset")
    assert splice.joined == splice.left == (refusal is None)


def test_a_fault_of_ours_while_the_keeper_is_asked_ends_the_pair_at_once(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.open, "question")
    play.server.failed(play.only_client(), ValueError("made up"))
    for end in (client, server):
        assert play.read_end(end) == (b"", "reset")
    ((_, paused),) = splice.open.items()
    assert paused.pair is None
    splice.open.clear()


def test_pairs_wait_copied_while_the_keeper_is_asked_for_others(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    listening, address = servers()
    pairs = [play.joined(listening, address) for _ in range(5)]
    assert len(splice.open) == 2
    client, server = pairs[-1]
    client.sendall(b"copied")
    assert play.read(server, 6) == b"copied"
    gone, _ = pairs[3]
    reset(gone)
    play.wait_for_end(CloseReason.CLIENT_RESET)
    splice.is_silent = False
    splice.finish_paused()
    play.run_until(lambda: splice.joined == 4, "all that are left")
    assert play.counters[Counter.JOINED_SPLICE] == 4


def test_a_worker_that_stops_knows_first_where_its_pairs_are(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = silent(play)
    listening, address = servers()
    for _ in range(4):
        play.joined(listening, address)
    play.server.handover.finish()
    assert not splice.open
    assert (splice.joined, play.fake.joined) == (2, 0)
    play.server.reset_all(CloseReason.SHUTDOWN)
    assert splice.left == 2


@pytest.mark.parametrize("finishes", [False, True], ids=["flushed", "finished"])
def test_a_pair_whose_end_the_keeper_has_no_room_for_waits_for_it_with_its_sockets(
    start: StartPlay, servers: Servers, *, finishes: bool
) -> None:
    play = start(named(EAGER))
    splice = splicing(play, sockmap=False)
    splice.refuse_with = None
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.joined, "handover")
    splice.is_room = False
    if finishes:
        pair = play.only_client()
        for flow in (pair.up, pair.down):
            play.server.fin_seen(pair, flow)
            play.server.delivered(pair, flow)
    else:
        play.server.flush_ids(None)
    # With other orders meanwhile it ends once, for the first one's reason.
    assert play.server.flush_ids(None) == [play.only_client().id]
    play.server.reset_all(CloseReason.SHUTDOWN)
    play.server.expired(play.only_client())
    play.loop.run_once(0.01)
    pair = play.only_client()
    assert pair.life is Life.ENDING
    assert (splice.left, len(splice.ends)) == (0, 1)
    reason = CloseReason.FINISHED if finishes else CloseReason.FLUSHED
    assert play.closed(reason) == 0
    splice.finish_ends()
    assert splice.left == 1
    play.wait_for_end(reason)
    if not finishes:
        for end in (client, server):
            assert play.read_end(end) == (b"", "reset")


def test_a_fault_of_ours_ends_a_pair_that_waits_for_its_end(
    start: StartPlay, servers: Servers
) -> None:
    play = start(named(EAGER))
    splice = splicing(play, sockmap=False)
    splice.refuse_with = None
    client, server = play.joined(*servers())
    play.run_until(lambda: splice.joined, "handover")
    splice.is_room = False
    play.server.flush_ids(None)
    play.server.failed(play.only_client(), ValueError("made up"))
    for end in (client, server):
        assert play.read_end(end) == (b"", "reset")
    assert splice.left == 1


# What may happen to a pair whose keeper answers late, in any order.
STEPS: Final = ("up", "down", "much up", "turn", "taken", "refused", "busy", "silent")
MUCH_BYTES: Final = 300_001


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    when=st.sampled_from([EAGER, "handover: {after_bytes: 8, after_round_trips: 1000, after: 1h}"]),
    steps=st.lists(st.sampled_from(STEPS), max_size=14),
    end=st.sampled_from(["close", "reset", "flush"]),
)
def test_no_byte_is_lost_or_comes_twice_whenever_the_keeper_answers(
    servers: Servers, when: str, steps: list[str], end: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handover, "_KEEPER_PAUSES_S", (0.001,) * 4)
        patch.setattr(handover, "_AGAIN_S", 0.001)
        play = Play(named(when))
        try:
            played_with_late_answers(play, servers(), steps, end)
        finally:
            play.close()


def played_with_late_answers(
    play: Play, server_at: tuple[socket.socket, str], steps: list[str], end: str
) -> None:
    splice = silent(play)
    client, server = play.joined(*server_at)
    sent = {"up": 0, "down": 0}
    answers = {
        "taken": None,
        "refused": PairReason.MAP_FULL,
        "busy": PairReason.UNREAD_BYTES,
        "silent": PairReason.NO_KEEPER,
    }
    for step in steps:
        if step in answers:
            splice.refuse_with = answers[step]
            splice.finish_paused()
        elif step == "turn":
            play.loop.run_once(0.002)
        else:
            sock, way = (server, "down") if step == "down" else (client, "up")
            size = MUCH_BYTES if step == "much up" else 7
            with contextlib.suppress(BlockingIOError):
                sent[way] += sock.send(pattern(size, start=sent[way]))
    if end == "flush":
        play.server.flush_ids(None)
    elif end == "reset":
        reset(client)
    splice.refuse_with = None
    splice.is_silent = False
    splice.finish_paused()
    pair = next(iter(play.server.clients.values()), None)
    assert pair is None or not isinstance(pair.datapath, PausedPair)
    if end == "close":
        for sock, size in ((server, sent["up"]), (client, sent["down"])):
            assert not size or play.read(sock, size) == pattern(size)
        return
    got, ended = play.read_end(server)
    assert ended == "reset"
    assert got == pattern(sent["up"])[: len(got)]
    play.wait_for_end(CloseReason.FLUSHED if end == "flush" else CloseReason.CLIENT_RESET)


def test_copy_that_was_asked_for_is_not_handed_over(start: StartPlay, servers: Servers) -> None:
    play = start(named(EAGER + "\ndatapath: copy"))
    client, server = play.joined(*servers())
    client.sendall(b"x" * 1000)
    assert play.read(server, 1000) == b"x" * 1000
    assert play.only_client().pair_reason is PairReason.FORCED
    assert play.fake.joined == 0

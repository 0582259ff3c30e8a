"""When a UDP session is handed to the kernel, what that is told, and which sessions end early."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import PairReason
from pyforwarder.runtime.counters import Counter
from pyforwarder.worker.udp import server_losses
from pyforwarder.worker.udp.endings import ENDS_AT_ONCE
from pyforwarder.worker.udp.eviction import STEADY_AFTER_S
from pyforwarder.worker.udp.handover import MOST_PER_S, SessionHandover
from pyforwarder.worker.udp.icmp_errors import Unreachable, refusal_in
from tests.helpers.datagram_play import DatagramPlay
from tests.helpers.fake_kernel import FakeKernel

if TYPE_CHECKING:
    from pyforwarder.datapath.splice.sessions import SpliceSessions
    from pyforwarder.worker.udp.session import Session


class Played:
    """A session of one client, and the kernel that may get it."""

    def __init__(self, datapath: str, more: str = "", *, listener: str = "") -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)
        to = "{}:{}".format(*self.sock.getsockname())
        self.play = DatagramPlay(
            "listeners: [{name: main, bind: '127.0.0.1:0', protocol: udp,"
            f" {listener}rules: [{{match: any, to: web}}]}}]\ndatapath: {datapath}\n"
            f"upstreams: {{web: {{servers: ['{to}', '127.0.0.1:9'], balance: source_hash}}}}\n"
            f"{more}"
        )
        for server in self.balancer.servers[1:]:
            server.weight = 0  # no new sessions: all are for our own
        self.balancer._unsettle()
        self.kernel = FakeKernel(self.play.loop.defer)
        self.play.server.handover = SessionHandover(
            self.play.server, cast("SpliceSessions", self.kernel)
        )
        self.play.server.handover.settle(splice=True)
        self.client = self.play.client()

    @property
    def balancer(self) -> Any:
        return self.play.generation.balancers["web"]

    def up(self, client: socket.socket | None = None) -> tuple[str, int]:
        """A datagram of the client's; where it came from for the server."""
        (client or self.client).send(b"up")
        data, source = self.play.receive(self.sock)
        assert data == b"up"
        return source

    def down(self, source: tuple[str, int], client: socket.socket | None = None) -> None:
        self.sock.sendto(b"down", source)
        assert self.play.receive(client or self.client)[0] == b"down"
        self.play.settle()

    @property
    def session(self) -> Session:
        (session,) = self.play.server.by_id.values()
        return session

    def close(self) -> None:
        self.play.close()
        self.sock.close()


@pytest.fixture
def played() -> Iterator[Played]:
    made = Played("splice")
    yield made
    made.close()


def test_a_session_is_handed_over_once_both_have_spoken_and_the_client_twice(
    played: Played,
) -> None:
    source = played.up()
    played.down(source)
    played.down(source)
    assert played.kernel.opened == []
    assert played.session.pair_reason == PairReason.SHORT
    played.up()
    played.play.settle()
    (asked,) = played.kernel.opened
    assert asked["client"] == played.client.getsockname()
    assert asked["local"] == "127.0.0.1"
    assert asked["session_id"] == played.session.id
    assert played.session.pair_reason.name == "FORCED"
    assert played.play.counters[Counter.JOINED_SPLICE] == 1


def test_a_session_that_nobody_answers_is_not_handed_over(played: Played) -> None:
    for _ in range(20):
        played.up()
    assert played.kernel.opened == []


@pytest.mark.parametrize(
    ("datapath", "reason"),
    [(name, PairReason.DATAGRAMS) for name in ("copy", "sockmap")],
)
def test_what_is_to_be_copied_stays(datapath: str, reason: PairReason) -> None:
    played = Played(datapath)
    source = played.up()
    for _ in range(10):
        played.down(source)
        played.up()
    assert played.kernel.opened == []
    assert played.session.pair_reason is reason
    played.close()


@pytest.mark.parametrize(
    ("earned_by", "handover"),
    [
        ("round trips", "after_bytes: 1MiB, after_round_trips: 3, after: 1h"),
        ("bytes", "after_bytes: 9, after_round_trips: 9, after: 1h"),
        ("age", "after_bytes: 1MiB, after_round_trips: 9, after: 2s"),
        ("nothing", "after_bytes: 0, after_round_trips: 9, after: 1h"),
    ],
)
def test_with_auto_a_session_must_earn_its_handover(earned_by: str, handover: str) -> None:
    played = Played("auto", f"handover: {{{handover}}}")
    played.down(played.up())
    source = played.up()  # from here on `splice` would have it
    played.play.settle()
    asked = {"nothing": 1}.get(earned_by, 0)
    assert len(played.kernel.opened) == asked
    assert played.session.pair_reason is (PairReason.BEST if asked else PairReason.SHORT)
    if earned_by == "age":
        played.play.pass_time(2.0)
    played.down(source)
    if earned_by == "round trips":
        assert played.kernel.opened == []
        played.up()
        played.down(source)
    assert len(played.kernel.opened) == 1
    assert played.session.pair_reason is PairReason.BEST
    played.close()


def test_with_auto_and_without_the_kernel_a_session_is_copied() -> None:
    played = Played("auto")
    source = played.up()
    played.play.server.handover.settle(splice=False)
    for _ in range(10):
        played.down(source)
        played.up()
    assert played.kernel.opened == []
    assert played.session.pair_reason is PairReason.DATAGRAMS
    played.close()


def test_what_the_keeper_refuses_is_copied_and_says_why(played: Played) -> None:
    played.kernel.answer = PairReason.MAP_FULL
    source = played.up()
    for _ in range(5):
        played.down(source)
        played.up()
    assert len(played.kernel.opened) == 1
    assert played.session.pair_reason is PairReason.MAP_FULL
    assert played.play.counters[Counter.SESSIONS_UNSPLICED] == 1
    assert played.play.counters[Counter.JOINED_SPLICE] == 0


def test_a_keeper_that_does_not_answer_is_asked_again(played: Played) -> None:
    played.kernel.answer = PairReason.NO_KEEPER
    source = played.up()
    for _ in range(3):
        played.down(source)
        played.up()
    assert len(played.kernel.opened) > 1


def handed_over(played: Played) -> tuple[str, int]:
    source = played.up()
    played.down(source)
    played.up()
    played.play.settle()
    assert played.session.in_kernel is not None
    return source


def test_the_kernel_is_told_what_it_had_counted_before_the_queues_were_empty(
    played: Played,
) -> None:
    source = handed_over(played)
    assert set(played.kernel.told) == {(0, 0), (1, 0)}
    played.kernel.told.clear()
    played.kernel.counted = [1, 1]
    played.up()
    played.play.settle()
    assert played.kernel.told == [(0, 1)]
    played.down(source)
    assert played.kernel.told[-1] == (1, 1)


def test_a_datagram_that_is_only_just_coming_is_not_taken_for_copied(played: Played) -> None:
    """The program counts it, and then it comes to our socket: between the two we look."""
    handed_over(played)
    played.kernel.told.clear()
    port = played.session.port
    port.behind[played.session] = None
    handover = played.play.server.handover
    assert not handover.report_queue_empty(port)  # what is counted is read now
    played.kernel.counted[0] = 1  # and one more comes
    assert handover.report_queue_empty(port)  # the queue was empty once more
    assert played.kernel.told == [(0, 0)]


def test_what_was_overtaken_is_counted(played: Played) -> None:
    handed_over(played)
    played.kernel.counted = [2, 0]
    played.kernel.latched = [True, False]
    for _ in range(3):
        played.up()
    # Two had come before; the third is one that the program does not understand.
    assert played.play.counters[Counter.DATAGRAMS_OVERTAKEN] == 2


def test_without_a_quiet_moment_the_kernel_need_not_wait(played: Played) -> None:
    source = handed_over(played)
    session = played.session.in_kernel
    assert session is not None
    session.behind_s[0] = played.play.loop.now_s
    played.play.pass_time(0.05)
    played.play.server.handover.copied(played.session, 0)
    assert not played.kernel.is_told_now
    played.play.pass_time(0.06)
    played.play.server.handover.copied(played.session, 0)
    assert played.kernel.is_told_now
    played.down(source)


def test_a_session_that_only_the_kernel_hears_is_not_idle_and_becomes_steady(
    played: Played,
) -> None:
    handed_over(played)
    session = played.session
    for _ in range(20):
        played.kernel.last = [played.play.monotonic(), 0.0]
        played.play.pass_time(15.0)
    assert played.session is session
    assert played.kernel.last[0] - session.accepted_s > STEADY_AFTER_S
    assert played.play.server.eviction.first(None) is None
    for _ in range(10):
        played.play.pass_time(15.0)
    assert played.play.closed(CloseReason.IDLE) == 1


def test_what_the_kernel_has_carried_is_added_up_at_the_end(played: Played) -> None:
    handed_over(played)
    played.kernel.sent_on = [(1000, 10), (5000, 20)]
    played.play.server.flush_ids(None)
    assert played.play.counters[Counter.UP_BYTES] == 1000 + 2 * len(b"up")
    assert played.play.counters[Counter.DOWN_BYTES] == 5000 + len(b"down")


def asked_for(played: Played) -> tuple[str, int]:
    """A session for which the keeper is asked, and says nothing."""
    played.kernel.is_slow = True
    source = played.up()
    played.down(source)
    played.up()
    played.play.settle()
    assert len(played.kernel.asked) == 1
    return source


def test_a_session_is_copied_while_the_keeper_is_asked_and_it_is_asked_once(
    played: Played,
) -> None:
    source = asked_for(played)
    for _ in range(3):
        played.up()
        played.down(source)
    assert len(played.kernel.opened) == 1
    assert played.session.in_kernel is None
    played.kernel.counted = [2, 50]
    (pending,) = played.kernel.asked
    played.kernel.say(pending)
    session = played.session.in_kernel
    assert session is not None
    # Of what it has passed to us, so many have gone on already.
    assert session.copied == [2, 3]
    assert played.play.counters[Counter.JOINED_SPLICE] == 1


@pytest.mark.parametrize("answer", [PairReason.MAP_FULL, PairReason.OTHER_SOCKET])
def test_a_late_refusal_says_why(played: Played, answer: PairReason) -> None:
    asked_for(played)
    played.kernel.answer = answer
    played.kernel.say(played.kernel.asked.pop())
    assert played.session.pair_reason is answer
    played.up()
    assert len(played.kernel.opened) == 1


def test_a_session_that_ends_while_the_keeper_is_asked_has_no_place(played: Played) -> None:
    asked_for(played)
    assert len(played.play.server.flush_ids(None)) == 1
    assert played.kernel.abandoned == 1
    assert played.kernel.closed == []
    assert played.play.closed(CloseReason.FLUSHED) == 1
    played.kernel.say(played.kernel.asked.pop())  # nobody's any more
    assert played.play.counters[Counter.JOINED_SPLICE] == 0
    assert played.play.counters[Counter.UP_BYTES] == 2 * len(b"up")


def test_a_session_that_goes_to_another_daemon_is_not_begun_here(played: Played) -> None:
    asked_for(played)
    played.play.server.release(played.session)
    assert played.kernel.abandoned == 1


def test_an_end_is_told_once_it_is_known_what_was_carried(played: Played) -> None:
    """All else of the session is gone by then, and others are served."""
    handed_over(played)
    played.kernel.is_slow = True
    session = played.session
    assert played.play.server.flush_ids(None) == [session.id]
    assert played.play.server.by_id == {}
    assert session.slot == -1
    assert played.play.counters[Counter.OPEN] == 0
    assert played.play.closed(CloseReason.FLUSHED) == 0
    assert played.play.counters[Counter.UP_BYTES] == 0
    assert played.play.said() == []
    played.kernel.sent_on = [(1000, 10), (5000, 20)]
    (say,) = played.kernel.uncounted
    say()
    assert played.play.closed(CloseReason.FLUSHED) == 1
    assert played.play.counters[Counter.UP_BYTES] == 1000 + 2 * len(b"up")
    assert played.play.counters[Counter.DOWN_BYTES] == 5000 + len(b"down")
    (line,) = played.play.said()
    assert (line["event"], line["up_bytes"]) == ("closed", 1000 + 2 * len(b"up"))


def test_the_keeper_is_not_asked_for_more_sessions_than_it_can_begin(played: Played) -> None:
    """The same process begins the pairs of TCP."""
    handover = played.play.server.handover
    now_s = played.play.loop.now_s
    allowed = sum(handover._take_token() for _ in range(10_000))
    assert allowed <= MOST_PER_S
    played.play.loop.now_s = now_s + 0.05
    assert 0 < sum(handover._take_token() for _ in range(10_000)) <= MOST_PER_S * 0.05 + 1


def test_many_sessions_do_not_end_in_one_turn_and_others_are_served_meanwhile(
    played: Played,
) -> None:
    play, server = played.play, played.play.server
    clients = [play.client() for _ in range(10 * ENDS_AT_ONCE)]
    for client in clients:
        source = played.up(client)
        played.down(source, client)
        played.up(client)
    play.settle()
    spliced = sum(session.in_kernel is not None for session in server.by_id.values())
    assert spliced > 2 * ENDS_AT_ONCE  # the others have no slot
    found = server.flush_ids(None)
    assert len(found) == len(clients)
    assert len(server.by_id) == 9 * ENDS_AT_ONCE
    assert server.flush_ids(found) == found[ENDS_AT_ONCE:]  # again: they end once
    late = play.client()
    played.up(late)
    left = len(server.by_id)
    assert left > 5 * ENDS_AT_ONCE  # it was served before most of them had ended
    while left > 1:
        play.loop.run_once(0)
        assert left - len(server.by_id) <= ENDS_AT_ONCE
        left = len(server.by_id)
    assert play.closed(CloseReason.FLUSHED) == len(clients)
    assert sum(played.kernel.closed) == spliced
    assert max(played.kernel.closed) <= ENDS_AT_ONCE
    played.up(late)
    assert played.session.reason is None


def test_sessions_that_fall_silent_together_do_not_end_in_one_turn(played: Played) -> None:
    play, server = played.play, played.play.server
    clients = [play.client() for _ in range(4 * ENDS_AT_ONCE)]
    for client in clients:
        played.up(client)
    play._ahead_s += 60.0
    left, most = len(server.by_id), 0
    while left:
        play.loop.run_once(0)
        most = max(most, left - len(server.by_id))
        left = len(server.by_id)
    assert most == ENDS_AT_ONCE
    assert play.closed(CloseReason.IDLE) == len(clients)


def test_a_session_that_speaks_before_its_turn_to_end_as_idle_goes_on(played: Played) -> None:
    play, server = played.play, played.play.server
    played.up()
    session = played.session
    play._ahead_s += 60.0
    play.loop.run_once(0)
    assert server.is_ending(session)
    played.client.send(b"up")
    play.settle()
    assert played.session is session
    assert not server.is_ending(session)
    play.pass_time(60.0)
    play.pass_time(60.0)
    play.pass_time(60.0)
    assert play.closed(CloseReason.IDLE) == 1


def test_what_ends_for_a_reason_of_its_own_is_not_kept_by_having_spoken(played: Played) -> None:
    play, server = played.play, played.play.server
    played.up()
    play._ahead_s += 60.0
    play.loop.run_once(0)
    assert server.is_ending(played.session)
    assert server.flush_ids(None) != []
    assert play.closed(CloseReason.FLUSHED) == 1


def test_a_fault_over_one_ending_costs_no_other(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    play, server = played.play, played.play.server
    clients = [play.client() for _ in range(3 * ENDS_AT_ONCE)]
    for client in clients:
        played.up(client)
    said = server.log.closed

    def closed(session: Session, *counts: tuple[int, int]) -> None:
        if session.id % 3 == 0:
            raise RuntimeError("a fault of ours")
        said(session, *counts)

    monkeypatch.setattr(server.log, "closed", closed)
    server.flush_ids(None)
    play.settle()
    play.settle()
    assert server.by_id == {}
    assert play.closed(CloseReason.FLUSHED) == len(clients)


def test_a_listener_that_is_taken_away_is_closed_before_its_many_sessions_have_ended(
    played: Played,
) -> None:
    """What their servers still say is lost, and what would go to the kernel stays."""
    play, server = played.play, played.play.server
    clients = [play.client() for _ in range(3 * ENDS_AT_ONCE)]
    sources = [played.up(client) for client in clients]
    server.listen_only_at(())
    asked = len(played.kernel.opened)
    for source in sources:
        played.sock.sendto(b"down", source)
    for _ in range(5):
        play.loop.run_once(0)
    assert server.by_id == {}
    assert len(played.kernel.opened) == asked
    assert play.closed(CloseReason.SHUTDOWN) == len(clients)


def test_sessions_of_a_server_that_is_down_end(played: Played) -> None:
    played.up()
    played.play.server.losses.servers_changed()
    assert played.session.reason is None
    played.balancer.mark_down(str(played.session.destination))
    played.play.server.losses.servers_changed()
    assert played.play.closed(CloseReason.UNREACHABLE) == 1


def test_sessions_of_a_server_that_is_ejected_end_if_there_is_another(played: Played) -> None:
    played.up()
    server = played.session.server_state
    assert server is not None
    for _ in range(20):
        played.balancer.failed(server, played.play.loop.now_s)
    assert server.is_ejected(played.play.loop.now_s)
    played.play.server.losses.servers_changed()
    assert played.session.reason is None  # as good as any
    played.balancer.servers[1].weight = 1
    played.play.server.losses.servers_changed()
    assert played.play.closed(CloseReason.UNREACHABLE) == 1


def test_sessions_of_a_server_that_is_no_more_end(played: Played) -> None:
    played.up()
    played.play.server.losses.servers_changed(played.play.generation.balancers)
    assert played.session.reason is None
    played.play.server.losses.servers_changed({})
    assert played.play.closed(CloseReason.UNREACHABLE) == 1


@pytest.mark.parametrize(
    ("listener", "more", "idle_s"),
    [
        ("", "", 120.0),
        ("", "timeouts: {idle: 60s}", 60.0),
        ("idle: 10m, ", "timeouts: {idle: 60s}", 600.0),
        ("idle: 5s, ", "", 5.0),
    ],
)
def test_a_listener_may_say_how_long_its_sessions_live_in_silence(
    listener: str, more: str, idle_s: float
) -> None:
    played = Played("splice", more, listener=listener)
    handed_over(played)
    # A timer looks eight times in that time.
    played.play.pass_time(idle_s * 0.8)
    assert played.play.closed(CloseReason.IDLE) == 0
    for _ in range(3):
        played.play.pass_time(idle_s / 6)
    assert played.play.closed(CloseReason.IDLE) == 1
    played.close()


def test_before_it_is_known_whether_that_works_nothing_is_handed_over(played: Played) -> None:
    handover = SessionHandover(played.play.server, cast("SpliceSessions", played.kernel))
    played.play.server.handover = handover
    source = played.up()
    for _ in range(3):
        played.down(source)
        played.up()
    assert played.kernel.opened == []
    handover.settle(splice=True)
    played.down(source)
    assert len(played.kernel.opened) == 1


def test_where_it_does_not_work_sessions_are_copied_and_say_so(played: Played) -> None:
    handover = SessionHandover(played.play.server, cast("SpliceSessions", played.kernel))
    played.play.server.handover = handover
    source = played.up()
    handover.settle(splice=False)
    for _ in range(3):
        played.down(source)
        played.up()
    assert played.kernel.opened == []
    assert played.session.pair_reason is PairReason.NOT_ELIGIBLE


# What ICMP says


SERVER: Final = Unreachable(errno.ECONNREFUSED, "127.0.0.1")
STRANGER: Final = Unreachable(errno.ECONNREFUSED, "127.0.0.66")


@pytest.fixture
def failures(played: Played, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The servers that a failure was counted against."""
    found: list[object] = []
    monkeypatch.setattr(played.balancer, "failed", lambda server, _now_s: found.append(server))
    return found


def say(played: Played, monkeypatch: pytest.MonkeyPatch, *said: Unreachable) -> bool:
    """Whether the session goes on that was opened last."""
    *_, session = played.play.server.by_id.values()
    monkeypatch.setattr(server_losses, "refusals", lambda _sock: iter(said))
    return played.play.server.losses.read_errors(session)


def test_a_stranger_ends_no_session_that_was_answered(
    played: Played, failures: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    played.down(played.up())
    for _ in range(20):
        assert say(played, monkeypatch, STRANGER)
        played.up()
    assert failures == []
    assert played.play.counters[Counter.ERRORS_DOUBTED] == 20


def test_a_stranger_ends_a_session_that_nobody_has_answered_and_ejects_no_server(
    played: Played, failures: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    played.up()
    assert not say(played, monkeypatch, STRANGER)
    assert played.play.closed(CloseReason.REFUSED) == 1
    assert failures == []


def test_a_server_that_has_answered_is_gone_once_it_has_refused_several_datagrams(
    played: Played, failures: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = played.up()
    played.down(source)
    assert say(played, monkeypatch, *[SERVER] * 20)  # of one datagram
    played.up()
    assert say(played, monkeypatch, SERVER)
    played.down(source)  # so it is there
    for _ in range(2):
        played.up()
        assert say(played, monkeypatch, SERVER)
    played.play.pass_time(5.0)
    played.up()
    assert not say(played, monkeypatch, SERVER)
    assert played.play.closed(CloseReason.REFUSED) == 1
    assert len(failures) == 1


def test_a_server_that_the_kernel_has_sent_datagrams_to_is_gone_after_several(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over(played)
    said = []
    for up, down in ((1, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)):
        played.kernel.sent_on = [(0, up), (0, down)]
        said.append(say(played, monkeypatch, SERVER))
    assert said == [True] * 5 + [False]


def test_a_server_that_answers_others_is_not_ejected_by_what_may_be_forged(
    played: Played, failures: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    played.down(played.up())
    for after_s, expected in ((0.0, 0), (5.0, 1)):
        played.play.pass_time(after_s)
        played.up(played.play.client())
        assert not say(played, monkeypatch, SERVER)
        assert len(failures) == expected
    assert played.session.reason is None


def test_an_error_costs_none_of_the_datagrams_that_meet_it(played: Played) -> None:
    """The kernel answers the next send with it, and does not send."""
    source = played.up()
    played.down(source)
    address = played.sock.getsockname()
    played.sock.close()
    played.client.send(b"nobody hears that")
    # The loop has no part in it: the error waits for the datagram that comes next.
    played.play.server.copying.readable(played.session.port, -1, 0)
    played.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    played.sock.bind(address)
    played.sock.setblocking(False)
    assert played.up() == source
    assert played.play.counters[Counter.ERRORS_DOUBTED] == 1
    assert played.play.counters[Counter.DATAGRAMS_LOST] == 0


@pytest.mark.parametrize(
    ("family", "kind", "code", "expected"),
    [
        (socket.AF_INET, 3, 3, True),
        (socket.AF_INET, 3, 13, True),
        (socket.AF_INET, 3, 1, False),
        (socket.AF_INET, 3, 4, False),
        (socket.AF_INET, 11, 0, False),
        (socket.AF_INET6, 1, 4, True),
        (socket.AF_INET6, 1, 3, False),
        (socket.AF_INET6, 2, 0, False),
    ],
)
def test_errors_that_pass_are_no_refusals(
    family: socket.AddressFamily, kind: int, code: int, expected: bool
) -> None:
    host = {socket.AF_INET: "10.2.0.9", socket.AF_INET6: "2001:db8::9"}[family]
    packed = socket.inet_pton(family, host)
    behind = bytes(4) + packed if family == socket.AF_INET else bytes(8) + packed + bytes(4)
    origin = {socket.AF_INET: 2, socket.AF_INET6: 3}[family]
    data = struct.pack("=IBBBBII", errno.ECONNREFUSED, origin, kind, code, 0, 0, 0) + behind
    found = refusal_in(data, family)
    assert found == (Unreachable(errno.ECONNREFUSED, host) if expected else None)
    assert refusal_in(data[:20], family) is None

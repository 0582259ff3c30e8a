"""Names to addresses: what is kept, how long, for whom; what a name server's failure does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pycares
import pytest

from pyforwarder.runtime import askers, resolver
from pyforwarder.runtime.askers import HostNames, Mailbox, ThreadAsker, cares_knows_all_sources
from pyforwarder.runtime.loop import Loop
from pyforwarder.runtime.resolver import (
    MOST_ADDRESSES,
    NOTHING_KEEP_S,
    QUESTION_S,
    STALE_S,
    STALE_WAIT_S,
    Bounds,
    Resolver,
    TooManyNamesError,
    Wait,
    addresses_of,
    prefixes_of,
)
from pyforwarder.runtime.slowness import scaled_s

DEADLINE_S = scaled_s(10.0)
NAME = "name.example"
A, B = ["192.0.2.1"], ["192.0.2.2", "192.0.2.3"]


class Clock:
    """The loop's time, which passes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


class FakeAsker:
    """Answers when the test does."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.put = mailbox.put
        self.asked: list[str] = []
        self.forgotten: list[str] = []
        self.forgets = False

    def ask(self, name: str) -> None:
        self.asked.append(name)

    def forget(self, name: str) -> bool:
        self.forgotten.append(name)
        return self.forgets

    def close(self) -> None:
        pass


class Play:
    """A resolver with a clock and somebody to ask."""

    def __init__(self, clock: Clock, *, stale_wait_s: float = STALE_WAIT_S) -> None:
        self.clock = clock
        self.loop = Loop()
        self.asker: FakeAsker

        def make(mailbox: Mailbox) -> FakeAsker:
            self.asker = FakeAsker(mailbox)
            return self.asker

        bounds = Bounds(total=7, client=3, network=5)
        self.resolver = Resolver(self.loop, make, bounds, stale_wait_s=stale_wait_s)
        self.answers: list[list[str]] = []

    def ask(
        self, name: str = NAME, *, keep_s: float = 5.0, client: str | None = None
    ) -> Wait | None:
        return self.resolver.resolve(name, self.answers.append, keep_s=keep_s, client=client)

    def answer(self, hosts: list[str] | None, name: str = NAME) -> list[list[str]]:
        """What those who waited were told."""
        self.asker.put(name, hosts)
        return self.pass_time(0.0)

    def pass_time(self, by_s: float) -> list[list[str]]:
        """What was told until then."""
        self.clock.now_s += by_s
        self.loop.run_once(0.0)
        told = self.answers.copy()
        self.answers.clear()
        return told

    def kept(self, **how: float) -> list[list[str]]:
        """What is answered without asking, at once."""
        asked = len(self.asker.asked)
        assert self.ask(**how) is None  # type: ignore[arg-type]
        assert len(self.asker.asked) == asked
        return self.pass_time(0.0)

    def close(self) -> None:
        self.resolver.close()
        self.loop.run_once(0.0)
        self.loop.dispose()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def play(clock: Clock) -> Iterator[Play]:
    play = Play(clock)
    yield play
    play.close()
    assert not play.resolver._charges


def test_a_name_is_asked_for_once_for_all_clients_that_wait(play: Play) -> None:
    assert play.ask() is not None
    assert play.ask() is not None
    assert play.asker.asked == [NAME]
    assert play.answer(B) == [B, B]
    assert play.kept() == [B]


def test_a_name_is_asked_for_again_when_its_time_is_over(play: Play) -> None:
    play.ask()
    play.answer(A)
    play.pass_time(5.0)
    assert play.ask() is not None
    assert play.answer(B) == [B]
    assert play.kept(keep_s=1000.0) == [B]
    assert play.asker.asked == [NAME] * 2


def test_that_a_name_is_gone_is_known_for_a_moment(play: Play) -> None:
    play.ask()
    play.answer(A)
    play.pass_time(5.0)
    play.ask()
    assert play.answer([]) == [[]]
    assert play.kept(keep_s=1000.0) == [[]]
    play.pass_time(NOTHING_KEEP_S)
    assert play.ask(keep_s=1000.0) is not None
    # Its earlier addresses do not come back.
    assert play.answer(None) == [[]]


def test_while_nobody_can_be_asked_a_name_keeps_its_addresses(play: Play) -> None:
    play.ask()
    assert play.answer(None) == [[]]
    play.pass_time(NOTHING_KEEP_S)
    play.ask()
    assert play.answer(A) == [A]
    play.pass_time(5.0)
    play.ask()
    assert play.answer(None) == [A]
    # Not every connection waits for the failure: it is kept as long as an answer is.
    assert play.kept() == [A]


def test_addresses_that_nobody_confirms_end_at_last(play: Play) -> None:
    play.ask()
    play.answer(A)
    play.pass_time(STALE_S - 1)
    play.ask()
    assert play.answer(None) == [A]
    play.pass_time(1.0)
    play.ask(keep_s=0.0)
    assert play.answer(None) == [[]]


def test_a_new_answer_is_not_waited_for_long_where_an_old_one_is_known(play: Play) -> None:
    play.ask()
    play.answer(A)
    play.pass_time(5.0)
    play.ask()
    assert play.pass_time(STALE_WAIT_S / 2) == []
    assert play.pass_time(STALE_WAIT_S / 2) == [A]
    # Until the answer comes nobody else waits at all.
    assert play.kept() == [A]
    play.answer(B)
    assert play.kept() == [B]


def test_a_check_does_not_wait_where_an_old_answer_is_known(clock: Clock) -> None:
    play = Play(clock, stale_wait_s=0.0)
    assert play.ask() is not None
    play.answer(A)
    play.pass_time(5.0)
    assert play.ask() is None
    assert play.pass_time(0.0) == [A]
    assert play.asker.asked == [NAME] * 2
    play.answer(B)
    assert play.kept() == [B]
    play.close()


def test_a_question_has_a_deadline_and_its_answer_may_still_be_of_use(play: Play) -> None:
    play.asker.forgets = True
    play.ask()
    assert play.pass_time(QUESTION_S - 0.5) == []
    assert play.pass_time(0.5) == [[]]
    assert not play.resolver._open
    play.answer(A)
    assert play.kept() == [A]
    # That nobody knows is no news then.
    play.answer(None)
    assert play.kept() == [A]


def test_what_still_takes_a_place_at_its_deadline_is_charged_until_it_ends(play: Play) -> None:
    def is_refused() -> bool:
        try:
            play.ask("refused.example", client="192.0.2.1")
        except TooManyNamesError:
            return True
        return False

    for number in range(3):
        play.ask(f"{number}.example", client="192.0.2.1")
    assert play.pass_time(QUESTION_S) == [[], [], []]
    assert play.asker.forgotten == [f"{number}.example" for number in range(3)]
    assert is_refused()
    play.pass_time(10 * QUESTION_S)
    assert is_refused()
    assert play.answer(A, "1.example") == []
    assert play.resolver._kept["1.example"].hosts == A
    # That nobody knows ends it, too, and is no news.
    assert play.answer(None, "2.example") == []
    assert len(play.resolver._open) == 1
    assert not is_refused()


def test_a_client_that_asks_for_an_overdue_name_waits_once_more(play: Play) -> None:
    play.ask()
    assert play.pass_time(QUESTION_S) == [[]]
    # For a moment nobody asks again.
    assert play.kept() == [[]]
    play.pass_time(NOTHING_KEEP_S)
    assert play.ask() is not None
    assert play.asker.asked == [NAME]
    assert play.pass_time(QUESTION_S) == [[]]
    play.pass_time(NOTHING_KEEP_S)
    play.ask()
    assert play.answer(None) == [[]]
    assert not play.resolver._open
    play.pass_time(NOTHING_KEEP_S)
    play.ask()
    assert play.asker.asked == [NAME] * 2
    assert play.answer(B) == [B]


def test_no_network_of_clients_may_have_all_threads() -> None:
    assert 2 * resolver._CLIENTS_BY_THREADS.network <= resolver._CLIENT_THREADS
    assert resolver._CLIENTS_BY_THREADS.client < resolver._CLIENTS_BY_THREADS.network


@pytest.mark.parametrize("forgets", [True, False])
def test_a_client_that_has_gone_hears_nothing_and_holds_no_place_that_can_be_had(
    play: Play, forgets: bool
) -> None:
    play.asker.forgets = forgets
    first, second = play.ask(client="192.0.2.7"), play.ask(client="192.0.2.8")
    assert first is not None
    assert second is not None
    first.stop()
    assert play.asker.forgotten == []
    second.stop()
    second.stop()
    assert play.asker.forgotten == [NAME]
    # What cannot be taken back counts until it ends: closing and coming again gains nothing.
    assert bool(play.resolver._open) is not forgets
    assert play.answer(A) == []
    assert not play.resolver._open


def test_a_client_and_its_network_have_so_many_questions_and_no_more(play: Play) -> None:
    def refused(client: str | None) -> str:
        with pytest.raises(TooManyNamesError) as error:
            play.ask("refused.example", client=client)
        return str(error.value)

    for number in range(3):
        play.ask(f"{number}.example", client="192.0.2.1")
    assert refused("192.0.2.1") == "3 names are being resolved for 192.0.2.1/32 already"
    assert refused("::ffff:192.0.2.1") == "3 names are being resolved for 192.0.2.1/32 already"
    # A name that is being asked for costs nothing.
    assert play.ask("2.example", client="192.0.2.1") is not None
    for number in range(3, 5):
        play.ask(f"{number}.example", client="192.0.2.2")
    assert refused("192.0.2.3") == "5 names are being resolved for 192.0.2.0/24 already"
    for number in range(5, 7):
        play.ask(f"{number}.example", client=f"2001:db8::{number}")
    assert refused(None) == "7 names are being resolved for this worker already"
    assert play.answer(A, "0.example") == [A]
    assert play.ask("one-more.example", client="2001:db8::1") is not None
    assert refused("2001:db8::9") == "7 names are being resolved for this worker already"
    assert play.answer(A, "1.example") == [A]
    assert refused("2001:db8::9") == "3 names are being resolved for 2001:db8::/64 already"
    assert play.ask("two-more.example", client="192.0.2.1") is not None


def test_a_client_over_its_bounds_is_served_with_what_is_known(play: Play) -> None:
    play.ask(client="192.0.2.1")
    play.answer(A)
    for number in range(3):
        play.ask(f"{number}.example", client="192.0.2.1")
    play.pass_time(4.9)
    for number in range(3):  # answered, and asked again
        play.answer(A, f"{number}.example")
        play.ask(f"{number}.again.example", client="192.0.2.1")
    play.pass_time(0.2)
    assert play.ask(client="192.0.2.1") is None
    assert play.pass_time(0.0) == [A]


@pytest.mark.parametrize(
    ("host", "prefixes"),
    [
        ("192.0.2.1", ("192.0.2.1/32", "192.0.2.0/24")),
        ("::ffff:192.0.2.1", ("192.0.2.1/32", "192.0.2.0/24")),
        ("2001:db8:1:2:3::4", ("2001:db8:1:2::/64", "2001:db8:1::/48")),
        ("fe80::1%eth0", ("fe80::/64", "fe80::/48")),
    ],
)
def test_what_counts_as_one_client(host: str, prefixes: tuple[str, str]) -> None:
    assert prefixes_of(host) == prefixes


def test_what_is_kept_is_bounded(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyforwarder.runtime.resolver._MOST_KEPT", 3)
    for number in range(5):
        play.ask(f"{number}.example")
        play.answer(A if number % 2 else [], f"{number}.example")
    assert list(play.resolver._kept) == ["2.example", "3.example", "4.example"]


def test_the_addresses_of_all_that_is_kept_are_bounded(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyforwarder.runtime.resolver._MOST_KEPT_HOSTS", 5)
    for number in range(4):
        for _ in range(2):  # the second replaces the first
            play.ask(f"{number}.example", keep_s=0.0)
            play.answer(B, f"{number}.example")
    assert list(play.resolver._kept) == ["2.example", "3.example"]
    assert play.resolver._kept_hosts == 4


def test_a_zone_is_no_address() -> None:
    assert addresses_of(["fe80::1%eth0", "2001:db8::1"], 80) == addresses_of(["2001:db8::1"], 80)


# Threads that ask this host's C library.


class Names:
    """What getaddrinfo says, until it is told to say something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts: list[str] = []
        self.error: int | None = None
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)

    def _getaddrinfo(self, *_: object, **__: object) -> list[tuple[object, ...]]:
        if self.error is not None:
            raise socket.gaierror(self.error, "as the test says")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in self.hosts]


@pytest.mark.parametrize(
    ("error", "hosts"),
    [
        (None, B),
        (socket.EAI_NONAME, []),
        (socket.EAI_NODATA, []),
        (socket.EAI_AGAIN, None),
        (socket.EAI_FAIL, None),
        (socket.EAI_SYSTEM, None),
    ],
)
def test_what_the_c_library_says(
    monkeypatch: pytest.MonkeyPatch, error: int | None, hosts: list[str] | None
) -> None:
    names = Names(monkeypatch)
    names.hosts, names.error = [*B, B[0]], error
    assert askers.lookup(NAME) == hosts


def test_of_an_answer_without_end_no_more_is_kept_than_tells_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = [f"10.0.{number >> 8}.{number & 255}" for number in range(4000)]
    names = Names(monkeypatch)
    names.hosts = hosts[:1] * 300 + hosts
    assert askers.lookup(NAME) == hosts[: MOST_ADDRESSES + 1]
    nodes = [SimpleNamespace(addr=(host.encode(), 0)) for host in names.hosts]
    answer = cast("pycares.AddrInfoResult", SimpleNamespace(nodes=nodes))
    assert askers._hosts_of(answer, None) == hosts[: MOST_ADDRESSES + 1]
    names.hosts = hosts[:MOST_ADDRESSES]
    assert askers.lookup(NAME) == hosts[:MOST_ADDRESSES]


def run_until(loop: Loop, look: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not look():
        assert time.monotonic() < deadline_s
        loop.run_once(0.01)


def test_threads_ask_one_name_each_and_skip_what_was_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go, began = threading.Event(), threading.Semaphore(0)
    looked_up: list[str] = []

    def lookup(name: str) -> list[str]:
        looked_up.append(name)
        began.release()
        assert go.wait(DEADLINE_S)
        return [name]

    monkeypatch.setattr(askers, "lookup", lookup)
    loop = Loop()
    received: dict[str, list[str] | None] = {}
    mailbox = Mailbox(loop, received.__setitem__)
    asker = ThreadAsker(mailbox, threads=2)
    for name in ("a", "b", "c", "d", "a"):
        asker.ask(name)
    for _ in range(2):
        assert began.acquire(timeout=DEADLINE_S)
    assert sorted(looked_up) == ["a", "b"]
    assert not asker.forget("a")
    assert asker.forget("c")
    assert list(asker._waiting) == ["d"]  # nothing is left of what was forgotten
    go.set()
    run_until(loop, lambda: len(received) == 3)
    assert received == {name: [name] for name in ("a", "b", "d")}
    assert sorted(looked_up) == ["a", "b", "d"]
    asker.close()
    mailbox.close()
    mailbox.put("late", [])  # to nobody
    loop.dispose()


def test_c_ares_holds_a_name_until_it_answers_and_nothing_of_what_is_no_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    callbacks: dict[str, Callable[[object, int | None], None]] = {}

    class FakeChannel:
        def __init__(self, **_: object) -> None:
            pass

        def getaddrinfo(
            self, name: str, _port: None, *, type: int, callback: Callable[..., None]
        ) -> None:
            assert type == socket.SOCK_STREAM
            name.encode("idna")
            callbacks[name] = callback

        def reinit(self) -> None:
            pass

        def close(self) -> None:
            pass

    go = threading.Event()
    monkeypatch.setattr("pycares.Channel", FakeChannel)
    monkeypatch.setattr(askers, "lookup", lambda name: [name] if go.wait(DEADLINE_S) else None)
    loop = Loop()
    received: dict[str, list[str] | None] = {}
    mailbox = Mailbox(loop, received.__setitem__)
    asker = askers.CaresAsker(mailbox)
    asker.ask(NAME)
    assert not asker.forget(NAME)
    callbacks[NAME](None, None)
    assert asker.forget(NAME)
    asker.ask("\u00e9" * 64)
    assert asker.forget("\u00e9" * 64)
    # A thread is asked for those of the host, and cannot be told to stop either.
    asker.ask("localhost")
    run_until(loop, lambda: not asker._host._waiting)
    assert not asker.forget("localhost")
    go.set()
    run_until(loop, lambda: len(received) == 3)
    assert received == {NAME: None, "\u00e9" * 64: [], "localhost": ["localhost"]}
    asker.close()
    mailbox.close()
    loop.dispose()


def test_where_c_ares_cannot_be_had_a_thread_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments: object) -> None:
        # pycares 5.2 frees the text of `lookups` before c-ares reads it.
        assert not arguments.keys() - {"timeout", "tries"}
        raise pycares.AresError("Failed to initialize c-ares channel")

    monkeypatch.setattr("pycares.Channel", refuse)
    monkeypatch.setattr(askers, "lookup", lambda name: ["192.0.2.1"])
    loop = Loop()
    received: dict[str, list[str] | None] = {}
    mailbox = Mailbox(loop, received.__setitem__)
    asker = askers.CaresAsker(mailbox)
    asker.ask(NAME)
    run_until(loop, lambda: received == {NAME: ["192.0.2.1"]})
    asker.close()
    mailbox.close()
    loop.dispose()


def test_names_that_the_host_knows_by_itself(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    names = HostNames(hosts)
    assert "localhost" in names
    assert socket.gethostname().lower() in names
    assert "a.test" not in names
    hosts.write_text(
        "10.0.0.1\tA.test b.test # c.test\n# 10.0.0.2 d.test\n\n::1 e.test\n10.0.0.3\n"
    )
    assert [name for name in "abcde" if f"{name}.test" in names] == ["a", "b", "e"]
    assert "10.0.0.1" not in names
    hosts.unlink()
    assert "a.test" not in names


@pytest.mark.parametrize(
    ("text", "knows"),
    [
        ("hosts: files dns\n", True),
        (
            "passwd: files sss\nhosts:\tfiles myhostname resolve [!UNAVAIL=return] dns # mdns\n",
            True,
        ),
        ("hosts: files mdns4_minimal [NOTFOUND=return] dns\n", False),
        ("hosts: files sss\n", False),
        ("passwd: files\n", True),
        (None, True),
    ],
)
def test_name_servers_are_asked_directly_where_the_host_has_no_other_source(
    tmp_path: Path, text: str | None, knows: bool
) -> None:
    nsswitch = tmp_path / "nsswitch.conf"
    if text is not None:
        nsswitch.write_text(text)
    assert cares_knows_all_sources(nsswitch) is knows

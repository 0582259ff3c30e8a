"""A worker's side of its talk with the splice keeper, which the test plays itself."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.splice import keeper_client
from pyforwarder.datapath.splice.keeper_client import KeeperClient, KeeperError
from pyforwarder.runtime.slowness import scaled_s

REFUSED: Final = {"refused": int(PairReason.NO_KEEPER)}
# Soon enough for a test; what the client itself takes is far from it.
READ_S: Final = 0.5
ANSWER_S: Final = 1.0
# Of a call that must not wait at all; another that does takes `READ_S` at least.
AT_ONCE_S: Final = READ_S / 2


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_client, "_READ_TIMEOUT_S", READ_S)
    monkeypatch.setattr(keeper_client, "_ANSWER_TIMEOUT_S", ANSWER_S)
    monkeypatch.setattr(keeper_client, "_BEGIN_TIMEOUT_S", ANSWER_S)


@pytest.fixture
def ends() -> Iterator[tuple[KeeperClient, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(scaled_s(15))
    with ours, theirs:
        yield KeeperClient(ours), theirs


def answering(
    sock: socket.socket, make: Callable[[dict[str, Any]], dict[str, Any]]
) -> threading.Thread:
    """Answer the next request with what `make` says of it."""

    def serve() -> None:
        request = json.loads(sock.recv(8192))
        sock.send(json.dumps({"n": request["n"], **make(request)}).encode())

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def took_s(call: Callable[[], object]) -> float:
    began_s = time.monotonic()
    call()
    return time.monotonic() - began_s


def test_a_join_that_nobody_reads_is_refused_and_then_nobody_waits(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, keeper = ends
    assert took_s(lambda: client.ask("join")) >= READ_S
    assert min(took_s(lambda: client.ask("join")) for _ in range(3)) < AT_ONCE_S
    assert client.ask("join") == REFUSED
    with pytest.raises(KeeperError):
        client.ask("leave")
    keeper.recv(8192)  # the first; there is no other
    keeper.setblocking(False)
    with pytest.raises(BlockingIOError):
        keeper.recv(8192)


def test_asks_again_once_the_old_request_was_read(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, keeper = ends
    assert client.ask("join") == REFUSED
    old = json.loads(keeper.recv(8192))
    # An answer to it comes too late for its caller, and is no other request's.
    keeper.send(json.dumps({"n": old["n"], "late": True}).encode())
    thread = answering(keeper, lambda _: {"index": 7})
    assert client.ask("join")["index"] == 7
    thread.join()


def test_what_was_read_too_late_is_refused(ends: tuple[KeeperClient, socket.socket]) -> None:
    client, keeper = ends
    thread = answering(keeper, lambda _: {"late": True})
    assert client.ask("join") == REFUSED
    thread.join()
    thread = answering(keeper, lambda _: {"late": True})
    with pytest.raises(KeeperError):
        client.ask("leave")
    thread.join()


def test_what_was_read_in_time_is_waited_for(ends: tuple[KeeperClient, socket.socket]) -> None:
    client, keeper = ends

    def slow(request: dict[str, Any]) -> dict[str, int]:
        # Until the client has looked whether it was read, and waits on.
        time.sleep(max(request["until"] - time.monotonic(), 0) + ANSWER_S / 4)
        return {"index": 7}

    thread = answering(keeper, slow)
    assert client.ask("join")["index"] == 7
    thread.join()


def test_what_was_read_and_never_answered_is_an_error(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, keeper = ends
    thread = threading.Thread(target=keeper.recv, args=(8192,))
    thread.start()
    with pytest.raises(KeeperError):
        client.ask("leave")
    thread.join()


def test_a_join_that_was_read_and_is_not_answered_is_not_waited_for(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    """Whether it has begun stands in its record, and it will not begin any more."""
    client, keeper = ends
    thread = threading.Thread(target=keeper.recv, args=(8192,))
    thread.start()
    assert client.ask("join") == {"overdue": True}
    thread.join()


def test_a_keeper_that_is_gone_for_good_is_an_error(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, keeper = ends
    keeper.close()
    with pytest.raises(KeeperError):
        client.ask("join")


def test_two_clients_of_a_process_do_not_take_each_other_s_answers(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    """The supervisor makes one for every dead worker that it buries."""
    first, keeper = ends
    with pytest.raises(KeeperError):
        first.ask("bury")
    old = json.loads(keeper.recv(8192))
    keeper.send(json.dumps({"n": old["n"], "late": True}).encode())
    thread = answering(keeper, lambda _: {})
    assert "late" not in KeeperClient(first._sock).ask("bury")
    thread.join()


# Asked without waiting


def say(keeper: socket.socket, number: int, **words: object) -> None:
    keeper.send(json.dumps({"n": number, **words}).encode())


def test_begins_and_hears_later_whose_answer_it_is(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, keeper = ends
    numbers = [client.begin("join", []) for _ in range(3)]
    assert client.answers() == []
    asked = [json.loads(keeper.recv(8192)) for _ in numbers]
    assert [one["n"] for one in asked] == numbers
    assert all(one["until"] > time.monotonic() for one in asked)
    for number in reversed(numbers[1:]):
        say(keeper, number, busy=0)
    say(keeper, 1, busy=0)  # nobody's
    assert [number for number, _ in client.answers()] == list(reversed(numbers[1:]))
    assert client.answers() == []
    say(keeper, numbers[0], late=True)
    assert client.answers() == [(numbers[0], {"n": numbers[0], "late": True})]
    say(keeper, numbers[0], busy=0)  # twice
    assert client.answers() == []


def test_an_answer_that_comes_while_another_is_waited_for_is_kept(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, keeper = ends
    told: list[int] = []
    client.on_early = lambda: told.append(1)
    number = client.begin("join", [])

    def serve() -> None:
        say(keeper, json.loads(keeper.recv(8192))["n"], index=7)
        say(keeper, json.loads(keeper.recv(8192))["n"], done=True)

    thread = threading.Thread(target=serve)
    thread.start()
    assert client.ask("leave")["done"] is True
    thread.join()
    assert told == [1]
    assert client.answers() == [(number, {"n": number, "index": 7})]


def test_nothing_is_begun_while_the_keeper_has_not_read_what_was_given_up(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, keeper = ends
    number = client.begin("join", [])
    client.give_up(number)
    assert took_s(lambda: client.begin("join", [])) < AT_ONCE_S
    assert client.begin("join", []) == 0
    assert json.loads(keeper.recv(8192))["n"] == number
    say(keeper, number, index=7)  # too late for anybody
    assert client.answers() == []
    assert client.begin("join", []) > number


def test_a_queue_without_room_is_no_reason_to_wait(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, _ = ends
    for _ in range(10_000):
        if not client.begin("join", [], padding="x" * 1000):
            return
    pytest.fail("it takes everything")


def test_who_has_no_keeper_any_more_hears_it(ends: tuple[KeeperClient, socket.socket]) -> None:
    client, keeper = ends
    number = client.begin("join", [])
    keeper.recv(8192)
    say(keeper, number, busy=0)
    keeper.close()
    assert [n for n, _ in client.answers()] == [number]
    with pytest.raises(KeeperError):
        client.answers()
    assert client.begin("join", []) == 0

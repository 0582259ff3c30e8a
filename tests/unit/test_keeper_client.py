"""Asking the splice keeper and waiting for its answer; the test plays the keeper."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from pyforwarder.datapath.splice import keeper_client
from pyforwarder.datapath.splice.keeper_client import KeeperClient, KeeperError
from pyforwarder.runtime.slowness import scaled_s

# Soon enough for a test; what the client itself takes is far from it.
READ_S: Final = 0.5
ANSWER_S: Final = 1.0


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


@pytest.fixture
def be_patient(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, an answer may take as long as it does on a busy host."""

    def patch() -> None:
        for name in ("_READ_TIMEOUT_S", "_ANSWER_TIMEOUT_S"):
            monkeypatch.setattr(keeper_client, name, 15.0)

    return patch


def fails(client: KeeperClient, do: str) -> None:
    with pytest.raises(KeeperError):
        client.ask(do)


def test_what_nobody_reads_is_an_error_and_then_nobody_waits(
    ends: tuple[KeeperClient, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, keeper = ends
    began_s = time.monotonic()
    fails(client, "worker_died")
    assert time.monotonic() - began_s >= READ_S

    def ask(*_: object) -> None:
        raise AssertionError("it is asked, and waited for")

    monkeypatch.setattr(client, "_ask", ask)
    for _ in range(3):
        fails(client, "worker_died")
    keeper.recv(8192)  # the first; there is no other
    keeper.setblocking(False)
    with pytest.raises(BlockingIOError):
        keeper.recv(8192)


def test_asks_again_once_the_old_request_was_read(
    ends: tuple[KeeperClient, socket.socket], be_patient: Callable[[], None]
) -> None:
    client, keeper = ends
    fails(client, "worker_died")
    old = json.loads(keeper.recv(8192))
    # An answer to it comes too late for its caller, and is no other request's.
    keeper.send(json.dumps({"n": old["n"], "late": True}).encode())
    be_patient()
    thread = answering(keeper, lambda _: {"index": 7})
    assert client.ask("adopt")["index"] == 7
    thread.join()


def test_what_was_read_too_late_is_an_error(ends: tuple[KeeperClient, socket.socket]) -> None:
    client, keeper = ends
    thread = answering(keeper, lambda _: {"late": True})
    fails(client, "worker_died")
    thread.join()


def test_what_was_read_in_time_is_waited_for(
    ends: tuple[KeeperClient, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, keeper = ends
    monkeypatch.setattr(keeper_client, "_ANSWER_TIMEOUT_S", 15.0)

    def slow(request: dict[str, Any]) -> dict[str, int]:
        # Until the client has looked whether it was read, and waits on.
        time.sleep(max(request["until"] - time.monotonic(), 0) + ANSWER_S / 4)
        return {"index": 7}

    thread = answering(keeper, slow)
    assert client.ask("adopt")["index"] == 7
    thread.join()


def test_what_was_read_and_never_answered_is_an_error(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, keeper = ends
    thread = threading.Thread(target=keeper.recv, args=(8192,))
    thread.start()
    fails(client, "worker_died")
    thread.join()


def test_a_keeper_that_is_gone_for_good_is_an_error(
    ends: tuple[KeeperClient, socket.socket],
) -> None:
    client, keeper = ends
    keeper.close()
    fails(client, "worker_died")


def test_two_clients_of_a_process_do_not_take_each_other_s_answers(
    ends: tuple[KeeperClient, socket.socket], be_patient: Callable[[], None]
) -> None:
    """The supervisor makes one for every dead worker that it buries."""
    first, keeper = ends
    with pytest.raises(KeeperError):
        first.ask("worker_died")
    old = json.loads(keeper.recv(8192))
    keeper.send(json.dumps({"n": old["n"], "late": True}).encode())
    be_patient()
    thread = answering(keeper, lambda _: {})
    assert "late" not in KeeperClient(first._sock).ask("worker_died")
    thread.join()

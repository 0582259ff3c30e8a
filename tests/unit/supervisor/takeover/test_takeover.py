"""What two daemons of one instance say to each other, and what becomes of anything else."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any, Final
from unittest.mock import Mock

import pytest

from pyforwarder.core.address import Address, SystemdSockets, UnixAddress
from pyforwarder.datapath.splice.abi import HANDSHAKES_FORM
from pyforwarder.errors import ControlError
from pyforwarder.runtime.channel import Channel
from pyforwarder.runtime.loop import Loop
from pyforwarder.supervisor.takeover import messages, successor
from pyforwarder.supervisor.takeover.messages import Ask, Offer, bind_of, parts_of
from pyforwarder.supervisor.takeover.predecessor import NoAnswerError, Predecessor, find
from pyforwarder.supervisor.takeover.retirement import Retirement
from pyforwarder.supervisor.takeover.successor import Successor

OFFER: Final[dict[str, Any]] = {
    "protocol": 1,
    "version": "0.2.0",
    "pid": 7,
    "config_path": None,
    "overrides": {},
    "detach": False,
    "verbosity": 0,
    "workers": 2,
    "serial": 1,
    "drained": [["web", "10.0.0.1:443"]],
    "environ": {},
    "splice": "none",
    "has_handshakes": False,
    "marks": [],
    "web": [],
    "activation": [],
    "places": [],
}


class PlayedDaemon(threading.Thread):
    """A daemon whose answers are written down, with how many descriptors each has.

    What it says of its own accord waits for no question.
    """

    def __init__(self, sock: socket.socket, answers: list[tuple[dict[str, Any], int]]) -> None:
        super().__init__(daemon=True)
        self._channel = Channel(sock)
        self._answers = answers
        self.heard: list[dict[str, Any]] = []

    def run(self) -> None:
        null = os.open(os.devnull, os.O_RDONLY)
        for answer, count in self._answers:
            message = None
            while "said" not in answer and (message is None or message.get("more")):
                with contextlib.suppress(BlockingIOError):
                    received = self._channel.receive()
                    if received is None:
                        break
                    message, fds = received
                    for fd in fds:
                        os.close(fd)
            if message is not None:
                self.heard.append(message)
            messages.send(self._channel, answer, [null] * count)
        os.close(null)
        self._channel.close()


@pytest.fixture
def played() -> Iterator[Any]:
    """Start one that gives these answers; what the successor has of it."""
    with contextlib.ExitStack() as stack:

        def begin(*answers: tuple[dict[str, Any], int]) -> tuple[PlayedDaemon, Predecessor]:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            one = PlayedDaemon(theirs, list(answers))
            one.start()
            stack.callback(one.join, 10)
            channel = Channel(ours)
            stack.callback(channel.close)
            return one, Predecessor(channel)

        yield begin


def offered(**changed: object) -> dict[str, Any]:
    return {"answer": "offer", **OFFER, **changed}


@pytest.mark.parametrize(
    "bind",
    [Address("127.0.0.1", 80), Address("::1", 0), UnixAddress("/run/x"), SystemdSockets("web")],
)
def test_an_address_arrives_as_it_was(bind: Any) -> None:
    assert bind_of(parts_of(bind)) == bind


@pytest.mark.parametrize("parts", [[], ["ip", "127.0.0.1"], ["ip", "127.0.0.1", 65536], ["x", "y"]])
def test_what_is_no_address_is_refused(parts: Any) -> None:
    with pytest.raises(ControlError, match="an address that is none"):
        bind_of(parts)


def test_an_offer_comes_with_more_descriptors_than_fit_into_a_message(played: Any) -> None:
    place = {
        "listener": "main",
        "wanted": ["ip", "127.0.0.1", 80],
        "bind": ["ip", "127.0.0.1", 80],
        "protocol": "tcp",
        "sockets": 501,
        "is_ours": True,
        "mode": None,
        "freebind": False,
    }
    one, predecessor = played((offered(places=[place], marks=["a"]), 4 + 1 + 501))
    assert predecessor.offer.workers == 2
    ((said, fds),) = predecessor.places
    assert (said.listener, len(fds)) == ("main", 501)
    assert list(predecessor.marks) == ["a"]
    assert one.heard[0]["do"] == "offer"
    predecessor.discard()
    assert not any(os.path.exists(f"/proc/self/fd/{fd}") for fd in fds)


@pytest.mark.parametrize(
    ("answer", "count", "message"),
    [
        (offered(protocol=2), 4, "cannot be taken over by this version: protocol"),
        (offered(workers=0), 4, "workers"),
        (offered(splice="perhaps"), 4, "splice"),
        (offered(), 5, "has sent 5 descriptors"),
        ({"error": "the daemon is ending"}, 0, "the daemon is ending"),
    ],
)
def test_an_offer_of_another_kind_is_refused_and_nothing_stays_open(
    played: Any, answer: dict[str, Any], count: int, message: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ControlError, match=message):
        played((answer, count))
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # the two channels, and the listing


def test_a_word_of_its_own_accord_is_no_answer(played: Any) -> None:
    _, predecessor = played((offered(), 4), ({"said": "released"}, 0), ({"answer": "pairs"}, 0))
    with pytest.raises(NoAnswerError, match="has ended, asked to take"):
        # The next answer is one to another question: it is not taken for this one.
        predecessor.take([])
    assert predecessor.is_released
    assert predecessor.is_gone
    assert predecessor.pairs() == []
    predecessor.discard()


@pytest.mark.parametrize("answers", [[], [({"answer": "last_id", "last_id": 5}, 0)]])
def test_one_that_was_told_to_end_is_not_succeeded(
    played: Any, answers: list[tuple[dict[str, Any], int]]
) -> None:
    """It has said so and hung up: that is no death, after which somebody has to go on."""
    one, predecessor = played((offered(), 4), *answers, ({"said": "ending"}, 0))
    for _ in answers:
        predecessor.last_id()
    one.join(10)
    with pytest.raises(ControlError, match="told to end meanwhile") as caught:
        predecessor.take([])
    assert not isinstance(caught.value, NoAnswerError)
    predecessor.discard()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours that lives until it is ended."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("where", ["offer", "last_id", "take"])
def test_a_keeper_that_was_not_let_go_of_is_ended(
    played: Any, child: subprocess.Popen[bytes], where: str
) -> None:
    """At each step another may have taken the place of one that died."""
    says = {name: {"keeper": child.pid} if name == where else {} for name in ("last_id", "take")}
    more = {"keeper": child.pid} if where == "offer" else {"keeper": 0}
    _, predecessor = played(
        (offered(pid=os.getpid(), splice="pinned", **more), 4),
        ({"answer": "last_id", "last_id": 5, **says["last_id"]}, 0),
        ({"answer": "take", **says["take"]}, 0),
    )
    predecessor.last_id()
    predecessor.take([])
    assert child.poll() is None
    assert predecessor.end_keeper()
    assert child.wait(10) == -signal.SIGKILL
    predecessor.discard()


def test_a_number_that_is_another_process_s_by_now_is_no_keeper(
    played: Any, child: subprocess.Popen[bytes]
) -> None:
    _, predecessor = played((offered(pid=1, splice="pinned", keeper=child.pid), 4))
    assert predecessor.end_keeper()
    assert child.poll() is None
    predecessor.discard()


@pytest.mark.parametrize(
    ("splice", "is_released", "ends"),
    [("pinned", False, True), ("pinned", True, False), ("none", False, False)],
)
def test_a_daemon_that_says_no_keeper_is_ended_if_it_has_not_let_go(
    played: Any,
    child: subprocess.Popen[bytes],
    *,
    splice: str,
    is_released: bool,
    ends: bool,
) -> None:
    """As an older version: its keeper ends with it."""
    _, predecessor = played((offered(pid=child.pid, splice=splice), 4))
    predecessor.is_released = is_released
    assert predecessor.end_keeper()
    assert (child.poll() is not None) == ends
    predecessor.discard()


def test_a_daemon_that_does_not_answer_is_ended(
    played: Any, child: subprocess.Popen[bytes]
) -> None:
    child.send_signal(signal.SIGSTOP)
    _, predecessor = played((offered(pid=child.pid), 4))
    assert predecessor.kill()
    assert child.wait(10) == -signal.SIGKILL
    assert predecessor.kill()  # it is gone
    predecessor.discard()


def test_only_the_daemons_user_may_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(successor, "peer_of", lambda _: (7, os.geteuid() + 1))
    with ours, pytest.raises(ControlError, match="own user"):
        Successor(loop, theirs, lambda *_: ({}, ()), lambda: None)
    assert theirs.fileno() < 0
    loop.dispose()


def test_another_kind_of_socket_is_refused() -> None:
    loop = Loop()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, pytest.raises(ControlError, match="own user"):
        Successor(loop, theirs, lambda *_: ({}, ()), lambda: None)
    loop.dispose()


def test_a_question_that_is_none_is_answered_and_its_end_is_told() -> None:
    loop, asked, gone = Loop(), [], []

    def obey(ask: Ask, fds: list[int]) -> tuple[dict[str, object], tuple[int, ...]]:
        asked.append((ask.do, len(fds)))
        return {"last_id": 5}, ()

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours)
    successor = Successor(loop, theirs, obey, lambda: gone.append(1))
    channel.send({"do": "dance"})
    loop.run_once(1.0)
    received = channel.receive()
    assert received is not None
    assert "does not understand" in received[0]["error"]
    with open(os.devnull) as file:
        channel.send({"more": True}, [file.fileno()] * 3)
        channel.send({"do": "last_id"}, [file.fileno()])
    loop.run_once(1.0)
    loop.run_once(1.0)
    assert asked == [("last_id", 4)]
    received = channel.receive()
    assert received == ({"answer": "last_id", "last_id": 5}, [])
    channel.close()
    loop.run_once(1.0)
    assert gone == [1]
    assert successor.is_over
    assert successor.fds() == []
    loop.dispose()


def test_an_offer_has_a_row_for_each_descriptor() -> None:
    offer = Offer.model_validate({**OFFER, "has_handshakes": True, "marks": ["a", "b"]})
    assert offer.descriptors() == 7
    tokens = {"share": 3, "free_at_s": [0.0, 1.5, 2.5, 3.5]}
    offer = Offer.model_validate({**OFFER, "used_tokens": tokens})
    assert offer.descriptors() == 4 + 4 * offer.workers


@pytest.mark.parametrize(
    "tokens",
    [
        {"share": 4, "free_at_s": [0.0, 0.0, 0.0, 0.0]},
        {"share": -1, "free_at_s": [0.0, 0.0, 0.0, 0.0]},
        {"share": 0, "free_at_s": [0.0]},
        {"share": 0, "free_at_s": ["soon", 0.0, 0.0, 0.0]},
    ],
)
def test_tables_of_tokens_that_make_no_sense_are_refused(tokens: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="used_tokens"):
        Offer.model_validate({**OFFER, "used_tokens": tokens})


def test_a_successor_that_the_control_socket_refuses_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))

    def control(_fd: int) -> object:
        raise ControlError("another upgrade is under way")

    with pytest.raises(ControlError, match="under way"):
        find(control)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("asked", "is_given"), [({}, False), ({"handshakes": 2}, True)])
def test_the_map_of_handshakes_is_for_a_successor_that_knows_its_form(
    asked: dict[str, Any], is_given: bool
) -> None:
    """Another build would read, and write, beyond the ends of its values."""
    assert HANDSHAKES_FORM == 2
    one = Mock()
    one.in_force.listeners.bound = {}
    one.in_force.drained, one.web.listening, one.source.overrides, one.environ = [], {}, {}, {}
    one.activation.all.return_value = one.down.return_value = []
    one.memory.used_tokens.fds = []
    one.datapaths.handshakes_fd, one.options.verbosity = 77, 0
    offer, fds = Retirement(one)._obey(Ask.model_validate({"do": "offer", **asked}), [])
    assert offer["has_handshakes"] == is_given
    assert (77 in fds) == is_given
    assert len(fds) == 4 + is_given


def test_a_successor_says_which_map_of_handshakes_it_knows(played: Any) -> None:
    one, predecessor = played((offered(), 4))
    assert one.heard[0]["handshakes"] == HANDSHAKES_FORM
    predecessor.discard()

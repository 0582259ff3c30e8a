"""Programs that speak to a forwarder: over its control socket, and through it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyforwarder import client
from pyforwarder.client import ControlClient
from pyforwarder.core import token
from pyforwarder.core.address import Address
from pyforwarder.errors import (
    ConfigError,
    ControlError,
    ForwarderError,
    NotRunningError,
    RefusedError,
    UsageError,
)
from tests.helpers.fake_control import PAIR, FakeControl, Refusal, Request, environ, make_instance
from tests.helpers.waiting import DEADLINE_S

SECRET = b"0123456789abcdef0123456789abcdef"


@contextlib.contextmanager
def control_socket(path: Path, reply: Callable[[socket.socket], None]) -> Iterator[None]:
    """A listener at `path` whose one connection is handed to `reply`."""
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.settimeout(DEADLINE_S)
                reply(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(timeout=DEADLINE_S)
        assert not thread.is_alive()


# ---------------------------------------------------------------------- the control socket


def test_pairs_are_the_daemons_rows(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    with FakeControl(instance, lambda *_: [dict(PAIR)]) as control:
        assert ControlClient(instance).pairs() == [PAIR]
    assert control.requests == [{"do": "show", "what": "pairs"}]


def test_each_call_sends_the_request_of_the_protocol(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    results: dict[str, object] = {
        "flush": {"flushed": [1], "unknown": [2]},
        "forward": {"id": 3},
        "listen_port": {"port": 9000},
        "config": {"text": "", "source": "built-in"},
        "reload": {"listeners": 1},
    }
    with FakeControl(instance, lambda request, _: results.get(request["do"], {})) as control:
        ask = ControlClient(instance)
        ask.ping()
        assert ask.flush([1, 2]) == {"flushed": [1], "unknown": [2]}
        ask.flush_all()
        assert ask.forward(42, 5, 6) == 3
        assert ask.listen_port(9000) == 9000
        assert ask.config() == ("", "built-in")
        assert ask.reload() == {"listeners": 1}
        ask.down(now=True)
    assert control.requests == [
        {"do": "ping"},
        {"do": "flush", "ids": [1, 2]},
        {"do": "flush", "all": True},
        {"do": "forward", "pid": 42, "fds": [5, 6]},
        {"do": "listen_port", "port": 9000},
        {"do": "config"},
        {"do": "reload"},
        {"do": "down", "now": True},
    ]


def test_ten_thousand_pairs_come_in_one_answer(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    rows = [{**PAIR, "id": number} for number in range(10_000)]
    with FakeControl(instance, lambda *_: rows):
        assert ControlClient(instance).pairs() == rows


@pytest.mark.parametrize(
    ("kind", "error_type", "exit_code"),
    [
        ("refused", ControlError, 1),
        ("internal", ForwarderError, 1),
        ("usage", UsageError, 2),
        ("config", ConfigError, 2),
    ],
)
def test_kind_of_refusal_becomes_the_error(
    tmp_path: Path, kind: str, error_type: type[ForwarderError], exit_code: int
) -> None:
    instance = make_instance(tmp_path)

    def refuse(*_: object) -> object:
        raise Refusal("no such thing", kind=kind)

    with FakeControl(instance, refuse), pytest.raises(error_type, match="no such thing") as caught:
        ControlClient(instance).ping()
    assert type(caught.value) is error_type
    assert caught.value.exit_code == exit_code


def test_config_error_keeps_line_and_key(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)

    def refuse(*_: object) -> object:
        raise Refusal("f.yaml, line 3, log.level: bad", kind="config", line=3, path="log.level")

    with FakeControl(instance, refuse), pytest.raises(ConfigError) as caught:
        ControlClient(instance).reload()
    assert str(caught.value) == "f.yaml, line 3, log.level: bad"
    assert (caught.value.line, caught.value.path) == (3, "log.level")


def test_no_daemon_is_not_running(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="'lab' is not running") as caught:
        ControlClient(make_instance(tmp_path, "lab")).ping()
    assert caught.value.exit_code == 3


def test_socket_of_a_killed_daemon_is_not_running(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    FakeControl(instance, lambda *_: None).close()
    assert instance.control.is_socket()
    with pytest.raises(NotRunningError):
        ControlClient(instance).ping()


def test_daemon_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    given_up = threading.Event()
    with control_socket(instance.control, lambda _: assert_set(given_up)):
        with pytest.raises(ForwarderError, match=r"did not answer within 0\.05 s"):
            ControlClient(instance, timeout_s=0.05).ping()
        given_up.set()


def assert_set(event: threading.Event) -> None:
    assert event.wait(DEADLINE_S)


def test_answer_that_trickles_is_given_up_all_the_same(tmp_path: Path) -> None:
    """The deadline is for the whole answer, not for each piece of it."""
    instance = make_instance(tmp_path)
    given_up = threading.Event()

    def trickle(connection: socket.socket) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while not given_up.wait(0.005):
                connection.send(b" ")

    with control_socket(instance.control, trickle):
        with pytest.raises(ForwarderError, match="did not answer"):
            ControlClient(instance, timeout_s=0.1).ping()
        given_up.set()


def test_full_backlog_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    instance.run_dir.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(instance.control))
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(instance.control))  # the one that fits
        with pytest.raises(ForwarderError, match="took no connection within"):
            ControlClient(instance, timeout_s=0.05).ping()


@pytest.mark.parametrize("answer", [b"", b"{", b'{"ok":true', b"\n", b"[]\n", b'{"ok":1}\n'])
def test_answer_that_is_none_is_an_error(tmp_path: Path, answer: bytes) -> None:
    instance = make_instance(tmp_path)

    def reply(connection: socket.socket) -> None:
        connection.recv(1024)
        connection.sendall(answer)

    with control_socket(instance.control, reply), pytest.raises(ForwarderError):
        ControlClient(instance).ping()


@pytest.mark.parametrize("result", [None, 3, {"pairs": []}, [3], "text"])
def test_rows_that_are_none_are_an_error(tmp_path: Path, result: object) -> None:
    instance = make_instance(tmp_path)
    with (
        FakeControl(instance, lambda *_: result),
        pytest.raises(ForwarderError, match="no list of rows"),
    ):
        ControlClient(instance).pairs()


# ---------------------------------------------------------------------- forward


def test_forward_hands_over_both_sockets_and_closes_them(tmp_path: Path) -> None:
    a, far_a = socket.socketpair()
    b, far_b = socket.socketpair()

    def join(request: Request, fds: list[int]) -> object:
        # proof that these are the two ends, in this order: write through them
        os.write(fds[0], b"a")
        os.write(fds[1], b"b")
        return {"id": 23}

    with FakeControl(make_instance(tmp_path), join) as control, far_a, far_b:
        assert client.forward(a, b, environ=environ(tmp_path)) == 23
        assert (far_a.recv(9), far_b.recv(9)) == (b"a", b"b")
        assert (a.fileno(), b.fileno()) == (-1, -1)
        # nobody holds them any more: neither this program nor the (fake) daemon
        assert (far_a.recv(9), far_b.recv(9)) == (b"", b"")
    assert control.requests == [{"do": "join"}]


def test_forward_that_is_refused_leaves_both_sockets_open(tmp_path: Path) -> None:
    def refuse(*_: object) -> object:
        raise Refusal("not a connected stream socket", kind="refused")

    a, far_a = socket.socketpair()
    b, far_b = socket.socketpair()
    with FakeControl(make_instance(tmp_path, "lab"), refuse), a, b, far_a, far_b:
        with pytest.raises(ControlError, match="not a connected"):
            client.forward(a, b, instance="lab", environ=environ(tmp_path))
        a.sendall(b"still mine")
        assert far_a.recv(99) == b"still mine"


# ---------------------------------------------------------------------- the instruction


def test_instruction_is_the_example_of_the_contract() -> None:
    assert client.instruction("127.0.0.1:9001") == b"18127.0.0.1:900102"


@pytest.mark.parametrize("destination", ["nowhere", "1.2.3.4", "::1:80", "1.2.3.4:0", "a b:1"])
def test_destination_that_is_none_is_a_usage_error(destination: str) -> None:
    with pytest.raises(UsageError):
        client.instruction(destination)


def test_name_too_long_for_two_digits_is_a_usage_error() -> None:
    name = ".".join(["a" * 30] * 3)
    assert client.instruction(f"{name}:22")[:2] == b"99"
    with pytest.raises(UsageError, match="100 bytes"):
        client.instruction(f"{name}a:22")


def test_signed_instruction_is_what_token_verifies() -> None:
    line = client.instruction(
        "[::1]:22", key=("ops", SECRET), source="10.0.0.0/8", expires_unix_s=1000
    )
    signed = token.read(line)
    assert isinstance(signed, token.SignedInstruction)
    keys = token.TokenKeys({"ops": SECRET})
    inside, outside = Address("10.1.1.1", 4000), Address("11.1.1.1", 4000)
    assert keys.refusal(signed, client=inside, now_unix_s=999) is None
    assert keys.refusal(signed, client=outside, now_unix_s=999) is not None


def test_signed_instructions_of_one_second_are_not_the_same_with_a_nonce() -> None:
    lines = {
        client.instruction("10.0.0.7:22", key=("ops", SECRET), expires_unix_s=1000, nonce=True)
        for _ in range(100)
    }
    assert len(lines) == 100
    keys = token.TokenKeys({"ops": SECRET})
    for line in lines:
        signed = token.read(line)
        assert isinstance(signed, token.SignedInstruction)
        assert keys.refusal(signed, client=None, now_unix_s=999) is None
    # As gateways of version 0.1 read it.
    plain = client.instruction("10.0.0.7:22", key=("ops", SECRET), expires_unix_s=1000)
    assert plain == token.make(
        Address("10.0.0.7", 22), expires_unix_s=1000, key_id="ops", key=SECRET
    )


def test_signing_for_a_wrong_network_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        client.instruction("1.2.3.4:5", key=("ops", SECRET), source="10.0.0.1/8")


# ---------------------------------------------------------------------- connect


@contextlib.contextmanager
def forwarder(
    play: Callable[[socket.socket], None], family: int = socket.AF_INET, path: str = ""
) -> Iterator[str]:
    """A forwarder whose one connection follows `play`; gives where it listens."""
    with contextlib.ExitStack() as stack:
        if family == socket.AF_UNIX:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen()
            where = f"unix:{path}"
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            where = f"127.0.0.1:{listener.getsockname()[1]}"

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.settimeout(DEADLINE_S)
                play(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield where
        thread.join(timeout=DEADLINE_S)
        assert not thread.is_alive()


def answering(
    reply: bytes, *, instruction: bytes = b"18127.0.0.1:900102"
) -> Callable[[socket.socket], None]:
    def play(connection: socket.socket) -> None:
        assert connection.recv(len(instruction), socket.MSG_WAITALL) == instruction
        connection.sendall(reply)

    return play


def test_connect_returns_a_socket_at_the_servers_first_byte() -> None:
    """The answer and the server's first bytes come in one segment: only the answer is read."""
    with (
        forwarder(answering(b"06OK56" + b"SSH-2.0-server\r\n")) as via,
        client.connect("127.0.0.1:9001", via=via) as connection,
    ):
        assert connection.gettimeout() is None
        assert connection.recv(16, socket.MSG_WAITALL) == b"SSH-2.0-server\r\n"


def test_connect_reads_an_answer_that_comes_byte_by_byte() -> None:
    def play(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.recv(18, socket.MSG_WAITALL)
        for byte in b"06OK56x":
            connection.send(bytes([byte]))

    with (
        forwarder(play) as via,
        client.connect(Address("127.0.0.1", 9001), via=via) as connection,
    ):
        assert connection.recv(9) == b"x"


def test_connect_through_a_unix_listener(tmp_path: Path) -> None:
    path = str(tmp_path / "listener")
    with (
        forwarder(answering(b"06OK56"), socket.AF_UNIX, path) as via,
        client.connect("127.0.0.1:9001", via=via) as connection,
    ):
        assert connection.family == socket.AF_UNIX


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (b"14ERR denied83", "denied"),
        (b"17ERR malformed20", "malformed"),
        (b"12ERR busy15", "busy"),
    ],
)
def test_refusal_carries_the_forwarders_word(reply: bytes, code: str) -> None:
    with forwarder(answering(reply)) as via, pytest.raises(RefusedError) as caught:
        client.connect("127.0.0.1:9001", via=via)
    assert caught.value.code == code
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-x\r\n",
        b"05OK5",
        b"06NO00",
        b"06OK57",
        b"14ERR denied84",
        b"06OK",
        b"",
    ],
)
def test_answer_that_is_no_forwarders_is_an_error(reply: bytes) -> None:
    with forwarder(answering(reply)) as via, pytest.raises(ForwarderError) as caught:
        client.connect("127.0.0.1:9001", via=via)
    assert type(caught.value) is ForwarderError


def test_forwarder_that_says_nothing_is_given_up() -> None:
    given_up = threading.Event()
    with forwarder(lambda _: assert_set(given_up)) as via:
        with pytest.raises(ForwarderError, match="no answer in time"):
            client.connect("127.0.0.1:9001", via=via, timeout_s=0.05)
        given_up.set()


def test_forwarder_that_refuses_the_connection_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ForwarderError, match=f"forwarder 127.0.0.1:{port}: Connection refused"):
        client.connect("127.0.0.1:9001", via=f"127.0.0.1:{port}")


def test_connect_without_ack_waits_for_nothing() -> None:
    returned = threading.Event()

    def play(connection: socket.socket) -> None:
        assert_set(returned)
        connection.sendall(b"06OK56")  # the server's own bytes, though they look like an answer

    with (
        forwarder(play) as via,
        client.connect("127.0.0.1:9001", via=via, ack=False) as connection,
    ):
        returned.set()
        assert connection.recv(6, socket.MSG_WAITALL) == b"06OK56"


def test_connect_with_a_key_signs_for_the_time_that_was_asked() -> None:
    lines: list[bytes] = []

    def play(connection: socket.socket) -> None:
        while not lines or not lines[0].endswith(b"\r\n"):
            lines[:] = [b"".join(lines) + connection.recv(512)]
        connection.sendall(b"06OK56")

    before_s = time.time_ns() // 10**9
    with forwarder(play) as via:
        client.connect("10.0.0.5:22", via=via, key=("ops", SECRET), lifetime_s=7).close()
    after_s = time.time_ns() // 10**9
    signed = token.read(lines[0])
    assert isinstance(signed, token.SignedInstruction)
    keys = token.TokenKeys({"ops": SECRET})
    assert keys.refusal(signed, client=None, now_unix_s=after_s) is None
    assert before_s + 7 <= signed.expires_unix_s <= after_s + 7


def test_via_that_is_no_address_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="via"):
        client.connect("127.0.0.1:9001", via="nowhere")

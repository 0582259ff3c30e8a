"""`connect`: bytes and ends of file between stdin, stdout and a connection."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyforwarder.cli.relay import RelayError, relay
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.command import run
from tests.helpers.fake_control import FakeControl, environ, make_instance
from tests.helpers.waiting import DEADLINE_S

INSTRUCTION = b"18127.0.0.1:900102"


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    far.settimeout(DEADLINE_S)
    return near, far


@dataclass(slots=True)
class Running:
    """A relay in a thread, and the far ends of its three descriptors."""

    far: socket.socket
    stdin_fd: int  # written by the test
    stdout_fd: int  # read by the test
    thread: threading.Thread
    errors: list[RelayError]

    def ended(self) -> list[RelayError]:
        """Wait until the relay has returned; what it raised."""
        self.thread.join(timeout=DEADLINE_S)
        assert not self.thread.is_alive()
        return self.errors

    def read(self, count: int) -> bytes:
        """Exactly that many bytes of stdout, fewer only at its end."""
        data = b""
        while len(data) < count:
            assert select.select([self.stdout_fd], [], [], DEADLINE_S)[0], f"only {data!r} came"
            chunk = os.read(self.stdout_fd, count - len(data))
            if not chunk:
                break
            data += chunk
        return data


@contextlib.contextmanager
def running(ends: Callable[[], tuple[int, int]]) -> Iterator[Running]:
    """A relay over TCP; `ends` makes (its end, the test's end) of stdin and stdout alike."""
    near, far = tcp_pair()
    stdin_far, stdin_near = ends()
    stdout_near, stdout_far = ends()
    errors: list[RelayError] = []

    def work() -> None:
        try:
            relay(near, stdin_fd=stdin_near, stdout_fd=stdout_near)
        except RelayError as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    state = Running(far, stdin_far, stdout_far, thread, errors)
    try:
        yield state
    finally:
        far.close()
        for fd in (state.stdin_fd, state.stdout_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        thread.join(timeout=DEADLINE_S)
        os.close(stdin_near)
        os.close(stdout_near)
        assert not thread.is_alive()


def pipe_ends() -> tuple[int, int]:
    """A pipe: (end that is written, end that is read)."""
    read_fd, write_fd = os.pipe()
    return write_fd, read_fd


def socket_ends() -> tuple[int, int]:
    """A unix socket pair, as ssh gives to a ProxyCommand on some systems."""
    a, b = socket.socketpair()
    return a.detach(), b.detach()


KINDS = pytest.mark.parametrize("ends", [pipe_ends, socket_ends])


@KINDS
def test_bytes_go_both_ways_before_any_end(ends: Callable[[], tuple[int, int]]) -> None:
    with running(ends) as it:
        os.write(it.stdin_fd, b"question")
        assert it.far.recv(99) == b"question"
        it.far.sendall(b"answer")
        assert it.read(6) == b"answer"


@KINDS
def test_end_of_stdin_is_a_fin_and_the_answer_still_comes(
    ends: Callable[[], tuple[int, int]],
) -> None:
    with running(ends) as it:
        os.write(it.stdin_fd, b"question")
        os.close(it.stdin_fd)
        it.stdin_fd = -1
        assert it.far.recv(99, socket.MSG_WAITALL) == b"question"
        assert it.far.recv(1) == b""
        it.far.sendall(b"answer")
        it.far.close()
        assert it.read(99) == b"answer"
        assert it.ended() == []


@KINDS
def test_end_of_the_connection_ends_stdout_and_stdin_is_still_sent(
    ends: Callable[[], tuple[int, int]],
) -> None:
    with running(ends) as it:
        it.far.sendall(b"greeting")
        it.far.shutdown(socket.SHUT_WR)
        assert it.read(99) == b"greeting"  # and its end
        os.write(it.stdin_fd, b"late")
        os.close(it.stdin_fd)
        it.stdin_fd = -1
        assert it.far.recv(99, socket.MSG_WAITALL) == b"late"
        assert it.ended() == []


@KINDS
def test_slow_reader_of_stdout_does_not_stop_stdin(ends: Callable[[], tuple[int, int]]) -> None:
    """The far side floods us while nobody reads stdout: the other direction still moves."""
    with running(ends) as it:
        it.far.setblocking(False)
        sent = 0
        block = b"x" * 65536

        def is_stuck() -> bool:
            """Nothing more is taken for a fifth of a second."""
            nonlocal sent
            while select.select([], [it.far], [], 0.2)[1]:
                sent += it.far.send(block)
            return True

        assert is_stuck()
        it.far.settimeout(DEADLINE_S)
        os.write(it.stdin_fd, b"still here")
        assert it.far.recv(99) == b"still here"
        it.far.shutdown(socket.SHUT_WR)
        os.close(it.stdin_fd)
        it.stdin_fd = -1
        assert it.read(sent + 1) == b"x" * sent
        assert it.ended() == []


@KINDS
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_both_ways_arrives_whole(
    ends: Callable[[], tuple[int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    up, down = rng.randbytes(rng.randrange(3_000_000)), rng.randbytes(rng.randrange(3_000_000))
    cuts = [rng.randrange(1, 200_000) for _ in range(64)]

    def in_pieces(data: bytes) -> Iterator[bytes]:
        at = 0
        while at < len(data):
            size = cuts[at % len(cuts)]
            yield data[at : at + size]
            at += size

    with running(ends) as it:

        def write_stdin() -> None:
            for piece in in_pieces(up):
                view = memoryview(piece)
                while view:
                    view = view[os.write(it.stdin_fd, view) :]
            fd, it.stdin_fd = it.stdin_fd, -1
            os.close(fd)

        def write_far() -> None:
            for piece in in_pieces(down):
                it.far.sendall(piece)
            it.far.shutdown(socket.SHUT_WR)

        got_up = bytearray()

        def read_far() -> None:
            while data := it.far.recv(1 << 16):
                got_up.extend(data)

        threads = [threading.Thread(target=work) for work in (write_stdin, write_far, read_far)]
        for thread in threads:
            thread.start()
        got_down = it.read(len(down) + 1)
        for thread in threads:
            thread.join(timeout=DEADLINE_S)
        assert it.ended() == []
        assert got_down == down, f"seed {seed}"
        assert bytes(got_up) == up, f"seed {seed}"


def reset(connection: socket.socket) -> None:
    """Close with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_reset_is_an_error_and_ends_at_once_with_stdin_open() -> None:
    with running(pipe_ends) as it:
        it.far.sendall(b"before")
        assert it.read(6) == b"before"
        reset(it.far)
        assert len(it.ended()) == 1
        assert it.read(1) == b""


def test_reset_after_the_connections_end_is_noticed_with_stdin_open() -> None:
    with running(pipe_ends) as it:
        it.far.shutdown(socket.SHUT_WR)
        assert it.read(1) == b""
        reset(it.far)
        assert len(it.ended()) == 1


def test_stdout_whose_reader_left_resets_the_connection() -> None:
    with running(pipe_ends) as it:
        os.close(it.stdout_fd)
        it.stdout_fd = -1
        it.far.sendall(b"nobody gets this")
        assert [str(error) for error in it.ended()] == ["stdout: Broken pipe"]
        with pytest.raises(ConnectionResetError):
            it.far.recv(1)


def test_both_ends_of_ours_gone_is_a_quiet_end_though_the_server_says_nothing() -> None:
    """An ssh that is through: stdin is at its end and nobody reads stdout any more."""
    with running(pipe_ends) as it:
        os.close(it.stdin_fd)
        os.close(it.stdout_fd)
        it.stdin_fd = it.stdout_fd = -1
        assert it.ended() == []
        assert it.far.recv(1) == b""  # no reset


def test_shared_descriptors_stay_blocking() -> None:
    with running(pipe_ends) as it:
        far_flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (it.stdin_fd, it.stdout_fd)]
        os.write(it.stdin_fd, b"x")
        assert it.far.recv(9) == b"x"
        assert not any(flags & os.O_NONBLOCK for flags in far_flags)


def test_stdin_from_a_file_and_stdout_to_a_file(tmp_path: Path) -> None:
    near, far = tcp_pair()
    source, sink = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"skipped" + b"q" * 300_000)
    with far, source.open("rb") as stdin, sink.open("wb") as stdout:
        stdin.seek(7)  # somebody read the beginning before us
        stdout.write(b"kept:")
        stdout.flush()
        received: list[bytes] = []

        def serve() -> None:
            while data := far.recv(1 << 16):
                received.append(data)
            far.sendall(b"a" * 300_000)
            far.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve)
        thread.start()
        # unbuffered position: what relay reads starts where the file object's descriptor stands
        os.lseek(stdin.fileno(), 7, os.SEEK_SET)
        relay(near, stdin_fd=stdin.fileno(), stdout_fd=stdout.fileno())
        thread.join(timeout=DEADLINE_S)
    assert b"".join(received) == b"q" * 300_000
    assert sink.read_bytes() == b"kept:" + b"a" * 300_000


def test_no_stdin_at_all_counts_as_its_end() -> None:
    near, far = tcp_pair()
    closed_fd = fcntl.fcntl(near, fcntl.F_DUPFD, 900)  # a number that is not used again meanwhile
    os.close(closed_fd)
    stdout_far, stdout_near = socket_ends()
    with far:
        far.sendall(b"hello")
        far.shutdown(socket.SHUT_WR)
        relay(near, stdin_fd=closed_fd, stdout_fd=stdout_near)
        assert far.recv(1) == b""
    assert os.read(stdout_far, 99) == b"hello"
    os.close(stdout_far)
    os.close(stdout_near)


def test_close_of_a_unix_connection_with_nothing_left_to_send_is_no_error() -> None:
    near, far = socket.socketpair()
    stdin_far, stdin_near = pipe_ends()
    stdout_near, stdout_far = pipe_ends()
    far.sendall(b"bye")
    far.close()
    relay(near, stdin_fd=stdin_near, stdout_fd=stdout_near)
    assert os.read(stdout_far, 99) == b"bye"
    for fd in (stdin_far, stdin_near, stdout_near, stdout_far):
        os.close(fd)


# ---------------------------------------------------------------------- the command


@contextlib.contextmanager
def forwarder() -> Iterator[tuple[str, socket.socket]]:
    """A listener that stands for a forwarder: (where, listening socket); a test accepts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        yield f"127.0.0.1:{listener.getsockname()[1]}", listener


def serve_once(listener: socket.socket, answer: bytes) -> threading.Thread:
    """Take one connection, check its instruction, answer, echo until its end."""

    def work() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(DEADLINE_S)
            assert connection.recv(len(INSTRUCTION), socket.MSG_WAITALL) == INSTRUCTION
            connection.sendall(answer)
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def connect_process(root: Path, *words: str) -> subprocess.Popen[bytes]:
    """`pyforwarder connect` as ssh would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "pyforwarder", "connect", "127.0.0.1:9001", *words],
        env={**os.environ, **environ(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_command_carries_a_megabyte_through_pipes(tmp_path: Path) -> None:
    data = random.Random(23).randbytes(1 << 20)
    with forwarder() as (via, listener):
        thread = serve_once(listener, b"06OK56")
        done = connect_process(tmp_path, "--via", via)
        stdout, stderr = done.communicate(data, timeout=scaled_s(30))
        thread.join(timeout=DEADLINE_S)
    assert (done.returncode, stderr) == (0, b"")
    assert hashlib.sha256(stdout).digest() == hashlib.sha256(data).digest()


def test_command_killed_half_way_is_a_reset_for_the_server(tmp_path: Path) -> None:
    with forwarder() as (via, listener):
        command = connect_process(tmp_path, "--via", via)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(DEADLINE_S)
            connection.recv(len(INSTRUCTION), socket.MSG_WAITALL)
            connection.sendall(b"06OK56")
            assert command.stdin is not None
            command.stdin.write(b"half of it")
            command.stdin.flush()
            assert connection.recv(99) == b"half of it"
            command.kill()
            with pytest.raises(ConnectionResetError):
                connection.recv(99)
        command.communicate(timeout=DEADLINE_S)


def test_command_that_is_refused_prints_the_reason_and_no_data(tmp_path: Path) -> None:
    with forwarder() as (via, listener):
        thread = serve_once(listener, b"14ERR denied83")
        done = run(tmp_path, "connect", "127.0.0.1:9001", "--via", via)
        thread.join(timeout=DEADLINE_S)
    assert (done.code, done.stdout, done.raw) == (1, "", b"")
    assert done.stderr == "pyforwarder: 127.0.0.1:9001: the forwarder says 'denied'\n"


def test_command_finds_the_running_instances_listener(tmp_path: Path) -> None:
    """Its port may be any; a wildcard bind is reached over loopback."""
    with forwarder() as (via, listener):
        port = via.rpartition(":")[2]
        rows = [
            {"name": "dns", "bind": "127.0.0.1:53", "protocol": "udp"},
            {"name": "main", "bind": f"0.0.0.0:{port}", "protocol": "tcp"},
        ]
        thread = serve_once(listener, b"06OK56")
        with FakeControl(make_instance(tmp_path, "lab"), lambda *_: rows):
            words = ("connect", "127.0.0.1:9001", "--instance", "lab")
            done = run(tmp_path, *words, stdin=b"hello")
        thread.join(timeout=DEADLINE_S)
    assert (done.code, done.raw, done.stderr) == (0, b"hello", "")

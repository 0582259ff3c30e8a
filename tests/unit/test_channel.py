"""Messages between supervisor and worker: whole, of any size, with their descriptors."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from pyforwarder.runtime import channel as channel_module
from pyforwarder.runtime.channel import MOST_SOCKETS, Channel, text_from_fd, text_to_fd


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before


def receive(channel: Channel) -> tuple[dict[str, object], list[int]]:
    received = channel.receive()
    assert received is not None
    return received


def test_messages_stay_apart_and_in_order(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    for number in range(3):
        ours.send({"do": "flush", "n": number})
    assert [receive(theirs) for _ in range(3)] == [
        ({"do": "flush", "n": number}, []) for number in range(3)
    ]
    with pytest.raises(BlockingIOError):
        theirs.receive()


def test_descriptor_arrives_open_and_stays_the_senders(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    read_fd, write_fd = os.pipe()
    ours.send({"do": "join"}, [write_fd])
    _, (copy,) = receive(theirs)
    os.close(write_fd)
    os.write(copy, b"through")
    os.close(copy)
    assert os.read(read_fd, 100) == b"through"
    assert os.read(read_fd, 100) == b""
    os.close(read_fd)


def test_received_descriptor_is_not_inherited_by_programs(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send({}, [0])
    _, (copy,) = receive(theirs)
    assert not os.get_inheritable(copy)
    os.close(copy)


@pytest.mark.parametrize("size", [100, 128 * 1024, 5_000_011])
def test_message_of_any_size_arrives_with_its_descriptors(
    ends: tuple[Channel, Channel], size: int
) -> None:
    # `flush --all` answers with the ids of all pairs.
    ours, theirs = ends
    ours.send({"result": "x" * size}, [1, 2])
    message, fds = receive(theirs)
    assert message == {"result": "x" * size}
    assert len(fds) == 2
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("large", [False, True])
def test_as_many_listeners_as_are_promised_fit(ends: tuple[Channel, Channel], large: bool) -> None:
    ours, theirs = ends
    names = ["x" * (1000 if large else 1)] * MOST_SOCKETS
    ours.send({"listeners": names}, [0] * (MOST_SOCKETS + 1))
    message, fds = receive(theirs)
    assert message == {"listeners": names}
    assert len(fds) == MOST_SOCKETS + 1
    for fd in fds:
        os.close(fd)


def test_other_end_that_has_gone_is_the_end(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send({"last": True})
    ours.close()
    assert receive(theirs) == ({"last": True}, [])
    assert theirs.receive() is None
    with pytest.raises(OSError, match="pipe"):
        theirs.send({})


def test_other_end_that_does_not_read_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "SEND_TIMEOUT_S", 0.05)
    ours, theirs = Channel.pair()

    def fill() -> None:
        while True:
            ours.send({"x": "y" * 10_000})

    started_s = time.monotonic()
    with pytest.raises(OSError, match="temporarily unavailable"):
        fill()
    assert time.monotonic() - started_s >= 0.05
    ours.close()
    theirs.close()


def test_text_in_a_descriptor_is_read_from_its_beginning_and_closed() -> None:
    fd = text_to_fd("listeners: []\n" * 10_000 + "é")
    assert text_from_fd(fd) == "listeners: []\n" * 10_000 + "é"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_descriptor_that_is_no_file_is_not_read() -> None:
    # A pipe would block its reader.
    read_fd, write_fd = os.pipe()
    with pytest.raises(ValueError, match="no message"):
        text_from_fd(read_fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read_fd)
    os.close(write_fd)


def test_what_is_no_message_is_an_error(ends: tuple[Channel, Channel]) -> None:
    _, theirs = ends
    with socket.socket(fileno=os.dup(ends[0].fileno())) as raw:
        raw.send(b"no json")
    with pytest.raises(ValueError, match="Expecting value"):
        theirs.receive()

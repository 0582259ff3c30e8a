"""Being told of files that were written: what the library is relied on for."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyforwarder.runtime.inotify import Inotify

# How many events the kernel keeps for an instance: the next one is lost (inotify(7)).
MOST_QUEUED = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


@pytest.fixture
def inotify() -> Iterator[Inotify]:
    made = Inotify()
    yield made
    made.close()


def write(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


def test_each_close_after_writing_is_told_of_once_and_nothing_is_waited_for(
    inotify: Inotify, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write(one)
    write(other)
    watches = [inotify.watch(one), inotify.watch(other)]
    assert inotify.closed() == []
    write(one)
    assert one.read_bytes() == b""  # a reader's close is none
    write(other)
    assert inotify.closed() == watches
    assert inotify.closed() == []


def test_a_watch_follows_its_file_and_ends_with_it_or_before(
    inotify: Inotify, tmp_path: Path
) -> None:
    path, renamed = tmp_path / "one", tmp_path / "renamed"
    write(path)
    watch = inotify.watch(path)
    path.rename(renamed)
    write(renamed)
    assert inotify.closed() == [watch]
    renamed.unlink()
    inotify.forget(watch)  # the kernel has forgotten it: that is no error
    assert inotify.closed() == []
    write(path)
    inotify.forget(inotify.watch(path))
    write(path)
    assert inotify.closed() == []


def test_events_that_were_lost_are_told_of(inotify: Inotify, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write(one)
    write(other)
    watches = [inotify.watch(one), inotify.watch(other)]
    for number in range(MOST_QUEUED + 2):
        write((one, other)[number % 2])  # in turns: the kernel makes one of two that are alike
    closed = inotify.closed()
    assert closed == [watches[number % 2] for number in range(MOST_QUEUED)] + [-1]
    assert inotify.closed() == []


def test_no_program_that_is_started_keeps_the_descriptor_and_no_read_of_it_blocks(
    inotify: Inotify,
) -> None:
    assert not os.get_inheritable(inotify.fd)
    assert not os.get_blocking(inotify.fd)


def test_a_copy_of_the_object_closes_nothing_when_it_is_dropped() -> None:
    """As in a forked process that has closed the descriptor by its number."""
    inotify = Inotify()
    fd = inotify.fd
    os.close(fd)
    with contextlib.ExitStack() as stack:
        read_fd, write_fd = os.pipe()
        stack.callback(os.close, write_fd)
        stack.callback(os.close, read_fd)
        assert fd in (read_fd, write_fd)
        del inotify
        gc.collect()
        assert os.fstat(fd)

"""The process that loads programs beside us: what it hands over, and how it may fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from pyforwarder.errors import LoadError, Refusal
from pyforwarder.supervisor.processes import loader
from pyforwarder.supervisor.processes.loader import Loaded, LoaderProcess, Part


def nothing() -> None:
    pass


def prepare(parts: dict[str, Part]) -> LoaderProcess:
    return LoaderProcess(parts, close_in_child=nothing)


def pipe_with(data: bytes) -> Part:
    def part() -> Loaded:
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        return Loaded([reading], {"bytes": len(data)})

    return part


def refuses() -> Loaded:
    raise LoadError("load x", cause=Refusal.VERIFIER, advice="do y", log="z" * 1_000_000)


def dies() -> Loaded:
    os._exit(3)


def hangs() -> Loaded:
    time.sleep(3600)
    raise AssertionError


def test_parts_come_one_by_one_with_their_descriptors() -> None:
    preparation = prepare({"a": pipe_with(b"of a"), "b": pipe_with(b"of b!")})
    found = list(preparation.wait())
    assert [name for name, _ in found] == ["a", "b"]
    said = []
    for _, loaded in found:
        assert isinstance(loaded, Loaded)
        (fd,) = loaded.descriptors
        assert not os.get_inheritable(fd)
        with os.fdopen(fd, "rb") as file:
            said.append((file.read(), loaded.said["bytes"]))
    assert said == [(b"of a", 4), (b"of b!", 5)]
    assert preparation.is_over
    preparation.close()


def test_more_descriptors_than_a_message_takes_come_all_the_same() -> None:
    def many() -> Loaded:
        return Loaded([os.open(os.devnull, os.O_RDONLY) for _ in range(501)], {})

    preparation = prepare({"a": many, "b": pipe_with(b"")})
    found = dict(preparation.wait())
    counts = []
    for loaded in found.values():
        assert isinstance(loaded, Loaded)
        counts.append(len(loaded.descriptors))
        for fd in loaded.descriptors:
            os.close(fd)
    assert counts == [501, 1]
    preparation.close()


def test_refusal_comes_whole_but_for_a_long_log_and_the_next_part_is_tried() -> None:
    preparation = prepare({"a": refuses, "b": pipe_with(b"")})
    (first, error), (second, loaded) = list(preparation.wait())
    assert (first, second) == ("a", "b")
    assert isinstance(error, LoadError)
    assert (str(error), error.cause) == ("load x; do y", Refusal.VERIFIER)
    assert error.log == "z" * loader._MOST_LOG_CHARACTERS
    assert isinstance(loaded, Loaded)
    os.close(loaded.descriptors[0])
    preparation.close()


def test_death_fails_all_parts_that_are_left() -> None:
    preparation = prepare({"a": dies, "b": pipe_with(b"")})
    found = list(preparation.wait())
    assert [name for name, _ in found] == ["a", "b"]
    for _, error in found:
        assert "has died" in str(error)
    preparation.close()


def test_hanging_fails_all_parts_that_are_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "TIMEOUT_S", 0.05)
    preparation = prepare({"a": hangs})
    ((name, error),) = list(preparation.wait())
    assert name == "a"
    assert isinstance(error, LoadError)
    assert error.cause is Refusal.TIMEOUT
    preparation.close()


@pytest.mark.parametrize("part", [hangs, dies, pipe_with(b"")])
def test_closed_at_any_time_it_leaves_no_process(part: Callable[[], Loaded]) -> None:
    preparation = prepare({"a": part})
    preparation.close()
    preparation.close()
    assert preparation.is_over
    with pytest.raises(ChildProcessError):
        os.waitpid(preparation._pid or -1, os.WNOHANG)

"""What is kept between two starts: found again, and never believed when others may have made it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyforwarder.runtime import store
from pyforwarder.runtime.store import Store, told_to_children, usual_directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "programs"


def only_file(directory: Path) -> Path:
    (found,) = directory.iterdir()
    return found


def test_value_is_found_by_its_key_alone(directory: Path) -> None:
    Store(directory).put("a", b"value of a")
    assert Store(directory).get("a") == b"value of a"
    assert Store(directory).get("b") is None


def test_later_value_takes_the_place_of_the_earlier(directory: Path) -> None:
    kept = Store(directory)
    kept.put("a", b"first")
    kept.put("a", b"second")
    assert kept.get("a") == b"second"
    assert only_file(directory).stat().st_mode & 0o777 == 0o600


def test_forgotten_key_has_no_value(directory: Path) -> None:
    kept = Store(directory)
    kept.put("a", b"value")
    kept.forget("a")
    kept.forget("a")
    assert kept.get("a") is None


def test_store_without_a_directory_is_empty() -> None:
    kept = Store(None)
    kept.put("a", b"value")
    kept.forget("a")
    assert kept.get("a") is None


def cut(data: bytes) -> bytes:
    return data[:-1]


def lengthen(data: bytes) -> bytes:
    return data + b"\0"


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_digest(data: bytes) -> bytes:
    return data[:20] + bytes([data[20] ^ 1]) + data[21:]


def empty(_data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, lengthen, flip_last, flip_digest, empty])
def test_damaged_file_counts_as_not_there(
    directory: Path, damage: Callable[[bytes], bytes]
) -> None:
    kept = Store(directory)
    kept.put("a", b"value")
    path = only_file(directory)
    path.write_bytes(damage(path.read_bytes()))
    assert kept.get("a") is None
    kept.put("a", b"again")
    assert kept.get("a") == b"again"


def test_file_under_another_keys_name_is_not_believed(directory: Path) -> None:
    kept = Store(directory)
    kept.put("a", b"value of a")
    only_file(directory).rename(directory / store._name("b"))
    assert kept.get("b") is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_file_that_others_may_write_is_not_believed(directory: Path, mode: int) -> None:
    kept = Store(directory)
    kept.put("a", b"value")
    only_file(directory).chmod(mode)
    assert kept.get("a") is None


def test_link_and_pipe_are_no_files_of_ours(directory: Path, tmp_path: Path) -> None:
    kept = Store(directory)
    kept.put("a", b"value")
    path = only_file(directory)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert kept.get("a") is None
    path.unlink()
    os.mkfifo(path, 0o600)
    assert kept.get("a") is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_directory_that_others_may_write_to_is_not_used(directory: Path, mode: int) -> None:
    kept = Store(directory)
    kept.put("a", b"value")
    directory.chmod(mode)
    assert kept.get("a") is None
    kept.put("b", b"value")
    directory.chmod(0o700)
    assert kept.get("b") is None
    assert kept.get("a") == b"value"


def test_directory_below_one_that_others_may_write_to_is_not_used(directory: Path) -> None:
    kept = Store(directory)
    kept.put("a", b"value")
    directory.parent.chmod(0o777)
    assert kept.get("a") is None
    # In a sticky one (as /tmp is) nobody can put another in our directory's place.
    directory.parent.chmod(0o777 | stat.S_ISVTX)
    assert kept.get("a") == b"value"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_another_user_owns_is_not_used(directory: Path) -> None:
    kept = Store(directory)
    kept.put("a", b"value")
    for path in (only_file(directory), directory, directory.parent):
        os.chown(path, 65534, 65534)
        assert kept.get("a") is None, path
        os.chown(path, 0, 0)
    assert kept.get("a") == b"value"


def test_oldest_files_go_when_there_are_too_many(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MOST_FILES", 3)
    kept = Store(directory)
    for number in range(5):
        kept.put(str(number), b"value")
        os.utime(directory / store._name(str(number)), (number + 1, number + 1))
    kept.put("last", b"value")
    assert [key for key in "01234" if kept.get(key)] == ["3", "4"]
    assert kept.get("last") == b"value"


def test_what_is_used_stays_when_there_are_too_many(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MOST_FILES", 3)
    kept = Store(directory)
    for number in range(3):
        kept.put(str(number), b"value")
        os.utime(directory / store._name(str(number)), (number + 1, number + 1))
    assert kept.get("0") == b"value"
    kept.put("last", b"value")
    assert [key for key in "012" if kept.get(key)] == ["0", "2"]


def test_what_cannot_be_marked_as_used_is_used(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Store(directory)
    kept.put("a", b"value")

    def fails(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(os, "utime", fails)
    assert kept.get("a") == b"value"


@contextlib.contextmanager
def another_process_makes(directory: Path, key: str) -> Iterator[subprocess.Popen[str]]:
    """It has begun to, and goes on until it is told to end, or killed."""
    program = (
        "import pathlib, sys; from pyforwarder.runtime.store import Store\n"
        "with Store(pathlib.Path(sys.argv[1])).making(sys.argv[2], within_s=0.0):\n"
        "    print('makes', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(directory), key]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "makes\n"
            yield process
        finally:
            process.kill()


def waits(directory: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often it looks again before it goes on, with a deadline after ten times."""
    slept: list[float] = []
    now_s = 100.0
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: now_s + sum(slept))
    with Store(directory).making(key, within_s=10 * store._POLL_S - 0.001):
        return len(slept)


def test_a_value_is_made_by_one_process_at_a_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another_process_makes(directory, "a") as process:
        assert waits(directory, "b", monkeypatch) == 0
        assert waits(directory, "a", monkeypatch) == 10
        process.kill()
        process.wait()
        assert waits(directory, "a", monkeypatch) == 0
    assert waits(directory, "a", monkeypatch) == 0


def test_the_locks_are_not_what_is_removed_as_oldest(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MOST_FILES", 2)
    kept = Store(directory)
    with kept.making("a", within_s=0.0):
        os.utime(directory / store._LOCKS, (1, 1))
        for key in "abc":
            kept.put(key, b"value")
    assert (directory / store._LOCKS).exists()
    assert len(list(directory.iterdir())) == 3


def test_nothing_is_raised_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for kept in (Store(tmp_path / "file" / "programs"), Store(None)):
        with kept.making("a", within_s=0.0):
            kept.put("a", b"value")
        assert kept.get("a") is None


def test_each_user_has_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert usual_directory({}) == Path("/var/cache/pyforwarder/programs")
    assert usual_directory({"PYFORWARDER_RUN_DIR": "/r"}) == Path("/var/cache/pyforwarder/programs")
    assert usual_directory({"PYFORWARDER_CACHE_DIR": "/c"}) == Path("/c")
    assert usual_directory({"PYFORWARDER_CACHE_DIR": "none"}) is None
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert usual_directory({}) is None
    assert usual_directory({"PYFORWARDER_RUN_DIR": "/r"}) == Path("/r/.programs")


def test_children_keep_things_where_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv(store.VARIABLE, raising=False)
    monkeypatch.setenv("PYFORWARDER_RUN_DIR", "/r")
    assert told_to_children() == {store.VARIABLE: "/r/.programs"}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert told_to_children() == {}
    monkeypatch.setenv(store.VARIABLE, "none")
    assert told_to_children() == {store.VARIABLE: "none"}

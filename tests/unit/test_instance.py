"""Paths of an instance, and the lock that says whether it is running."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from pyforwarder.errors import AlreadyRunningError, ConfigError, ForwarderError
from pyforwarder.runtime.instance import (
    _LOOKED_AT_S,
    Instance,
    LockWatch,
    acquire,
    is_running,
)
from tests.helpers.fake_control import make_instance
from tests.helpers.waiting import DEADLINE_S


def test_paths_are_those_of_the_contract() -> None:
    instance = Instance.named("default", {})
    assert instance.control == Path("/run/pyforwarder/default/control")
    assert instance.pid_file == Path("/run/pyforwarder/default/pid")
    assert instance.proc_dir == Path("/run/pyforwarder/default/proc")
    assert instance.bpffs_dir == Path("/sys/fs/bpf/pyforwarder/default")


def test_environment_replaces_both_roots() -> None:
    instance = Instance.named(
        "a", {"PYFORWARDER_RUN_DIR": "/tmp/run", "PYFORWARDER_BPFFS": "/tmp/bpf"}
    )
    assert instance.control == Path("/tmp/run/a/control")
    assert instance.bpffs_dir == Path("/tmp/bpf/a")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a.b", "-a", "a b", "a" * 33, "ä", "a\n"])
def test_name_that_is_no_harmless_path_component_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        Instance.named(name, {})


def test_run_dir_too_long_for_a_unix_socket_is_refused() -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        Instance.named("default", {"PYFORWARDER_RUN_DIR": "/" + "x" * 100})


def test_nobody_runs_where_nothing_is(tmp_path: Path) -> None:
    assert not is_running(make_instance(tmp_path))


def test_running_means_lock_held(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    with acquire(instance):
        assert is_running(instance)
    assert not is_running(instance)


def test_looking_does_not_take_the_lock_from_its_holder(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    with acquire(instance), LockWatch(instance) as watch:
        assert [watch.is_held() for _ in range(3)] == [True, True, True]


def test_second_holder_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    with acquire(instance):
        instance.pid_file.write_text("4242\n")
        with pytest.raises(AlreadyRunningError, match=r"'default' is already running \(pid 4242\)"):
            acquire(instance)


def test_two_instances_do_not_see_each_other(tmp_path: Path) -> None:
    with acquire(make_instance(tmp_path, "a")), acquire(make_instance(tmp_path, "b")):
        assert not is_running(make_instance(tmp_path, "c"))


def test_up_that_meets_somebody_looking_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`is_running` shares the lock while it looks; that must not look like a daemon."""
    instance = make_instance(tmp_path)
    acquire(instance).close()
    fd = os.open(instance.lock_file, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    began_s = time.monotonic()
    waited_s = 0.0

    def sleep(pause_s: float) -> None:
        nonlocal waited_s
        if waited_s < 3.0 <= waited_s + pause_s:
            os.close(fd)  # it had to wait for a processor for so long
        waited_s += pause_s

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: began_s + waited_s)
    with acquire(instance) as lock:
        assert lock.fileno() >= 0
    assert 3.0 <= waited_s < 3.1
    fd = os.open(instance.lock_file, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    with pytest.raises(AlreadyRunningError):
        acquire(instance)  # one that never looks away
    assert 3.0 + _LOOKED_AT_S <= waited_s < 3.1 + _LOOKED_AT_S
    os.close(fd)


def test_child_that_closes_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    with acquire(instance) as lock:
        pid = os.fork()
        if pid == 0:
            lock.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert is_running(instance)


def test_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        acquire(instance)
        os.write(ready_write, b"x")
        threading.Event().wait()  # until killed
    assert os.read(ready_read, 1) == b"x"
    with LockWatch(instance) as watch:
        assert watch.is_held()
        os.kill(pid, 9)
        assert watch.wait_free(timeout_s=DEADLINE_S)
    os.waitpid(pid, 0)
    os.close(ready_read)
    os.close(ready_write)


def test_wait_for_one_daemon_is_not_prolonged_by_the_next(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    first = acquire(instance)
    with LockWatch(instance) as watch:
        first.remove()
        with acquire(instance):
            assert watch.wait_free(timeout_s=0)
            assert is_running(instance)


def test_wait_has_a_deadline(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    with acquire(instance), LockWatch(instance) as watch:
        assert not watch.wait_free(timeout_s=0.03)


def test_removed_lock_leaves_no_file(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    acquire(instance).remove()
    assert list(instance.run_dir.iterdir()) == []


def test_lock_of_an_unlinked_file_is_not_enough(tmp_path: Path) -> None:
    """Opened before its holder removed it, locked afterwards: the next one locks another file."""
    instance = make_instance(tmp_path)
    old = acquire(instance)
    late_fd = os.open(instance.lock_file, os.O_RDWR)
    old.remove()
    fcntl.flock(late_fd, fcntl.LOCK_EX)  # succeeds, and must not count
    with acquire(instance):
        assert is_running(instance)
    os.close(late_fd)


def test_run_dir_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ForwarderError, match="run/default/lock"):
        acquire(make_instance(tmp_path))


def test_a_user_that_may_not_is_told_what_would_help(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(ForwarderError, match=r"permission denied.*PYFORWARDER_RUN_DIR"):
            acquire(make_instance(tmp_path))
    finally:
        if is_root:
            os.seteuid(0)

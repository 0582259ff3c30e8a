"""Processes that we make: where they work, what they see, and that nothing else makes any."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyforwarder.runtime import children, slowness

ROOT = Path(__file__).resolve().parents[2]
# They build and run in guests, or run the tests again, as the developer who calls them.
FOR_DEVELOPERS = (
    "scripts/documents/",
    "scripts/kernels/",
    "scripts/release/",
    "scripts/test_again.py",
)
# What makes a process in the standard library.
MAKES_PROCESSES = re.compile(
    r"\b(os\.(fork|forkpty|system|popen|exec\w+|spawn\w+|posix_spawn\w*)|pty\.(fork|spawn)"
    r"|subprocess\.(run|Popen|call|check_call|check_output|getoutput|getstatusoutput)"
    r"|multiprocessing|concurrent\.futures|asyncio\.create_subprocess\w+)\b"
)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file of what makes processes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and MAKES_PROCESSES.fullmatch(ast.unparse(node.func)):
            yield ast.unparse(node.func), node


def test_one_module_makes_processes() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "pyforwarder").rglob("*.py"))
        if any(calls(path)) or "multiprocessing" in path.read_text()
    }
    assert found == {"pyforwarder/runtime/children.py"}


def test_what_scripts_start_has_the_surroundings_of_a_child() -> None:
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        if str(path.relative_to(ROOT)).startswith(FOR_DEVELOPERS):
            continue
        for name, call in calls(path):
            assert name in {"subprocess.run", "subprocess.Popen"}, path
            starred = [ast.unparse(word.value) for word in call.keywords if word.arg is None]
            assert [word for word in starred if word.startswith("surroundings(")], ast.unparse(call)


def test_shell_scripts_start_no_python_that_looks_into_the_working_directory_first() -> None:
    # Those that change to the checkout's root before are at home there.
    at_home = {"scripts/test", "scripts/check", "scripts/fix"}
    scripts = [
        path
        for path in sorted((ROOT / "scripts").rglob("*"))
        if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
    ]
    assert len(scripts) >= 10
    started = re.compile(r"(?:python3?|\$python)\"? +(?:-I\b|-P\b|(?P<unsafe>-[mc]\b|- ))")
    seen = 0
    for path in scripts:
        if str(path.relative_to(ROOT)) in at_home:
            assert re.search(r'^cd -- "\$root"', path.read_text(), re.MULTILINE), path
            continue
        for match in started.finditer(path.read_text()):
            seen += 1
            assert match["unsafe"] is None, (path, match[0])
    assert seen >= 10


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and an environment of somebody else's."""
    for name in ("json", "runpy", "bcc", "sitecustomize", "usercustomize", "socket"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'MARK')!r}, 'w').close()\n")
    (tmp_path / "cat").write_text(f"#!/bin/sh\ntouch {tmp_path / 'MARK'}\n")
    (tmp_path / "cat").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "TMPDIR", "PATH", "SUDO_USER"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv(slowness.VARIABLE, raising=False)
    return tmp_path


def test_a_program_has_nothing_of_its_caller_s(hostile: Path) -> None:
    said = children.run(["env", "-0"], variables={"MORE": "1"}).stdout.decode().split("\0")
    assert sorted(filter(None, said)) == sorted(
        [*(f"{name}={word}" for name, word in children.ENVIRONMENT.items()), "MORE=1"]
    )
    assert children.run(["sh", "-c", "pwd; umask"]).stdout == b"/\n0077\n"
    children.run(["cat"])
    assert not (hostile / "MARK").exists()


def test_a_program_has_no_descriptor_that_was_not_named() -> None:
    ours, theirs = os.pipe()
    os.set_inheritable(ours, True)
    os.set_inheritable(theirs, True)
    try:
        done = children.run(["sh", "-c", "cd /proc/$$/fd && echo *"], pass_fds=(theirs,))
        assert {int(word) for word in done.stdout.split()} >= {0, 1, 2, theirs}
        assert ours not in {int(word) for word in done.stdout.split()}
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_module_is_not_looked_for_in_the_working_directory(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `python -m` has it, and an empty element of PYTHONPATH.
    monkeypatch.setattr(sys, "path", [str(hostile), "", *sys.path])
    assert str(hostile) not in children.python_path()
    done = children.run(children.python("pyforwarder", "--version"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"pyforwarder" in done.stdout
    assert not (hostile / "MARK").exists()


def test_a_package_that_lies_in_the_working_directory_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    done = children.run(children.python("pyforwarder", "--version"))
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_working_directory_that_is_gone_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert children.run(children.python("pyforwarder", "--version")).returncode == 0


def test_a_fork_has_nothing_of_its_caller_s_either(hostile: Path) -> None:
    read_fd, write_fd = os.pipe()

    def child() -> int:
        mask = os.umask(0)
        os.write(write_fd, json.dumps([os.getcwd(), mask, dict(os.environ)]).encode())
        return 7

    pid = children.fork(child)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        assert json.loads(pipe.read()) == ["/", 0o077, dict(children.ENVIRONMENT)]
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert os.getcwd() == str(hostile)


@pytest.mark.parametrize("number", children.TOLD_TO_GROUPS)
def test_a_fork_ignores_what_is_sent_to_the_whole_group(number: signal.Signals) -> None:
    def child() -> int:
        os.kill(os.getpid(), number)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return 0 if signal.getsignal(number) is signal.SIG_IGN and not blocked else 2

    before = signal.getsignal(number)
    _, status = os.waitpid(children.fork(child), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert signal.getsignal(number) is before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_fork_that_raises_ends_with_an_error_and_never_returns(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def child() -> int:
        raise SystemError("lost")

    _, status = os.waitpid(children.fork(child), 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert capfd.readouterr().err.rstrip().endswith("SystemError: lost")


def test_children_wait_as_long_as_their_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slowness.VARIABLE, "2.50")
    said = children.run(["env", "-0"]).stdout.decode().split("\0")
    assert f"{slowness.VARIABLE}=2.5" in said
    read_fd, write_fd = os.pipe()

    def child() -> int:
        os.write(write_fd, json.dumps([dict(os.environ), slowness.scaled_s(2.0)]).encode())
        return 0

    pid = children.fork(child)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        expected = {**children.ENVIRONMENT, slowness.VARIABLE: "2.5"}
        assert json.loads(pipe.read()) == [expected, 5.0]
    os.waitpid(pid, 0)

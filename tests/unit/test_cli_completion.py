"""What the shell is offered at a Tab."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fake_control import PAIR, FakeControl, environ, make_instance

LISTENERS = [
    {"name": name, "bind": bind, "protocol": "tcp", "accepted": 0, "open": 0, "refused": 0}
    for name, bind in (("main", "127.0.0.1:1"), ("mail", "127.0.0.1:2"), ("web", "127.0.0.1:3"))
]


def offered(root: Path, words: str) -> list[str]:
    """What zsh is offered for the last of these words, which may be empty: value, help."""
    parts = f"pyforwarder {words}".split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "pyforwarder"],
        env={
            **os.environ,
            **environ(root),
            "_PYFORWARDER_COMPLETE": "zsh_complete",
            "COMP_WORDS": " ".join(parts),
            "COMP_CWORD": str(len(parts) - 1),
        },
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines() if done.stdout.strip() else []
    assert set(lines[::3]) <= {"plain"}
    return [f"{value} {said}" for value, said in zip(lines[1::3], lines[2::3], strict=True)]


def test_instances_are_those_with_a_directory(
    tmp_path: Path,
) -> None:
    instance = make_instance(tmp_path)
    for name in ("web", "work"):
        (instance.run_dir.parent / name).mkdir(parents=True)
    assert offered(tmp_path, "show --instance w") == ["web _", "work _"]
    assert offered(tmp_path, "--instance x") == []


def test_ids_are_those_of_the_pairs(tmp_path: Path) -> None:
    rows = [{**PAIR, "id": number} for number in (7, 17, 170)]
    with FakeControl(make_instance(tmp_path), lambda _request, _fds: rows):
        said = f"{PAIR['client']} to {PAIR['server']}"
        assert offered(tmp_path, "flush 17") == [f"17 {said}", f"170 {said}"]


def test_listeners_are_those_of_the_running_instance(
    tmp_path: Path,
) -> None:
    with FakeControl(make_instance(tmp_path), lambda _request, _fds: LISTENERS):
        assert offered(tmp_path, "explain --listener ma") == [
            "main 127.0.0.1:1",
            "mail 127.0.0.1:2",
        ]


@pytest.mark.parametrize("words", ["flush ", "explain --listener ", "show --instance "])
def test_where_nothing_runs_nothing_is_offered(tmp_path: Path, words: str) -> None:
    assert offered(tmp_path, words) == []

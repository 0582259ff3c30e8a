"""What CI runs, and in which order, with scripts in place of ours that do nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from pyforwarder.runtime.slowness import scaled_s

ROOT: Final = Path(__file__).parents[2]
SCRIPTS: Final = ("prepare", "check", "test", "container/build", "container/test", "kernels/run")
# Tells what it was called with, and fails where that is to fail.
INSTEAD: Final = """#!/bin/bash
word="${0#scripts/}${*:+ $*}"
printf '%s\\n' "$word" >>called
echo "$word was here"
echo "FLAKY: $word"
[[ "$word" != "$FAILS" ]]
"""
ALL: Final = {
    "prepare test",
    "prepare kernels",
    "container/build test",
    "container/build --suite trixie test",
    "kernels/run --images",
    "check",
    "test tests/unit",
    "test tests/kernel",
    "kernels/run --timeout 2400 6.1 backports",
    "kernels/run --timeout 1800 6.12 lockdown",
    "container/test",
    "container/test --suite trixie -n 2 tests/unit",
}


def run(
    directory: Path, *words: str, fails: str = "", late_s: int = 3000
) -> tuple[int, list[str], str]:
    """The exit code of .ci/run, what it called in which order, and what it said."""
    (directory / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", directory / ".ci")
    for name in SCRIPTS:
        path = directory / "scripts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(INSTEAD)
        path.chmod(0o755)
    done = subprocess.run(
        [directory / ".ci" / "run", *words],
        env={**os.environ, "FAILS": fails, "LATE_S": str(late_s)},
        capture_output=True,
        text=True,
        timeout=scaled_s(30),
        check=False,
    )
    called = directory / "called"
    return done.returncode, called.read_text().splitlines() if called.exists() else [], done.stdout


def test_all_of_it_is_run_and_told_of(tmp_path: Path) -> None:
    code, called, said = run(tmp_path)
    assert code == 0
    assert set(called) == ALL
    assert len(called) == len(ALL)
    # What takes both processors comes last, and what is beside others before what needs it.
    assert called[:2] == ["prepare test", "prepare kernels"]
    assert called[-5:] == [
        "test tests/kernel",
        "container/test",
        "container/test --suite trixie -n 2 tests/unit",
        "kernels/run --timeout 2400 6.1 backports",
        "kernels/run --timeout 1800 6.12 lockdown",
    ]
    summary = said.partition("== all of it")[2]
    for word in ALL:
        assert f"{word} was here" in said
        assert f"FLAKY: {word}\n" in summary
    assert summary.count("passed") == 9


@pytest.mark.parametrize("fails", sorted(ALL))
def test_any_of_it_that_fails_fails_the_whole_and_the_rest_is_run(
    tmp_path: Path, fails: str
) -> None:
    code, called, said = run(tmp_path, fails=fails)
    assert code == 1
    assert said.partition("== all of it")[2].count("FAILED") == 1
    assert {
        "test tests/kernel",
        "kernels/run --timeout 2400 6.1 backports",
        "container/test",
    } <= set(called)


def test_a_slow_host_says_which_kernels_it_has_left_out(tmp_path: Path) -> None:
    code, called, said = run(tmp_path, late_s=0)
    assert code == 0
    assert set(called) == ALL - {"kernels/run --timeout 1800 6.12 lockdown"}
    assert "other kernels: NOT RUN, as 0 minutes have passed" in said


def test_what_is_no_argument_runs_nothing(tmp_path: Path) -> None:
    code, called, _ = run(tmp_path, "--soak-for", "ever")
    assert (code, called) == (2, [])

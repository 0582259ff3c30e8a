"""A test that fails is run once more, alone, where CI says so; nothing is hidden by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyforwarder.runtime.slowness import scaled_s

ROOT = Path(__file__).resolve().parents[2]
AGAIN = ROOT / "scripts" / "test_again.py"
# Fails as often as the file `times` says.
FLAKY = """
import pathlib
import pytest

def fails(name):
    path = pathlib.Path(name)
    left = int(path.read_text()) if path.exists() else 0
    path.write_text(str(max(0, left - 1)))
    return left > 0

@pytest.mark.parametrize("number", range(14))
def test_sometimes(number):
    assert not fails(f"times-{number}")
"""


def run(directory: Path, *times: int, ci: str = "true") -> tuple[int, str]:
    """Exit code and output of a run in which test N fails `times[N]` times."""
    (directory / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (directory / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    kernel: k\n    soak: s\n    alone: a\n    needs: n\n"
    )
    (directory / "test_it.py").write_text(FLAKY)
    for number, count in enumerate(times):
        (directory / f"times-{number}").write_text(str(count))
    done = subprocess.run(
        [sys.executable, str(AGAIN), "-p", "no:cacheprovider"],
        cwd=directory,
        env={
            "CI": ci,
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=scaled_s(50),
        check=False,
    )
    return done.returncode, done.stdout


def test_a_run_without_failures_is_run_once(tmp_path: Path) -> None:
    code, said = run(tmp_path)
    assert code == 0
    assert said.count(" passed in ") == 1
    assert "FLAKY" not in said


def test_what_is_compiled_is_kept_in_every_environment(tmp_path: Path) -> None:
    code, said = run(tmp_path)
    assert code == 0, said
    assert {path.name.partition(".")[0] for path in tmp_path.glob("__pycache__/*.pyc")} == {
        "conftest",
        "test_it",
    }


def test_one_that_passes_alone_is_told_of_and_fails_nothing(tmp_path: Path) -> None:
    code, said = run(tmp_path, 1)
    assert code == 0
    assert "1 failed, 13 passed in " in said
    assert "1 passed in " in said
    assert "FLAKY: failed, then passed alone: test_it.py::test_sometimes[0]\n" in said


def test_one_that_fails_twice_fails_the_run(tmp_path: Path) -> None:
    code, said = run(tmp_path, 1, 2)
    assert code == 1
    assert "FLAKY: failed, then passed alone: test_it.py::test_sometimes[0]\n" in said
    assert "failed twice: test_it.py::test_sometimes[1]\n" in said


@pytest.mark.parametrize(("count", "code"), [(12, 0), (13, 1)])
def test_more_than_twelve_are_no_chance(tmp_path: Path, count: int, code: int) -> None:
    got, said = run(tmp_path, *[1] * count)
    assert got == code
    assert ("FLAKY: " in said) == (code == 0)


def test_without_ci_nothing_is_run_again(tmp_path: Path) -> None:
    code, said = run(tmp_path, 1, ci="")
    assert code == 1
    assert said.count(" passed in ") == 1


def test_a_module_that_cannot_be_imported_is_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name\n")
    code, said = run(tmp_path)
    assert code != 0
    assert "FLAKY" not in said

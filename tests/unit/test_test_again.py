"""A test that fails is run once more, alone, where CI says so; nothing is hidden by it."""

from __future__ import annotations

import ast
import json
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


def write_settings(directory: Path) -> None:
    """Those of all our tests."""
    (directory / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (directory / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    kernel: k\n    soak: s\n    alone: a\n    needs: n\n"
    )


def run(directory: Path, *times: int, ci: str = "true") -> tuple[int, str]:
    """Exit code and output of a run in which test N fails `times[N]` times."""
    write_settings(directory)
    (directory / "test_it.py").write_text(FLAKY)
    for number, count in enumerate(times):
        (directory / f"times-{number}").write_text(str(count))
    return run_again(AGAIN, directory, "-p", "no:cacheprovider", ci=ci)


def run_again(script: Path, directory: Path, *words: str, ci: str = "true") -> tuple[int, str]:
    """Exit code and output of the script, with these arguments."""
    done = subprocess.run(
        [sys.executable, str(script), *words],
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


# Each test says when it ran; `alone` is what no other may run beside.
TIMES = """
import json, time, pytest

@pytest.mark.parametrize("number", range(8))
def test_beside(number):
    write("beside")

@pytest.mark.alone
def test_alone():
    write("alone")

def write(name):
    line = json.dumps([name, time.monotonic()])
    with open("times", "a") as file:
        file.write(line + "\\n")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with two modules of kernel tests, each with one that must be alone."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/test_again.py").write_text(AGAIN.read_text())
    write_settings(tmp_path)
    for name in ("unit", "kernel"):
        (tmp_path / "tests" / name).mkdir(parents=True)
    (tmp_path / "tests/unit/test_unit.py").write_text("def test_it():\n    pass\n")
    for name in ("test_one", "test_two"):
        (tmp_path / f"tests/kernel/{name}.py").write_text(TIMES)
    return tmp_path


@pytest.mark.parametrize(
    "directories", [(), ("tests",), ("tests/kernel",), ("tests/unit", "tests")]
)
def test_side_by_side_what_must_be_alone_is_run_after_all_else_once(
    tree: Path, directories: tuple[str, ...]
) -> None:
    code, said = run_again(tree / "scripts/test_again.py", tree, "--side-by-side", *directories)
    assert code == 0, said
    assert said.count(" passed") == 2
    ran = [json.loads(line) for line in (tree / "times").read_text().splitlines()]
    names = [name for name, _ in sorted(ran, key=lambda one: one[1])]
    assert names == ["beside"] * 16 + ["alone"] * 2


def test_side_by_side_what_holds_no_kernel_tests_is_run_once(tree: Path) -> None:
    code, said = run_again(tree / "scripts/test_again.py", tree, "--side-by-side", "tests/unit")
    assert (code, said.count("1 passed")) == (0, 1)


@pytest.mark.parametrize("name", ["beside", "alone"])
def test_side_by_side_a_failure_in_either_run_fails_both(tree: Path, name: str) -> None:
    path = tree / "tests/kernel/test_one.py"
    path.write_text(path.read_text().replace(f'write("{name}")', "raise AssertionError"))
    words = (tree / "scripts/test_again.py", tree, "--side-by-side")
    code, said = run_again(*words, ci="")
    assert code == 1
    assert f"failed:\n  tests/kernel/test_one.py::test_{name}" in said


def test_only_kernel_tests_are_marked_alone() -> None:
    """Others would be run by no run: see `kernel_tests_in`."""
    marked = {
        path.relative_to(ROOT / "tests").parts[0]
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "alone"
    }
    assert marked == {"kernel"}

"""Run pytest; where CI=true run what failed once more, alone, and say so.

    python scripts/test_again.py [--side-by-side] PYTEST ARGUMENTS...

With `--side-by-side`, and directories, modules run in several processes at once. What is marked
`alone` runs after all of them: in its place among them, all processes would wait for the longest
test that runs, and then for it.

A test that fails twice fails the run, and so do more than twelve that fail once: a machine with
much to do makes several tests late at the same moment, but not so many. Each that passes the second
time is named in a line that begins with FLAKY, which .ci/run repeats at its end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

MOST_REPEATED: Final = 12
_TESTS_FAILED: Final = 1  # pytest.ExitCode; any other failure is not that of a test
_NO_TESTS: Final = 5  # pytest.ExitCode: none was found, or all were left out
_XML: Final = "--junit-xml="
_KERNEL_TESTS: Final = Path(__file__).resolve().parents[1] / "tests" / "kernel"
_SIDE_BY_SIDE: Final = "--side-by-side"
# Five processes on two processors: most tests wait more than they compute. In the order in which
# they are collected, so that the long ones (those that tests/conftest.py names) come first.
_PROCESSES: Final = ("-n", "5", "--dist", "loadfile", "--no-loadscope-reorder")


def environment() -> dict[str, str]:
    """That of pytest, in which what Python compiles of the sources is kept.

    A run starts the program a thousand times; compiling all of its modules takes a third of a
    second each time.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run_pytest(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """pytest's exit code, and the ids of the tests that failed."""
    with tempfile.TemporaryDirectory(prefix="pyforwarder-tests-") as directory:
        path = Path(directory) / "failed"
        command = [sys.executable, "-m", "pytest", *arguments, "--failures-to", str(path)]
        code = subprocess.run(command, env=environment(), check=False).returncode
        failed = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return code, failed


def runs(arguments: Sequence[str]) -> list[list[str]]:
    """pytest's arguments for each run of it, one after the other."""
    if arguments[:1] != [_SIDE_BY_SIDE]:
        return [[*arguments]]
    directories = arguments[1:]
    together = [*_PROCESSES, *directories, "-m", "not alone"]
    if with_kernel := kernel_tests_in(directories or ["."]):
        return [together, [*with_kernel, "-m", "alone"]]
    return [together]


def kernel_tests_in(directories: Sequence[str]) -> list[str]:
    """Those of kernel tests among these directories, or in them: no other is marked `alone`."""
    found = []
    for name in directories:
        path = Path(name).absolute()
        if _KERNEL_TESTS in (path, *path.parents):
            found.append(name)
        elif path in _KERNEL_TESTS.parents:
            found.append(str(_KERNEL_TESTS))
    return found


def run_all(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """The exit code of all runs together, and the ids of the tests that failed in any of them."""
    code, failed = _NO_TESTS, []
    for words in runs(arguments):
        one, names = run_pytest(words)
        failed += names
        if one not in {0, _TESTS_FAILED, _NO_TESTS}:
            return one, failed  # Ctrl-C, or what is no test's fault
        if one != _NO_TESTS:  # in one of two runs there may be none
            code = one if code == _NO_TESTS else max(code, one)
    return code, failed


def may_be_repeated(code: int, failed: Sequence[str]) -> bool:
    """Whether the run failed by tests alone, and by few."""
    return (
        code == _TESTS_FAILED
        and 1 <= len(failed) <= MOST_REPEATED
        and all("::" in name for name in failed)  # else a module could not be collected
    )


def second_arguments(first: Sequence[str], failed: Sequence[str]) -> list[str]:
    """One process, these tests; a results file of its own beside that of the first run."""
    results = [f"{word}.again" for word in first if word.startswith(_XML)]
    return ["-v", *results, *failed]


def main(arguments: Sequence[str]) -> int:
    """The run's exit code."""
    code, failed = run_all(arguments)
    if failed and len(runs(arguments)) > 1:  # what pytest says of the first is far above by now
        print("\nfailed:", *failed, sep="\n  ")
        sys.stdout.flush()
    if os.environ.get("CI") != "true" or not may_be_repeated(code, failed):
        return code
    print(f"\nFLAKY? {len(failed)} failed and run once more, alone:", *failed, sep="\n  ")
    sys.stdout.flush()
    code, failed_again = run_pytest(second_arguments(arguments, failed))
    for name in failed:
        if name in failed_again or code not in {0, _TESTS_FAILED}:
            print(f"failed twice: {name}")
        else:
            print(f"FLAKY: failed, then passed alone: {name}")
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

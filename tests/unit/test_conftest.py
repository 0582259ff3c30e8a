"""The rules of the test run itself: what is marked, what is left out, what a skip means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import conftest

pytest_plugins = ["pytester"]

_CONFTEST = Path(__file__).parent.parent / "conftest.py"

_SUITE = """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="no wind today")
def test_is_skipped():
    pass

@pytest.mark.xfail(reason="known to fail", strict=True)
def test_is_expected_to_fail():
    assert False

@pytest.mark.soak
def test_takes_minutes():
    pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A directory of tests under the project's conftest; CI is not set."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(_CONFTEST.parent.parent))
    pytester.makeini(
        "[pytest]\nmarkers =\n    kernel: k\n    soak: s\n    alone: a\n    needs: n\n"
    )
    pytester.makeconftest(_CONFTEST.read_text(encoding="utf-8"))
    pytester.makepyfile(test_suite=_SUITE)
    return pytester


def test_a_skip_is_a_skip_by_default(suite: pytest.Pytester) -> None:
    result = suite.runpytest_subprocess()
    result.assert_outcomes(passed=1, skipped=1, xfailed=1, deselected=1)
    assert result.ret == pytest.ExitCode.OK


def test_a_skip_fails_when_skips_are_forbidden(suite: pytest.Pytester) -> None:
    result = suite.runpytest_subprocess("--no-skip")
    # The skip happens while the test is set up, and a failure there is an error to pytest.
    result.assert_outcomes(passed=1, errors=1, xfailed=1, deselected=1)
    result.stdout.fnmatch_lines(["*--no-skip forbids it: *no wind today*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_ci_forbids_skips(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = suite.runpytest_subprocess()
    result.assert_outcomes(passed=1, errors=1, xfailed=1, deselected=1)


def test_a_module_that_skips_itself_fails_when_skips_are_forbidden(
    suite: pytest.Pytester,
) -> None:
    suite.makepyfile(test_absent="import pytest\npytest.importorskip('no_such_module')\n")
    result = suite.runpytest_subprocess("--no-skip", "test_absent.py")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_absent.py skipped itself, and --no-skip forbids it: *"])


def test_soak_tests_run_when_asked_for(suite: pytest.Pytester) -> None:
    result = suite.runpytest_subprocess("--soak", "-m", "soak")
    result.assert_outcomes(passed=1, deselected=3)


_NEEDS = """
import pytest

@pytest.mark.needs("wings")
def test_flies():
    pass

@pytest.mark.needs("legs")
def test_walks():
    assert False
"""

_NO_WINGS = """
from tests.helpers import capabilities
capabilities.unmet = lambda names: "no wings" if "wings" in names else ""
"""


def test_what_a_host_need_not_have_is_left_out_and_all_else_fails(suite: pytest.Pytester) -> None:
    suite.makeconftest(_CONFTEST.read_text(encoding="utf-8") + _NO_WINGS)
    suite.makepyfile(test_needs=_NEEDS)
    result = suite.runpytest_subprocess("--no-skip", "test_needs.py")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["host*"])


_TIMES = """
import json, os, time, pytest
from pathlib import Path

@pytest.mark.parametrize("number", range(12))
def test_beside_others(number):
    began = time.monotonic()
    time.sleep(0.05)
    write("beside", began)

@pytest.mark.alone
def test_alone():
    began = time.monotonic()
    time.sleep(0.3)
    write("alone", began)

def write(name, began):
    line = json.dumps([name, began, time.monotonic(), os.getpid()])
    with open(os.environ["TIMES"], "a") as file:
        file.write(line + "\\n")
"""


def test_nothing_runs_beside_a_test_that_wants_to_be_alone(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("test_one", "test_two"):
        suite.makepyfile(**{name: _TIMES})
    times = suite.path / "times"
    monkeypatch.setenv("TIMES", str(times))
    result = suite.runpytest_subprocess(
        "-n", "2", "--dist", "loadfile", "test_one.py", "test_two.py"
    )
    result.assert_outcomes(passed=26)
    ran = [json.loads(line) for line in times.read_text().splitlines()]
    assert len(ran) == 26
    assert len({pid for _, _, _, pid in ran}) == 2
    alone = [(began, ended) for name, began, ended, _ in ran if name == "alone"]
    assert len(alone) == 2
    for began, ended in alone:
        beside = [row for row in ran if row[1] < ended and row[2] > began and row[1] != began]
        assert not beside
    # The others did run side by side, or the test would show nothing.
    others = [row for row in ran if row[0] == "beside"]
    assert any(a[1] < b[2] and b[1] < a[2] and a[3] != b[3] for a in others for b in others)


_TIMED_SUITE = """
import pytest

def _seconds(request):
    return request.node.get_closest_marker("timeout").args[0]

def test_with_the_usual_timeout(request):
    assert _seconds(request) == 180

@pytest.mark.timeout(100)
def test_with_one_of_its_own(request):
    assert _seconds(request) == 300
"""


def test_on_a_slow_host_every_test_has_more_time(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYFORWARDER_SLOWNESS", "3")
    suite.makeini("[pytest]\ntimeout = 60\nmarkers =\n    kernel: k\n    soak: s\n    needs: n\n")
    suite.makepyfile(test_suite=_TIMED_SUITE)
    suite.runpytest_subprocess().assert_outcomes(passed=2)


def test_smoke_is_the_first_test_of_each_folder_of_kernel_tests_and_all_of_some_modules(
    suite: pytest.Pytester,
) -> None:
    two = "def test_one(): pass\ndef test_two(): pass\n"
    for folder, name in (
        ("view", "test_daemon.py"),
        ("view", "test_view.py"),
        ("contract", "test_commands.py"),
    ):
        (suite.path / "kernel" / folder).mkdir(parents=True, exist_ok=True)
        (suite.path / "kernel" / folder / name).write_text(two)
    result = suite.runpytest_subprocess("--smoke", "-v")
    # test_suite.py is no kernel test, and left out with its four
    result.assert_outcomes(passed=3, deselected=7)
    result.stdout.fnmatch_lines(["*test_commands.py::test_two PASSED*"])
    result.stdout.no_fnmatch_line("*test_daemon.py::test_two*")
    result.stdout.no_fnmatch_line("*test_view.py*")


def test_failures_are_written_where_they_are_wanted(suite: pytest.Pytester, tmp_path: Path) -> None:
    path = tmp_path / "failed"
    suite.makepyfile(
        test_more="import pytest\n"
        "def test_bad(): assert False\n"
        "@pytest.fixture\ndef broken(): assert False\n"
        "def test_broken(broken): pass\n"
    )
    suite.runpytest_subprocess("--failures-to", str(path))
    assert path.read_text() == "test_more.py::test_bad\ntest_more.py::test_broken\n"


def test_what_lasts_long_comes_first(suite: pytest.Pytester) -> None:
    (suite.path / "kernel" / "daemon").mkdir(parents=True)
    for name in ("kernel/daemon/test_pins.py", "kernel/daemon/test_upgrade.py"):
        (suite.path / name).write_text("def test_one(): pass\ndef test_two(): pass\n")
    result = suite.runpytest_subprocess("--collect-only", "-q")
    found = [line.partition("::")[0] for line in result.outlines if "::" in line]
    later = [*["kernel/daemon/test_pins.py"] * 2, *["test_suite.py"] * 3]
    assert found == ["kernel/daemon/test_upgrade.py"] * 2 + later


def test_what_is_said_to_last_long_is_there() -> None:
    kernel = _CONFTEST.parent / "kernel"
    modules = {str(path.relative_to(kernel)) for path in kernel.rglob("test_*.py")}
    assert modules >= conftest._LONG | conftest._SMOKE_WHOLE

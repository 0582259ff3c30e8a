"""The rules of the test run itself: what is marked, what is left out, what a skip means."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    pytester.makeini("[pytest]\nmarkers =\n    kernel: k\n    soak: s\n")
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

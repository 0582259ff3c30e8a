"""What every test gets: markers by directory, skips that can be forbidden, hypothesis profiles.

    --no-skip    a test that is skipped has failed; CI=true in the environment means the same
    --soak       also run the tests marked `soak`, which take minutes

HYPOTHESIS_PROFILE=deep in the environment tries many more examples per property than `fast` does.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Final

import hypothesis
import pytest

pytest.register_assert_rewrite("tests.helpers")

_KERNEL_TESTS: Final = Path(__file__).parent / "kernel"

# No deadline per example: other work on the machine must not fail a property. What hangs is ended
# by the timeout of the test.  print_blob: a failure says how to repeat it.
hypothesis.settings.register_profile(
    "fast",
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "deep", hypothesis.settings.get_profile("fast"), max_examples=100_000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skip",
        action="store_true",
        default=os.environ.get("CI") == "true",
        help="a skipped test has failed (the default where CI=true)",
    )
    parser.addoption("--soak", action="store_true", help="also run the tests marked soak")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is in tests/kernel; leave out soak tests unless they were asked for."""
    soaking = bool(config.getoption("--soak"))
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        if item.path.is_relative_to(_KERNEL_TESTS):
            item.add_marker(pytest.mark.kernel)
        if item.get_closest_marker("kernel") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root: sudo scripts/test"))
        (left_out if item.get_closest_marker("soak") and not soaking else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # An expected failure is reported as skipped too, and is none.
    if item.config.getoption("--no-skip") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and --no-skip forbids it: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole module that skips itself while it is imported."""
    report = yield
    if collector.config.getoption("--no-skip") and report.skipped:
        report.outcome = "failed"
        report.longrepr = (
            f"{collector.nodeid} skipped itself, and --no-skip forbids it: {_reason(report)}"
        )
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why something was skipped; pytest keeps it as (path, line, "Skipped: why")."""
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext

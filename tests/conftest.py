"""What every test gets: markers by directory, skips that can be forbidden, hypothesis profiles.

    --no-skip    a test that is skipped has failed; CI=true in the environment means the same
    --soak       also run the tests marked `soak`, for minutes; --soak-for SECONDS says how long

HYPOTHESIS_PROFILE=deep in the environment tries many more examples per property than `fast` does.

With pytest-xdist (`-n 2 --dist loadfile`, as scripts/test has it) modules run side by side, but
nothing beside a test marked `alone`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator, Iterator
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
    parser.addoption(
        "--soak-for",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a test marked soak goes on (default: 600)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is in tests/kernel; leave out soak tests unless they were asked for."""
    soaking = bool(config.getoption("--soak"))
    # They look at the clock between two rounds, and then put things away.
    soak_timeout_s = config.getoption("--soak-for") + 300
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        if item.path.is_relative_to(_KERNEL_TESTS):
            item.add_marker(pytest.mark.kernel)
        if item.get_closest_marker("kernel") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root: sudo scripts/test"))
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(soak_timeout_s))
        (left_out if item.get_closest_marker("soak") and not soaking else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture
def soak_s(request: pytest.FixtureRequest) -> float:
    """How long a soak test should go on."""
    seconds: float = request.config.getoption("--soak-for")
    return seconds


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of pytest-timeout: waiting is no fault
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """In a process of xdist: wait until nothing runs that this test must not run beside."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    with _turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextlib.contextmanager
def _turn(*, alone: bool) -> Iterator[None]:
    """Hold this file's lock: shared, or `alone`.

    Whoever waits for it holds the directory's meanwhile, behind which the next ones wait: else one
    that wants to be alone would be passed by others for ever.
    """
    with contextlib.ExitStack() as stack:
        running, queue = (
            stack.enter_context(_opened(path)) for path in (Path(__file__), Path(__file__).parent)
        )
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Not left to close(): a process that was forked meanwhile has the descriptor too.
            fcntl.flock(running, fcntl.LOCK_UN)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


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

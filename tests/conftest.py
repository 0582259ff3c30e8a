"""What every test gets: markers by directory, skips that can be forbidden, hypothesis profiles.

    --no-skip    a test that is skipped has failed; CI=true in the environment means the same
    --attach clsact    splice as on kernels before 6.6, on any kernel
    --soak       also run the tests marked `soak`, for minutes; --soak-for SECONDS says how long

    --smoke      only the first test of each folder in tests/kernel, and all of some modules
    --failures-to FILE   write the ids of the tests that failed there, one a line

HYPOTHESIS_PROFILE=deep in the environment tries many more examples per property than `fast` does.

With pytest-xdist (`-n 5 --dist loadfile`, as scripts/test has it) modules run side by side, but
nothing beside a test marked `alone`.

The head of the report says what this host's kernel can do (helpers/capabilities.py). A test marked
`needs("tcx")` is left out on a host that need not have it, with a line in the head that says why;
on one that must have it and has not, it runs and fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

import hypothesis
import pytest

from pyforwarder.runtime import slowness

pytest.register_assert_rewrite("tests.helpers")

_KERNEL_TESTS: Final = Path(__file__).parent / "kernel"

# Of these --smoke takes every test: the commands as users call them.
_SMOKE_WHOLE: Final = frozenset(
    {
        *("contract/test_commands.py", "host/test_host.py", "host/test_selftest.py"),
        "users/test_as_a_user.py",
    }
)

# Modules that last for a minute and more begin first: one that begins last is waited for alone.
_LONG: Final = frozenset(
    {
        *("contract/test_bad_peers.py", "contract/test_lifecycle.py"),
        *("daemon/test_taken_over.py", "daemon/test_upgrade.py", "daemon/test_worker_faults.py"),
        *("datapath/test_conformance.py", "datapath/test_differential.py"),
        *("connections/test_oracles.py", "express/test_express.py"),
        *("fleet/test_failover.py", "fleet/test_fleet.py", "sessions/test_floods.py"),
        *("splice/test_splice.py", "splice/test_tail.py", "splice/test_transfers.py"),
        *("users/test_page.py", "users/test_real_clients.py"),
    }
)

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
    parser.addoption(
        "--attach",
        choices=["clsact"],
        help="attach programs to interfaces by clsact also where the kernel has tcx",
    )
    parser.addoption("--soak", action="store_true", help="also run the tests marked soak")
    parser.addoption(
        "--soak-for",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a test marked soak goes on (default: 600)",
    )

    parser.addoption(
        "--smoke",
        action="store_true",
        help="only the first test of each folder in tests/kernel, and those of whole modules that "
        "_SMOKE_WHOLE names",
    )
    parser.addoption(
        "--failures-to", metavar="FILE", help="write the ids of the tests that failed, one a line"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the failures where --failures-to says; what is no test's is no line of it."""
    path = terminalreporter.config.getoption("--failures-to")
    if path is None:
        return
    failed = terminalreporter.getreports("failed") + terminalreporter.getreports("error")
    ids = dict.fromkeys(report.nodeid for report in failed)
    Path(path).write_text("".join(f"{nodeid}\n" for nodeid in ids), encoding="utf-8")


def pytest_report_header(config: pytest.Config) -> list[str]:
    from tests.helpers import capabilities

    return [] if hasattr(config, "workerinput") else capabilities.header()


def pytest_configure(config: pytest.Config) -> None:
    """What is attached to interfaces is attached so by every process that tests start.

    And Ctrl-C is heard by all, though a shell has begun us in the background.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--attach"):
        os.environ["PYFORWARDER_ATTACH"] = config.getoption("--attach")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is in tests/kernel; leave out soak tests unless they were asked for.

    And those that need what a host like this one need not have. What lasts long comes first.
    """
    items.sort(key=lambda item: _module(item) not in _LONG)  # all else stays in its order
    soaking = bool(config.getoption("--soak"))
    # They look at the clock between two rounds, and then put things away.
    soak_timeout_s = config.getoption("--soak-for") + 300
    seen: set[Path] = set()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        if _module(item):
            item.add_marker(pytest.mark.kernel)
        if item.get_closest_marker("kernel") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root: sudo scripts/test"))
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(soak_timeout_s))
        _scale_timeout(item)
        is_left_out = (item.get_closest_marker("soak") and not soaking) or _excused(item)
        if config.getoption("--smoke") and not is_left_out:
            is_left_out = not _is_smoke(item, seen)
        (left_out if is_left_out else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _module(item: pytest.Item) -> str:
    """The test's module below tests/kernel; "" if it is no kernel test."""
    path = item.path
    return str(path.relative_to(_KERNEL_TESTS)) if path.is_relative_to(_KERNEL_TESTS) else ""


def _is_smoke(item: pytest.Item, seen: set[Path]) -> bool:
    """Whether the test is of the small set; `seen` are the folders of which one was taken."""
    module = _module(item)
    if not module:
        return False
    is_first = item.path.parent not in seen
    seen.add(item.path.parent)
    return is_first or module in _SMOKE_WHOLE


def _scale_timeout(item: pytest.Item) -> None:
    """On a slow host (pyforwarder/runtime/slowness.py), give the test more time."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getini("timeout") or 0)
    if seconds and slowness.factor() > 1:
        item.add_marker(pytest.mark.timeout(slowness.scaled_s(seconds)), append=False)


def _excused(item: pytest.Item) -> bool:
    """Whether this host need not have what the test is marked to need."""
    names = {name for marker in item.iter_markers("needs") for name in marker.args}
    if not names:
        return False
    from tests.helpers import capabilities

    return bool(capabilities.unmet(tuple(sorted(names))))


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

    A process that waits for it holds the directory's lock meanwhile, behind which the next ones
    wait: else others would pass one that wants to be alone for ever.
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

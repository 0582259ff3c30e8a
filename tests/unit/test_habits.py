"""What tests may not do unless it is written down here why: sleep, skip, be quick, import another.

A sleep in place of a wait makes a test slow on a quick machine and wrong on a slow one; so does an
assertion that little time has passed, which says nothing about what the time went into. A skip can
hide a failure: what a host need not have is left out by `needs` (tests/conftest.py) instead. What
two test modules share is a helper.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

_TESTS: Final = Path(__file__).parents[1]

# What lasts so long is the play itself: nothing is waited for.
SLEEPS: Final = {
    "kernel/daemon/test_other_records.py "
    "test_nothing_is_left_where_one_of_both_is_killed_in_the_midst_of_it": (
        "so long after the old one has retired one is killed"
    ),
    "kernel/sessions/test_datagrams.py test_limits_hold_for_sessions": (
        "so much later the client speaks again"
    ),
    "kernel/fleet/test_failover.py test_ends_that_have_waited_longer_and_longer_send_at_once": (
        "so long nobody has the addresses"
    ),
    "kernel/fleet/test_failover.py deaths": "when a machine dies, and how late that is noticed",
    "kernel/fleet/test_failover_express.py "
    "test_pairs_of_express_go_on_through_deaths_and_moves_and_new_ones_get_other_ports": (
        "the store has the names of pairs; nobody says when another machine has them"
    ),
    "kernel/fleet/test_limits.py "
    "test_client_that_goes_from_machine_to_machine_has_little_more_than_it_may": (
        "the pace of a client that connects"
    ),
    "kernel/fleet/test_replication_cost.py wait": "the pace of the replicator",
    "kernel/fleet/test_replication_cost.py shares": (
        "the pace at which pairs begin, and so long nothing begins or ends"
    ),
    "kernel/sessions/test_floods.py flood": "the pace of a flood that a queue takes",
    "kernel/sessions/test_floods.py test_made_up_addresses_deny_nobody": (
        "so much later the client speaks again"
    ),
    "kernel/datapath/test_memory.py test_what_stalled_pairs_hold_is_bounded": (
        "the client pushes at this pace"
    ),
    "helpers/quic_peers.py close": "0 s: asyncio closes the transports in its next turn",
    "helpers/quic_peers.py server": "0 s: asyncio closes the socket in its next turn",
    "kernel/sockmap/test_exit.py send": "the pace of a peer that sends slowly",
    "kernel/splice/test_keeper.py hangs": "the keeper hangs for so long",
    "kernel/splice/test_keeper.py test_no_pair_begins_after_its_worker_has_given_the_keeper_up": (
        "the keeper has gone on by then, and nothing is to come of it"
    ),
    "kernel/splice/test_questions.py trouble": "the keeper is stopped for so long",
    "kernel/splice/test_questions.py test_what_happens_while_the_keeper_is_asked": (
        "the keeper is stopped for so long"
    ),
    "kernel/daemon/test_taken_over.py look": "nothing happens for so long",
    "kernel/daemon/test_upgrade_many.py play": (
        "so long it is measured what there is without an upgrade"
    ),
    "unit/supervisor/processes/test_child.py _prepare": "a child that lives until it is killed",
    "unit/test_keeper_client.py slow": "the answer comes so late",
    "unit/supervisor/processes/test_loader.py hangs": "a child that hangs until it is killed",
    "unit/supervisor/workers/test_ending.py closes_and_ends": "an end that takes a moment",
}
# A mode of the tests, or a machine, that has no such thing: `needs` knows capabilities of kernels.
SKIPS: Final = {
    "conftest.py pytest_collection_modifyitems": "without root the others run",
    "kernel/sessions/test_sessions.py": "PYFORWARDER_TEST_DATAPATH=copy",
    "kernel/splice/test_walls.py": "PYFORWARDER_TEST_DATAPATH=copy",
    "kernel/splice/test_walls_ends.py": "PYFORWARDER_TEST_DATAPATH=copy",
    "kernel/splice/test_walls_fuzz.py": "PYFORWARDER_TEST_DATAPATH=copy",
    "unit/test_seccomp.py": "a machine without a table of system calls has no filter",
    "unit/test_store.py": "needs root",
}


# How long something took, and must not have taken longer. What must not wait is given so long to
# wait that its test would be ended instead (`timeout`), or the loop's clock is the test's
# (helpers/clock.py), or order is proven as order.
_RESET: Final = "kernel/fleet/test_failover_reset.py"
_VRRP: Final = "kernel/fleet/test_keepalived.py"
CLOCKS: Final = {
    "kernel/fleet/test_failover.py deaths": (
        "how long a death may be noticed is promised (docs), and measured"
    ),
    "kernel/fleet/test_failover.py test_ends_that_have_waited_longer_and_longer_send_at_once": (
        "the same; alone, and ends left alone would be silent for 1.3 s more, not 0.5"
    ),
    f"{_RESET} test_both_ends_of_what_is_not_known_are_reset_as_soon_as_they_speak": (
        "the same; ends left alone wait for minutes"
    ),
    f"{_RESET} test_ends_that_only_wait_are_reset_at_once_where_nobody_can_go_on": (
        "the same; ends left alone wait for ever"
    ),
    "kernel/fleet/test_failover_express.py "
    "test_what_is_younger_than_a_second_is_reset_as_soon_as_its_ends_speak": (
        "the same; ends left alone wait for minutes"
    ),
    "kernel/fleet/test_fleet.py test_editions_are_in_force_on_three_machines_in_a_moment": (
        "promised and measured; of many times the one in the middle"
    ),
    "kernel/fleet/test_replication_cost.py test_a_thousand_pairs_that_begin_each_second": (
        "processor time for each second, measured; alone, and of many seconds the one in the middle"
    ),
    f"{_VRRP} test_pairs_go_on_when_keepalived_notices_a_death_and_when_it_is_stopped": (
        "promised and measured, with a keepalived that notices within 0.1 s"
    ),
    "kernel/connections/test_names.py "
    "test_names_of_one_client_that_nobody_answers_stop_nobody_else": (
        "thirty are served meanwhile; one that waits for those names does so for three seconds"
    ),
    "kernel/splice/test_keeper.py test_a_keeper_that_goes_on_is_asked_again_at_once": (
        "twenty pairs, one of which may wait for 0.25 s; if each did, it were five"
    ),
    "kernel/splice/test_keeper.py test_a_keeper_that_hangs_keeps_nobody_waiting_and_is_replaced": (
        "the same"
    ),
    "unit/supervisor/test_messages.py test_closing_what_was_sent_does_not_linger": (
        "a close(2) that would last a minute, and ends by a signal that ends a test's time as well"
    ),
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """All modules of the tests, by their paths."""
    paths = sorted(_TESTS.rglob("*.py"))
    return {str(path.relative_to(_TESTS)): ast.parse(path.read_text()) for path in paths}


def uses(names: frozenset[str]) -> Iterator[str]:
    """Where attributes of these names are called: file, and function if it is in one."""
    for where, module in modules().items():
        pending: list[tuple[ast.AST, str]] = [(module, "")]
        while pending:
            node, function = pending.pop()
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in names
                and ast.unparse(node.func.value) in ("time", "asyncio", "pytest", "pytest.mark")
            ):
                yield f"{where} {function}".rstrip()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # What decorates a function is the module's.
                pending += [(child, function) for child in node.decorator_list]
                pending += [(child, node.name) for child in node.body]
            else:
                pending += [(child, function) for child in ast.iter_child_nodes(node)]


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (SLEEPS, frozenset({"sleep"})),
        (SKIPS, frozenset({"skip", "skipif", "xfail", "importorskip"})),
    ],
    ids=["sleeps", "skips"],
)
def test_every_one_of_them_has_a_reason(table: dict[str, str], names: frozenset[str]) -> None:
    assert set(uses(names)) == set(table)


# What reads a clock.
_READ: Final = frozenset({"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "time"})


def reads_clock(node: ast.AST) -> bool:
    """Whether that is what a clock says now."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _READ
        and ast.unparse(node.func.value) == "time"
    )


def assigned(module: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """The names and attributes that a module assigns something to, or appends it to."""
    pairs: list[tuple[ast.expr, ast.expr]] = []
    for node in ast.walk(module):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs += zip(target.elts, node.value.elts, strict=False)
                else:
                    targets = target.elts if isinstance(target, ast.Tuple) else [target]
                    pairs.append((targets[-1], node.value))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "append"
        ):
            pairs.append((node.func.value, node.args[0]))
    for target, value in pairs:
        if isinstance(target, ast.Name | ast.Attribute):
            yield target.id if isinstance(target, ast.Name) else target.attr, value


class Durations:
    """What of a module says how long something took: `names` are those that are known so far."""

    def __init__(self, module: ast.Module, names: frozenset[str] = frozenset()) -> None:
        self.names = set(names)
        self._moments = {name for name, value in assigned(module) if reads_clock(value)}
        functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
        values = [
            *assigned(module),
            *(
                (function.name, node.value)
                for function in functions
                for node in ast.walk(function)
                if isinstance(node, ast.Return) and node.value is not None
            ),
        ]
        while found := {name for name, value in values if self.is_one(value)} - self.names:
            self.names |= found

    def is_one(self, node: ast.AST) -> bool:
        """Whether a duration is in that expression."""
        return any(
            (isinstance(each, ast.BinOp) and isinstance(each.op, ast.Sub) and self._is_since(each))
            or (isinstance(each, ast.Name) and each.id in self.names)
            or (isinstance(each, ast.Attribute) and each.attr in self.names)
            for each in ast.walk(node)
        )

    def _is_since(self, node: ast.BinOp) -> bool:
        return reads_clock(node.left) or any(
            (isinstance(side, ast.Name) and side.id in self._moments)
            for side in (node.left, node.right)
        )


@functools.cache
def durations_of_helpers() -> frozenset[str]:
    """What helpers say of themselves so, and no variable."""
    names: set[str] = set()
    for where, module in modules().items():
        if where.startswith("helpers/"):
            public = {
                each.name if isinstance(each, ast.FunctionDef) else each.attr
                for each in ast.walk(module)
                if isinstance(each, ast.FunctionDef | ast.Attribute)
            }
            names |= Durations(module).names & public
    return frozenset(names)


def upper_bounds(module: ast.Module) -> Iterator[str]:
    """The functions of a module that assert that something took less than so long."""
    durations = Durations(module, durations_of_helpers())
    for function in ast.walk(module):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Assert):
                continue
            for compare in ast.walk(node.test):
                if not isinstance(compare, ast.Compare):
                    continue
                sides = [compare.left, *compare.comparators]
                for smaller, sign, larger in zip(sides, compare.ops, sides[1:], strict=False):
                    if isinstance(sign, ast.Gt | ast.GtE):
                        smaller, larger = larger, smaller
                    elif not isinstance(sign, ast.Lt | ast.LtE):
                        continue
                    if durations.is_one(smaller):
                        yield function.name


def test_what_must_have_been_quick_has_a_reason() -> None:
    found = {
        f"{where} {function}"
        for where, module in modules().items()
        for function in upper_bounds(module)
    }
    assert found == set(CLOCKS)


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("assert time.monotonic() - began_s < 5", True),
        ("assert 5 > time.perf_counter() - began_s", True),
        ("assert 0.1 <= time.monotonic() - began_s < 5", True),
        ("took_s = time.monotonic() - began_s; assert took_s <= 5, took_s", True),
        ("self.took_s = max(0, time.monotonic() - began_s); assert max(self.took_s) < 5", True),
        ("n, took_s = 1, time.monotonic() - began_s; assert n and took_s < 5", True),
        ("assert time.monotonic() - began_s >= 5", False),
        ("assert time.monotonic() < deadline_s", False),
        ("assert row['age_s'] < 5", False),
    ],
)
def test_what_must_have_been_quick_is_found(line: str, is_found: bool) -> None:
    module = ast.parse(f"def test() -> None:\n    {line}\n")
    assert list(upper_bounds(module)) == ["test"] * is_found


def test_no_test_module_imports_another() -> None:
    found = {
        f"{where} {node.module}"
        for where, module in modules().items()
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and re.match(r"tests\.(\w+\.)*test_", node.module or "")
    }
    assert found == set()

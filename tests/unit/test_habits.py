"""What tests may not do unless it is written down here why: sleep, skip, import another test.

A sleep in place of a wait makes a test slow on a quick machine and wrong on a slow one. A skip can
hide a failure: what a host need not have is left out by `needs` (tests/conftest.py) instead. What
two test modules share is a helper.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

_TESTS: Final = Path(__file__).parents[1]

# What lasts so long is the play itself: nothing is waited for.
SLEEPS: Final = {
    "kernel/test_datagrams.py test_limits_hold_for_sessions": (
        "so much later the client speaks again"
    ),
    "kernel/test_failover.py test_ends_that_have_waited_longer_and_longer_send_at_once": (
        "so long nobody has the addresses"
    ),
    "kernel/test_failover.py deaths": "when a machine dies, and how late that is noticed",
    "kernel/test_floods.py flood": "the pace of a flood that a queue takes",
    "kernel/test_floods.py test_made_up_addresses_deny_nobody": (
        "so much later the client speaks again"
    ),
    "kernel/test_memory.py test_what_stalled_pairs_hold_is_bounded": (
        "the client pushes at this pace"
    ),
    "helpers/quic_peers.py close": "0 s: asyncio closes the transports in its next turn",
    "helpers/quic_peers.py server": "0 s: asyncio closes the socket in its next turn",
    "kernel/test_sockmap_exit.py send": "the pace of a peer that sends slowly",
    "kernel/test_splice_keeper.py hangs": "the keeper hangs for so long",
    "kernel/test_splice_keeper.py test_no_pair_begins_after_its_worker_has_given_the_keeper_up": (
        "the keeper has gone on by then, and nothing is to come of it"
    ),
    "kernel/test_splice_questions.py trouble": "the keeper is stopped for so long",
    "kernel/test_splice_questions.py test_what_happens_while_the_keeper_is_asked": (
        "the keeper is stopped for so long"
    ),
    "kernel/test_taken_over.py look": "nothing happens for so long",
    "unit/test_child.py _prepare": "a child that lives until it is killed",
    "unit/test_keeper_client.py slow": "the answer comes so late",
    "unit/test_preparing.py hangs": "a child that hangs until it is killed",
}
# A mode of the tests, or a machine, that has no such thing: `needs` knows capabilities of kernels.
SKIPS: Final = {
    "conftest.py pytest_collection_modifyitems": "who is not root runs the others",
    "kernel/test_splice_sessions.py": "PYFORWARDER_TEST_DATAPATH=copy",
    "kernel/test_splice_walls.py": "PYFORWARDER_TEST_DATAPATH=copy",
    "kernel/test_splice_walls_ends.py": "PYFORWARDER_TEST_DATAPATH=copy",
    "kernel/test_splice_walls_fuzz.py": "PYFORWARDER_TEST_DATAPATH=copy",
    "unit/test_seccomp.py": "a machine without a table of system calls has no filter",
    "unit/test_store.py": "who is not root",
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


# What one other module uses, and is to be a helper.
IMPORTS: Final = {
    "unit/test_session_adoption.py tests.unit.test_session_handover",
}


def test_no_test_module_imports_another() -> None:
    found = {
        f"{where} {node.module}"
        for where, module in modules().items()
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith(("tests.unit.test_", "tests.kernel.test_"))
    }
    assert found == IMPORTS

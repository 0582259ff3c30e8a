"""What a missing capability means, on hosts of several kinds."""

from __future__ import annotations

import pytest

from pyforwarder.runtime.host import Lockdown
from tests.helpers.capabilities import REFUSALS, TABLE, Host, State

REFUSES = sorted(REFUSALS["no map iterators"].refuses)


def a_host(kernel: tuple[int, int], *missing: str, refusal: str = "") -> Host:
    return Host(kernel, Lockdown.NONE, dict.fromkeys(missing, "refused"), refusal)


def test_what_is_there_needs_no_excuse() -> None:
    here = a_host((6, 12))
    assert all(here.has(name) and not here.excuse(name) for name in TABLE)


def test_old_kernel_need_not_have_what_came_later() -> None:
    here = a_host((6, 1), "tcx")
    assert here.state("tcx") is State.TOO_OLD
    assert here.excuse("tcx") == "tcx came with Linux 6.6, this is 6.1"


@pytest.mark.parametrize("name", TABLE)
def test_what_a_kernel_must_have_and_has_not_is_a_fault(name: str) -> None:
    here = a_host((6, 6), name)
    assert here.state(name) is State.MISSING
    assert here.excuse(name) == ""
    assert any("MISSING" in line and name in line for line in here.lines())


def test_known_refusal_excuses_what_it_names_and_nothing_else() -> None:
    here = a_host((6, 18), *REFUSES, "tcx", refusal="no map iterators")
    assert {name for name in TABLE if here.state(name) is State.REFUSED} == set(REFUSES)
    assert here.state("tcx") is State.MISSING


def test_same_failures_on_a_host_that_is_not_known_for_them_are_faults() -> None:
    here = a_host((6, 18), *REFUSES)
    assert {name for name in TABLE if here.state(name) is State.MISSING} == set(REFUSES)

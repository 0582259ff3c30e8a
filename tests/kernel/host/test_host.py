"""The host: what a kernel of its version must have is there, and what it refuses is known."""

from __future__ import annotations

import pytest

from pyforwarder.runtime import host
from tests.helpers.capabilities import REFUSALS, TABLE, State, this_host


@pytest.mark.parametrize("name", TABLE)
def test_host_has_what_its_kernel_must_have(name: str) -> None:
    here = this_host()
    assert here.state(name) is not State.MISSING, here.errors[name]


def test_process_has_every_capability_that_bpf_asks_for() -> None:
    # Without them every answer above would be about this process and not about the host.
    assert host.missing_capabilities(host.Capability) == ()
    assert not host.in_user_namespace()


def test_lockdown_is_known() -> None:
    assert host.lockdown() is not host.Lockdown.UNKNOWN


def test_host_that_refuses_is_exactly_one_that_is_known() -> None:
    here = this_host()
    refused = {name for name in TABLE if here.state(name) is State.REFUSED}
    assert refused == (REFUSALS[here.refusal].refuses if here.refusal else set())

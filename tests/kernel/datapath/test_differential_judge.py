"""The differential tests can tell right from wrong: what is right passes, every fault is found."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from tests.helpers import traffic
from tests.helpers.faults import RST, Action, faults
from tests.helpers.netns import Network, narrow_the_network
from tests.helpers.relay import Fault, Relay
from tests.helpers.waiting import DEADLINE_S

SEED = 4711
CONVERSATIONS = 150
# What hangs is found by it; the slowest right conversation takes well under one.
HANGS_AFTER_S = 2.0


def _bad(fault: Fault, *, deadline_s: float = DEADLINE_S) -> list[tuple[traffic.Result, list[str]]]:
    conversations = [traffic.conversation(SEED, number) for number in range(CONVERSATIONS)]
    direct = traffic.run(conversations)
    with Relay(fault) as relay:
        forwarded = traffic.run(conversations, via=relay.address, deadline_s=deadline_s)
    judged = [
        (result, traffic.faults(direct[number], result)) for number, result in forwarded.items()
    ]
    assert len(judged) == CONVERSATIONS
    return [(result, found) for result, found in judged if found]


def test_direct_conversations_follow_their_scripts() -> None:
    results = traffic.run([traffic.conversation(SEED, number) for number in range(1000)])
    judged = [(result, traffic.faults(result, result)) for result in results.values()]
    bad = [(result, found) for result, found in judged if found]
    assert not bad, traffic.report(SEED, bad)


def test_the_same_seed_makes_the_same_conversations() -> None:
    assert [traffic.conversation(SEED, number) for number in range(50)] == [
        traffic.conversation(SEED, number) for number in range(50)
    ]


@pytest.mark.parametrize("network_is", ["wide", "narrow"])
def test_a_correct_forwarder_passes(network_is: str) -> None:
    if network_is == "narrow":
        narrow_the_network()
    bad = _bad(Fault.NONE)
    assert not bad, traffic.report(SEED, bad)


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.NONE])
def test_a_faulty_forwarder_is_found(fault: Fault) -> None:
    if fault is Fault.LOSES_TAIL_ON_FIN:
        narrow_the_network()  # with loopback's buffers nothing ever waits in the forwarder
    assert _bad(fault, deadline_s=HANGS_AFTER_S)


@pytest.mark.parametrize("thrown_away", [0, 1])
def test_a_reset_that_is_lost_is_a_fault_unless_a_kernel_has_thrown_bytes_away(
    monkeypatch: pytest.MonkeyPatch, thrown_away: int
) -> None:
    """The end that waits for it hears of it by asking, and is not stuck."""
    monkeypatch.setattr(traffic, "_ASKS_AFTER_S", 0.2)
    counts = itertools.chain([0], itertools.repeat(thrown_away))
    monkeypatch.setattr(traffic, "thrown_away", lambda: next(counts))
    talk = next(
        one
        for one in (traffic.conversation(SEED, number) for number in range(1000))
        if one.kind == "reset by server"
    )
    with contextlib.closing(Network()) as network, network.entered(), faults() as lossy:
        lossy.set(flags=RST, exact={1: Action.LOSE})
        with lossy.put_on((network, "lo")):
            (result,) = traffic.run([talk]).values()
    assert (result.client.reset, result.client.asked, result.stuck) == (True, True, False)
    found = traffic.faults(result, result)
    assert bool(found) == (not thrown_away), found

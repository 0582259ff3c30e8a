"""Any rules and any first packet, from bytes that nobody has thought of.

scripts/fuzz/run does the same for as long as it is told to, led by what code each input reaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.first_packets import CLIENTS, TURNS, mutated_clients
from tests.helpers.fuzzing import (
    LEAVES,
    MATCHERS,
    Reader,
    Stopwatch,
    examine,
    examine_header,
    examine_matcher,
    examine_rules,
    rules_from,
)

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.matcher import Matcher
    from pyforwarder.core.routing import Ruleset

# A thousand times what the typical decision takes: catches another order of growth, not a slow
# machine.
WATCH = Stopwatch(most_s=0.2)

programs = st.binary(min_size=3, max_size=24).map(lambda data: rules_from(Reader(data)))
first_packets = st.one_of(
    mutated_clients(),
    st.binary(max_size=64),
    st.sampled_from([b"".join(turns) for turns in TURNS.values()]),
)


@given(st.binary(max_size=200))
def test_any_bytes_at_all(data: bytes) -> None:
    examine(data, WATCH)


@given(programs, first_packets)
def test_any_rules_and_what_clients_send(rules: Ruleset, data: bytes) -> None:
    examine_rules(rules, data, WATCH)


@given(st.sampled_from(MATCHERS), st.sampled_from(list(CLIENTS.values())), st.integers(0, 40))
def test_a_full_first_packet_takes_no_time(
    named: tuple[str, Matcher], data: bytes, cut: int
) -> None:
    name, matcher = named
    text = (data[: len(data) - cut] or b"x") * 16384
    examine_matcher(name, matcher, text[:16384], WATCH)


@given(mutated_clients())
def test_headers_that_are_none(data: bytes) -> None:
    examine_header(data, WATCH)


def test_every_leaf_can_be_reached() -> None:
    assert len(LEAVES) < 256

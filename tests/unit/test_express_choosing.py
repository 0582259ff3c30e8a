"""What the kernel does about upstreams of several servers is what a worker's balancer does."""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyforwarder.config import Upstream, parse_config
from pyforwarder.core.address import Address
from pyforwarder.core.express.choosing import (
    LOG_ERROR,
    MOST_SERVERS,
    MOST_TURNS,
    ByClient,
    Choice,
    InTurn,
    Target,
    choice_among,
    logarithm,
    sources_for,
    targets_of,
    why_not,
)
from pyforwarder.core.server_choice import MOST_DRAWN
from pyforwarder.core.upstreams import Balancer

if TYPE_CHECKING:
    from pyforwarder.core.upstreams import ServerState

PORT = 7000
weights = st.lists(st.integers(0, 256), min_size=1, max_size=8)
small_weights = st.lists(st.integers(0, 9), min_size=1, max_size=6)
addresses = st.one_of(
    st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address),
    st.integers(2**32 << 32, 2**128 - 1).map(ipaddress.IPv6Address),
)


def upstream(weights: Sequence[int], balance: str, **more: object) -> Upstream:
    servers = [
        {"address": f"10.0.0.{n}:80", "weight": weight} for n, weight in enumerate(weights, start=1)
    ]
    document = {"upstreams": {"up": {"servers": servers, "balance": balance, **more}}}
    return parse_config(json.dumps(document), source="test").upstreams["up"]


def choice_of(settings: Upstream, now_s: float = 0.0) -> Choice | Address | None:
    fit = Balancer(settings).fit(now_s)
    return choice_among("up", settings.balance, fit, PORT)


@given(small_weights)
def test_turns_are_those_of_a_worker(weights: list[int]) -> None:
    settings = upstream(weights, "round_robin")
    chosen, balancer = choice_of(settings), Balancer(settings)
    if isinstance(chosen, InTurn):
        turns = [balancer.choose("10.1.1.1", 0.0) for _ in chosen.servers * 2]
        assert [turn.address for turn in turns if turn] == [*chosen.servers * 2]
    else:
        only = balancer.choose("10.1.1.1", 0.0)
        assert chosen == (only.address if only else None)


many_weights = st.one_of(
    st.lists(st.integers(1, 256), min_size=2, max_size=256),
    st.lists(st.integers(1, 2), min_size=2, max_size=256),
    # Nearly all alike: a short round of many servers.
    st.builds(
        lambda alike, count, odd: [*[alike] * count, *odd],
        st.integers(1, 256),
        st.integers(1, 255),
        st.lists(st.integers(1, 4), min_size=1, max_size=1),
    ),
)


@given(many_weights, st.data())
@example([1] * 127 + [2], None)
@example([1] * 256, None)
def test_what_the_kernel_is_said_to_choose_among_is_a_round_however_many_there_are(
    weights: list[int], data: st.DataObject | None
) -> None:
    """Also of those that are left."""
    servers = cast(
        "list[ServerState]",
        [
            SimpleNamespace(
                name=str(n), address=Address("10.0.0.1", n), weight=weight, backup=False, seed=n
            )
            for n, weight in enumerate(weights, start=1)
        ],
    )
    why = why_not("round_robin", servers)
    chosen = choice_among("up", "round_robin", servers, PORT)
    assert (chosen is None) is bool(why)
    if isinstance(chosen, InTurn):
        assert 0 < len(chosen.servers) <= MOST_TURNS
        assert set(chosen.servers) == {server.address for server in servers}
    if not why and data is not None:
        left = data.draw(st.lists(st.sampled_from(servers), min_size=1, unique_by=id))
        assert choice_among("up", "round_robin", left, PORT) is not None


@given(weights, st.lists(addresses, min_size=1, max_size=20))
def test_a_client_has_the_server_that_a_worker_gives_it(
    weights: list[int], clients: list[ipaddress.IPv4Address]
) -> None:
    settings = upstream(weights, "source_hash")
    chosen, balancer = choice_of(settings), Balancer(settings)
    for client in clients:
        said = balancer.choose(str(client), 0.0)
        if isinstance(chosen, ByClient):
            found = chosen.choose(client)
            assert found is None or (said is not None and found == said.address)
        else:
            assert chosen == (said.address if said else None)


def test_nearly_all_clients_are_certain() -> None:
    chosen = choice_of(upstream([1] * MOST_SERVERS, "source_hash"))
    assert isinstance(chosen, ByClient)
    found = [chosen.choose(ipaddress.IPv4Address(n << 8 | 7)) for n in range(4000)]
    assert found.count(None) < 20
    assert len({one for one in found if one}) == MOST_SERVERS


@given(st.integers(1, MOST_DRAWN))
def test_logarithms_are_as_exact_as_they_are_said_to_be(number: int) -> None:
    exact = -math.log2(Fraction(number, MOST_DRAWN)) * 2**32
    assert abs(logarithm(number) - exact) < LOG_ERROR - 1


@pytest.mark.parametrize("number", [1, 2, 3, MOST_DRAWN - 1, MOST_DRAWN, MOST_DRAWN // 2])
def test_logarithms_at_the_ends(number: int) -> None:
    exact = -math.log2(Fraction(number, MOST_DRAWN)) * 2**32
    assert abs(logarithm(number) - exact) < LOG_ERROR - 1


def test_a_server_that_is_down_drained_or_ejected_is_not_chosen() -> None:
    settings = upstream([1, 1, 1], "round_robin", eject={"failures": 2, "for": "5s"})
    balancer = Balancer(settings)
    first, second, third = (server.address for server in balancer.servers)

    def among(now_s: float) -> object:
        chosen = choice_among("up", "round_robin", balancer.fit(now_s), PORT)
        return chosen.servers if isinstance(chosen, InTurn) else chosen

    assert among(0.0) == (first, second, third)
    balancer.mark_down("10.0.0.1:80")
    assert among(0.0) == (second, third)
    balancer.drain({"10.0.0.2:80"})
    assert among(0.0) == third
    assert balancer.rests_until_s(0.0) == math.inf
    for _ in range(2):
        balancer.failed(balancer.servers[2], 0.0)
    # A worker tries an ejected server, for want of a better one.
    assert balancer.choose("10.1.1.1", 0.0) is balancer.servers[2]
    assert among(0.0) is None
    assert balancer.rests_until_s(0.0) == 5.0
    assert among(5.0) == third
    balancer.drain(())
    balancer.mark_up("10.0.0.1:80", 5.0)
    assert among(5.0) == (first, second, third)


def test_backups_wait_until_nobody_else_is_left() -> None:
    servers = ["10.0.0.1:80", {"address": "10.0.0.2:80", "backup": True}]
    document = {"upstreams": {"up": {"servers": servers, "balance": "least_pairs"}}}
    settings = parse_config(json.dumps(document), source="test").upstreams["up"]
    balancer = Balancer(settings)
    assert why_not(settings.balance, settings.servers) == ""
    for down, left in (("10.0.0.9:80", 1), ("10.0.0.1:80", 2)):
        balancer.mark_down(down)
        assert choice_among("up", "least_pairs", balancer.fit(0.0), PORT) == Address(
            f"10.0.0.{left}", 80
        )
    balancer.mark_down("10.0.0.2:80")
    assert choice_among("up", "least_pairs", balancer.fit(0.0), PORT) is None


@pytest.mark.parametrize(
    ("weights", "balance", "why"),
    [
        ([1, 1], "least_pairs", "userspace alone knows who has the fewest pairs"),
        ([1, 0], "least_pairs", ""),
        ([0, 0], "round_robin", "its servers get no new pairs"),
        ([256, 1], "round_robin", f"a round of its servers' weights has more than {MOST_TURNS}"),
        ([255, 1], "round_robin", ""),
        ([1] * 127 + [2], "round_robin", "a round of its servers' weights is too much work"),
        ([1] * 200, "round_robin", ""),
        ([256, 128], "round_robin", ""),
        ([256, 1], "source_hash", ""),
        ([1] * MOST_SERVERS, "source_hash", ""),
        ([1] * (MOST_SERVERS + 1), "source_hash", f"more than {MOST_SERVERS} servers"),
    ],
)
def test_what_only_userspace_can_choose(weights: list[int], balance: str, why: str) -> None:
    settings = upstream(weights, balance)
    found = why_not(settings.balance, settings.servers)
    assert found.startswith(why)
    assert bool(found) is bool(why)
    assert (choice_of(settings) is None) is bool(why)


def test_a_server_at_the_port_of_the_listener() -> None:
    document = {"upstreams": {"up": {"servers": ["10.0.0.1:same", "10.0.0.2:81"]}}}
    settings = parse_config(json.dumps(document), source="test").upstreams["up"]
    chosen = choice_of(settings)
    assert isinstance(chosen, InTurn)
    assert chosen.servers == (Address("10.0.0.1", PORT), Address("10.0.0.2", 81))


def test_a_server_with_a_name_is_userspaces() -> None:
    document = {"upstreams": {"up": {"servers": ["10.0.0.1:80", "name:80"]}}}
    settings = parse_config(json.dumps(document), source="test").upstreams["up"]
    assert choice_of(settings) is None


@pytest.mark.parametrize("balance", ["round_robin", "source_hash"])
def test_a_source_is_part_of_the_choice_and_of_every_target(balance: str) -> None:
    servers = Balancer(upstream([2, 1], balance)).fit(0.0)
    plain = choice_among("up", balance, servers, PORT)
    chosen = choice_among("up", balance, servers, PORT, "10.0.0.9")
    assert isinstance(chosen, InTurn | ByClient)
    assert chosen != plain
    one, two = Address("10.0.0.1", 80), Address("10.0.0.2", 80)
    assert set(targets_of(chosen)) == {Target(one, "10.0.0.9"), Target(two, "10.0.0.9")}
    assert len(targets_of(chosen)) == 2  # each once
    # A single server with a source is no address, which would stand for itself alone.
    alone = choice_among("up", balance, servers[:1], PORT, "10.0.0.9")
    assert alone == InTurn("up", (one,), "10.0.0.9")
    assert choice_among("up", balance, servers[:1], PORT) == one
    assert targets_of(one) == (Target(one),)


def test_sources_are_those_of_the_ip_version() -> None:
    sources = ("10.0.0.9", "fd00::9", "10.0.0.10")
    assert sources_for(sources, is_ipv6=False) == ("10.0.0.9", "10.0.0.10")
    assert sources_for(sources, is_ipv6=True) == ("fd00::9",)
    assert sources_for((), is_ipv6=True) == ()

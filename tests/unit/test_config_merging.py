"""A machine's own configuration and the fleet's become one."""

from __future__ import annotations

import pytest

from pyforwarder.config import Config, parse_config
from pyforwarder.config.merging import check_shared, merged_text
from pyforwarder.config.upstream import why_not_taken
from pyforwarder.errors import ConfigError

FLEET = "fleet: {endpoints: ['http://127.0.0.1:2379'], name: edge}\n"
OWN = (
    FLEET
    + "listeners:\n- {name: own, bind: '127.0.0.1:1', rules: [{match: any, to: mine}]}\n"
    + "upstreams: {mine: {servers: ['10.0.0.1:80'], registered: ['10.0.0.0/8', '::1']}}\n"
)
SHARED = (
    "listeners:\n- {name: main, bind: '127.0.0.1:2', rules: [{match: any, to: web}]}\n"
    "upstreams: {web: {servers: ['off.test:80']}}\n"
)


def joined(own: str, shared: str, servers: dict[str, dict[str, int]] | None = None) -> Config:
    text = merged_text(own, shared, servers or {}, own_source="own", shared_source="shared")
    return parse_config(text, source="whole")


def test_both_are_in_force() -> None:
    config = joined(OWN, SHARED)
    assert [listener.name for listener in config.listeners] == ["own", "main"]
    assert sorted(config.upstreams) == ["mine", "web"]
    assert str(config.upstreams["web"].servers[0].address) == "off.test:80"


def test_without_an_edition_it_is_the_machines_own() -> None:
    assert joined(OWN, "") == parse_config(OWN, source="own")


def test_words_that_yaml_takes_for_something_else_stay_what_they_were() -> None:
    own = OWN.replace("name: own,", "name: 'off', first_packet: {timeout: 1s}, ")
    assert joined(own, SHARED).listeners[0].name == "off"


def test_a_machine_of_a_fleet_may_have_no_listener() -> None:
    assert joined(FLEET, "").listeners == ()
    assert len(joined(FLEET, SHARED).listeners) == 1
    with pytest.raises(ConfigError, match="needs a listener"):
        parse_config("listeners: []", source="x")


def test_servers_that_registered_from_where_they_may() -> None:
    servers = {
        "mine": {"10.0.0.1:80": 9, "10.0.0.2:80": 5, "[::1]:80": 0, "192.0.2.1:80": 1},
        "web": {"10.0.0.3:80": 1},  # takes none
        "none": {"10.0.0.4:80": 1},
    }
    config = joined(OWN, SHARED, servers)
    assert [(str(s.address), s.weight) for s in config.upstreams["mine"].servers] == [
        ("10.0.0.1:80", 1),
        ("10.0.0.2:80", 5),
        ("[::1]:80", 0),
    ]
    assert len(config.upstreams["web"].servers) == 1


@pytest.mark.parametrize(
    ("upstream", "address", "why"),
    [
        ("mine", "10.0.0.1:80", ""),  # stands there
        ("mine", "10.0.0.2:80", ""),
        ("mine", "[::1]:80", ""),
        ("mine", "192.0.2.1:80", "the upstream 'mine' takes servers from 10.0.0.0/8, ::1 alone"),
        (
            "web",
            "10.0.0.3:80",
            "the upstream 'web' has no `registered`: it takes no servers that register",
        ),
        ("none", "10.0.0.4:80", "there is no upstream 'none'"),
    ],
)
def test_a_server_that_is_not_taken_has_a_reason(upstream: str, address: str, why: str) -> None:
    servers = {upstream: {address: 1}}
    for config in (joined(OWN, SHARED), joined(OWN, SHARED, servers)):
        assert why_not_taken(config.upstreams, upstream, address) == why


def test_an_upstream_may_wait_for_its_servers() -> None:
    shared = "upstreams: {web: {registered: [10.0.0.0/8]}}"
    assert joined(FLEET, shared).upstreams["web"].servers == ()
    with pytest.raises(ConfigError, match="an upstream needs a server"):
        parse_config("upstreams: {web: {}}", source="x")


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        (SHARED.replace("main", "own"), "shared, line 2, listeners[0].name: this machine has a"),
        (SHARED.replace("web:", "mine:"), "shared, line 3, upstreams.mine: this machine has an"),
    ],
)
def test_what_both_have_is_an_error_in_the_fleets(shared: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        joined(OWN, shared)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        ("user: root", "shared, line 1, user: 'user' is each machine's own"),
        ("listner: []", "shared, line 1, listner: 'listner' is each machine's own, did you mean"),
        ("[]", "shared: must be keys and values"),
        ("listeners: 3", "shared, line 1, listeners: must be a list"),
        ("x: {", "shared, line 2: not YAML"),
        (
            SHARED.replace("to: web", "to: mine"),
            "shared, line 2, listeners[0].rules[0].to: no upstream is called 'mine'",
        ),
    ],
)
def test_what_no_fleet_can_share(shared: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_shared(shared, OWN, source="shared")
    assert str(caught.value).startswith(said)


def test_rules_may_name_a_machines_keys_and_users() -> None:
    own = OWN + "users: {ann: /etc/ann}\ntokens: {keys: {k1: /etc/k1}}\n"
    shared = (
        "listeners: [{bind: '127.0.0.1:2', rules: [{match: socks, users: [ann], allow: [any]},"
        " {match: instruction, token: required, allow: [any]}]}]"
    )
    check_shared(shared, own, source="shared")
    with pytest.raises(ConfigError, match="no user is called 'ann'"):
        check_shared(shared, OWN, source="shared")


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        ("{name: e}", "the key 'endpoints' is missing"),
        ("{name: e, endpoints: []}", "a store needs an endpoint"),
        ("{name: e, endpoints: '10.0.0.1:2379'}", "write http://10.0.0.1:2379 or https://"),
        ("{name: e, endpoints: 'http://a'}", "is no endpoint"),
        ("{name: e, endpoints: 'http://a:99999'}", "is no endpoint"),
        ("{name: e, endpoints: 'http://a:1/v3'}", "is no endpoint"),
        ("{name: e, endpoints: 'http://u:p@a:1'}", "is no endpoint"),
        ("{name: e, endpoints: 'https://a:1'}", "https wants `tls: {ca: /FILE}`"),
        ("{name: e, endpoints: 'http://a:1', tls: {ca: /x}}", "with `tls` all endpoints are https"),
        ("{name: e, endpoints: 'https://a:1', tls: {ca: /x, cert: /y}}", "goes with its key"),
        ("{name: e, endpoints: 'http://a:1', user: u}", "a user goes with a file"),
        ("{name: a/b, endpoints: 'http://a:1'}", "a/b"),
    ],
)
def test_a_fleet_that_cannot_be(fleet: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"fleet: {fleet}\n", source="x")
    assert said in str(caught.value)

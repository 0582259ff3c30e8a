"""What `check` says where a pair could not go on through another machine."""

from __future__ import annotations

import pytest

from pyforwarder.config import parse_config
from pyforwarder.config.warnings import config_warnings

MOVING = "192.0.2.1, 10.0.9.1"
LISTENER = "{bind: '192.0.2.1:443', freebind: true, rules: [{match: any, to: web}]}"
UPSTREAM = "{servers: ['10.0.9.100:443'], source: [10.0.9.1]}"


def warnings(
    listener: str = LISTENER, upstream: str = UPSTREAM, more: str = "", moving: str = MOVING
) -> list[str]:
    text = (
        "fleet: {endpoints: ['http://10.0.0.1:2379'], name: edge, "
        f"failover: {{addresses: [{moving}]}}}}\nuser: root\n{more}"
        f"listeners: [{listener}]\nupstreams:\n  web: {upstream}\n"
    )
    return config_warnings(parse_config(text, source="x.yaml"), text, source="x.yaml")


def test_nothing_is_said_where_nothing_is_missing() -> None:
    assert warnings() == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"listener": LISTENER.replace("freebind: true, ", "")}, "it wants `freebind: true`"),
        ({"listener": LISTENER.replace("192.0.2.1", "192.0.2.9")}, "so no pair can move"),
        ({"listener": LISTENER.replace("freebind", "splice: false, freebind")}, "`splice: false`"),
        (
            {"listener": LISTENER.replace("freebind", "datapath: copy, freebind")},
            "`datapath: copy`",
        ),
        ({"more": "datapath: sockmap\n"}, "only spliced ones move"),
    ],
)
def test_what_is_missing_is_said(changed: dict[str, str], said: str) -> None:
    (found,) = warnings(**changed)
    assert said in found


def rule(words: str) -> str:
    """A listener with this rule behind the one that fits."""
    return LISTENER.replace("{match: any, to: web}", f"{{match: tls, to: web}}, {{{words}}}")


def bound(address: str, words: str = "") -> str:
    """The listener that fits, and one with another address."""
    more = f"{{bind: '{address}', {words}rules: [{{match: any, to: web}}]}}"
    return f"{LISTENER}, {more}"


SIX = "192.0.2.1, 10.0.9.1, 'fd00::9'"
END = "end with this machine: "
NO_SOURCE = "only an upstream has a `source` that moves"


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("match: ssh, to: '10.0.9.100:22'", "rules[1].to: "),
        ("match: ssh, to: 'ssh.example:22'", "rules[1].to: "),
        ("match: ssh, to: '10.0.9.100:same'", "rules[1].to: "),
        ("match: tls, to: sni, allow: private", "rules[1].to: "),
        ("match: instruction, allow: private", "rules[1]: "),
        ("match: socks, allow: private", "rules[1]: "),
        ("match: http_connect, allow: private", "rules[1]: "),
    ],
)
def test_pairs_of_a_rule_without_an_upstream_have_no_source(words: str, where: str) -> None:
    found = [one for one in warnings(rule(words)) if "never reached" not in one]
    assert len(found) == 1
    assert f"listeners[0].{where}its pairs {END}" in found[0]
    assert found[0].endswith(NO_SOURCE)


def test_a_rule_that_makes_no_pairs_and_one_with_an_upstream_fit() -> None:
    assert warnings(rule("match: ssh, reject: reset")) == []
    assert warnings(rule("match: socks, to: web")) == []
    assert warnings(rule("match: ssh, to: web, datapath: splice")) == []


def test_a_rule_with_a_datapath_of_its_own_is_named_alone() -> None:
    (found,) = warnings(rule("match: ssh, to: web, datapath: copy"))
    assert f"listeners[0].rules[1].datapath: its pairs {END}`datapath: copy`" in found
    spliced = rule("match: ssh, to: web, datapath: splice")
    (found,) = warnings(spliced, more="datapath: copy\n")
    assert f"listeners[0].rules[0]: its pairs {END}`datapath: copy`" in found


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ("127.0.0.1:80", "pairs to 127.0.0.1:80 end with this machine: no packets of theirs leave"),
        ("localhost:80", "no packets of theirs leave it"),
        ("127.0.0.1:same", "no packets of theirs leave it"),
        ("192.0.2.1:80", "no packets of theirs leave it"),
        ("[::1]:80", "no packets of theirs leave it"),
        ("unix:/run/web", "no packets of theirs leave it"),
        ("[fd00::1]:80", "pairs to [fd00::1]:80 end with this machine: `source` has no IPv6"),
        ("[fd00::1]:same", "`source` has no IPv6 address"),
    ],
)
def test_a_server_that_no_source_that_moves_reaches_is_named(server: str, said: str) -> None:
    upstream = UPSTREAM.replace("443'", f"443', '{server}'")
    (found,) = warnings(upstream=upstream)
    assert "upstreams.web.servers[1]: " in found
    assert said in found
    # Without weight it gets no pairs.
    idle = UPSTREAM.replace("443'", f"443', {{address: '{server}', weight: 0}}")
    assert warnings(upstream=idle) == []


def test_servers_with_the_same_fault_are_one_sentence() -> None:
    upstream = UPSTREAM.replace("443'", "443', '127.0.0.1:1', '127.0.0.1:2', 'unix:/run/web'")
    (found,) = warnings(upstream=upstream)
    assert "servers[1]: pairs to 127.0.0.1:1 and 2 more end with this machine: " in found


def test_servers_of_this_host_want_no_source() -> None:
    found = warnings(upstream="{servers: ['127.0.0.1:80']}")
    assert not any("it wants" in one for one in found)
    assert any("no packets of theirs leave it" in one for one in found)


@pytest.mark.parametrize(
    ("servers", "moving", "said"),
    [
        ("'10.0.9.100:443'", MOVING, "it wants `source: [10.0.9.1]`, of the addresses in"),
        ("'web.example:443'", MOVING, "it wants `source: [10.0.9.1]`"),
        ("'10.0.9.100:443'", "192.0.2.1", "it wants `source: [192.0.2.1]`"),
        ("'10.0.9.100:443', '[fd00::1]:443'", SIX, "it wants `source: [10.0.9.1, fd00::9]`"),
        ("'[fd00::1]:443'", SIX, "it wants `source: [fd00::9]`"),
        ("'[fd00::1]:443'", MOVING, "which has no IPv6 address"),
    ],
)
def test_without_a_source_it_is_said_what_to_write(servers: str, moving: str, said: str) -> None:
    all_found = warnings(upstream=f"{{servers: [{servers}]}}", moving=moving)
    (found,) = [one for one in all_found if "nothing uses" not in one]
    assert f"upstreams.web: its pairs {END}" in found
    assert said in found


def test_the_source_to_write_is_one_that_no_listener_names() -> None:
    found = warnings(bound("0.0.0.0:80"), "{servers: ['10.0.9.100:443']}")
    assert "it wants `source: [10.0.9.1]`" in found[-1]


def test_a_source_that_stays_and_a_client_s_address_are_said() -> None:
    stays = UPSTREAM.replace("10.0.9.1]", "10.0.9.1, 10.0.9.2]")
    (found,) = warnings(upstream=stays)
    assert f"upstreams.web.source: pairs from 10.0.9.2 {END}it is not in" in found
    unused, foreign = warnings(upstream="{servers: ['10.0.9.100:443'], transparent: true}")
    assert "nothing uses 10.0.9.1: " in unused
    assert f"upstreams.web.transparent: its pairs {END}servers see the client's" in foreign


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("10.1.1.1:443", f"pairs of clients of 10.1.1.1 {END}it is not in `fleet.failover`"),
        ("10.1.1.1:1-9", f"pairs of clients of 10.1.1.1 {END}it is not in `fleet.failover`"),
        ("127.0.0.1:443", f"pairs of clients of 127.0.0.1 {END}it is not in `fleet.failover`"),
        ("0.0.0.0:80", "of 0.0.0.0 only pairs of clients of an address in `fleet.failover` move"),
        ("[::]:80", f"pairs of :: {END}`fleet.failover` has no IPv6 address"),
        ("unix:/run/x", "pairs of clients of `unix:` end with this machine"),
    ],
)
def test_a_listener_at_an_address_that_stays_is_named(address: str, said: str) -> None:
    (found,) = warnings(bound(address))
    assert "listeners[1].bind: " in found
    assert said in found


def test_a_wildcard_takes_connections_to_the_addresses_of_its_version() -> None:
    (found,) = warnings("{bind: '0.0.0.0:443', rules: [{match: any, to: web}]}")
    assert "of 0.0.0.0 only pairs" in found
    (found,) = warnings("{bind: '[::]:443', rules: [{match: any, to: web}]}")
    assert "so no pair can move" in found


def test_an_address_that_nothing_uses_is_named() -> None:
    (found,) = warnings(moving=f"{MOVING}, 10.0.9.7")
    assert "fleet.failover.addresses[2]: nothing uses 10.0.9.7: " in found
    udp = f"{LISTENER}, {{protocol: udp, bind: '10.0.9.7:53', rules: [{{match: any, to: web}}]}}"
    assert warnings(udp, moving=f"{MOVING}, 10.0.9.7") == []


def test_what_the_store_or_systemd_may_have_is_not_called_missing() -> None:
    text = (
        "fleet: {endpoints: ['http://10.0.0.1:2379'], name: edge, "
        f"failover: {{addresses: [{MOVING}]}}}}\nuser: root\n"
    )
    assert config_warnings(parse_config(text, source="x.yaml"), text, source="x.yaml") == []
    assert warnings("{name: s, bind: 'systemd:web', rules: [{match: any, to: web}]}") == []


def test_upstreams_of_sessions_alone_are_not_told_of() -> None:
    udp = f"{LISTENER.replace('to: web', 'reject: reset')}, "
    udp += "{protocol: udp, bind: '10.0.9.1:53', rules: [{match: any, to: web}]}"
    assert warnings(udp, "{servers: ['10.0.9.100:53']}") == []


def test_whether_the_store_is_made_to_forget_is_said() -> None:
    text = (
        "fleet: {endpoints: ['http://10.0.0.1:2379'], name: edge, "
        f"failover: {{addresses: [{MOVING}]%s}}}}\nuser: root\n"
    )
    for more, expected in (("", True), (", compact: true", True), (", compact: false", False)):
        fleet = parse_config(text % more, source="x.yaml").fleet
        assert fleet is not None
        assert fleet.failover is not None
        assert fleet.failover.compact is expected

"""What a program in the kernel could decide is what the rules decide, and nothing else."""

from __future__ import annotations

import ipaddress
from typing import Final

import pytest
from hypothesis import example, given

from pyforwarder.core.address import Address
from pyforwarder.core.express.conditions import BytesAt, ClientNetworks, ServerName
from pyforwarder.core.express.reading import MOST_BYTES, read_hello, read_request
from pyforwarder.core.first_packet.http import host_in, read_request_line
from pyforwarder.core.first_packet.outcome import NEED_MORE, Outcome
from pyforwarder.core.first_packet.tls import server_name_in
from pyforwarder.core.routing import Route
from tests.helpers.express import (
    LOCAL,
    OWN,
    SERVER,
    Rules,
    clients,
    compiled,
    decided,
    first_packets,
    http_request,
    rule_lists,
)
from tests.helpers.first_packets import CLIENTS, client_hello, mutated_clients


@given(rule_lists, first_packets, clients)
@example([{"match": {"client": "::/0"}, "to": SERVER}], b"x", "192.0.2.7")
@example([{"match": {"not": "tls"}, "to": SERVER}], b"\x16\x03", "192.0.2.7")
def test_what_the_table_decides_the_rules_decide(
    rules: list[dict[str, object]], data: bytes, client: str
) -> None:
    ruleset, found = compiled(rules)
    if found.table is None:
        return
    rule = found.table.decide(data, ipaddress.ip_address(client))
    if rule is None:
        return
    decision = ruleset.decide(data, Address(client, 4000), LOCAL.port, state=ruleset.begin())
    assert isinstance(decision, Route)
    assert (decision.rule.index, decision.skip, decision.negotiation) == (rule, 0, None)
    assert not decision.named_by_client
    # And more bytes change nothing.
    later = ruleset.decide(data + b"\0" * 50, Address(client, 4000), LOCAL.port)
    assert later == decision


@given(mutated_clients())
def test_what_is_read_of_a_hello_is_what_the_matcher_reads(data: bytes) -> None:
    hello = read_hello(data)
    said = server_name_in(data)
    if hello.begins is False:
        assert said is Outcome.NO_MATCH
    if hello.is_read:
        assert said == (hello.name.decode() if hello.name is not None else Outcome.NO_MATCH)


@given(mutated_clients())
def test_what_is_read_of_a_request_is_what_the_matcher_reads(data: bytes) -> None:
    request = read_request(data)
    if request.method == b"":
        assert host_in(data) is Outcome.NO_MATCH
    elif request.method is not None:
        assert read_request_line(data).method == request.method.decode()
    if request.host is not None:
        assert host_in(data) == request.host.decode()


REAL_HELLOS: Final = {
    name: data for name, data in CLIENTS.items() if not isinstance(server_name_in(data), Outcome)
}
# Of those whose target is a path and whose host is a name.
REAL_REQUESTS: Final = {
    name: data
    for name, data in CLIENTS.items()
    if isinstance(host_in(data), str) and read_request_line(data).target.startswith(b"/")
}


def test_there_are_real_clients_to_be_read() -> None:
    assert len(REAL_HELLOS) > 3
    assert len(REAL_REQUESTS) > 1


@pytest.mark.parametrize("name", REAL_HELLOS)
def test_the_hellos_of_real_clients_are_decided(name: str) -> None:
    data = REAL_HELLOS[name]
    wanted = str(server_name_in(data))
    rules: Rules = [
        {"match": {"tls": {"sni": "no.invalid"}}, "to": SERVER},
        {"match": {"tls": {"sni": wanted}}, "to": SERVER},
    ]
    assert decided(rules, data) == 1
    assert decided(rules, data[:-1]) is None


@pytest.mark.parametrize("name", REAL_REQUESTS)
def test_the_requests_of_real_clients_are_decided(name: str) -> None:
    data = REAL_REQUESTS[name]
    rules: Rules = [
        {"match": {"http": {"host": "no.invalid"}}, "to": SERVER},
        {"match": {"http": {"host": str(host_in(data))}}, "to": SERVER},
    ]
    assert decided(rules, data) == 1
    assert decided(rules, data[:30]) is None


def test_the_first_rule_that_matches_decides_also_by_a_shorter_ending() -> None:
    rules: Rules = [
        {"match": {"tls": {"sni": "*.com"}}, "to": SERVER},
        {"match": {"tls": {"sni": "a.example.com"}}, "to": "127.0.0.1:2"},
    ]
    assert decided(rules, client_hello(b"a.example.com")) == 0


def test_what_a_rule_in_front_takes_for_userspace_is_not_decided() -> None:
    rules: Rules = [
        {"match": {"tls": {"sni": "no.example.com"}}, "reject": "reset"},
        {"match": "tls", "to": SERVER},
    ]
    assert decided(rules, client_hello(b"no.example.com")) is None
    assert decided(rules, client_hello(b"yes.example.com")) == 1


def test_a_rule_that_goes_where_the_client_says_does_not_end_the_list() -> None:
    rules: Rules = [
        {"match": {"tls": {"sni": "*.example.com"}}, "to": "sni", "allow": ["any"]},
        {"match": "tls", "to": SERVER},
    ]
    _, found = compiled(rules)
    assert found.reasons == ("the client names the destination", "")
    assert decided(rules, client_hello(b"a.example.com")) is None
    assert decided(rules, client_hello(b"example.org")) == 1


def test_the_list_ends_with_the_first_rule_that_userspace_alone_can_judge() -> None:
    rules: Rules = [
        {"match": "ssh", "to": SERVER},
        {"name": "path", "match": {"http": {"path": "/v1/*"}}, "to": SERVER},
        {"match": "tls", "to": SERVER},
    ]
    _, found = compiled(rules)
    assert found.reasons == (
        "",
        "userspace alone compares `path` and `header`",
        "userspace decides the rule path in front of it",
    )
    assert decided(rules, b"SSH-2.0-x\r\n") == 0
    assert decided(rules, client_hello(b"x")) is None


@pytest.mark.parametrize(
    ("rule", "top", "listener", "reason"),
    [
        ({"to": "name:80"}, {}, {}, "userspace alone connects to names"),
        ({"to": "unix:/x"}, {}, {}, "userspace alone connects to names"),
        ({"to": "[::1]:80"}, {}, {}, "one connection is IPv4, the other IPv6"),
        ({"to": OWN}, {}, {}, "127.0.0.3:9999 is the forwarder itself"),
        ({"to": "127.0.0.3:same"}, {}, {}, "127.0.0.3:9999 is the forwarder itself"),
        ({"reject": "close"}, {}, {}, "userspace alone refuses"),
        ({"to": SERVER, "allow": ["loopback"]}, {}, {}, "userspace alone judges by `allow`"),
        ({"to": SERVER, "send_proxy": "v1"}, {}, {}, "userspace alone sends PROXY headers"),
        ({"to": SERVER, "datapath": "copy"}, {}, {}, "says `datapath: copy`"),
        ({"to": SERVER}, {"datapath": "sockmap"}, {}, "says `datapath: sockmap`"),
        ({"to": SERVER}, {}, {"splice": False}, "`splice: off`"),
        ({"to": SERVER}, {"limits": {"pairs_per_client": 5}}, {}, "`pairs_per_client`"),
        ({"to": SERVER}, {}, {"limits": {"new_per_second": 5}}, "`new_per_second`"),
        ({"to": SERVER}, {}, {"limits": {"memory": "8MiB"}}, "`memory`"),
        ({"to": SERVER}, {}, {"limits": {"pairs": 5}}, "`pairs`"),
        ({"to": SERVER}, {"splice_interfaces": "any"}, {}, "`splice_interfaces: any`"),
        (
            {"to": SERVER},
            {},
            {"proxy_protocol": {"accept": True, "trusted": ["any"]}},
            "userspace alone reads PROXY headers",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER, "127.0.0.2:2"], "balance": "least_pairs"}}},
            {},
            "upstream up: userspace alone knows who has the fewest pairs",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER, "[::1]:80"]}}},
            {},
            "one connection is IPv4, the other IPv6",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER, "unix:/x"]}}},
            {},
            "userspace alone connects to names",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER, OWN]}}},
            {},
            "127.0.0.3:9999 is the forwarder itself",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"registered": ["any"]}}},
            {},
            "its servers get no new pairs",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": ["name:1"]}}},
            {},
            "userspace alone connects to names",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [{"address": SERVER, "weight": 0}]}}},
            {},
            "its servers get no new pairs",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER], "source": ["127.0.0.9", "127.0.0.8"]}}},
            {},
            "upstream up: userspace alone chooses among several addresses of `source`",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER], "send_proxy": "v2"}}},
            {},
            "userspace alone sends PROXY headers",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER], "transparent": True}}},
            {},
            "userspace alone connects from the client's address",
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER], "slow_start": "5s"}}},
            {},
            "`slow_start`",
        ),
    ],
)
def test_what_userspace_alone_can_do_it_does(
    rule: dict[str, object], top: dict[str, object], listener: dict[str, object], reason: str
) -> None:
    _, found = compiled([{"match": "any", **rule}], top=top, listener=listener)
    assert found.table is None
    assert reason in found.reasons[0]


@pytest.mark.parametrize(
    ("rule", "top"),
    [
        ({"to": SERVER}, {}),
        ({"to": "127.0.0.2:same"}, {}),
        ({"to": SERVER, "send_proxy": "off"}, {}),
        ({"to": "up"}, {"upstreams": {"up": {"servers": [SERVER], "health": {}}}}),
        ({"to": "up"}, {"upstreams": {"up": {"servers": [SERVER], "balance": "least_pairs"}}}),
        ({"to": "up"}, {"upstreams": {"up": {"servers": [SERVER, "127.0.0.2:2"]}}}),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER, "127.0.0.2:2"], "balance": "source_hash"}}},
        ),
        (
            {"to": "up"},
            {"upstreams": {"up": {"servers": [SERVER, "127.0.0.2:2"], "registered": ["any"]}}},
        ),
    ],
)
def test_plain_servers_could_be_connected_to_in_the_kernel(
    rule: dict[str, object], top: dict[str, object]
) -> None:
    _, found = compiled([{"match": "any", **rule}], top=top)
    assert found.reasons == ("",)
    assert decided([{"match": "any", **rule}], b"x", top=top) == 0


def test_a_client_that_says_its_destination_is_for_userspace() -> None:
    _, found = compiled(
        [{"match": "instruction", "allow": ["any"]}, {"match": "any", "to": SERVER}]
    )
    assert found.table is None
    assert found.reasons[0] == "userspace alone reads this protocol"


def test_no_more_bytes_are_looked_at_than_the_rules_look_at() -> None:
    rules = [{"match": "any", "to": SERVER}]
    few = {"first_packet": {"max_bytes": 100}}
    assert decided(rules, b"x" * 100, listener=few) == 0
    assert decided(rules, b"x" * 101, listener=few) is None
    assert decided(rules, b"x" * MOST_BYTES) == 0
    assert decided(rules, b"x" * (MOST_BYTES + 1)) is None
    assert decided(rules, b"") is None


def test_the_ports_of_a_listener_have_tables_of_their_own() -> None:
    rules: Rules = [{"match": {"port": 9998}, "reject": "reset"}, {"match": "any", "to": SERVER}]
    assert decided(rules, b"x") == 1
    assert decided(rules, b"x", local=Address("127.0.0.1", 9998)) is None


def test_conditions_that_two_rules_have_are_one() -> None:
    rules: Rules = [
        {"match": {"tls": {"sni": "a"}, "client": "10.0.0.0/8"}, "to": SERVER},
        {"match": {"tls": {"sni": "a"}}, "to": SERVER},
        {"match": {"not": {"bytes": "x"}}, "to": SERVER},
    ]
    _, found = compiled(rules)
    table = found.table
    assert table is not None
    assert [type(one) for one in table.conditions] == [ServerName, ClientNetworks, BytesAt]
    assert [tuple(clause) for clause in table.clauses] == [(0, 0b11, 0), (1, 0b1, 0), (2, 0, 0b100)]


def test_rules_that_are_too_many_end_the_list() -> None:
    rules = [{"match": {"bytes": f"prefix {n}."}, "to": SERVER} for n in range(70)]
    _, found = compiled(rules)
    assert found.reasons[:64] == ("",) * 64
    assert "too many" in found.reasons[64] or "more than 64 rules" in found.reasons[64]
    assert found.reasons[69] == "userspace decides the rule bytes-65 in front of it"
    assert decided(rules, b"prefix 63. and more") == 63
    assert decided(rules, b"prefix 64. and more") is None


def test_a_match_of_many_ways_is_for_userspace_and_takes_no_time() -> None:
    pair = {"any_of": ["ssh", "tls"]}
    many = {"all": [{"any_of": [{"bytes": f"{n}{m}"} for m in range(4)]} for n in range(8)]}
    _, found = compiled([{"match": many, "to": SERVER}, {"match": pair, "to": SERVER}])
    assert found.reasons[0] == "it has too many conditions inside each other"
    assert found.table is None


def test_bytes_far_behind_are_for_userspace() -> None:
    match = {"bytes": {"prefix": "x", "offset": 64}}
    _, found = compiled([{"match": match, "to": SERVER}])
    assert "reach behind the first 64" in found.reasons[0]


@pytest.mark.parametrize("cut", range(1, 80))
def test_a_hello_in_pieces_is_not_decided(cut: int) -> None:
    data = client_hello(b"example.com")
    rules = [{"match": {"tls": {"sni": "example.com"}}, "to": SERVER}]
    assert decided(rules, data) == 0
    if cut < len(data):
        assert decided(rules, data[:cut]) is None
        assert read_hello(data[:cut]).is_read is False


def test_a_target_that_names_a_host_is_for_userspace() -> None:
    rules = [{"match": {"http": {"host": "b"}}, "to": SERVER}]
    data = http_request("b", target="http://a/")
    assert host_in(data) == "a"
    assert decided(rules, data) is None
    assert decided(rules, http_request("b")) == 0
    assert decided(rules, http_request("b").replace(b"\r\n\r\n", b"\r\nHost: a\r\n\r\n")) is None
    assert NEED_MORE is host_in(http_request("b")[:-2])


@pytest.mark.parametrize("source", [["127.0.0.9"], ["127.0.0.9", "::1"], ["::1", "::2"]])
def test_one_source_of_the_ip_version_is_the_kernels(source: list[str]) -> None:
    """A worker takes none of another version, either."""
    top = {"upstreams": {"up": {"servers": [SERVER], "source": source}}}
    _, found = compiled([{"match": "any", "to": "up"}], top=top)
    assert found.reasons == ("",)
    assert found.table is not None

"""A generation of the configuration: how it travels to a worker, and what a reload keeps."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.config import parse_config
from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import End, Refuse, Route
from pyforwarder.datapath.ebpf.abi import pack_endpoint
from pyforwarder.errors import ConfigError
from pyforwarder.runtime.counters import Directory
from pyforwarder.runtime.limits import SharedLimits, shared_memory
from pyforwarder.worker.generation import FOREIGN_LISTENER, Generation, counter_indexes, is_local
from pyforwarder.worker.settings import Settings, with_overrides
from tests.helpers.generations import generation_of, settings_of

TWO_LISTENERS = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    datapath: sockmap
    rules:
      - {match: {bytes: {prefix: "A"}}, to: web, datapath: copy}
      - {match: any, to: web}
  - name: second
    bind: unix:/run/second
    first_packet: {timeout: 250ms, max_bytes: 1KiB}
    rules:
      - {name: only, match: any, to: 127.0.0.1:9001}
upstreams:
  web: {servers: [127.0.0.1:9001, 127.0.0.1:9002], balance: least_pairs}
"""


# Settings on their way to a worker


texts = st.text(max_size=30)


@given(
    config_text=texts,
    source=texts,
    overrides=st.dictionaries(st.sampled_from(("listen", "datapath")), texts),
    keys=st.dictionaries(texts, st.binary(max_size=64), max_size=3),
    binds=st.dictionaries(texts, st.lists(texts, max_size=3).map(tuple), max_size=3),
    indexes=st.dictionaries(texts, st.integers(0, 4095), max_size=3),
)
def test_settings_arrive_as_they_were_sent(
    config_text: str,
    source: str,
    overrides: dict[str, str],
    keys: dict[str, bytes],
    binds: dict[str, tuple[str, ...]],
    indexes: dict[str, int],
) -> None:
    settings = Settings(config_text, source, overrides, keys, binds, indexes)
    assert Settings.from_json(settings.to_json()) == settings


def test_settings_are_json_that_any_end_can_read() -> None:
    settings = Settings("", "x", {}, {"ops": b"\x00\xff"}, {}, {})
    assert json.loads(settings.to_json())["keys"] == {"ops": "AP8="}


def test_generation_is_the_same_after_the_journey() -> None:
    settings = settings_of(TWO_LISTENERS)
    there = Generation(Settings.from_json(settings.to_json()), worker=1)
    assert there.config == Generation(settings, worker=1).config
    assert list(there.listeners) == ["main", "second"]


# What the command line overrides


def test_datapath_override_wins_over_every_other_choice() -> None:
    settings = settings_of(TWO_LISTENERS, overrides={"datapath": "splice"})
    generation = Generation(settings, worker=0)
    assert generation.listeners["main"].datapaths == ["splice", "splice"]
    assert generation.listeners["second"].datapaths == ["splice"]


def test_rule_then_listener_then_whole_file_choose_the_datapath() -> None:
    generation = generation_of(TWO_LISTENERS)
    assert generation.listeners["main"].datapaths == ["copy", "sockmap"]
    assert generation.listeners["second"].datapaths == ["auto"]


def test_listen_override_moves_the_first_listener_only() -> None:
    settings = settings_of(TWO_LISTENERS, overrides={"listen": "127.0.0.1:7777"})
    config = settings.config()
    assert config.listeners[0].bind == (Address("127.0.0.1", 7777),)
    assert config.listeners[1].bind == (UnixAddress("/run/second"),)


def test_override_that_cannot_be_used_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="listen"):
        with_overrides(parse_config("", source="test.yaml"), {"listen": "nowhere"})


# Listeners


def test_port_in_force_is_the_one_that_was_bound() -> None:
    settings = settings_of(
        TWO_LISTENERS, binds={"main": ("127.0.0.1:45678",), "second": ("unix:/run/second",)}
    )
    generation = Generation(settings, worker=0)
    main, second = generation.listeners["main"], generation.listeners["second"]
    assert (main.bind, main.local_port) == (Address("127.0.0.1", 45678), 45678)
    assert main.endpoint == pack_endpoint(Address("127.0.0.1", 45678))
    assert (second.is_unix, second.local_port) == (True, 0)
    # Own listeners are those addresses, so that nobody is connected to them in a loop.
    assert generation.own["tcp"].includes(Address("127.0.0.1", 45678), is_local=lambda _: True)
    assert not generation.own["tcp"].includes(Address("127.0.0.1", 45679), is_local=lambda _: True)


@pytest.mark.parametrize("bind", ["0.0.0.0:9999", "[::]:9999"])
def test_wildcard_listener_takes_its_endpoint_from_the_connection(bind: str) -> None:
    text = f"listeners: [{{bind: '{bind}', rules: [{{match: any, to: 127.0.0.1:1}}]}}]"
    (state,) = generation_of(text).listeners.values()
    assert state.endpoint is None


@pytest.mark.parametrize(
    ("match", "at_once"),
    [
        ("any", True),
        ("{port: 9999}", True),
        ("{client: 10.0.0.0/8}", True),
        ("{not: {client: 10.0.0.0/8}}", True),
        ("[{client: 10.0.0.0/8}, {all: [any, {port: 1}]}]", True),
        # For clients from elsewhere it is known at once that this is not their rule.
        ("{client: 10.0.0.0/8, tls: {}}", True),
        ("silence", False),
        ("{bytes: {prefix: A}}", False),
        ("{all: [{not: tls}, {bytes: {prefix: A}}]}", False),
    ],
)
def test_rule_that_may_need_no_byte_is_asked_at_once(match: str, at_once: bool) -> None:
    text = f"listeners: [{{bind: '127.0.0.1:9', rules: [{{match: {match}, to: 127.0.0.1:1}}]}}]"
    (state,) = generation_of(text).listeners.values()
    assert state.decides_at_once is at_once


def test_first_packet_bounds_are_the_listeners() -> None:
    second = generation_of(TWO_LISTENERS).listeners["second"]
    assert (second.timeout_s, second.max_bytes) == (0.25, 1024)


def test_rules_of_a_listener_are_those_of_the_file() -> None:
    main = generation_of(TWO_LISTENERS).listeners["main"]
    assert [rule.decode() for rule in main.rule_names] == [
        rule.name for rule in main.config.rules if rule.name
    ]
    decision = main.ruleset.decide(
        b"B", client=None, local_port=0, end=End.OPEN, now_unix_s=None, state=None
    )
    assert isinstance(decision, Route)
    assert decision.rule.index == 1


def test_listener_for_foreign_sockets_refuses_every_client() -> None:
    foreign = generation_of("").foreign_listener
    decision = foreign.ruleset.decide(
        b"", client=None, local_port=0, end=End.OPEN, now_unix_s=None, state=None
    )
    assert isinstance(decision, Refuse)
    assert (decision.reason, decision.reset) == (CloseReason.REJECTED, True)
    assert foreign.name == FOREIGN_LISTENER.name.encode()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_flood_of_one_listener_leaves_the_others_their_second(protocol: str) -> None:
    rules = "rules: [{match: any, to: 127.0.0.1:1}]"
    text = f"""
limits: {{new_per_second: 5}}
listeners:
  - name: flooded
    bind: 127.0.0.1:1000
    protocol: {protocol}
    limits: {{new_per_second: 2}}
    {rules}
  - {{name: other, bind: 127.0.0.1:1001, protocol: {protocol}, {rules}}}
"""
    listeners = generation_of(text).listeners
    limits = SharedLimits(shared_memory(1), worker=0, secret=b"s" * 16)

    def admitted(name: str, tries: int) -> int:
        answers = [limits.admit(None, listeners[name].scopes, 1000.0) for _ in range(tries)]
        return sum(isinstance(answer, tuple) for answer in answers)

    assert admitted("flooded", 100) == 2
    assert admitted("other", 100) == 3


# Reload


def test_reload_keeps_the_balancer_of_an_upstream_that_stays() -> None:
    before = generation_of(TWO_LISTENERS)
    balancer = before.balancers["web"]
    server = balancer.choose("192.0.2.1", 1000.0, [])
    assert server is not None
    balancer.opened(server)
    balancer.mark_down(balancer.servers[1].name)
    after = generation_of(TWO_LISTENERS.replace("least_pairs", "round_robin"), previous=before)
    assert after.balancers["web"] is balancer
    assert [state.pairs for state in balancer.servers] == [1, 0]
    assert balancer.choose("192.0.2.1", 1001.0, []) is balancer.servers[0]
    assert balancer.choose("192.0.2.1", 1001.0, [balancer.servers[0]]) is None


def test_reload_changes_the_servers_and_keeps_those_that_stay() -> None:
    before = generation_of(TWO_LISTENERS)
    kept = before.balancers["web"].servers[1]
    text = TWO_LISTENERS.replace(
        "[127.0.0.1:9001, 127.0.0.1:9002]", "[127.0.0.1:9002, 127.0.0.1:9003]"
    )
    after = generation_of(text, previous=before)
    assert after.balancers["web"].servers[0] is kept
    assert [server.name for server in after.balancers["web"].servers] == [
        "127.0.0.1:9002",
        "127.0.0.1:9003",
    ]


def test_upstream_that_is_gone_is_forgotten() -> None:
    before = generation_of(TWO_LISTENERS)
    assert generation_of("", previous=before).balancers == {}


def test_counters_keep_their_place_when_a_rule_is_put_before_them() -> None:
    directory = Directory()
    before = counter_indexes(parse_config(TWO_LISTENERS, source="a"), directory)
    text = TWO_LISTENERS.replace(
        "      - {name: only,", "      - {name: new, match: ssh, to: web}\n      - {name: only,"
    )
    after = counter_indexes(parse_config(text, source="a"), directory)
    assert {name: after[name] for name in before} == before
    assert after["second new"] not in before.values()


def test_configuration_that_is_wrong_is_a_config_error() -> None:
    settings = settings_of("")
    broken = Settings("listeners: 7", "x", {}, {}, {}, settings.indexes)
    with pytest.raises(ConfigError):
        Generation(broken, worker=0)


# Whether an address is this host's


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("192.0.2.1", False),
        ("::ffff:127.3.2.1", True),
        ("fe80::1%no-such-link", False),
        ("224.0.0.1", True),  # a group's: what is sent there may be heard here
    ],
)
def test_local_address_is_this_hosts(host: str, local: bool) -> None:
    assert is_local(host) is local

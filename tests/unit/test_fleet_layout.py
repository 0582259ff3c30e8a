"""What stands in a fleet's store is read as a stranger's word."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.address import Address
from pyforwarder.fleet.layout import (
    MOST_SERVERS,
    Edition,
    InstanceReport,
    Keys,
    Server,
    ValueFault,
    instances_in,
    newest_first,
    registered_servers,
)
from pyforwarder.supervisor.messages import FROM_FLEET, FleetInstances, understand

KEYS = Keys("edge")


def test_a_machines_report_is_cut_to_what_a_table_shows_and_what_is_none_is_left_out() -> None:
    keys = Keys("edge")
    report = InstanceReport(
        version="1" * 200,
        serial=3,
        pairs=7,
        why="x" * 4000,
        datapaths={"copy": "available", "splice": "no " * 100},
    )
    found = [
        (keys.instance("one"), report.encode().encode()),
        (keys.instance("two"), b"no json"),
        (keys.instance("old"), b'{"schema": 1, "version": "0.1"}'),
    ]
    one, old = instances_in(keys, found)
    assert len(FleetInstances.model_validate({"instances": [one, old]}).instances) == 2
    assert (one["instance"], one["serial"], one["pairs"]) == ("one", 3, 7)
    assert (one["datapaths"], list(one["unavailable"])) == (["copy"], ["splice"])
    assert (len(one["version"]), len(one["why"])) == (64, 256)
    assert (old["version"], old["pairs"], old["datapaths"]) == ("0.1", 0, [])
    assert len(instances_in(keys, found[:1] * 300)) == 256


def test_machines_whose_names_none_can_have_and_datapaths_that_look_the_same_are_left_out() -> None:
    """Else a scrape had the same metric twice, which Prometheus refuses."""
    value = InstanceReport(
        version="1", datapaths={"x" * 32: "no", "x" * 33: "available", "x" * 34: "no"}
    ).encode()
    names = ["one", "a" * 128, "a" * 129, "a/b", "", "a b", "\u00e4"]
    rows = instances_in(KEYS, [(KEYS.instance(name), value.encode()) for name in names])
    assert [row["instance"] for row in rows] == ["one", "a" * 128]
    assert (rows[0]["datapaths"], rows[0]["unavailable"]) == ([], {"x" * 32: "no"})
    assert len(FleetInstances.model_validate({"instances": rows}).instances) == 2


def test_keys_are_below_the_fleet() -> None:
    assert KEYS.config == "/pyforwarder/edge/current/config"
    assert KEYS.edition(12) == "/pyforwarder/edge/history/00000012"
    server = KEYS.server("web", Address("::1", 80))
    assert server == "/pyforwarder/edge/current/servers/web/[::1]:80"
    assert KEYS.instance("one") == "/pyforwarder/edge/instances/one"


def test_a_value_is_read_as_it_was_written() -> None:
    edition = Edition(serial=3, text="listeners: []\n", by="root@a", at="2026", comment="why")
    assert Edition.decode(edition.encode()) == edition
    assert json.loads(edition.encode())["schema"] == 1
    assert Server.decode(b"{}") == Server(weight=1)


def test_fields_of_later_versions_are_passed_over() -> None:
    assert Server.decode('{"weight": 2, "zone": "a"}') == Server(weight=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"schema": 2}',
        '{"schema": "1"}',
        '{"weight": 257}',
        '{"weight": -1}',
        '{"weight": "1"}',
        '{"weight": true}',
        '{"weight": 1e400}',
        "[" * 10_000,
    ],
)
def test_what_is_no_value_is_a_fault(text: str) -> None:
    with pytest.raises(ValueFault):
        Server.decode(text)


def test_an_edition_has_a_number_and_a_bound() -> None:
    for wrong in ({"serial": 0, "text": ""}, {"serial": 1}, {"serial": 1, "text": "x" * (1 << 21)}):
        with pytest.raises(ValueFault):
            Edition.decode(json.dumps(wrong))


@given(st.binary(max_size=300))
def test_no_value_raises_anything_else(value: bytes) -> None:
    for kind in (Edition, Server, InstanceReport):
        with contextlib.suppress(ValueFault):
            kind.decode(value)


def test_servers_by_upstream_with_their_faults() -> None:
    found = [
        ("web/10.0.0.1:80", b'{"weight": 3}'),
        ("web/[0::1]:80", b"{}"),
        ("web/[::1]:80", b'{"weight": 0}'),
        ("mail/10.0.0.1:25", b"{}"),
        ("web/name:80", b"{}"),
        ("web/10.0.0.2", b"{}"),
        ("web/10.0.0.2:0", b"{}"),
        ("web", b"{}"),
        ("/10.0.0.3:80", b"{}"),
        ("web/10.0.0.4:80", b"?"),
    ]
    servers, faults = registered_servers(
        KEYS, [(f"{KEYS.servers}{key}", value) for key, value in found]
    )
    assert servers == {"web": {"10.0.0.1:80": 3, "[::1]:80": 0}, "mail": {"10.0.0.1:25": 1}}
    assert [fault.removeprefix(KEYS.servers).partition(": ")[0] for fault in faults] == [
        "web/name:80",
        "web/10.0.0.2",
        "web/10.0.0.2:0",
        "web",
        "/10.0.0.3:80",
        "web/10.0.0.4:80",
    ]


@pytest.mark.parametrize(
    "key",
    [
        f"{'w' * 1025}/10.0.0.1:80",
        f"{'w' * 64}/10.0.0.1:80",
        f"web/{'1' * 70_000}",
        f"web/10.0.0.1:{'1' * 70_000}",
        f"web/[{':' * 70_000}",
        f"{'w' * 70_000}",
        "web\n/10.0.0.1:80",
    ],
)
def test_no_key_keeps_the_supervisor_from_hearing_of_the_others(key: str) -> None:
    """A message that is too long, or has too much in it, costs the process its life."""
    found = [(f"{KEYS.servers}{key}", b"{}"), (f"{KEYS.servers}web/10.0.0.2:80", b"{}")]
    servers, faults = registered_servers(KEYS, found)
    assert servers == {"web": {"10.0.0.2:80": 1}}
    assert len(faults) == 1
    said = {"serial": 0, "text": "", "servers": servers, "faults": faults}
    understand(said, [], FROM_FLEET)
    assert len(faults[0]) < 500


def test_never_more_servers_than_there_may_be() -> None:
    found = [
        (f"{KEYS.servers}web/10.{n >> 16}.{n >> 8 & 255}.{n & 255}:80", b"{}")
        for n in range(MOST_SERVERS + 10)
    ]
    servers, faults = registered_servers(KEYS, found)
    assert len(servers["web"]) == MOST_SERVERS
    assert faults == [f"more than {MOST_SERVERS} servers"]


@given(st.lists(st.tuples(st.text(max_size=60), st.binary(max_size=30)), max_size=5))
def test_no_key_raises_anything(found: list[tuple[str, bytes]]) -> None:
    registered_servers(KEYS, [(f"{KEYS.servers}{key}", value) for key, value in found])


def test_a_history_without_what_is_none_of_it() -> None:
    editions = [Edition(serial=serial, text="") for serial in (2, 10, 1)]
    found = [(str(edition.serial), edition.encode().encode()) for edition in editions]
    assert [e.serial for e in newest_first([*found, ("x", b"?")])] == [10, 2, 1]

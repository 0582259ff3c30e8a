"""What `check` says where a pair could not go on through another machine."""

from __future__ import annotations

import pytest

from pyforwarder.config import parse_config
from pyforwarder.config.warnings import config_warnings

MOVING = "192.0.2.1, 10.0.9.1"
LISTENER = "{bind: '192.0.2.1:443', freebind: true, rules: [{match: any, to: web}]}"
UPSTREAM = "{servers: ['10.0.9.100:443'], source: [10.0.9.1]}"


def warnings(listener: str = LISTENER, upstream: str = UPSTREAM, more: str = "") -> list[str]:
    text = (
        "fleet: {endpoints: ['http://10.0.0.1:2379'], name: edge, "
        f"failover: {{addresses: [{MOVING}]}}}}\nuser: root\n{more}"
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
        ({"upstream": "{servers: ['10.0.9.100:443']}"}, "`source` is none that moves"),
        ({"upstream": "{servers: ['10.0.9.100:443'], transparent: true}"}, "`source` is none"),
        ({"upstream": UPSTREAM.replace("10.0.9.1]", "10.0.9.2]")}, "not in `fleet.failover`"),
    ],
)
def test_what_is_missing_is_said(changed: dict[str, str], said: str) -> None:
    (found,) = warnings(**changed)
    assert said in found


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

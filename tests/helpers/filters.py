"""The tc filters of a network namespace, as `tc filter show` lists them."""

from __future__ import annotations

import json
import socket
import subprocess
from typing import Any, Final

from pyforwarder.datapath.attach import traffic_control
from pyforwarder.datapath.attach.traffic_control import Filter, TrafficControl

PARENTS: Final = {"in": traffic_control.INGRESS, "out": traffic_control.EGRESS}


def filters(interface: str = "lo", side: str = "in") -> list[Filter]:
    """Those at one side of an interface of the current namespace, the first one first."""
    with TrafficControl() as tc:
        return tc.filters(socket.if_nametoindex(interface), PARENTS[side])


def all_filters() -> list[Filter]:
    """Those of all interfaces of the current namespace that have a clsact."""
    with TrafficControl() as tc:
        return [
            one
            for qdisc in tc.qdiscs()
            if qdisc.kind == "clsact"
            for parent in PARENTS.values()
            for one in tc.filters(qdisc.interface, parent)
        ]


def shown(interface: str = "lo", side: str = "in") -> list[dict[str, Any]]:
    """The same as `tc` says it: with the program's number, and what else we do not read."""
    direction = {"in": "ingress", "out": "egress"}[side]
    words = ["tc", "-j", "filter", "show", "dev", interface, direction]
    said = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    return [one for one in said if "options" in one]


def tc(*words: str) -> None:
    """One `tc` command."""
    subprocess.run(["tc", *words], check=True)

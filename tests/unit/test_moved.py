"""Modules that moved are still found by the names that they had in version 0.1."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from pyforwarder._moved import MOVES, NAMES

DATA = Path(__file__).parents[1] / "data"
# Plays of the conformance suite: tests/helpers/plays.py.
PLAYS = (
    "ALL at_random both_close_at_once both_stalled client_has_sent_fin_before_the_join "
    "download_of_two_stalled_recovers fin_behind_a_backlog fin_with_data "
    "lone_fin_beside_a_backlog lone_fin_of_the_server_beside_a_backlog nothing_at_all "
    "one_of_two_stalled_recovers other_direction_goes_on reset_by_a_stalled_reader "
    "reset_by_the_server_with_a_backlog reset_with_a_backlog round_trips server_closes_first "
    "slow_client upload_past_a_flood upload_stalled_download_goes_on urgent_data"
)
GONE = {
    **{f"pyforwarder.datapath.scenarios.{name}": "a play of the tests" for name in PLAYS.split()},
    "pyforwarder.config.match.STREAM_ONLY": "each protocol's own file says so",
    "pyforwarder.config.values.Bind": "a listener has a list of them",
    "pyforwarder.datapath.splice_maps.HANDSHAKES": "they stand in sets: abi.HANDSHAKE_SETS",
    "pyforwarder.datapath.splice_maps.RING_BYTES": "it depends on the slots: making.ring_bytes",
    "pyforwarder.metrics.serve": "a process with a loop of its own serves: status/process.py",
    "pyforwarder.supervisor.listeners.BoundListener": "a listener has a BoundSocket per address",
    "pyforwarder.supervisor.scraping.MetricsListener": "the page is served there, too: WebListener",
    "pyforwarder.supervisor.scraping.MetricsProcess": "likewise: WebProcess",
    "pyforwarder.worker.channel.MOST_LISTENERS": "there may be more than a message takes",
    "pyforwarder.worker.datagrams.IDLE_S": "a setting: `timeouts.udp_idle`",
    "pyforwarder.worker.datagrams.MOST_BYTES": "a buffer's length, nobody else's",
    "pyforwarder.worker.process.most_clients": "room_for, of a configuration",
    "pyforwarder.worker.resolver.MOST_WAITING": "bounds for clients and networks: Bounds",
    "pyforwarder.worker.resolver.THREADS": "clients' names have threads of their own",
}


@pytest.mark.parametrize("old", [*MOVES, "pyforwarder.core.first_packet.tls"])
def test_both_names_lead_to_one_module(old: str) -> None:
    new = MOVES.get(old, old)
    if old not in MOVES:
        old = old.replace(".core", "")
    program = (
        "import importlib, warnings\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        f"    old = importlib.import_module({old!r})\n"
        f"new = importlib.import_module({new!r})\n"
        f"assert old is new and new.__spec__.name == {new!r}\n"
        f"assert str(told[-1].message) == {f'{old} is {new} now'!r}, told\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("pyforwarder.nothing")


@pytest.mark.parametrize("module", NAMES)
def test_names_that_moved_are_found_where_they_were(module: str) -> None:
    found = importlib.import_module(module)
    for old, (now, new) in NAMES[module].items():
        with pytest.warns(DeprecationWarning, match=f"^{module}.{old} is {now}.{new} now$"):
            value = getattr(found, old)
        assert value is getattr(importlib.import_module(now), new)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = found.nothing


def _lost(module: str, names: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
        return [f"{module}.{name}" for name in names.split() if not hasattr(found, name)]


def test_every_public_name_of_version_0_1_can_be_imported() -> None:
    """Their table was made of that version's files; a name that is none of its row has gone."""
    table = json.loads((DATA / "names_0_1.json").read_text())
    lost = {name for module, names in table.items() for name in _lost(module, names)}
    assert lost == set(GONE)

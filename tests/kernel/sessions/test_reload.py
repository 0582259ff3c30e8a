"""UDP sessions of a daemon that had no use for them when it was started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.helpers.sessions import SessionSite, config

if TYPE_CHECKING:
    from tests.helpers.topology import Topology
    from tests.kernel.conftest import StartForwarder

STREAMS: Final = """
datapath: auto
listeners: [{name: other, bind: "10.1.0.1:9989", rules: [{match: ssh, to: "10.2.0.2:22"}]}]
"""


def test_sessions_of_a_listener_that_a_reload_adds_are_spliced(
    hosts: Topology, start_forwarder: StartForwarder
) -> None:
    """Nobody had a use for them before: they are proven then, and workers stay."""
    with hosts.forwarder.entered():
        daemon = start_forwarder(STREAMS)
    site = SessionSite(hosts, daemon)
    assert "splice_udp" not in site.stats()["datapaths"]
    workers = [worker.pid for worker in daemon.workers()]
    daemon.reconfigure(config(datapath="splice"))
    assert daemon.command("reload").returncode == 0
    # One that begins before that is known, and one that comes later.
    with site.spliced(site.topology.way(), 4), site.spliced(site.topology.way(), 6):
        assert site.stats()["datapaths"]["splice_udp"] == "available"
        assert [worker.pid for worker in daemon.workers()] == workers
    assert daemon.command("reload").returncode == 0  # it is known by now
    with site.spliced(site.topology.way(), 4):
        daemon.wait_for_line("datapath datapath=splice_udp")
        assert daemon.output().count("datapath=splice_udp") == 1

"""Pairs on loopback of a daemon that splices everything."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from tests.helpers.peers import (
    pattern,
    read_exactly,
)

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon

CONFIG: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [loopback]}]
datapath: splice
"""


def exchange(client: socket.socket, server: socket.socket, size: int = 1000) -> None:
    """The same bytes there and back."""
    client.sendall(pattern(size))
    assert read_exactly(server, size) == pattern(size)
    server.sendall(pattern(size))
    assert read_exactly(client, size) == pattern(size)


def wait_until_spliced(forwarder: Daemon) -> None:
    row = forwarder.wait_for_pair(lambda row: row["datapath"] == "splice")
    assert row["reason"] == "the configuration says so"
    assert row["backlog_bytes"] == 0

"""Talk to a forwarder: through it, as a client, and to it, over the control socket.

For programs that want to reach a destination through a forwarder:

    >>> from pyforwarder.client import connect
    >>> with connect("10.0.0.5:22", via="gateway.example.com:9999") as connection:
    ...     banner = connection.recv(64)

For programs that hold two connected sockets and want the kernel to move the bytes between them
(what SO_SPLICE does on other systems); the daemon owns and closes them from then on:

    >>> from pyforwarder.client import forward
    >>> pair_id = forward(accepted, outgoing)

`ControlClient` is what the command line is made of: one request, one answer.
"""

from __future__ import annotations

from pyforwarder.client.connecting import DEFAULT_VIA, connect, instruction
from pyforwarder.client.control import MAX_REPLY_BYTES, ControlClient, forward
from pyforwarder.client.rows import (
    Flushed,
    Json,
    ListenerRow,
    PairRow,
    RuleRow,
    UpstreamRow,
    What,
)

__all__ = [
    "DEFAULT_VIA",
    "MAX_REPLY_BYTES",
    "ControlClient",
    "Flushed",
    "Json",
    "ListenerRow",
    "PairRow",
    "RuleRow",
    "UpstreamRow",
    "What",
    "connect",
    "forward",
    "instruction",
]

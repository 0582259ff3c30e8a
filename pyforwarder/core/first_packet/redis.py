"""`redis`: the Redis protocol, by the array of bulk strings that a command is.

    *2\\r\\n$4\\r\\nPING\\r\\n...

Commands typed into telnet ("inline") are not recognised: any line of text may be one.

Source: the RESP specification, redis.io/docs/reference/protocol-spec.
"""

from __future__ import annotations

from pyforwarder.core.first_packet.pattern import Pattern


def redis() -> Pattern:
    """The matcher for `redis`."""
    # A server refuses more than 1024 * 1024 elements, and 512 MiB in one of them.
    return Pattern((r"^\*[1-9][0-9]{0,6}\r\n\$[0-9]{1,9}\r\n",))

"""`ssh`: SSH of any version, by its identification string (RFC 4253 section 4.2).

Only the server may send other lines before it, so the client's first bytes are `SSH-`.
"""

from __future__ import annotations

from pyforwarder.core.first_packet.literal import Literal


def ssh() -> Literal:
    """The matcher for `ssh`."""
    return Literal((b"SSH-",))

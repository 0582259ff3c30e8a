"""`http2`: HTTP/2 with prior knowledge, by its preface (RFC 9113 section 3.4).

The requests behind it are compressed; a host or path cannot be told from the first packet.
"""

from __future__ import annotations

from typing import Final

from pyforwarder.core.first_packet.literal import Literal

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def http2() -> Literal:
    """The matcher for `http2`."""
    return Literal((PREFACE,))

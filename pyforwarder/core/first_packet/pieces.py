"""Puts a message together whose pieces come in any order, twice, or overlapping.

QUIC's CRYPTO frames (RFC 9000 section 19.6) and DTLS's fragments (RFC 6347 section 4.2.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pyforwarder.core.first_packet.cursor import ParseError

# Clients that scatter their hello on purpose use a dozen pieces for each datagram.
MOST_PIECES: Final = 512

Piece = tuple[int, bytes]  # where it stands in the message, and what stands there


def beginning(pieces: Iterable[Piece]) -> bytes:
    """The message from its first byte up to the first that is missing.

    Raises:
        ParseError: two pieces say different things about one place, so that it is unknown which
            of them the server would read; or there are too many of them.
    """
    ordered = sorted(pieces)
    if len(ordered) > MOST_PIECES:
        raise ParseError(f"a message in more than {MOST_PIECES} pieces")
    if len(ordered) == 1:
        at, piece = ordered[0]
        return b"" if at else piece
    message = bytearray()
    # Pieces behind a gap are looked at as well: one that contradicts another is found out at once,
    # and not when the gap is filled.
    start = 0  # where in the message the run of pieces begins that `run` holds
    run = message
    for at, piece in ordered:
        end = start + len(run)
        if at > end:
            start, run = at, bytearray()
            end = at
        here = at - start
        known = run[here : here + len(piece)]
        if known != piece[: len(known)]:
            raise ParseError("pieces of one message contradict each other")
        run += piece[end - at :]
    return bytes(message)

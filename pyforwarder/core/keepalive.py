"""When a silent peer is asked whether it is there, and when it is given up."""

from __future__ import annotations

from typing import Final, NamedTuple


class Keepalive(NamedTuple):
    """In the numbers that tcp(7) takes."""

    idle_s: int  # so long after it was heard last; 0: never
    interval_s: int  # and then as often as this
    probes: int  # it is given up when so many questions have had no answer


OFF: Final = Keepalive(0, 0, 0)

"""Pairs as the machines of a fleet tell each other of them."""

from __future__ import annotations

from typing import Final

from hypothesis import strategies as st

from pyforwarder.fleet.failover.record import (
    MOST_NAME_BYTES,
    Deltas,
    Endpoint,
    Ends,
    Fin,
    Half,
    Pair,
)

WORD: Final = st.integers(0, (1 << 32) - 1)


NAMES: Final = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=15)


@st.composite
def halves(draw: st.DrawFn) -> Half:
    fin = draw(st.sampled_from([0, 1, 3, 7]))
    numbers = [draw(WORD) for _ in range(5)]
    return Half(
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        numbers[4] if fin else 0,
        fin=Fin(fin),
        carried_bytes=draw(st.integers(0, 1 << 62)),
    )


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    ip = st.binary(min_size=4, max_size=4)
    if draw(st.booleans()):
        ip = st.binary(min_size=16, max_size=16)
    ends = [Endpoint(draw(ip), draw(st.integers(1, 65535))) for _ in range(4)]
    scale = st.integers(0, 14)
    keepalive = st.tuples(st.integers(1, 32767), st.integers(1, 32767), st.integers(1, 127))
    return Pair(
        Ends(*ends),
        Deltas(*(draw(WORD) for _ in range(4))),
        scales=draw(st.tuples(scale, scale, scale, scale)),
        no_ecn=draw(st.booleans()),
        any_interface=draw(st.booleans()),
        marks=draw(st.tuples(WORD, WORD)),
        keepalive=draw(st.just((0, 0, 0)) | keepalive),
        started_s=draw(WORD),
        rule=draw(NAMES).encode(),
        listener_name=draw(NAMES).encode(),
        up=draw(halves()),
        down=draw(halves()),
    )


def a_pair(version: int = 4, port: int = 50_000) -> Pair:
    """One of each family, with names as long as they may be."""
    ips = [bytes([n]) * (16 if version == 6 else 4) for n in (1, 2, 3, 4)]
    half = Half((1 << 32) - 1, 5, 6, 7, 0, Fin(0), 1 << 62)
    return Pair(
        Ends(*(Endpoint(ip, port + n) for n, ip in enumerate(ips))),
        Deltas(11, 12, 13, 14),
        scales=(7, 8, 9, 10),
        no_ecn=False,
        any_interface=False,
        marks=(0, 0),
        keepalive=(60, 10, 3),
        started_s=1_700_000_000,
        rule=b"r" * MOST_NAME_BYTES,
        listener_name=b"l" * MOST_NAME_BYTES,
        up=half,
        down=half,
    )

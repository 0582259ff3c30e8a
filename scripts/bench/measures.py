"""What is measured: one `Measure` per row of the report, grouped by the scenario that yields it.

Pure data. A scenario is one run of the load generator (`scenarios.py` says how); its measures come
out of the same run.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

DIRECT: Final = "direct"
PEERS: Final = ("haproxy", "nginx", "sslh", "socat", "sslh-select")
EXPRESS: Final = "express"
OURS: Final = ("copy", "sockmap", "splice", "auto", EXPRESS)
# sslh-select serves every connection from one process, but select(2) ends at 1024 descriptors:
# it is there for those who ask for it. Debian's service runs the forking one.
DEFAULT_TARGETS: Final = (DIRECT, "haproxy", "nginx", "sslh", "socat", *OURS)
# The forking peers cost a quarter of the time.
QUICK_TARGETS: Final = (DIRECT, "haproxy", "nginx", *OURS)
ALL_TARGETS: Final = (DIRECT, *PEERS, *OURS)


class Better(enum.Enum):
    """Which way a number has to go to be an improvement."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True, slots=True)
class Measure:
    """One row: `key` is its name in files, `unit` what the numbers are in."""

    key: str
    scenario: str
    title: str
    unit: str
    better: Better
    digits: int = 1


def _latency(scenario: str, title: str) -> tuple[Measure, ...]:
    return tuple(
        Measure(f"{scenario}_p{percent}", scenario, f"{title}, p{percent}", "us", Better.LOWER)
        for percent in (50, 99)
    )


def _connections(scenario: str, title: str) -> tuple[Measure, ...]:
    return (
        Measure(scenario, scenario, f"new connections, {title}", "1/s", Better.HIGHER, 0),
        # What else the machine does moves this far less than the rate.
        Measure(
            f"{scenario}_cpu",
            scenario,
            f"forwarder's CPU per new connection, {title}",
            "us",
            Better.LOWER,
        ),
    )


# Answers of these sizes show from which size on a datapath is worth its handover.
ANSWERS_KIB: Final = (64, 256, 1024, 4096)
# Long enough to be handed over in mid-stream.
PAUSE_ANSWER_MIB: Final = 16

# Datagrams of these sizes, in so many sessions at once.
DATAGRAM_BYTES: Final = (64, 1200)
DATAGRAM_SESSIONS: Final = (1, 32, 1000)
MANY_DATAGRAM_SESSIONS: Final = 10_000  # of the smallest
DATAGRAM_RATES: Final = (
    *((size, sessions) for size in DATAGRAM_BYTES for sessions in DATAGRAM_SESSIONS),
    (DATAGRAM_BYTES[0], MANY_DATAGRAM_SESSIONS),
)
PACED_DATAGRAM_SESSIONS: Final = 32

# Memory comes first and connections last: the kernel keeps what remains of a closed connection
# for a minute (TIME_WAIT), and that would be counted as memory of the next pairs.
MEASURES: Final = (
    Measure(
        "idle_memory",
        "idle",
        "memory of an idle pair, machine, both ends included",
        "KiB",
        Better.LOWER,
    ),
    Measure(
        "idle_process_memory",
        "idle",
        "memory of an idle pair, forwarder's processes",
        "KiB",
        Better.LOWER,
        2,
    ),
    *(
        measure
        for way in ("up", "down")
        for measure in (
            Measure(
                f"stall_{way}_accepted",
                f"stall_{way}",
                f"bytes accepted before a stalled reader, {way}",
                "MiB",
                Better.LOWER,
                2,
            ),
            Measure(
                f"stall_{way}_memory",
                f"stall_{way}",
                f"memory held by a stalled reader, machine, {way}",
                "MiB",
                Better.LOWER,
                2,
            ),
        )
    ),
    *_latency("rtt_near", "round trip 64 B, both ends on one CPU"),
    *_latency("rtt_far", "round trip 64 B, ends on two CPUs"),
    *_latency("rtt_64", "round trip 64 B, 64 connections"),
    *(
        Measure(
            f"bulk_{streams}_{way}",
            f"bulk_{streams}_{way}",
            f"bulk, {streams} stream{'s' if streams > 1 else ''} {way}",
            "Gbit/s",
            Better.HIGHER,
            2,
        )
        for streams in (1, 8)
        for way in ("up", "down")
    ),
    *(
        Measure(
            f"cpu_{way}",
            f"cpu_{way}",
            f"machine's CPU, paced stream {way}",
            "s/GB",
            Better.LOWER,
            3,
        )
        for way in ("up", "down")
    ),
    *(
        Measure(
            f"delay_{way}_{key}",
            f"delay_{way}",
            f"delay in a paced stream {way}, {title}",
            "us",
            Better.LOWER,
            0,
        )
        for way in ("up", "down")
        for key, title in (("p99", "p99"), ("max", "longest"))
    ),
    *(
        Measure(
            f"view_{key}",
            f"view_{key}",
            f"{title} while `show` is read, ratio to unread",
            "x",
            better,
            3,
        )
        for key, title, better in (
            ("rtt", "round trip 64 B, 64 connections, p50,", Better.LOWER),
            ("cpu", "CPU without the reader's, paced stream up,", Better.LOWER),
        )
    ),
    *_latency("udp_rtt_near", "round trip of a datagram of 64 B, both ends on one CPU"),
    *_latency("udp_rtt_far", "round trip of a datagram of 64 B, ends on two CPUs"),
    *(
        measure
        for size, sessions in DATAGRAM_RATES
        for measure in (
            Measure(
                f"udp_{size}_{sessions}",
                f"udp_{size}_{sessions}",
                f"datagrams of {size:,} B, {sessions:,} session{'s' if sessions > 1 else ''}",
                "1/s",
                Better.HIGHER,
                0,
            ),
            Measure(
                f"udp_{size}_{sessions}_lost",
                f"udp_{size}_{sessions}",
                f"of these lost, {sessions:,} session{'s' if sessions > 1 else ''}, {size:,} B",
                "%",
                Better.LOWER,
                2,
            ),
            # What else the machine does moves this less. What the kernel does for the sender's or
            # the receiver's account is not in it: `udp_cpu` has that.
            Measure(
                f"udp_{size}_{sessions}_cpu",
                f"udp_{size}_{sessions}",
                f"forwarder's own CPU for each, {sessions:,} session{'s' if sessions > 1 else ''}, "
                f"{size:,} B",
                "us",
                Better.LOWER,
                2,
            ),
        )
    ),
    Measure(
        "udp_cpu",
        "udp_cpu",
        "machine's CPU per datagram of 1,200 B at a paced rate",
        "us",
        Better.LOWER,
        2,
    ),
    *_latency("connect_one", "connect to answer, one at a time"),
    *_latency("connect_paced", "connect to answer at a paced rate"),
    Measure(
        "connect_cpu",
        "connect_cpu",
        "machine's CPU per 10,000 connections at a paced rate",
        "s",
        Better.LOWER,
        2,
    ),
    *_connections("connect_client_first", "client closes first"),
    *_connections("connect_server_first", "server closes first"),
    *_connections("connect_sni", "each with a ClientHello, a rule by its name"),
    *_connections("connect_host", "each with a head of HTTP, a rule by its Host"),
    *_connections("connect_instruction", "each with an instruction"),
    *(
        Measure(
            f"answer_{kib}k",
            f"answer_{kib}k",
            f"new connections, each with an answer of {kib} KiB",
            "1/s",
            Better.HIGHER,
            0,
        )
        for kib in ANSWERS_KIB
    ),
    *(
        Measure(
            f"pause_{key}",
            "pause",
            f"longest pause in an answer of {PAUSE_ANSWER_MIB} MiB, {title}",
            "ms",
            Better.LOWER,
        )
        for key, title in (("p50", "p50"), ("p99", "p99"), ("max", "longest of all"))
    ),
)

SCENARIOS: Final = tuple(dict.fromkeys(measure.scenario for measure in MEASURES))


def choose(wanted: str, offered: tuple[str, ...]) -> tuple[str, ...]:
    """The names of `offered` that `wanted` asks for, in the order of `offered`.

    `wanted` holds names or beginnings of names between commas: `rtt,bulk_1` takes every scenario
    that begins so; an exact name takes only itself.

    Raises:
        ValueError: a name that fits none.
    """
    chosen: set[str] = set()
    for part in (piece.strip() for piece in wanted.split(",") if piece.strip()):
        fitting = {part} if part in offered else {n for n in offered if n.startswith(part)}
        if not fitting:
            raise ValueError(f"'{part}' is none of {', '.join(offered)}")
        chosen |= fitting
    return tuple(name for name in offered if name in chosen)


def order_of_round(targets: tuple[str, ...], index: int) -> tuple[str, ...]:
    """The targets as round `index` visits them: there and back.

    What drifts during a round (heat, neighbours of a virtual machine) then favours nobody twice.
    """
    return targets if index % 2 == 0 else targets[::-1]

"""What a daemon answers: the rows of `show`, and what was done."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
What: TypeAlias = Literal["pairs", "listeners", "rules", "upstreams", "stats", "fleet"]


class PairRow(TypedDict):
    """One pair as `show` gives it; an address that is not known yet is `-`."""

    id: int
    state: str
    datapath: str
    client: str
    listener: str
    source: str
    server: str
    up_bytes: int
    down_bytes: int
    age_s: float
    idle_s: float
    rule: str
    decided: str  # on its first packet: by the `kernel`, which has opened it then, or the `user`
    reason: str
    up_packets: int
    down_packets: int
    backlog_bytes: int | None  # None: this host's kernel cannot be asked


class ListenerRow(TypedDict):
    """One listener and what came to it since `up`."""

    name: str
    bind: str
    protocol: str
    accepted: int
    open: int
    refused: int


class RuleRow(TypedDict):
    """One rule of a listener and how often it decided."""

    listener: str
    rule: str
    taken: int
    refused: int
    to: str
    decided: str  # kernel, user, or partly: at some of the listener's addresses
    why: str  # userspace decides, though its listener asks for the kernel


class UpstreamRow(TypedDict):
    """One server of an upstream."""

    upstream: str
    server: str
    state: str
    pairs: int
    connects: int
    failures: int
    weight: int
    backup: bool
    checked_by: str | None  # `here`, `all`, another machine of the fleet, or nobody


class Flushed(TypedDict):
    """What `flush` did: ids that were reset, and ids that no pair has."""

    flushed: list[int]
    unknown: list[int]

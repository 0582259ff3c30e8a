"""The sections `limits`: how many connections, of whom, and what they may hold in memory."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, PlainSerializer, PlainValidator

from pyforwarder.config import values
from pyforwarder.config.fields import Count
from pyforwarder.config.section import Section


def _memory(value: object) -> int:
    size = values.parse_size(value)
    if size and size < MIN_MEMORY_BYTES:
        raise ValueError(f"must be at least {MIN_MEMORY_BYTES >> 20}MiB")
    return size


def _memory_or_auto(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    size = _memory(value)
    if not size:
        raise ValueError("must be auto or a size: there is no machine without an end")
    return size


def _memory_text(value: int | Literal["auto"]) -> object:
    return value if value == "auto" else values.format_size(value)


# Less than a few pairs' buffers would refuse every client.
MIN_MEMORY_BYTES: Final = 8 << 20
Memory = Annotated[
    int, PlainValidator(_memory), PlainSerializer(values.format_size), values.Written("size")
]
MemoryOrAuto = Annotated[
    int | Literal["auto"],
    PlainValidator(_memory_or_auto),
    PlainSerializer(_memory_text),
    values.Written("auto, size"),
]


class ClientPrefix(Section):
    """How many bits of an address are one client: a host of IPv6 has a whole network of them."""

    ipv4: Annotated[int, Field(strict=True, ge=8, le=32)] = 32
    """Leading bits of an IPv4 address."""
    ipv6: Annotated[int, Field(strict=True, ge=16, le=128)] = 64
    """Leading bits of an IPv6 address."""


# UDP keys that a TCP listener has no use for.
UDP_LIMITS: Final = ("sessions", "sessions_per_client")


class ListenerLimits(Section):
    """Bounds on the connections of one listener, beside those on all; 0 means none."""

    pairs: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 0
    """TCP connections at once. 0: no limit."""
    pairs_per_client: Count = 0
    """TCP connections of one client at once. 0: no limit."""
    sessions: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] | None = None
    """UDP sessions at once. 0: no limit. Not given: as `pairs`."""
    sessions_per_client: Count | None = None
    """UDP sessions of one client at once. 0: no limit. Not given: as `pairs_per_client`."""
    new_per_second: Count = 0
    """New connections or sessions in one second of the clock. 0: no limit."""
    new_per_second_per_client: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 0
    """The same for one client: a token bucket that holds one second's worth. 0: no limit."""
    client_prefix: ClientPrefix | None = None
    """How many bits of an address are one client. Not given: as the limits on all listeners say."""
    memory_bytes: Memory = Field(0, alias="memory")
    """What TCP pairs may hold for peers that do not read, at least 8MiB. 0: no limit."""


class Limits(ListenerLimits):
    """Bounds on the connections of all listeners, TCP and UDP apart; 0 means none."""

    pairs: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 10_000
    """TCP connections at once. The limit on open descriptors may lower it, with a warning."""
    sessions: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None
    """UDP sessions at once. Not given: as `pairs`."""
    client_prefix: ClientPrefix = ClientPrefix()
    """How many bits of an address are one client."""
    memory_bytes: MemoryOrAuto = Field("auto", alias="memory")  # type: ignore[assignment]
    """What TCP pairs may hold for peers that do not read, at least 8MiB. `auto`: a quarter of the
    machine's memory, or of what the control group may use.
    """

    @property
    def most_sessions(self) -> int:
        """UDP sessions of all listeners."""
        return self.pairs if self.sessions is None else self.sessions

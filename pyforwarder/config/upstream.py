"""The sections of an upstream: its servers, how they are chosen, checked and rested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pyforwarder.config import values
from pyforwarder.config.fields import SendProxy
from pyforwarder.config.problems import problem
from pyforwarder.config.section import Section
from pyforwarder.core.address import SamePort
from pyforwarder.core.policy import Networks


class Server(Section):
    """One member of an upstream; a bare address is short for `{address: ...}`."""

    address: values.ServerAddress
    """`ip:port`, `[ip6]:port`, `name:port`, `unix:/path`, or `host:same` for the port that the
    client connected to.
    """
    weight: Annotated[int, Field(strict=True, ge=0, le=256)] = 1
    """Its share of new pairs beside the other servers. 0: it gets none."""
    backup: values.Switch = False
    """It gets pairs only while no other server can."""

    @model_validator(mode="before")
    @classmethod
    def _bare_address(cls, data: object) -> object:
        return {"address": data} if isinstance(data, str | int) else data


class Health(Section):
    """Active checks: a TCP connect every `interval`."""

    interval_s: values.Timeout = Field(5.0, alias="interval")
    """Between the beginnings of two checks."""
    timeout_s: values.Timeout = Field(2.0, alias="timeout")
    """After which a check has failed."""
    rise: Annotated[int, Field(strict=True, ge=1, le=100)] = 2  # HAProxy's defaults
    """Checks in a row that must pass before a server that is down is up."""
    fall: Annotated[int, Field(strict=True, ge=1, le=100)] = 3
    """Checks in a row that must fail before a server that is up is down. The very first check
    decides alone.
    """


class Ejection(Section):
    """Passive checks: a server whose connections fail in a row rests for a while."""

    failures: Annotated[int, Field(strict=True, ge=0, le=1000)] = 3
    """Failed connects in a row after which a server gets no new pairs for a while. 0: never."""
    for_s: values.Timeout = Field(10.0, alias="for")
    """How long the first time; it doubles while it goes on."""


class Upstream(Section):
    """A named set of servers and how to choose one."""

    servers: tuple[Server, ...] = ()
    """Its servers. A bare address is short for `{address: ...}`."""
    balance: Literal["round_robin", "least_pairs", "source_hash"] = "round_robin"
    """How a server is chosen: each in turn, the one with the fewest pairs, or by the client's
    address (a consistent hash).
    """
    connect_timeout_s: values.Timeout | None = Field(None, alias="connect_timeout")
    """For one attempt to connect. Not given: as `timeouts.connect` says."""
    send_proxy: SendProxy = "off"
    """The PROXY header that its servers get before the first bytes."""
    health: Health | None = None
    """Active checks. Not given: none. `{}`: with the defaults below."""
    eject: Ejection = Ejection()
    """What follows from connects of clients that failed."""
    slow_start_s: values.Duration = Field(0.0, alias="slow_start")
    """How long a server that comes up again takes to reach its full weight."""
    resolve_every_s: values.Timeout = Field(30.0, alias="resolve_every")
    """How long the addresses of a server's name are kept. The record's own TTL is not seen."""
    source: values.IpList = ()
    """Addresses of this host to connect from, in turn. Each has some 28,000 ports per server."""
    transparent: values.Switch = False
    """Connect from the client's own address. Needs routes that bring the answers back here."""
    registered: values.NetworkSet = Networks.parse([])
    """From which addresses servers may register in the fleet's store. Not given: none."""

    @field_validator("servers")
    @classmethod
    def _distinct(cls, servers: tuple[Server, ...]) -> tuple[Server, ...]:
        seen = set()
        for index, server in enumerate(servers):
            if server.address in seen:
                raise problem(f"{server.address} stands here twice: give it a weight", index)
            seen.add(server.address)
        return servers

    @model_validator(mode="after")
    def _checks_have_a_port(self) -> Self:
        for index, server in enumerate(self.servers):
            if isinstance(server.address, SamePort) and self.health is not None:
                raise problem(
                    f"{server.address} has no port that `health` could ask: write one, or leave "
                    "`health` out",
                    "servers",
                    index,
                )
        return self

    @model_validator(mode="after")
    def _has_servers(self) -> Self:
        # Servers that register come and go: there may be none just now.
        if not self.servers and not self.registered:
            raise problem("an upstream needs a server", "servers")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.transparent and self.source:
            raise problem("`transparent` takes the client's address, not these", "source")
        return self


def why_not_taken(upstreams: Mapping[str, Upstream], name: str, address: str) -> str:
    """Why a server that registers itself there is not taken; empty: it is, or stands there anyway.

    `address` is that of `Address`, as text.
    """
    upstream = upstreams.get(name)
    if upstream is None:
        return f"there is no upstream {name!r}"
    if any(str(server.address) == address for server in upstream.servers):
        return ""
    networks = upstream.registered
    if not networks:
        return f"the upstream {name!r} has no `registered`: it takes no servers that register"
    if networks.contains(address.rpartition(":")[0].strip("[]")):
        return ""
    return f"the upstream {name!r} takes servers from {', '.join(networks.entries)} alone"

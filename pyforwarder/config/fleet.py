"""The section `fleet`: the store that machines share, and what each shares of its own."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pyforwarder.config import values
from pyforwarder.config.fields import Endpoints
from pyforwarder.config.problems import problem
from pyforwarder.config.section import Section


class FleetTls(Section):
    """How the store is known, and what it is shown."""

    ca: values.File
    """Certificates of the authorities, in PEM, that may have signed the store's."""
    cert: values.File | None = None
    """The certificate that the store is shown. Not given: none."""
    key: values.File | None = None
    """Its key, without a passphrase."""

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.cert is None) != (self.key is None):
            missing = "key" if self.key is None else "cert"
            raise problem("a certificate goes with its key", missing)
        return self


class FleetTokens(Section):
    """Instructions that are good once only, where there is more than one machine."""

    scope: Literal["fleet", "machine"] = "fleet"
    """Where one is used up: in the whole fleet, by its store, or at each machine by itself."""
    store_lost: Literal["refuse", "machine"] = "refuse"
    """What happens to one if the store does not answer: it is refused, or used up at this machine
    alone, so that it may be used once more at each other machine.
    """
    wait_s: Annotated[values.Duration, Field(ge=0.1, le=10)] = Field(2.0, alias="wait")
    """How long the store is waited for."""


class FleetHealth(Section):
    """Who checks the servers of upstreams with `health`, where there is more than one machine."""

    checks: Literal["own", "one", "all"] = "own"
    """`own`: each machine checks all by itself, and tells no other. `one`: of the machines
    that have a server one checks it, and tells the others. `all`: all check, and a server is
    down at all of them when `quorum` say so. While the store does not answer, each is alone.
    """
    quorum: Literal["majority"] | Annotated[int, Field(strict=True, ge=1, le=256)] = "majority"
    """With `all`: so many machines must find a server down; fewer where fewer are left that know
    of it.
    """


class FleetLimits(Section):
    """Limits on one client's connections, where there is more than one machine."""

    scope: Literal["machine", "fleet"] = "machine"
    """Where `pairs_per_client` and `sessions_per_client` hold: at each machine by itself, or in the
    whole fleet, as far as its machines know of each other; see fleet.md.
    """
    compact: values.Switch = True
    """With `fleet`: whether etcd is made to forget, every five minutes, what is older than that, in
    all of its keys. `false`: as in `failover`, where one `false` is enough for both.
    """


class Failover(Section):
    """Pairs that another machine goes on with when this one is gone; see fleet.md."""

    addresses: values.IpList
    """The addresses that move from one machine to another: those that clients connect to, and those
    that servers see (`source` of upstreams). Both are needed.
    """
    mover: Literal["external", "command"] = "external"
    """What gives a machine these addresses, and takes them: something else (VRRP, an orchestrator),
    or `pyforwarder fleet move` and `fleet take`.
    """
    compact: values.Switch = True
    """Whether etcd is made to forget, every five minutes, what is older than that, in all of its
    keys. `false`: it is another's to see to that (`etcd --auto-compaction-retention`).
    """

    @field_validator("addresses")
    @classmethod
    def _some(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        if not addresses:
            raise ValueError("without addresses that move no pair can")
        return addresses


class Fleet(Section):
    """The store with what this machine shares with others."""

    store: Literal["etcd"] = "etcd"
    """The kind of the store."""
    endpoints: Endpoints
    """Members of the store's cluster, for example http://10.0.0.1:2379. One is asked at a time."""
    name: values.Name
    """Which fleet: a part of its keys."""
    instance: values.Name = ""
    """What this machine is called in it. Not given: its host name."""
    tls: FleetTls | None = None
    """For endpoints with https."""
    user: values.Name = ""
    """The user of the store, if it has users."""
    password: values.File | None = None
    """A file with the user's password."""
    tokens: FleetTokens = FleetTokens()
    """Instructions that are good once only (`tokens.single_use`)."""
    health: FleetHealth = FleetHealth()
    """Who checks servers (`health` of upstreams)."""
    limits: FleetLimits = FleetLimits()
    """Whether a client's connections at all machines count together."""
    failover: Failover | None = None
    """Spliced pairs are known to the other machines. Not given: they end with this one."""

    @property
    def compacts(self) -> bool:
        """Whether processes that write often may make the store forget its history."""
        return self.limits.compact and (self.failover is None or self.failover.compact)

    @field_validator("name", "instance")
    @classmethod
    def _part_of_a_key(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._-]{0,128}", name):
            raise ValueError(f"{name!r}: letters, digits, '.', '_' and '-' in the store's keys")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.user) != (self.password is not None):
            raise problem(
                "a user goes with a file that has the password",
                "password" if self.user else "user",
            )
        schemes = {endpoint.partition(":")[0] for endpoint in self.endpoints}
        if "https" in schemes and self.tls is None:
            raise problem("https wants `tls: {ca: /FILE}`", "tls")
        if self.tls is not None and schemes != {"https"}:
            raise problem("with `tls` all endpoints are https://HOST:PORT", "endpoints")
        return self

"""Which keys a fleet has in its store, and what stands in their values.

    /pyforwarder/FLEET/current/config                     what is to be in force: an `Edition`
    /pyforwarder/FLEET/current/servers/UPSTREAM/ADDRESS   a server that has registered: a `Server`
    /pyforwarder/FLEET/history/00000012                   an `Edition`, by its serial number
    /pyforwarder/FLEET/instances/NAME                     a machine's `InstanceReport`
    /pyforwarder/FLEET/tokens/DIGEST                      a `UsedToken`
    /pyforwarder/FLEET/health/NAME                        `health.HealthReport` of a machine
    /pyforwarder/FLEET/limits/NAME                        `limits.LimitsReport` of a machine
    /pyforwarder/FLEET/failover/machines/TAG              a machine that has pairs, see `failover`
    /pyforwarder/FLEET/failover/pairs/KEY                 such a pair: `failover.record.Entry`
    /pyforwarder/FLEET/failover/moves/TAG                 a machine is asked to take the addresses:
                                                          `failover.moves.Move`

Values are JSON objects with `schema: 1`. Servers, instances, tokens, health and limits have a
lease: they are gone when nobody renews it. Any client of the store may write a server's key; what
is no valid value is left out, and told of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pyforwarder.config.values import parse_upstream_name
from pyforwarder.core.address import Address, parse_destination

ROOT: Final = "/pyforwarder"
SCHEMA: Final = 1
MOST_TEXT: Final = 1 << 20  # as a file may have
HISTORY_LENGTH: Final = 100
MOST_SERVERS: Final = 4096
MOST_INSTANCES: Final = 256

# So long may words be that say what is wrong with a value: others have chosen them.
MOST_FAULT: Final = 200

Number = Annotated[int, Field(ge=0, lt=1 << 53)]
Name = Annotated[str, Field(max_length=256)]
Words = Annotated[str, Field(max_length=4096)]
# What `fleet.instance` may be, see config/model.py.
_MACHINE: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SHARED: Final = "another machine has this name, too (fleet.instance)"


class ValueFault(ValueError):
    """What stands at a key is not what belongs there."""


def check_machine(name: str) -> None:
    """Whether a machine can have this name.

    Raises:
        ValueFault: it cannot.
    """
    if not _MACHINE.fullmatch(name):
        raise ValueFault("no machine's key")


class Value(BaseModel):
    """A value in the store, without conversion of types; fields of later versions are passed
    over.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    schema_: Annotated[int, Field(alias="schema", ge=1, le=SCHEMA)] = SCHEMA

    @classmethod
    def decode(cls, text: bytes | str) -> Self:
        """The value that a key has.

        Raises:
            ValueFault: it is none of this kind, or of a later schema.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part)[:32] for part in first["loc"][:4])
            raise ValueFault(f"{where}: {first['msg']}" if where else first["msg"]) from None

    def encode(self) -> str:
        """The text that stands at the key."""
        return self.model_dump_json(by_alias=True)


class Edition(Value):
    """A configuration of the fleet: its text, and who has put it there when and why."""

    serial: Annotated[int, Field(ge=1, lt=100_000_000)]
    text: Annotated[str, Field(max_length=MOST_TEXT)]
    by: Name = ""
    at: Name = ""  # RFC 3339
    comment: Words = ""


class Server(Value):
    """A server of an upstream; weight 0: it gets no new pairs."""

    weight: Annotated[int, Field(ge=0, le=256)] = 1


class InstanceReport(Value):
    """What a machine says of itself."""

    version: Name
    serial: Number = 0  # of the edition in force; 0: none
    refused: Number = 0  # the newest serial that it could not use
    why: Words = ""
    pid: Number = 0
    started: Name = ""  # RFC 3339
    pairs: Number = 0  # open ones
    accepted: Number = 0
    # Name -> "available", or why not.
    datapaths: Annotated[dict[Name, Words], Field(max_length=16)] = {}
    writer: Name = ""  # that machine has put it there: another of the same name is not it
    is_shared: bool = False  # such a one reports at this key, too

    @property
    def complaint(self) -> str:
        """What is to be mended on the machine; empty: nothing."""
        return "; ".join(words for words in (_SHARED if self.is_shared else "", self.why) if words)


class UsedToken(Value):
    """A single-use token that was used, until it has expired everywhere."""

    by: Name  # the machine
    claim: Name  # each attempt's own


class Keys:
    """The keys of one fleet."""

    def __init__(self, fleet: str) -> None:
        prefix = f"{ROOT}/{fleet}/"
        self.current = f"{prefix}current/"
        self.config = f"{self.current}config"
        self.servers = f"{self.current}servers/"
        self.history = f"{prefix}history/"
        self.instances = f"{prefix}instances/"
        self.tokens = f"{prefix}tokens/"
        self.health = f"{prefix}health/"
        self.limits = f"{prefix}limits/"
        self.failover = f"{prefix}failover/"
        self.machines = f"{prefix}failover/machines/"
        self.pairs = f"{prefix}failover/pairs/"
        self.stays = f"{prefix}failover/stays/"
        self.compaction = f"{prefix}failover/compaction"

    def move(self, tag: str) -> str:
        """Where a machine is asked to take the addresses."""
        return f"{self.failover}moves/{tag}"

    def edition(self, serial: int) -> str:
        """Where an edition stays; ordered by number."""
        return f"{self.history}{serial:08}"

    def server(self, upstream: str, address: Address) -> str:
        """Where a server registers itself."""
        return f"{self.servers}{upstream}/{address}"

    def token(self, digest: str) -> str:
        """What is there once a token was used; the digest is of its signature."""
        return f"{self.tokens}{digest}"

    def instance(self, name: str) -> str:
        """Where a machine reports."""
        return f"{self.instances}{name}"


def registered_servers(
    keys: Keys, found: Iterable[tuple[str, bytes]]
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Weights by upstream and address from (key, value) below `keys.servers`, and what is wrong.

    Two texts of one address ([::1]:80, [0::1]:80) are one server, with the weight of the last.
    Never more than `MOST_SERVERS`, of names that an upstream can have, and of each fault a line.
    """
    servers: dict[str, dict[str, int]] = {}
    faults: list[str] = []
    count = 0
    for key, value in found:
        upstream, slash, text = key.removeprefix(keys.servers).partition("/")
        try:
            if not slash or not upstream:
                raise ValueFault("the key names no upstream and address")
            parse_upstream_name(upstream)
            address = parse_destination(text)
            if not isinstance(address, Address):
                raise ValueFault("a server registers an IP address, not a name")
            weight = Server.decode(value).weight
        except ValueError as error:  # ValueFault and AddressError are
            faults.append(f"{key[:MOST_FAULT]}: {str(error)[:MOST_FAULT]}")
            continue
        if count >= MOST_SERVERS:
            faults.append(f"more than {MOST_SERVERS} servers")
            break
        count += 1
        servers.setdefault(upstream, {})[str(address)] = weight
    return servers, faults


def instances_in(keys: Keys, found: Iterable[tuple[str, bytes]]) -> list[dict[str, Any]]:
    """The machines of a fleet as one tells of them: what is no report is left out.

    Never more than `MOST_INSTANCES`, of each text a line at most, and nothing twice.
    """
    rows: list[dict[str, Any]] = []
    for key, value in found:
        if len(rows) == MOST_INSTANCES:
            break
        name = key.removeprefix(keys.instances)
        try:
            check_machine(name)
            report = InstanceReport.decode(value)
        except ValueFault:
            continue
        datapaths = {word[:32]: state for word, state in report.datapaths.items()}
        available = [word for word, state in datapaths.items() if state == "available"]
        rows.append(
            {
                "instance": name,
                "version": report.version[:64],
                "serial": report.serial,
                "refused": report.refused,
                "pairs": report.pairs,
                "accepted": report.accepted,
                "datapaths": available,
                "unavailable": {
                    word: state[:128] for word, state in datapaths.items() if word not in available
                },
                "started": report.started[:64],
                "why": report.complaint[:256],
            }
        )
    return rows


def newest_first(found: Iterable[tuple[str, bytes]]) -> list[Edition]:
    """The editions of a history; what is none is left out."""
    editions: list[Edition] = []
    for _, value in found:
        try:
            editions.append(Edition.decode(value))
        except ValueFault:
            continue
    return sorted(editions, key=lambda edition: -edition.serial)

"""The configuration as frozen models; their fields are the YAML's keys.

Where the two differ an alias says so: a field that is a time ends in `_s`, a size in `_bytes`.
Rules that concern one section stand in it, those that concern several in `Config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pyforwarder.address import Address, AddressError, UnixAddress, parse_bind
from pyforwarder.config import values
from pyforwarder.config.match import (
    STREAM_ONLY,
    MatchField,
    Naming,
    first_word,
    naming,
    protocols,
)
from pyforwarder.config.problems import problem
from pyforwarder.errors import ConfigError
from pyforwarder.policy import Networks, OwnListeners


def _off_is_a_word(value: object) -> object:
    # An unquoted `off` is false to every YAML 1.1 tool that may have written this file.
    return "off" if value is False else value


def _workers(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 256:
        return value
    raise ValueError(f"{values.describe(value)} is neither auto nor 1 to 256")


def _name_list(value: object) -> tuple[str, ...]:
    return tuple(values.parse_name(item) for item in values.as_list(value))


DatapathName = Literal["auto", "sockmap", "splice", "copy"]
SendProxy = Annotated[Literal["off", "v1", "v2"], BeforeValidator(_off_is_a_word)]
TokenUse = Annotated[Literal["required", "optional", "off"], BeforeValidator(_off_is_a_word)]
Count = Annotated[int, Field(strict=True, ge=0, le=1 << 40)]
Workers = Annotated[int | Literal["auto"], PlainValidator(_workers)]


class Section(BaseModel):
    """A mapping whose keys are all known; a key without a value is as good as absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: object) -> object:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        if not isinstance(data, dict):
            raise problem(
                f"must be keys and values ({', '.join(known)}), not {values.describe(data)}"
            )
        for key in data:
            if key not in known:
                raise problem(f"unknown key {key!r}, {values.suggestion(key, known)}", key)
        return {key: value for key, value in data.items() if value is not None}


class FirstPacket(Section):
    """How long and how much a listener reads before it has to decide."""

    timeout_s: values.Timeout = Field(5.0, alias="timeout")
    max_bytes: values.Size = 16 << 10

    @field_validator("max_bytes")
    @classmethod
    def _in_range(cls, size: int) -> int:
        # Held in memory for every connection that has not decided.
        if not 1 <= size <= 1 << 20:
            raise ValueError("must be 1 to 1MiB")
        return size


class ProxyProtocol(Section):
    """Whether connections of a listener begin with a PROXY header, and from whom."""

    accept: values.Switch = False
    trusted: values.NetworkSet = Networks.parse([])


class Rule(Section):
    """What one rule takes, and what happens to it."""

    name: values.Name = ""  # never empty in a listener: it names its unnamed rules
    match: MatchField
    to: values.To | None = None
    reject: Literal["reset", "close"] | None = None
    allow: values.Allow | None = None  # with `to`: what the addresses of its name must be in
    ack: values.Switch = True
    checksum: Literal["lenient", "required"] = "lenient"
    token: TokenUse = "off"
    users: Annotated[tuple[str, ...], PlainValidator(_name_list)] = ()
    send_proxy: SendProxy | None = None  # None: as the upstream says
    datapath: DatapathName | None = None  # None: as the listener says

    @property
    def client_names_destination(self) -> bool:
        """Whether the destination comes out of the client's first packet.

        With `to` even an instruction is only recognised, and travels on to the server unread.
        """
        return self.to is None and self.reject is None

    @model_validator(mode="after")
    def _one_outcome(self) -> Self:
        if self.to is not None and self.reject is not None:
            raise problem("a rule either connects (`to`) or refuses (`reject`), not both", "reject")
        named = naming(self.match)
        if self.client_names_destination:
            if named is Naming.NEVER:
                raise problem("the rule says neither `to` (where) nor `reject`")
            if named is Naming.SOMETIMES:
                raise problem(
                    "only some of these alternatives name a destination: write a rule for each",
                    "match",
                )
            if self.allow is None:
                raise problem(
                    "the client names the destination here: say what it may reach, "
                    "for example `allow: [loopback]`",
                    "allow",
                )
        self._only_where_it_means_something()
        return self

    def _only_where_it_means_something(self) -> None:
        written = self.model_fields_set
        reads = set(protocols(self.match)) if self.client_names_destination else set()
        for key in ("ack", "checksum", "token"):
            if key in written and "instruction" not in reads:
                raise problem(f"`{key}` is for rules that read an instruction", key)
        if "users" in written and not reads & {"socks", "http_connect"}:
            raise problem("`users` is for rules that read SOCKS or HTTP CONNECT", "users")
        if self.reject is not None:
            for key in ("allow", "send_proxy", "datapath"):
                if key in written:
                    raise problem(f"`{key}` means nothing in a rule that rejects", key)


class Listener(Section):
    """An address that accepts, and the rules that decide in their order."""

    name: values.Name = ""  # never empty in a config: it names its unnamed listeners
    bind: values.Bind
    mode: values.Mode | None = None  # of a unix socket; None: as the umask says
    protocol: Literal["tcp", "udp"] = "tcp"
    proxy_protocol: ProxyProtocol = ProxyProtocol()
    first_packet: FirstPacket = FirstPacket()
    rules: tuple[Rule, ...]
    datapath: DatapathName | None = None  # None: as the config says
    splice: values.Switch = True  # off: no pair is spliced here, whatever a rule says

    @field_validator("rules")
    @classmethod
    def _named(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        if not rules:
            raise problem("a listener without rules would refuse everyone")
        names = _unique_names([rule.name for rule in rules], [first_word(r.match) for r in rules])
        return tuple(
            rule.model_copy(update={"name": name}) if not rule.name else rule
            for rule, name in zip(rules, names, strict=True)
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_consistent()
        return self

    def _check_consistent(self) -> None:
        is_unix = isinstance(self.bind, UnixAddress)
        proxy = self.proxy_protocol
        if self.mode is not None and not is_unix:
            raise problem("only a unix socket has a mode", "mode")
        if proxy.accept and not proxy.trusted and not is_unix:
            raise problem(
                "whose PROXY headers are to be believed? write `trusted: [10.0.0.0/8]`",
                "proxy_protocol",
                "trusted",
            )
        if not self.splice and self.datapath == "splice":
            raise problem("`splice: off` contradicts `datapath: splice`", "splice")
        if self.protocol == "udp":
            if is_unix:
                raise problem("a unix socket carries a stream: `protocol: tcp`", "protocol")
            if proxy.accept:
                raise problem("PROXY headers are for TCP", "proxy_protocol", "accept")
            for index, rule in enumerate(self.rules):
                for protocol in protocols(rule.match):
                    if protocol in STREAM_ONLY:
                        raise problem(
                            f"{protocol} needs a stream, not UDP", "rules", index, "match"
                        )


class Server(Section):
    """One member of an upstream; a bare address is short for `{address: ...}`."""

    address: values.ServerAddress
    weight: Annotated[int, Field(strict=True, ge=0, le=256)] = 1  # 0: no new pairs
    backup: values.Switch = False

    @model_validator(mode="before")
    @classmethod
    def _bare_address(cls, data: object) -> object:
        return {"address": data} if isinstance(data, str) else data


class Health(Section):
    """Active checks: a TCP connect every `interval`."""

    interval_s: values.Timeout = Field(5.0, alias="interval")
    timeout_s: values.Timeout = Field(2.0, alias="timeout")
    rise: Annotated[int, Field(strict=True, ge=1, le=100)] = 2  # HAProxy's defaults
    fall: Annotated[int, Field(strict=True, ge=1, le=100)] = 3


class Ejection(Section):
    """Passive checks: a server whose connections fail in a row rests for a while."""

    failures: Annotated[int, Field(strict=True, ge=0, le=1000)] = 3  # 0: never
    for_s: values.Timeout = Field(10.0, alias="for")


class Upstream(Section):
    """A named set of servers and how to choose one."""

    servers: tuple[Server, ...]
    balance: Literal["round_robin", "least_pairs", "source_hash"] = "round_robin"
    connect_timeout_s: values.Timeout | None = Field(None, alias="connect_timeout")
    send_proxy: SendProxy = "off"
    health: Health | None = None
    eject: Ejection = Ejection()
    slow_start_s: values.Duration = Field(0.0, alias="slow_start")
    resolve_every_s: values.Timeout = Field(30.0, alias="resolve_every")
    source: values.IpList = ()
    transparent: values.Switch = False  # connect from the client's own address

    @field_validator("servers")
    @classmethod
    def _distinct(cls, servers: tuple[Server, ...]) -> tuple[Server, ...]:
        if not servers:
            raise problem("an upstream needs a server")
        seen = set()
        for index, server in enumerate(servers):
            if server.address in seen:
                raise problem(f"{server.address} stands here twice: give it a weight", index)
            seen.add(server.address)
        return servers

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.transparent and self.source:
            raise problem("`transparent` takes the client's address, not these", "source")
        return self


# A switch costs about as much as copying so many bytes instead of splicing them.
SPLICE_AFTER_BYTES: Final = 4 << 20


class Handover(Section):
    """When a pair enters its datapath: whichever comes first; any 0 means at once."""

    after_bytes: values.Size = 256 << 10
    after_round_trips: Count = 4
    after_s: values.Duration = Field(1.0, alias="after")

    @property
    def splice_after_bytes(self) -> int:
        """`after_bytes` for pairs that may be spliced."""
        is_given = "after_bytes" in self.model_fields_set
        return self.after_bytes if is_given else SPLICE_AFTER_BYTES


class Limits(Section):
    """Bounds on connections; 0 means none."""

    pairs: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 10_000
    pairs_per_client: Count = 0
    new_per_second: Count = 0


class Timeouts(Section):
    """Deadlines of a connection's later life; the first packet's is its listener's."""

    connect_s: values.Timeout = Field(5.0, alias="connect")
    idle_s: values.Timeout = Field(3600.0, alias="idle")
    half_closed_s: values.Timeout = Field(300.0, alias="half_closed")
    drain_s: values.Duration = Field(30.0, alias="drain")


class Tokens(Section):
    """Keys of signed instructions by their id, and how strictly times are taken."""

    keys: Mapping[values.Name, values.File] = {}
    clock_skew_s: values.Duration = Field(0.0, alias="clock_skew")
    max_lifetime_s: values.Timeout | None = Field(None, alias="max_lifetime")
    single_use: values.Switch = False


class Metrics(Section):
    """Where Prometheus asks."""

    bind: values.TcpBind


class Log(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


def _builtin_listener() -> Listener:
    rule = {"match": "instruction", "allow": ["loopback"]}
    return Listener.model_validate({"name": "main", "bind": "127.0.0.1:9999", "rules": [rule]})


class Config(Section):
    """The whole configuration; an empty file gives the built-in one."""

    listeners: tuple[Listener, ...] = Field(default_factory=lambda: (_builtin_listener(),))
    upstreams: Mapping[values.UpstreamName, Upstream] = {}
    datapath: DatapathName = "auto"
    handover: Handover = Handover()
    backlog_limit_bytes: values.Size = Field(1 << 20, alias="backlog_limit")
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    tokens: Tokens = Tokens()
    users: Mapping[values.Name, values.File] = {}  # files with the passwords
    metrics: Metrics | None = None
    log: Log = Log()
    workers: Workers = "auto"
    user: values.Name = "nobody"

    @field_validator("backlog_limit_bytes")
    @classmethod
    def _fits_the_program(cls, size: int) -> int:
        # The verdict program compares 32-bit sequence differences: half their range is the end.
        if not 4 << 10 <= size <= 1 << 30:
            raise ValueError("must be 4KiB to 1GiB")
        return size

    @field_validator("listeners")
    @classmethod
    def _listeners_named(cls, listeners: tuple[Listener, ...]) -> tuple[Listener, ...]:
        if not listeners:
            raise problem("a forwarder needs a listener")
        names = _unique_names([listener.name for listener in listeners], ["main"] * len(listeners))
        return tuple(
            listener.model_copy(update={"name": name}) if not listener.name else listener
            for listener, name in zip(listeners, names, strict=True)
        )

    @model_validator(mode="after")
    def _references(self) -> Self:
        self._check_references()
        return self

    def _check_references(self) -> None:
        self._check_binds()
        for position, listener in enumerate(self.listeners):
            for index, rule in enumerate(listener.rules):
                at = ("listeners", position, "rules", index)
                self._check_rule(rule, at)
                if listener.protocol == "udp":
                    self._check_datagram_rule(rule, at)
        self._check_no_loop()

    def _check_binds(self) -> None:
        taken: dict[tuple[str, Address | UnixAddress], str] = {}
        for index, listener in enumerate(self.listeners):
            if isinstance(listener.bind, Address) and listener.bind.port == 0:
                continue
            key = (listener.protocol, listener.bind)
            if key in taken:
                raise problem(
                    f"{listener.bind} is bound by the listener {taken[key]!r} already",
                    "listeners",
                    index,
                    "bind",
                )
            taken[key] = listener.name
        if self.metrics is not None and ("tcp", self.metrics.bind) in taken:
            name = taken["tcp", self.metrics.bind]
            raise problem(
                f"{self.metrics.bind} is bound by the listener {name!r} already", "metrics", "bind"
            )

    def _check_rule(self, rule: Rule, at: tuple[str | int, ...]) -> None:
        if isinstance(rule.to, str) and rule.to not in self.upstreams:
            hint = values.suggestion(rule.to, self.upstreams) or "there are none"
            raise problem(
                f"no upstream is called {rule.to!r} ({hint}); a server is written host:port",
                *at,
                "to",
            )
        if rule.token != "off" and not self.tokens.keys:
            raise problem(
                "tokens are checked with keys: `tokens: {keys: {ID: /FILE}}`", *at, "token"
            )
        for user in rule.users:
            if user not in self.users:
                hint = values.suggestion(user, self.users) or "there are none"
                raise problem(
                    f"no user is called {user!r} ({hint}): `users: {{NAME: /FILE}}`", *at, "users"
                )

    def _check_datagram_rule(self, rule: Rule, at: tuple[str | int, ...]) -> None:
        """Refuse what a UDP session would silently go without."""
        upstream = self.upstreams.get(rule.to) if isinstance(rule.to, str) else None
        says = rule.send_proxy
        if says is None and upstream is not None:
            says = upstream.send_proxy
        if says not in (None, "off"):
            raise problem("PROXY headers are for TCP: `send_proxy: off`", *at, "send_proxy")
        if upstream is not None and upstream.transparent:
            raise problem(
                f"{rule.to} is `transparent`, which is for TCP: use another upstream", *at, "to"
            )

    def _check_no_loop(self) -> None:
        for protocol in ("tcp", "udp"):
            own = OwnListeners(
                listener.bind
                for listener in self.listeners
                if listener.protocol == protocol
                and not (isinstance(listener.bind, Address) and listener.bind.port == 0)
            )
            for position, listener in enumerate(self.listeners):
                for index, rule in enumerate(listener.rules):
                    to = rule.to
                    if listener.protocol != protocol or not isinstance(to, (Address, UnixAddress)):
                        continue
                    if own.includes(to, is_local=lambda _: False):
                        raise problem(
                            f"{to} is a listener of this forwarder: that would be a loop",
                            "listeners",
                            position,
                            "rules",
                            index,
                            "to",
                        )

    def listening_on(self, bind: str) -> Config:
        """This configuration with the first TCP listener moved to another address.

        Raises:
            ConfigError: not an address to bind, there is no TCP listener, or the new address
                makes the configuration wrong (another listener has it, a rule connects to it).
        """
        try:
            address = parse_bind(bind)
        except AddressError as error:
            raise ConfigError(str(error), path="--listen") from error
        for index, listener in enumerate(self.listeners):
            if listener.protocol == "tcp":
                return self._with_listener_at(index, address, "--listen")
        raise ConfigError("there is no TCP listener to move", path="--listen")

    def with_port(self, name: str, port: int) -> Config:
        """This configuration with the listener of that name at another port, if there is one.

        Raises:
            ConfigError: the port makes the configuration wrong, as above.
        """
        for index, listener in enumerate(self.listeners):
            if listener.name == name and isinstance(listener.bind, Address):
                return self._with_listener_at(
                    index, Address(listener.bind.host, port), "listen_port"
                )
        return self

    def _with_listener_at(self, index: int, address: Address | UnixAddress, path: str) -> Config:
        moved = self.listeners[index].model_copy(update={"bind": address})
        listeners = (*self.listeners[:index], moved, *self.listeners[index + 1 :])
        config = self.model_copy(update={"listeners": listeners})
        try:
            # Copies are not validated.
            moved._check_consistent()
            config._check_references()
        except PydanticCustomError as error:
            raise ConfigError(error.message(), path=path) from error
        return config


def _unique_names(given: list[str], bases: list[str]) -> list[str]:
    """The given names, and for the empty ones their base, from the second on with a number.

    Raises:
        PydanticCustomError: a given name stands there twice.
    """
    taken: set[str] = set()
    for index, name in enumerate(given):
        if name and name in taken:
            raise problem(f"the name {name!r} is taken already", index, "name")
        taken.add(name)
    result = []
    for name, base in zip(given, bases, strict=True):
        chosen, number = name or base, 1
        while not name and chosen in taken:
            number += 1
            chosen = f"{base}-{number}"
        taken.add(chosen)
        result.append(chosen)
    return result

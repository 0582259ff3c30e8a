"""The configuration as frozen models; their fields are the YAML's keys.

Where the two differ an alias says so: a field that is a time ends in `_s`, a size in `_bytes`.
The text below a field is its meaning for users: `reference` makes docs/configuration.md and
pyforwarder.yaml(5) of it, so every field has one.
Rules that concern one section stand in it, those that concern several in `Config`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pyforwarder.config import values
from pyforwarder.config.fields import (
    Count,
    HostNames,
    KeepaliveIdle,
    KeepaliveInterval,
    Names,
    Workers,
    off_is_a_word,
)
from pyforwarder.config.fleet import Fleet
from pyforwarder.config.limits import Limits
from pyforwarder.config.listener import MOST_BINDS, Listener, Rule, unique_names
from pyforwarder.config.problems import problem
from pyforwarder.config.section import Section
from pyforwarder.config.upstream import Upstream
from pyforwarder.core.address import (
    ANY_IPV4,
    ANY_IPV6,
    Address,
    AddressError,
    Bind,
    SamePort,
    UnixAddress,
    parse_bind,
)
from pyforwarder.core.datapaths import DatapathName
from pyforwarder.core.keepalive import OFF
from pyforwarder.core.keepalive import Keepalive as KeepaliveTerms
from pyforwarder.core.policy import OwnListeners
from pyforwarder.errors import ConfigError

# A switch costs about as much as copying so many bytes instead of splicing them.
SPLICE_AFTER_BYTES: Final = 4 << 20


class Handover(Section):
    """When a pair or session enters its datapath: whichever comes first; any 0 means at once."""

    after_bytes: values.Size = 256 << 10
    """After so many bytes of both directions."""
    spliced_bytes: values.Size | None = Field(None, alias="splice_after_bytes")
    """The same for pairs that may be spliced, for which a switch costs more. Not given:
    `after_bytes` if that is given, else 4MiB.
    """
    after_round_trips: Count = 4
    """After so many changes of direction; of UDP, so many datagrams each way."""
    after_s: values.Duration = Field(1.0, alias="after")
    """After so long."""

    @property
    def splice_after_bytes(self) -> int:
        """`after_bytes` for pairs that may be spliced."""
        if self.spliced_bytes is not None:
            return self.spliced_bytes
        is_given = "after_bytes" in self.model_fields_set
        return self.after_bytes if is_given else SPLICE_AFTER_BYTES


class Timeouts(Section):
    """Deadlines of a connection's later life; the first packet's is its listener's."""

    connect_s: values.Timeout = Field(5.0, alias="connect")
    """For connecting to a server; for a name, all its addresses together."""
    idle_s: values.Timeout = Field(3600.0, alias="idle")
    """After so long without a byte in either direction a pair ends. UDP sessions end after two
    minutes at the latest, unless their listener says otherwise.
    """
    half_closed_s: values.Timeout = Field(300.0, alias="half_closed")
    """The same for a pair of which one direction has ended."""
    drain_s: values.Duration = Field(30.0, alias="drain")
    """How long `down` waits for pairs to end before it resets them. 0: at once."""


class Keepalive(Section):
    """How a silent peer of a joined pair is asked whether it is there; `off`: never."""

    idle_s: KeepaliveIdle = Field(60.0, alias="idle")
    """A peer that was silent for so long is asked, in whole seconds up to 9h. 0: nobody is."""
    interval_s: KeepaliveInterval = Field(10.0, alias="interval")
    """How long it has for the answer before it is asked again, in whole seconds up to 9h."""
    count: Annotated[int, Field(strict=True, ge=1, le=127)] = 3  # MAX_TCP_KEEPCNT
    """After so many questions without an answer the pair is reset."""

    @model_validator(mode="before")
    @classmethod
    def _off(cls, data: object) -> object:
        return {"idle": 0} if off_is_a_word(data) == "off" else data

    @property
    def terms(self) -> KeepaliveTerms:
        """The terms in the kernel's own numbers."""
        if not self.idle_s:
            return OFF
        return KeepaliveTerms(int(self.idle_s), int(self.interval_s), self.count)


class Express(Section):
    """What `datapath: express` may have of this host."""

    ports: Annotated[int, Field(strict=True, ge=64, le=16_384)] = 2048
    """Ports of this host that are kept for it: so many connections at once begin in the kernel.
    One that has ended keeps its port for 60 s, or for half a second while a quarter of them are
    taken.
    """


class Tokens(Section):
    """Keys of signed instructions by their id, and how strictly times are taken."""

    keys: Mapping[values.Name, values.File] = {}
    """Key files by key id, `{ID: /FILE}`. A file holds the raw key (a final newline is cut off)."""
    clock_skew_s: values.Duration = Field(0.0, alias="clock_skew")
    """How far the clocks of client and gateway may be apart."""
    max_lifetime_s: values.TimeoutOrOff = Field(300.0, alias="max_lifetime")
    """The longest life that an instruction may have left. `off`: no bound."""
    single_use: values.Switch = True
    """Whether an instruction is good once only."""
    audience: values.Audience | None = None
    """This gateway's name. An instruction that names another one (`aud=`) is refused; with
    `single_use` it must name this one.
    """

    @property
    def longest_life_s(self) -> float | None:
        """How much of its life an instruction may have before it; None: as much as it likes."""
        return None if self.max_lifetime_s == "off" else self.max_lifetime_s

    @property
    def audience_required(self) -> bool:
        """Whether an instruction must name this gateway.

        One that names none could be used once at every gateway that has its key.
        """
        return self.single_use and self.audience is not None


class Metrics(Section):
    """Where Prometheus asks."""

    bind: values.TcpBind
    """Where `/metrics` is served, for example 127.0.0.1:9998."""


class Status(Section):
    """The page in a browser: where it is, who may look, and whether they may also do something."""

    bind: values.TcpBind = Address("127.0.0.1", 9997)
    """Where the page is. An address that is not loopback wants `users`."""
    users: Names = ()
    """Who may look, by their names in the top level's `users`. None: everybody who reaches it."""
    control: values.Switch = False
    """Whether those who look may also reset pairs and drain servers."""
    hosts: HostNames = ()
    """Names by which browsers reach it. Addresses and `localhost` need not be listed."""

    @field_validator("bind")
    @classmethod
    def _known_port(cls, bind: Address) -> Address:
        # Nobody would know what to type, nor we which address no client may be connected to.
        if bind.port == 0:
            raise ValueError("a page is at a port that one knows: not 0")
        return bind

    @model_validator(mode="after")
    def _strangers_log_in(self) -> Self:
        if not self.users and not ipaddress.ip_address(self.bind.host).is_loopback:
            raise problem(
                f"{self.bind} can be reached from elsewhere: say who may look, "
                "`users: [NAME]` with `users: {NAME: /FILE}` at the top",
                "users",
            )
        return self


class Log(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important lines that are written. `debug` tells each step of each connection."""
    format: Literal["text", "json"] = "text"
    """Words and `key=value`, or one JSON object per line."""
    null_connections: values.Switch = False
    """Whether connections that have sent nothing (checks by load balancers, `nc -z`) have lines."""
    sample: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 1
    """One of so many connections that have ended as most do has a line: those that both ends have
    closed (`finished`), and sessions of UDP that were silent (`idle`). Each worker writes the first
    one and then every Nth of its own, TCP and UDP apart, with `one_of=N`. All others always have
    one: refused, denied, reset, timed out, and faults. Counters count all.
    """


def _builtin_listener() -> Listener:
    rule = {"match": "instruction", "allow": ["loopback"]}
    return Listener.model_validate({"name": "main", "bind": "127.0.0.1:9999", "rules": [rule]})


class Config(Section):
    """The whole configuration; an empty file gives the built-in one."""

    include: values.Directories | None = None  # read before: see config/including.py
    """Directories of configuration files (`*.yaml`, `*.yml`, in the order of their names), each
    with `listeners`, `upstreams` and `users` that are added to those of this file. A relative path
    is relative to this file.
    """
    listeners: tuple[Listener, ...] = Field(default_factory=lambda: (_builtin_listener(),))
    """Where clients connect. Not given: one on 127.0.0.1:9999 with the rule `{match: instruction,
    allow: [loopback]}`.
    """
    upstreams: Mapping[values.UpstreamName, Upstream] = {}
    """Sets of servers by name, for `to:` in rules."""
    datapath: DatapathName = "auto"
    """What moves the bytes, see [datapaths](datapaths.md). A listener or rule may differ."""
    handover: Handover = Handover()
    """When a pair passes from userspace to its datapath."""
    backlog_limit_bytes: values.Size = Field(1 << 20, alias="backlog_limit")
    """How many bytes one direction of a sockmap pair may hold in the kernel, 4KiB to 1GiB."""
    splice_interfaces: Literal["own", "any"] = "own"
    """By which interfaces packets of a spliced pair may come: those of its handshakes and routes,
    or any.
    """
    express: Express = Express()
    """What `datapath: express` may have of this host."""
    limits: Limits = Limits()
    """Limits on the connections of all listeners."""
    timeouts: Timeouts = Timeouts()
    """Deadlines of connections."""
    keepalive: Keepalive = Keepalive()
    """Whether silent clients and servers of TCP pairs are asked if they are there. `off`: no."""
    tokens: Tokens = Tokens()
    """Keys of signed instructions, and how strictly they are taken."""
    users: Mapping[values.Name, values.File] = {}
    """Password files by user name, `{NAME: /FILE}`, for rules with `users`."""
    metrics: Metrics | None = None
    """For Prometheus. Not given: none."""
    fleet: Fleet | None = None
    """What this machine shares with others, see [fleets](fleet.md). Not given: nothing."""
    status: Status | None = None
    """The page in a browser, see [the page](page.md). Not given: none."""
    log: Log = Log()
    """What is logged, and how."""
    workers: Workers = "auto"
    """Processes that serve connections, 1 to 256. `auto`: one for each processor."""
    user: values.Name = "nobody"
    """The user that workers run as, if `up` is run by root."""

    @property
    def express_ports(self) -> int:
        """How many ports are kept for connections that the kernel opens; 0: no listener asks."""
        is_asked = any(
            (rule.datapath or listener.datapath or self.datapath) == "express"
            for listener in self.listeners
            if listener.protocol == "tcp" and listener.splice
            for rule in listener.rules
        )
        return self.express.ports if is_asked else 0

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
        names = unique_names([listener.name for listener in listeners], ["main"] * len(listeners))
        return tuple(
            listener.model_copy(update={"name": name}) if not listener.name else listener
            for listener, name in zip(listeners, names, strict=True)
        )

    @model_validator(mode="before")
    @classmethod
    def _none_of_its_own(cls, data: object) -> object:
        """The built-in listener is not for a machine whose listeners are in the store."""
        if isinstance(data, dict) and data.get("fleet") and data.get("listeners") is None:
            return {**data, "listeners": []}
        return data

    @model_validator(mode="after")
    def _references(self) -> Self:
        if not self.listeners and self.fleet is None:
            raise problem("a forwarder needs a listener", "listeners")
        self._check_references()
        return self

    def _check_references(self) -> None:
        self._check_binds()
        for position, listener in enumerate(self.listeners):
            for index, rule in enumerate(listener.rules):
                at = ("listeners", position, "rules", index)
                self._check_rule(rule, at)
                if listener.is_unix:
                    self._check_has_port(rule, at)
                if listener.protocol == "udp":
                    self._check_datagram_rule(rule, at)
        if self.status is not None:
            self._check_users(self.status.users, ("status", "users"))
        self._check_no_loop()

    def _check_users(self, users: Iterable[str], at: tuple[str | int, ...]) -> None:
        for user in users:
            if user not in self.users:
                hint = values.suggestion(user, self.users) or "there are none"
                raise problem(f"no user is called {user!r} ({hint}): `users: {{NAME: /FILE}}`", *at)

    def _check_binds(self) -> None:
        taken: dict[tuple[str, Bind], str] = {}
        for index, listener in enumerate(self.listeners):
            for bind in listener.addresses:
                if isinstance(bind, Address) and bind.port == 0:
                    continue
                key = (listener.protocol, bind)
                if key in taken:
                    by = f"the listener {taken[key]!r} already"
                    if taken[key] == listener.name:
                        by = "this listener twice"
                    raise problem(f"{bind} is bound by {by}", "listeners", index, "bind")
                taken[key] = listener.name
        if len(taken) > MOST_BINDS:
            raise problem(f"{len(taken)} addresses to bind are more than {MOST_BINDS}", "listeners")
        for section_key, section in (("metrics", self.metrics), ("status", self.status)):
            if section is not None and ("tcp", section.bind) in taken:
                name = taken["tcp", section.bind]
                raise problem(
                    f"{section.bind} is bound by the listener {name!r} already", section_key, "bind"
                )
        if self.metrics and self.status and self.metrics.bind == self.status.bind:
            raise problem(f"{self.status.bind} is bound by `metrics` already", "status", "bind")

    def _check_rule(self, rule: Rule, at: tuple[str | int, ...]) -> None:
        if isinstance(rule.to, str) and rule.to not in self.upstreams:
            hint = values.suggestion(rule.to, self.upstreams) or "there are none"
            form = "host:same" if rule.to.lower() == "same" else "host:port"
            raise problem(
                f"no upstream is called {rule.to!r} ({hint}); a server is written {form}",
                *at,
                "to",
            )
        if rule.token != "off" and not self.tokens.keys:
            raise problem(
                "tokens are checked with keys: `tokens: {keys: {ID: /FILE}}`", *at, "token"
            )
        self._check_users(rule.users, (*at, "users"))

    def _check_has_port(self, rule: Rule, at: tuple[str | int, ...]) -> None:
        """Refuse `same` in a server's address where clients come by a unix socket: they have no
        port.
        """
        upstream = self.upstreams.get(rule.to) if isinstance(rule.to, str) else None
        servers = [server.address for server in upstream.servers] if upstream else [rule.to]
        for server in servers:
            if isinstance(server, SamePort):
                raise problem(
                    f"{server} wants the port that a client has connected to, and a unix socket "
                    "has none: write the port",
                    *at,
                    "to",
                )

    def _check_datagram_rule(self, rule: Rule, at: tuple[str | int, ...]) -> None:
        """Refuse what a UDP session would silently go without."""
        upstream = self.upstreams.get(rule.to) if isinstance(rule.to, str) else None
        says = rule.send_proxy
        if says is None and upstream is not None:
            says = upstream.send_proxy
        if says == "v1":
            raise problem(
                "PROXY headers of version 1 are for TCP: `send_proxy: v2`", *at, "send_proxy"
            )

    def _check_no_loop(self) -> None:
        for protocol in ("tcp", "udp"):
            own = OwnListeners(
                bind
                for listener in self.listeners
                if listener.protocol == protocol
                for bind in listener.addresses
                if isinstance(bind, UnixAddress) or (isinstance(bind, Address) and bind.port)
            )
            for position, listener in enumerate(self.listeners):
                for index, rule in enumerate(listener.rules):
                    if listener.protocol != protocol:
                        continue
                    for to in _destinations(rule, listener):
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
        """Return this configuration with the first TCP listener moved to another address.

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
        """Return this configuration with the listener of that name at another port, if there is
        one.

        Raises:
            ConfigError: the port makes the configuration wrong, as above.
        """
        for index, listener in enumerate(self.listeners):
            bind = listener.bind[0]
            if listener.name == name and len(listener.bind) == 1 and isinstance(bind, Address):
                return self._with_listener_at(index, Address(bind.host, port), "listen_port")
        return self

    @property
    def claims_tokens(self) -> bool:
        """Whether instructions that are good once only are used up in the whole fleet."""
        tokens = self.tokens
        in_fleet = self.fleet is not None and self.fleet.tokens.scope == "fleet"
        return in_fleet and tokens.single_use and bool(tokens.keys)

    @property
    def shares_limits(self) -> bool:
        """Whether a client's connections at other machines of the fleet count, too."""
        return self.fleet is not None and self.fleet.limits.scope == "fleet"

    def can_move(self, name: str) -> bool:
        """Whether `with_port` moves the listener of that name."""
        return any(
            listener.name == name
            and len(listener.bind) == 1
            and isinstance(listener.bind[0], Address)
            for listener in self.listeners
        )

    def _with_listener_at(self, index: int, address: Address | UnixAddress, path: str) -> Config:
        listener = self.listeners[index]
        host = address.host if isinstance(address, Address) else ""
        moved = listener.model_copy(
            update={
                "bind": (address,),
                # Neither is said of the new address.
                "dual_stack": listener.dual_stack and host == ANY_IPV6,
                "freebind": listener.freebind and host not in ("", ANY_IPV4, ANY_IPV6),
            }
        )
        listeners = (*self.listeners[:index], moved, *self.listeners[index + 1 :])
        config = self.model_copy(update={"listeners": listeners})
        try:
            # Copies are not validated.
            moved._check_consistent()
            config._check_references()
        except PydanticCustomError as error:
            raise ConfigError(error.message(), path=path) from error
        return config


def _destinations(rule: Rule, listener: Listener) -> list[Address | UnixAddress]:
    """The numeric addresses that this rule itself leads clients of the listener to."""
    if isinstance(rule.to, SamePort):
        ports = [bind.port for bind in listener.addresses if isinstance(bind, Address)]
        same = [rule.to.at(port) for port in ports]
        return [address for address in same if isinstance(address, Address)]
    return [rule.to] if isinstance(rule.to, Address | UnixAddress) else []

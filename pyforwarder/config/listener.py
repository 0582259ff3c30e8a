"""The part of the configuration that concerns one listener: its rules and what it takes in."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from pyforwarder.config import values
from pyforwarder.config.fields import (
    ListenerProtocol,
    Names,
    Port,
    SendProxy,
    TokenUse,
)
from pyforwarder.config.limits import UDP_LIMITS, ListenerLimits
from pyforwarder.config.match import (
    MatchField,
    Naming,
    check_match,
    first_word,
    naming,
    place_of_option,
    protocols,
)
from pyforwarder.config.problems import problem
from pyforwarder.config.section import Section
from pyforwarder.core.address import (
    ANY_IPV4,
    ANY_IPV6,
    Address,
    Bind,
    BindEntry,
    NameIn,
    PortRange,
    SystemdSockets,
    UnixAddress,
)
from pyforwarder.core.datapaths import DatapathName
from pyforwarder.core.first_packet.naming import SOURCES
from pyforwarder.core.first_packet.table import Terms
from pyforwarder.core.policy import Networks


class FirstPacket(Section):
    """How long and how much a listener reads before it has to decide."""

    timeout_s: values.Timeout = Field(5.0, alias="timeout")
    """How long a client has to send enough bytes for a decision. When it ends, rules with
    `silence` are asked, for clients that have sent nothing.
    """
    max_bytes: values.Size = 16 << 10
    """How many bytes are read for the decision, 1 to 1MiB. They are held in memory until then."""

    @field_validator("max_bytes")
    @classmethod
    def _in_range(cls, size: int) -> int:
        # Held in memory for every connection that has not decided.
        if not 1 <= size <= 1 << 20:
            raise ValueError("must be 1 to 1MiB")
        return size


class ProxyProtocol(Section):
    """Whether connections of a listener begin with a PROXY header, and from whom."""

    accept: values.SwitchOrOptional = False
    """Whether every connection must begin with a PROXY header (version 1 or 2). One without it is
    reset. `optional`: connections of the trusted may begin with one; those of others are taken as
    they are, and a header of theirs is no header, but a part of the first packet.
    """
    trusted: values.NetworkSet = Networks.parse([])
    """The proxies whose headers are believed. Required with `accept`, except on a unix socket."""


class Rule(Section):
    """What one rule takes, and what happens to it."""

    name: values.Name = ""  # never empty in a listener: it names its unnamed rules
    """What logs, `show` and metrics call it; the kernel's file `show` has its first 15 bytes. Not
    given: the first word of `match`, with a number if that is taken.
    """
    match: MatchField
    """What a first packet must be, see [protocols](protocols.md): a protocol's name, a mapping of
    conditions that must all hold, or a list of alternatives.
    """
    to: values.To | None = None
    """The server: an address, the name of an upstream, `sni` or `host`. Not given: the client
    names the destination (`instruction`, `socks`, `http_connect`).
    """
    port: Port | None = None
    """The port at the server with `to: sni` (not given: 443) and `to: host` (80)."""
    reject: Literal["reset", "close"] | None = None
    """Instead of `to`: end the connection with a RST or with a FIN."""
    allow: values.Allow | None = None
    """What a client that names its destination may reach: `loopback`, `private`, `public`, `any`,
    addresses, networks, each with optional ports. Required where the client names the
    destination.
    """
    ack: values.Switch = True
    """Whether a client's instruction is answered."""
    checksum: Literal["lenient", "required"] = "lenient"
    """Whether the instruction's CHECK may be `00`, that is, left out."""
    token: TokenUse = "off"
    """Whether an instruction must be signed, may be, or is not read as a signed one."""
    users: Names = ()
    """Who may use a `socks` or `http_connect` rule, by name and password; the names are keys of
    `users`. Not given: nobody is asked.
    """
    send_proxy: SendProxy | None = None
    """The PROXY header that the server gets before the first bytes. Not given: as the upstream
    says.
    """
    datapath: DatapathName | None = None
    """What moves the bytes of its pairs. Not given: as the listener says."""

    @classmethod
    def _place_of(cls, key: object, data: dict[object, object]) -> str:
        return place_of_option(data.get("match"), key)

    @property
    def client_names_destination(self) -> bool:
        """Whether the destination comes out of the client's first packet.

        With `to` even an instruction is only recognised, and travels on to the server unread.
        """
        return self.to is None and self.reject is None

    @model_validator(mode="before")
    @classmethod
    def _port_of_a_name(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        to, port = data.get("to"), data.get("port")
        if isinstance(to, str) and to in SOURCES and isinstance(port, int):
            return {**data, "to": NameIn(to, port)}
        return data

    @model_validator(mode="after")
    def _one_outcome(self) -> Self:
        if isinstance(self.to, NameIn):
            self._check_name(self.to)
        elif self.port is not None:
            raise problem("`port` goes with `to: sni` and `to: host`", "port")
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

    def _check_name(self, name: NameIn) -> None:
        wanted = SOURCES[name.where].protocols
        found = protocols(self.match)
        if not found or any(protocol not in wanted for protocol in found):
            first, *others = wanted
            words = f"{first} alone" + (f" (in datagrams {' or '.join(others)})" if others else "")
            raise problem(f"`to: {name.where}` wants a rule that matches {words}", "to")
        if self.allow is None:
            raise problem(
                "the client names the destination here: say what it may reach, "
                "for example `allow: [public]`",
                "allow",
            )

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


# Addresses of all listeners: each is a descriptor of every worker, and one of the supervisor for
# each
# of them.
MOST_BINDS: Final = 16_384


class Listener(Section):
    """An address that accepts, and the rules that decide in their order."""

    name: values.Name = ""  # never empty in a config: it names its unnamed listeners
    """What logs, `show` and metrics call it. Not given: `main`, then `main-2`."""
    bind: values.Binds
    """Where it listens: `ip:port`, `[ip6]:port`, `ip:first-last`, `unix:/path`, `systemd:NAME` (the
    sockets that systemd passes under this name), or a list of them. Port 0: the kernel chooses.
    """
    mode: values.Mode | None = None
    """The permissions of unix sockets, such as 0660. Not given: as the umask says."""
    dual_stack: values.Switch = False
    """`true`: `[::]` takes IPv4 as well, by a socket of its own."""
    freebind: values.Switch = False
    """`true`: IP addresses are bound that this host does not have (yet)."""
    protocol: ListenerProtocol = "tcp"
    """What it accepts."""
    proxy_protocol: ProxyProtocol = ProxyProtocol()
    """Whether its connections begin with a PROXY header, and from whom."""
    first_packet: FirstPacket = FirstPacket()
    """How long and how much is read before a rule has to decide."""
    rules: tuple[Rule, ...]
    """Asked in this order; the first that matches decides."""
    datapath: DatapathName | None = None
    """What moves the bytes of its pairs. Not given: as the top level says."""
    splice: values.Switch = True
    """`false`: no pair of this listener is spliced, also where a rule asks for it. Use it where the
    host's packet filters must go on seeing the packets.
    """
    limits: ListenerLimits = ListenerLimits()
    """Limits on this listener alone, beside those on all."""
    amplification: Annotated[int, Field(strict=True, ge=0, le=1000)] = 0
    """UDP: how many times the bytes of a client's first datagram it may be sent before it has sent
    a second one. 0: no bound.
    """
    idle_s: values.Timeout | None = Field(None, alias="idle")
    """UDP: after so long without a datagram in either direction a session ends. Not given: after
    two minutes, as RFC 4787 has it for address translators, or `timeouts.idle` if that is shorter.
    """

    @property
    def addresses(self) -> tuple[Bind, ...]:
        """The address of every socket, with ranges and `dual_stack` written out."""
        found: list[Bind] = []
        for entry in self.bind:
            each = entry.addresses() if isinstance(entry, PortRange) else (entry,)
            for bind in each:
                found.append(bind)
                if self.dual_stack and isinstance(bind, Address) and bind.host == ANY_IPV6:
                    # A socket of each family, and none of both: no IPv4 address is ever written as
                    # an IPv6 one then, here or in the kernel's tables.
                    found.append(Address(ANY_IPV4, bind.port))
        return tuple(found)

    @property
    def is_unix(self) -> bool:
        """Whether all its clients come by unix sockets."""
        return all(isinstance(entry, UnixAddress) for entry in self.bind)

    @property
    def takes_systemd_sockets(self) -> bool:
        """Whether some of its addresses are known to systemd alone."""
        return any(isinstance(entry, SystemdSockets) for entry in self.bind)

    @field_validator("bind")
    @classmethod
    def _few_enough(cls, binds: tuple[BindEntry, ...]) -> tuple[BindEntry, ...]:
        # Each is a descriptor of every worker.
        count = sum(e.last - e.first + 1 if isinstance(e, PortRange) else 1 for e in binds)
        if count > MOST_BINDS:
            raise ValueError(f"{count} addresses are more than {MOST_BINDS}: bind fewer ports")
        return binds

    @field_validator("rules")
    @classmethod
    def _named(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        if not rules:
            raise problem("a listener without rules would refuse everyone")
        names = unique_names([rule.name for rule in rules], [first_word(r.match) for r in rules])
        return tuple(
            rule.model_copy(update={"name": name}) if not rule.name else rule
            for rule, name in zip(rules, names, strict=True)
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_consistent()
        return self

    def _check_consistent(self) -> None:
        self._check_addresses()
        proxy = self.proxy_protocol
        if proxy.accept and not proxy.trusted and not self.is_unix:
            raise problem(
                "whose PROXY headers are to be believed? write `trusted: [10.0.0.0/8]`",
                "proxy_protocol",
                "trusted",
            )
        if not self.splice and self.datapath in ("splice", "express"):
            raise problem(f"`splice: off` contradicts `datapath: {self.datapath}`", "splice")
        if self.protocol == "tcp":
            self._check_matches(datagrams=False)
            if "amplification" in self.model_fields_set:
                raise problem("`amplification` is for UDP", "amplification")
            if self.idle_s is not None:
                raise problem("`idle` of a listener is for UDP: `timeouts.idle`", "idle")
            for key in UDP_LIMITS:
                if key in self.limits.model_fields_set:
                    raise problem(f"`{key}` is for UDP", "limits", key)
        if self.protocol == "udp":
            if self.datapath == "express":
                raise problem("`datapath: express` is for TCP", "datapath")
            for position, rule in enumerate(self.rules):
                if rule.datapath == "express":
                    raise problem("`datapath: express` is for TCP", "rules", position, "datapath")
            if self.limits.memory_bytes:
                raise problem("`memory` is for TCP: UDP keeps nothing", "limits", "memory")
            if any(isinstance(entry, UnixAddress) for entry in self.bind):
                raise problem("a unix socket carries a stream: `protocol: tcp`", "protocol")
            if proxy.accept:
                raise problem("PROXY headers are for TCP", "proxy_protocol", "accept")
            self._check_matches(datagrams=True)

    def _check_matches(self, *, datagrams: bool) -> None:
        terms = Terms(datagrams=datagrams)
        for index, rule in enumerate(self.rules):
            check_match(rule.match, terms, "rules", index, "match")

    def _check_addresses(self) -> None:
        """What stands beside `bind` has to mean something for one of them."""
        entries = self.bind
        if self.mode is not None and not any(isinstance(e, UnixAddress) for e in entries):
            raise problem("only a unix socket has a mode", "mode")
        hosts = {e.host for e in entries if isinstance(e, Address | PortRange)}
        if self.dual_stack and ANY_IPV6 not in hosts:
            raise problem(
                '`dual_stack` lets `[::]` take IPv4, too: write `bind: "[::]:PORT"`', "dual_stack"
            )
        if self.freebind and not hosts - {ANY_IPV6, ANY_IPV4}:
            raise problem(
                "`freebind` is for IP addresses that may be missing; this listener binds none that "
                "can be: leave it out",
                "freebind",
            )


def unique_names(given: list[str], bases: list[str]) -> list[str]:
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

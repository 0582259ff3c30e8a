"""Which rule of a configuration would take some first bytes, and what would become of them.

Opens no connection. What has to be asked for (names, keys, the time) is passed in, so that
it can be called where nothing may be asked (the status page) and where it may (`explain`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pyforwarder.core import routing
from pyforwarder.core.address import Address, HostPort, SamePort, UnixAddress
from pyforwarder.core.explaining import explain
from pyforwarder.core.express.compiling import compile_table
from pyforwarder.core.first_packet.datagrams import MOST_DATAGRAMS, Datagrams
from pyforwarder.core.policy import OwnListeners, parse_ip
from pyforwarder.core.rule_compiling import compile_rules

if TYPE_CHECKING:
    from pyforwarder.config.listener import Listener
    from pyforwarder.config.model import Config
    from pyforwarder.core.explaining import Explanation
    from pyforwarder.core.routing import Decision, Route
    from pyforwarder.core.token import TokenKeys

# The addresses of a name, in the order in which they are to be tried; None: nobody is asked.
Resolve = Callable[[HostPort], list[Address] | None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the connection, in words."""

    outcome: str  # route, refuse, need-more
    rule: str  # "-": none
    to: str
    skip: int  # bytes of the first packet that are ours
    allowed: bool | None  # None: nothing to allow, or not known without resolving
    why: str


@dataclass(frozen=True, slots=True)
class InKernel:
    """Whether a program in the kernel could decide the same, by the first packet alone."""

    rule: str | None  # that it would have chosen; None: it would have left it to userspace
    why: str  # in words, if it would
    reasons: tuple[str, ...]  # for each rule why userspace decides it; empty: it need not
    is_asked: bool = False  # the configuration has it decide (`datapath: express`)
    # For each rule whether it is asked to decide by it.
    asked: tuple[bool, ...] = ()

    def shares(self, names: Sequence[str]) -> tuple[tuple[str, ...], str, str] | None:
        """Return the rules by which the kernel decides, of rules with these names; the first other
        rule; and why the kernel does not decide by it.

        None: it is asked to decide by no rule.
        """
        if not any(self.asked):
            return None
        kernel, other, why = [], "", ""
        for name, is_asked, reason in zip(names, self.asked, self.reasons, strict=True):
            if is_asked and not reason:
                kernel.append(name)
            elif not other:
                other, why = name, reason or "the configuration does not say `datapath: express`"
        return tuple(kernel), other, why

    @property
    def decided(self) -> str:
        """Where the decision is made."""
        return "kernel" if self.rule is not None and self.is_asked else "user"


@dataclass(frozen=True, slots=True)
class Judged:
    """The first bytes that count, what each rule says of them, and what that leads to."""

    listener: Listener
    size: int  # bytes that were looked at
    datagrams: int  # in so many datagrams; 0: in a stream
    explanation: Explanation
    verdict: Verdict
    in_kernel: InKernel

    def as_json(self) -> dict[str, object]:
        """All of it in plain values."""
        explanation = self.explanation
        shares = self.in_kernel.shares([report.rule.name for report in explanation.rules])
        counted = {"datagrams": self.datagrams, "after_datagrams": explanation.after_datagrams}
        return {
            "listener": self.listener.name,
            "bytes": self.size,
            **asdict(self.verdict),
            "after_bytes": explanation.after_bytes,
            **(counted if self.datagrams else {}),
            "said": [said.hex() for said in explanation.said],
            "rules": [
                {
                    "rule": report.rule.name,
                    "outcome": report.outcome.value.replace(" ", "-"),
                    "after_bytes": report.after_bytes,
                    "why": report.why,
                    "userspace_only": self.in_kernel.reasons[report.rule.index],
                }
                for report in explanation.rules
            ],
            "decided": self.in_kernel.decided,
            "in_kernel": {"rule": self.in_kernel.rule, "why": self.in_kernel.why},
            "kernel_rules": list(shares[0]) if shares else [],
        }


def judge(
    config: Config,
    index: int,
    pieces: Sequence[bytes],
    *,
    client: Address | None,
    port: int | None,
    end: routing.End,
    now_unix_s: float,
    keys: TokenKeys | None,
    passwords: Mapping[str, bytes],
    resolve: Resolve,
) -> Judged:
    """What happens to a connection to the listener at `index` whose client sends `pieces`.

    Of UDP each of them is a datagram. `port` is the listener's port that it connects to, by default
    its first. `keys` must be of a kind that remembers no used tokens; `passwords` has one for every
    user that a rule of the listener names.

    Raises:
        ConfigError: a rule cannot be used.
    """
    listener = config.listeners[index]
    ports = [bind.port for bind in listener.addresses if isinstance(bind, Address)]
    local_port = (ports[0] if ports else 0) if port is None else port
    most = listener.first_packet.max_bytes
    data: bytes
    if listener.protocol == "udp":
        data = Datagrams(pieces[:MOST_DATAGRAMS])
        count, size = len(data.all), sum(map(len, data.all))
        if count == MOST_DATAGRAMS or size >= most:
            end = routing.End.FULL
    else:
        data = b"".join(pieces)
        count, size = 0, min(len(data), most)
        if len(data) >= most:
            data, end = data[:most], routing.End.FULL
    ruleset = compile_rules(listener, keys, passwords=passwords, path=f"listeners[{index}]")
    explanation = explain(
        ruleset,
        data,
        client=client,
        local_port=local_port,
        end=end,
        now_unix_s=now_unix_s,
    )
    verdict = _verdict(config, explanation.decision, local_port, resolve, listener.protocol)
    in_kernel = _in_kernel(
        config, listener, ruleset, local_port, data, client, explanation.decision
    )
    return Judged(listener, size, count, explanation, verdict, in_kernel)


def _in_kernel(
    config: Config,
    listener: Listener,
    ruleset: routing.Ruleset,
    local_port: int,
    data: bytes,
    client: Address | None,
    decision: Decision,
) -> InKernel:
    binds = listener.addresses
    # The kernel chooses for port 0.
    local = next(
        (b for b in binds if isinstance(b, Address) and b.port in (local_port, 0)),
        None,
    )
    if local is not None:
        local = local._replace(port=local_port)
    own = _own_listeners(config)
    compiled = compile_table(
        config,
        listener,
        ruleset,
        local,
        is_own=lambda server: own.includes(server, is_local=lambda _: False),
    )
    asked = tuple(
        (rule.datapath or listener.datapath or config.datapath) == "express"
        for rule in ruleset.rules
    )
    chosen = None
    if compiled.table is not None:
        chosen = compiled.table.decide(data, parse_ip(client.host) if client else None)
    if chosen is not None:
        taken = ruleset.rules[chosen]
        return InKernel(taken.name, "", compiled.reasons, asked[chosen], asked)
    rule = decision.rule if isinstance(decision, routing.Route | routing.Refuse) else None
    why = compiled.reasons[rule.index] if rule is not None else ""
    why = why or "the first packet alone does not make it certain"
    return InKernel(None, why, compiled.reasons, asked=asked)


def _own_listeners(config: Config) -> OwnListeners:
    return OwnListeners(
        bind
        for listener in config.listeners
        for bind in listener.addresses
        if isinstance(bind, Address | UnixAddress)
    )


def _verdict(
    config: Config, decision: Decision, local_port: int, resolve: Resolve, protocol: str
) -> Verdict:
    if isinstance(decision, routing.Route):
        to = decision.to
        if isinstance(to, SamePort):
            to = to.at(local_port)
            decision = decision._replace(to=to)
        allowed, why = _permission(config, decision, resolve)
        return Verdict("route", decision.rule.name, str(to), decision.skip, allowed, why)
    if isinstance(decision, routing.Refuse):
        how = "a reset" if decision.reset else "a close"
        if protocol == "udp":
            how = "no session"
        cause = f" ({decision.cause})" if decision.cause else ""
        answer = f"{decision.reply.decode('ascii', 'backslashreplace')!r} and " * bool(
            decision.reply
        )
        name = decision.rule.name if decision.rule else "-"
        return Verdict(
            "refuse", name, "-", 0, None, f"{decision.reason.value}{cause}: {answer}{how}"
        )
    return Verdict("need-more", "-", "-", 0, None, "more bytes have to come first")


def _permission(config: Config, route: Route, resolve: Resolve) -> tuple[bool | None, str]:
    """Whether the connection may be made, judged as `up` would."""
    destination = route.to
    if isinstance(destination, str):
        servers = ", ".join(str(s.address) for s in config.upstreams[destination].servers)
        return True, f"upstream {destination}: {servers}"
    if isinstance(destination, UnixAddress | SamePort):
        return True, "the rule says so"
    allow = route.rule.allow
    is_name = not isinstance(destination, Address)
    if is_name and allow is not None and not allow.permits_port(destination.port):
        # Then no worker resolves the name either.
        return False, f"{destination}: allow does not list port {destination.port}"
    addresses = [destination] if isinstance(destination, Address) else resolve(destination)
    if addresses is None:
        return None, f"{destination}: no name is resolved here, and its addresses must be allowed"
    if not addresses:
        return None, f"{destination}: the name has no address here"
    own = _own_listeners(config)
    page = OwnListeners([config.status.bind] if config.status and allow is not None else [])
    for address in addresses:
        if own.includes(address, is_local=lambda _: False) or page.includes(
            address, is_local=lambda _: False
        ):
            return False, f"{address} is the forwarder itself"
        if allow is not None:
            refusal = allow.refusal(address.host, address.port)
            if refusal is not None:
                return False, f"{address}: {refusal}"
    by = "its `allow` has it" if allow is not None else "the rule says so"
    names = "" if isinstance(destination, Address) else f"{', '.join(map(str, addresses))}: "
    return True, f"{names}{by}"

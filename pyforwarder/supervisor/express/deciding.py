"""Which listeners the kernel decides by itself (`datapath: express`), and where they lead.

Looked at whenever something is put in force, and when a server goes down, comes up, is drained, is
ejected or has rested (`balancing.py`). What is not certain is left to workers. Where the kernel
refuses to learn of what is in force, it decides nothing at all: never by what was in force before.
"""

from __future__ import annotations

import ipaddress
import math
import os
import pwd
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address, SamePort, UnixAddress
from pyforwarder.core.express.choosing import sources_for
from pyforwarder.core.express.compiling import compile_table
from pyforwarder.core.policy import OwnListeners
from pyforwarder.core.rule_compiling import compile_rules
from pyforwarder.datapath.express.connection_maps import MOST_LISTENERS
from pyforwarder.datapath.express.sharing import Decided, Label
from pyforwarder.datapath.splice.interfaces import LOOPBACK, mtu_of
from pyforwarder.runtime.interface_addresses import interface_addresses
from pyforwarder.runtime.own_addresses import this_host_has
from pyforwarder.supervisor.express.balancing import KernelBalancers
from pyforwarder.supervisor.express.rule_deciders import RuleDecider, RuleDeciders
from pyforwarder.supervisor.listeners.binding import TCP4_HEADERS_BYTES, TCP6_HEADERS_BYTES
from pyforwarder.worker.generation import is_local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pyforwarder.config import Config, Listener, Upstream
    from pyforwarder.config.listener import Rule as RuleConfig
    from pyforwarder.core.express.choosing import Choice, Target
    from pyforwarder.core.express.compiling import Compiled
    from pyforwarder.core.routing import Rule, Ruleset
    from pyforwarder.datapath.express.choice_abi import Outcome
    from pyforwarder.datapath.express.sharing import Express
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.express.rule_deciders import RuleName
    from pyforwarder.supervisor.processes.health_checker import HealthResult
    from pyforwarder.worker.log import Log
    from pyforwarder.worker.settings import Settings

# How often this host's addresses are read again, for listeners on all addresses, and for `source`
# of upstreams.
_ADDRESSES_S: Final = 2.0
# Servers often go down or come up several at once: the first is put in force at once, and all that
# come within so long of it together.
_NEWS_S: Final = 0.02
# Where there was no room it is tried again when a number has rested, but not more often.
_ROOM_S: Final = 0.1
_LOOK_S: Final = 0.01
# What became of connections to servers of upstreams is asked so often.
_OUTCOMES_S: Final = 0.5
# The kernel repeats a handshake's second packet after so long, and a silent client's connection is
# the listener's then.
SILENT_S: Final = 1.2
_MOST_BYTES: Final = 0xFFFF  # of a packet of IP, as far as its length can say
_NO_ROOM: Final = f"the kernel has room for {MOST_LISTENERS} addresses of listeners"
# Levels at which connections that have ended have lines.
_TELLING: Final = ("debug", "info")
_RESTING: Final = "its server gets no new pairs just now"
_NOT_ASKED: Final = "the configuration does not say `datapath: express`"


class _Compiler:
    """The tables of one configuration: a listener's rules once, and a table for each port."""

    def __init__(self, settings: Settings, config: Config, own: OwnListeners) -> None:
        self._settings, self._config = settings, config
        self._is_own = partial(own.includes, is_local=is_local)
        self._rulesets: dict[str, Ruleset] = {}
        self._tables: dict[tuple[str, int, bool], Compiled] = {}

    def rules(self, listener: Listener) -> Ruleset:
        """Return the compiled rules of a listener."""
        found = self._rulesets.get(listener.name)
        if found is None:
            found = self._rulesets[listener.name] = compile_rules(
                listener, None, passwords=self._settings.passwords
            )
        return found

    def table(self, listener: Listener, bind: Address) -> Compiled:
        """Return the table for connections to this address. Addresses of one port and IP version
        share it.
        """
        key = listener.name, bind.port, bind.is_ipv6
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = compile_table(
                self._config, listener, self.rules(listener), bind, is_own=self._is_own
            )
        return found


class _Sources:
    """Which addresses that upstreams name as their `source` this host has; each is asked once."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    @property
    def is_any(self) -> bool:
        """Whether a rule's upstream has a source."""
        return bool(self._known)

    def has(self, source: str) -> bool:
        """Whether the kernel may connect from there; an empty source is the route's."""
        if source and source not in self._known:
            self._known[source] = this_host_has(ipaddress.ip_address(source))
        return not source or self._known[source]


class Decisions:
    """Keeps the kernel's tables as the configuration in force wants them."""

    def __init__(
        self,
        in_force: ConfigInForce,
        datapaths: Datapaths,
        *,
        loop: Loop,
        user: str | None,
        down: Callable[[], Iterable[HealthResult]],
        log: Log,
        failed: Callable[[str, str, int], object] = lambda _upstream, _server, _times: None,
    ) -> None:
        """`down` are the servers that get no new pairs just now; see `refresh`.

        `failed` is called with how often the kernel could not connect to a server of an upstream.
        """
        self._log = log
        self._in_force = in_force
        self._datapaths = datapaths
        self._loop = loop
        self._owner = pwd.getpwnam(user).pw_uid if user is not None else os.geteuid()
        self._down = down
        # Rules of listeners that ask for express; for all others userspace decides.
        self.rules: Mapping[RuleName, RuleDecider] = {}
        self._compiler: tuple[object, _Compiler] | None = None  # and what it was made of
        self._said = ""  # the last trouble that was logged
        self._balancers = KernelBalancers(self._outcome_of, failed)
        self._is_over = False
        self._timer = 0
        self._news = 0
        self._refreshed_s = -math.inf  # when it was put in force last (CLOCK_MONOTONIC)
        self._update_timer = 0
        self._until_s = math.inf  # when the next ejection ends

    def _express(self) -> Express | None:
        """What there is of it, if it works here."""
        splicing = self._datapaths.splicing
        if splicing is None or splicing.express is None or not splicing.express.has_begun:
            return None
        return splicing.express

    def refresh_soon(self) -> None:
        """Call `refresh`, but not more often than every `_NEWS_S`."""
        if self._news:
            return
        wait_s = self._refreshed_s + _NEWS_S - time.monotonic()
        if wait_s > 0.0:
            self._news = self._loop.after(wait_s, self.refresh)
        else:
            self.refresh()

    def refresh(self) -> None:
        """Put in force what is to be, as far as it has changed.

        Never raises: what does not go leaves all to workers, and is tried again.
        """
        self._loop.cancel(self._news)
        self._news = 0
        express = self._express()
        if self._is_over:
            return
        if express is None:
            self.rules = self._without_express()
            return
        self._loop.cancel(self._timer)
        self._timer = 0
        try:
            depends_on_addresses, trouble = self._put(express)
        except Exception as error:
            depends_on_addresses, trouble = True, _said_of(error)
            self.rules = self._all_for(trouble)
            try:
                express.put(())
            except Exception as again:
                trouble += f"; old rules are still in force: {_said_of(again)}"
        if trouble and trouble != self._said:
            self._log.write("warning", "express_left", reason=trouble)
        self._said = trouble
        wait_s = max(express.has_room_at_s - time.monotonic(), _ROOM_S)
        if depends_on_addresses:
            wait_s = min(wait_s, _ADDRESSES_S)
        if wait_s < math.inf:
            self._timer = self._loop.after(wait_s, self.refresh)
        self._until_s = self._balancers.rests_until_s(self._loop.now_s)
        self._update_later()
        self._refreshed_s = time.monotonic()  # behind it: it may have taken long

    def _put(self, express: Express) -> tuple[bool, str]:
        """Whether it depends on this host's addresses, and for what there was no room.

        Raises:
            OSError: the addresses of this host are not known, or the kernel refuses.
        """
        config = self._in_force.config
        deciders = RuleDeciders()
        wanting = [listener for listener in config.listeners if _wants(listener, config)]
        here = _addresses_here() if wanting else {}
        compiler = self._compiler_for(here)
        self._balancers.update(self._loop.now_s)  # also of servers that are about to go
        self._balancers.configure(
            _upstreams_of(wanting, config),
            down={(one.upstream, one.server) for one in self._down()},
            drained=self._in_force.drained,
            now_s=self._loop.now_s,
        )
        found: list[Decided] = []
        reasons_of: list[dict[str, str]] = []
        sources = _Sources()
        is_anywhere, trouble, count = False, "", 0
        for listener in wanting:
            for each in self._in_force.listeners.bound.get(listener.name, ()):
                if not isinstance(each.bind, Address):
                    deciders.add_all(listener, "connections to a unix socket have no packets")
                    continue
                is_anywhere |= ipaddress.ip_address(each.bind.host).is_unspecified
                addresses = self._addresses_and_mss(listener, each.bind, here)
                if not addresses:
                    deciders.add_all(listener, "the kernel decides at no address of its own here")
                    continue
                if count + len(addresses) > MOST_LISTENERS:
                    # Nothing is compiled for them: there may be tens of thousands.
                    deciders.add_all(listener, _NO_ROOM)
                    trouble = f"{_NO_ROOM}: those of {listener.name} are not all among them"
                    break
                decided, reasons = self._decided(
                    config, listener, each.bind, compiler, addresses, sources
                )
                if decided is None:
                    deciders.add(listener.name, reasons)
                    continue
                count += len(addresses)
                found.append(decided)
                reasons_of.append(reasons)
        left_out = express.put(found, self._balancers.targets)
        for decided, reasons, left in zip(found, reasons_of, left_out, strict=True):
            name = decided.label.listener
            for index, why_not in left.items():
                rule = decided.label.rules[index]
                reasons[rule] = reasons[rule] or why_not
                what = name if len(left) == len(decided.servers) else f"{rule} of {name}"
                trouble = f"{why_not}: {what} is left to workers"
            deciders.add(name, reasons)
        self.rules = deciders.of
        return is_anywhere or sources.is_any, trouble

    def _compiler_for(self, here: Mapping[str, int]) -> _Compiler:
        """Return the compiler that there was, unless something has changed that tables are made
        of.
        """
        config, settings = self._in_force.config, self._in_force.settings
        binds = tuple(
            each.bind
            for each in self._in_force.listeners.sockets()
            if each.protocol == "tcp" and isinstance(each.bind, Address | UnixAddress)
        )
        made_of = (id(config), id(settings), binds, tuple(sorted(here.items())))
        if self._compiler is None or self._compiler[0] != made_of:
            compiler = _Compiler(settings, config, OwnListeners(binds))
            self._compiler = made_of, compiler
        return self._compiler[1]

    def _without_express(self) -> Mapping[RuleName, RuleDecider]:
        """Return what is shown of rules where express does not work, or not yet."""
        state = self._datapaths.states.get("express")
        return self._all_for(state or "express has to be there from the start of the daemon")

    def _all_for(self, why: str) -> Mapping[RuleName, RuleDecider]:
        """All rules are userspace's, those that ask for express for this reason."""
        config = self._in_force.config
        return {
            (listener.name, rule.name): RuleDecider(
                is_in_kernel=False, why_not=why if _asks(rule, listener, config) else _NOT_ASKED
            )
            for listener in config.listeners
            if _wants(listener, config)
            for rule in listener.rules
        }

    def _decided(
        self,
        config: Config,
        listener: Listener,
        bind: Address,
        compiler: _Compiler,
        addresses: Mapping[Address, int],
        own: _Sources,
    ) -> tuple[Decided | None, dict[str, str]]:
        """What the kernel decides at one address; for each rule why userspace does, or nothing."""
        ruleset = compiler.rules(listener)
        compiled = compiler.table(listener, bind)
        reasons = dict(zip((rule.name for rule in ruleset.rules), compiled.reasons, strict=True))
        wanted = []
        for rule in ruleset.rules:
            if reasons[rule.name]:
                continue
            if _asks(rule, listener, config):
                wanted.append(rule)
            else:
                reasons[rule.name] = _NOT_ASKED
        if compiled.table is None or not wanted:
            return None, reasons
        table = replace(compiled.table, targets=frozenset(rule.index for rule in wanted))
        label = Label(
            listener.name,
            tuple(rule.name for rule in ruleset.rules),
            tuple(config.keepalive.terms),
            tuple(rule.index for rule in wanted if ruleset.has_facts(rule))
            if config.log.level in _TELLING
            else (),
            config.log.level in _TELLING,
        )
        servers: dict[int, Choice | Address | None] = {}
        for rule in wanted:
            source = _source_of(config, rule, bind)
            servers[rule.index] = self._leads_to(rule, bind.port, source)
            if not own.has(source):
                # The outcomes of its servers are still read.
                servers[rule.index] = None
                reasons[rule.name] = f"{source}, its upstream's `source`, is not this host's now"
            elif servers[rule.index] is None:
                reasons[rule.name] = _RESTING
        timeouts_s = {rule.index: _connect_timeout_s(config, rule) for rule in wanted}
        return Decided(label, table, servers, addresses, self._owner, timeouts_s), reasons

    def _leads_to(self, rule: Rule, port: int, source: str) -> Choice | Address | None:
        """Where a rule leads; None: it gets no new pairs just now, or userspace chooses."""
        to = rule.to
        if isinstance(to, str):
            return self._balancers.leads_to(to, port, self._loop.now_s, source)
        if isinstance(to, SamePort):
            to = to.at(port)
        return to if isinstance(to, Address) else None

    def _outcome_of(self, target: Target) -> Outcome:
        express = self._express()
        assert express is not None  # nobody asks before
        return express.outcome(target)

    def _update_balancers(self) -> None:
        """Learn what became of connections, and choose others if that ejects servers."""
        if self._express() is None or self._is_over:
            return
        now_s = self._loop.now_s
        if self._balancers.update(now_s) or now_s >= self._until_s:
            self.refresh()
        else:
            self._update_later()

    def _update_later(self) -> None:
        self._loop.cancel(self._update_timer)
        self._update_timer = 0
        # An ejection ends also where a reload has switched ejections off.
        wait_s = max(self._until_s - self._loop.now_s, _LOOK_S)
        if self._balancers.is_leading:
            wait_s = min(wait_s, _OUTCOMES_S)
        if wait_s < math.inf:
            self._update_timer = self._loop.after(wait_s, self._update_balancers)

    def report(self) -> Mapping[str, Mapping[str, Mapping[str, object]]]:
        """What the kernel's balancers know of servers, as workers say it of theirs."""
        return {} if self._express() is None else self._balancers.report(self._loop.now_s)

    def _addresses_and_mss(
        self, listener: Listener, bind: Address, here: Mapping[str, int]
    ) -> dict[Address, int]:
        """The addresses behind one that is bound, and what clients there are told of MSS."""
        headers = TCP6_HEADERS_BYTES if bind.is_ipv6 else TCP4_HEADERS_BYTES
        limit = self._in_force.settings.mtus.get(listener.name) or mtu_of(LOOPBACK)
        mss = min(limit, _MOST_BYTES) - headers
        if "%" in bind.host:
            return {}
        if not ipaddress.ip_address(bind.host).is_unspecified:
            return {bind: mss}
        version = 6 if bind.is_ipv6 else 4
        return {Address(host, bind.port): mss for host, known in here.items() if known == version}

    def stop(self, wait_s: float = 0.0) -> bool:
        """Let the kernel decide nothing any more, and give its connections to workers; returns
        whether it decided anything.

        Workers are told of these connections within `wait_s`, unless the keeper hangs.
        """
        express = self._express()
        if express is None or self._is_over:
            return False
        self._is_over = True
        self.rules = {}
        self._loop.cancel(self._timer)
        self._loop.cancel(self._news)
        self._loop.cancel(self._update_timer)
        was_listening = express.is_listening
        express.stop()
        until_s = time.monotonic() + wait_s
        while not express.has_stopped and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        return was_listening

    @property
    def has_stopped(self) -> bool:
        """Whether workers have been told, after `stop`, of all connections that have begun."""
        express = self._express()
        return express is None or express.has_stopped


def _said_of(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the kernel refuses: {error.strerror}"
    return f"a fault of ours: {error!r}"


def _upstreams_of(listeners: Iterable[Listener], config: Config) -> dict[str, Upstream]:
    """Return the upstreams to which rules of the listeners lead, by name."""
    return {
        rule.to: config.upstreams[rule.to]
        for listener in listeners
        for rule in listener.rules
        if isinstance(rule.to, str) and rule.to in config.upstreams
    }


def _source_of(config: Config, rule: Rule, bind: Address) -> str:
    """Return the address that a rule's upstream names for connections; empty: none.

    A rule whose upstream names several is userspace's.
    """
    if not isinstance(rule.to, str):
        return ""
    sources = sources_for(config.upstreams[rule.to].source, is_ipv6=bind.is_ipv6)
    return sources[0] if sources else ""


def _connect_timeout_s(config: Config, rule: Rule) -> float:
    upstream = config.upstreams[rule.to] if isinstance(rule.to, str) else None
    given_s = upstream.connect_timeout_s if upstream is not None else None
    return config.timeouts.connect_s if given_s is None else given_s


def _wants(listener: Listener, config: Config) -> bool:
    return listener.protocol == "tcp" and any(
        _asks(rule, listener, config) for rule in listener.rules
    )


def _asks(rule: Rule | RuleConfig, listener: Listener, config: Config) -> bool:
    return (rule.datapath or listener.datapath or config.datapath) == "express"


def _addresses_here() -> dict[str, int]:
    """Return the addresses of this host with their IP version; leaves out link-local IPv6."""
    return {
        str(one.address): one.address.version
        for one in interface_addresses()
        if not one.address.is_link_local or one.address.version == 4
    }

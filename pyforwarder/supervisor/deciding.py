"""Which listeners the kernel decides by itself (`datapath: express`), and where they lead.

Looked at whenever something is put in force, and when a server goes down, comes up or is drained.
What is not certain is left to workers.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import psutil

from pyforwarder.core.address import Address, SamePort, UnixAddress
from pyforwarder.core.express.compiling import compile_table
from pyforwarder.core.policy import OwnListeners
from pyforwarder.core.routing import compile_rules
from pyforwarder.datapath.express.sharing import Decided, Label
from pyforwarder.datapath.splice.maps import LOOPBACK, mtu_of
from pyforwarder.supervisor.listeners import TCP4_HEADERS_BYTES, TCP6_HEADERS_BYTES
from pyforwarder.worker.generation import is_local

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from pyforwarder.config import Config, Listener
    from pyforwarder.core.routing import Rule
    from pyforwarder.datapath.express.sharing import Express
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.configuration import ConfigInForce
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.health import Verdict

# Of a listener on all addresses: those of this host, asked again so often.
_ADDRESSES_S: Final = 2.0
_LOOK_S: Final = 0.01
# The kernel repeats a handshake's second packet after so long, and a silent client's connection is
# the listener's then.
SILENT_S: Final = 1.2
_MOST_BYTES: Final = 0xFFFF  # of a packet of IP, as far as its length can say


class Decisions:
    """Keeps the kernel's tables as the configuration in force wants them."""

    def __init__(
        self,
        in_force: ConfigInForce,
        datapaths: Datapaths,
        *,
        loop: Loop,
        user: str | None,
        down: Callable[[], Iterable[Verdict]],
    ) -> None:
        """`down` are the servers that get no new pairs just now; see `refresh`."""
        self._in_force = in_force
        self._datapaths = datapaths
        self._loop = loop
        self._owner = pwd.getpwnam(user).pw_uid if user is not None else os.geteuid()
        self._down = down
        self.rules: set[tuple[str, str]] = set()  # of listeners: the kernel decides by them
        self._is_over = False
        self._timer = 0

    def _express(self) -> Express | None:
        """What there is of it, if it works here."""
        splicing = self._datapaths.splicing
        if splicing is None or splicing.express is None or not splicing.express.has_begun:
            return None
        return splicing.express

    def refresh(self) -> None:
        """Put in force what is to be, as far as it has changed."""
        express = self._express()
        if express is None or self._is_over:
            return
        here = _addresses_here()
        resting = {(one.upstream, one.server) for one in self._down()} | self._in_force.drained
        found, is_anywhere = [], False
        config = self._in_force.config
        own = OwnListeners(
            each.bind
            for each in self._in_force.listeners.sockets()
            if each.protocol == "tcp" and isinstance(each.bind, Address | UnixAddress)
        )
        for listener in config.listeners:
            if not _wants(listener, config):
                continue
            for each in self._in_force.listeners.bound.get(listener.name, ()):
                if isinstance(each.bind, Address):
                    is_anywhere |= ipaddress.ip_address(each.bind.host).is_unspecified
                    decided = self._decided(config, listener, each.bind, own, here, resting)
                    if decided is not None:
                        found.append(decided)
        express.put(found)
        self.rules = {
            (one.label.listener, one.label.rules[rule]) for one in found for rule in one.servers
        }
        self._loop.cancel(self._timer)
        self._timer = self._loop.after(_ADDRESSES_S, self.refresh) if is_anywhere else 0

    def _decided(
        self,
        config: Config,
        listener: Listener,
        bind: Address,
        own: OwnListeners,
        here: Mapping[str, int],
        resting: Collection[tuple[str, str]],
    ) -> Decided | None:
        ruleset = compile_rules(listener, None, passwords=self._in_force.settings.passwords)
        compiled = compile_table(
            config,
            listener,
            ruleset,
            bind,
            is_own=lambda server: own.includes(server, is_local=is_local),
        )
        if compiled.table is None:
            return None
        wanted = [
            rule
            for rule in ruleset.rules
            if rule.index in compiled.table.targets
            and (rule.datapath or listener.datapath or config.datapath) == "express"
        ]
        if not wanted:
            return None
        table = replace(compiled.table, targets=frozenset(rule.index for rule in wanted))
        addresses = self._told(listener, bind, here)
        label = Label(
            listener.name,
            tuple(rule.name for rule in ruleset.rules),
            tuple(config.keepalive.terms),
        )
        servers = {rule.index: _server_of(config, rule, bind.port, resting) for rule in wanted}
        return Decided(label, table, servers, addresses, self._owner)

    def _told(
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
        """Nothing begins any more, and what goes on is the workers'; whether anything did begin.

        Within `wait_s` they are told of it, unless the keeper hangs.
        """
        express = self._express()
        if express is None or self._is_over:
            return False
        self._is_over = True
        self.rules = set()
        self._loop.cancel(self._timer)
        was_listening = express.is_listening
        express.stop()
        until_s = time.monotonic() + wait_s
        while not express.has_stopped and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        return was_listening


def _server_of(
    config: Config, rule: Rule, port: int, resting: Collection[tuple[str, str]]
) -> Address | None:
    """Where a rule leads; None: it gets no new pairs just now."""
    to = rule.to
    if isinstance(to, str):
        (server,) = config.upstreams[to].servers
        if (to, str(server.address)) in resting:
            return None
        to = server.address
    if isinstance(to, SamePort):
        to = to.at(port)
    return to if isinstance(to, Address) else None


def _wants(listener: Listener, config: Config) -> bool:
    return listener.protocol == "tcp" and any(
        (rule.datapath or listener.datapath or config.datapath) == "express"
        for rule in listener.rules
    )


def _addresses_here() -> dict[str, int]:
    """Of this host, with their version; none that means something on one interface only."""
    found: dict[str, int] = {}
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            try:
                ip = ipaddress.ip_address(one.address)
            except ValueError:
                continue  # of an interface's hardware, or with a scope
            if not ip.is_link_local or ip.version == 4:
                found[one.address] = ip.version
    return found

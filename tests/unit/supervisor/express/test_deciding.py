"""Which listeners the kernel is told of, and what is said of the rules that it has not."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from pyforwarder.config import parse_config
from pyforwarder.core.address import Address
from pyforwarder.core.express.choosing import Choice, InTurn, Target, targets_of
from pyforwarder.core.rule_compiling import compile_rules
from pyforwarder.datapath.express import connect_abi as abi
from pyforwarder.datapath.express import numbering
from pyforwarder.datapath.express.choice_abi import CHOICE, Outcome
from pyforwarder.datapath.express.connection_maps import MOST_LISTENERS
from pyforwarder.datapath.express.numbering import Server
from pyforwarder.datapath.express.sharing import Express
from pyforwarder.supervisor.express import deciding
from pyforwarder.supervisor.express.deciding import Decisions
from tests.helpers.generations import settings_of

if TYPE_CHECKING:
    from pyforwarder.config import Config, Listener
    from pyforwarder.core.express.table import Table
    from pyforwarder.core.routing import Ruleset
    from pyforwarder.datapath.express.connection_maps import ConnectionMaps
    from pyforwarder.runtime.loop import Loop
    from pyforwarder.supervisor.configuration.in_force import ConfigInForce
    from pyforwarder.supervisor.datapaths import Datapaths
    from pyforwarder.supervisor.processes.health_checker import HealthResult
    from pyforwarder.worker.log import Log
    from pyforwarder.worker.settings import Settings

CONFIG: Final = """
datapath: express
listeners:
  - name: main
    bind: ["127.0.0.1:7000"]
    rules:
      - {name: sni, match: {tls: {sni: a.example.com}}, to: "127.0.0.1:1"}
      - {name: six, match: ssh, to: "[::1]:1"}
      - {name: copied, match: http, to: "127.0.0.1:1", datapath: copy}
      - {name: auto, match: {bytes: {prefix: x}}, to: "127.0.0.1:1", datapath: auto}
      - {name: served, match: silence, to: web}
      - {name: path, match: {http: {path: "/x"}}, to: "127.0.0.1:1"}
      - {name: rest, match: any, to: "127.0.0.1:1"}
  - name: other
    datapath: auto
    bind: 127.0.0.1:7001
    rules: [{name: all, match: any, to: "127.0.0.1:1"}]
upstreams: {web: {servers: ["127.0.0.1:2"]}}
"""


class FakeTables:
    """Remembers what is written."""

    def __init__(self) -> None:
        self.written: dict[int, Table] = {}

    def write(self, number: int, table: Table) -> None:
        self.written[number] = table

    def forget(self, number: int) -> None:
        self.written.pop(number, None)


class FakeChoices:
    """The kernel's choices among servers, which are numbered."""

    def __init__(self) -> None:
        self.used: list[Choice] = []
        self.outcomes: dict[int, Outcome] = {}
        self.room = 1 << 32
        self.rests_s = math.inf  # until then, from now

    def rests_until_s(self, now_s: float) -> float:
        return now_s + self.rests_s

    def number_of(
        self, choice: Choice, target_of: Callable[[Target], int], _now_s: float
    ) -> int | None:
        for target in targets_of(choice):
            target_of(target)
        if choice not in self.used:
            if len(self.used) == self.room:
                return None
            self.used.append(choice)
        return CHOICE | self.used.index(choice)

    def keep(self, choices: Collection[Choice], _now_s: float) -> None:
        self.kept = list(choices)

    def outcome(self, target: int) -> Outcome:
        return self.outcomes.setdefault(target, Outcome())


class FakeConnecting:
    """The kernel's listeners."""

    places = 64

    def __init__(self) -> None:
        self.tables = FakeTables()
        self.choices = FakeChoices()
        self.listeners: dict[bytes, bytes] = {}
        self.takes = 1 << 32  # so many more, then it refuses

    def add_listener(self, key: abi.ListenerKey, listener: abi.Listener) -> None:
        if not self.takes:
            raise OSError(errno.ENOMEM, "no memory")
        self.takes -= 1
        self.listeners[bytes(key)] = bytes(listener)

    def remove_listener(self, key: abi.ListenerKey) -> None:
        self.listeners.pop(bytes(key), None)

    def close(self) -> None:
        pass

    def ports(self) -> list[int]:
        """Of which it decides the connections."""
        keys = map(abi.ListenerKey.from_buffer_copy, self.listeners)
        return sorted(socket.ntohs(key.port) for key in keys)


@dataclass
class Bound:
    bind: Address
    protocol: str = "tcp"


@dataclass
class Listeners:
    bound: dict[str, list[Bound]]

    def sockets(self) -> Iterator[Bound]:
        return (one for each in self.bound.values() for one in each)


@dataclass
class InForce:
    config: Config
    settings: Settings
    listeners: Listeners
    drained: set[tuple[str, str]] = field(default_factory=set)


@dataclass
class Clock:
    """A loop that only remembers what is due."""

    due: dict[int, Callable[[], object]] = field(default_factory=dict)
    waits_s: dict[int, float] = field(default_factory=dict)
    now_s: float = 0.0

    def after(self, delay_s: float, what: Callable[[], object]) -> int:
        number = max(self.due, default=0) + 1
        self.due[number], self.waits_s[number] = what, delay_s
        return number

    def cancel(self, number: int) -> None:
        self.due.pop(number, None)
        self.waits_s.pop(number, None)


@dataclass
class Lines:
    written: list[str] = field(default_factory=list)

    def write(self, level: str, event: str, **fields: object) -> None:
        self.written.append(f"{level} {event} {fields}")


@dataclass
class Splicing:
    express: Express | None


@dataclass
class Has:
    splicing: Splicing | None
    states: dict[str, str] = field(default_factory=dict)


class Site:
    """A supervisor's decisions."""

    def __init__(self, text: str) -> None:
        self.kernel = FakeConnecting()
        self.express = Express(cast("ConnectionMaps", self.kernel), workers=1)
        self.express.has_begun = True
        self.clock, self.log = Clock(), Lines()
        self.has = Has(Splicing(self.express))
        self.down: list[HealthResult] = []
        config = parse_config(text, source="x")
        self.in_force = InForce(config, settings_of(text), Listeners({}))
        self.put(text)
        self.decisions = Decisions(
            cast("ConfigInForce", self.in_force),
            cast("Datapaths", self.has),
            loop=cast("Loop", self.clock),
            user=None,
            down=lambda: self.down,
            log=cast("Log", self.log),
        )

    def put(self, text: str, binds: Sequence[Address] = ()) -> None:
        """In force, and its first listener at these addresses."""
        config = parse_config(text, source="x")
        bound = {
            one.name: [Bound(bind) for bind in one.addresses if isinstance(bind, Address)]
            for one in config.listeners
        }
        if binds:
            bound["main"] = [Bound(bind) for bind in binds]
        self.in_force.config, self.in_force.settings = config, settings_of(text)
        self.in_force.listeners = Listeners(bound)

    def said(self) -> dict[str, tuple[str, str]]:
        """Of the first listener's rules who decides, and why not the kernel."""
        rules = self.decisions.rules
        return {
            rule: (one.decided, one.why_not)
            for (name, rule), one in rules.items()
            if name == "main"
        }


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site(CONFIG)
    yield site
    site.express.close()


def test_of_every_rule_it_is_said_why_the_kernel_has_it_not(site: Site) -> None:
    site.decisions.refresh()
    assert site.said() == {
        "sni": ("kernel", ""),
        "six": ("user", "one connection is IPv4, the other IPv6"),
        "copied": ("user", "the configuration says `datapath: copy`"),
        "auto": ("user", "the configuration does not say `datapath: express`"),
        "served": ("kernel", ""),
        "path": ("user", "userspace alone compares `path` and `header`"),
        "rest": ("user", "userspace decides the rule path in front of it"),
    }
    assert ("other", "all") not in site.decisions.rules
    site.in_force.drained = {("web", "127.0.0.1:2")}
    site.decisions.refresh()
    assert site.said()["served"] == ("user", "its server gets no new pairs just now")
    assert not site.log.written


def test_at_some_addresses_only_is_said_so(site: Site) -> None:
    site.put(CONFIG, [Address("127.0.0.1", 7000), Address("::1", 7000)])
    site.decisions.refresh()
    other = "one connection is IPv4, the other IPv6"
    said = site.said()
    assert (said["sni"], said["six"]) == (("partly", other), ("partly", other))
    assert site.kernel.ports() == [7000, 7000]


def test_without_express_it_is_said_why(site: Site) -> None:
    site.has.splicing = None
    site.has.states = {"express": "it needs splice: no BTF"}
    site.decisions.refresh()
    assert site.said()["sni"] == ("user", "it needs splice: no BTF")
    site.has.states = {}
    site.decisions.refresh()
    assert site.said()["sni"] == ("user", "express has to be there from the start of the daemon")


def test_a_listener_of_many_ports_is_compiled_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not again while nothing changes."""
    compiled: list[str] = []

    def compile_one(listener: Listener, *args: Any, **kwargs: Any) -> Ruleset:
        compiled.append(listener.name)
        return compile_rules(listener, *args, **kwargs)

    monkeypatch.setattr(deciding, "compile_rules", compile_one)
    site.put(CONFIG, [Address("127.0.0.1", 7000 + n) for n in range(100)])
    for _ in range(3):
        site.decisions.refresh()
    assert len(compiled) == 1
    assert site.kernel.ports() == list(range(7000, 7100))
    site.put(CONFIG)
    site.decisions.refresh()
    assert len(compiled) == 2
    assert site.kernel.ports() == [7000]


def test_listeners_beyond_the_room_are_workers_and_that_is_said_once(site: Site) -> None:
    site.put(CONFIG, [Address("127.0.0.1", 7000 + n) for n in range(MOST_LISTENERS + 5000)])
    for _ in range(2):
        site.decisions.refresh()
    assert len(site.kernel.listeners) == MOST_LISTENERS
    assert site.said()["sni"] == ("partly", "the kernel has room for 256 addresses of listeners")
    assert len(site.log.written) == 1
    assert "room for 256 addresses of listeners: those of main" in site.log.written[0]


def test_what_the_kernel_refuses_ends_all_that_it_decides(site: Site) -> None:
    """It must not go on with rules that are no longer in force; and is asked again."""
    site.put(CONFIG, [Address("127.0.0.1", 7000), Address("127.0.0.1", 7002)])
    site.decisions.refresh()
    assert site.kernel.ports() == [7000, 7002]
    assert site.decisions.refresh not in site.clock.due.values()
    site.put(CONFIG.replace("a.example.com", "b.example.com"), [Address("127.0.0.1", 7000)] * 1)
    site.kernel.takes = 0
    site.decisions.refresh()
    assert site.kernel.ports() == []
    assert not site.express.is_listening
    assert site.said()["sni"] == ("user", "the kernel refuses: no memory")
    assert site.log.written == ["warning express_left {'reason': 'the kernel refuses: no memory'}"]
    site.kernel.takes = 10
    again = site.decisions.refresh
    assert again in site.clock.due.values()
    again()
    assert site.kernel.ports() == [7000]
    assert site.said()["sni"] == ("kernel", "")
    assert site.decisions.refresh not in site.clock.due.values()


def test_what_is_in_the_kernel_is_known_where_it_refuses_halfway(site: Site) -> None:
    site.put(CONFIG, [Address("127.0.0.1", 7000 + n) for n in range(4)])
    site.kernel.takes = 2
    site.decisions.refresh()
    assert site.kernel.ports() == []
    site.kernel.takes = 10
    site.decisions.refresh()
    assert site.kernel.ports() == [7000, 7001, 7002, 7003]


def test_addresses_that_cannot_be_asked_for_leave_nothing_old(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.decisions.refresh()

    def refuse() -> dict[str, int]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(deciding, "_addresses_here", refuse)
    site.decisions.refresh()
    assert site.kernel.ports() == []
    assert site.decisions.refresh in site.clock.due.values()


def test_a_fault_in_deciding_leaves_nothing_old_and_reaches_nobody_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again, and a reload goes on."""
    site.decisions.refresh()
    assert site.kernel.ports() == [7000]

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no turns")

    with monkeypatch.context() as patched:
        patched.setattr(site.decisions, "_leads_to", fail)
        site.decisions.refresh()
    reason = "a fault of ours: ValueError('no turns')"
    assert site.kernel.ports() == []
    assert site.said()["sni"] == ("user", reason)
    assert site.log.written == [f"warning express_left {{'reason': {reason!r}}}"]
    again = site.decisions.refresh
    assert again in site.clock.due.values()
    again()
    assert site.kernel.ports() == [7000]
    assert site.said()["sni"] == ("kernel", "")


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "no"), ValueError("no")])
def test_no_refusal_of_the_kernel_reaches_a_reload(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(site.express, "put", fail)
    site.decisions.refresh()
    (line,) = site.log.written
    assert "old rules are still in force" in line
    assert site.decisions.refresh in site.clock.due.values()


SEVERAL: Final = CONFIG.replace('["127.0.0.1:2"]', '["127.0.0.1:2", "127.0.0.1:3"]')


def test_servers_that_fail_are_chosen_no_more_until_they_have_rested(site: Site) -> None:
    site.put(SEVERAL)
    site.decisions.refresh()
    (both,) = site.kernel.choices.kept
    assert both.servers == (Address("127.0.0.1", 2), Address("127.0.0.1", 3))
    target = site.express.number_of(Server.of(Address("127.0.0.1", 3)))
    site.kernel.choices.outcomes[target] = Outcome(failed=3, in_a_row=3)
    site.decisions._update_balancers()
    assert site.kernel.choices.kept == []  # one alone is no choice
    assert site.said()["served"] == ("kernel", "")
    assert site.decisions.report()["web"]["127.0.0.1:3"]["state"] == "ejected"
    site.in_force.drained = {("web", "127.0.0.1:2")}
    site.decisions.refresh()
    assert site.said()["served"] == ("user", "its server gets no new pairs just now")
    site.in_force.drained = set()
    site.clock.now_s = 10.0
    site.decisions._update_balancers()
    assert site.kernel.choices.kept == [both]
    assert site.decisions._update_balancers in site.clock.due.values()
    site.decisions.stop()
    assert site.decisions._update_balancers not in site.clock.due.values()


def test_an_ejection_ends_also_where_a_reload_has_switched_ejections_off(site: Site) -> None:
    site.put(SEVERAL)
    site.decisions.refresh()
    (both,) = site.kernel.choices.kept
    target = site.express.number_of(Server.of(Address("127.0.0.1", 3)))
    site.kernel.choices.outcomes[target] = Outcome(failed=3, in_a_row=3)
    site.decisions._update_balancers()
    assert site.kernel.choices.kept == []
    site.put(SEVERAL.replace("]}}", "], eject: {failures: 0}}}"))
    site.decisions.refresh()
    assert site.kernel.choices.kept == []
    assert list(site.clock.due.values()) == [site.decisions._update_balancers]
    site.clock.now_s = 9.9
    site.decisions._update_balancers()  # what becomes of connections is counted all the same
    assert site.kernel.choices.kept == []
    assert list(site.clock.waits_s.values()) == [pytest.approx(0.1)]
    site.clock.now_s = 10.0
    site.decisions._update_balancers()
    assert site.kernel.choices.kept == [both]


def test_news_of_many_servers_are_put_in_force_once_and_soon(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def addresses() -> dict[str, int]:
        asked.append(1)
        return {}

    monkeypatch.setattr(deciding, "_addresses_here", addresses)
    assert deciding._NEWS_S <= 0.02
    monkeypatch.setattr(deciding, "_NEWS_S", 3600.0)  # however slow this host is
    site.decisions.refresh_soon()
    assert len(asked) == 1  # a server that is known to be down gets nothing any more
    for _ in range(100):
        site.decisions.refresh_soon()
    assert len(asked) == 1
    ((number, refresh),) = [
        one for one in site.clock.due.items() if one[1] == site.decisions.refresh
    ]
    assert site.clock.waits_s[number] <= 3600.0
    site.clock.cancel(number)
    refresh()
    assert len(asked) == 2
    site.decisions.refresh_soon()
    assert refresh in site.clock.due.values()
    site.decisions.refresh()  # a reload has it at once, and what waited is in force by that
    assert refresh not in site.clock.due.values()
    site.decisions.refresh_soon()
    site.decisions.stop()
    assert refresh not in site.clock.due.values()


def test_where_there_is_no_room_for_a_choice_it_is_said_and_tried_when_there_is(
    site: Site,
) -> None:
    site.put(SEVERAL)
    site.kernel.choices.room, site.kernel.choices.rests_s = 0, 3.0
    site.decisions.refresh()
    reason = "the kernel has no room for another choice of servers"
    said = site.said()
    assert (said["served"], said["sni"]) == (("user", reason), ("kernel", ""))
    assert site.log.written == [
        f"warning express_left {{'reason': '{reason}: served of main is left to workers'}}"
    ]
    assert site.kernel.choices.kept == []
    again = site.decisions.refresh
    ((number, _),) = [one for one in site.clock.due.items() if one[1] == again]
    assert 2.5 < site.clock.waits_s[number] <= 3.0
    site.kernel.choices.room = 1
    again()
    assert site.said()["served"] == ("kernel", "")
    assert again not in site.clock.due.values()


def test_where_there_is_no_number_for_a_server_it_is_said(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no choice is made that leads nowhere for some clients."""
    monkeypatch.setattr(numbering, "MOST_TARGETS", 3)  # 0 is none
    site.put(SEVERAL)
    site.decisions.refresh()
    said = site.said()
    assert said["sni"] == ("kernel", "")
    assert said["served"] == ("user", "the kernel has no number for another server")
    assert site.kernel.choices.used == []


def test_a_server_that_is_down_for_long_keeps_what_became_of_its_connections(site: Site) -> None:
    """With another number it would seem to have failed as often as the one that had it."""
    site.put(SEVERAL)
    site.decisions.refresh()
    three = Server.of(Address("127.0.0.1", 3))
    site.in_force.drained = {("web", "127.0.0.1:3")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(numbering, "_REST_S", 0.0)
        for _ in range(2):
            site.decisions.refresh()
        assert site.express.number_of(three)
        site.put(CONFIG)
        site.decisions.refresh()
        assert not site.express.number_of(three)
        assert site.express.given_back()


FROM: Final = CONFIG.replace(
    'upstreams: {web: {servers: ["127.0.0.1:2"]}}',
    'upstreams: {web: {servers: ["127.0.0.1:2"], source: [10.9.9.9, "fd09::9"]}}',
)


def test_a_source_that_is_not_this_hosts_is_left_to_workers_until_it_is(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    here: set[str] = set()
    asked: list[str] = []

    def has(ip: object) -> bool:
        asked.append(str(ip))
        return str(ip) in here

    monkeypatch.setattr(deciding, "this_host_has", has)
    site.put(FROM)
    site.decisions.refresh()
    why = "10.9.9.9, its upstream's `source`, is not this host's now"
    assert site.said()["served"] == ("user", why)
    assert site.said()["sni"] == ("kernel", "")
    assert asked == ["10.9.9.9"]  # that of IPv6 is no matter here
    assert site.kernel.choices.kept == []
    assert min(site.clock.waits_s.values()) <= deciding._ADDRESSES_S
    here.add("10.9.9.9")
    site.decisions.refresh()
    assert site.said()["served"] == ("kernel", "")
    assert site.kernel.choices.kept == [InTurn("web", (Address("127.0.0.1", 2),), "10.9.9.9")]
    assert site.decisions.refresh in site.clock.due.values()  # it may go again
    here.clear()
    site.decisions.refresh()
    assert site.said()["served"] == ("user", why)
    assert site.kernel.choices.kept == []


def test_another_source_of_the_same_servers_is_another_target(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deciding, "this_host_has", lambda _: True)
    site.put(FROM)
    site.decisions.refresh()
    server = Address("127.0.0.1", 2)
    first = site.express.number_of(Server.of(server, "10.9.9.9"))
    assert first
    assert site.express.number_of(Server.of(server)) == 0
    site.put(FROM.replace("10.9.9.9", "10.9.9.8"))
    site.decisions.refresh()
    second = site.express.number_of(Server.of(server, "10.9.9.8"))
    assert second not in (0, first)
    assert site.kernel.choices.kept == [InTurn("web", (server,), "10.9.9.8")]

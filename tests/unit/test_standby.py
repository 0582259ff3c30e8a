"""What the keeper believes of the process that tells it of other machines' pairs."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import mmap
import resource
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.ebpf.abi import PairRecord
from pyforwarder.datapath.express.connect_abi import NO_WORKER
from pyforwarder.datapath.splice import keeper as keeper_module
from pyforwarder.datapath.splice import standby as standby_module
from pyforwarder.datapath.splice.abi import HELD
from pyforwarder.datapath.splice.challenging import Challenges
from pyforwarder.datapath.splice.records import FLOW
from pyforwarder.datapath.splice.replicas import Interfaces, boot_unix_s, splice_of
from pyforwarder.datapath.splice.standby import Standby
from pyforwarder.datapath.splice.standby_requests import MOST_AT_ONCE, FaultyStandbyError
from pyforwarder.fleet.failover.record import Entry, tag_of
from pyforwarder.fleet.failover.stays import Connection, encode
from pyforwarder.runtime import moving_addresses
from tests.helpers.failover_records import a_pair

if TYPE_CHECKING:
    import socket

    from pyforwarder.datapath.splice.abi import ResetBy, Splice

PAIR: Final = a_pair()
ENTRY: Final = Entry(tag_of("other"), 1, PAIR.encode()).encode()
FIELDS: Final[dict[str, object]] = {"n": 1, "until": 1e12}


class Nobody:
    """A keeper that must not be asked for anything."""

    def allocate(self) -> int:
        raise AssertionError

    def take_in(self, index: int, said: bytes) -> int:
        raise AssertionError

    def owns(self, index: int) -> bool:
        raise AssertionError

    def release(self, index: int) -> None:
        raise AssertionError

    def give_way(self, index: int, since_s: float) -> bool:
        raise AssertionError

    def show(self, index: int, record: Splice) -> None:
        raise AssertionError

    def forget(self, index: int) -> None:
        raise AssertionError

    def end(self, index: int, why: ResetBy) -> None:
        raise AssertionError

    def remember_joined(self, index: int, sockets: Sequence[socket.socket]) -> None:
        raise AssertionError


class NoFlows:
    """A map without entries."""

    def lookup(self, key: bytes) -> bytes:
        raise FileNotFoundError


def standby() -> Standby:
    """Of a machine to which no address moves."""
    flows, nothing = cast("Any", NoFlows()), cast("Any", None)
    return Standby(Nobody(), mmap.mmap(-1, 4096), flows, nothing, nothing, addresses=(), most=10)


def ask(**request: object) -> dict[str, object]:
    return standby().answer(json.dumps({**FIELDS, **request}).encode())


def test_a_pair_of_other_addresses_is_refused() -> None:
    assert ask(do="hold", pairs=[[PAIR.key, ENTRY]])["refused"] == [PAIR.key]


def test_requests_are_answered_by_their_number() -> None:
    assert ask(do="look") == {"n": 1, "waiting": [], "taken": 0, "held": 0}
    assert ask(do="begin") == {"n": 1}
    assert ask(do="release", keys=[PAIR.key]) == {"n": 1}
    assert ask(do="let_go", pairs=[PAIR.encode()]) == {"n": 1}
    assert ask(do="stay", group=[f"{tag_of('other')}.7", "1 "]) == {"n": 1}
    assert ask(do="stay", group=[f"{tag_of('other')}.7", ""]) == {"n": 1}


def test_a_late_request_is_not_obeyed() -> None:
    assert ask(do="hold", pairs=[[PAIR.key, ENTRY]], until=0) == {"n": 1, "late": True}


@pytest.mark.parametrize(
    "request_",
    [
        {"do": "steal"},
        {"do": ["look"]},
        {"do": "look", "more": 1},
        {"do": "look", "n": -1},
        {"do": "look", "n": True},
        {"do": "look", "until": "1"},
        {"do": "look", "until": -1},
        {"do": "hold"},
        {"do": "hold", "pairs": {}},
        {"do": "hold", "pairs": [[PAIR.key]]},
        {"do": "hold", "pairs": [[PAIR.key, 1]]},
        {"do": "hold", "pairs": [["x", ENTRY]]},
        {"do": "hold", "pairs": [[PAIR.key, "1 2 3 4"]]},
        {"do": "hold", "pairs": [[PAIR.key, ENTRY]] * (MOST_AT_ONCE + 1)},
        {"do": "release", "keys": ["x"]},
        {"do": "release", "keys": [1]},
        {"do": "let_go", "pairs": ["x"]},
        {"do": "let_go", "pairs": [None]},
        {"do": "stay", "group": []},
        {"do": "stay", "group": ["x", "1 "]},
        {"do": "stay", "group": [f"{tag_of('other')}.7", None]},
        {"do": "stay", "group": [f"{tag_of('other')}.7", "2 "]},
        {"do": "stay", "group": [f"{tag_of('other')}.7", "1 AAAA"]},
    ],
)
def test_what_is_not_in_the_table_is_a_fault(request_: dict[str, object]) -> None:
    with pytest.raises(FaultyStandbyError):
        ask(**request_)


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["do", "n", "until", "pairs", "keys", "group"])
                | st.text(max_size=5),
                inner,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_request_raises_anything_else(data: bytes) -> None:
    with contextlib.suppress(FaultyStandbyError):
        standby().answer(data)
    with pytest.raises(FaultyStandbyError):
        standby().answer(b"[" * 5000)


class NoRoutes:
    """Nobody can be reached."""

    def interface(self, _: object) -> int:
        return 0


class Coming:
    """The keeper's part at a machine to which the pair's two addresses move, one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here: set[bytes] = set()
        self.announced: list[str] = []
        self.challenged: list[Connection] = []
        monkeypatch.setattr(standby_module, "Routes", NoRoutes)
        monkeypatch.setattr(standby_module, "_addresses_here", lambda: set(self.here))
        monkeypatch.setattr(moving_addresses, "announce", self.announced.extend)
        monkeypatch.setattr(Challenges, "begin", lambda _, some: self.challenged.extend(some))
        listener, source = PAIR.ends.listener, PAIR.ends.source
        self.ours = listener.ip, source.ip
        self.both = [
            Connection(listener, PAIR.ends.client, True),
            Connection(source, PAIR.ends.server, False),
        ]
        self.addresses = [str(ipaddress.ip_address(ip)) for ip in self.ours]
        nothing = cast("Any", None)
        self._standby = Standby(
            Nobody(),
            mmap.mmap(-1, 4096),
            cast("Any", NoFlows()),
            nothing,
            nothing,
            addresses=self.addresses,
            most=10,
        )

    def ask(self, **request: object) -> dict[str, object]:
        """What is answered; the addresses have been looked at afterwards."""
        answer = self._standby.answer(json.dumps({**FIELDS, **request}).encode())
        self._standby.routes_changed()
        self._standby.run_due()
        return answer


def test_ends_of_a_pair_that_could_not_be_held_are_reset_when_its_addresses_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = Coming(monkeypatch)
    assert world.ask(do="hold", pairs=[[PAIR.key, ENTRY]])["refused"] == [PAIR.key]
    assert (world.announced, world.challenged) == ([], [])
    world.here |= set(world.ours)
    world.ask(do="look")
    assert world.challenged == world.both
    assert sorted(world.announced) == sorted(world.addresses)
    world.ask(do="look")
    assert world.challenged == world.both  # not again


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", ["of a group", "not held"])
def test_ends_are_reset_as_their_addresses_come_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, kind: str, first: int
) -> None:
    world = Coming(monkeypatch)
    world.ask(do="look")  # none of them is here
    if kind == "of a group":
        world.ask(do="stay", group=[f"{tag_of('other')}.7", encode(world.both)])
    else:
        world.ask(do="hold", pairs=[[PAIR.key, ENTRY]])
    for count, number in enumerate((first, 1 - first), 1):
        world.here.add(world.ours[number])
        world.ask(do="look")
        assert len(world.challenged) == count
        assert world.challenged[-1] == world.both[number]
    world.ask(do="look")
    assert len(world.challenged) == 2  # none of them again


class Keeper(Nobody):
    """One that has records, and flows of some of them."""

    def __init__(self) -> None:
        self.flows: dict[bytes, int] = {}
        self.yields: set[int] = set()  # records that give way
        self.shown: list[int] = []
        self.forgotten: list[int] = []
        self.on_show: Callable[[Splice], object] = lambda _record: None

    def lookup(self, key: bytes) -> bytes:
        try:
            return FLOW.pack(self.flows[key], 0)
        except KeyError:
            raise FileNotFoundError from None

    def allocate(self) -> int:
        return 7

    def give_way(self, index: int, since_s: float) -> bool:
        assert 0 <= since_s + boot_unix_s() - PAIR.started_s < 2
        if index not in self.yields:
            return False
        self.flows = {key: one for key, one in self.flows.items() if one != index}
        return True

    def show(self, index: int, record: Splice) -> None:
        self.on_show(record)
        for direction in record.direction:
            if bytes(direction.from_) in self.flows:
                raise FileExistsError
            self.flows[bytes(direction.from_)] = index
        self.shown.append(index)

    def forget(self, index: int) -> None:
        self.flows = {key: one for key, one in self.flows.items() if one != index}
        self.forgotten.append(index)


class Holding:
    """A machine whose peers can be reached, and which does not have the pair's addresses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keeper = Keeper()
        self.here: set[bytes] = set()
        self.sockets: list[SimpleNamespace] = []
        routes = SimpleNamespace(interface=lambda _route: 5)
        monkeypatch.setattr(standby_module, "Routes", lambda: routes)
        monkeypatch.setattr(standby_module, "_addresses_here", lambda: set(self.here))
        monkeypatch.setattr(standby_module, "_mute_socket", self._mute_socket)
        self.own = PAIR.ends.listener.ip, PAIR.ends.source.ip
        self.standby = Standby(
            self.keeper,
            mmap.mmap(-1, 1 << 16),
            cast("Any", self.keeper),
            cast("Any", SimpleNamespace(add=lambda _interface: True)),
            cast("Any", None),
            addresses=[str(ipaddress.ip_address(ip)) for ip in self.own],
            most=10,
        )
        record = splice_of(PAIR, 1, Interfaces(5, 5), claim=0, slack=0)
        self.keys = [bytes(direction.from_) for direction in record.direction]

    def _mute_socket(self, *_: object) -> SimpleNamespace:
        self.sockets.append(SimpleNamespace(is_open=True))
        sock = self.sockets[-1]
        sock.close = lambda: setattr(sock, "is_open", False)
        return sock

    def hold(self) -> bool:
        """Whether the pair is held."""
        request = {**FIELDS, "do": "hold", "pairs": [[PAIR.key, ENTRY]]}
        return self.standby.answer(json.dumps(request).encode())["refused"] == []


@pytest.mark.parametrize("side", [0, 1])
def test_what_a_machine_had_at_the_ports_of_a_pair_gives_way_once_the_address_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    """Ports of express are few, and the same on both machines."""
    world = Holding(monkeypatch)
    world.keeper.flows[world.keys[side]] = 3
    assert not world.hold()  # a worker, or nobody, has it still
    world.keeper.yields.add(3)
    world.here.add(world.own[side])
    world.standby.routes_changed()
    assert not world.hold()  # with the address it is this machine's to use
    assert world.keeper.flows == {world.keys[side]: 3}
    world.here = {world.own[1 - side]}
    world.standby.routes_changed()
    assert world.hold()
    assert world.keeper.flows == dict.fromkeys(world.keys, 7)


def test_a_connection_that_begins_while_a_pair_is_taken_in_keeps_its_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = Holding(monkeypatch)
    world.keeper.on_show = lambda _: world.keeper.flows.update({world.keys[1]: 3})
    assert not world.hold()
    assert world.keeper.flows == {world.keys[1]: 3}
    assert world.keeper.forgotten == [7]
    assert [sock.is_open for sock in world.sockets] == [False, False]


@pytest.mark.parametrize("left", [[0], [1], [0, 1]])
def test_a_pair_that_has_moved_is_released_once_no_address_of_it_is_here(
    monkeypatch: pytest.MonkeyPatch, left: list[int]
) -> None:
    """Before that our kernel would reset it for a packet that still comes here."""
    world = Holding(monkeypatch)
    released: list[int] = []
    monkeypatch.setattr(world.keeper, "owns", lambda index: index == 7)
    monkeypatch.setattr(world.keeper, "release", released.append)
    assert world.hold()  # as a record has the pair; and a worker
    request = json.dumps({**FIELDS, "do": "let_go", "pairs": [PAIR.encode()]}).encode()
    world.here = {world.own[side] for side in left}
    world.standby.routes_changed()
    for _ in range(2):
        world.standby.answer(request)
    assert released == []
    world.here.clear()
    world.standby.routes_changed()
    world.standby.answer(request)
    assert released == [7]


def test_ports_of_express_leave_descriptors_for_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))

    def most(ports: int) -> int:
        nothing = cast("Any", None)
        made = Standby(
            Nobody(),
            mmap.mmap(-1, 4096),
            nothing,
            nothing,
            nothing,
            addresses=(),
            most=10_000,
            ports_held=ports,
        )
        return made._most

    assert [most(ports) for ports in (0, 500, 2000)] == [250, 125, 0]


@pytest.mark.parametrize(
    "kind", ["adopted", "orphan", "later", "unknown", "young", "held", "ended"]
)
def test_records_give_way_that_no_worker_needs_or_whose_pair_is_elsewhere(kind: str) -> None:
    record = splice_of(PAIR, 99, Interfaces(5, 5), claim=0, slack=0)
    keys = {bytes(direction.from_): FLOW.pack(3, 0) for direction in record.direction}
    done: list[str] = []
    record.worker = {"held": HELD, "young": NO_WORKER}.get(kind, 0)
    if kind == "ended":
        record.id = 0
    keys[b"another"] = FLOW.pack(3, 0)
    pairs = SimpleNamespace(
        allocate=None,
        show_held=None,
        remember_joined=None,
        owners={} if kind in ("young", "held", "ended") else {3: 0},
        record=lambda _: record,
        flows=SimpleNamespace(lookup=keys.__getitem__, delete=keys.__delitem__),
        forget=lambda index: done.append(f"forget {index}"),
        end=lambda index, why: done.append(f"end {index} {why.name}"),
    )
    shown = PairRecord(started_ns=101_000_000_000 if kind == "later" else 99_000_000_000)
    adoption = SimpleNamespace(
        take_in=None,
        is_orphan=lambda _: kind == "orphan",
        shown_of=lambda *_: b"" if kind == "unknown" else bytes(shown),
    )
    owner = keeper_module._StandbyOwner(cast("Any", pairs), cast("Any", adoption))
    before = dict(keys)
    assert owner.give_way(3, 100.0) is (kind in ("adopted", "orphan", "ended"))
    # Nobody is sent a packet for it: its worker is told, or it is forgotten.
    assert done == {"adopted": ["end 3 MOVED"], "orphan": ["forget 3"]}.get(kind, [])
    if kind not in ("adopted", "orphan", "ended"):
        assert keys == before
    else:
        assert keys == {b"another": before[b"another"]}

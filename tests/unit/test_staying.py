"""Which connections are told to other machines as those that end with this one."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, Endpoint, PairRecord, PairState, pack_endpoint
from pyforwarder.datapath.splice.staying import Staying
from pyforwarder.fleet.failover.stays import GROUP_PAIRS

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.stays import Connection

SLOTS: Final = 3 * GROUP_PAIRS
CLIENT, LISTENER = Address("10.9.9.9", 40001), Address("10.1.0.1", 443)
SOURCE, SERVER = Address("fd02::1", 50000), Address("fd02::100", 7000)


class Table:
    """The pair table, and who reads it."""

    def __init__(self, memory: mmap.mmap, staying: Staying) -> None:
        self._memory, self._staying = memory, staying

    def write(self, slot: int, **other: Any) -> None:
        """A joined pair, unless something else is said."""
        said: dict[str, Any] = {
            "id": slot + 1,
            "state": PairState.JOINED,
            "client": CLIENT,
            "listener": LISTENER,
            "source": SOURCE,
            "server": SERVER,
        } | other
        record = PairRecord()
        for name, value in said.items():
            if name in ("client", "listener", "source", "server"):
                setattr(record, name, Endpoint.from_buffer_copy(pack_endpoint(value)))
            else:
                setattr(record, name, value)
        self._memory[slot * PAIR_BYTES : (slot + 1) * PAIR_BYTES] = bytes(record)

    def scan(self, *replicated: int) -> dict[int, list[tuple[int, int, bool]]]:
        """Groups with (own port, peer's port, whether that is the client)."""

        def short(one: Connection) -> tuple[int, int, bool]:
            return one.own.port, one.peer.port, one.peer_connected

        found = self._staying.scan(set(replicated))
        return {number: [short(one) for one in group] for number, group in found.items()}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    memory = mmap.mmap(-1, SLOTS * PAIR_BYTES)
    monkeypatch.setattr(bpf, "map_memory", lambda *_, **__: memory)
    maps = cast("Any", SimpleNamespace(workers=1, slots=SLOTS, pairs_fd=-1))
    return Table(memory, Staying(maps, ["10.1.0.1", "fd02::1"]))


BOTH: Final = [(443, 40001, True), (50000, 7000, False)]


def test_both_connections_of_a_pair_are_in_its_group(table: Table) -> None:
    assert table.scan() == {}
    table.write(0)
    table.write(GROUP_PAIRS + 5)
    table.write(SLOTS - 1)
    assert table.scan() == {0: BOTH, 1: BOTH, 2: BOTH}


@pytest.mark.parametrize(
    ("other", "left"),
    [
        ({"state": PairState.FREE}, None),
        ({"protocol": 17}, None),
        ({"sequence": 7}, None),  # it changes hands just now
        ({"listener": Address("10.1.0.11", 443), "source": UnixAddress("/")}, None),
        ({"client": UnixAddress("/")}, BOTH[1:]),
        ({"source": Address("fd02::11", 50000)}, BOTH[:1]),
        ({"source": None, "server": SERVER, "state": PairState.CONNECTING}, BOTH[:1]),
    ],
)
def test_only_connections_of_tcp_at_addresses_that_move_count(
    table: Table, other: dict[str, Any], left: list[tuple[int, int, bool]] | None
) -> None:
    table.write(3, **other)
    assert table.scan() == ({0: left} if left else {})


def test_a_pair_that_others_can_go_on_with_is_none_of_them(table: Table) -> None:
    table.write(1)
    table.write(2, id=77)
    assert table.scan(77) == {0: BOTH}
    assert table.scan(2, 77) == {}


def test_a_group_is_read_again_once_somebody_else_is_described_there(table: Table) -> None:
    table.write(1)
    table.write(2, id=77)
    before = table._staying.scan({77})[0]
    assert table._staying.scan({77})[0] is before
    assert table.scan() == {0: BOTH + BOTH}  # that one is none that others know any more
    table.write(1, sequence=2, client=Address("10.9.9.9", 40002))
    assert table.scan(77) == {0: [(443, 40002, True), BOTH[1]]}
    table.write(1, sequence=2, state=PairState.FREE)
    assert table.scan(77) == {}

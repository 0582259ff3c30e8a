"""What it costs a machine to tell others of its spliced pairs: real records, and a real etcd.

The process that does it is one of its own, as in a daemon: what is counted is the time that it has
had of a processor, all of its threads, in the kernel as well. This one plays workers and programs:
it writes records of pairs into the memory that both share.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from pyforwarder.config import Fleet
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, PairRecord, PairState
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice, SpliceDirection
from pyforwarder.datapath.splice.own_pairs import OwnPairs
from pyforwarder.datapath.splice.replicas import Interfaces, shown, splice_of
from pyforwarder.datapath.splice.staying import Staying
from pyforwarder.fleet.echoes import Echoes
from pyforwarder.fleet.failover.record import Endpoint, tag_of
from pyforwarder.fleet.failover.replicator import Replicator
from pyforwarder.fleet.layout import Keys
from pyforwarder.fleet.opening import open_store
from pyforwarder.fleet.watching import Watcher
from pyforwarder.runtime import collecting
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.etcd import Etcd
from tests.helpers.failover_records import a_pair
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.ledger import Scan
    from pyforwarder.fleet.failover.stays import Connection

PER_S: Final = 1000
LIVE_S: Final = 4  # so many seconds each of them lasts
LIVE: Final = PER_S * LIVE_S
# As many as with `limits: {pairs: 10000}`, the default. Records are used in turn.
SLOTS: Final = 10_000
ENTRIES: Final = 2 * SLOTS
STEPS_PER_S: Final = 50
KEYS: Final = Keys("edge")
ADDRESSES: Final = ["2.2.2.2", "3.3.3.3"]
# Of one processor. A machine that is busy otherwise needs more time for the same.
MOST_SHARE: Final = 0.06

_WORD: Final = struct.Struct("=I")
_NUMBER: Final = struct.Struct("=Q")
_SAID: Final = struct.Struct("=qd")
_MOVES: Final = [
    Splice.direction.offset + n * (Splice.direction.size // 2) + field.offset
    for n in (0, 1)
    for field in (SpliceDirection.last_ack, SpliceDirection.last_end, SpliceDirection.packets)
]


class Records:
    """The maps' memory, as programs, keeper and workers write it."""

    def __init__(self) -> None:
        self.splices = mmap.mmap(-1, ENTRIES * SPLICE_BYTES)
        self.table = mmap.mmap(-1, SLOTS * PAIR_BYTES)
        # More than there are at a time: a record that is used again has another pair.
        made = [self._made(number) for number in range(LIVE + 3 * PER_S)]
        self._made_ones = deque(made)
        self._free = deque(range(ENTRIES))
        self._free_slots = deque(range(SLOTS))
        self._used: deque[tuple[int, int]] = deque()
        self._ids = iter(range(1, 1 << 40))

    @staticmethod
    def _made(number: int) -> tuple[bytearray, bytearray]:
        pair = a_pair()
        client = Endpoint(bytes([10, 0, *divmod(number, 256)]), 1024 + number)
        pair = replace(pair, ends=pair.ends._replace(client=client))
        record = splice_of(pair, 1, Interfaces(3, 5), claim=0, slack=0)
        record.worker = 0
        return bytearray(bytes(record)), bytearray(shown(pair, record, boot_unix_s=0.0))

    def begin(self, count: int) -> None:
        """So many pairs begin."""
        for _ in range(count):
            record, entry = self._made_ones[0]
            self._made_ones.rotate(-1)
            index, slot, pair_id = self._free.popleft(), self._free_slots.popleft(), next(self._ids)
            _NUMBER.pack_into(record, Splice.id.offset, pair_id)
            _WORD.pack_into(record, Splice.slot.offset, slot)
            _NUMBER.pack_into(entry, PairRecord.id.offset, pair_id)
            self.table[slot * PAIR_BYTES : (slot + 1) * PAIR_BYTES] = bytes(entry)
            self.splices[index * SPLICE_BYTES : (index + 1) * SPLICE_BYTES] = bytes(record)
            self._used.append((index, slot))

    def end(self, count: int) -> None:
        """The oldest of them end."""
        for _ in range(count):
            index, slot = self._used.popleft()
            _WORD.pack_into(self.splices, index * SPLICE_BYTES + Splice.state.offset, 0)
            self.table[slot * PAIR_BYTES + PairRecord.state.offset] = PairState.FREE
            self._free.append(index)
            self._free_slots.append(slot)

    def move(self, first: int, count: int) -> None:
        """Packets of so many pairs have passed, both ways."""
        for n in range(first, first + count):
            index, slot = self._used[n]
            for at in _MOVES:
                self._add(self.splices, index * SPLICE_BYTES + at)
            for at in (8, 136):  # redirected_bytes, and of the worker what it has carried
                self._add(self.table, slot * PAIR_BYTES + at)

    @staticmethod
    def _add(memory: mmap.mmap, at: int) -> None:
        (number,) = _NUMBER.unpack_from(memory, at)
        _NUMBER.pack_into(memory, at, number + 1448)


class Kernel:
    """What the process reads; no other machine has pairs."""

    def __init__(self, records: Records) -> None:
        both = {1: records.splices, 2: records.table}
        maps = SimpleNamespace(splices_fd=1, pairs_fd=2, entries=ENTRIES, workers=1, slots=SLOTS)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(bpf, "map_memory", lambda fd, *_, **__: both[fd])
            self._own = OwnPairs(cast("Any", maps), ADDRESSES)
            self._staying = Staying(cast("Any", maps), ADDRESSES)

    def scan(self, now_s: float) -> Scan:
        return self._own.scan(now_s)

    def addresses(self) -> Collection[bytes]:
        return ()

    def staying(
        self, known: Collection[str], changed: Collection[str]
    ) -> dict[int, list[Connection]]:
        return self._staying.scan(self._own.ids(known, changed))

    def ask(self, do: str, **fields: object) -> dict[str, Any]:
        del do, fields
        return {"waiting": [], "taken": 0, "refused": []}


class Supervisor:
    """Gives the process its pace, and hears how many pairs are in the store."""

    def __init__(self) -> None:
        self.own = mmap.mmap(-1, _NUMBER.size)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)  # the replicator's pace

    def send(self, said: dict[str, Any]) -> None:
        if "own" in said:
            _NUMBER.pack_into(self.own, 0, said["own"])

    def count(self) -> int:
        (own,) = _NUMBER.unpack_from(self.own)
        return int(own)


class Process:
    """The process that tells of pairs."""

    def __init__(self, fleet: Fleet, records: Records) -> None:
        self.supervisor = Supervisor()
        self._pid = os.fork()
        if not self._pid:
            self._run(fleet, records)
        # clock_getcpuclockid(3)
        self._clock = (~self._pid << 3) | 2

    def _run(self, fleet: Fleet, records: Records) -> None:
        """Be it."""
        try:
            echoes = Echoes()
            watcher = Watcher(open_store(fleet), KEYS.failover, echoes=echoes)
            store, kernel, supervisor = open_store(fleet), Kernel(records), self.supervisor
            tag = tag_of("one")
            collecting.settle((50_000, 20, 100))
            Replicator(
                store, watcher, echoes, KEYS, tag, "this", kernel, cast("Any", supervisor)
            ).run()
        finally:
            os._exit(1)

    def used_s(self) -> float:
        """What it has had of a processor until now."""
        return time.clock_gettime(self._clock)

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@pytest.fixture
def etcd(tmp_path: Any) -> Iterator[Etcd]:
    store = Etcd(tmp_path)
    store.start()
    yield store
    store.stop()


@pytest.mark.soak
@pytest.mark.alone
@pytest.mark.timeout(scaled_s(180))
def test_a_thousand_pairs_that_begin_each_second(etcd: Etcd, soak_s: float) -> None:
    """What is printed is the median of seconds, in parts of a processor."""
    fleet = Fleet.model_validate({"endpoints": [etcd.endpoint], "name": "edge"})
    records = Records()
    process = Process(fleet, records)
    seconds = max(5, min(20, int(soak_s)))

    def shares(count: int, play: Any) -> list[float]:
        """Of so many seconds, in which something is done in steps."""
        found = []
        for _ in range(count):
            begun_s, began = time.monotonic(), process.used_s()
            for step in range(STEPS_PER_S):
                play(step)
                time.sleep(max(0.0, begun_s + (step + 1) / STEPS_PER_S - time.monotonic()))
            found.append((process.used_s() - began) / (time.monotonic() - begun_s))
        return sorted(found)

    def begin(_: int) -> None:
        records.begin(PER_S // STEPS_PER_S)

    def change(step: int) -> None:
        begin(step)
        records.end(PER_S // STEPS_PER_S)

    def move(step: int) -> None:
        some = LIVE // STEPS_PER_S
        records.move(step * some, some)

    with contextlib.closing(SimpleNamespace(close=process.stop)):
        shares(LIVE_S, begin)
        changing = shares(seconds, change)
        wait_for(lambda: process.supervisor.count() == LIVE, "all are in the store")
        idle = shares(seconds, lambda _: None)
        moving = shares(seconds, move)
    share = changing[len(changing) // 2]
    print(
        f"{PER_S} pairs begin and {PER_S} end each second, {LIVE} at a time: "
        f"{share:.4f} of a processor (worst second {changing[-1]:.4f}); "
        f"as many that stand still: {idle[len(idle) // 2]:.4f}; "
        f"that all move: {moving[len(moving) // 2]:.4f}"
    )
    assert share < MOST_SHARE

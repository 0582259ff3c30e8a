"""What it costs a machine to tell others of its spliced pairs: real records, and a real etcd."""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from pyforwarder.config import Fleet
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice
from pyforwarder.datapath.splice.own_pairs import OwnPairs
from pyforwarder.datapath.splice.replicas import Interfaces, splice_of
from pyforwarder.fleet.failover.record import tag_of
from pyforwarder.fleet.failover.replicator import Replicator
from pyforwarder.fleet.layout import Keys
from pyforwarder.fleet.opening import open_store
from pyforwarder.fleet.watching import Watcher
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.etcd import Etcd
from tests.helpers.failover_records import a_pair
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from pyforwarder.fleet.failover.ledger import Own
    from pyforwarder.fleet.failover.stays import Connection

PER_S: Final = 1000
LIVE_S: Final = 4  # so many seconds each of them lasts
ROOM: Final = PER_S * (LIVE_S + 2)
STEPS_PER_S: Final = 50
KEYS: Final = Keys("edge")
# Of one processor. A machine that is busy otherwise needs more time for the same.
MOST_SHARE: Final = 0.15


class Kernel:
    """Records in memory, as programs and keeper write them; no other machine has pairs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._memory = mmap.mmap(-1, ROOM * SPLICE_BYTES)
        both = {1: self._memory, 2: mmap.mmap(-1, PAIR_BYTES)}
        maps = SimpleNamespace(splices_fd=1, pairs_fd=2, entries=ROOM, workers=1, slots=1)
        monkeypatch.setattr(bpf, "map_memory", lambda fd, *_, **__: both[fd])
        self._own = OwnPairs(cast("Any", maps), ["2.2.2.2", "3.3.3.3"])
        self._records = [self._record(index) for index in range(ROOM)]
        self._free = deque(range(ROOM))
        self._used: deque[int] = deque()

    @staticmethod
    def _record(index: int) -> bytes:
        pair = a_pair(port=1024 + 4 * index)
        record = splice_of(pair, index + 1, Interfaces(3, 5), claim=0, slack=0)
        record.worker = 0
        return bytes(record)

    def begin(self, count: int) -> None:
        """So many pairs begin."""
        for _ in range(count):
            index = self._free.popleft()
            self._memory[index * SPLICE_BYTES : (index + 1) * SPLICE_BYTES] = self._records[index]
            self._used.append(index)

    def end(self, count: int) -> None:
        """The oldest of them end."""
        for _ in range(count):
            index = self._used.popleft()
            at = index * SPLICE_BYTES + Splice.state.offset
            self._memory[at : at + 4] = bytes(4)
            self._free.append(index)

    def scan(self, now_s: float) -> Mapping[str, Own]:
        return self._own.scan(now_s)

    def addresses(self) -> Collection[bytes]:
        return ()

    def staying(self, known: Collection[str]) -> dict[int, list[Connection]]:
        del known
        return {}

    def ask(self, do: str, **fields: object) -> dict[str, Any]:
        del do, fields
        return {"waiting": [], "taken": 0, "refused": []}


class Supervisor:
    """Waits, until it is over."""

    def __init__(self) -> None:
        self.is_over = False
        self.own = -1

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)  # the replicator's pace
        if self.is_over:
            raise EOFError

    def send(self, said: dict[str, Any]) -> None:
        self.own = said.get("own", self.own)


@pytest.fixture
def etcd(tmp_path: Any) -> Iterator[Etcd]:
    store = Etcd(tmp_path)
    store.start()
    yield store
    store.stop()


@pytest.mark.soak
@pytest.mark.alone
@pytest.mark.timeout(scaled_s(120))
def test_a_thousand_pairs_that_begin_each_second(
    monkeypatch: pytest.MonkeyPatch, etcd: Etcd, soak_s: float
) -> None:
    """What is printed is the processor time for the process that speaks to the store."""
    fleet = Fleet.model_validate({"endpoints": [etcd.endpoint], "name": "edge"})
    kernel, supervisor = Kernel(monkeypatch), Supervisor()
    replicator = Replicator(
        open_store(fleet),
        Watcher(open_store(fleet), KEYS.failover),
        KEYS,
        tag_of("one"),
        "this",
        kernel,
        cast("Any", supervisor),
    )

    def run() -> None:
        with pytest.raises(EOFError):
            replicator.run()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        used_s = []
        idle_s = None
        for second in range(LIVE_S + max(3, min(20, int(soak_s)))):
            begun_s, began = time.monotonic(), time.process_time()
            for step in range(STEPS_PER_S):
                kernel.begin(PER_S // STEPS_PER_S)
                if second >= LIVE_S:
                    kernel.end(PER_S // STEPS_PER_S)
                time.sleep(max(0.0, begun_s + (step + 1) / STEPS_PER_S - time.monotonic()))
            took_s = time.monotonic() - begun_s
            if second >= LIVE_S:
                used_s.append((time.process_time() - began) / took_s)
        wait_for(lambda: supervisor.own == PER_S * LIVE_S, "all are in the store")
        began, begun_s = time.process_time(), time.monotonic()
        time.sleep(3.0)  # nothing begins or ends, nothing moves
        idle_s = (time.process_time() - began) / (time.monotonic() - begun_s)
    finally:
        supervisor.is_over = True
        thread.join(10)
    used_s.sort()
    share = used_s[len(used_s) // 2]
    print(
        f"{PER_S} pairs begin and {PER_S} end each second, {PER_S * LIVE_S} at a time: "
        f"{share:.3f} of a processor (worst second {used_s[-1]:.3f}); "
        f"as many that stand still: {idle_s:.3f}"
    )
    assert share < MOST_SHARE

"""The iterators by themselves: exact for any number of records, whole lines, honest at the end."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import random
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.core.address import Address, UnixAddress
from pyforwarder.datapath.base import OPENED_BY_KERNEL, PairReason
from pyforwarder.datapath.ebpf.abi import (
    PAIR_BYTES,
    DatapathKind,
    Direction,
    LineKind,
    PairRecord,
    PairState,
    pack_endpoint,
)
from pyforwarder.datapath.ebpf.arrays import LISTENER_LINES, Arrays, Line
from pyforwarder.datapath.ebpf.pair_table import PairTable, PairWindow, slots_for
from pyforwarder.runtime import tables
from pyforwarder.runtime.counters import BLOCK_BYTES, BLOCK_WORDS, Counter, Counters
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.files import view_walks
from pyforwarder.supervisor.files.view_walks import KSYM, MAP, Walk
from pyforwarder.supervisor.files.views import View
from pyforwarder.supervisor.requests import report
from pyforwarder.supervisor.requests.report import Backlogs
from tests.helpers.waiting import DEADLINE_S
from tests.kernel.conftest import temporary_place

if TYPE_CHECKING:
    from tests.helpers.daemon import Place

WORKERS: Final = 2
SLOTS: Final = 8192
GONE: Final = "# the daemon is gone"
# Each way of making a view does all of it, whether it is the first choice here or not.
EACH_WALK: Final = [
    pytest.param(MAP, id="map", marks=pytest.mark.needs("map iterators")),
    pytest.param(KSYM, id="ksym", marks=pytest.mark.needs("ksym iterators")),
]


class Bench:
    """The arrays of a daemon that is not there, and its view."""

    def __init__(self, directory: Path, walk: Walk, *, slots: int = SLOTS) -> None:
        self.directory = directory
        self.slots = slots
        self.arrays = Arrays.create(workers=WORKERS, slots=slots)
        self.table = PairTable(workers=WORKERS, slots=slots, fd=self.arrays.pairs_fd)
        self.memory = self.arrays.counters_memory(WORKERS).map_all()
        self.counters = Counters(self.memory)
        self.walk = walk
        self.view = View.load(self.arrays, None, workers=WORKERS, slots=slots, walks=[walk])
        self.view.pin(directory)
        self.empty()

    def empty(self) -> None:
        """As it was at first."""
        self.windows = [
            PairWindow(memory, first_slot=n * self.slots, worker_index=n)
            for n, memory in enumerate(self.table.windows)
        ]
        for worker in range(WORKERS):
            self.counters.block(worker)[:] = memoryview(bytes(BLOCK_BYTES)).cast("Q")
        self.view.set_stats([])
        self.view.set_listeners([])

    def close(self) -> None:
        self.view.unpin()
        self.view.close()
        self.arrays.close()

    def read(self, name: str = "show", *, at_once: int = 1 << 16) -> str:
        """The file, by reads of that many bytes."""
        fd = os.open(self.directory / name, os.O_RDONLY)
        try:
            said = b""
            while chunk := os.read(fd, at_once):
                said += chunk
            return said.decode()
        finally:
            os.close(fd)

    def some_lines(self, count: int) -> list[str]:
        """The first lines of `show` behind the header, at least `count` if there are as many.

        A read ends with the object that fills it. So one byte is read, and then what is left of the
        object, and a walk is over in microseconds however much there is that says nothing.
        """
        fd = os.open(self.directory / "show", os.O_RDONLY)
        try:
            said = b""
            while said.count(b"\n") <= count and (first := os.read(fd, 1)):
                said += first + os.read(fd, 1 << 16)
            return said.decode().splitlines()[1:]
        finally:
            os.close(fd)

    def rows(self, name: str = "show") -> list[dict[str, str]]:
        return tables.parse(self.read(name))

    def fill(self, count: int, *, seed: int = 23) -> list[dict[str, str]]:
        """Write that many records; the rows that `show` prints of them, in the order of slots."""
        source = random.Random(seed)
        expected = []
        for number in range(count):
            window = self.windows[number * WORKERS // count]
            expected.append(self.write(window, number + 1, source))
        return expected

    def write(self, window: PairWindow, pair_id: int, source: random.Random) -> dict[str, str]:
        slot = window.allocate()
        ends = [random_endpoint(source) for _ in range(4)]
        state = source.choice([state for state in PairState if state])
        kind = source.choice(list(DatapathKind))
        up, down = source.choice([0, 23, 2**40 + 1]), source.randrange(2**48)
        rule = source.choice(["", "any", "r", "a-rule-with-a-name-of-forty-characters..."])
        reason = source.choice([PairReason.BEST, *OPENED_BY_KERNEL])
        now_ns = time.monotonic_ns()
        window.count(slot, Direction.UP, up, 1, now_ns)
        window.count(slot, Direction.DOWN, down, 1, now_ns)
        window.describe(
            slot,
            pair_id=pair_id,
            started_ns=now_ns,
            endpoints=b"".join(packed for packed, _ in ends),
            rule=rule.encode(),
            listener=b"main",
            state=state,
            datapath=kind,
            reason=reason,
        )
        return {
            "id": str(pair_id),
            "state": state.label,
            "datapath": kind.label,
            **dict(
                zip(
                    ("client", "listener", "source", "server"),
                    (text for _, text in ends),
                    strict=True,
                )
            ),
            "up_bytes": str(up),
            "down_bytes": str(down),
            "rule": rule[:15] or "-",
            "decided": "user" if reason is PairReason.BEST else "kernel",
        }


def random_endpoint(source: random.Random) -> tuple[bytes, str]:
    """A packed endpoint, and how users read it; IPv6 with every kind of zeros."""
    port = source.choice([0, 1, 9, 10, 99, 443, 65535, source.randrange(65536)])
    match source.randrange(8):
        case 0:
            return pack_endpoint(None), "-"
        case 1:
            return pack_endpoint(UnixAddress("/run/x")), "unix:"
        case 2 | 3 | 4:
            ip4 = ipaddress.IPv4Address(source.choice([0, 2**32 - 1, source.randrange(2**32)]))
            address = Address(str(ip4), port)
            return pack_endpoint(address), str(address)
    groups = [source.choice([0, 0, 1, 0xABC, 0xFFFF]) for _ in range(8)]
    if groups[:5] == [0] * 5:
        groups[0] = 1  # ::ffff:1.2.3.4 is written in two ways, depending on Python's version
    ip6 = ipaddress.IPv6Address(b"".join(group.to_bytes(2, "big") for group in groups))
    address = Address(str(ip6), port)
    return pack_endpoint(address), str(address)


def without_clocks(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    clocks = ("age_s", "idle_s")
    return [{key: row[key] for key in row if key not in clocks} for row in rows]


@contextlib.contextmanager
def bench_at(place: Place, walk: Walk, *, slots: int = SLOTS) -> Iterator[Bench]:
    bench = Bench(place.bpffs / "bench", walk, slots=slots)
    yield bench
    bench.close()
    assert place.pins() == []


@pytest.fixture(scope="module", params=EACH_WALK)
def walk(request: pytest.FixtureRequest) -> Walk:
    made: Walk = request.param
    return made


@pytest.fixture(scope="module")
def loaded_bench(walk: Walk) -> Iterator[Bench]:
    with temporary_place() as place, bench_at(place, walk) as bench:
        yield bench


@pytest.fixture
def bench(loaded_bench: Bench) -> Bench:
    """One for all tests, loading being what takes time; emptied for each."""
    loaded_bench.empty()
    return loaded_bench


@pytest.fixture
def own_bench(place: Place, walk: Walk) -> Iterator[Bench]:
    """One for a test that spoils it."""
    with bench_at(place, walk) as bench:
        yield bench


# ---------------------------------------------------------------------------- show


def test_an_empty_table_is_a_header(bench: Bench) -> None:
    lines = bench.read().splitlines()
    assert [line.split() for line in lines] == [list(tables.PAIR_COLUMNS)]


def test_one_pair_is_one_line(bench: Bench) -> None:
    expected = bench.fill(1)
    rows = bench.rows()
    assert without_clocks(rows) == expected
    assert {rows[0]["age_s"], rows[0]["idle_s"]} <= {"0", "1"}


@pytest.mark.parametrize("at_once", [100, 4096, 1 << 16])
def test_ten_thousand_pairs_are_all_there_once_in_order(bench: Bench, at_once: int) -> None:
    expected = bench.fill(10_000)
    text = bench.read(at_once=at_once)
    assert len(text) > 20 * 32 * 1024
    assert without_clocks(tables.parse(text)) == expected
    assert text.endswith("\n")


def test_many_readers_at_once_get_every_line_once(bench: Bench) -> None:
    expected = bench.fill(10_000)
    # Most of them start many reads with an object that did not fit into the one before.
    sizes = [1 << 16, 100, 4096, 32 << 10, 9973, 33_000]
    with ThreadPoolExecutor(len(sizes)) as readers:
        texts = list(readers.map(lambda size: bench.read(at_once=size), sizes))
    for text in texts:
        assert without_clocks(tables.parse(text)) == expected


@pytest.mark.parametrize("per_visit", [3, 8])
def test_several_pairs_at_a_visit_are_all_there_once_in_order(
    place: Place, monkeypatch: pytest.MonkeyPatch, per_visit: int
) -> None:
    # As where there are more slots than symbols; 16,384 slots are no multiple of 3.
    monkeypatch.setattr(view_walks, "pairs_per_visit", lambda pairs: per_visit)
    with bench_at(place, KSYM) as bench:
        expected = bench.fill(10_000)
        # The last slot of the table, too.
        last = bench.windows[1]
        last._free = deque([SLOTS - 1])
        expected.append(bench.write(last, 10_001, random.Random(1)))
        for at_once in (1 << 16, 4096):
            assert without_clocks(tables.parse(bench.read(at_once=at_once))) == expected
        bench.view.set_stats(report.stats_lines({}))
        rows = {row["stat"]: row["value"] for row in bench.rows("stats")}
        assert int(rows["bytes_up"]) == sum(int(row["up_bytes"]) for row in expected)
        assert int(rows["bytes_down"]) == sum(int(row["down_bytes"]) for row in expected)


def test_the_file_and_the_daemon_say_the_same(bench: Bench) -> None:
    bench.fill(997, seed=7)
    file = {row["id"]: row for row in bench.rows()}
    answer = tables.parse(
        tables.render("pairs", report.pair_rows(bench.table.windows, Backlogs({})))
    )
    assert len(answer) == 997
    for row in without_clocks(answer):
        row["rule"] = row["rule"][:15]
        assert without_clocks([file[row["id"]]]) == [row]


def test_columns_are_aligned_while_addresses_are_short(bench: Bench) -> None:
    window = bench.windows[0]
    addresses: list[tuple[Address | UnixAddress | None, ...]] = [
        (Address("127.0.0.1", 1), Address("::", 0), Address("::1", 9999), Address("255.1.1.1", 80)),
        (Address("::1", 65535), None, Address("fe80::1:2", 443), UnixAddress("/run/x")),
        (Address("2001:db8::1:23", 443), Address("10::", 1), None, None),
        (Address("255.255.255.255", 65535), Address("1::1", 10), None, Address("::a:b", 123)),
    ]
    for number, ends in enumerate(addresses):
        window.describe(
            window.allocate(),
            pair_id=number + 1,
            started_ns=time.monotonic_ns(),
            endpoints=b"".join([pack_endpoint(end) for end in ends]),
            rule=b"r",
            listener=b"main",
            state=PairState.JOINED,
            datapath=DatapathKind.COPY,
            reason=0,
        )
    header, *lines = bench.read().splitlines()
    starts = [header.index(name) for name in ("CLIENT", "LISTENER", "SOURCE", "SERVER")]
    assert len(lines) == len(addresses)
    for line, ends in zip(lines, addresses, strict=True):
        texts = [
            "-" if e is None else "unix:" if isinstance(e, UnixAddress) else str(e) for e in ends
        ]
        for start, text in zip(starts, texts, strict=True):
            assert line[start - 1 : start + 22] == f" {text:<21} ", line
        assert len(line.rstrip()) == len(lines[0].rstrip())


def test_freed_slots_are_skipped_and_counters_are_live(bench: Bench) -> None:
    bench.fill(100)
    window = bench.windows[0]
    for slot in range(0, 50, 2):
        window.release(slot)
    window.count(1, Direction.UP, 4711, 3, time.monotonic_ns())
    rows = bench.rows()
    assert [int(row["id"]) for row in rows] == [*range(2, 51, 2), *range(51, 101)]
    assert rows[0]["up_bytes"] == "4711"


def test_a_record_that_changes_hands_is_not_shown(bench: Bench) -> None:
    bench.fill(2)
    window = bench.windows[0]
    sequence = PairRecord.sequence.offset // 8
    window.words64[sequence] += 1
    assert [row["id"] for row in bench.rows()] == ["2"]
    window.words64[sequence] += 1
    assert [row["id"] for row in bench.rows()] == ["1", "2"]


class Occupant:
    """The connection of that number: everything about it follows from the number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ends = [
            Address(f"10.{n}.{number >> 8 & 255}.{number & 255}", number % 65521)
            if (number + n) % 2
            else Address(f"2001:db8:{n + 1}::{number & 0xFFFF or 1:x}", number % 65519)
            for n in range(4)
        ]
        self.state = [state for state in PairState if state][number % 6]
        self.kind = list(DatapathKind)[number % len(DatapathKind)]
        self.rule = f"r{number % 9973}"
        self.reason = (PairReason.BEST, *OPENED_BY_KERNEL)[number % 3]

    def enter(self, window: PairWindow, slot: int) -> None:
        """As a worker does it (worker/records.py): the counters first, then who it is."""
        now_ns = time.monotonic_ns()
        window.count(slot, Direction.UP, self.number * 1_000_003, 1, now_ns)
        window.count(slot, Direction.DOWN, self.number * 999_983, 1, now_ns)
        window.describe(
            slot,
            pair_id=self.number,
            started_ns=now_ns,
            endpoints=b"".join(map(pack_endpoint, self.ends)),
            rule=self.rule.encode(),
            listener=b"main",
            state=self.state,
            datapath=self.kind,
            reason=self.reason,
        )

    def columns(self) -> list[str]:
        return [
            str(self.number),
            self.state.label,
            self.kind.label,
            *map(str, self.ends),
            str(self.number * 1_000_003),
            str(self.number * 999_983),
            self.rule,
            "kernel" if self.reason in OPENED_BY_KERNEL else "user",
        ]


def come_and_go_as_fast_as_they_can(window: PairWindow, slots: int) -> None:
    """Slots change hands without end; the child that calls this is killed."""
    window._free = deque(range(slots))
    taken: deque[int] = deque()
    for number in itertools.count(1):
        if len(taken) == slots:
            window.release(taken.popleft())
        slot = window.allocate()
        Occupant(number).enter(window, slot)
        taken.append(slot)


def be_described_as_fast_as_possible(window: PairWindow) -> None:
    """Slot 0 is described anew without end, by the protocol of PairWindow.describe().

    What takes microseconds there is one copy here, so that half of the time one is under way.
    """
    sequence, number_at = PairRecord.sequence.offset // 8, PairRecord.id.offset // 8
    begin, end = PairRecord.started_ns.offset, PAIR_BYTES
    words, memory = window.words64, window._bytes
    bodies = []
    for number in range(1, 64):
        Occupant(number).enter(window, 0)
        bodies.append((number, bytes(memory[begin:end])))
    for number, body in itertools.cycle(bodies):
        words[sequence] += 1
        words[number_at] = number
        memory[begin:end] = body
        words[sequence] += 1


@contextlib.contextmanager
def running_beside(action: Callable[[], None]) -> Iterator[None]:
    """The action in a child that has everything of ours, killed at the end."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("slots", [2, 31])
def test_no_line_mixes_two_connections_whose_slot_changes_hands(bench: Bench, slots: int) -> None:
    # Thousands of times a second, on every slot: far more than connections can come and go.
    seen: set[str] = set()
    lines = 0
    end_s = time.monotonic() + DEADLINE_S
    with running_beside(lambda: come_and_go_as_fast_as_they_can(bench.windows[0], slots)):
        while (lines < 1000 or len(seen) < 500) and time.monotonic() < end_s:
            for line in bench.some_lines(slots // 2):
                words = line.split()
                assert words[:9] + words[11:] == Occupant(int(words[0])).columns(), line
                seen.add(words[0])
                lines += 1
    assert lines >= 1000
    assert len(seen) >= 500


def test_no_line_mixes_two_descriptions(place: Place, walk: Walk) -> None:
    expected = {}
    for number in range(1, 64):
        columns = Occupant(number).columns()
        # Not the counters: they are not described, but are the last writer's.
        expected[number] = columns[:7] + columns[9:]
    # An emulated host makes as many in its longer time as its time is longer.
    wanted = round(10_000 / scaled_s(1.0))
    seen: set[int] = set()
    lines = 0
    with bench_at(place, walk, slots=slots_for(1)) as small:
        window = small.windows[0]
        # So that no walk goes on beyond this one when the other was under way.
        Occupant(99).enter(window, 1)
        expected[99] = Occupant(99).columns()[:7] + Occupant(99).columns()[9:]
        end_s = time.monotonic() + DEADLINE_S
        with running_beside(lambda: be_described_as_fast_as_possible(window)):
            while (lines < wanted or len(seen) < 63) and time.monotonic() < end_s:
                for line in small.some_lines(1):
                    words = line.split()
                    assert words[:7] + words[11:] == expected[int(words[0])], line
                    if words[0] != "99":
                        seen.add(int(words[0]))
                        lines += 1
    assert lines >= wanted
    assert len(seen) == 63


def test_pairs_that_stay_are_all_there_once_while_others_come_and_go(bench: Bench) -> None:
    bench.fill(10_000)
    stays = [str(number) for number in range(1, 10_001)]

    def others() -> None:
        window = bench.windows[0]
        for number in itertools.count(100_001):
            slot = window.allocate()
            Occupant(number).enter(window, slot)
            window.release(slot)

    with running_beside(others):
        for at_once in (1 << 16, 4096) * 5:
            ids = [line.split()[0] for line in bench.read(at_once=at_once).splitlines()[1:]]
            assert [number for number in ids if int(number) <= 10_000] == stays


def test_age_and_idle_count_whole_seconds(bench: Bench) -> None:
    bench.fill(1)
    window = bench.windows[0]
    now_ns = time.monotonic_ns()
    # Less than any host has been up that got this far: a time before its start has no number.
    window.words64[PairRecord.started_ns.offset // 8] = now_ns - int(23.2e9)
    window.count(0, Direction.UP, 1, 1, now_ns - int(5.2e9))
    row = bench.rows()[0]
    late_s = (time.monotonic_ns() - now_ns) / 1e9
    assert 23 <= int(row["age_s"]) <= 23.2 + late_s
    assert 5 <= int(row["idle_s"]) <= 5.2 + late_s


# ---------------------------------------------------------------------------- stats, listeners


def test_stats_sums_workers_and_open_pairs(bench: Bench) -> None:
    expected = bench.fill(500)
    for worker in range(WORKERS):
        block = bench.counters.block(worker)
        for index in range(BLOCK_WORDS):
            block[index] = index * 1000 + worker
    bench.view.set_stats(report.stats_lines({"copy": "available"}))
    rows = {row["stat"]: row["value"] for row in bench.rows("stats")}
    daemon = report.stats(bench.counters, bench.table.windows, {"copy": "available"})
    assert rows == {str(r["stat"]): str(r["value"]) for r in tables.stats_rows(daemon)}
    assert int(rows["bytes_up"]) == Counter.UP_BYTES * 2000 + 1 + sum(
        int(row["up_bytes"]) for row in expected
    )


def test_stats_is_the_same_read_by_small_pieces_and_by_many(bench: Bench) -> None:
    bench.fill(500)
    bench.view.set_stats(report.stats_lines({"copy": "available"}))
    whole = bench.read("stats")
    assert bench.read("stats", at_once=7) == whole
    # Readers who leave in the middle leave nothing behind that would shut out later ones.
    for _ in range(600):
        fd = os.open(bench.directory / "stats", os.O_RDONLY)
        os.read(fd, 1)
        os.close(fd)
    assert bench.read("stats") == whole


def test_listeners_count_and_change(bench: Bench) -> None:
    for worker in range(WORKERS):
        block = bench.counters.block(worker)
        block[200], block[201], block[202] = 10 + worker, 20, 30
    main = Line(LineKind.LISTENER, "main", 200, "127.0.0.1:9999", "tcp")
    unix = Line(LineKind.LISTENER, "u", 300, "unix:/run/a\\040b", "tcp")
    bench.view.set_listeners([main, unix])
    row = {
        "name": "main",
        "bind": "127.0.0.1:9999",
        "protocol": "tcp",
        "accepted": "21",
        "open": "40",
        "refused": "60",
    }
    assert bench.rows("listeners") == [
        row,
        {**row, "name": "u", "bind": "unix:/run/a b", "accepted": "0", "open": "0", "refused": "0"},
    ]
    bench.view.set_listeners([Line(LineKind.LISTENER, "main", 200, "[::1]:80", "udp")])
    assert bench.rows("listeners") == [{**row, "bind": "[::1]:80", "protocol": "udp"}]


def test_more_listeners_than_lines_are_told_of(bench: Bench) -> None:
    lines = [Line(LineKind.LISTENER, f"l{n}", 200, "-", "tcp") for n in range(LISTENER_LINES + 5)]
    assert bench.view.set_listeners(lines) == LISTENER_LINES
    assert len(bench.rows("listeners")) == LISTENER_LINES


# ---------------------------------------------------------------------------- pins


def test_the_header_says_when_nobody_can_write_any_more(own_bench: Bench) -> None:
    expected = own_bench.fill(3)
    assert GONE not in own_bench.read()
    for window in own_bench.windows:
        window.close()
    header, *lines = own_bench.read().splitlines()
    assert header.split()[:13] == list(tables.PAIR_COLUMNS)
    assert GONE in header
    assert len(lines) == 3
    assert without_clocks(own_bench.rows()) == expected
    assert GONE in own_bench.read("stats").splitlines()[0]


def test_pins_are_the_owners_and_cannot_be_written(bench: Bench) -> None:
    for name in ("show", "stats", "listeners"):
        assert (bench.directory / name).stat().st_mode & 0o777 == 0o400
        fd = os.open(bench.directory / name, os.O_WRONLY)
        with pytest.raises(OSError, match="Invalid argument"):
            os.write(fd, b"x")
        os.close(fd)


def test_pinning_replaces_what_is_there_and_leaves_others_pins(own_bench: Bench) -> None:
    own_bench.fill(1)
    other = View.load(own_bench.arrays, None, workers=WORKERS, slots=SLOTS, walks=[own_bench.walk])
    strange = own_bench.directory / "strange"
    os.link(own_bench.directory / "show", strange)
    other.pin(own_bench.directory)
    assert len(own_bench.rows()) == 1
    other.unpin()
    other.close()
    assert strange.exists()
    assert sorted(path.name for path in own_bench.directory.iterdir()) == ["strange"]
    strange.unlink()
    own_bench.directory.rmdir()

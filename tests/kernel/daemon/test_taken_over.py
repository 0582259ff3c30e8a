"""A worker that a stranger has taken over: what it may do, line by line of docs/security.md.

Each test acts with a worker's own descriptors, as its user, without a capability. A pair of another
worker and the supervisor must not notice.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import functools
import itertools
import json
import mmap
import os
import random
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil
import pytest

from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.splice.keeper_replies import NOT_YOURS
from tests.helpers.keepers import keeper_of, stopped
from tests.helpers.malformed_messages import MALFORMED
from tests.helpers.peers import EchoServer, dial_through, read_exactly
from tests.helpers.taken_over_worker import (
    Fds,
    as_worker,
    keeper_channel,
    kinds,
    sequenced,
    sockets_of,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from psutil import Process

    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

CONFIG: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{name: named, match: instruction, allow: [loopback]}]
workers: 2
datapath: DATAPATH
"""
TCP_REPAIR: Final = 19
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def inode_of_accepted(client: socket.socket) -> int:
    """By which /proc/PID/fd names the socket at the other end of a client of this host (IPv4)."""
    ours, theirs = (end[1] for end in (client.getsockname(), client.getpeername()))
    for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        local, remote = (int(word.rpartition(":")[2], 16) for word in words[1:3])
        if (local, remote) == (theirs, ours):
            return int(words[9])
    raise AssertionError("it has no other end")


class Two:
    """Two workers, and a pair of each: one is taken over, the other's must not notice."""

    def __init__(self, daemon: Daemon, stack: contextlib.ExitStack) -> None:
        self.daemon = daemon
        self.pid = daemon.process.pid
        self.server = stack.enter_context(EchoServer())
        self.pairs: dict[int, socket.socket] = {}
        self.connections: collections.Counter[int] = collections.Counter()
        workers = {worker.pid: worker for worker in daemon.workers()}
        assert len(workers) == 2
        # The kernel deals connections out by their addresses (SO_REUSEPORT).
        for _ in range(200):
            sock = stack.enter_context(dial_through(daemon.address, self.server.address))
            self.exchange(sock)
            name = f"socket:[{inode_of_accepted(sock)}]"
            (owner,) = (pid for pid in workers if name in kinds(pid).values())
            self.connections[owner] += 1
            if owner not in self.pairs:
                self.pairs[owner] = sock
            if len(self.pairs) == 2:
                break
        (self.taken, self.other) = (workers[pid] for pid in self.pairs)

    def exchange(self, sock: socket.socket) -> None:
        data = random.Random(len(self.pairs)).randbytes(70_001)
        sock.sendall(data[:1000])
        assert read_exactly(sock, 1000) == data[:1000]

    def wait_until_replaced(self) -> None:
        wait_for(lambda: not self.taken.is_running(), "the worker is ended")
        wait_for(lambda: len(self.daemon.workers()) == 2, "it is replaced")

    def wait_until_left_alone(self) -> None:
        """No worker is replaced any more: what was sent in the name of one has been read."""

        def look() -> bool:
            before = {worker.pid for worker in self.daemon.workers()}
            time.sleep(1.0)
            return len(before) == 2 and {worker.pid for worker in self.daemon.workers()} == before

        wait_for(look, "the same two workers for a second")

    def nobody_noticed(self) -> None:
        """The supervisor, the other worker and its pair are there, and new pairs are served."""
        assert self.daemon.process.poll() is None
        assert self.other.is_running()
        self.exchange(self.pairs[self.other.pid])
        for _ in range(4):
            with dial_through(self.daemon.address, self.server.address) as sock:
                self.exchange(sock)
        assert self.other.pid in {row.pid for row in self.daemon.workers()}
        assert self.daemon.command("show").returncode == 0


@pytest.fixture
def two(start_forwarder: StartForwarder, request: pytest.FixtureRequest) -> Iterator[Two]:
    datapath = getattr(request, "param", "splice")
    with contextlib.ExitStack() as stack:
        yield Two(start_forwarder(CONFIG.replace("DATAPATH", datapath)), stack)


def serves(worker: Process) -> bool:
    """Whether it has given up what it has inherited of others: before that, no client's byte."""
    return bool(as_worker(worker, lambda fds: len(sequenced(fds)) == 2))


def send_everywhere(fds: Fds, data: bytes, descriptors: int) -> int:
    """A message on each of its channels; how many."""
    channels = sequenced(fds)
    given = [os.open(os.devnull, os.O_RDONLY) for _ in range(min(descriptors, 1))]
    for sock in channels:
        sock.settimeout(5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with contextlib.suppress(OSError):
            socket.send_fds(sock, [data], given * descriptors)
    return len(channels)


@pytest.mark.timeout(300)
def test_a_malformed_message_costs_its_sender_alone(two: Two) -> None:
    """Each kind on both of its channels, by one worker after the other."""
    for data, descriptors in MALFORMED.values():
        send = functools.partial(send_everywhere, data=data, descriptors=descriptors)
        assert as_worker(two.taken, send) == 2
        two.wait_until_replaced()
        two.exchange(two.pairs[two.other.pid])
        (two.taken,) = (one for one in two.daemon.workers() if one.pid != two.other.pid)
        wait_for(lambda: serves(two.taken), "its successor serves")
    two.nobody_noticed()


def test_a_flood_of_malformed_messages_costs_its_sender_alone(two: Two) -> None:
    def flood(fds: Fds) -> int:
        numbers = random.Random(5)
        sent = 0
        for sock in sequenced(fds):
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                for _ in range(5000):
                    sock.send(numbers.randbytes(numbers.randrange(1, 300)))
                    sent += 1
        return sent

    # Meanwhile nobody reads: the first message would be the end of its channels.
    with stopped(psutil.Process(two.pid)), stopped(keeper_of(two.daemon)):
        assert as_worker(two.taken, flood) > 100
    two.wait_until_replaced()
    # Requests that it left in the keeper's queue are not its successor's fault.
    two.nobody_noticed()
    wait_for(lambda: len(two.daemon.workers()) == 2, "both are there")
    workers = {worker.pid for worker in two.daemon.workers()}
    two.exchange(two.pairs[two.other.pid])
    assert {worker.pid for worker in two.daemon.workers()} == workers


def test_a_flood_of_permitted_messages_leaves_the_supervisor_its_time(two: Two) -> None:
    def flood(fds: Fds) -> int:
        sent = 0
        keeper = os.fstat(keeper_channel(fds).fileno()).st_ino
        deadline_s = time.monotonic() + 2
        with sockets_of(fds) as connected:
            ask = json.dumps({"ask": "enlarge", "number": 1}).encode()
            (channel,) = (
                sock for sock in sequenced(fds) if os.fstat(sock.fileno()).st_ino != keeper
            )
            channel.setblocking(False)
            while time.monotonic() < deadline_s:
                with contextlib.suppress(OSError):
                    socket.send_fds(channel, [ask], [connected[0].fileno()])
                    sent += 1
        return sent

    assert as_worker(two.taken, flood, two.daemon) > 100
    two.wait_until_left_alone()
    two.nobody_noticed()


def ask_keeper(sock: socket.socket, request: dict[str, Any], given: list[int]) -> dict[str, Any]:
    """The keeper's answer; {} if there is none."""
    sock.settimeout(2)
    words = {"n": 99, "until": time.monotonic() + 60, **request}
    socket.send_fds(sock, [json.dumps(words).encode()], given)
    with contextlib.suppress(OSError):
        while data := sock.recv(65536):
            answer = json.loads(data)
            if answer["n"] == 99:
                assert isinstance(answer, dict)
                return answer
    return {}


@pytest.mark.parametrize("do", ["mute", "leave", "reset"])
def test_the_keeper_mutes_no_socket_but_those_that_were_joined(two: Two, do: str) -> None:
    """TCP_REPAIR would let a worker forge what a connection has sent and received."""
    wait_for(
        lambda: {row["datapath"] for row in two.daemon.look()} == {"splice"}, "both are spliced"
    )

    numbers = [row["id"] for row in two.daemon.look()]

    def ask(fds: Fds) -> list[object]:
        keeper = keeper_channel(fds)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sock = socket.create_connection(listener.getsockname())
            peer, _ = listener.accept()
            found: list[object] = []
            places = itertools.product(reversed(range(100)), numbers)  # pairs have the first
            for index, number in places:
                request = {"do": do, "index": index, "id": number}
                answer = ask_keeper(keeper, request, [sock.fileno(), peer.fileno()])
                # Of one that is its own the keeper says nothing, but to the supervisor.
                found.append(answer.get("error", "none"))
                found += [one.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR) for one in (sock, peer)]
                if found[-3] == "none":
                    break
            return found

    said = as_worker(two.taken, ask, two.daemon)
    assert set(said) == {0, "none", NOT_YOURS}
    two.wait_until_replaced()
    two.nobody_noticed()


def test_the_channel_to_the_keeper_ends_with_its_worker(two: Two) -> None:
    """A process that got it from a worker hears nothing for the successor, and asks nothing."""

    def act(fds: Fds) -> list[object]:
        keeper = keeper_channel(fds)
        keeper.send(b"{")
        keeper.settimeout(DEADLINE_S)
        until_s = time.monotonic() + DEADLINE_S
        heard = 0
        while time.monotonic() < until_s:
            data = keeper.recv(65536)
            if not data:
                with contextlib.suppress(BrokenPipeError):
                    keeper.send(b"{}")
                    heard = -1
                return ["ended", heard]
            heard += json.loads(data)["n"] != 0  # that one is the mark
        return ["goes on", heard]

    taken = two.taken.pid
    assert as_worker(two.taken, act, two.daemon) == ["ended", 0]
    two.wait_until_replaced()
    two.daemon.wait_for_line("adopted .*pairs=")
    two.exchange(two.pairs[taken])
    two.nobody_noticed()


def in_another_network(keeper: socket.socket, slot: int) -> int:
    """Join two sockets of a network that users may make; 0: refused, 2: they may make none."""
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET):
        return 2
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
        request = {"do": "join", "id": 5, "slot": slot, "pending": [0, 0], "any_interface": 0}
        request["keepalive"] = [0, 0, 0]
        answer = ask_keeper(keeper, request, [one.fileno(), other.fileno()])
    return 0 if answer.get("refused") == PairReason.NOT_ELIGIBLE else 1


def test_the_keeper_takes_no_sockets_of_another_network(two: Two) -> None:
    """There a stranger can have any addresses, so those of another's pair."""

    def ask(fds: Fds, slot: int) -> object:
        keeper = keeper_channel(fds)
        child = os.fork()
        if not child:
            code = 3  # a fault of ours
            try:
                code = in_another_network(keeper, slot)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    # The first slot is one of the two workers'; for the other, asking for it is a fault.
    act = functools.partial(ask, slot=0)
    codes = [as_worker(worker, act, two.daemon) for worker in (two.taken, two.other)]
    assert 2 not in codes, "the sysctl user.max_user_namespaces must let users make namespaces"
    assert 3 not in codes
    assert 0 in codes


# ---------------------------------------------------------------------------- what it has


WITH_HELPERS: Final = """
upstreams: {checked: {servers: [127.0.0.1:9], health: {interval: 60s}}}
metrics: {bind: 127.0.0.1:0}
"""
# What each descriptor of a worker may be, and how many of each kind it has with two workers and
# every datapath (docs/security.md says what for).
OF_A_WORKER: Final = {
    "anon_inode:[eventpoll]": 1,
    "/proc/net/sockstat": 1,  # how much memory TCP has
    "bpf-map sockhash": 1,
    "bpf-map hash": 1,  # pf_owners
    "bpf-map ringbuf": 2,  # its own, of sockmap and of splice
}
OF_ANY_NUMBER: Final = {"/dev/null", "anon_inode:[eventfd]", "output", "socket"}
MAP_TYPES: Final = {
    "1": "hash",
    "2": "array",
    "12": "array of maps",
    "18": "sockhash",
    "27": "ringbuf",
}


def described(process: Process) -> dict[str, int]:
    """How many descriptors of each kind a process has."""
    found: dict[str, int] = {}
    for fd, kind in kinds(process.pid).items():
        name = kind.removeprefix("/").removesuffix(" (deleted)") if "memfd:" in kind else kind
        if kind == "anon_inode:bpf-map":
            try:
                info = Path(f"/proc/{process.pid}/fdinfo/{fd}").read_text()
            except FileNotFoundError:
                continue  # closed since it was listed
            map_type = next(line for line in info.splitlines() if line.startswith("map_type:"))
            number = map_type.split()[1]
            name = f"bpf-map {MAP_TYPES.get(number, number)}"
        elif kind.endswith("/net/sockstat"):
            name = "/proc/net/sockstat"
        elif kind.startswith(("pipe:", "/dev/pts")):
            name = "output"
        elif kind.startswith("socket:"):
            name = "socket"
        found[name] = found.get(name, 0) + 1
    return found


def has_started(process: Process) -> bool:
    """Metrics have what they listen on and a channel to the supervisor, checks have a channel."""
    return described(process)["socket"] <= 2


def test_a_process_that_reads_what_strangers_send_has_only_what_it_needs(
    start_forwarder: StartForwarder,
) -> None:
    daemon = start_forwarder(CONFIG.replace("DATAPATH", "auto") + WITH_HELPERS)
    children = wait_for(
        lambda: daemon.workers() if len(daemon.workers()) == 4 else [],
        "workers, metrics and health checks",
    )

    def with_maps() -> list[Process]:
        return [one for one in children if described(one).get("bpf-map sockhash")]

    # The others have given them up by then.
    wait_for(lambda: len(with_maps()) == 2, "two workers that have started")
    workers = with_maps()
    wait_for(lambda: all(map(serves, workers)), "they serve")
    for worker in workers:
        has = described(worker)
        counted = {name: count for name, count in has.items() if name not in OF_ANY_NUMBER}
        assert counted == OF_A_WORKER
        # The supervisor, the keeper, and one for each listener.
        assert has["socket"] == 2 + 1
        assert has["output"] <= 2
    for helper in children:
        if helper not in workers:
            wait_for(functools.partial(has_started, helper), "it has started")
            has = described(helper)
            assert {name for name in has if "bpf" in name or "memfd" in name} == set()
    for one in children:
        status = Path(f"/proc/{one.pid}/status").read_text()
        assert "\nSeccomp:\t2\n" in status
        assert "\nNoNewPrivs:\t1\n" in status
        assert "\nCapEff:\t0000000000000000\n" in status
        assert "\nGroups:\t \n" in status


@pytest.mark.parametrize("two", ["sockmap"], indirect=True)
def test_no_map_leads_to_another_worker_s_sockets(two: Two) -> None:
    """It empties all that it can reach: the other's pairs are not there."""
    wait_for(
        lambda: {row["datapath"] for row in two.daemon.look()} == {"sockmap"}, "both are in maps"
    )

    def act(fds: Fds) -> int:
        found = 0
        for fd in fds.values():
            if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:bpf-map":
                continue
            reached = bpf.Map(fd, key_bytes=8, value_bytes=8)
            with contextlib.suppress(OSError):  # a ring has no keys
                for key in reached.all_keys():
                    found += 1
                    reached.delete(key)
        return found

    # Each of its pairs has two sockets, in two maps.
    mine = as_worker(two.taken, act)
    assert mine % 4 == 0
    assert 4 <= mine <= 4 * (two.connections[two.taken.pid])
    two.nobody_noticed()
    assert as_worker(two.other, act) >= 4


def test_no_descriptor_leads_to_another_worker_s_records(two: Two) -> None:
    """A map's descriptor could be mapped as a whole; memory has none."""

    def act(fds: Fds) -> list[str]:
        found = []
        for fd in fds.values():
            for access in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
                with contextlib.suppress(OSError, ValueError):
                    mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, access).close()
                    found.append(os.readlink(f"/proc/self/fd/{fd}"))
        return found

    # Pages of rings are its own. A TCP socket's are what it has received.
    mapped = {name for name in as_worker(two.taken, act) if not name.startswith("socket:")}
    assert mapped <= {"anon_inode:bpf-map"}
    assert described(two.taken).get("bpf-map array", 0) == 0
    two.nobody_noticed()


# ------------------------------------------------------------------------- its memory


class Mapping(NamedTuple):
    """One line of /proc/PID/smaps that is shared with others, with the flags below it (proc(5))."""

    name: str
    place: tuple[str, int, int]  # file, and from where to where in it
    writable: bool
    may_become_writable: bool
    may_get_longer: bool


def shared_memory_of(process: Process) -> list[Mapping]:
    """What it shares with other processes: the maps' values and our files in memory."""
    found = []
    text = Path(f"/proc/{process.pid}/smaps").read_text()
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        addresses, access, offset, _, inode, *name = part.partition("\n")[0].split(maxsplit=5)
        if not access.endswith("s"):
            continue
        start, _, end = addresses.partition("-")
        begin = int(offset, 16)
        flags = part.rpartition("VmFlags:")[2].split()
        path = name[0] if name else ""
        if "bpf" not in path and "memfd" not in path and "/dev/zero" not in path:
            continue  # a library's table, which root alone may write
        place = (inode, begin, begin + int(end, 16) - int(start, 16))
        found.append(Mapping(path, place, "w" in access, "mw" in flags, "de" not in flags))
    return found


def test_what_a_worker_may_write_of_shared_memory_no_other_has(
    start_forwarder: StartForwarder,
) -> None:
    """Records, counters, limits, used tokens: its own for writing, those of others for reading."""
    daemon = start_forwarder(CONFIG.replace("DATAPATH", "auto") + WITH_HELPERS)
    children = wait_for(
        lambda: daemon.workers() if len(daemon.workers()) == 4 else [],
        "workers, metrics and health checks",
    )
    kept: dict[int, list[Mapping]] = {}

    def has_given_up_the_rest() -> bool:
        kept.update((one.pid, shared_memory_of(one)) for one in children)
        # As it was before, the keeper's pulse among it, which is anonymous.
        return not any("/dev/zero" in each.name for maps in kept.values() for each in maps)

    wait_for(has_given_up_the_rest, "all have started")
    written = {pid: [m for m in maps if m.writable] for pid, maps in kept.items()}
    workers = [pid for pid, maps in written.items() if maps]
    assert len(workers) == 2
    for pid in workers:
        files = sorted(m.name for m in written[pid] if "memfd" in m.name)
        assert files == [
            "/memfd:pyforwarder-ids (deleted)",
            "/memfd:pyforwarder-limits (deleted)",
            "/memfd:pyforwarder-pulse (deleted)",
            "/memfd:pyforwarder-tokens (deleted)",
        ]
    # The ring's page for the consumer is in two maps of the same file and place (anon_inode): what
    # is beyond the maps of values is told apart by the descriptors' test.
    arrays = {
        pid: {m.place for m in written[pid] if m.place[2] - m.place[1] > mmap.PAGESIZE}
        for pid in workers
    }
    first, second = arrays.values()
    assert len(first) == len(second) == 5  # records, counters, limits, tokens, ids
    assert first & second == set()
    for maps in kept.values():
        assert not [m for m in maps if not m.writable and m.may_become_writable]
        # A file of ours ends with the block.
        assert not [m for m in maps if m.may_get_longer and "memfd" not in m.name]

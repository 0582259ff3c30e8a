"""What the keeper of spliced pairs does when a step of its own fails: no pair is nobody's.

Where it is looked into it is a part of a process of the test's own, on maps of its own.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pyforwarder.core.reasons import CloseReason
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.datapath.proof.rig import Reader
from pyforwarder.datapath.splice import session_keeper
from pyforwarder.datapath.splice import sockets as splice_sockets
from pyforwarder.datapath.splice.abi import NO_SLOT, SPLICE_BYTES, Splice, SpliceState
from pyforwarder.datapath.splice.datapath import SpliceDatapath
from pyforwarder.datapath.splice.keeper import Keeper
from pyforwarder.datapath.splice.keeper_joining import Joining
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.pins import Found
from pyforwarder.datapath.splice.records import used_indexes
from pyforwarder.datapath.splice.session_abi import SESSION_BYTES, SessionRecord, SessionState
from tests.helpers.peers import ends_with_reset, pattern
from tests.helpers.stage import SLOTS, stage_with_keeper
from tests.helpers.waiting import DEADLINE_S

if TYPE_CHECKING:
    from pyforwarder.datapath.proof.rig import Rig
    from pyforwarder.datapath.sockmap.maps import KernelMaps

NUMBER = 42
INDEX = 3


class Own:
    """A keeper in this process, and the worker's end of its socket."""

    def __init__(self, maps: SpliceMaps, found: list[Found], stack: contextlib.ExitStack) -> None:
        self.worker, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        complaints = os.pipe2(os.O_NONBLOCK)
        for sock in (self.worker, end):
            stack.callback(sock.close)
        for fd in complaints:
            stack.callback(os.close, fd)
        self.complaints_fd = complaints[0]
        self.end = end
        pulse, cookies = (mmap.mmap(-1, mmap.PAGESIZE) for _ in range(2))
        self.renewals, renewals_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (self.renewals, renewals_end):
            stack.callback(sock.close)
            sock.setblocking(False)
        self.keeper = Keeper(maps, [[end]], found, pulse, cookies, complaints[1], renewals_end)
        self.worker.settimeout(DEADLINE_S)

    def ask(self, do: str) -> None:
        self.worker.send(json.dumps({"do": do, "n": 1, "until": time.monotonic() + 60}).encode())
        assert self.keeper._answer(0, select.POLLIN)

    def hear(self) -> tuple[dict[str, Any], list[int]]:
        data, fds, _, _ = socket.recv_fds(self.worker, 8192, 4)
        return json.loads(data), fds

    def fill(self) -> int:
        """The worker reads nothing, and its queue has no room for another answer."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self.end.send(b"{}" + b" " * 8000, socket.MSG_DONTWAIT)
                count += 1
        return count


def in_a_process(play: Callable[[], None]) -> None:
    """A keeper ends with its process, which closes what it has."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            play()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@contextlib.contextmanager
def own(
    maps: KernelMaps, found: list[Found], *, pair: SpliceState | None = None, session: bool = False
) -> Iterator[Own]:
    """The keeper that finds these records as it starts."""
    with contextlib.ExitStack() as stack:
        loaded = SpliceMaps.load(workers=1, slots=SLOTS, pairs_fd=maps.pairs_fd)
        stack.callback(loaded.close)
        if pair is not None:
            record = Splice()
            record.id, record.state, record.slot, record.family = NUMBER, pair, NO_SLOT, 4
            with contextlib.closing(
                bpf.map_memory(loaded.splices_fd, loaded.entries * SPLICE_BYTES, write=True)
            ) as memory:
                memory[INDEX * SPLICE_BYTES : (INDEX + 1) * SPLICE_BYTES] = bytes(record)
        if session:
            said = SessionRecord()
            said.id, said.state, said.slot, said.family = NUMBER, SessionState.ACTIVE, NO_SLOT, 4
            said.idle_ns, said.began_ns = 10**12, time.monotonic_ns()
            sessions = loaded.sessions
            with contextlib.closing(
                bpf.map_memory(sessions.sessions_fd, sessions.entries * SESSION_BYTES, write=True)
            ) as memory:
                memory[INDEX * SESSION_BYTES : (INDEX + 1) * SESSION_BYTES] = bytes(said)
        yield Own(loaded, found, stack)


@pytest.mark.parametrize("state", [SpliceState.RESET, SpliceState.ARMED, SpliceState.FREE])
def test_a_pair_that_has_ended_since_it_was_found_is_nobody_s_to_adopt(
    maps: KernelMaps, state: SpliceState
) -> None:
    """Its reset came between the look of the daemon and the start of its keeper."""

    def play() -> None:
        with own(maps, [Found(INDEX, NUMBER, b"")], pair=state) as play:
            play.ask("adopt")
            answer, fds = play.hear()
            assert (answer, fds) == ({"n": 1}, [])
            with pytest.raises(BlockingIOError):
                os.read(play.complaints_fd, 1)  # whom it would have replaced

    in_a_process(play)


@pytest.mark.parametrize("do", ["adopt", "adopt_session"])
def test_what_a_worker_could_not_be_given_is_given_when_it_asks_again(
    maps: KernelMaps, monkeypatch: pytest.MonkeyPatch, do: str
) -> None:
    """Its queue had no room: neither it nor its successor would have the pair before it dies."""

    def revived(*_: object) -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    monkeypatch.setattr(splice_sockets, "revive", revived)
    monkeypatch.setattr(session_keeper, "revive", revived)
    is_pair = do == "adopt"
    found = [Found(INDEX, NUMBER, b"")] if is_pair else []
    state = SpliceState.ACTIVE if is_pair else None

    def play() -> None:
        with own(maps, found, pair=state, session=not is_pair) as play:
            count = play.fill()
            play.ask(do)
            for _ in range(count):
                assert play.hear()[0] == {}
            play.ask(do)
            answer, fds = play.hear()
            assert (answer["index"], answer["id"]) == (INDEX, NUMBER)
            assert len(fds) == (2 if is_pair else 1)
            play.ask(do)
            assert play.hear() == ({"n": 1}, [])

    in_a_process(play)


@contextlib.contextmanager
def failing(maps: KernelMaps, name: str, patch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A stage whose keeper fails at the end of that step, the first time."""
    usual = getattr(Joining, name)
    calls = 0

    def fails(*words: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        answer = usual(*words, **named)
        if calls == 1:
            raise OSError(1, "made up")
        return answer

    with stage_with_keeper(maps, patch, Joining, name, fails) as rig:
        yield rig
        assert isinstance(rig.datapath, SpliceDatapath)
        assert rig.datapath._keeper.finish(DEADLINE_S)
        records = [
            Splice.from_buffer_copy(rig.datapath._memory, index * SPLICE_BYTES)
            for index in used_indexes(rig.datapath._memory)
        ]
        assert [one for one in records if one.id and one.state == SpliceState.ACTIVE] == []


def test_a_pair_that_has_begun_goes_on_though_its_sockets_could_not_be_made_mute(
    maps: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    with failing(maps, "mute", monkeypatch) as rig:
        client, pair, server = rig.connect()
        rig.copy(pair)
        client.sendall(b"first")
        assert rig.datapath.join(pair) is None
        assert pair.kind is DatapathKind.SPLICE
        data = pattern(100_003)
        readers = [Reader("client", client), Reader("server", server)]
        for sock in (client, server):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        rig.finish(pair, *readers)
        assert bytes(readers[0].data) == data
        assert bytes(readers[1].data) == b"first" + data
        assert pair.reason is None


def test_a_pair_that_has_begun_and_of_which_the_keeper_says_that_it_failed_is_reset(
    maps: KernelMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers listen in silence: only its sockets can tell them."""
    with failing(maps, "join", monkeypatch) as rig:
        client, pair, server = rig.connect()
        rig.copy(pair)
        assert rig.datapath.join(pair) is PairReason.REFUSED_BY_KERNEL
        assert pair.reason is CloseReason.INTERNAL
        assert isinstance(rig.datapath, SpliceDatapath)
        assert rig.datapath._keeper.finish(DEADLINE_S)
        rig.loop.run_once(0)
        for sock in (client, server):
            assert ends_with_reset(sock) == b""

"""What `show --json` says of redirected bytes that wait, by each way of asking the kernel."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import DatapathKind, Direction, PairRecord, PairState
from pyforwarder.datapath.ebpf.arrays import Arrays
from pyforwarder.datapath.ebpf.pair_table import PairTable, read_slots, slots_for
from pyforwarder.datapath.sockmap.maps import KernelMaps
from pyforwarder.runtime.socket_options import SO_COOKIE
from pyforwarder.supervisor.files import view_walks
from pyforwarder.supervisor.files.view_walks import KSYM, MAP, Walk
from pyforwarder.supervisor.files.views import View
from tests.helpers.netns import private_network
from tests.helpers.segments import sequence_numbers

SLOTS = slots_for(1)
SLOT = SLOTS + 3  # the second worker's
EACH = [
    pytest.param(MAP, id="sockets", marks=pytest.mark.needs("map iterators", "socket iterators")),
    pytest.param(KSYM, id="tcp"),
]
TCP_ONLY = (("backlog_of_tcp", "tcp_iterator"),)


class Asked:
    """One pair in the maps of a daemon that is not there, and a view that can be asked."""

    def __init__(self, walk: Walk, stack: ExitStack) -> None:
        self.arrays = Arrays.create(workers=2, slots=SLOTS)
        stack.callback(self.arrays.close)
        self.maps = KernelMaps.load(workers=2, slots=SLOTS, pairs_fd=self.arrays.pairs_fd)
        stack.callback(self.maps.close)
        self.windows = PairTable(workers=2, slots=SLOTS, fd=self.arrays.pairs_fd).windows
        self.view = View.load(self.arrays, self.maps, workers=2, slots=SLOTS, walks=[walk])
        stack.callback(self.view.close)
        self.server = self._server(stack)
        self.memory = self.windows[SLOT // SLOTS]
        at = SLOT % SLOTS * len(bytes(PairRecord()))
        self.record = PairRecord.from_buffer(self.memory, at)
        stack.callback(setattr, self, "record", None)
        self.record.state, self.record.datapath = PairState.JOINED, DatapathKind.SOCKMAP

    def _server(self, stack: ExitStack) -> socket.socket:
        """The pair's socket towards the server, in the maps."""
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server = stack.enter_context(socket.create_connection(listener.getsockname()))
        stack.enter_context(listener.accept()[0])
        cookie = server.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        owners = bpf.Map(self.maps.of[SLOT // SLOTS].owners_fd, key_bytes=8, value_bytes=8)
        end = (SLOT % SLOTS).to_bytes(4, "little") + int(Direction.DOWN).to_bytes(4, "little")
        owners.update(cookie, end)
        sockets = bpf.Map(self.maps.of[SLOT // SLOTS].sockets_fd, key_bytes=8, value_bytes=8)
        sockets.update(cookie, server.fileno().to_bytes(8, "little"))
        return server

    def redirect(self, redirected: int, taken: int) -> None:
        """As if the kernel had queued that many bytes to the server, and TCP had taken some."""
        seen = self.record.kernel[Direction.UP]
        seen.latch_redirected = 0
        write_seq, _ = sequence_numbers(self.server)
        seen.latch_write_seq = (write_seq - taken) & 0xFFFFFFFF
        seen.redirected_bytes = redirected

    def answer(self) -> int | None:
        """What `show --json` says."""
        backlogs = self.view.backlogs()
        ((slot, record),) = read_slots(self.memory)
        return backlogs.of(SLOT - SLOT % SLOTS + slot, record)


@pytest.fixture
def asked(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    if walk is KSYM:
        monkeypatch.setattr(view_walks, "_BACKLOGS", TCP_ONLY)
    with ExitStack() as stack:
        yield Asked(walk, stack)


@pytest.mark.parametrize("walk", EACH)
def test_backlog_is_what_tcp_has_not_taken(asked: Asked) -> None:
    assert asked.answer() == 0
    for redirected, taken, waiting in ((4711, 0, 4711), (4711, 4700, 11), (4711, 4711, 0)):
        asked.redirect(redirected, taken)
        assert asked.answer() == waiting
    # Userspace has written since, which it does once nothing waits.
    asked.redirect(4711, 5000)
    assert asked.answer() == 0
    # The counter has more than the 32 bits of sequence numbers.
    asked.redirect(2**40 + 23, 0)
    assert asked.answer() == 23


@pytest.mark.parametrize("walk", [KSYM])
def test_socket_of_another_namespace_is_not_said_to_have_none(asked: Asked) -> None:
    asked.redirect(4711, 0)
    with private_network():
        assert asked.answer() is None


def test_view_without_a_backlog_says_that_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_walks, "_BACKLOGS", ())
    with ExitStack() as stack:
        asked = Asked(KSYM, stack)
        asked.redirect(4711, 0)
        assert asked.answer() is None
        asked.record.datapath = DatapathKind.COPY
        assert asked.answer() == 0

"""What a worker writes into its maps of sockmap concerns no pair of another worker."""

from __future__ import annotations

import _socket
import socket
from collections.abc import Iterator

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, Direction
from pyforwarder.datapath.ebpf.pair_table import PairWindow
from pyforwarder.datapath.proof.rig import Rig, loopback_pair
from pyforwarder.datapath.proof.scenarios import bytes_of
from pyforwarder.datapath.sockmap.maps import KernelMaps
from pyforwarder.runtime.socket_options import SO_COOKIE
from tests.helpers.peers import read_exactly
from tests.helpers.stage import SLOTS
from tests.helpers.waiting import wait_for

WINDOW_BYTES = SLOTS * PAIR_BYTES


class Workers:
    """Two workers' datapaths over the maps of one daemon, each with its window."""

    def __init__(self) -> None:
        self.maps = KernelMaps.load(workers=2, slots=SLOTS)
        self.memory = [
            bpf.map_memory(
                self.maps.pairs_fd, WINDOW_BYTES, offset_bytes=n * WINDOW_BYTES, write=True
            )
            for n in range(2)
        ]
        self.windows = [
            PairWindow(memory, first_slot=n * SLOTS, worker_index=n)
            for n, memory in enumerate(self.memory)
        ]
        self.rigs = [Rig(window) for window in self.windows]
        self.datapaths = [
            self.maps.datapath(rig, window, n)
            for n, (rig, window) in enumerate(zip(self.rigs, self.windows, strict=True))
        ]
        for rig, datapath in zip(self.rigs, self.datapaths, strict=True):
            rig.datapath = datapath

    def records(self, worker: int) -> bytes:
        return self.memory[worker][:WINDOW_BYTES]

    def ends_of(self, worker: int) -> bpf.Map:
        return bpf.Map(self.maps.of[worker].owners_fd, key_bytes=8, value_bytes=8)

    def sockets_of(self, worker: int) -> bpf.Map:
        return bpf.Map(self.maps.of[worker].sockets_fd, key_bytes=8, value_bytes=8)

    def close(self) -> None:
        for rig in self.rigs:
            rig.close()
        for datapath in self.datapaths:
            datapath._ring.close()
        for window in self.windows:
            window.close()
        self.maps.close()


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


def cookie_of(sock: _socket.socket) -> bytes:
    cookie = sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
    assert isinstance(cookie, bytes)
    return cookie


@pytest.mark.parametrize("slot", [SLOTS, SLOTS + 1, 0xFFFFFFFF, 0x100000000 - SLOTS])
def test_a_slot_of_another_worker_is_none(workers: Workers, slot: int) -> None:
    """Its packets are left to the socket's reader, and nothing is written anywhere."""
    rig = workers.rigs[0]
    client, pair, server = rig.connect()
    rig.join(pair)
    del server
    before = workers.records(0), workers.records(1)
    end = (slot & 0xFFFFFFFF).to_bytes(4, "little") + int(Direction.UP).to_bytes(4, "little")
    assert pair.client is not None
    workers.ends_of(0).update(cookie_of(pair.client), end)
    client.sendall(bytes_of(1000, 1))
    read = bytearray()

    def has_read() -> bool:
        assert pair.client is not None
        try:
            read.extend(pair.client.recv(2000))
        except BlockingIOError:
            return False
        return len(read) == 1000

    wait_for(has_read, "the socket's owner reads it")
    assert read == bytes_of(1000, 1)
    assert (workers.records(0), workers.records(1)) == before


def test_a_pair_is_not_changed_by_what_another_worker_says_of_its_sockets(
    workers: Workers,
) -> None:
    """Not even by one that knows their cookies: they lead into its own window and sockhash."""
    client, pair, server = workers.rigs[0].connect()
    workers.rigs[0].join(pair)
    assert pair.client is not None
    assert pair.server is not None
    own = loopback_pair()
    for sock, direction in ((pair.client, Direction.UP), (pair.server, Direction.DOWN)):
        end = (0).to_bytes(4, "little") + int(direction).to_bytes(4, "little")
        workers.ends_of(1).update(cookie_of(sock), end)
        with pytest.raises(FileNotFoundError):
            workers.sockets_of(1).delete(cookie_of(sock))
        # A socket is in one sockhash with a program, and in no other.
        with pytest.raises(OSError, match="busy"):
            workers.sockets_of(1).update(cookie_of(sock), sock.fileno().to_bytes(8, "little"))
        fd = own[direction].fileno()
        workers.sockets_of(1).update(cookie_of(sock), fd.to_bytes(8, "little"))
    before = workers.records(1)
    for sender, receiver in ((client, server), (server, client)):
        sender.sendall(bytes_of(50_000, 2))
        receiver.settimeout(10)
        assert read_exactly(receiver, 50_000) == bytes_of(50_000, 2)
    assert workers.records(1) == before
    for one in own:
        one.close()


def test_forgetting_one_worker_leaves_the_pairs_of_another(workers: Workers) -> None:
    client, pair, server = workers.rigs[0].connect()
    workers.rigs[0].join(pair)
    _, others, _ = workers.rigs[1].connect()
    workers.rigs[1].join(others)
    workers.maps.forget_worker(1)
    assert workers.ends_of(1).all_keys() == []
    assert len(workers.ends_of(0).all_keys()) == 2
    client.sendall(b"request")
    server.settimeout(10)
    assert read_exactly(server, 7) == b"request"

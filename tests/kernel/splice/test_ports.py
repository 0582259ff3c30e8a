"""Packets are looked for among those of pairs if their port of ours is marked, and only then."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.arrays import create_pairs
from pyforwarder.datapath.splice.abi import SPLICE_BYTES, Splice, SplicePorts, SpliceState
from pyforwarder.datapath.splice.maps import Programs, SpliceMaps
from pyforwarder.datapath.splice.our_ports import make_our_ports
from pyforwarder.datapath.splice.records import FLOW, KEY_BYTES
from tests.helpers.stage import SLOTS

PEER: Final = {4: "192.0.2.1", 6: "2001:db8::1"}
OURS: Final = {4: "192.0.2.2", 6: "2001:db8::2"}
PEERS_PORT: Final = 1000
NEXT, DROP = -1, 2
ACK, FIN_ACK = 0x10, 0x11
# Neither is the other in another order of bytes, nor is one of them marked by mistake for another.
PORTS: Final = (1, 443, 0x1234, 0xFFFE, 0xFFFF)


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def packet(version: int, source: tuple[str, int], target: tuple[str, int], flags: int) -> bytes:
    """Without options, and with a checksum that is not right."""
    tcp = struct.pack("!HHIIBBHHH", source[1], target[1], 7, 9, 5 << 4, flags, 100, 1, 0)
    addresses = packed(source[0]) + packed(target[0])
    if version == 4:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0)
        words = struct.unpack("!10H", ip + addresses)
        total = sum(words)
        ip = ip[:-2] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)
    else:
        ip = struct.pack("!IHBB", 6 << 28, 20, socket.IPPROTO_TCP, 64)
    kind = {4: 0x0800, 6: 0x86DD}[version]
    return bytes(12) + struct.pack("!H", kind) + ip + addresses + tcp


class Host:
    """Programs that are attached nowhere, and one pair that is spliced, as its flows say."""

    def __init__(self, maps: SpliceMaps, programs: Programs) -> None:
        self._maps = maps
        self._programs = programs
        self._ports = bpf.map_memory(maps.our_ports_fd, ctypes.sizeof(SplicePorts), write=True)
        self.ports = SplicePorts.from_buffer(self._ports)
        self._splices = bpf.map_memory(maps.splices_fd, SPLICE_BYTES, write=True)
        self._flows = bpf.Map(maps.flows_fd, key_bytes=KEY_BYTES, value_bytes=FLOW.size)

    def mark_all(self) -> None:
        for port in self.ports.port:
            port.kept = 1

    def unmark_all(self) -> None:
        ctypes.memset(ctypes.addressof(self.ports), 0, ctypes.sizeof(self.ports))

    def splice(self, version: int, port: int) -> None:
        """A peer has a pair's connection to this port."""
        prefix = bytes(10) + b"\xff\xff" if version == 4 else b""
        key = b"".join(prefix + packed(each[version]) for each in (PEER, OURS))
        key += struct.pack("!HH", PEERS_PORT, port)
        record = Splice.from_buffer(self._splices)
        record.state, record.id, record.family = SpliceState.ACTIVE, 1, version
        ctypes.memmove(ctypes.addressof(record.direction[0].from_), key, KEY_BYTES)
        self._flows.update(key, FLOW.pack(0, 0))

    def forget(self) -> None:
        """As it was before."""
        for key in self._flows.all_keys():
            self._flows.delete(key)
        Splice.from_buffer(self._splices).state = SpliceState.FREE

    def comes(self, version: int, port: int) -> int:
        """What `ingress` does with a packet of the peer's, which a pair does not believe."""
        said = packet(version, (PEER[version], PEERS_PORT), (OURS[version], port), ACK)
        return verdict(bpf.run_program(self._programs.ingress, said))

    def leaves(self, version: int, port: int) -> int:
        """And `egress` with the end that our socket says, where the peer says it itself."""
        said = packet(version, (OURS[version], port), (PEER[version], PEERS_PORT), FIN_ACK)
        return verdict(bpf.run_program(self._programs.egress, said))


def verdict(said: int) -> int:
    return ctypes.c_int32(said).value


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[SpliceMaps, Programs]]:
    with contextlib.ExitStack() as opened:
        pairs_fd = create_pairs(SLOTS)
        opened.callback(os.close, pairs_fd)
        maps = SpliceMaps.create(workers=1, slots=SLOTS, pairs_fd=pairs_fd)
        opened.callback(maps.close)
        programs = maps.load_programs()
        for fd in programs:
            opened.callback(os.close, fd)
        yield maps, programs


@pytest.fixture
def host(loaded: tuple[SpliceMaps, Programs]) -> Iterator[Host]:
    host = Host(*loaded)
    yield host
    host.forget()


def test_before_a_keeper_has_begun_all_ports_are_marked() -> None:
    fd = make_our_ports()
    with mmap.mmap(fd, ctypes.sizeof(SplicePorts)) as memory:
        assert all(port.kept for port in SplicePorts.from_buffer_copy(memory).port)
    os.close(fd)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("port", PORTS)
def test_a_packet_is_of_no_pair_without_a_flow(host: Host, version: int, port: int) -> None:
    host.mark_all()
    assert (host.comes(version, port), host.leaves(version, port)) == (NEXT, NEXT)
    host.splice(version, port)
    assert (host.comes(version, port), host.leaves(version, port)) == (DROP, DROP)


@pytest.mark.parametrize("who", ["kept", "opened"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("port", PORTS)
def test_a_pair_is_found_by_the_mark_of_its_port_alone(
    host: Host, version: int, port: int, who: str
) -> None:
    host.splice(version, port)
    for other in (*PORTS, socket.htons(port)):
        host.unmark_all()
        setattr(host.ports.port[other], who, 1)
        found = DROP if other == port else NEXT
        assert (host.comes(version, port), host.leaves(version, port)) == (found, found)

"""How connections began: what the programs of splice write down, and the keeper finds."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.splice.abi import HANDSHAKE_SETS, HANDSHAKES_PER_SET
from pyforwarder.datapath.splice.handshakes import (
    Handshakes,
    is_handshakes,
    make_handshakes,
)
from pyforwarder.datapath.splice.maps import SpliceMaps
from tests.helpers.stage import SLOTS

LOOPBACK: Final = 1  # by which BPF_PROG_TEST_RUN has its packets come
ADDRESSES: Final = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10


class Seen:
    """The program `ingress`, which is attached nowhere, and what it has seen."""

    def __init__(self, maps: SpliceMaps, ingress: int) -> None:
        self._ingress = ingress
        self._handshakes = Handshakes(maps.handshakes_fd)

    def send(self, version: int, port: int, isn: int, flags: int = SYN) -> None:
        """A packet without options from this port."""
        tcp = struct.pack("!HHIIBBHHH", port, 443, isn, 0, 5 << 4, flags, 0, 0, 0)
        addresses = b"".join(map(packed, ADDRESSES[version]))
        if version == 4:
            ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0)
        else:
            ip = struct.pack("!IHBB", 6 << 28, 20, socket.IPPROTO_TCP, 64)
        kind = {4: 0x0800, 6: 0x86DD}[version]
        bpf.run_program(self._ingress, bytes(12) + struct.pack("!H", kind) + ip + addresses + tcp)

    def find(self, version: int, port: int) -> dict[int, int]:
        """What is known of connections from this port: ISN -> interface."""
        prefix = bytes(10) + b"\xff\xff" if version == 4 else b""
        key = b"".join(prefix + packed(address) for address in ADDRESSES[version])
        return self._handshakes.find(key + struct.pack("!HH", port, 443))


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


@pytest.fixture
def seen() -> Iterator[Seen]:
    with contextlib.ExitStack() as opened:
        pairs_fd = bpf.create_map(
            bpf.MapType.ARRAY,
            key_bytes=4,
            value_bytes=PAIR_BYTES,
            entries=SLOTS,
            flags=bpf.F_MMAPABLE,
        )
        opened.callback(os.close, pairs_fd)
        maps = SpliceMaps.create(workers=1, slots=SLOTS, pairs_fd=pairs_fd)
        opened.callback(maps.close)
        programs = maps.load_programs()
        for fd in programs:
            opened.callback(os.close, fd)
        yield Seen(maps, programs.ingress)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("flags", [SYN, SYN_ACK])
def test_a_handshake_is_found_by_its_addresses(seen: Seen, version: int, flags: int) -> None:
    assert seen.find(version, 1000) == {}
    seen.send(version, 1000, 0xFEDCBA98, flags)
    seen.send(version, 1001, 77, ACK)
    assert seen.find(version, 1000) == {0xFEDCBA98: LOOPBACK}
    assert seen.find(version, 1001) == {}


@pytest.mark.parametrize("version", [4, 6])
def test_the_last_four_of_some_addresses_are_known(seen: Seen, version: int) -> None:
    """SYNs in its peer's name do not hide a connection, as long as they are no more than three."""
    for isn in (1, 2, 3):
        seen.send(version, 1000, isn)
        seen.send(version, 1000, 1)  # a second time
    seen.send(version, 1000, 4)
    assert seen.find(version, 1000) == dict.fromkeys((1, 2, 3, 4), LOOPBACK)
    seen.send(version, 1000, 5)
    assert seen.find(version, 1000) == dict.fromkeys((2, 3, 4, 5), LOOPBACK)


def test_the_last_thousands_are_known(seen: Seen) -> None:
    """Of half as many as there is room for hardly any is pushed out by others."""
    count = HANDSHAKE_SETS * HANDSHAKES_PER_SET // 2
    for port in range(1, count + 1):
        seen.send(4, port, port)
    found = sum(seen.find(4, port) == {port: LOOPBACK} for port in range(1, count + 1))
    # Two to a set on the average: more than four are in 5 % of all sets (Poisson).
    assert found > 0.9 * count


def test_each_map_has_secrets_of_its_own() -> None:
    with contextlib.ExitStack() as opened:
        secrets = set()
        for _ in range(7):
            fd = make_handshakes()
            opened.callback(os.close, fd)
            assert is_handshakes(fd)
            secrets.add(bpf.Map(fd, key_bytes=4, value_bytes=64).lookup(bytes(4)))
        assert len(secrets) == 7


def test_a_map_of_another_version_is_not_taken_for_one() -> None:
    """As it was once: a hash of addresses."""
    fd = bpf.create_map(bpf.MapType.LRU_HASH, key_bytes=36, value_bytes=8, entries=1 << 15)
    try:
        assert not is_handshakes(fd)
    finally:
        os.close(fd)

"""A bad network, of a test's making: see faults.c."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.loading import load_programs
from tests.helpers.first_program import first_at

if TYPE_CHECKING:
    from tests.helpers.netns import Network

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
ACK: Final = 0x10
_OF: Final = 1 << 16


class Action(enum.IntEnum):
    """What happens to a packet; mirrors `enum action`."""

    PASS = 0
    LOSE = 1
    DUPLICATE = 2
    DELAY = 3
    MARK = 4


class _Record(ctypes.Structure):
    """Mirrors `struct faults`."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("lose", ctypes.c_uint32),
        ("duplicate", ctypes.c_uint32),
        ("delay", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("rounds", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("least_bytes", ctypes.c_uint32),
        ("source", ctypes.c_uint32),
        ("marked", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("matched", ctypes.c_uint64),
        ("lost", ctypes.c_uint64),
        ("duplicated", ctypes.c_uint64),
        ("delayed", ctypes.c_uint64),
    )


class Faults:
    """One set of rules, and one count of packets, for all interfaces that it is put on."""

    def __init__(self) -> None:
        self._faults_fd = bpf.create_map(
            bpf.MapType.ARRAY, key_bytes=4, value_bytes=ctypes.sizeof(_Record), entries=1
        )
        self._exact_fd = bpf.create_map(bpf.MapType.HASH, key_bytes=4, value_bytes=4, entries=4096)
        self._faults = bpf.Map(self._faults_fd, key_bytes=4, value_bytes=ctypes.sizeof(_Record))
        self._exact = bpf.Map(self._exact_fd, key_bytes=4, value_bytes=4)
        (self._program_fd,) = load_programs(
            str(Path(__file__).with_name("faults.c")),
            [("judge", "sched_cls")],
            defines={},
            maps={"MAP_FAULTS_FD": self._faults_fd, "MAP_EXACT_FD": self._exact_fd},
        )

    @contextlib.contextmanager
    def put_on(self, *doors: tuple[Network, str]) -> Iterator[None]:
        """Judge what comes in there meanwhile, ahead of all that is linked there besides."""
        with first_at(self._program_fd, *((*door, "in") for door in doors)):
            yield

    def set(
        self,
        *,
        seed: int = 0,
        lose: float = 0.0,
        duplicate: float = 0.0,
        delay: float = 0.0,
        mark: float = 0.0,
        rounds: int = 40,
        flags: int = 0,
        least_bytes: int = 0,
        source: str = "",
        marked: bool = False,
        exact: Mapping[int, Action] | None = None,
    ) -> None:
        """Begin to count anew, and do this.

        `lose`, `duplicate`, `delay` and `mark` (ECN) are shares of all packets that match: of TCP,
        with one of the `flags` if any, with at least so many bytes of data, from an address; with
        `marked` only copies that the host has made for itself.
        `exact` says it for packets by their number, from 1.
        """
        for key in self._exact.all_keys():
            self._exact.delete(key)
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        packed = socket.inet_pton(family, source)[-4:] if source else bytes(4)
        record = _Record(
            seed=seed,
            lose=round(lose * _OF),
            duplicate=round(duplicate * _OF),
            delay=round(delay * _OF),
            mark=round(mark * _OF),
            rounds=rounds,
            flags=flags,
            least_bytes=least_bytes,
            source=int.from_bytes(packed, "little"),
            marked=int(marked),
        )
        self._faults.update(bytes(4), bytes(record))
        for number, action in (exact or {}).items():
            self._exact.update(number.to_bytes(4, "little"), int(action).to_bytes(4, "little"))

    def counts(self) -> dict[str, int]:
        """How many packets matched, and what became of them."""
        record = _Record.from_buffer_copy(self._faults.lookup(bytes(4)))
        return {
            name: getattr(record, name) for name in ("matched", "lost", "duplicated", "delayed")
        }

    def close(self) -> None:
        """The network is a good one again."""
        for fd in (self._program_fd, self._faults_fd, self._exact_fd):
            os.close(fd)


@contextlib.contextmanager
def faults() -> Iterator[Faults]:
    """Faults until the end of the block."""
    with contextlib.closing(Faults()) as made:
        yield made

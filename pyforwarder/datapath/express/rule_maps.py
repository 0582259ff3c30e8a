"""The maps of the program that decides by the rules, and the tables in them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder.core.express.request_grammar import MOST_STATES
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.loading import load_programs
from pyforwarder.datapath.express import abi
from pyforwarder.datapath.express.tables import Encoded, encode, grammar

if TYPE_CHECKING:
    from pyforwarder.core.express.table import Table

MOST_NAMES: Final = 1 << 16
MOST_NETWORKS: Final = 1 << 14
# struct express_scratch: the bytes, a key, and some numbers.
_SCRATCH_BYTES: Final = (
    4096
    + 64
    + ctypes.sizeof(abi.NameKey)
    + 8 * (3 + abi.WORDS)
    + 4 * (3 + 32 + 5 + 2 * MOST_STATES)
)
_BITS: Final = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class _Room:
    kind: bpf.MapType
    key_bytes: int
    value_bytes: int
    entries: int
    flags: int = 0


class Tables:
    """The maps of tables of rules, by number; closed by `close`."""

    def __init__(self, count: int) -> None:
        """Create the maps.

        Raises:
            OSError: the kernel refuses.
        """
        names, networks = ctypes.sizeof(abi.NameKey), ctypes.sizeof(abi.NetworkKey)
        trie, sparse = bpf.MapType.LPM_TRIE, bpf.F_NO_PREALLOC
        rooms = {
            "tables": _Room(bpf.MapType.ARRAY, 4, ctypes.sizeof(abi.Table), count),
            "grammar": _Room(bpf.MapType.ARRAY, 4, ctypes.sizeof(abi.Grammar), 1),
            "scratch": _Room(bpf.MapType.PERCPU_ARRAY, 4, _SCRATCH_BYTES + -_SCRATCH_BYTES % 8, 1),
            "names": _Room(trie, names, 8, MOST_NAMES, sparse),
            "networks": _Room(trie, networks, 8, MOST_NETWORKS, sparse),
        }
        self._opened = contextlib.ExitStack()
        self._fds: dict[str, int] = {}
        self._maps: dict[str, bpf.Map] = {}
        with contextlib.ExitStack() as opened:
            for name, room in rooms.items():
                fd = bpf.create_map(
                    room.kind,
                    key_bytes=room.key_bytes,
                    value_bytes=room.value_bytes,
                    entries=room.entries,
                    flags=room.flags,
                    name=f"pf_ex_{name}",
                )
                opened.callback(os.close, fd)
                self._fds[name] = fd
                self._maps[name] = bpf.Map(
                    fd, key_bytes=room.key_bytes, value_bytes=room.value_bytes
                )
            self._opened = opened.pop_all()
        self._maps["grammar"].update(bytes(4), grammar())
        self._written: dict[int, Encoded] = {}

    def close(self) -> None:
        """Close the maps; loaded programs keep those that they use."""
        self._opened.close()

    def load(self) -> int:
        """The descriptor of the program `judge`; the caller closes it.

        Raises:
            LoadError: it does not compile, or the kernel refuses it.
        """
        (fd,) = load_programs("express.c", [("judge", "sched_cls")], defines={}, maps=self.maps)
        return fd

    @property
    def maps(self) -> dict[str, int]:
        """The descriptors, by the macros for them in the programs."""
        return {f"MAP_EXPRESS_{name.upper()}_FD": fd for name, fd in self._fds.items()}

    def write(self, number: int, table: Table) -> None:
        """Write a table at this number, which replaces the one that is there.

        A program that runs meanwhile may see parts of both. Where the program is attached, give a
        new table a new number.

        Raises:
            OSError: there is no room.
        """
        self.forget(number)
        encoded = encode(table, number)
        names = sum(len(one.names) for one in self._written.values()) + len(encoded.names)
        networks = sum(len(one.networks) for one in self._written.values()) + len(encoded.networks)
        if names > MOST_NAMES or networks > MOST_NETWORKS:
            # Checked before thousands of entries are written.
            raise OSError(errno.ENOSPC, "no room for its names")
        self._written[number] = encoded
        for name, entries in (("names", encoded.names), ("networks", encoded.networks)):
            for key, bits in entries.items():
                self._maps[name].update(key, _BITS.pack(bits))
        self._maps["tables"].update(struct.pack("=I", number), encoded.record)

    def forget(self, number: int) -> None:
        """Delete a table: from then on its number decides nothing."""
        self._maps["tables"].update(struct.pack("=I", number), bytes(ctypes.sizeof(abi.Table)))
        encoded = self._written.pop(number, None)
        if encoded is None:
            return
        for name, entries in (("names", encoded.names), ("networks", encoded.networks)):
            for key in entries:
                with contextlib.suppress(FileNotFoundError):
                    self._maps[name].delete(key)

"""What the sockmap datapath keeps in the kernel: made by the supervisor, inherited by workers.

Needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (or root); using the maps afterwards needs nothing.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath import bpf, btf
from pyforwarder.datapath.abi import PAIR_BYTES, End, Wakeup
from pyforwarder.datapath.loading import load_programs
from pyforwarder.datapath.ringbuf import RingBuffer
from pyforwarder.datapath.sockmap import SockmapDatapath
from pyforwarder.datapath.table import SLOTS_PER_PAGE, PairWindow
from pyforwarder.errors import DatapathError, LoadError

if TYPE_CHECKING:
    from pyforwarder.datapath.base import PairHost

# struct bpf_ringbuf_hdr is 8 bytes; each record is rounded up to 8.
_RING_RECORD_BYTES: Final = 8 + 16
assert Wakeup.id.offset + Wakeup.id.size + 8 == _RING_RECORD_BYTES

# Kernel structure fields that the programs read.
FIELDS: Final = {
    "tcp_sock": ("write_seq", "copied_seq"),
    "sock": ("sk_wmem_queued", "sk_sndbuf"),
}


def slots_for(pairs: int) -> int:
    """A window's size in slots for that many pairs: whole pages."""
    return -(-pairs // SLOTS_PER_PAGE) * SLOTS_PER_PAGE


class PairTable:
    """The whole pair table, as the supervisor has it: one window per worker."""

    def __init__(self, *, workers: int, slots: int, fd: int = -1) -> None:
        """Over the mmapable array `fd`, or over anonymous shared memory."""
        self.slots = slots
        length = slots * PAIR_BYTES
        if fd < 0:
            self.windows = [mmap.mmap(-1, length) for _ in range(workers)]
        else:
            self.windows = [
                bpf.map_memory(fd, length, offset_bytes=worker * length, write=True)
                for worker in range(workers)
            ]

    def take_window(self, worker: int) -> PairWindow:
        """In the worker: its own window, emptied; the others are unmapped."""
        for other, memory in enumerate(self.windows):
            if other != worker:
                memory.close()
        return PairWindow(self.windows[worker], first_slot=worker * self.slots, worker_index=worker)


@dataclass(frozen=True, slots=True)
class KernelMaps:
    """Descriptors of the maps and the attached program, which live as long as they are open."""

    sockets_fd: int
    ends_fd: int
    pairs_fd: int
    rings_fd: int
    ring_fds: tuple[int, ...]  # one per worker
    ring_bytes: int
    program_fd: int
    owns_pairs: bool

    @classmethod
    def load(cls, *, workers: int, slots: int, pairs_fd: int = -1) -> KernelMaps:
        """Make the maps, load the verdict program and attach it.

        `pairs_fd` is an array of workers * slots records that stays the caller's; without it, one
        is made.

        Raises:
            LoadError: this host cannot; the message says why and what would help.
        """
        defines = btf.defines(btf.field_offsets(FIELDS))
        opened: list[int] = []

        def create(kind: bpf.MapType, name: str, **sizes: int) -> int:
            try:
                fd = bpf.create_map(kind, name=name, **sizes)
            except OSError as error:
                raise LoadError(
                    f"create the BPF map {name}: {error.strerror}",
                    advice="run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
                ) from error
            opened.append(fd)
            return fd

        total = workers * slots
        ring_bytes = mmap.PAGESIZE
        while ring_bytes < 2 * slots * _RING_RECORD_BYTES:
            ring_bytes *= 2
        try:
            sockets = create(
                bpf.MapType.SOCKHASH, "pf_sockets", key_bytes=8, value_bytes=8, entries=2 * total
            )
            ends = create(
                bpf.MapType.HASH,
                "pf_ends",
                key_bytes=8,
                value_bytes=_size(End),
                entries=2 * total,
                flags=bpf.F_NO_PREALLOC,
            )
            pairs = pairs_fd
            if pairs < 0:
                pairs = create(
                    bpf.MapType.ARRAY,
                    "pf_pairs",
                    key_bytes=4,
                    value_bytes=PAIR_BYTES,
                    entries=total,
                    flags=bpf.F_MMAPABLE,
                )
            ring_fds = tuple(
                create(
                    bpf.MapType.RINGBUF, "pf_ring", key_bytes=0, value_bytes=0, entries=ring_bytes
                )
                for _ in range(workers)
            )
            rings = create(
                bpf.MapType.ARRAY_OF_MAPS,
                "pf_rings",
                key_bytes=4,
                value_bytes=4,
                entries=workers,
                inner_map_fd=ring_fds[0],
            )
            table = bpf.Map(rings, key_bytes=4, value_bytes=4)
            for worker, ring_fd in enumerate(ring_fds):
                table.update(worker.to_bytes(4, "little"), ring_fd.to_bytes(4, "little"))
            fds = {
                "MAP_SOCKETS_FD": sockets,
                "MAP_ENDS_FD": ends,
                "MAP_PAIRS_FD": pairs,
                "MAP_RINGS_FD": rings,
            }
            (program,) = load_programs(
                "redirect.c",
                [("verdict", "sk_skb")],
                defines={**defines, **fds},
                map_fds=list(fds.values()),
            )
            opened.append(program)
            try:
                bpf.attach(program, sockets, bpf.AttachType.SK_SKB_STREAM_VERDICT)
            except OSError as error:
                raise LoadError(f"attach the verdict program: {error.strerror}") from error
        except (LoadError, OSError) as error:
            for fd in opened:
                os.close(fd)
            if isinstance(error, LoadError):
                raise
            raise LoadError(f"fill the BPF maps: {error.strerror}") from error
        return cls(
            sockets, ends, pairs, rings, ring_fds, ring_bytes, program, owns_pairs=pairs_fd < 0
        )

    def datapath(self, host: PairHost, window: PairWindow, worker: int) -> SockmapDatapath:
        """In the worker: the datapath over its window and its ring."""
        return SockmapDatapath(
            host,
            window=window,
            sockets=bpf.Map(self.sockets_fd, key_bytes=8, value_bytes=8),
            ends=bpf.Map(self.ends_fd, key_bytes=8, value_bytes=_size(End)),
            ring=RingBuffer(self.ring_fds[worker], self.ring_bytes),
            limit_bytes=1 << 20,
        )

    def forget_worker(self, worker: int, slots: int) -> None:
        """A worker died: its sockets left the sockhash by themselves, `ends` is cleaned here."""
        ends = bpf.Map(self.ends_fd, key_bytes=8, value_bytes=_size(End))
        for cookie in ends.all_keys():
            try:
                slot = int.from_bytes(ends.lookup(cookie)[:4], "little")
                if slot // slots == worker:
                    ends.delete(cookie)
            except FileNotFoundError:
                continue  # another worker's pair ended meanwhile
            except OSError as error:
                raise DatapathError("clean the map pf_ends", error.errno or 0) from error

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (
            self.sockets_fd,
            self.ends_fd,
            self.rings_fd,
            self.program_fd,
            *self.ring_fds,
            *((self.pairs_fd,) if self.owns_pairs else ()),
        ):
            os.close(fd)


def _size(structure: type[End]) -> int:
    import ctypes

    return ctypes.sizeof(structure)

"""What the sockmap datapath keeps in the kernel: made by the supervisor, inherited by workers.

Needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (or root); using the maps afterwards needs nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import btf, refusal
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, SocketOwner, Wakeup
from pyforwarder.datapath.ebpf.loading import Copy, load_copies
from pyforwarder.datapath.ebpf.ringbuf import RingBuffer
from pyforwarder.datapath.sockmap.datapath import SockmapDatapath
from pyforwarder.errors import DatapathError, LoadError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyforwarder.datapath.base import PairHost
    from pyforwarder.datapath.ebpf.pair_table import PairWindow

# struct bpf_ringbuf_hdr is 8 bytes; each record is rounded up to 8.
_RING_RECORD_BYTES: Final = 8 + 16
assert Wakeup.id.offset + Wakeup.id.size + 8 == _RING_RECORD_BYTES

# Of a worker, in the order of `WorkerMaps`.
_MAP_NAMES: Final = ("MAP_SOCKETS_FD", "MAP_OWNERS_FD", "MAP_RING_FD")

# Kernel structure fields that the programs read.
FIELDS: Final = {
    "tcp_sock": ("write_seq", "copied_seq"),
    "sock": ("sk_wmem_queued", "sk_sndbuf"),
}


@dataclass(frozen=True, slots=True)
class WorkerMaps:
    """Of one worker: what it writes; its copy of the verdict program is attached to its sockhash.

    No other worker has any of it, so none can end, misjoin or wake a pair of this one.
    """

    sockets_fd: int
    owners_fd: int
    ring_fd: int

    @property
    def fds(self) -> tuple[int, ...]:
        """All of them."""
        return (self.sockets_fd, self.owners_fd, self.ring_fd)


@dataclass(frozen=True, slots=True)
class KernelMaps:
    """Descriptors of the maps, which live as long as they are open, and with them the programs.

    In three steps, as the second may be another process's: `create`, `load_programs`, `attach`.
    """

    of: tuple[WorkerMaps, ...]  # by worker
    pairs_fd: int
    slots: int  # pairs per worker
    ring_bytes: int
    owns_pairs: bool

    @classmethod
    def load(cls, *, workers: int, slots: int, pairs_fd: int = -1) -> KernelMaps:
        """All three steps.

        `pairs_fd` is an array of workers * slots records that stays the caller's; without it, one
        is made.

        Raises:
            LoadError: this host cannot; the message says why and what would help.
        """
        maps = cls.create(workers=workers, slots=slots, pairs_fd=pairs_fd)
        try:
            maps.attach(maps.load_programs())
        except LoadError:
            maps.close()
            raise
        return maps

    @classmethod
    def create(cls, *, workers: int, slots: int, pairs_fd: int = -1) -> KernelMaps:
        """Make the maps; what is put into them goes nowhere before a program is attached.

        Raises:
            LoadError: as `load`.
        """
        opened: list[int] = []

        def create(kind: bpf.MapType, name: str, **sizes: int) -> int:
            try:
                fd = bpf.create_map(kind, name=name, **sizes)
            except OSError as error:
                raise refusal.explain(
                    f"create the BPF map {name}", error.errno or 0, needs=refusal.NETWORK
                ) from error
            opened.append(fd)
            return fd

        ring_bytes = mmap.PAGESIZE
        while ring_bytes < 2 * slots * _RING_RECORD_BYTES:
            ring_bytes *= 2
        owners_sizes = {"key_bytes": 8, "value_bytes": _size(SocketOwner), "entries": 2 * slots}
        try:
            pairs = pairs_fd
            if pairs < 0:
                pairs = create(
                    bpf.MapType.ARRAY,
                    "pf_pairs",
                    key_bytes=4,
                    value_bytes=PAIR_BYTES,
                    entries=workers * slots,
                    flags=bpf.F_MMAPABLE,
                )
            maps = [
                (
                    create(
                        bpf.MapType.SOCKHASH,
                        "pf_sockets",
                        key_bytes=8,
                        value_bytes=8,
                        entries=2 * slots,
                    ),
                    create(bpf.MapType.HASH, "pf_owners", **owners_sizes, flags=bpf.F_NO_PREALLOC),
                    create(
                        bpf.MapType.RINGBUF,
                        "pf_ring",
                        key_bytes=0,
                        value_bytes=0,
                        entries=ring_bytes,
                    ),
                )
                for _ in range(workers)
            ]
        except LoadError:
            for fd in opened:
                os.close(fd)
            raise
        of = tuple(WorkerMaps(*own) for own in maps)
        return cls(of, pairs, slots, ring_bytes, owns_pairs=pairs_fd < 0)

    def load_programs(self) -> list[int]:
        """Each worker's verdict program; the caller closes the descriptors, or attaches them.

        Raises:
            LoadError: as `load`.
        """
        return load_copies(
            "redirect.c",
            ("verdict", "sk_skb"),
            [
                Copy(
                    maps={
                        **dict(zip(_MAP_NAMES, own.fds, strict=True)),
                        "MAP_PAIRS_FD": self.pairs_fd,
                    },
                    values={"FIRST_SLOT": worker * self.slots, "SLOTS": self.slots},
                )
                for worker, own in enumerate(self.of)
            ],
            defines=btf.defines(btf.field_offsets(FIELDS)),
        )

    def attach(self, program_fds: Sequence[int]) -> None:
        """From here on they decide what happens to what the sockets receive; closes them.

        Raises:
            LoadError: the kernel refuses.
        """
        try:
            for own, program_fd in zip(self.of, program_fds, strict=True):
                bpf.attach(program_fd, own.sockets_fd, bpf.AttachType.SK_SKB_STREAM_VERDICT)
        except OSError as error:
            raise refusal.explain(
                "attach the verdict program", error.errno or 0, needs=refusal.NETWORK
            ) from error
        finally:
            for program_fd in program_fds:
                os.close(program_fd)  # the maps hold them

    def datapath(self, host: PairHost, window: PairWindow, worker: int) -> SockmapDatapath:
        """In the worker: the datapath over its window, its maps and its ring."""
        own = self.of[worker]
        return SockmapDatapath(
            host,
            window=window,
            sockets=bpf.Map(own.sockets_fd, key_bytes=8, value_bytes=8),
            owners=bpf.Map(own.owners_fd, key_bytes=8, value_bytes=_size(SocketOwner)),
            ring=RingBuffer(own.ring_fd, self.ring_bytes),
            limit_bytes=1 << 20,
        )

    def forget_worker(self, worker: int) -> None:
        """A worker died: its sockets left its sockhash, its `owners` are cleaned here.

        Raises:
            DatapathError: the kernel refuses.
        """
        owners = bpf.Map(self.of[worker].owners_fd, key_bytes=8, value_bytes=_size(SocketOwner))
        for cookie in owners.all_keys():
            try:
                owners.delete(cookie)
            except FileNotFoundError:
                continue  # it was listed twice
            except OSError as error:
                raise DatapathError("clean the map pf_owners", error.errno or 0) from error

    def close(self) -> None:
        """Close the descriptors."""
        for own in self.of:
            for fd in own.fds:
                os.close(fd)
        if self.owns_pairs:
            os.close(self.pairs_fd)


def _size(structure: type[SocketOwner]) -> int:
    return ctypes.sizeof(structure)

"""What the splice datapath has in the kernel: maps, programs, their links, and the pins of those.

Pinned, they outlive the daemon, and with them the pairs that are spliced. The next `up` finds them:

    BPFFS/NAME/splice/flows_V splices_V pairs_V    the maps, V is the version of their records
    BPFFS/NAME/splice/in_N out_N                   the links to interface N

It takes over the first two maps as they are, puts its own programs into the links (between two
packets), and has its keeper take over the pairs. The pair table is its own; the old one is only
read, for what `show` said of those pairs.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from pyforwarder.datapath import bpf, btf
from pyforwarder.datapath.abi import ABI_VERSION, PAIR_BYTES, PairRecord
from pyforwarder.datapath.loading import load_programs
from pyforwarder.datapath.splice_abi import (
    NO_SLOT,
    SPLICE_BYTES,
    VERSION,
    Splice,
    SpliceFlow,
    SpliceHandshake,
    SpliceKey,
    SpliceState,
)
from pyforwarder.errors import LoadError

FIELDS: Final = {
    "tcp_sock": (
        "rcv_nxt",
        "copied_seq",
        "snd_una",
        "snd_wnd",
        "bytes_received",
        "write_seq",
        "out_of_order_queue",
        "rx_opt",
    ),
    "tcp_options_received": ("ts_recent",),
    "sock_common": ("skc_state",),
    "sock": ("sk_dst_cache", "sk_priority"),
    "dst_entry": ("dev",),
    "net_device": ("ifindex",),
}
RING_BYTES: Final = 1 << 18
# Of connections that have begun lately; one that was forgotten is not spliced.
HANDSHAKES: Final = 1 << 15
LOOPBACK: Final = 1  # the index of `lo` in every network namespace

KEY_BYTES: Final = 36
FLOW: Final = struct.Struct("=II")
assert SpliceKey.dport.offset + 2 == KEY_BYTES
assert SpliceFlow.direction.offset + 4 == FLOW.size

STATE_AT: Final = Splice.state.offset
ID_AT: Final = Splice.id.offset
WORKER_AT: Final = Splice.worker.offset
SLOT_AT: Final = Splice.slot.offset

_MAPS: Final = (f"flows_{VERSION}", f"splices_{VERSION}", f"pairs_{ABI_VERSION}")
_LINK: Final = re.compile(r"(in|out)_(\d+)")
_OURS: Final = re.compile(r"(flows|splices|pairs|in|out)_\d+")
_SIDES: Final = {"in": bpf.AttachType.TCX_INGRESS, "out": bpf.AttachType.TCX_EGRESS}
# net/if_arp.h: what the programs take for granted is a header of Ethernet.
_ARPHRD_ETHER: Final = 1
_ARPHRD_LOOPBACK: Final = 772
_SIOCGIFHWADDR: Final = 0x8927
_SIOCGIFMTU: Final = 0x8921


@dataclass(slots=True)
class Links:
    """The programs at both sides of interfaces, which stay there as long as this is open or pinned.

    The keeper adds interfaces as pairs need them.
    """

    ingress_fd: int
    egress_fd: int
    directory: Path | None  # of pins, which are used where there are some
    is_pinned: bool = False  # by us
    fds: dict[tuple[str, int], int] = field(default_factory=dict)

    def has(self, interface: int) -> bool:
        """Whether both programs are there."""
        return all((side, interface) in self.fds for side in _SIDES)

    def add(self, interface: int) -> bool:
        """Put the programs on an interface; False if it is none for them.

        Raises:
            OSError: the kernel refuses.
        """
        if self.has(interface):
            return True
        if not _is_like_ethernet(interface):
            return False
        for side in _SIDES:
            if (side, interface) not in self.fds:
                self.fds[side, interface] = self._link(side, interface)
                # Asked of the file system: the keeper was there before the pins were.
                if self.directory is not None and (self.directory / _MAPS[0]).exists():
                    self._pin(side, interface)
        return True

    def put_back(self, interface: int) -> None:
        """The same where an interface went and another has its number: no program is there.

        Raises:
            OSError: the kernel refuses.
        """
        for side in _SIDES:
            try:
                bpf.update_link(self.fds[side, interface], self._program(side))
            except KeyError:
                pass
            except OSError:
                os.close(self.fds.pop((side, interface)))
        self.add(interface)

    def _program(self, side: str) -> int:
        return self.ingress_fd if side == "in" else self.egress_fd

    def _link(self, side: str, interface: int) -> int:
        program = self._program(side)
        if self.directory is not None:
            link = -1
            try:
                link = bpf.open_pin(self.directory / f"{side}_{interface}")
                bpf.update_link(link, program)
            except OSError:  # none, or of an interface that was made anew since
                if link >= 0:
                    os.close(link)
            else:
                return link
        return bpf.link_interface(program, interface, _SIDES[side])

    def _pin(self, side: str, interface: int) -> None:
        assert self.directory is not None
        path = self.directory / f"{side}_{interface}"
        path.unlink(missing_ok=True)
        bpf.pin(self.fds[side, interface], path)

    def pin(self) -> set[str]:
        """Let them, and those that are added later, outlive us; the names of the pins.

        Raises:
            OSError: bpffs refuses.
        """
        self.is_pinned = True
        for side, interface in self.fds:
            self._pin(side, interface)
        return {f"{side}_{interface}" for side, interface in self.fds}

    def close_links(self) -> None:
        """Close the links alone."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def close(self) -> None:
        """Close the descriptors, those of the programs, too."""
        self.close_links()
        os.close(self.ingress_fd)
        os.close(self.egress_fd)


@dataclass(frozen=True, slots=True)
class Found:
    """One pair that goes on from before."""

    index: int
    id: int
    record: bytes  # of the pair table: what `show` said of it; empty if that is not known


@dataclass(frozen=True, slots=True)
class SpliceMaps:
    """The maps, the programs and their links to the interfaces; they end with the descriptors."""

    flows_fd: int
    splices_fd: int
    rings_fd: int
    ring_fds: tuple[int, ...]
    handshakes_fd: int
    pairs_fd: int  # of the caller
    probe_fd: int
    control_fd: int
    links: Links
    entries: int
    slots: int  # pairs per worker
    workers: int
    found: tuple[Found, ...]  # what an earlier daemon has left running
    has_replaced: bool = False  # pins that were of no use

    @classmethod
    def load(
        cls, *, workers: int, slots: int, pairs_fd: int, pins: Path | None = None
    ) -> SpliceMaps:
        """Make the maps, load the programs and link them to the interfaces that have addresses.

        `pairs_fd` is the pair table, where the programs count. `pins` is where an earlier daemon
        may have left its own: the pairs that are spliced there go on, by these programs.

        Raises:
            LoadError: this host cannot; the message says why and what would help.
        """
        defines = btf.defines(btf.field_offsets(FIELDS))
        had_pins = pins is not None and bool(_pins_in(pins))
        with _what_is_left(pins) as left, contextlib.ExitStack() as opened:

            def keep(fd: int) -> int:
                opened.callback(os.close, fd)
                return fd

            try:
                # Some more than pairs: one that has ended keeps its place for a while.
                entries = left.entries if left else 2 * workers * slots
                flows = keep(os.dup(left.flows_fd) if left else _make_flows(entries))
                splices = keep(os.dup(left.splices_fd) if left else _make_splices(entries))
                handshakes = keep(_make_handshakes())
                ring_fds = tuple(keep(_make_ring()) for _ in range(workers))
                rings = keep(_make_rings(ring_fds))
                fds = {
                    "MAP_FLOWS_FD": flows,
                    "MAP_SPLICES_FD": splices,
                    "MAP_RINGS_FD": rings,
                    "MAP_PAIRS_FD": pairs_fd,
                    "MAP_HANDSHAKES_FD": handshakes,
                }
                programs = load_programs(
                    "splice.c",
                    [(name, "sched_cls") for name in ("ingress", "egress", "probe", "control")],
                    defines={**defines, **fds},
                    map_fds=list(fds.values()),
                )
                ingress, egress, probe, control = (keep(fd) for fd in programs)
                links = Links(ingress, egress, pins)
                opened.callback(links.close_links)
                found = left.take_over() if left else ()
                for interface in {*(left.interfaces if left else ()), *_with_addresses()}:
                    links.add(interface)
            except OSError as error:
                raise LoadError(
                    f"make ready for splice: {error.strerror}",
                    advice="it needs root and Linux 6.6 or later (tcx)",
                ) from error
            # From here on they are the caller's.
            opened.pop_all()
        return cls(
            flows,
            splices,
            rings,
            ring_fds,
            handshakes,
            pairs_fd,
            probe,
            control,
            links,
            entries,
            slots,
            workers,
            found,
            has_replaced=had_pins and left is None,
        )

    def pin(self) -> None:
        """Let spliced pairs outlive us, and be found by the next `up` that is given these `pins`.

        Raises:
            LoadError: bpffs refuses.
        """
        directory = self.links.directory
        assert directory is not None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, fd in zip(
                _MAPS, (self.flows_fd, self.splices_fd, self.pairs_fd), strict=True
            ):
                (directory / name).unlink(missing_ok=True)
                bpf.pin(fd, directory / name)
            wanted = {*_MAPS, *self.links.pin()}
            for path in _pins_in(directory):
                if path.name not in wanted:
                    path.unlink()  # of an interface that is gone
        except OSError as error:
            raise LoadError(f"pin splice in {directory}: {error.strerror}") from error

    def keep_only(self, worker: int) -> None:
        """In a worker, which has mapped the records: close all but its ring."""
        self._close(ring_fd for n, ring_fd in enumerate(self.ring_fds) if n != worker)

    def close(self) -> None:
        """Close the descriptors; unless they are pinned, the programs leave the interfaces."""
        self._close(self.ring_fds)

    def _close(self, ring_fds: Iterable[int]) -> None:
        self.links.close()
        for fd in (
            *ring_fds,
            self.flows_fd,
            self.splices_fd,
            self.rings_fd,
            self.handshakes_fd,
            self.probe_fd,
            self.control_fd,
        ):
            os.close(fd)


def unpin(directory: Path) -> None:
    """Remove the pins: programs that nobody else holds leave the interfaces. Never raises.

    A pair that was still spliced gets the kernel's RST for its next packet.
    """
    with contextlib.suppress(OSError):
        for path in _pins_in(directory):
            path.unlink(missing_ok=True)
        directory.rmdir()


def _pins_in(directory: Path) -> list[Path]:
    """Ours, of whatever version."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if _OURS.fullmatch(path.name)]


@dataclass(frozen=True, slots=True)
class _Left:
    """What an earlier daemon has left, opened."""

    flows_fd: int
    splices_fd: int
    pairs_fd: int
    entries: int
    interfaces: frozenset[int]  # where its programs are

    def take_over(self) -> tuple[Found, ...]:
        """The pairs that go on; those that had not begun are forgotten, and those that ended."""
        memory = bpf.map_memory(self.splices_fd, self.entries * SPLICE_BYTES, write=True)
        pairs = bpf.map_sizes(self.pairs_fd).entries
        table = bpf.map_memory(self.pairs_fd, pairs * PAIR_BYTES, write=False)
        flows = bpf.Map(self.flows_fd, key_bytes=KEY_BYTES, value_bytes=FLOW.size)
        found = []
        try:
            for index in used_indexes(memory):
                record = Splice.from_buffer_copy(memory, index * SPLICE_BYTES)
                if record.state == SpliceState.ACTIVE and record.id:
                    # Where it was, or where it was before a daemon that did not get far.
                    said = b""
                    for slot in (record.slot, record.last_slot):
                        at = slot * PAIR_BYTES
                        if slot < pairs and id_of(table, at) == record.id:
                            said = table[at : at + PAIR_BYTES]
                            break
                    if said:
                        self._store(memory, index, Splice.last_slot.offset, slot)
                    # Its slot is nobody's in the new table.
                    self._store(memory, index, SLOT_AT, NO_SLOT)
                    found.append(Found(index, record.id, said))
                else:
                    forget_flows(flows, index, record)
                    set_state(memory, index, SpliceState.FREE)
        finally:
            memory.close()
            table.close()
        return tuple(found)

    @staticmethod
    def _store(memory: mmap.mmap, index: int, at: int, number: int) -> None:
        struct.pack_into("=I", memory, index * SPLICE_BYTES + at, number)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.flows_fd, self.splices_fd, self.pairs_fd):
            os.close(fd)


@contextlib.contextmanager
def _what_is_left(pins: Path | None) -> Iterator[_Left | None]:
    """What an earlier daemon has left, or None; what cannot be taken over is removed."""
    left = _open_left(pins) if pins is not None and pins.is_dir() else None
    try:
        yield left
    finally:
        if left is not None:
            left.close()


def _open_left(pins: Path) -> _Left | None:
    opened: dict[str, int] = {}
    try:
        for name in _MAPS:
            opened[name] = bpf.open_pin(pins / name)
        flows, splices, pairs = opened.values()
        sizes = bpf.map_sizes(splices)
        is_ours = sizes.value_bytes == SPLICE_BYTES
        is_ours = is_ours and bpf.map_sizes(pairs).value_bytes == PAIR_BYTES
        is_ours = is_ours and bpf.map_sizes(flows)[:2] == (KEY_BYTES, FLOW.size)
        matches = [_LINK.fullmatch(path.name) for path in pins.iterdir()]
    except OSError:
        is_ours = False
    if is_ours:
        interfaces = frozenset(int(match[2]) for match in matches if match)
        return _Left(flows, splices, pairs, sizes.entries, interfaces)
    # Of another version, or not whole: nobody can speak for those pairs any more.
    for fd in opened.values():
        os.close(fd)
    unpin(pins)
    return None


def id_of(table: mmap.mmap, at: int) -> int:
    """The pair that a record of the pair table describes."""
    (pair_id,) = struct.unpack_from("=Q", table, at + PairRecord.id.offset)
    return int(pair_id)


def used_indexes(memory: object) -> Iterator[int]:
    """The records that are not free."""
    states = memoryview(memory)[STATE_AT::SPLICE_BYTES]  # type: ignore[arg-type]
    try:
        yield from [index for index, state in enumerate(states) if state != SpliceState.FREE]
    finally:
        states.release()


def set_state(memory: object, index: int, state: SpliceState) -> None:
    """Change a record's state with one store."""
    struct.pack_into("=I", memory, index * SPLICE_BYTES + STATE_AT, state)  # type: ignore[arg-type]


def forget_flows(flows: bpf.Map, index: int, record: Splice) -> None:
    """Take a pair out of the programs' sight; what its peers still send is for the stack."""
    for way in record.way:
        key = bytes(way.from_)
        # The ports may serve another pair by now.
        with contextlib.suppress(FileNotFoundError):
            if FLOW.unpack(flows.lookup(key))[0] == index:
                flows.delete(key)


def smallest_mtu() -> int:
    """Of the interfaces but `lo` that have addresses; 0 if there are none."""
    sizes = [
        _ioctl(_SIOCGIFMTU, index)
        for index in _with_addresses()
        if index != LOOPBACK and _is_like_ethernet(index)
    ]
    return min(sizes, default=0)


def _with_addresses() -> list[int]:
    addresses = psutil.net_if_addrs()
    return [
        index
        for index, name in socket.if_nameindex()
        if index == LOOPBACK
        or any(a.family in (socket.AF_INET, socket.AF_INET6) for a in addresses.get(name, ()))
    ]


def _is_like_ethernet(interface: int) -> bool:
    return _ioctl(_SIOCGIFHWADDR, interface) & 0xFFFF in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK)


def _ioctl(request: int, interface: int) -> int:
    """What netdevice(7) says of an interface, as a number; 0 if it is gone."""
    try:
        name = socket.if_indextoname(interface).encode()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, request, struct.pack("=16s24x", name))
    except OSError:
        return 0
    (number,) = struct.unpack_from("=I", answer, 16)
    return int(number)


def _make_flows(entries: int) -> int:
    return bpf.create_map(
        bpf.MapType.HASH,
        key_bytes=KEY_BYTES,
        value_bytes=FLOW.size,
        entries=2 * entries,
        flags=bpf.F_NO_PREALLOC,
        name="pf_flows",
    )


def _make_splices(entries: int) -> int:
    return bpf.create_map(
        bpf.MapType.ARRAY,
        key_bytes=4,
        value_bytes=SPLICE_BYTES,
        entries=entries,
        flags=bpf.F_MMAPABLE,
        name="pf_splices",
    )


def _make_handshakes() -> int:
    return bpf.create_map(
        bpf.MapType.LRU_HASH,
        key_bytes=KEY_BYTES,
        value_bytes=ctypes.sizeof(SpliceHandshake),
        entries=HANDSHAKES,
        name="pf_handshakes",
    )


def _make_ring() -> int:
    return bpf.create_map(
        bpf.MapType.RINGBUF, key_bytes=0, value_bytes=0, entries=RING_BYTES, name="pf_splice_ring"
    )


def _make_rings(ring_fds: tuple[int, ...]) -> int:
    rings = bpf.create_map(
        bpf.MapType.ARRAY_OF_MAPS,
        key_bytes=4,
        value_bytes=4,
        entries=len(ring_fds),
        inner_map_fd=ring_fds[0],
        name="pf_splice_rings",
    )
    try:
        table = bpf.Map(rings, key_bytes=4, value_bytes=4)
        for worker, ring in enumerate(ring_fds):
            table.update(worker.to_bytes(4, "little"), ring.to_bytes(4, "little"))
    except OSError:
        os.close(rings)
        raise
    return rings

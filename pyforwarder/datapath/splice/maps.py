"""What the splice datapath has in the kernel: maps, programs on interfaces, and the pins of those.

Pinned, they outlive the daemon, and with them the pairs that are spliced. The next `up` finds them:

    BPFFS/NAME/splice/flows_V splices_V pairs_V    the maps, V is the version of their records
    BPFFS/NAME/splice/session_flows_V sessions_V   those of UDP sessions
    BPFFS/NAME/splice/in_N out_N                   the links to interface N, where there is tcx

It takes over the first two maps as they are, puts its own programs in the place of the old ones
(between two packets), and has its keeper take over the pairs. The pair table is its own; the old
one is only read, for what `show` said of those pairs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import psutil

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.attach.base import SIDES, Attacher, InterfaceTakenError, Side
from pyforwarder.datapath.ebpf import btf, refusal
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import ABI_VERSION, PAIR_BYTES, PairRecord
from pyforwarder.datapath.ebpf.loading import load_programs
from pyforwarder.datapath.netlink import Netlink
from pyforwarder.datapath.splice import session_maps
from pyforwarder.datapath.splice.abi import (
    HELD,
    NO_SLOT,
    SPLICE_BYTES,
    VERSION,
    Splice,
    SpliceFlow,
    SpliceHandshake,
    SpliceKey,
    SpliceState,
)
from pyforwarder.datapath.splice.session_abi import SESSION_BYTES
from pyforwarder.datapath.splice.session_maps import SessionMaps
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime import host
from pyforwarder.runtime.counters import BLOCK_WORDS, INVALID_FIRST

if TYPE_CHECKING:
    from pyforwarder.datapath.express.connecting import Connecting

FIELDS: Final = {
    "tcp_sock": (
        "rcv_nxt",
        "copied_seq",
        "snd_una",
        "snd_nxt",
        "snd_wnd",
        "max_window",
        "rcv_wup",
        "rcv_wnd",
        "bytes_received",
        "write_seq",
        "out_of_order_queue",
        "rx_opt",
        "ecn_flags",
    ),
    "tcp_options_received": ("ts_recent",),
    "sock_common": ("skc_state",),
    "sock": ("sk_dst_cache", "sk_priority"),
    "dst_entry": ("dev",),
    "net_device": ("ifindex",),
}
_LEAST_RING_BYTES: Final = 1 << 18
# A pair rings up to eight times: for two tails, two FINs, both their acknowledgements, a reset, an
# interface. A record has a header of eight bytes (struct bpf_ringbuf_hdr).
_RINGS_OF_A_PAIR: Final = 8
_RING_RECORD_BYTES: Final = 8 + 24
# Of connections that have begun lately; one that was forgotten is not spliced.
HANDSHAKES: Final = 1 << 15
SUM_BYTES: Final = 512  # of a packet that the programs sum up at once
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
_OURS: Final = re.compile(r"(flows|splices|pairs|session_flows|sessions|in|out)_\d+")
_NEEDS: Final = "it needs tcx (Linux 6.6), or the kernel's modules sch_ingress and cls_bpf"
# What a kernel says to an attachment that it has not: BPF_LINK_CREATE, and tc(8)'s netlink.
_UNKNOWN: Final = frozenset({errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP})
# net/if_arp.h: what the programs take for granted is a header of Ethernet.
_ARPHRD_ETHER: Final = 1
_ARPHRD_LOOPBACK: Final = 772
_SIOCGIFHWADDR: Final = 0x8927
_SIOCGIFMTU: Final = 0x8921


@dataclass(slots=True)
class Links:
    """The programs at both sides of interfaces: they go when this is closed, unless it is pinned.

    The keeper adds interfaces as pairs need them.
    """

    ingress_fd: int
    egress_fd: int
    directory: Path | None  # of pins
    attacher: Attacher
    is_pinned: bool = False  # by us
    refusals: dict[int, str] = field(default_factory=dict)  # interface: why there is no place

    def has(self, interface: int) -> bool:
        """Whether both programs are there."""
        return all(self.attacher.has(interface, side) for side in SIDES)

    def add(self, interface: int) -> bool:
        """Put the programs on an interface; False if it is none for them.

        `refusals` says why if that is another program's doing.

        Raises:
            OSError: the kernel refuses.
        """
        if self.has(interface):
            return True
        if not _is_like_ethernet(interface):
            return False
        try:
            for side in SIDES:
                if not self.attacher.has(interface, side):
                    self.attacher.attach(self._program(side), interface, side)
        except InterfaceTakenError as error:
            self.refusals[interface] = error.reason
            return False
        except OSError as error:
            if error.errno == errno.ENODEV:  # it went just now
                return False
            raise
        self.refusals.pop(interface, None)
        return True

    def take_off(self, interface: int) -> None:
        """Take the programs away from an interface that is not for them any more. Never raises."""
        for side in SIDES:
            self.attacher.detach(interface, side)

    def verify(self) -> set[int]:
        """Look whether the programs are still where they were; the interfaces that have lost one.

        Another process may have taken them off, or another interface have got the number.
        """
        lost = set()
        for interface in self.attacher.interfaces():
            for side in SIDES:
                self.attacher.verify(interface, side)
            if not self.has(interface):
                lost.add(interface)
        return lost

    def put_back(self, interface: int) -> None:
        """The same where an interface went and another has its number: no program is there.

        Raises:
            OSError: the kernel refuses.
        """
        for side in SIDES:
            self.attacher.verify(interface, side)
        self.add(interface)

    def _program(self, side: Side) -> int:
        return self.ingress_fd if side == "in" else self.egress_fd

    def pin(self) -> Collection[str]:
        """Let them, and those that are added later, outlive us; the names of the pins.

        Raises:
            OSError: bpffs refuses.
        """
        self.is_pinned = True
        return self.attacher.keep()

    def close(self) -> None:
        """Close the descriptors, those of the programs, too."""
        self.attacher.close()
        os.close(self.ingress_fd)
        os.close(self.egress_fd)


@dataclass(frozen=True, slots=True)
class Found:
    """One pair that goes on from before."""

    index: int
    id: int
    record: bytes  # of the pair table: what `show` said of it; empty if that is not known


class Programs(NamedTuple):
    """Descriptors of the five programs over one set of maps."""

    ingress: int
    egress: int
    probe: int
    control: int
    find_session: int


@dataclass(slots=True)
class SpliceMaps:
    """The maps, the programs and the interfaces that these are on.

    In three steps, as the second may be another process's: `create`, `load_programs`, `attach`.
    Workers need only the first.
    """

    flows_fd: int
    splices_fd: int
    rings_fd: int
    ring_fds: tuple[int, ...]
    handshakes_fd: int
    scratch_fd: int
    counters_fd: int
    owns_counters: bool
    pairs_fd: int  # of the caller
    entries: int
    slots: int  # pairs per worker
    workers: int
    has_replaced: bool  # pins that were of no use
    _attacher: Attacher | None
    _left: _Left | None
    pins: Path | None
    sessions: SessionMaps  # of UDP
    _links: Links | None = None
    probe_fd: int = -1
    control_fd: int = -1
    found: tuple[Found, ...] = ()  # what an earlier daemon has left running

    @classmethod
    def load(
        cls,
        *,
        workers: int,
        slots: int,
        pairs_fd: int,
        counters_fd: int | None = None,
        pins: Path | None = None,
        sessions: int = 0,
    ) -> SpliceMaps:
        """All three steps: the programs are linked to the interfaces that have addresses.

        `pairs_fd` is the pair table, where the programs count; packets that they did not believe
        they count in `counters_fd`, if there is one (see `counters.py`). `pins` is where an earlier
        daemon may have left its own: the pairs that are spliced there go on, by these programs.
        `sessions` is how many of UDP there may be; 0: any number.

        Raises:
            LoadError: this host cannot; the message says why and what would help.
        """
        maps = cls.create(
            workers=workers,
            slots=slots,
            pairs_fd=pairs_fd,
            counters_fd=counters_fd,
            pins=pins,
            sessions=sessions,
        )
        try:
            maps.attach(maps.load_programs())
        except LoadError:
            maps.close()
            raise
        return maps

    @classmethod
    def create(
        cls,
        *,
        workers: int,
        slots: int,
        pairs_fd: int,
        counters_fd: int | None = None,
        pins: Path | None = None,
        sessions: int = 0,
        is_successor: bool = False,
        handshakes_fd: int = -1,
        places: int = 0,
    ) -> SpliceMaps:
        """Make the maps, or open those that an earlier daemon has left; its programs go on there.

        `is_successor`: that daemon lives. Nothing of it is removed, whatever version it has, and
        `handshakes_fd` is its map of those, which is ours from here on; -1: we make one. Where the
        maps are new, there is room for so many `places` of express.

        Raises:
            LoadError: as `load`, or the daemon that lives has maps of another version.
        """
        if is_successor and pins is not None and has_pins(pins):
            _must_fit(pins)
        had_pins = pins is not None and bool(_pins_in(pins))
        try:
            # First of all: who has it may remove what is left.
            attacher = attaching.attacher(pins, kept_with=_MAPS[0])
        except OSError as error:
            raise _refused(error) from error
        opened = contextlib.ExitStack()
        opened.callback(attacher.close)

        def keep(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        with opened:
            left = _open_left(pins) if pins is not None and has_pins(pins) else None
            if left is not None:
                opened.callback(left.close)
            try:
                # Some more than pairs: one that has ended keeps its place for a while.
                entries = left.entries if left else 2 * workers * slots + places
                flows = keep(os.dup(left.flows_fd) if left else _make_flows(entries))
                splices = keep(os.dup(left.splices_fd) if left else _make_splices(entries))
                handshakes = keep(handshakes_fd if handshakes_fd >= 0 else _make_handshakes())
                session_entries = session_maps.room_for(sessions, workers)
                left_sessions = session_maps.open_left(pins) if left and pins else None
                if left_sessions:
                    session_flows, session_array, session_entries = left_sessions
                else:
                    session_flows, session_array = session_maps.make(session_entries)
                for fd in (session_flows, session_array):
                    keep(fd)
                ring_fds = tuple(keep(_make_ring(slots)) for _ in range(workers))
                rings = keep(_make_rings(ring_fds))
                counters = counters_fd if counters_fd is not None else keep(_make_counters(workers))
                scratch = keep(_make_scratch())
            except OSError as error:
                raise _refused(error) from error
            # From here on they are the caller's.
            opened.pop_all()
        return cls(
            flows,
            splices,
            rings,
            ring_fds,
            handshakes,
            scratch,
            counters,
            counters_fd is None,
            pairs_fd,
            entries,
            slots,
            workers,
            had_pins and left is None,
            attacher,
            left,
            pins,
            SessionMaps(
                session_flows, session_array, session_entries, is_left=left_sessions is not None
            ),
        )

    def load_programs(self, connecting: Connecting | None = None) -> Programs:
        """The programs over these maps; the caller closes the descriptors, or attaches them.

        With `connecting` they leave to its programs what they know no pair for.

        Raises:
            LoadError: as `load`.
        """
        express = {"MAP_EXPRESS_PROGRAMS_FD": connecting.programs_fd} if connecting else {}
        return Programs(
            *load_programs(
                "splice.c",
                [(name, "sched_cls") for name in Programs._fields],
                defines={**btf.defines(btf.field_offsets(FIELDS)), **self.defines},
                maps={
                    **express,
                    "MAP_FLOWS_FD": self.flows_fd,
                    "MAP_SPLICES_FD": self.splices_fd,
                    "MAP_RINGS_FD": self.rings_fd,
                    "MAP_PAIRS_FD": self.pairs_fd,
                    "MAP_HANDSHAKES_FD": self.handshakes_fd,
                    "MAP_COUNTERS_FD": self.counters_fd,
                    "MAP_SCRATCH_FD": self.scratch_fd,
                    "MAP_SESSION_FLOWS_FD": self.sessions.flows_fd,
                    "MAP_SESSIONS_FD": self.sessions.sessions_fd,
                },
                # Not to be guessed, and not that of another instance on this host.
                values={
                    "FOR_OUR_SOCKET": secrets.randbits(32) | 1,
                    **({"FOR_OUR_STACK": connecting.mark} if connecting else {}),
                },
            )
        )

    @property
    def defines(self) -> dict[str, str | int]:
        """Macros of what the programs count, and of their scratch map."""
        return {
            "BLOCK_WORDS": BLOCK_WORDS,
            "INVALID_FIRST": INVALID_FIRST,
            "SUM_BYTES": SUM_BYTES,
        }

    def attach(self, programs: Programs) -> None:
        """Put them on the interfaces, in the place of those that an earlier daemon has left.

        The programs are ours from here on, whatever happens.

        Raises:
            LoadError: as `load`; what was left goes on as before then.
        """
        attacher, left = self._attacher, self._left
        assert attacher is not None
        self._attacher = self._left = None
        self.probe_fd, self.control_fd = programs.probe, programs.control
        self.sessions.find_fd = programs.find_session
        self._links = links = Links(programs.ingress, programs.egress, self.pins, attacher)
        try:
            if left is None:
                attacher.clear()  # programs whose maps are lost
            self.found = left.take_over() if left else ()
            if left:
                self.sessions.take_over(left.pairs_fd)
            with Netlink() as kernel:
                ports = {link.index for link in kernel.links().values() if link.port_of}
            # Asked again: a keeper that has lived until now may have come to more of them.
            others = attaching.left_on(self.pins) if left and self.pins is not None else ()
            for interface in {*(left.interfaces if left else ()), *others, *with_addresses()}:
                if interface in ports:
                    links.take_off(interface)
                else:
                    links.add(interface)
            if self.pins is not None:
                attaching.remove_others(attacher.kind, self.pins)
        except OSError as error:
            raise _refused(error) from error
        finally:
            if left is not None:
                left.close()

    @property
    def is_attached(self) -> bool:
        """Whether the programs are on interfaces."""
        return self._links is not None

    @property
    def links(self) -> Links:
        """The programs on interfaces; only once they are attached."""
        assert self._links is not None
        return self._links

    def pin(self) -> None:
        """Let spliced pairs outlive us, and be found by the next `up` that is given these `pins`.

        Raises:
            LoadError: bpffs refuses.
        """
        directory = self.links.directory
        assert directory is not None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fds = [self.flows_fd, self.splices_fd, self.pairs_fd]
            fds += [self.sessions.flows_fd, self.sessions.sessions_fd]
            names = (*_MAPS, *session_maps.PINS)
            for name, fd in zip(names, fds, strict=True):
                (directory / name).unlink(missing_ok=True)
                bpf.pin(fd, directory / name)
            wanted = {*names, *self.links.pin()}
            for path in _pins_in(directory):
                if path.name not in wanted:
                    path.unlink()  # of an interface that is gone
        except OSError as error:
            raise LoadError(f"pin splice in {directory}: {error.strerror}") from error

    def keep_only(self, worker: int) -> None:
        """In a worker, which has mapped the records: close all but its ring."""
        self._close(ring_fd for n, ring_fd in enumerate(self.ring_fds) if n != worker)

    def close(self) -> None:
        """Close the descriptors; unless they are pinned, the programs leave the interfaces.

        The latter in the process that has loaded them.
        """
        self._close(self.ring_fds)

    def _close(self, ring_fds: Iterable[int]) -> None:
        for part in (self._links, self._attacher, self._left):
            if part is not None:
                part.close()
        for fd in (
            *ring_fds,
            self.flows_fd,
            self.splices_fd,
            self.rings_fd,
            self.handshakes_fd,
            self.scratch_fd,
            *((self.counters_fd,) if self.owns_counters else ()),
            *(fd for fd in (self.probe_fd, self.control_fd) if fd >= 0),
        ):
            os.close(fd)
        self.sessions.close()


def _refused(error: OSError) -> LoadError:
    """Why the maps could not be made, or the programs not attached."""
    operation, number = "make ready for splice", error.errno or errno.EIO
    if number == errno.EPERM and (missing := host.missing_capabilities(refusal.NETWORK)):
        return refusal.lacking(operation, missing)
    if number in _UNKNOWN:
        return LoadError(f"{operation}: {error.strerror}", cause=Refusal.TOO_OLD, advice=_NEEDS)
    if number == errno.EPERM:
        return refusal.explain(operation, number, needs=refusal.NETWORK)
    cause = Refusal.MEMORY if number in (errno.ENOMEM, errno.ENOBUFS) else Refusal.OTHER
    return LoadError(f"{operation}: {error.strerror}", cause=cause)


def unpin(directory: Path) -> None:
    """Remove the pins and what is attached: the programs leave the interfaces. Never raises.

    A pair that was still spliced gets the kernel's RST for its next packet.
    """
    attaching.remove(directory)
    with contextlib.suppress(OSError):
        for path in _pins_in(directory):
            path.unlink(missing_ok=True)
        directory.rmdir()


def has_pins(directory: Path) -> bool:
    """Whether a daemon that has ended may have left something there; not where we may not look.

    /sys/fs/bpf is root's alone (0700), so that for other users nothing there is theirs.
    """
    return os.path.isdir(directory)


def _pins_in(directory: Path) -> list[Path]:
    """Ours, of whatever version; none where we may not look, because nothing there can be ours."""
    try:
        return [path for path in directory.iterdir() if _OURS.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


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
                # Those of another machine its daemon was told of, and ours is to be told again.
                if record.state == SpliceState.ACTIVE and record.id and record.worker != HELD:
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
        interfaces = frozenset(attaching.left_on(pins))
    except OSError:
        is_ours = False
    if is_ours:
        return _Left(flows, splices, pairs, sizes.entries, interfaces)
    # Of another version, or not whole: nobody can speak for those pairs any more.
    for fd in opened.values():
        os.close(fd)
    unpin(pins)
    return None


def _must_fit(pins: Path) -> None:
    """Raise LoadError unless all maps of another daemon are there, with records like ours."""
    names = (*_MAPS, *session_maps.PINS)
    sizes = {}
    for name in names:
        try:
            fd = bpf.open_pin(pins / name)
        except OSError:
            raise LoadError(
                f"spliced pairs of the running daemon: {pins / name} is not there",
                advice="its version keeps them in another way than this one",
            ) from None
        sizes[name] = bpf.map_sizes(fd)
        os.close(fd)
    flows, splices, pairs, session_flows, sessions = sizes.values()
    if (
        (flows[:2], session_flows[:2]) != ((KEY_BYTES, FLOW.size),) * 2
        or (splices.value_bytes, pairs.value_bytes) != (SPLICE_BYTES, PAIR_BYTES)
        or sessions.value_bytes != SESSION_BYTES
    ):
        raise LoadError(
            "spliced pairs of the running daemon: their records are of another version",
            advice="`down` lets them end before the new version's `up`",
        )


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
        mtu_of(index)
        for index in with_addresses()
        if index != LOOPBACK and _is_like_ethernet(index)
    ]
    return min(sizes, default=0)


def mtu_of(interface: int) -> int:
    """What it carries in one packet, its header left out; 0: it is gone."""
    return _ioctl(_SIOCGIFMTU, interface)


def with_addresses() -> list[int]:
    """The interfaces that have one, and `lo`."""
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


def _make_counters(workers: int) -> int:
    """For a caller that wants to know of none."""
    return bpf.create_map(
        bpf.MapType.ARRAY,
        key_bytes=4,
        value_bytes=8,
        entries=workers * BLOCK_WORDS,
        name="pf_counters",
    )


def _make_scratch() -> int:
    """Where each processor sums up a packet; the programs keep it."""
    return bpf.create_map(
        bpf.MapType.PERCPU_ARRAY,
        key_bytes=4,
        value_bytes=SUM_BYTES,
        entries=1,
        name="pf_scratch",
    )


def ring_bytes(slots: int) -> int:
    """How large the ring of a worker with so many slots is: all its pairs may end at once."""
    size = _LEAST_RING_BYTES
    while size < slots * _RINGS_OF_A_PAIR * _RING_RECORD_BYTES:
        size *= 2
    return size


def _make_ring(slots: int) -> int:
    return bpf.create_map(
        bpf.MapType.RINGBUF,
        key_bytes=0,
        value_bytes=0,
        entries=ring_bytes(slots),
        name="pf_splice_ring",
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

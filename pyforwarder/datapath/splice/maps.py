"""The splice datapath in the kernel: maps, programs on interfaces, and their pins.

Pinned, they outlive the daemon, and with them the spliced pairs (`pins.py` has the names). The next
`up` takes over their maps as they are, replaces the old programs by its own ones (between two
packets), and has its keeper take over the pairs. The pair table is new; the old one is only read,
for what `show` printed for those pairs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.ebpf import btf, probing, refusal
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.loading import load_programs
from pyforwarder.datapath.netlink import Netlink
from pyforwarder.datapath.splice import session_maps
from pyforwarder.datapath.splice.directories import Claim
from pyforwarder.datapath.splice.handshakes import is_handshakes, make_handshakes
from pyforwarder.datapath.splice.interfaces import Links, with_addresses
from pyforwarder.datapath.splice.making import (
    SUM_BYTES,
    make_counters,
    make_flows,
    make_no_programs,
    make_ring,
    make_rings,
    make_scratch,
    make_splices,
)
from pyforwarder.datapath.splice.our_ports import make_our_ports
from pyforwarder.datapath.splice.pins import (
    MAPS,
    Found,
    Left,
    has_pins,
    must_fit,
    open_left,
    pins_in,
)
from pyforwarder.datapath.splice.session_maps import SessionMaps
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime import host
from pyforwarder.runtime.counters import BLOCK_WORDS, INVALID_FIRST

if TYPE_CHECKING:
    from pyforwarder.datapath.attach.base import Attacher
    from pyforwarder.datapath.express.connection_maps import ConnectionMaps

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
# Where a packet's checksum will be written; csum_offset follows csum_start (linux/skbuff.h).
_OF_PACKETS: Final = {"sk_buff": ("csum_start", "network_header")}


_NEEDS: Final = "it needs tcx (Linux 6.6), or the kernel's modules sch_ingress and cls_bpf"
# Errors of a kernel that does not support an attachment: BPF_LINK_CREATE, and tc(8)'s netlink.
_UNKNOWN: Final = frozenset({errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP})


class Programs(NamedTuple):
    """Descriptors of the five programs over one set of maps."""

    ingress: int
    egress: int
    probe: int
    control: int
    find_session: int


@dataclass(slots=True)
class SpliceMaps:
    """The maps, the programs, and the interfaces with the programs.

    In three steps, as the second may run in another process: `create`, `load_programs`, `attach`.
    Workers need only the first.
    """

    flows_fd: int
    splices_fd: int
    rings_fd: int
    ring_fds: tuple[int, ...]
    handshakes_fd: int
    scratch_fd: int
    our_ports_fd: int
    counters_fd: int
    owns_counters: bool
    pairs_fd: int  # of the caller
    entries: int
    slots: int  # pairs per worker
    workers: int
    has_replaced: bool  # old pins, which could not be used
    _attacher: Attacher | None
    _left: Left | None
    pins: Path | None
    sessions: SessionMaps  # of UDP
    _links: Links | None = None
    probe_fd: int = -1
    control_fd: int = -1
    found: tuple[Found, ...] = ()  # what an earlier daemon has left
    _claim: Claim | None = None  # on the directory of the pins

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
        """All three steps: the programs are attached to the interfaces with addresses.

        `pairs_fd` is the pair table, in which the programs count bytes; invalid packets are counted
        in `counters_fd`, if there is one (see `counters.py`). `pins` is where an earlier daemon may
        have left its own: the pairs that are spliced there continue with these programs. `sessions`
        is the most UDP sessions; 0: any number.

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
        """Create the maps, or open those that an earlier daemon has left; its programs keep
        running.

        `is_successor`: that daemon is alive. Nothing of it is removed, of any version, and
        `handshakes_fd` is its map of handshakes, which `close` closes; -1: a new one is created.
        New maps have room for `places` places of express.

        Raises:
            LoadError: as `load`, or the living daemon has maps of another version.
        """
        if is_successor and pins is not None and has_pins(pins):
            must_fit(pins)
        had_pins = pins is not None and bool(pins_in(pins))
        try:
            # Before everything else: the process that has this name may remove what is left.
            attacher = attaching.attacher(pins, kept_with=MAPS[0])
        except OSError as error:
            raise _refused(error) from error
        opened = contextlib.ExitStack()
        opened.callback(attacher.close)

        def keep(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        with opened:
            left = open_left(pins) if pins is not None and has_pins(pins) else None
            claim = None
            if left is not None:
                opened.callback(left.close)
            try:
                if left is not None and pins is not None:
                    claim = Claim(pins)
                    opened.callback(claim.close)
                # More than pairs: one that has ended keeps its record for a while.
                entries = left.entries if left else 2 * workers * slots + places
                flows = keep(os.dup(left.flows_fd) if left else make_flows(entries))
                splices = keep(os.dup(left.splices_fd) if left else make_splices(entries))
                if handshakes_fd >= 0 and not is_handshakes(handshakes_fd):
                    # Of a version with another layout: the few pairs that are just beginning are
                    # not spliced.
                    os.close(handshakes_fd)
                    handshakes_fd = -1
                handshakes = keep(handshakes_fd if handshakes_fd >= 0 else make_handshakes())
                session_entries = session_maps.room_for(sessions, workers)
                left_sessions = session_maps.open_left(pins) if left and pins else None
                if left_sessions:
                    session_flows, session_array, session_entries = left_sessions
                else:
                    session_flows, session_array = session_maps.make(session_entries)
                for fd in (session_flows, session_array):
                    keep(fd)
                ring_fds = tuple(keep(make_ring(slots)) for _ in range(workers))
                rings = keep(make_rings(ring_fds))
                counters = counters_fd if counters_fd is not None else keep(make_counters(workers))
                scratch = keep(make_scratch())
                our_ports = keep(make_our_ports())
            except OSError as error:
                raise _refused(error) from error
            # From here on the caller closes them.
            opened.pop_all()
        return cls(
            flows,
            splices,
            rings,
            ring_fds,
            handshakes,
            scratch,
            our_ports,
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
            _claim=claim,
        )

    def load_programs(self, connections: ConnectionMaps | None = None) -> Programs:
        """Load the programs over these maps; the caller closes the descriptors, or attaches them.

        With `connections` the programs tail-call its programs with packets of no known pair.

        Raises:
            LoadError: as `load`.
        """
        with contextlib.ExitStack() as opened:
            if connections is None:
                # Named by instructions that the verifier removes, as they are never reached: so
                # one compilation serves with express and without.
                try:
                    express_fd, mark = make_no_programs(), 0
                except OSError as error:
                    raise _refused(error) from error
                opened.callback(os.close, express_fd)
            else:
                express_fd, mark = connections.programs_fd, connections.mark
            return self._load(express_fd, mark, has_express=connections is not None)

    def _load(self, express_fd: int, mark: int, *, has_express: bool) -> Programs:
        return Programs(
            *load_programs(
                "splice.c",
                [(name, "sched_cls") for name in Programs._fields],
                defines={**btf.defines(btf.field_offsets(FIELDS)), **self.defines},
                maps={
                    "MAP_EXPRESS_PROGRAMS_FD": express_fd,
                    "MAP_FLOWS_FD": self.flows_fd,
                    "MAP_SPLICES_FD": self.splices_fd,
                    "MAP_RINGS_FD": self.rings_fd,
                    "MAP_PAIRS_FD": self.pairs_fd,
                    "MAP_HANDSHAKES_FD": self.handshakes_fd,
                    "MAP_COUNTERS_FD": self.counters_fd,
                    "MAP_SCRATCH_FD": self.scratch_fd,
                    "MAP_OUR_PORTS_FD": self.our_ports_fd,
                    "MAP_SESSION_FLOWS_FD": self.sessions.flows_fd,
                    "MAP_SESSIONS_FD": self.sessions.sessions_fd,
                },
                # Random, and so different from those of another instance on this host.
                values={
                    "FOR_OUR_SOCKET": secrets.randbits(32) | 1,
                    "ALSO_FOR_OUR_SOCKET": secrets.randbits(32) | 1,
                    "FOR_OUR_STACK": mark,
                    "HAS_EXPRESS": has_express,
                },
            )
        )

    @property
    def defines(self) -> dict[str, str | int]:
        """Macros for the programs: the places of their counters, sizes, and offsets in struct
        sk_buff.

        Raises:
            LoadError: the kernel has no BTF.
        """
        packets = btf.defines(btf.field_offsets(_OF_PACKETS)) if probing.reads_kernel() else {}
        return {
            **packets,
            "BLOCK_WORDS": BLOCK_WORDS,
            "INVALID_FIRST": INVALID_FIRST,
            "SUM_BYTES": SUM_BYTES,
        }

    def attach(self, programs: Programs) -> None:
        """Attach the programs to the interfaces, in place of those that an earlier daemon has left.

        The descriptors belong to this object from here on, also after an error.

        Raises:
            LoadError: as `load`; what was left keeps running as before.
        """
        attacher, left = self._attacher, self._left
        assert attacher is not None
        self._attacher = self._left = None
        self.probe_fd, self.control_fd = programs.probe, programs.control
        self.sessions.find_fd = programs.find_session
        self._links = links = Links(programs.ingress, programs.egress, self.pins, attacher)
        try:
            if left is None:
                attacher.clear()  # remove programs whose maps are lost
            self.found = left.take_over() if left else ()
            if left:
                self.sessions.take_over(left.pairs_fd)
            with Netlink() as kernel:
                ports = {link.index for link in kernel.links().values() if link.port_of}
            # Listed again: a keeper that has lived until now may have attached to more interfaces.
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
        """Whether the programs are attached."""
        return self._links is not None

    @property
    def links(self) -> Links:
        """The programs on interfaces; only once they are attached."""
        assert self._links is not None
        return self._links

    def pin(self) -> None:
        """Pin maps and programs, so that the next `up` with these `pins` finds the spliced pairs.

        Raises:
            LoadError: bpffs refuses.
        """
        directory = self.links.directory
        assert directory is not None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Anew: the directory may have been removed, and made again.
            claim, self._claim = self._claim, Claim(directory)
            if claim is not None:
                claim.close()
            fds = [self.flows_fd, self.splices_fd, self.pairs_fd]
            fds += [self.sessions.flows_fd, self.sessions.sessions_fd]
            names = (*MAPS, *session_maps.PINS)
            for name, fd in zip(names, fds, strict=True):
                (directory / name).unlink(missing_ok=True)
                bpf.pin(fd, directory / name)
            wanted = {*names, *self.links.pin()}
            for path in pins_in(directory):
                if path.name not in wanted:
                    path.unlink()  # the pin of an interface that is gone
        except OSError as error:
            raise LoadError(f"pin splice in {directory}: {error.strerror}") from error

    def keep_only(self, worker: int) -> None:
        """In a worker, which has mapped the records: close everything but its ring."""
        self._close(ring_fd for n, ring_fd in enumerate(self.ring_fds) if n != worker)

    def close(self) -> None:
        """Close the descriptors. Unless pinned, the programs are detached in the process that has
        loaded them.
        """
        self._close(self.ring_fds)

    def _close(self, ring_fds: Iterable[int]) -> None:
        for part in (self._links, self._attacher, self._left, self._claim):
            if part is not None:
                part.close()
        for fd in (
            *ring_fds,
            self.flows_fd,
            self.splices_fd,
            self.rings_fd,
            self.handshakes_fd,
            self.scratch_fd,
            self.our_ports_fd,
            *((self.counters_fd,) if self.owns_counters else ()),
            *(fd for fd in (self.probe_fd, self.control_fd) if fd >= 0),
        ):
            os.close(fd)
        self.sessions.close()


def _refused(error: OSError) -> LoadError:
    """The error for maps that could not be created, or programs that could not be attached."""
    operation, number = "make ready for splice", error.errno or errno.EIO
    if number == errno.EPERM and (missing := host.missing_capabilities(refusal.NETWORK)):
        return refusal.lacking(operation, missing)
    if number in _UNKNOWN:
        return LoadError(f"{operation}: {error.strerror}", cause=Refusal.TOO_OLD, advice=_NEEDS)
    if number == errno.EPERM:
        return refusal.explain(operation, number, needs=refusal.NETWORK)
    cause = Refusal.MEMORY if number in (errno.ENOMEM, errno.ENOBUFS) else Refusal.OTHER
    return LoadError(f"{operation}: {error.strerror}", cause=cause)
